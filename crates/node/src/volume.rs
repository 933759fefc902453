//! What is in a pod's volumes, and where its containers see them.

use std::path::PathBuf;
use std::time::Duration;

use api::k8s::{Container, DownwardApiVolume, KeyToPath};
use api::{ConfigSet, k8s};

use crate::env::{Missing, PodFacts, field};
use crate::spec::{Mount, Volume, VolumeFile, VolumeSource};
use crate::token::{TokenSubject, Tokens};

/// Where Kubernetes puts a pod's own token.
const ACCOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const ACCOUNT_VOLUME: &str = "kube-api-access";
const TOKEN_SECONDS: u64 = 43_200;

/// What volumes are filled from.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// ConfigMaps and Secrets.
    pub objects: &'a ConfigSet,
    /// Mints tokens.
    pub tokens: &'a Tokens,
    /// Seconds since 1970.
    pub now: i64,
}

/// A volume whose content is not there (yet).
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("volume {volume:?} cannot be filled")]
pub struct UnfilledVolume {
    /// Which.
    pub volume: String,
    /// What it needs.
    #[source]
    pub missing: Missing,
}

/// All volumes of a pod, with the one of its service account.
pub fn volumes(facts: &PodFacts<'_>, from: &Contents<'_>) -> Result<Vec<Volume>, UnfilledVolume> {
    each_volume(facts, from).collect()
}

/// [`volumes`] one by one: what lacks something keeps no other from being filled.
pub(crate) fn each_volume(
    facts: &PodFacts<'_>,
    from: &Contents<'_>,
) -> impl Iterator<Item = Result<Volume, UnfilledVolume>> {
    let of_spec = facts.pod.spec.volumes.iter().map(|volume| {
        let unfilled = |missing| UnfilledVolume { volume: volume.name.clone(), missing };
        Ok(Volume { name: volume.name.clone(), source: source(volume, facts, from).map_err(unfilled)? })
    });
    let of_account = has_account(facts.pod)
        .then(|| Ok(Volume { name: ACCOUNT_VOLUME.to_owned(), source: VolumeSource::Files(account(facts, from)) }));
    of_spec.chain(of_account)
}

/// After how long the tokens in a pod's volumes are to be renewed.
///
/// *Source*: Kubernetes' kubelet: when four fifths of the time are over for which they are good.
pub(crate) fn token_renewal(pod: &k8s::Pod) -> Duration {
    let of_volumes = pod.spec.volumes.iter().filter_map(|volume| volume.projected.as_ref());
    let tokens = of_volumes.flat_map(|projected| &projected.sources);
    let shortest = tokens.filter_map(|part| part.service_account_token.as_ref()).map(good_for).min();
    Duration::from_secs(shortest.unwrap_or(TOKEN_SECONDS).min(TOKEN_SECONDS) / 5 * 4)
}

/// Whether the volume of this name has tokens in it, which need renewal.
pub(crate) fn has_token(pod: &k8s::Pod, volume: &str) -> bool {
    let of_name = pod.spec.volumes.iter().filter(|one| one.name == volume);
    let mut sources = of_name.filter_map(|one| one.projected.as_ref()).flat_map(|projected| &projected.sources);
    sources.any(|part| part.service_account_token.is_some())
}

/// Seconds that a token is good for. Kubernetes makes none for less than ten minutes.
fn good_for(token: &k8s::ServiceAccountTokenProjection) -> u64 {
    token.expiration_seconds.unwrap_or(3600).max(600)
}

fn has_account(pod: &k8s::Pod) -> bool {
    let spec = &pod.spec;
    spec.automount_service_account_token != Some(false)
        && !spec.volumes.iter().any(|volume| volume.name == ACCOUNT_VOLUME)
}

fn account(facts: &PodFacts<'_>, from: &Contents<'_>) -> Vec<VolumeFile> {
    let namespace = facts.object.meta.namespace.to_string();
    let token = mint(facts, from, "https://kubernetes.default.svc.cluster.local", TOKEN_SECONDS);
    vec![file("token", token.into_bytes(), 0o600), file("namespace", namespace.into_bytes(), 0o644)]
}

fn mint(facts: &PodFacts<'_>, from: &Contents<'_>, audience: &str, seconds: u64) -> String {
    let subject = TokenSubject {
        namespace: facts.object.meta.namespace.to_string(),
        service_account: facts.pod.spec.account().to_owned(),
        pod: facts.object.meta.name.to_string(),
        pod_uid: facts.object.meta.uid.to_string(),
    };
    from.tokens.mint(&subject, audience, from.now, seconds)
}

fn file(path: &str, contents: Vec<u8>, mode: u32) -> VolumeFile {
    VolumeFile { path: path.to_owned(), mode, contents }
}

