//! Envoy's bootstrap, version 3, as YAML or JSON: static resources, files that are watched, ADS.
//!
//! What is not built is refused by name and path, never skipped; fields that only concern Envoy's
//! own machinery (`stats_config`, `layered_runtime`, …) are taken and mean nothing here.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use engine::lower::Raw;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::Any;
use identity::channel::{ControlPlane, PlainTcp, Source};
use prost::Message as _;
use proto::json::{from_json, unknown_type};
use serde_json::{Map, Value};
use thiserror::Error;
use types::wellknown::type_urls;

use crate::options::{Options, Role, StaticResources};

/// Why a bootstrap cannot be run.
#[derive(Debug, Error)]
pub enum InvalidBootstrap {
    /// Not YAML, not JSON.
    #[error("not readable as YAML or JSON: {0}")]
    Syntax(String),
    /// A field that Envoy does not have, or of the wrong type.
    #[error("{path}: {reason}")]
    Message {
        /// Where.
        path: String,
        /// What does not fit.
        reason: String,
    },
    /// Envoy has it, we do not.
    #[error("{0} is not built yet")]
    NotBuilt(String),
}

/// What the command line adds, with Envoy's names.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--concurrency`
    pub concurrency: Option<usize>,
    /// `--service-node`
    pub service_node: Option<String>,
    /// `--service-cluster`
    pub service_cluster: Option<String>,
    /// `--drain-time-s`
    pub drain_seconds: Option<u64>,
    /// `--admin-address-path`
    pub admin_address_path: Option<PathBuf>,
}

/// Top-level fields that are taken and mean nothing to us.
const WITHOUT_MEANING: [&str; 14] = [
    "stats_config",
    "stats_flush_interval",
    "stats_flush_on_admin",
    "layered_runtime",
    "watchdog",
    "watchdogs",
    "overload_manager",
    "cluster_manager",
    "default_socket_interface",
    "flags_path",
    "enable_dispatcher_stats",
    "header_prefix",
    "perf_tracing_file_path",
    "memory_allocator_manager",
];

/// Reads YAML or JSON.
fn parse(text: &str) -> Result<Value, InvalidBootstrap> {
    if text.trim_start().starts_with('{')
        && let Ok(json) = serde_json::from_str(text)
    {
        return Ok(json);
    }
    serde_saphyr::from_str(text).map_err(|error| InvalidBootstrap::Syntax(error.to_string()))
}

/// Makes options of a bootstrap.
pub fn options(text: &str, flags: &Flags) -> Result<Options, InvalidBootstrap> {
    let Value::Object(mut top) = parse(text)? else {
        return Err(InvalidBootstrap::Syntax("the document is not a mapping".into()));
    };
    let camel: Vec<String> = top.keys().filter(|key| key.chars().any(char::is_uppercase)).cloned().collect();
    for key in camel {
        if let Some(value) = top.remove(&key) {
            top.insert(snake(&key), value);
        }
    }
    let mut node = match top.remove("node") {
        Some(json) => decode::<Node>("node", "envoy.config.core.v3.Node", json)?,
        None => Node::default(),
    };
    if let Some(id) = &flags.service_node {
        node.id.clone_from(id);
    }
    if let Some(cluster) = &flags.service_cluster {
        node.cluster.clone_from(cluster);
    }
    let mut options = Options::new(Role::Standalone, node);
    options.concurrency = flags.concurrency.unwrap_or(0);
    options.drain_time = std::time::Duration::from_secs(flags.drain_seconds.unwrap_or(600));
    options.take_signals = true;
    options.admin_address_path.clone_from(&flags.admin_address_path);
    if let Some(admin) = top.remove("admin") {
        options.addresses.admin = admin.pointer("/address/socket_address").map(socket_address).transpose()?;
    }
    let mut files = Files::default();
    if let Some(resources) = top.remove("static_resources") {
        options.resources = static_resources(resources, &mut files)?;
    }
    if let Some(dynamic) = top.remove("dynamic_resources") {
        dynamic_resources(dynamic, &mut options, &mut files)?;
    }
    options.files = files.paths.into_iter().collect();
    if let Some(unknown) = top.keys().find(|key| !WITHOUT_MEANING.contains(&key.as_str())) {
        return Err(InvalidBootstrap::NotBuilt(unknown.clone()));
    }
    // memory goes back to the thread it came from, and this one has nothing else to do for the rest of its life
    proto::json::unload();
    Ok(options)
}

