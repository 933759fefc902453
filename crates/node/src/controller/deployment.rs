//! Deployments: pods by template, rolled over without losing capacity.

use std::time::Duration;

use serde_json::{Value, json};
use xxhash_rust::xxh64::xxh64;

use api::k8s::{self, DeploymentSpec, IntOrPercent, Rounding};
use api::{ConfigSet, Kind, Object};
use types::NamespacedName;
use types::wellknown::labels::POD_TEMPLATE_HASH;

use super::report;
use crate::inject::deployment_of;
use crate::store::{Store, now, random};

/// Letters of generated names: no vowels, no digits that look like letters, as Kubernetes'.
const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// One pod of a deployment, as far as the plan cares.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Member {
    name: String,
    is_current: bool,
    is_ready: bool,
    /// Ready for `minReadySeconds`.
    is_available: bool,
    created: i64,
}

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Plan {
    create: u32,
    delete: Vec<String>,
}

/// Makes and removes pods of all deployments and removes pods that lost theirs. Returns after how long
/// to look again, if a pod only has to stay ready until then.
pub(super) fn reconcile(store: &Store) -> Option<Duration> {
    let objects = store.objects();
    let deployments = objects.all::<k8s::Deployment>();
    let again = deployments.filter_map(|(object, deployment)| one(store, &objects, object, deployment)).min();
    for (object, _) in objects.all::<k8s::Pod>() {
        if object.meta.deleted {
            continue;
        }
        if !object.meta.owners.iter().any(|owner| owner.kind == "ReplicaSet") {
            continue;
        }
        let is_owned = deployment_of(object)
            .is_some_and(|name| objects.get::<k8s::Deployment>(&object.meta.namespace, name).is_some());
        if !is_owned {
            delete(store, &object.key());
        }
    }
    again
}

fn delete(store: &Store, key: &NamespacedName) {
    if let Err(error) = store.delete(Kind::Pod, key) {
        tracing::error!(%error, pod = %key, "cannot delete a pod");
    }
}

fn one(store: &Store, objects: &ConfigSet, object: &Object, deployment: &k8s::Deployment) -> Option<Duration> {
    let hash = template_hash(&object.raw["spec"]["template"]);
    let namespace = &*object.meta.namespace;
    let (mut members, mut terminating, mut again) = (Vec::new(), 0, None::<Duration>);
    let at = jiff::Timestamp::now().as_second();
    for (pod, typed) in objects.in_namespace::<k8s::Pod>(namespace) {
        if deployment_of(pod) != Some(&*object.meta.name) {
            continue;
        }
        if pod.meta.deleted {
            terminating += 1;
            continue;
        }
        let left = until_available(typed, deployment.spec.min_ready_seconds, at);
        again = again.into_iter().chain(left.filter(|left| !left.is_zero())).min();
        members.push(Member {
            name: pod.meta.name.to_string(),
            is_current: pod.meta.labels.get(POD_TEMPLATE_HASH) == Some(&hash),
            is_ready: typed.status.is_ready(),
            is_available: left == Some(Duration::ZERO),
            created: pod.meta.created,
        });
    }
    let plan = if deployment.spec.paused { Plan::default() } else { plan(&deployment.spec, &members, terminating) };
    for name in &plan.delete {
        delete(store, &NamespacedName::new(namespace, name));
    }
    for _ in 0..plan.create {
        report(store.put(&pod(object, &hash)));
    }
    status(store, object, &deployment.spec, &members);
    again
}

/// How long the pod still has to stay ready until it counts as available; `None` while it is not ready.
fn until_available(pod: &k8s::Pod, min_ready_seconds: u32, now: i64) -> Option<Duration> {
    let ready =
        pod.status.conditions.iter().find(|condition| condition.kind == "Ready" && condition.status == "True")?;
    let since = ready.last_transition_time.as_deref().and_then(api::scalar::parse_time).unwrap_or(now);
    // A clock that was set back makes nobody wait longer than from now on.
    let left = (since.min(now) + i64::from(min_ready_seconds)).saturating_sub(now);
    Some(Duration::from_secs(u64::try_from(left).unwrap_or_default()))
}

fn template_hash(template: &Value) -> String {
    let mut rest = xxh64(template.to_string().as_bytes(), 0);
    let mut text = String::new();
    for _ in 0..10 {
        text.push(char::from(LETTERS[usize::try_from(rest % 27).unwrap_or_default()]));
        rest /= 27;
    }
    text
}

fn pod(deployment: &Object, hash: &str) -> Value {
    let template = &deployment.raw["spec"]["template"];
    let suffix: String = random::<5>().iter().map(|byte| char::from(LETTERS[usize::from(*byte) % 27])).collect();
    let replica_set = format!("{}-{hash}", deployment.meta.name);
    let mut meta = template["metadata"].clone();
    if !meta.is_object() {
        meta = json!({});
    }
    meta["name"] = format!("{replica_set}-{suffix}").into();
    meta["namespace"] = (*deployment.meta.namespace).into();
    if !meta["labels"].is_object() {
        meta["labels"] = json!({});
    }
    meta["labels"][POD_TEMPLATE_HASH] = hash.into();
    if let Some(meta) = meta.as_object_mut() {
        meta.remove("creationTimestamp");
        meta.remove("generateName");
    }
    meta["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": replica_set, "uid": &*deployment.meta.uid, "controller": true}]);
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]})
}