fn source(volume: &k8s::Volume, facts: &PodFacts<'_>, from: &Contents<'_>) -> Result<VolumeSource, Missing> {
    let namespace = &*facts.object.meta.namespace;
    if let Some(of) = &volume.config_map {
        return config_map(namespace, &of.name, &of.items, of.optional, of.default_mode, from).map(VolumeSource::Files);
    }
    if let Some(of) = &volume.secret {
        return secret(namespace, &of.secret_name, &of.items, of.optional, of.default_mode, from)
            .map(VolumeSource::Files);
    }
    if let Some(of) = &volume.downward_api {
        return Ok(VolumeSource::Files(downward(of, facts)));
    }
    if let Some(of) = &volume.projected {
        let mut files = Vec::new();
        for part in &of.sources {
            if let Some(part) = &part.config_map {
                files.extend(config_map(namespace, &part.name, &part.items, part.optional, of.default_mode, from)?);
            }
            if let Some(part) = &part.secret {
                files.extend(secret(namespace, &part.name, &part.items, part.optional, of.default_mode, from)?);
            }
            if let Some(part) = &part.downward_api {
                files.extend(downward(part, facts));
            }
            if let Some(part) = &part.service_account_token {
                let path = if part.path.is_empty() { "token" } else { &part.path };
                let token = mint(facts, from, &part.audience, good_for(part));
                files.push(file(path, token.into_bytes(), of.default_mode.unwrap_or(0o600)));
            }
        }
        return Ok(VolumeSource::Files(files));
    }
    if let Some(path) = volume.host_path.as_ref().and_then(|of| of["path"].as_str()) {
        return Ok(VolumeSource::Host(PathBuf::from(path)));
    }
    Ok(VolumeSource::Empty)
}

type Pairs = Vec<(String, Vec<u8>)>;

fn config_map(
    namespace: &str,
    name: &str,
    items: &[KeyToPath],
    optional: bool,
    mode: Option<u32>,
    from: &Contents<'_>,
) -> Result<Vec<VolumeFile>, Missing> {
    let pairs = from.objects.get::<k8s::ConfigMap>(namespace, name).map(|(_, map)| -> Pairs {
        let text = map.data.iter().map(|(key, value)| (key.clone(), value.clone().into_bytes()));
        text.chain(map.binary_data.iter().map(|(key, value)| (key.clone(), value.0.clone()))).collect()
    });
    pick(pairs, &format!("ConfigMap {namespace}/{name}"), items, optional, mode.unwrap_or(0o644))
}

fn secret(
    namespace: &str,
    name: &str,
    items: &[KeyToPath],
    optional: bool,
    mode: Option<u32>,
    from: &Contents<'_>,
) -> Result<Vec<VolumeFile>, Missing> {
    let pairs = from.objects.get::<k8s::Secret>(namespace, name).map(|(_, secret)| -> Pairs {
        secret.keys().into_iter().filter_map(|key| Some((key.to_owned(), secret.value(key)?.to_vec()))).collect()
    });
    pick(pairs, &format!("Secret {namespace}/{name}"), items, optional, mode.unwrap_or(0o644))
}

/// All keys as files, or the listed ones under their paths.
fn pick(
    pairs: Option<Pairs>,
    what: &str,
    items: &[KeyToPath],
    optional: bool,
    mode: u32,
) -> Result<Vec<VolumeFile>, Missing> {
    let Some(pairs) = pairs else {
        return if optional { Ok(Vec::new()) } else { Err(Missing(format!("{what} is not there"))) };
    };
    if items.is_empty() {
        return Ok(pairs.into_iter().map(|(key, value)| file(&key, value, mode)).collect());
    }
    let mut files = Vec::new();
    for item in items {
        match pairs.iter().find(|(key, _)| *key == item.key) {
            Some((_, value)) => files.push(file(&item.path, value.clone(), item.mode.unwrap_or(mode))),
            None if optional => {}
            None => return Err(Missing(format!("{what} has no key {:?}", item.key))),
        }
    }
    Ok(files)
}

fn downward(volume: &DownwardApiVolume, facts: &PodFacts<'_>) -> Vec<VolumeFile> {
    let mode = volume.default_mode.unwrap_or(0o644);
    let items = volume.items.iter().filter_map(|item| {
        let selector = item.field_ref.as_ref()?;
        Some(file(&item.path, field(selector, facts).into_bytes(), item.mode.unwrap_or(mode)))
    });
    items.collect()
}

