//! Envoy's bootstrap, version 3, as YAML or JSON: static resources, files that are watched, ADS.
//!
//! What is not built is refused by name and path, never skipped; fields that only concern Envoy's
//! own machinery (`stats_config`, `watchdogs`, …) are taken and mean nothing here.

mod server;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use engine::config::Name;
use engine::lower::{Raw, config_source, nothing_left};
use engine::unsupported::{Unsupported, Within};
use envoy_types::pb::envoy::config::bootstrap::v3::bootstrap::DynamicResources;
use envoy_types::pb::envoy::config::core::v3::api_config_source::ApiType;
use envoy_types::pb::envoy::config::core::v3::{ApiConfigSource, Node, grpc_service};
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
    /// A field that is not built or not valid.
    #[error("{0}")]
    Refused(#[from] Unsupported),
}

/// What the command line adds, with Envoy's names.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--config-yaml` beside a file: what is merged into it, as protobuf merges messages.
    pub merged: Option<String>,
    /// `--concurrency`
    pub concurrency: Option<usize>,
    /// `--service-node`
    pub service_node: Option<String>,
    /// `--service-cluster`
    pub service_cluster: Option<String>,
    /// `--service-zone`
    pub service_zone: Option<String>,
    /// `--drain-time-s`
    pub drain_seconds: Option<u64>,
    /// `--admin-address-path`
    pub admin_address_path: Option<PathBuf>,
    /// `--stats-tag`
    pub stats_tags: Vec<(String, String)>,
    /// `--file-flush-interval-msec`
    pub log_flush_interval: Option<Duration>,
}

/// Top-level fields that are taken and mean nothing to us: statistics' names, watchdogs, the form of Envoy's own log.
const WITHOUT_MEANING: [&str; 13] = [
    "application_log_config",
    "deferred_stat_options",
    "enable_dispatcher_stats",
    "flags_path",
    "memory_allocator_manager",
    "perf_tracing_file_path",
    "stats_config",
    "stats_flush_interval",
    "stats_flush_on_admin",
    "stats_server_version_override",
    "typed_dns_resolver_config",
    "watchdog",
    "watchdogs",
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
    let mut document = parse(text)?;
    if let Some(more) = &flags.merged {
        merge(&mut document, parse(more)?);
    }
    let Value::Object(mut top) = document else {
        return Err(InvalidBootstrap::Syntax("the document is not a mapping".into()));
    };
    let camel: Vec<String> = top.keys().filter(|key| key.chars().any(char::is_uppercase)).cloned().collect();
    for key in camel {
        if let Some(value) = top.remove(&key) {
            top.insert(snake(&key), value);
        }
    }
    // what is said to be nothing is not said
    top.retain(|_, value| !is_unset(value));
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
    if let Some(zone) = &flags.service_zone {
        node.locality.get_or_insert_default().zone.clone_from(zone);
    }
    let mut options = Options::new(Role::Standalone, node);
    options.concurrency = flags.concurrency.unwrap_or(0);
    options.drain_time = Duration::from_secs(flags.drain_seconds.unwrap_or(600));
    options.take_signals = true;
    options.admin_address_path.clone_from(&flags.admin_address_path);
    options.stats_tags.clone_from(&flags.stats_tags);
    options.log_flush_interval = flags.log_flush_interval.unwrap_or(options.log_flush_interval);
    if let Some(json) = top.remove("admin") {
        let admin = decode("admin", "envoy.config.bootstrap.v3.Admin", json)?;
        options.addresses.admin = server::admin(admin).within("admin")?;
    }
    server_settings(&mut top)?;
    let mut files = Referred::default();
    if let Some(resources) = top.remove("static_resources") {
        options.resources = static_resources(resources, &mut files)?;
    }
    if let Some(dynamic) = top.remove("dynamic_resources") {
        dynamic_resources(dynamic, &mut options, &mut files)?;
    }
    options.files = files;
    if let Some(unknown) = top.keys().find(|key| !WITHOUT_MEANING.contains(&key.as_str())) {
        return Err(InvalidBootstrap::NotBuilt(unknown.clone()));
    }
    // memory goes back to the thread it came from, and this one has nothing else to do for the rest of its life
    proto::json::unload();
    Ok(options)
}