/// `staticResources` is `static_resources`: JSON mapping takes both.
fn snake(name: &str) -> String {
    name.chars().fold(String::new(), |mut out, c| {
        if c.is_uppercase() {
            out.push('_');
        }
        out.extend(c.to_lowercase());
        out
    })
}

fn decode<M: prost::Message + Default>(path: &str, name: &str, json: Value) -> Result<M, InvalidBootstrap> {
    let bad = |reason| InvalidBootstrap::Message { path: path.to_owned(), reason };
    let bytes = from_json(name, json).map_err(bad)?;
    M::decode(bytes.as_slice()).map_err(|error| bad(error.to_string()))
}

fn socket_address(json: &Value) -> Result<SocketAddr, InvalidBootstrap> {
    let address = json.get("address").and_then(Value::as_str).and_then(|ip| ip.parse().ok());
    let port = json.get("port_value").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
    match (address, port) {
        (Some(ip), Some(port)) => Ok(SocketAddr::new(ip, port)),
        _ => Err(InvalidBootstrap::Message {
            path: "admin.address".into(),
            reason: "an IP address and port_value are needed".into(),
        }),
    }
}

/// Files named by `path_config_source`; they are watched, and hold whatever they hold.
#[derive(Default)]
struct Files {
    paths: BTreeSet<PathBuf>,
}

impl Files {
    /// Takes files out of a resource: what comes from them comes as if by ADS.
    fn extract(&mut self, json: &mut Value) {
        match json {
            Value::Object(fields) => {
                let path = fields
                    .get("path_config_source")
                    .and_then(|source| source.get("path"))
                    .or_else(|| fields.get("path"));
                let is_source = fields.contains_key("path_config_source")
                    || (fields.len() <= 2
                        && fields.contains_key("path")
                        && fields.contains_key("resource_api_version"));
                if is_source && let Some(path) = path.and_then(Value::as_str) {
                    self.paths.insert(path.into());
                    let mut ads = Map::new();
                    ads.insert("ads".into(), Value::Object(Map::new()));
                    ads.insert("resource_api_version".into(), "V3".into());
                    *json = Value::Object(ads);
                    return;
                }
                fields.values_mut().for_each(|value| self.extract(value));
            }
            Value::Array(items) => items.iter_mut().for_each(|value| self.extract(value)),
            _ => {}
        }
    }
}

/// What a type of resource is called: its message, its URL, the field with its name.
const KINDS: [(&str, &str, &str); 5] = [
    ("envoy.config.listener.v3.Listener", type_urls::LISTENER, "name"),
    ("envoy.config.cluster.v3.Cluster", type_urls::CLUSTER, "name"),
    ("envoy.config.route.v3.RouteConfiguration", type_urls::ROUTE, "name"),
    ("envoy.config.endpoint.v3.ClusterLoadAssignment", type_urls::ENDPOINT, "cluster_name"),
    ("envoy.extensions.transport_sockets.tls.v3.Secret", type_urls::SECRET, "name"),
];

fn resource(
    path: &str,
    url: &str,
    mut json: Value,
    files: &mut Files,
) -> Result<(&'static str, Raw), InvalidBootstrap> {
    let (message, url, field) = KINDS
        .into_iter()
        .find(|(_, known, _)| *known == url)
        .ok_or_else(|| InvalidBootstrap::NotBuilt(format!("{path}: {url}")))?;
    files.extract(&mut json);
    let camel = if field == "cluster_name" { "clusterName" } else { "name" };
    let name = json.get(field).or_else(|| json.get(camel)).and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Value::Object(fields) = &mut json {
        fields.remove("@type");
    }
    let value = match from_json(message, json.clone()) {
        Ok(value) => value,
        Err(reason) => return Err(misfit(path, reason, &json)),
    };
    Ok((url, Raw { name: name.into(), body: Any { type_url: url.to_owned(), value } }))
}

/// Why a resource is no message: a part of a type that is not built is named with its place.
fn misfit(path: &str, reason: String, json: &Value) -> InvalidBootstrap {
    match unknown_type(json) {
        Some(unknown) => {
            let extension = unknown.extension.map(|name| format!(" {name:?}")).unwrap_or_default();
            InvalidBootstrap::NotBuilt(format!("{path}.{}{extension}: {}", unknown.path, unknown.kind))
        }
        None => InvalidBootstrap::Message { path: path.to_owned(), reason },
    }
}

