//! Labels and equality selectors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::wellknown::labels;

/// Labels of an object, in the order of their keys.
pub type Labels = BTreeMap<String, String>;

/// An equality selector (`matchLabels`): every pair must be present.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Selector(pub Labels);

impl Selector {
    /// Whether `labels` carry every pair; the empty selector matches all.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    /// Whether no pair is asked for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The canonical name of a workload: its label, `app.kubernetes.io/name`, `app`, or its own name.
///
/// *Source*: Istio, "Canonical service".
pub fn canonical_name<'a>(of: &'a Labels, workload_name: &'a str) -> &'a str {
    first(of, &[labels::CANONICAL_NAME, labels::APP_KUBERNETES, labels::APP]).unwrap_or(workload_name)
}

/// The canonical revision of a workload, `latest` when no label says one.
pub fn canonical_revision(of: &Labels) -> &str {
    first(of, &[labels::CANONICAL_REVISION, labels::VERSION_KUBERNETES, labels::VERSION]).unwrap_or("latest")
}

fn first<'a>(of: &'a Labels, keys: &[&str]) -> Option<&'a str> {
    keys.iter().find_map(|key| of.get(*key).map(String::as_str).filter(|value| !value.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_names_have_an_order() {
        let mut of = Labels::new();
        assert_eq!((canonical_name(&of, "owner"), canonical_revision(&of)), ("owner", "latest"));
        for (label, value) in [(labels::APP, "a"), (labels::APP_KUBERNETES, "k"), (labels::CANONICAL_NAME, "c")] {
            of.insert(label.into(), value.into());
            assert_eq!(canonical_name(&of, "owner"), value);
        }
        of.insert(labels::CANONICAL_NAME.into(), String::new());
        assert_eq!(canonical_name(&of, "owner"), "k", "an empty label says nothing");
    }
}