/// *Source*: Kubernetes' rolling update: never fewer available pods than `replicas - maxUnavailable`,
/// never more pods than `replicas + maxSurge`; defaults 25 %. An old pod that is ready serves, and counts
/// however young it is.
fn plan(spec: &DeploymentSpec, members: &[Member], terminating: u32) -> Plan {
    let replicas = spec.replicas.unwrap_or(1);
    let count = |test: fn(&&Member) -> bool| u32::try_from(members.iter().filter(test).count()).unwrap_or(u32::MAX);
    let (current, total) = (count(|m| m.is_current), count(|_| true));
    let serving = count(|m| if m.is_current { m.is_available } else { m.is_ready });
    let old = total - current;
    let oldest_last = |mut list: Vec<&Member>| {
        // Not ready first, then the newest.
        list.sort_by(|a, b| (a.is_ready, -a.created, &a.name).cmp(&(b.is_ready, -b.created, &b.name)));
        list.into_iter().map(|m| m.name.clone()).collect::<Vec<_>>()
    };
    let of = |is_current: bool| members.iter().filter(|m| m.is_current == is_current).collect::<Vec<_>>();
    if spec.strategy.kind == "Recreate" && (old > 0 || (current == 0 && terminating > 0)) {
        return Plan { create: 0, delete: oldest_last(of(false)) };
    }
    let rolling = spec.strategy.rolling_update.clone().unwrap_or_default();
    let quarter = IntOrPercent::Percent(25);
    let surge = rolling.max_surge.unwrap_or(quarter).of(replicas, Rounding::Up);
    let mut unavailable = rolling.max_unavailable.unwrap_or(quarter).of(replicas, Rounding::Down);
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    let room = replicas.saturating_add(surge).saturating_sub(total);
    let missing = replicas.saturating_sub(current);
    // Without old pods nothing is rolled over, and a deployment just grows.
    let create = if old == 0 { missing } else { missing.min(room) };
    let mut delete: Vec<String> =
        oldest_last(of(true)).into_iter().take(current.saturating_sub(replicas) as usize).collect();
    // Ready pods that may go: those above what must stay.
    let mut spare = serving.saturating_sub(replicas.saturating_sub(unavailable));
    let mut old_members = of(false);
    old_members.sort_by(|a, b| (a.is_ready, a.created, &a.name).cmp(&(b.is_ready, b.created, &b.name)));
    for member in old_members {
        if member.is_ready {
            if spare == 0 {
                continue;
            }
            spare -= 1;
        }
        delete.push(member.name.clone());
    }
    Plan { create, delete }
}