fn static_resources(json: Value, files: &mut Files) -> Result<StaticResources, InvalidBootstrap> {
    let Value::Object(sections) = json else {
        return Err(InvalidBootstrap::Message { path: "static_resources".into(), reason: "not a mapping".into() });
    };
    let mut made = StaticResources::default();
    for (section, items) in sections {
        let (url, into) = match section.as_str() {
            "listeners" => (type_urls::LISTENER, &mut made.listeners),
            "clusters" => (type_urls::CLUSTER, &mut made.clusters),
            "secrets" => (type_urls::SECRET, &mut made.secrets),
            other => {
                return Err(InvalidBootstrap::Message {
                    path: "static_resources".into(),
                    reason: format!("unknown field {other:?}"),
                });
            }
        };
        let Value::Array(items) = items else {
            return Err(InvalidBootstrap::Message {
                path: format!("static_resources.{section}"),
                reason: "not a list".into(),
            });
        };
        for (at, item) in items.into_iter().enumerate() {
            let (_, mut raw) = resource(&format!("static_resources.{section}[{at}]"), url, item, files)?;
            if raw.name.is_empty() {
                // Envoy names what has no name
                raw = unnamed(raw, &format!("{section}-{at}"));
            }
            into.push(raw);
        }
    }
    Ok(made)
}

/// Gives a listener without a name one.
fn unnamed(mut raw: Raw, name: &str) -> Raw {
    use envoy_types::pb::envoy::config::listener::v3::Listener;
    if raw.body.type_url == type_urls::LISTENER
        && let Ok(mut listener) = Listener::decode(raw.body.value.as_slice())
    {
        name.clone_into(&mut listener.name);
        raw.body.value = listener.encode_to_vec();
        raw.name = name.into();
    }
    raw
}

fn dynamic_resources(json: Value, options: &mut Options, files: &mut Files) -> Result<(), InvalidBootstrap> {
    let Value::Object(mut fields) = json else {
        return Err(InvalidBootstrap::Message { path: "dynamic_resources".into(), reason: "not a mapping".into() });
    };
    let ads = fields.remove("ads_config");
    for (field, mut source) in fields {
        if !matches!(field.as_str(), "lds_config" | "cds_config") {
            return Err(InvalidBootstrap::NotBuilt(format!("dynamic_resources.{field}")));
        }
        files.extract(&mut source);
        if source.get("ads").is_none() {
            return Err(InvalidBootstrap::NotBuilt(format!(
                "dynamic_resources.{field} other than ads and path_config_source"
            )));
        }
    }
    let Some(ads) = ads else { return Ok(()) };
    match ads.get("api_type").and_then(Value::as_str) {
        Some("DELTA_GRPC") => {}
        Some("GRPC") => options.state_of_the_world = true,
        other => return Err(InvalidBootstrap::NotBuilt(format!("dynamic_resources.ads_config.api_type {other:?}"))),
    }
    let cluster = ads.pointer("/grpc_services/0/envoy_grpc/cluster_name").and_then(Value::as_str).ok_or_else(|| {
        InvalidBootstrap::NotBuilt("dynamic_resources.ads_config.grpc_services other than envoy_grpc".into())
    })?;
    options.xds = Some(control_plane(cluster, &options.resources)?);
    Ok(())
}

