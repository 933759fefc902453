//! The facts of one proxy that compiling may use.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use api::mesh_config::ProxyConfig;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use thiserror::Error;
use types::{Labels, Locality, labels};

/// What a proxy is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ProxyKind {
    /// Beside one workload.
    Sidecar,
    /// On its own, at the edge.
    Router,
}

/// Which filters of Istio's own build a proxy has, from `Node.extensions`.
///
/// A plain Envoy refuses a listener that names a filter it does not know, so each goes only to
/// clients that list it. Fallbacks for the others:
///
/// | missing | instead |
/// |---|---|
/// | `istio.alpn` | the cluster's own ALPN says the protocol, `istio-http/1.1` or `istio-h2`; where the client's protocol decides, `istio-peer-exchange, istio` (the server then takes such a request as bytes) |
/// | `istio.stats` | no such metrics |
/// | `istio.metadata_exchange` (network, upstream, HTTP) | peers stay unknown in telemetry; as servers of bytes they offer `istio` in place of `istio-peer-exchange`, lest a peer's metadata reach the application |
/// | `envoy.filters.network.ext_authz` | authorizers that speak gRPC cannot be asked; what their policies match is refused |
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Capabilities {
    /// `istio.alpn`
    pub has_alpn: bool,
    /// `istio.stats`
    pub has_stats: bool,
    /// `istio.metadata_exchange` as network and upstream filter.
    pub has_metadata_exchange: bool,
    /// `istio.metadata_exchange` as HTTP filter.
    pub has_peer_metadata: bool,
    /// Authorizers that speak gRPC can be asked.
    pub has_grpc_authorizers: bool,
}

impl Capabilities {
    /// Lateen's proxy: all of Istio's own filters.
    pub const ALL: Self = Self {
        has_alpn: true,
        has_stats: true,
        has_metadata_exchange: true,
        has_peer_metadata: true,
        has_grpc_authorizers: false,
    };
    /// Nothing: a plain Envoy.
    pub const NONE: Self = Self {
        has_alpn: false,
        has_stats: false,
        has_metadata_exchange: false,
        has_peer_metadata: false,
        has_grpc_authorizers: false,
    };
}

/// How connections reach the proxy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Interception {
    /// `REDIRECT`
    Redirect,
    /// `TPROXY`
    Tproxy,
    /// Applications dial the proxy.
    None,
}

/// The facts of one proxy.
///
/// *Shape*: equal views of one snapshot compile to equal resources.
#[derive(Clone, PartialEq, Debug)]
pub struct View {
    /// What it is for.
    pub kind: ProxyKind,
    /// Its addresses, the first is the main one. May be empty for routers.
    pub ips: Vec<IpAddr>,
    /// The pod's name.
    pub name: Box<str>,
    /// The pod's namespace.
    pub namespace: Box<str>,
    /// The pod's labels.
    pub labels: Labels,
    /// The pod's service account.
    pub service_account: Box<str>,
    /// The workload (Deployment) it belongs to.
    pub workload_name: Box<str>,
    /// `CLUSTER_ID`
    pub cluster_id: Box<str>,
    /// `MESH_ID`
    pub mesh_id: Box<str>,
    /// Where it runs.
    pub locality: Locality,
    /// The node it runs on.
    pub node: Box<str>,
    /// It answers the application's DNS, so automatic addresses are dialled.
    pub captures_dns: bool,
    /// How connections reach it.
    pub interception: Interception,
    /// HTTP/1.0 is accepted (`HTTP10`).
    pub accepts_http10: bool,
    /// It cannot bind ports below 1024.
    pub is_unprivileged: bool,
    /// Which filters it has.
    pub capabilities: Capabilities,
    /// Its settings as they were when it started: the mesh's `defaultConfig` under the pod's own
    /// (`proxy.istio.io/config`). `None`: it does not tell, and the mesh's hold.
    pub proxy_config: Option<Arc<ProxyConfig>>,
}

/// Why a node's description is not a view.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum InvalidNode {
    /// Not `<type>~<ip>~<name>.<namespace>~<domain>`.
    #[error("node id {0:?} is not of the form type~ip~name.namespace~domain")]
    Id(String),
    /// Neither `sidecar` nor `router`.
    #[error("node type {0:?} is neither sidecar nor router")]
    Kind(String),
    /// Bytes that are no `envoy.config.core.v3.Node`.
    #[error("not a node: {0}")]
    Encoding(#[from] prost::DecodeError),
}

