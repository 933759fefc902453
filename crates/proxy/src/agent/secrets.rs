//! The workload's certificate and roots, for whoever may open the agent's socket.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{DataSource, Node, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret,
};
use futures_util::future::BoxFuture;
use identity::agent::Identities;
use identity::workload::WorkloadIdentity;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;
use xds::ResourceSet;
use xds::client::Protocol;
use xds::server::{Admitted, Answered, Authority, Caller, Observer, Outgoing, Progress};

use crate::secrets::{ROOTS, WORKLOAD};

/// Hands secrets to everybody who reaches it: the socket's permissions are the check.
pub(super) struct Own(watch::Receiver<Option<Arc<ResourceSet>>>);

/// Secrets that follow the identity; nothing is answered before the first certificate.
pub(super) fn follow(mut identities: Identities, tasks: &mut JoinSet<()>) -> Arc<Own> {
    let (sender, receiver) = watch::channel(None);
    tasks.spawn(async move {
        while identities.changed().await.is_ok() {
            let identity = identities.borrow_and_update().clone();
            if let Some(identity) = identity {
                sender.send_replace(Some(Arc::new(resources(&identity))));
            }
        }
    });
    Arc::new(Own(receiver))
}

fn resources(identity: &WorkloadIdentity) -> ResourceSet {
    let inline = |text: String| {
        Some(DataSource { specifier: Some(Specifier::InlineBytes(text.into_bytes())), ..DataSource::default() })
    };
    let chain: String = identity.keys.chain().iter().map(identity::pem::encode).collect();
    let certificate = TlsCertificate {
        certificate_chain: inline(chain),
        private_key: inline(identity.keys.key_pem()),
        ..TlsCertificate::default()
    };
    let roots = CertificateValidationContext {
        trusted_ca: inline(identity.roots.to_pem()),
        ..CertificateValidationContext::default()
    };
    let mut set = ResourceSet::new(identity.generation, &identity.generation.to_string());
    for (name, kind) in
        [(WORKLOAD, secret::Type::TlsCertificate(certificate)), (ROOTS, secret::Type::ValidationContext(roots))]
    {
        set.insert(name, proto::any::pack(&Secret { name: name.to_owned(), r#type: Some(kind) }));
    }
    set
}

impl Authority for Own {
    fn admit(&self, _: Caller, _: Node, _: Protocol) -> BoxFuture<'static, Result<Admitted, Status>> {
        let admitted = Admitted { resources: self.0.clone(), observer: Box::new(Logged) };
        Box::pin(std::future::ready(Ok(admitted)))
    }
}

/// Refusals go to the log; the rest is of no interest.
struct Logged;

impl Observer for Logged {
    fn sent(&mut self, _: &Outgoing) {}

    fn answered(&mut self, answered: &Answered) {
        if let Some(reason) = &answered.refused {
            tracing::warn!(%reason, "the Envoy refused its certificate or roots");
        }
    }

    fn progressed(&mut self, _: &Progress) {}
}
