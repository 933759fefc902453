//! Labels and equality selectors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
