//! Which pods get a proxy: a rule over the labels of pod and namespace.
//!
//! *Source*: Istio, "Installing the Sidecar", the table of labels; without other revisions.

use types::Labels;
use types::wellknown::{annotations, labels};

const SYSTEM: &[&str] = &["kube-system", "kube-public", "kube-node-lease", "local-path-storage"];

/// What decides, of a pod about to be made.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// Labels of the namespace.
    pub namespace_labels: &'a Labels,
    /// Labels of the pod.
    pub labels: &'a Labels,
    /// Annotations of the pod.
    pub annotations: &'a std::collections::BTreeMap<String, String>,
    /// `spec.hostNetwork`
    pub host_network: bool,
    /// Whether namespaces that say nothing have their pods injected
    /// ([`crate::ConfigSet::injects_by_default`]).
    pub by_default: bool,
}

/// Whether the pod gets a proxy from the default revision.
pub fn wants_proxy(of: &Candidate<'_>) -> bool {
    if of.host_network || SYSTEM.contains(&of.namespace) {
        return false;
    }
    let label = |labels: &Labels, key: &str| labels.get(key).map(String::to_owned);
    let pod_inject = label(of.labels, labels::INJECT);
    let pod_rev = label(of.labels, labels::REVISION);
    if pod_inject.as_deref() == Some("false") {
        return false;
    }
    let selected = match (
        label(of.namespace_labels, labels::INJECTION).as_deref(),
        label(of.namespace_labels, labels::REVISION),
    ) {
        (Some("enabled"), _) => true,
        (Some(_), _) => false,
        (None, Some(revision)) => revision == "default",
        (None, None) => match pod_rev.as_deref() {
            Some(revision) => revision == "default",
            None => pod_inject.as_deref().map_or(of.by_default, |word| word == "true"),
        },
    };
    // The label beats the older annotation; only the two exact words count.
    let annotation = of.annotations.get(annotations::INJECT).map(String::as_str);
    selected && (pod_inject.as_deref() == Some("true") || annotation != Some("false"))
}