/// Takes the sections that are looked at for nothing but what they must not ask for.
fn server_settings(top: &mut Map<String, Value>) -> Result<(), InvalidBootstrap> {
    type Look = fn(&Value) -> Result<(), Unsupported>;
    if let Some(json) = top.remove("layered_runtime") {
        let layers = decode("layered_runtime", "envoy.config.bootstrap.v3.LayeredRuntime", json)?;
        server::layered_runtime(layers).within("layered_runtime")?;
    }
    if let Some(json) = top.remove("overload_manager") {
        let manager = decode("overload_manager", "envoy.config.overload.v3.OverloadManager", json)?;
        server::overload_manager(manager).within("overload_manager")?;
    }
    if let Some(json) = top.remove("cluster_manager") {
        let manager = decode("cluster_manager", "envoy.config.bootstrap.v3.ClusterManager", json)?;
        server::cluster_manager(manager).within("cluster_manager")?;
    }
    let looks: [(&str, Look); 4] = [
        ("header_prefix", server::header_prefix),
        ("default_socket_interface", server::socket_interface),
        ("bootstrap_extensions", server::extensions),
        ("tracing", server::tracing),
    ];
    for (field, look) in looks {
        if let Some(json) = top.remove(field) {
            look(&json)?;
        }
    }
    Ok(())
}

/// Whether a value of JSON says no more than its absence would.
fn is_unset(json: &Value) -> bool {
    match json {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Fields of messages are merged, lists follow each other, all else is replaced.
fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (_, Value::Null) => {}
        (Value::Object(fields), Value::Object(more)) => {
            for (name, value) in more {
                let known = fields.keys().find(|known| snake(known) == snake(&name)).cloned();
                merge(fields.entry(known.unwrap_or(name)).or_insert(Value::Null), value);
            }
        }
        (Value::Array(items), Value::Array(more)) => items.extend(more),
        (into, more) => *into = more,
    }
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
    let bytes = from_json(name, json.clone()).map_err(|reason| misfit(path, reason, &json))?;
    M::decode(bytes.as_slice())
        .map_err(|error| InvalidBootstrap::Message { path: path.to_owned(), reason: error.to_string() })
}

/// Files named by `path_config_source`; they are watched, and hold whatever they hold.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Referred {
    /// The files.
    pub paths: BTreeSet<PathBuf>,
    /// Names of resources that are said to be in files, by type.
    pub names: BTreeSet<(&'static str, Name)>,
}

/// Where a source stands beside the name of what comes from it; without a name it is that of the whole resource.
const REFERENCES: [(&str, &str, &str); 3] = [
    ("eds_config", "service_name", type_urls::ENDPOINT),
    ("config_source", "route_config_name", type_urls::ROUTE),
    ("sds_config", "name", type_urls::SECRET),
];

/// A field of a message by the name that the `.proto` file has for it.
fn field<'a>(json: &'a Value, name: &str) -> Option<&'a Value> {
    let fields = json.as_object()?;
    fields.get(name).or_else(|| fields.get(&camel(name)))
}

/// `static_resources` is `staticResources`.
fn camel(name: &str) -> String {
    let mut parts = name.split('_');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |mut out, part| {
        let (initial, rest) = part.split_at(part.len().min(1));
        out.push_str(&initial.to_ascii_uppercase());
        out.push_str(rest);
        out
    })
}

/// A text; empty without one.
fn text<'a>(json: &'a Value, name: &str) -> &'a str {
    field(json, name).and_then(Value::as_str).unwrap_or_default()
}

/// The file that a source of configuration names.
fn file_of(source: &Value) -> Option<&str> {
    let path = match field(source, "path_config_source") {
        Some(source) => source.get("path"),
        // the older way to say it, told from other messages with a path by the version beside
        None => field(source, "resource_api_version").and_then(|_| source.get("path")),
    };
    path.and_then(Value::as_str)
}

