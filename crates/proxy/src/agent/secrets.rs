//! The workload's certificate and roots, and secrets in files, for whoever may open the agent's socket.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use engine::config::Name;
use envoy_types::pb::envoy::config::core::v3::{DataSource, Node, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret as Message, TlsCertificate, secret,
};
use futures_util::future::BoxFuture;
use identity::agent::Identities;
use identity::workload::{KeyAndChain, TrustRoots, WorkloadIdentity};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;
use xds::ResourceSet;
use xds::client::Protocol;
use xds::server::{Admitted, Answered, Authority, Caller, Observer, Outgoing, Progress, Session};

use crate::file_secrets::{FileSecrets, IdentityFiles, is_of_files};
use workers::secrets::{ROOTS, Secret, WORKLOAD};

/// Names of files that the streams ask for, by stream.
type Asked = BTreeMap<u64, BTreeSet<Name>>;

/// Files are looked at so often.
const LOOK: Duration = Duration::from_millis(500);

/// Hands secrets to everybody who reaches it: the socket's permissions are the check.
pub(super) struct Own {
    sets: watch::Receiver<Option<Arc<ResourceSet>>>,
    asked: watch::Sender<Asked>,
    streams: AtomicU64,
}

/// The workload's identity where others provide it in files: chain, key, roots. It follows them.
///
/// *Errors*: what is in them now is none.
pub(super) fn of_files(paths: [PathBuf; 3], tasks: &mut JoinSet<()>) -> Result<Identities, String> {
    let mut files = IdentityFiles::new(paths);
    let (sender, identities) = watch::channel(None);
    if let Some(first) = files.look() {
        // Sent, not put in at the start: only then it is a change to whoever waits for one.
        sender.send_replace(Some(Arc::new(first?)));
    }
    tasks.spawn(follow_identity(files, sender));
    Ok(identities)
}

/// Publishes what comes to be in the files, until nobody wants it.
async fn follow_identity(mut files: IdentityFiles, identities: watch::Sender<Option<Arc<WorkloadIdentity>>>) {
    while !identities.is_closed() {
        tokio::time::sleep(LOOK).await;
        match files.look() {
            Some(Ok(identity)) => drop(identities.send_replace(Some(Arc::new(identity)))),
            Some(Err(reason)) => {
                tracing::warn!(
                    reason,
                    "the workload's certificate in files cannot be used; what was there before stays"
                );
            }
            None => {}
        }
    }
}

/// Secrets that follow the identity and the files that somebody asks for; nothing is answered before the first
/// certificate.
pub(super) fn follow(identities: Identities, tasks: &mut JoinSet<()>) -> Arc<Own> {
    let (sender, sets) = watch::channel(None);
    let (asked, names) = watch::channel(Asked::new());
    tasks.spawn(provide(identities, names, sender));
    Arc::new(Own { sets, asked, streams: AtomicU64::new(0) })
}

async fn provide(
    mut identities: Identities,
    mut asked: watch::Receiver<Asked>,
    sets: watch::Sender<Option<Arc<ResourceSet>>>,
) {
    let mut files = FileSecrets::default();
    let mut of_files: BTreeMap<Name, Secret> = BTreeMap::new();
    let mut generation = 0;
    loop {
        let is_watching = !files.is_empty();
        tokio::select! {
            changed = identities.changed() => if changed.is_err() { return },
            changed = asked.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK), if is_watching => {
                let changed = files.look();
                if changed.is_empty() {
                    continue;
                }
                of_files.extend(changed);
            }
        }
        let names: BTreeSet<Name> = asked.borrow_and_update().values().flatten().cloned().collect();
        for gone in files.follow(names) {
            of_files.remove(&gone);
        }
        of_files.extend(files.look());
        let Some(identity) = identities.borrow_and_update().clone() else { continue };
        generation += 1;
        let mut set = ResourceSet::new(generation, &generation.to_string());
        insert(&mut set, WORKLOAD, certificate(&identity.keys));
        insert(&mut set, ROOTS, validation(&identity.roots));
        for (name, secret) in &of_files {
            insert(
                &mut set,
                name,
                match secret {
                    Secret::Certificate(keys) => certificate(keys),
                    // roots in files have no rules beside
                    Secret::Roots(trust) => validation(&trust.roots),
                },
            );
        }
        sets.send_replace(Some(Arc::new(set)));
    }
}