/// The control plane by the static cluster that leads to it.
fn control_plane(name: &str, resources: &StaticResources) -> Result<ControlPlane, InvalidBootstrap> {
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;
    use envoy_types::pb::envoy::config::core::v3::address::Address;
    use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
    use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
    let missing = |reason: &str| InvalidBootstrap::Message {
        path: format!("static_resources.clusters[{name}]"),
        reason: reason.to_owned(),
    };
    let raw =
        resources.clusters.iter().find(|raw| &*raw.name == name).ok_or_else(|| missing("there is no such cluster"))?;
    let cluster = Cluster::decode(raw.body.value.as_slice()).map_err(|error| missing(&error.to_string()))?;
    let tls = cluster.transport_socket.as_ref().map(|socket| plane_tls(name, socket)).transpose()?.flatten();
    let endpoint = cluster
        .load_assignment
        .as_ref()
        .and_then(|load| load.endpoints.first())
        .and_then(|locality| locality.lb_endpoints.first());
    let address = endpoint.and_then(|endpoint| match &endpoint.host_identifier {
        Some(HostIdentifier::Endpoint(endpoint)) => endpoint.address.as_ref()?.address.as_ref(),
        _ => None,
    });
    let Some(Address::SocketAddress(address)) = address else { return Err(missing("it has no socket address")) };
    let Some(PortSpecifier::PortValue(port)) = address.port_specifier else { return Err(missing("it has no port")) };
    Ok(ControlPlane {
        address: format!("{}:{port}", address.address),
        server_name: tls.as_ref().map_or_else(|| address.address.clone(), |tls| tls.server_name.clone()),
        roots: tls.map(|tls| tls.roots),
        token: None,
        cluster_id: "Kubernetes".into(),
        tcp: Arc::new(PlainTcp),
    })
}

/// TLS to a control plane.
struct PlaneTls {
    server_name: String,
    roots: Source,
}

/// The part of a TLS context that the stream to the control plane needs: roots that vouch for its
/// name. `None`: plaintext.
fn plane_tls(
    name: &str,
    socket: &envoy_types::pb::envoy::config::core::v3::TransportSocket,
) -> Result<Option<PlaneTls>, InvalidBootstrap> {
    use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
    use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
    use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, CommonTlsContext, UpstreamTlsContext, common_tls_context::ValidationContextType,
    };
    use prost::Name as _;
    let path = format!("static_resources.clusters[{name}].transport_socket");
    let not_built = |what: &str| InvalidBootstrap::NotBuilt(format!("{path}.{what}"));
    let Some(ConfigType::TypedConfig(any)) = &socket.config_type else { return Err(not_built("typed_config")) };
    if any.type_url == RawBuffer::type_url() {
        return Ok(None);
    }
    if any.type_url != UpstreamTlsContext::type_url() {
        return Err(not_built(&any.type_url));
    }
    let mut context = UpstreamTlsContext::decode(any.value.as_slice())
        .map_err(|error| InvalidBootstrap::Message { path: path.clone(), reason: error.to_string() })?;
    let server_name = std::mem::take(&mut context.sni);
    let mut common = context.common_tls_context.take().unwrap_or_default();
    common.alpn_protocols.clear();
    let mut validation = match common.validation_context_type.take() {
        Some(ValidationContextType::ValidationContext(validation)) => validation,
        _ => return Err(not_built("common_tls_context without validation_context")),
    };
    let roots = match validation.trusted_ca.take().and_then(|source| source.specifier) {
        Some(Specifier::Filename(file)) => Source::File(file.into()),
        Some(Specifier::InlineString(text)) => Source::Text(text.into()),
        Some(Specifier::InlineBytes(bytes)) => {
            let text = String::from_utf8(bytes).map_err(|_| not_built("trusted_ca that is not text"))?;
            Source::Text(text.into())
        }
        _ => return Err(not_built("common_tls_context.validation_context without trusted_ca")),
    };
    if server_name.is_empty() {
        // nothing would say whose certificate it must be
        return Err(not_built("typed_config without sni"));
    }
    for (field, is_left) in [
        ("", context != UpstreamTlsContext::default()),
        (".common_tls_context", common != CommonTlsContext::default()),
        (".common_tls_context.validation_context", validation != CertificateValidationContext::default()),
    ] {
        if is_left {
            return Err(not_built(&format!("typed_config{field} with more than sni, alpn_protocols and trusted_ca")));
        }
    }
    Ok(Some(PlaneTls { server_name, roots }))
}

