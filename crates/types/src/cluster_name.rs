//! The names Istio builds for clusters.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::names::Hostname;

/// The name of a cluster, in every form Istio writes.
///
/// *Source*: `docs/parity.md`, Traffic 1.4: `outbound|<port>|<subset>|<fqdn>`, `inbound|<port>||`, fixed names.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ClusterName {
    /// Towards a service, one of its subsets, or a host outside.
    Outbound {
        /// The service's port.
        port: u16,
        /// Empty for the whole service.
        subset: Box<str>,
        /// The service's host.
        host: Hostname,
    },
    /// Towards the local workload's port.
    Inbound {
        /// The workload's port (the service's target port).
        port: u16,
    },
    /// Accepts nothing.
    BlackHole,
    /// Outbound to the original destination.
    Passthrough,
    /// Inbound to the original destination.
    InboundPassthrough,
}

/// A text that is none of the forms.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not a cluster name of Istio's form")]
pub struct InvalidClusterName(String);

impl ClusterName {
    /// The outbound name of `host:port`, with `subset` (empty for none).
    pub fn outbound(port: u16, subset: &str, host: &Hostname) -> Self {
        Self::Outbound { port, subset: subset.into(), host: host.clone() }
    }

    /// The SNI that mesh TLS towards this cluster carries:
    /// `outbound_.<port>_.<subset>_.<fqdn>`. `None` for fixed and inbound clusters.
    pub fn sni(&self) -> Option<String> {
        match self {
            Self::Outbound { port, subset, host } => Some(format!("outbound_.{port}_.{subset}_.{host}")),
            Self::Inbound { .. } | Self::BlackHole | Self::Passthrough | Self::InboundPassthrough => None,
        }
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outbound { port, subset, host } => write!(f, "outbound|{port}|{subset}|{host}"),
            Self::Inbound { port } => write!(f, "inbound|{port}||"),
            Self::BlackHole => f.write_str("BlackHoleCluster"),
            Self::Passthrough => f.write_str("PassthroughCluster"),
            Self::InboundPassthrough => f.write_str("InboundPassthroughCluster"),
        }
    }
}

impl FromStr for ClusterName {
    type Err = InvalidClusterName;

    fn from_str(text: &str) -> Result<Self, InvalidClusterName> {
        let bad = || InvalidClusterName(text.to_owned());
        match text {
            "BlackHoleCluster" => return Ok(Self::BlackHole),
            "PassthroughCluster" => return Ok(Self::Passthrough),
            "InboundPassthroughCluster" => return Ok(Self::InboundPassthrough),
            _ => {}
        }
        let mut parts = text.split('|');
        let (Some(direction), Some(port), Some(subset), Some(host), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad());
        };
        let port = port.parse().map_err(|_| bad())?;
        match direction {
            "outbound" => {
                let host = Hostname::parse(host).map_err(|_| bad())?;
                Ok(Self::Outbound { port, subset: subset.into(), host })
            }
            "inbound" if subset.is_empty() && host.is_empty() => Ok(Self::Inbound { port }),
            _ => Err(bad()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_round_trips() {
        for text in [
            "outbound|9080||reviews.shop.svc.cluster.local",
            "outbound|9080|v1|reviews.shop.svc.cluster.local",
            "inbound|9080||",
            "BlackHoleCluster",
            "PassthroughCluster",
            "InboundPassthroughCluster",
        ] {
            assert_eq!(text.parse::<ClusterName>().unwrap().to_string(), text);
        }
        assert!("outbound|x||a".parse::<ClusterName>().is_err());
        assert!("inbound|80|v1|a".parse::<ClusterName>().is_err());
    }

    #[test]
    fn sni_of_a_subset() {
        let name: ClusterName = "outbound|9080|v1|reviews.shop.svc.cluster.local".parse().unwrap();
        assert_eq!(name.sni().unwrap(), "outbound_.9080_.v1_.reviews.shop.svc.cluster.local");
        let whole: ClusterName = "outbound|9080||reviews.shop.svc.cluster.local".parse().unwrap();
        assert_eq!(whole.sni().unwrap(), "outbound_.9080_._.reviews.shop.svc.cluster.local");
    }
}
