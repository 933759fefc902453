//! Names of Istio's form that are built from parts, where a host may be a wildcard.

/// `outbound|<port>|<subset>|<host>`
pub(crate) fn cluster(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// `outbound_.<port>_.<subset>_.<host>`, the SNI of mesh TLS.
pub(crate) fn sni(port: u16, subset: &str, host: &str) -> String {
    format!("outbound_.{port}_.{subset}_.{host}")
}

/// Outbound to the original destination.
pub(crate) const PASSTHROUGH: &str = "PassthroughCluster";
/// Accepts nothing.
pub(crate) const BLACK_HOLE: &str = "BlackHoleCluster";
/// Inbound to the original destination.
pub(crate) const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";