impl View {
    /// A sidecar with all capabilities; the other facts are to be filled in.
    pub fn sidecar(namespace: &str, name: &str, ip: IpAddr) -> Self {
        Self {
            kind: ProxyKind::Sidecar,
            ips: vec![ip],
            name: name.into(),
            namespace: namespace.into(),
            labels: Labels::new(),
            service_account: "default".into(),
            workload_name: name.into(),
            cluster_id: "Kubernetes".into(),
            mesh_id: types::wellknown::DEFAULT_TRUST_DOMAIN.into(),
            locality: Locality::default(),
            node: "".into(),
            captures_dns: false,
            interception: Interception::Redirect,
            accepts_http10: false,
            is_unprivileged: false,
            capabilities: Capabilities::ALL,
            proxy_config: None,
        }
    }

    /// [`View::from_node`] of an encoded `envoy.config.core.v3.Node`, as a config dump holds it.
    pub fn from_encoded_node(bytes: &[u8]) -> Result<Self, InvalidNode> {
        Self::from_node(&<Node as prost::Message>::decode(bytes)?)
    }

    /// Reads the node that a client sends with its first request.
    ///
    /// *Errors*: an id that is not of Istio's form. Metadata that is absent has Istio's defaults.
    pub fn from_node(node: &Node) -> Result<Self, InvalidNode> {
        let mut parts = node.id.split('~');
        let (Some(kind), Some(ip), Some(id), Some(_domain), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(InvalidNode::Id(node.id.clone()));
        };
        let kind = match kind {
            "sidecar" => ProxyKind::Sidecar,
            "router" => ProxyKind::Router,
            other => return Err(InvalidNode::Kind(other.to_owned())),
        };
        let (name, namespace) = id.rsplit_once('.').unwrap_or((id, ""));
        let metadata = Metadata(node.metadata.as_ref());
        let mut ips: Vec<IpAddr> = ip.parse().into_iter().collect();
        for text in metadata.text("INSTANCE_IPS").unwrap_or_default().split(',') {
            if let Ok(ip) = text.trim().parse()
                && !ips.contains(&ip)
            {
                ips.push(ip);
            }
        }
        let or =
            |key: &str, default: &str| Box::from(metadata.text(key).filter(|text| !text.is_empty()).unwrap_or(default));
        let namespace = metadata.text("NAMESPACE").filter(|text| !text.is_empty()).unwrap_or(namespace);
        let labels = metadata.labels("LABELS");
        let locality = match &node.locality {
            Some(given) if !given.region.is_empty() => Locality {
                region: given.region.as_str().into(),
                zone: given.zone.as_str().into(),
                sub_zone: given.sub_zone.as_str().into(),
            },
            _ => mesh::locality_of(&labels),
        };
        Ok(Self {
            kind,
            ips,
            name: or("NAME", name),
            namespace: namespace.into(),
            service_account: or("SERVICE_ACCOUNT", "default"),
            workload_name: or("WORKLOAD_NAME", name),
            cluster_id: or("CLUSTER_ID", "Kubernetes"),
            mesh_id: or("MESH_ID", types::wellknown::DEFAULT_TRUST_DOMAIN),
            node: or("NODE_NAME", ""),
            locality,
            captures_dns: metadata.is_true("DNS_CAPTURE"),
            interception: match metadata.text("INTERCEPTION_MODE") {
                Some("NONE") => Interception::None,
                Some("TPROXY") => Interception::Tproxy,
                _ => Interception::Redirect,
            },
            accepts_http10: metadata.is_true("HTTP10"),
            is_unprivileged: metadata.is_true("UNPRIVILEGED_POD"),
            capabilities: capabilities(node),
            proxy_config: metadata.proxy_config().map(Arc::new),
            labels,
        })
    }

    /// The name that traces and metrics show.
    pub fn canonical_name(&self) -> &str {
        labels::canonical_name(&self.labels, &self.workload_name)
    }

    /// The revision that traces and metrics show.
    pub fn canonical_revision(&self) -> &str {
        labels::canonical_revision(&self.labels)
    }
}

fn capabilities(node: &Node) -> Capabilities {
    // Istio's agent sends an Envoy whose list of extensions is cut short for size; it is known by
    // its own version in the metadata. A plain Envoy sends its list and no such version.
    let has = |name: &str| node.extensions.iter().any(|extension| extension.name == name && !extension.disabled);
    if node.extensions.is_empty() && Metadata(node.metadata.as_ref()).text("ISTIO_VERSION").is_some() {
        return Capabilities { has_grpc_authorizers: true, ..Capabilities::ALL };
    }
    Capabilities {
        has_alpn: has("istio.alpn") || has("envoy.filters.http.alpn"),
        has_stats: has("istio.stats") || has("envoy.filters.http.istio_stats"),
        has_metadata_exchange: has("istio.metadata_exchange") || has("envoy.filters.network.metadata_exchange"),
        has_peer_metadata: has("istio.metadata_exchange") || has("envoy.filters.http.peer_metadata"),
        has_grpc_authorizers: has("envoy.filters.network.ext_authz"),
    }
}

