//! The workload's certificate and roots, and secrets in files, for whoever may open the agent's socket.

use std::collections::{BTreeMap, BTreeSet};
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
use identity::workload::{KeyAndChain, TrustRoots};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;
use xds::ResourceSet;
use xds::client::Protocol;
use xds::server::{Admitted, Answered, Authority, Caller, Observer, Outgoing, Progress, Session};

use crate::file_secrets::{FileSecrets, is_of_files};
use crate::secrets::{ROOTS, Secret, WORKLOAD};

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
                    Secret::Roots(roots) => validation(roots),
                },
            );
        }
        sets.send_replace(Some(Arc::new(set)));
    }
}

fn insert(set: &mut ResourceSet, name: &str, kind: secret::Type) {
    set.insert(name, proto::any::pack(&Message { name: name.to_owned(), r#type: Some(kind) }));
}

fn inline(text: String) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(text.into_bytes())), ..DataSource::default() })
}

fn certificate(keys: &KeyAndChain) -> secret::Type {
    let chain: String = keys.chain().iter().map(identity::pem::encode).collect();
    secret::Type::TlsCertificate(TlsCertificate {
        certificate_chain: inline(chain),
        private_key: inline(keys.key_pem()),
        ..TlsCertificate::default()
    })
}

fn validation(roots: &TrustRoots) -> secret::Type {
    secret::Type::ValidationContext(CertificateValidationContext {
        trusted_ca: inline(roots.to_pem()),
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
