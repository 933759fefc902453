//! Who may subscribe to whose configuration.

use std::fmt;
use std::sync::Arc;

use compile::View;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::value::Kind;
use futures_util::future::BoxFuture;
use identity::agent::describe;
use tonic::Status;
use xds::client::Protocol;
use xds::server::{Admitted, Authority, Caller as Stream};

use crate::authn::{Authn, Caller};
use crate::fleet::Fleet;
use crate::listen::Connection;

/// Streams of nobody are taken only on plaintext listeners, which exist only on request.
pub struct Admission {
    authn: Arc<Authn>,
    fleet: Arc<Fleet>,
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("authn", &self.authn).finish_non_exhaustive()
    }
}

impl Admission {
    /// Admits to `fleet` whom `authn` knows.
    pub fn new(authn: Arc<Authn>, fleet: Arc<Fleet>) -> Self {
        Self { authn, fleet }
    }
}

impl Authority for Admission {
    fn admit(&self, stream: Stream, node: Node, protocol: Protocol) -> BoxFuture<'static, Result<Admitted, Status>> {
        let (authn, fleet) = (Arc::clone(&self.authn), Arc::clone(&self.fleet));
        Box::pin(async move {
            let connection = stream.extensions.get::<Connection>().cloned().unwrap_or_default();
            let mut view = View::from_node(&node).map_err(|error| Status::invalid_argument(error.to_string()))?;
            let caller = if connection.is_secure {
                let caller = authn.caller(&connection, &stream.metadata).await.map_err(|refused| {
                    tracing::info!(node = node.id, peer = ?connection.peer, reason = %describe(&refused), "stream refused");
                    Status::unauthenticated("authentication failure")
                })?;
                authorize(&caller, &mut view, &node)?;
                Some(caller)
            } else {
                None
            };
            let istio_version = text(&node, "ISTIO_VERSION").unwrap_or_default();
            tracing::info!(node = node.id, id = ?caller.as_ref().map(|caller| caller.id.to_string()), ?protocol, "proxy connected");
            let id = caller.map(|caller| caller.id);
            let (resources, member) = fleet.join(view, &node.id, istio_version, id, protocol);
            Ok(Admitted { resources, observer: Box::new(member) })
        })
    }
}

/// A node is told only what the caller's own identity is for (`PILOT_ENABLE_XDS_IDENTITY_CHECK`).
fn authorize(caller: &Caller, view: &mut View, node: &Node) -> Result<(), Status> {
    let claimed = text(node, "SERVICE_ACCOUNT").filter(|name| !name.is_empty()).unwrap_or(&caller.id.service_account);
    // Both places where a node names its namespace must agree, or the one not checked would be a way around.
    let by_id = node.id.split('~').nth(2).and_then(|name| name.rsplit_once('.')).map(|(_, namespace)| namespace);
    let fits = *view.namespace == *caller.id.namespace
        && by_id.is_none_or(|namespace| *namespace == *caller.id.namespace)
        && *claimed == *caller.id.service_account;
    if !fits {
        tracing::info!(node = node.id, id = %caller.id, "node claims another identity");
        return Err(Status::permission_denied(format!(
            "authorization failed: no identities ([{}]) matched {}/{claimed}",
            caller.id, view.namespace
        )));
    }
    // A token that is bound to a pod speaks for that pod only.
    if let Some(pod) = &caller.pod
        && **pod != *view.name
    {
        return Err(Status::permission_denied(format!(
            "authorization failed: the token is bound to pod {pod}, not {}",
            view.name
        )));
    }
    view.service_account = caller.id.service_account.clone();
    Ok(())
}

fn text<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    match node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}
