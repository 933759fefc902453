//! Where a workload runs.

use std::fmt;

use serde::{Deserialize, Serialize};

/// `region/zone/sub-zone`; unknown parts are empty.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Locality {
    /// `topology.kubernetes.io/region`
    pub region: Box<str>,
    /// `topology.kubernetes.io/zone`
    pub zone: Box<str>,
    /// `topology.istio.io/subzone`
    pub sub_zone: Box<str>,
}

impl Locality {
    /// Parses `region[/zone[/sub-zone]]`.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(Box::from);
        let mut next = || parts.next().unwrap_or_default();
        Self { region: next(), zone: next(), sub_zone: next() }
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.region.is_empty()
    }
}

impl fmt::Display for Locality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.region)?;
        if !self.zone.is_empty() {
            write!(f, "/{}", self.zone)?;
        }
        if !self.sub_zone.is_empty() {
            write!(f, "/{}", self.sub_zone)?;
        }
        Ok(())
    }
}