/// Resources with their types, and further files.
type FileContent = (Vec<(&'static str, Raw)>, Vec<PathBuf>);

/// Resources of a watched file: a `DiscoveryResponse`. Further files it names come with it.
pub(crate) fn read_file(text: &str) -> Result<FileContent, InvalidBootstrap> {
    let response = parse(text)?;
    let resources = response.get("resources").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut files = Files::default();
    let mut made = Vec::with_capacity(resources.len());
    for (at, item) in resources.into_iter().enumerate() {
        let path = format!("resources[{at}]");
        let url = item.get("@type").and_then(Value::as_str).unwrap_or_default().to_owned();
        if url.is_empty() {
            return Err(InvalidBootstrap::Message { path, reason: "@type is missing".into() });
        }
        made.push(resource(&path, &url, item, &mut files)?);
    }
    Ok((made, files.paths.into_iter().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"
node: { id: me }
admin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }
static_resources:
  listeners:
  - address: { socket_address: { address: 127.0.0.1, port_value: 0 } }
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: x
          route_config: { virtual_hosts: [{ name: a, domains: ["*"], routes: [{ match: { prefix: "/" }, direct_response: { status: 200, body: { inline_string: hello } } }] }] }
          http_filters: [{ name: r, typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router } }]
"#;

    #[tokio::test]
    async fn a_bootstrap_runs() {
        let mut options = options(MINIMAL, &Flags { concurrency: Some(1), ..Flags::default() }).unwrap();
        options.take_signals = false;
        assert_eq!(options.node.id, "me");
        let proxy = Box::pin(crate::proxy::Proxy::start(options)).await.unwrap();
        proxy.ready().await;
        let at = proxy.listeners()[0].1;
        let ask = crate::tests::bed::talk(at, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", |_| false);
        let answer = Box::pin(ask).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("hello"), "{answer}");
        let admin = proxy.services()[0].1;
        let dump = Box::pin(crate::tests::bed::talk(admin, b"GET /config_dump HTTP/1.0\r\n\r\n", |_| false)).await;
        assert!(dump.contains("HttpConnectionManager") && dump.contains("\"inline_string\": \"hello\""), "{dump}");
        proxy.quit();
        proxy.ended().await;
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |text: &str, words: &str| {
            let Err(error) = options(text, &Flags::default()) else { panic!("taken: {text}") };
            assert!(error.to_string().contains(words), "{error}");
        };
        check("- a", "not a mapping");
        check("static_resources: { listeners: [{ nam: a }] }", "nam");
        check("static_resources: { clusters: [{ name: a, connect_timeout: x }] }", "static_resources.clusters[0]");
        check("hds_config: {}", "hds_config");
        let lua = MINIMAL.replace("http.router.v3.Router", "http.lua.v3.Lua").replace("{ name: r,", "{ name: script,");
        check(
            &lua,
            r#"static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http_filters[0].typed_config "script": envoy.extensions.filters.http.lua.v3.Lua is not built yet"#,
        );
        check("dynamic_resources: { ads_config: { api_type: REST } }", "REST");
    }

    #[test]
    fn files_and_ads() {
        let text = r"
dynamic_resources:
  cds_config: { path_config_source: { path: /etc/envoy/cds.yaml } }
  lds_config: { ads: {} }
  ads_config: { api_type: GRPC, grpc_services: [{ envoy_grpc: { cluster_name: plane } }] }
static_resources:
  clusters:
  - name: plane
    load_assignment: { cluster_name: plane, endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 15010 } } } }] }] }
";
        let options = options(text, &Flags::default()).unwrap();
        assert_eq!(options.files, [PathBuf::from("/etc/envoy/cds.yaml")]);
        assert_eq!(options.xds.unwrap().address, "127.0.0.1:15010");
        assert!(options.state_of_the_world);
        let secure = |more: &str| {
            let context = format!(
                "{{ '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext, sni: plane.example, common_tls_context: {{ validation_context: {{ trusted_ca: {{ filename: /roots.pem }} }}{more} }} }}"
            );
            let socket = format!("- name: plane\n    transport_socket: {{ name: tls, typed_config: {context} }}\n");
            super::options(&text.replace("- name: plane\n", &socket), &Flags::default())
        };
        let plane = secure("").unwrap().xds.unwrap();
        assert_eq!(plane.server_name, "plane.example");
        assert!(matches!(plane.roots, Some(Source::File(path)) if path == PathBuf::from("/roots.pem")));
        let Err(refused) = secure(", tls_params: { cipher_suites: [x] }") else { panic!("taken") };
        assert!(refused.to_string().contains("clusters[plane].transport_socket"), "{refused}");
        let file = "resources: [{ '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, name: c, type: EDS, eds_cluster_config: { eds_config: { path_config_source: { path: /e } } } }]";
        let (made, more) = read_file(file).unwrap();
        assert_eq!((&*made[0].1.name, more), ("c", vec![PathBuf::from("/e")]));
    }
}