fn status(store: &Store, object: &Object, spec: &DeploymentSpec, members: &[Member]) {
    let replicas = spec.replicas.unwrap_or(1);
    let count = |test: &dyn Fn(&Member) -> bool| members.iter().filter(|m| test(m)).count();
    let (ready, updated) = (count(&|m| m.is_ready), count(&|m| m.is_current));
    let (available, updated_available) = (count(&|m| m.is_available), count(&|m| m.is_current && m.is_available));
    let is_complete =
        updated == replicas as usize && updated_available == replicas as usize && members.len() == updated;
    let is_available = available >= (replicas as usize).saturating_sub(replicas as usize / 4);
    let word = |yes: bool| if yes { "True" } else { "False" };
    let before = &object.raw["status"]["conditions"];
    let since = |kind: &str, status: &str| {
        let same = before.as_array().into_iter().flatten().find(|c| c["type"] == kind && c["status"] == status);
        same.and_then(|c| c["lastTransitionTime"].as_str()).map_or_else(now, str::to_owned)
    };
    let availability = word(is_available);
    let reason = if is_complete { "NewReplicaSetAvailable" } else { "ReplicaSetUpdated" };
    let status = json!({
        "observedGeneration": object.meta.generation,
        "replicas": members.len(),
        "updatedReplicas": updated,
        "readyReplicas": ready,
        "availableReplicas": available,
        "unavailableReplicas": (replicas as usize).saturating_sub(available),
        "conditions": [
            {"type": "Available", "status": availability, "reason": if is_available { "MinimumReplicasAvailable" } else { "MinimumReplicasUnavailable" },
             "lastTransitionTime": since("Available", availability)},
            {"type": "Progressing", "status": "True", "reason": reason, "lastTransitionTime": since("Progressing", "True")},
        ],
    });
    if object.raw["status"] == status {
        return;
    }
    if let Err(error) = store.patch(Kind::Deployment, &object.key(), |document| document["status"] = status) {
        tracing::error!(%error, deployment = %object.key(), "cannot save a status");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(replicas: u32, strategy: &str) -> DeploymentSpec {
        let value = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"a": "b"}}, "strategy": serde_json::from_str::<Value>(strategy).unwrap(),
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        api::from_json(&value).0.unwrap().typed::<k8s::Deployment>().unwrap().spec.clone()
    }

    /// Members as letters: `N` new ready, `n` new not ready, `O` old ready, `o` old not ready; `Y` and `Z`
    /// are new and old ones that are ready, but too young to be available.
    fn check(replicas: u32, strategy: &str, members: &str, terminating: u32, create: u32, delete: &str) {
        let list: Vec<Member> = members
            .chars()
            .enumerate()
            .map(|(index, c)| Member {
                name: format!("{c}{index}"),
                is_current: matches!(c, 'N' | 'n' | 'Y'),
                is_ready: c.is_ascii_uppercase(),
                is_available: matches!(c, 'N' | 'O'),
                created: i64::try_from(index).unwrap(),
            })
            .collect();
        let plan = plan(&spec(replicas, strategy), &list, terminating);
        assert_eq!(
            (plan.create, plan.delete.join(",").as_str()),
            (create, delete),
            "{replicas} {strategy} {members:?}"
        );
    }

    #[test]
    fn rolling_updates_keep_capacity() {
        let rolling = "{}";
        check(3, rolling, "", 0, 3, "");
        check(3, rolling, "NNN", 0, 0, "");
        check(2, rolling, "NNN", 0, 0, "N2");
        check(2, rolling, "NnN", 0, 0, "n1");
        check(1, rolling, "O", 0, 1, "");
        check(1, rolling, "On", 0, 0, "");
        check(1, rolling, "ON", 0, 0, "O0");
        check(1, rolling, "OY", 0, 0, "");
        check(1, rolling, "ZY", 0, 0, "");
        check(1, rolling, "ZN", 0, 0, "Z0");
        check(4, rolling, "OOOY", 0, 1, "");
        check(4, rolling, "OOOO", 0, 1, "O0");
        check(4, rolling, "OOOn", 0, 1, "");
        check(2, rolling, "Oo", 0, 1, "o1");
        check(0, rolling, "NN", 0, 0, "N1,N0");
        check(2, r#"{"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}"#, "OO", 0, 0, "O0");
        check(2, r#"{"rollingUpdate": {"maxSurge": "100%", "maxUnavailable": 0}}"#, "OO", 0, 2, "");
        check(2, r#"{"rollingUpdate": {"maxSurge": 4294967295}}"#, "OO", 0, 2, "");
        check(2, r#"{"type": "Recreate"}"#, "OO", 0, 0, "O1,O0");
        check(2, r#"{"type": "Recreate"}"#, "", 2, 0, "");
        check(2, r#"{"type": "Recreate"}"#, "", 0, 2, "");
    }

    #[test]
    fn a_pod_is_available_once_it_has_been_ready_long_enough() {
        let check = |status: &str, since: &str, min: u32, left: Option<u64>| {
            let pod =
                json!({"status": {"conditions": [{"type": "Ready", "status": status, "lastTransitionTime": since}]}});
            let pod: k8s::Pod = serde_json::from_value(pod).unwrap();
            let now = api::scalar::parse_time("2026-01-01T00:01:00Z").unwrap();
            assert_eq!(until_available(&pod, min, now), left.map(Duration::from_secs), "{since} {min}");
        };
        check("False", "2026-01-01T00:00:00Z", 0, None);
        check("True", "2026-01-01T00:01:00Z", 0, Some(0));
        check("True", "2026-01-01T00:00:50Z", 30, Some(20));
        check("True", "2026-01-01T00:00:30Z", 30, Some(0));
        check("True", "2026-01-01T01:00:00Z", 30, Some(30));
        check("True", "", 30, Some(30));
    }

    #[test]
    fn pods_come_and_go_with_their_deployment() {
        let store = Store::in_memory();
        let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio-injection: enabled}}\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\nspec: {replicas: 2, selector: {matchLabels: {app: web}}, template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c, image: i, command: [x]}]}}}\n";
        let documents = api::parse_documents("t", text)
            .objects
            .into_iter()
            .map(|o| ((*o.object.raw).clone(), crate::store::Origin::Api))
            .collect();
        store.apply(documents, crate::store::Mode::Apply, false).unwrap();
        reconcile(&store);
        reconcile(&store);
        let objects = store.objects();
        let pods: Vec<_> = objects.all::<k8s::Pod>().collect();
        assert_eq!(pods.len(), 2);
        let (pod, typed) = pods[0];
        assert!(pod.meta.name.starts_with("web-"), "{}", pod.meta.name);
        assert_eq!(typed.spec.containers.len(), 2, "app and proxy");
        assert_eq!(pod.meta.labels["security.istio.io/tlsMode"], "istio");
        let key = NamespacedName::new("shop", "web");
        store.patch(Kind::Deployment, &key, |d| d["spec"]["replicas"] = 1.into()).unwrap();
        reconcile(&store);
        assert_eq!(store.objects().all::<k8s::Pod>().filter(|(o, _)| o.meta.deleted).count(), 1);
        store.delete(Kind::Deployment, &key).unwrap();
        reconcile(&store);
        assert_eq!(store.objects().all::<k8s::Pod>().filter(|(o, _)| o.meta.deleted).count(), 2);
    }
}