struct Metadata<'a>(Option<&'a Struct>);

impl Metadata<'_> {
    fn kind(&self, key: &str) -> Option<&Kind> {
        self.0?.fields.get(key)?.kind.as_ref()
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.kind(key)? {
            Kind::StringValue(text) => Some(text),
            _ => None,
        }
    }

    /// `PROXY_CONFIG`; one that cannot be read counts as absent.
    fn proxy_config(&self) -> Option<ProxyConfig> {
        let Kind::StructValue(fields) = self.kind("PROXY_CONFIG")? else { return None };
        serde_json::from_value(json_object(fields)).ok()
    }

    fn is_true(&self, key: &str) -> bool {
        match self.kind(key) {
            Some(Kind::BoolValue(value)) => *value,
            Some(Kind::StringValue(text)) => matches!(text.as_str(), "true" | "1"),
            _ => false,
        }
    }

    fn labels(&self, key: &str) -> Labels {
        let Some(Kind::StructValue(fields)) = self.kind(key) else {
            return Labels::new();
        };
        let mut labels: Vec<(String, String)> = fields
            .fields
            .iter()
            .filter_map(|(key, value)| match &value.kind {
                Some(Kind::StringValue(text)) => Some((key.clone(), text.clone())),
                _ => None,
            })
            .collect();
        labels.sort();
        labels.into_iter().collect()
    }
}

fn json_object(fields: &Struct) -> serde_json::Value {
    let sorted: BTreeMap<_, _> = fields.fields.iter().collect();
    sorted.into_iter().map(|(key, value)| (key.clone(), json(value))).collect()
}

/// Whole numbers become integers again: a struct only knows one kind of number.
fn json(value: &Value) -> serde_json::Value {
    match value.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(value)) => (*value).into(),
        Some(Kind::StringValue(text)) => text.as_str().into(),
        Some(Kind::ListValue(list)) => list.values.iter().map(json).collect(),
        Some(Kind::StructValue(fields)) => json_object(fields),
        Some(Kind::NumberValue(number)) => {
            #[expect(clippy::cast_possible_truncation, reason = "what does not come back the same stays a float")]
            let whole = *number as i64;
            #[expect(clippy::cast_precision_loss, clippy::float_cmp, reason = "compared for exactly that")]
            let is_whole = whole as f64 == *number;
            if is_whole { whole.into() } else { (*number).into() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> Node {
        Node { id: id.into(), ..Node::default() }
    }

    #[test]
    fn proxies_tell_their_own_settings() {
        let value = |kind| Value { kind: Some(kind) };
        let fields = |entries: Vec<(&str, Value)>| Struct {
            fields: entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        };
        let settings = |topology: Kind| {
            let topology = fields(vec![("numTrustedProxies", value(topology))]);
            let sampling = fields(vec![("sampling", value(Kind::NumberValue(12.5)))]);
            let config = fields(vec![
                ("gatewayTopology", value(Kind::StructValue(topology))),
                ("tracing", value(Kind::StructValue(sampling))),
                ("drainDuration", value(Kind::StringValue("45s".into()))),
                ("unheardOf", value(Kind::BoolValue(true))),
            ]);
            let metadata = fields(vec![("PROXY_CONFIG", value(Kind::StructValue(config)))]);
            let node = Node { metadata: Some(metadata), ..node("router~10.0.0.1~a.b~c") };
            View::from_node(&node).unwrap().proxy_config
        };
        let config = settings(Kind::NumberValue(2.0)).unwrap();
        assert_eq!(config.gateway_topology.as_ref().unwrap().num_trusted_proxies, 2);
        assert!((config.trace_sampling() - 12.5).abs() < f64::EPSILON);
        assert_eq!(settings(Kind::StringValue("many".into())), None);
    }

    #[test]
    fn ids() {
        let view = View::from_node(&node("sidecar~10.0.0.1~a-1.shop~shop.svc.cluster.local")).unwrap();
        assert_eq!((&*view.name, &*view.namespace, view.kind), ("a-1", "shop", ProxyKind::Sidecar));
        assert_eq!(view.capabilities, Capabilities::NONE);
        assert!(View::from_node(&node("router~~gw.istio-system~x")).is_ok());
        for bad in ["", "sidecar", "sidecar~1~a.b", "sidecar~1~a.b~c~d", "waypoint~1~a.b~c"] {
            assert!(View::from_node(&node(bad)).is_err(), "{bad}");
        }
    }
}