impl Referred {
    /// Takes files out of a resource: what comes from them comes as if by ADS.
    fn extract(&mut self, json: &mut Value, owner: &str) {
        if let Some(path) = file_of(json) {
            self.paths.insert(path.into());
            let mut ads = Map::new();
            ads.insert("ads".into(), Value::Object(Map::new()));
            ads.insert("resource_api_version".into(), "V3".into());
            *json = Value::Object(ads);
            return;
        }
        for (source, name, url) in REFERENCES {
            if field(json, source).and_then(file_of).is_some() {
                let name = Some(text(json, name)).filter(|name| !name.is_empty()).unwrap_or(owner);
                self.names.insert((url, name.into()));
            }
        }
        match json {
            Value::Object(fields) => fields.values_mut().for_each(|value| self.extract(value, owner)),
            Value::Array(items) => items.iter_mut().for_each(|value| self.extract(value, owner)),
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
    files: &mut Referred,
) -> Result<(&'static str, Raw), InvalidBootstrap> {
    let (message, url, key) = KINDS
        .into_iter()
        .find(|(_, known, _)| *known == url)
        .ok_or_else(|| InvalidBootstrap::NotBuilt(format!("{path}: {url}")))?;
    let name = text(&json, key).to_owned();
    files.extract(&mut json, &name);
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

fn static_resources(json: Value, files: &mut Referred) -> Result<StaticResources, InvalidBootstrap> {
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

fn dynamic_resources(mut json: Value, options: &mut Options, files: &mut Referred) -> Result<(), InvalidBootstrap> {
    const PATH: &str = "dynamic_resources";
    let asks = |name: &str| field(&json, name).is_some_and(|source| source.get("ads").is_some());
    let by_ads = [("cds_config", type_urls::CLUSTER), ("lds_config", type_urls::LISTENER)];
    options.subscriptions = by_ads.into_iter().filter(|(name, _)| asks(name)).map(|(_, url)| url).collect();
    let wants_ads = !options.subscriptions.is_empty();
    files.extract(&mut json, "");
    let mut proto: DynamicResources = decode(PATH, "envoy.config.bootstrap.v3.Bootstrap.DynamicResources", json)?;
    for (field, source) in [("lds_config", proto.lds_config.take()), ("cds_config", proto.cds_config.take())] {
        source.as_ref().map_or(Ok(()), config_source).within(field).within(PATH)?;
    }
    let ads = proto.ads_config.take();
    nothing_left(&proto).within(PATH)?;
    match ads {
        Some(ads) => {
            let stream = aggregated(ads).within("ads_config").within(PATH)?;
            options.state_of_the_world = stream.state_of_the_world;
            options.xds = Some(control_plane(&stream.cluster, &options.resources)?);
            Ok(())
        }
        // nothing would ever come
        None if wants_ads => Err(Unsupported::missing("dynamic_resources.ads_config").into()),
        None => Ok(()),
    }
}

/// How the aggregated stream is asked for.
struct Aggregated {
    cluster: String,
    state_of_the_world: bool,
}

fn aggregated(mut proto: ApiConfigSource) -> Result<Aggregated, Unsupported> {
    let state_of_the_world = match ApiType::try_from(std::mem::take(&mut proto.api_type)) {
        Ok(ApiType::DeltaGrpc) => false,
        Ok(ApiType::Grpc) => true,
        Ok(other) => return Err(Unsupported::not_built(format!("api_type {}", other.as_str_name()))),
        Err(_) => return Err(Unsupported::new("api_type", "is not known")),
    };
    let mut services = std::mem::take(&mut proto.grpc_services).into_iter();
    let mut service = services.next().ok_or_else(|| Unsupported::missing("grpc_services"))?;
    if services.next().is_some() {
        return Err(Unsupported::not_built("grpc_services[1]"));
    }
    let cluster = match service.target_specifier.take() {
        Some(grpc_service::TargetSpecifier::EnvoyGrpc(mut grpc)) => {
            let cluster = std::mem::take(&mut grpc.cluster_name);
            nothing_left(&grpc).within("grpc_services[0].envoy_grpc")?;
            cluster
        }
        Some(grpc_service::TargetSpecifier::GoogleGrpc(_)) => {
            return Err(Unsupported::not_built("grpc_services[0].google_grpc"));
        }
        None => return Err(Unsupported::missing("grpc_services[0].envoy_grpc")),
    };
    // a stream has no end that could be waited for
    service.timeout = None;
    nothing_left(&service).within("grpc_services[0]")?;
    // how often the node is told is between the two ends; the other two are for REST
    proto.set_node_on_first_message_only = false;
    proto.refresh_delay = None;
    proto.request_timeout = None;
    proto.transport_api_version = 0;
    nothing_left(&proto)?;
    Ok(Aggregated { cluster, state_of_the_world })
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
    let mut endpoints =
        cluster.load_assignment.iter().flat_map(|load| &load.endpoints).flat_map(|locality| &locality.lb_endpoints);
    let endpoint = endpoints.next();
    if endpoints.next().is_some() {
        let path = format!("static_resources.clusters[{name}].load_assignment with more than one endpoint");
        return Err(InvalidBootstrap::NotBuilt(path));
    }
    let address = endpoint.and_then(|endpoint| match &endpoint.host_identifier {
        Some(HostIdentifier::Endpoint(endpoint)) => endpoint.address.as_ref()?.address.as_ref(),
        _ => None,
    });
    let Some(Address::SocketAddress(address)) = address else {
        return Err(missing("the control plane needs a socket address, and it has none"));
    };
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
    let Some(ValidationContextType::ValidationContext(mut validation)) = common.validation_context_type.take() else {
        return Err(not_built("common_tls_context without validation_context"));
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

/// What a watched file holds.
pub(crate) struct FileContent {
    /// Resources with their types.
    pub(crate) resources: Vec<(&'static str, Raw)>,
    /// Further files.
    pub(crate) referred: Referred,
}

/// Reads a watched file: a `DiscoveryResponse`. An unknown field is refused, where Envoy would take the file as one
/// without resources and drop all that it gave.
pub(crate) fn read_file(text: &str) -> Result<FileContent, InvalidBootstrap> {
    const MESSAGE: &str = "envoy.service.discovery.v3.DiscoveryResponse";
    let Value::Object(mut response) = parse(text)? else {
        return Err(InvalidBootstrap::Syntax("the document is not a mapping".into()));
    };
    let resources = match response.remove("resources") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(resources)) => resources,
        Some(_) => return Err(InvalidBootstrap::Message { path: "resources".into(), reason: "not a list".into() }),
    };
    let rest = Value::Object(response);
    from_json(MESSAGE, rest).map_err(|reason| InvalidBootstrap::Message { path: MESSAGE.into(), reason })?;
    let mut files = Referred::default();
    let mut made = Vec::with_capacity(resources.len());
    for (at, item) in resources.into_iter().enumerate() {
        let path = format!("resources[{at}]");
        let url = item.get("@type").and_then(Value::as_str).unwrap_or_default().to_owned();
        if url.is_empty() {
            return Err(InvalidBootstrap::Message { path, reason: "@type is missing".into() });
        }
        made.push(resource(&path, &url, item, &mut files)?);
    }
    Ok(FileContent { resources: made, referred: files })
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

    /// Fields that Envoy 1.40 has, and by which it would behave as we do not.
    #[test]
    fn what_a_server_is_told_and_does_not_do_is_refused_by_name() {
        let plane = "static_resources: { clusters: [{ name: p, load_assignment: { cluster_name: p, endpoints: [{ lb_endpoints: [ENDPOINT, ENDPOINT] }] } }] }";
        let two = plane.replace(
            "ENDPOINT",
            "{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 1 } } } }",
        );
        let ads = "ads_config: { api_type: GRPC, grpc_services: [{ envoy_grpc: { cluster_name: p } }] }";
        let socket = "socket_address: { address: 127.0.0.1, port_value: 1 }";
        let monitor = |max: &str| {
            format!(
                "overload_manager: {{ resource_monitors: [{{ name: m, typed_config: {{ '@type': type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig, max_active_downstream_connections: {max} }} }}] }}"
            )
        };
        for (text, field) in [
            ("admin: { adress: {} }".to_owned(), "admin"),
            ("admin: { address: { pipe: { path: /a } } }".to_owned(), "admin.address.pipe"),
            (
                "admin: { address: { socket_address: { address: 127.0.0.1 } } }".to_owned(),
                "admin.address.socket_address.port_value must be set",
            ),
            (
                "admin: { address: { socket_address: { address: localhost, port_value: 1 } } }".to_owned(),
                "admin.address.socket_address.address",
            ),
            (format!("admin: {{ address: {{ {socket} }}, allow_paths: [{{ exact: /ready }}] }}"), "admin.allow_paths"),
            ("layered_runtime: { layers: [{ name: a, disk_layer: {} }] }".to_owned(), "layered_runtime.layers[0].disk_layer"),
            ("layered_runtime: { layers: [{ name: a, rtds_layer: {} }] }".to_owned(), "layers[0].rtds_layer"),
            (
                "layered_runtime: { layers: [{ name: a, static_layer: { health_check: { min_interval: 5 } } }] }".to_owned(),
                "layered_runtime.layers[0].static_layer.health_check.min_interval",
            ),
            (
                "layeredRuntime: { layers: [{ name: a, staticLayer: { overload.global_downstream_max_connections: 10 } }] }".to_owned(),
                "static_layer.overload.global_downstream_max_connections",
            ),
            (
                "layered_runtime: { layers: [{ name: a, static_layer: { envoy.reloadable_features.http_reject_path_with_fragment: true } }] }".to_owned(),
                "http_reject_path_with_fragment",
            ),
            (monitor("100"), "overload_manager.resource_monitors[0].typed_config.max_active_downstream_connections"),
            (
                "overload_manager: { actions: [{ name: envoy.overload_actions.stop_accepting_requests, triggers: [] }] }".to_owned(),
                "overload_manager.actions",
            ),
            ("cluster_manager: { upstream_bind_config: {} }".to_owned(), "cluster_manager.upstream_bind_config"),
            ("cluster_manager: { local_cluster_name: a }".to_owned(), "cluster_manager.local_cluster_name"),
            ("header_prefix: x-mine".to_owned(), "header_prefix"),
            ("default_socket_interface: mine".to_owned(), "default_socket_interface"),
            ("bootstrap_extensions: [{ name: mine }]".to_owned(), "bootstrap_extensions[0] \"mine\""),
            ("dynamic_resources: { cds_config: { ads: {} } }".to_owned(), "dynamic_resources.ads_config must be set"),
            (
                "dynamic_resources: { lds_config: { api_config_source: { api_type: REST } } }".to_owned(),
                "dynamic_resources.lds_config.api_config_source",
            ),
            ("dynamic_resources: { lds_resources_locator: a }".to_owned(), "dynamic_resources.lds_resources_locator"),
            (format!("{two}\ndynamic_resources: {{ {ads} }}"), "clusters[p].load_assignment with more than one endpoint"),
            (
                format!("dynamic_resources: {{ {} }}", ads.replace("[{ envoy_grpc", "[{ envoy_grpc: { cluster_name: q } }, { envoy_grpc")),
                "dynamic_resources.ads_config.grpc_services[1]",
            ),
            (
                format!("dynamic_resources: {{ {} }}", ads.replace("cluster_name: p", "cluster_name: p, authority: q")),
                "grpc_services[0].envoy_grpc.authority",
            ),
            (
                format!("dynamic_resources: {{ {} }}", ads.replace("api_type: GRPC", "api_type: GRPC, rate_limit_settings: {}")),
                "dynamic_resources.ads_config.rate_limit_settings",
            ),
        ] {
            let Err(error) = options(&text, &Flags::default()) else { panic!("taken: {text}") };
            assert!(error.to_string().contains(field), "{text}: {error}");
        }
        options(&monitor("2147483647"), &Flags::default()).unwrap();
    }

    /// The sections of Istio's `envoy_bootstrap.json` that tell of the server, with all flags of its agent.
    #[test]
    fn what_istio_tells_of_the_server_is_taken() {
        let text = r#"{
  "application_log_config": { "log_format": { "text_format": "%v" } },
  "node": { "id": "sidecar~10.0.0.1~a.b~b.svc.cluster.local", "cluster": "a.b", "locality": { "region": "r" }, "metadata": {} },
  "layered_runtime": { "layers": [
    { "name": "global config", "static_layer": {
      "overload.global_downstream_max_connections": "2147483647",
      "re2.max_program_size.error_level": "32768",
      "envoy.deprecated_features:envoy.config.listener.v3.Listener.hidden_envoy_deprecated_use_original_dst": true,
      "envoy.reloadable_features.http_reject_path_with_fragment": false,
      "envoy.reloadable_features.fixed_heap_use_allocated": true,
      "envoy.reloadable_features.coalesce_lb_rebuilds_on_batch_update": false } },
    { "name": "admin", "admin_layer": {} } ] },
  "bootstrap_extensions": [ { "name": "envoy.bootstrap.internal_listener", "typed_config": {
    "@type": "type.googleapis.com/udpa.type.v1.TypedStruct",
    "type_url": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener", "value": { "buffer_size_kb": 64 } } } ],
  "stats_config": { "use_all_default_tags": false },
  "admin": { "access_log": [ { "name": "envoy.access_loggers.file", "typed_config": {
      "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog", "path": "/dev/null" } } ],
    "profile_path": "/var/lib/istio/data/envoy.prof",
    "address": { "socketAddress": { "address": "127.0.0.1", "portValue": 15000 } } },
  "dynamic_resources": {
    "lds_config": { "ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3" },
    "cds_config": { "ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3" },
    "ads_config": { "api_type": "DELTA_GRPC", "set_node_on_first_message_only": true, "transport_api_version": "V3",
      "grpc_services": [ { "envoy_grpc": { "cluster_name": "xds-grpc" } } ] } },
  "static_resources": { "clusters": [ { "name": "xds-grpc", "type": "STATIC", "connect_timeout": "1s",
    "load_assignment": { "cluster_name": "xds-grpc", "endpoints": [ { "lb_endpoints": [ { "endpoint": { "address": {
      "socket_address": { "address": "127.0.0.1", "port_value": 15010 } } } } ] } ] } } ] },
  "overload_manager": { "resource_monitors": [ { "name": "envoy.resource_monitors.global_downstream_max_connections", "typed_config": {
    "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
    "max_active_downstream_connections": 2147483647 } } ] }
}"#;
        let flags = Flags { service_zone: Some("z".into()), ..Flags::default() };
        let options = options(text, &flags).unwrap();
        assert_eq!(options.addresses.admin, Some("127.0.0.1:15000".parse().unwrap()));
        assert!(!options.state_of_the_world);
        let locality = options.node.locality.unwrap();
        assert_eq!((locality.region.as_str(), locality.zone.as_str()), ("r", "z"));
    }

    #[test]
    fn a_second_document_is_merged() {
        let more = "node: { cluster: c }\nstaticResources: { clusters: [{ name: other }] }\nadmin: ~";
        let flags = Flags { merged: Some(more.into()), ..Flags::default() };
        let options = options(MINIMAL, &flags).unwrap();
        assert_eq!((options.node.id.as_str(), options.node.cluster.as_str()), ("me", "c"));
        assert_eq!((options.resources.listeners.len(), options.resources.clusters.len()), (1, 1));
        assert!(options.addresses.admin.is_some());
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
        assert_eq!(options.files.paths, BTreeSet::from(["/etc/envoy/cds.yaml".into()]));
        assert_eq!(options.subscriptions, [type_urls::LISTENER]);
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
        assert!(matches!(plane.roots, Some(Source::File(path)) if path == std::path::Path::new("/roots.pem")));
        let Err(refused) = secure(", tls_params: { cipher_suites: [x] }") else { panic!("taken") };
        assert!(refused.to_string().contains("clusters[plane].transport_socket"), "{refused}");
        let file = "resources: [{ '@type': type.googleapis.com/envoy.config.cluster.v3.Cluster, name: c, type: EDS, eds_cluster_config: { eds_config: { path_config_source: { path: /e } } } }]";
        let content = read_file(file).unwrap();
        let of_files = |url: &'static str, name: &str| BTreeSet::from([(url, Name::from(name))]);
        let referred = Referred { paths: BTreeSet::from(["/e".into()]), names: of_files(type_urls::ENDPOINT, "c") };
        assert_eq!((&*content.resources[0].1.name, content.referred), ("c", referred));
        for source in ["pathConfigSource: { path: /e }", "path: /e, resourceApiVersion: V3, initial_fetch_timeout: 1s"]
        {
            let of =
                |text: &str| read_file(&text.replace("path_config_source: { path: /e }", source)).unwrap().referred;
            assert_eq!(of(file).paths, BTreeSet::from(["/e".into()]), "{source}");
            let named = file.replace("eds_cluster_config: {", "eds_cluster_config: { serviceName: s,");
            assert_eq!(of(&named).names, of_files(type_urls::ENDPOINT, "s"), "{source}");
        }
    }
}