fn insert(set: &mut ResourceSet, name: &str, kind: secret::Type) {
    set.insert(name, proto::any::pack(&Message { name: name.to_owned(), r#type: Some(kind) }));
}

fn inline(text: String) -> DataSource {
    DataSource { specifier: Some(Specifier::InlineBytes(text.into_bytes())), ..DataSource::default() }
}

fn certificate(keys: &KeyAndChain) -> secret::Type {
    let chain: String = keys.chain().iter().map(identity::pem::encode).collect();
    secret::Type::TlsCertificate(TlsCertificate {
        certificate_chain: Some(inline(chain)),
        private_key: Some(inline(keys.key_pem())),
        ..TlsCertificate::default()
    })
}

fn validation(roots: &TrustRoots) -> secret::Type {
    secret::Type::ValidationContext(CertificateValidationContext {
        trusted_ca: Some(inline(roots.to_pem())),
        ..CertificateValidationContext::default()
    })
}

impl Authority for Own {
    fn admit(&self, _: Caller, _: Node, _: Protocol) -> BoxFuture<'static, Result<Admitted, Status>> {
        let stream = Stream { id: self.streams.fetch_add(1, Ordering::Relaxed), asked: self.asked.clone() };
        let admitted = Admitted { resources: self.sets.clone(), observer: Box::new(stream) };
        Box::pin(std::future::ready(Ok(admitted)))
    }
}

/// One stream. Refusals go to the log.
struct Stream {
    id: u64,
    asked: watch::Sender<Asked>,
}

impl Observer for Stream {
    fn sent(&mut self, _: &Outgoing) {}

    fn answered(&mut self, answered: &Answered) {
        if let Some(reason) = &answered.refused {
            tracing::warn!(%reason, "the Envoy refused its certificate or roots");
        }
    }

    fn progressed(&mut self, _: &Progress) {}

    fn subscribed(&mut self, session: &Session) {
        let names: BTreeSet<Name> = session.names().filter(|name| is_of_files(name)).map(Name::from).collect();
        self.asked.send_if_modified(|asked| {
            if names.is_empty() {
                return asked.remove(&self.id).is_some();
            }
            asked.insert(self.id, names.clone()).as_ref() != Some(&names)
        });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.asked.send_if_modified(|asked| asked.remove(&self.id).is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn an_identity_in_files_is_served_and_followed() {
        let dir = tempfile::tempdir().unwrap();
        let put = |account: &str| {
            let mut parameters = rcgen::CertificateParams::default();
            let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
            parameters.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().unwrap())];
            let key = rcgen::KeyPair::generate().unwrap();
            let certificate = parameters.self_signed(&key).unwrap().pem();
            for (name, text) in [("roots", &certificate), ("chain", &certificate), ("key", &key.serialize_pem())] {
                std::fs::write(dir.path().join("new"), text).unwrap();
                std::fs::rename(dir.path().join("new"), dir.path().join(name)).unwrap();
            }
        };
        let paths = ["chain", "key", "roots"].map(|name| dir.path().join(name));
        let mut tasks = JoinSet::new();
        assert!(of_files(paths.clone(), &mut tasks).unwrap_err().contains("chain"), "nothing is there");
        put("first");
        let mut identities = of_files(paths, &mut tasks).unwrap();
        let own = follow(identities.clone(), &mut tasks);
        let mut sets = own.sets.clone();
        tokio::time::timeout(PATIENCE, sets.wait_for(Option::is_some)).await.expect("it is served").unwrap();
        put("second");
        let waiting = identities
            .wait_for(|identity| identity.as_ref().is_some_and(|identity| &*identity.id.service_account == "second"));
        tokio::time::timeout(PATIENCE, waiting).await.expect("it is followed").unwrap();
    }
}
