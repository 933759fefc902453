//! What is known of one end of a request, as metric labels.

use std::sync::Arc;

use types::Labels;
use types::labels::{canonical_name, canonical_revision};
use types::wellknown::labels;

/// One end of a request: a workload as metrics name it.
///
/// *Source*: Istio standard metrics, `source_*` and `destination_*`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Peer {
    /// Owner's name: the Deployment.
    pub workload: Box<str>,
    /// Namespace.
    pub namespace: Box<str>,
    /// Full `spiffe://` URI of a verified certificate, else `unknown`.
    pub principal: Box<str>,
    /// Label `app`.
    pub app: Box<str>,
    /// Label `version`.
    pub version: Box<str>,
    /// Canonical service.
    pub canonical_service: Box<str>,
    /// Canonical revision.
    pub canonical_revision: Box<str>,
    /// Cluster id.
    pub cluster: Box<str>,
}

/// What metrics say of an unknown peer.
pub const UNKNOWN: &str = "unknown";

impl Peer {
    /// A peer of which nothing is known.
    pub fn unknown() -> Arc<Self> {
        let unknown = || Box::from(UNKNOWN);
        Arc::new(Self {
            workload: unknown(),
            namespace: unknown(),
            principal: unknown(),
            app: unknown(),
            version: unknown(),
            canonical_service: unknown(),
            canonical_revision: unknown(),
            cluster: unknown(),
        })
    }

    /// A workload known by its own labels.
    pub fn of_workload(workload: &str, namespace: &str, principal: &str, cluster: &str, labels_of: &Labels) -> Self {
        let label = |name: &str| labels_of.get(name).map_or("", String::as_str);
        Self {
            workload: workload.into(),
            namespace: namespace.into(),
            principal: principal.into(),
            app: label(labels::APP).into(),
            version: label(labels::VERSION).into(),
            canonical_service: canonical_name(labels_of, workload).into(),
            canonical_revision: canonical_revision(labels_of).into(),
            cluster: cluster.into(),
        }
    }

    /// Parses the endpoint metadata `istio.workload`:
    /// `name;namespace;canonical service;revision;cluster`. `None` when nothing is said.
    pub fn from_endpoint_metadata(text: &str, principal: Option<&str>) -> Option<Self> {
        let mut parts = text.split(';');
        let mut next = || parts.next().unwrap_or_default();
        let (name, namespace, service, revision, cluster) = (next(), next(), next(), next(), next());
        if name.is_empty() && service.is_empty() {
            return None;
        }
        let or_unknown = |text: &str| Box::<str>::from(if text.is_empty() { UNKNOWN } else { text });
        Some(Self {
            workload: or_unknown(name),
            namespace: or_unknown(namespace),
            principal: or_unknown(principal.unwrap_or_default()),
            app: or_unknown(service),
            version: or_unknown(revision),
            canonical_service: or_unknown(service),
            canonical_revision: if revision.is_empty() { "latest".into() } else { revision.into() },
            cluster: or_unknown(cluster),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_metadata() {
        let peer = Peer::from_endpoint_metadata("reviews-v1;shop;reviews;v1;Kubernetes", None).unwrap();
        assert_eq!((&*peer.workload, &*peer.canonical_revision), ("reviews-v1", "v1"));
        assert_eq!(&*peer.principal, "unknown");
        assert!(Peer::from_endpoint_metadata(";;;;Kubernetes", None).is_none());
    }
}