/// Where `container` sees the pod's volumes.
pub fn mounts(container: &Container, facts: &PodFacts<'_>) -> Vec<Mount> {
    let mut out: Vec<Mount> = container
        .volume_mounts
        .iter()
        .map(|mount| Mount {
            volume: mount.name.clone(),
            path: PathBuf::from(&mount.mount_path),
            sub_path: Some(mount.sub_path.clone()).filter(|path| !path.is_empty()),
            read_only: mount.read_only,
        })
        .collect();
    let is_taken = out.iter().any(|mount| mount.path.starts_with(ACCOUNT_PATH));
    if has_account(facts.pod) && !is_taken {
        out.push(Mount {
            volume: ACCOUNT_VOLUME.to_owned(),
            path: PathBuf::from(ACCOUNT_PATH),
            sub_path: None,
            read_only: true,
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn volumes_are_filled_or_waited_for() {
        let set = |with_secret: bool| {
            let mut list = vec![
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m", "namespace": "shop"}, "data": {"a": "1", "b": "2"}}),
            ];
            if with_secret {
                list.push(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "shop"}, "data": {"k": "dg=="}}));
            }
            ConfigSet::new(list.iter().filter_map(|value| api::from_json(value).0))
        };
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "shop", "uid": "u", "labels": {"app": "x"}},
        "spec": {"containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "one", "mountPath": "/one"}]}], "volumes": [
            {"name": "one", "configMap": {"name": "m", "items": [{"key": "b", "path": "deep/b.txt"}]}},
            {"name": "two", "secret": {"secretName": "s", "defaultMode": 256}},
            {"name": "three", "emptyDir": {}},
            {"name": "four", "projected": {"sources": [{"serviceAccountToken": {"audience": "istio-ca", "path": "istio-token"}}]}},
            {"name": "five", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        ]}});
        let object = api::from_json(&pod).0.unwrap();
        let typed = object.typed::<k8s::Pod>().unwrap().clone();
        let facts = PodFacts { object: &object, pod: &typed, ip: "", host_ip: "", node_name: "" };
        let tokens = Tokens::new();
        let missing = volumes(&facts, &Contents { objects: &set(false), tokens: &tokens, now: 0 }).unwrap_err();
        assert_eq!((missing.volume.as_str(), missing.missing.0.as_str()), ("two", "Secret shop/s is not there"));
        let full = set(true);
        let made = volumes(&facts, &Contents { objects: &full, tokens: &tokens, now: 0 }).unwrap();
        let files = |index: usize| match &made[index].source {
            VolumeSource::Files(files) => files.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!((files(0)[0].path.as_str(), files(0)[0].contents.as_slice()), ("deep/b.txt", &b"2"[..]));
        assert_eq!((files(1)[0].mode, files(1)[0].contents.as_slice()), (0o400, &b"v"[..]));
        assert_eq!(made[2].source, VolumeSource::Empty);
        assert_eq!(files(3)[0].path, "istio-token");
        assert_eq!(files(4)[0].contents, b"app=\"x\"\n");
        let mounts = mounts(&typed.spec.containers[0], &facts);
        assert_eq!(mounts.len(), 2);
        assert_eq!(made[5].name, mounts[1].volume);
    }

    #[test]
    fn a_token_is_renewed_while_it_is_good() {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "shop", "uid": "u"},
        "spec": {"containers": [{"name": "c", "image": "i"}], "volumes": [
            {"name": "gone", "secret": {"secretName": "s"}},
            {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"audience": "vault", "expirationSeconds": 600, "path": "t"}}]}},
        ]}});
        let object = api::from_json(&pod).0.unwrap();
        let typed = object.typed::<k8s::Pod>().unwrap().clone();
        let facts = PodFacts { object: &object, pod: &typed, ip: "", host_ip: "", node_name: "" };
        let objects = ConfigSet::new([object.clone()]);
        let tokens = Tokens::new();
        let token_at = |now: i64| {
            let from = Contents { objects: &objects, tokens: &tokens, now };
            let made: Vec<Volume> = each_volume(&facts, &from).flatten().collect();
            let volume = made.into_iter().find(|volume| volume.name == "token").unwrap();
            let VolumeSource::Files(files) = volume.source else { panic!("no files") };
            String::from_utf8(files[0].contents.clone()).unwrap()
        };
        let is_good = |token: &str, now: i64| {
            let review = crate::token::TokenReview { token: token.to_owned(), audience: "vault".to_owned() };
            tokens.review(&review, &objects, now).authenticated
        };
        let renewal = token_renewal(&typed);
        assert_eq!(renewal, Duration::from_secs(480));
        assert!(has_token(&typed, "token") && !has_token(&typed, "gone"));
        let (mut now, mut token) = (1_000, token_at(1_000));
        for _ in 0..20 {
            now += i64::try_from(renewal.as_secs()).unwrap();
            assert!(is_good(&token, now), "it is in use until it is renewed");
            assert!(!is_good(&token, now + 120));
            token = token_at(now);
        }
        let mut plain = (*typed).clone();
        plain.spec.volumes.clear();
        assert_eq!(token_renewal(&plain), Duration::from_secs(TOKEN_SECONDS) * 4 / 5);
    }
}
