//! What a proxy is started with, as values.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use engine::lower::Raw;
use envoy_types::pb::envoy::config::core::v3::{Locality, Node};
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value, value::Kind};
use identity::agent::KeyKind;
use identity::channel::{ControlPlane, Source};
use thiserror::Error;
use types::wellknown::{DEFAULT_DOMAIN_SUFFIX, ports, type_urls};

use crate::bootstrap::Referred;

/// What kind of proxy this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Beside an application.
    Sidecar,
    /// A gateway.
    Router,
    /// Envoy's stand-in, run from a bootstrap file.
    Standalone,
}

/// Addresses of the proxy's own services; `None` is off.
#[derive(Clone, Copy, Debug, Default)]
pub struct Addresses {
    /// Envoy's admin interface.
    pub admin: Option<SocketAddr>,
    /// `/healthz/ready`.
    pub readiness: Option<SocketAddr>,
    /// The proxy's own metrics.
    pub metrics: Option<SocketAddr>,
    /// Merged metrics, `/quitquitquit`, `/drain`.
    pub merged: Option<SocketAddr>,
    /// DNS for the application, over UDP and TCP.
    pub dns: Option<SocketAddr>,
}

/// How the proxy ends on SIGTERM.
#[derive(Clone, Copy, Debug)]
pub struct Termination {
    /// Connections get so long to finish.
    pub drain: Duration,
    /// End as soon as no connection is left, but not before [`Self::minimum`]; then `drain` is not used.
    pub exit_on_zero: bool,
    /// See [`Self::exit_on_zero`].
    pub minimum: Duration,
}

impl Default for Termination {
    fn default() -> Self {
        Self { drain: Duration::from_secs(5), exit_on_zero: false, minimum: Duration::from_secs(5) }
    }
}

/// Levels of the process's own log, by component.
pub trait LogLevels: Send + Sync {
    /// Components with their levels, in order of names.
    fn list(&self) -> Vec<(&'static str, &'static str)>;
    /// Sets the level of one component, or of all.
    ///
    /// *Errors*: says which word is not known; nothing has changed then.
    fn set(&self, component: Option<&str>, level: &str) -> Result<(), String>;
}

/// Everything a proxy is started with.
pub struct Options {
    /// Its kind.
    pub role: Role,
    /// How it names itself to the control plane.
    pub node: Node,
    /// Where configuration comes from; `None`: only [`Self::resources`].
    pub xds: Option<ControlPlane>,
    /// Where certificates come from; `None`: none are asked for.
    pub ca: Option<ControlPlane>,
    /// Identity from files in place of a CA: chain, key, roots.
    pub identity_files: Option<[PathBuf; 3]>,
    /// State-of-the-world in place of delta.
    pub state_of_the_world: bool,
    /// Types that the control plane is asked for as a whole; others by the names that these bring.
    pub subscriptions: Vec<&'static str>,
    /// Files of resources, watched.
    pub files: Referred,
    /// Resources of a bootstrap file.
    pub resources: StaticResources,
    /// Workers; 0: one a core.
    pub concurrency: usize,
    /// The proxy's own services.
    pub addresses: Addresses,
    /// Lifetime and renewal of certificates.
    pub renewal: Renewal,
    /// Gradual drains after a change of configuration.
    pub drain_time: Duration,
    /// How often what was logged of requests is written, at least.
    pub log_flush_interval: Duration,
    /// Labels of every metric, by name.
    pub stats_tags: Vec<(String, String)>,
    /// The end.
    pub termination: Termination,
    /// Listening sockets to adopt, by port.
    pub inherited: Vec<(u16, OwnedFd)>,
    /// A service that hands out sockets of the machine's network, and the mesh's own ranges.
    pub host_sockets: Option<(OwnedFd, String)>,
    /// Servers for names the mesh does not know.
    pub dns_upstream: Vec<SocketAddr>,
    /// Where the application's own metrics are (`prometheus.io/*`), merged at [`Addresses::merged`].
    pub app_metrics: Option<(u16, String)>,
    /// A file that is told where the admin interface listens.
    pub admin_address_path: Option<PathBuf>,
    /// The program that is the data plane in our place (`binaryPath` of `PROXY_CONFIG`); then we are
    /// its agent.
    pub binary: Option<PathBuf>,
    /// What to do when signals come: `true` takes SIGTERM and SIGINT.
    pub take_signals: bool,
    /// The process's own log, for `/logging`; `None`: its levels cannot be changed.
    pub log_levels: Option<Arc<dyn LogLevels>>,
    /// Gives memory that is not needed now back to the system; called when configuration has settled.
    /// `None`: nobody does.
    pub trim: Option<fn()>,
}

/// Resources that do not come from a control plane.
#[derive(Clone, Debug, Default)]
pub struct StaticResources {
    /// Listeners.
    pub listeners: Vec<Raw>,
    /// Clusters.
    pub clusters: Vec<Raw>,
    /// Endpoints.
    pub endpoints: Vec<Raw>,
    /// Route tables.
    pub routes: Vec<Raw>,
    /// Secrets.
    pub secrets: Vec<Raw>,
}

/// How certificates are asked for and renewed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Renewal {
    /// Wanted lifetime (`SECRET_TTL`).
    pub ttl: Duration,
    /// Share of the lifetime that is left when renewal starts (`SECRET_GRACE_PERIOD_RATIO`), 0 to 1.
    pub grace_ratio: f64,
    /// Spread of that share, either way (`SECRET_GRACE_PERIOD_RATIO_JITTER`), 0 to 1.
    pub grace_jitter: f64,
    /// The keys: ECDSA, as `ECC_SIGNATURE_ALGORITHM` and `ECC_CURVE` say, unless `WORKLOAD_RSA_KEY_SIZE` asks for RSA.
    pub key: KeyKind,
}

impl Default for Renewal {
    fn default() -> Self {
        Self { ttl: Duration::from_hours(24), grace_ratio: 0.5, grace_jitter: 0.01, key: KeyKind::default() }
    }
}

impl Renewal {
    fn from_environment(variables: &BTreeMap<String, String>) -> Result<Self, InvalidOptions> {
        let defaults = Self::default();
        Ok(Self {
            ttl: duration(variables, "SECRET_TTL")?.unwrap_or(defaults.ttl),
            grace_ratio: share(variables, "SECRET_GRACE_PERIOD_RATIO")?.unwrap_or(defaults.grace_ratio),
            grace_jitter: share(variables, "SECRET_GRACE_PERIOD_RATIO_JITTER")?.unwrap_or(defaults.grace_jitter),
            key: key_kind(variables)?,
        })
    }

    /// How the CA is asked.
    pub(crate) fn asking(self, ca: ControlPlane) -> identity::agent::Options {
        identity::agent::Options {
            ttl: self.ttl,
            grace_ratio: self.grace_ratio,
            grace_jitter: self.grace_jitter,
            key: self.key,
            ..identity::agent::Options::new(ca)
        }
    }
}

/// Istio's default is RSA; ours is ECDSA, so that only who names a size of RSA keys gets them.
fn key_kind(variables: &BTreeMap<String, String>) -> Result<KeyKind, InvalidOptions> {
    let get = |name: &'static str| variables.get(name).map(String::as_str).filter(|value| !value.is_empty());
    let bad = |name, value: &str, wanted| InvalidOptions::Bad { name, value: value.to_owned(), wanted };
    match (get("ECC_SIGNATURE_ALGORITHM"), get("ECC_CURVE"), get("WORKLOAD_RSA_KEY_SIZE")) {
        (None, None, Some("2048")) => Ok(KeyKind::Rsa2048),
        (None, None, Some(other)) => Err(bad("WORKLOAD_RSA_KEY_SIZE", other, "2048")),
        (Some(other), ..) if other != "ECDSA" => Err(bad("ECC_SIGNATURE_ALGORITHM", other, "ECDSA")),
        (_, None | Some("P256"), _) => Ok(KeyKind::EcdsaP256),
        (_, Some("P384"), _) => Ok(KeyKind::EcdsaP384),
        (_, Some(other), _) => Err(bad("ECC_CURVE", other, "P256 or P384")),
    }
}

/// Why a proxy cannot be started so.
#[derive(Debug, Error)]
pub enum InvalidOptions {
    /// A variable is needed.
    #[error("environment variable {0} is not set")]
    Missing(&'static str),
    /// A variable is not understood.
    #[error("environment variable {name} is {value:?}, which is not {wanted}")]
    Bad {
        /// Its name.
        name: &'static str,
        /// What it says.
        value: String,
        /// What it should say.
        wanted: &'static str,
    },
}

impl Options {
    /// A proxy with nothing but `node`: no control plane, no services, one worker.
    pub fn new(role: Role, node: Node) -> Self {
        Self {
            role,
            node,
            xds: None,
            ca: None,
            identity_files: None,
            state_of_the_world: false,
            subscriptions: vec![type_urls::CLUSTER, type_urls::LISTENER, type_urls::NAME_TABLE],
            files: Referred::default(),
            resources: StaticResources::default(),
            concurrency: 1,
            addresses: Addresses::default(),
            renewal: Renewal::default(),
            drain_time: Duration::from_secs(45),
            log_flush_interval: Duration::from_millis(500),
            stats_tags: Vec::new(),
            termination: Termination::default(),
            inherited: Vec::new(),
            host_sockets: None,
            dns_upstream: Vec::new(),
            app_metrics: None,
            admin_address_path: None,
            binary: None,
            take_signals: false,
            log_levels: None,
            trim: None,
        }
    }

    /// A sidecar or gateway by Istio's environment: `POD_NAME`, `POD_NAMESPACE`, `INSTANCE_IP`,
    /// `SERVICE_ACCOUNT`, `CA_ADDR`, `PROXY_CONFIG_XDS_ADDRESS` (both default to
    /// `istiod.istio-system.svc:15012`), `ISTIO_META_*`, `ISTIO_METAJSON_*`, and files at Istio's
    /// places: token `/var/run/secrets/tokens/istio-token`, roots
    /// `/var/run/secrets/istio/root-cert.pem`, pod labels and annotations in `/etc/istio/pod`.
    ///
    /// `read` reads a file; descriptors are the caller's to add
    /// ([`Self::inherited`], [`Self::host_sockets`]).
    pub fn from_environment(
        role: Role,
        variables: &BTreeMap<String, String>,
        read: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, InvalidOptions> {
        let get = |name: &str| variables.get(name).map(String::as_str).filter(|value| !value.is_empty());
        let need = |name: &'static str| get(name).ok_or(InvalidOptions::Missing(name));
        let (pod, namespace, ip) = (need("POD_NAME")?, need("POD_NAMESPACE")?, need("INSTANCE_IP")?);
        let domain = get("DOMAIN_SUFFIX").unwrap_or(DEFAULT_DOMAIN_SUFFIX);
        let config: serde_json::Value = match get("PROXY_CONFIG") {
            Some(value) => serde_json::from_str(value).map_err(|_| InvalidOptions::Bad {
                name: "PROXY_CONFIG",
                value: value.to_owned(),
                wanted: "JSON",
            })?,
            None => serde_json::Value::Null,
        };
        let kind = if role == Role::Router { "router" } else { "sidecar" };
        let node = Node {
            id: format!("{kind}~{ip}~{pod}.{namespace}~{namespace}.svc.{domain}"),
            cluster: get("ISTIO_META_WORKLOAD_NAME")
                .map_or_else(|| pod.to_owned(), |name| format!("{name}.{namespace}")),
            metadata: Some(metadata(variables, &config, &read)),
            locality: get("ISTIO_LOCALITY").map(|text| {
                let mut parts = text.split('/').map(str::to_owned);
                Locality {
                    region: parts.next().unwrap_or_default(),
                    zone: parts.next().unwrap_or_default(),
                    sub_zone: parts.next().unwrap_or_default(),
                }
            }),
            user_agent_name: "lateen".into(),
            extensions: extensions(),
            ..Node::default()
        };
        let mut options = Self::new(role, node);
        let plane = |address: &str| ControlPlane {
            address: address.to_owned(),
            server_name: get("ISTIOD_SAN")
                .map_or_else(|| address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned(), str::to_owned),
            roots: Some(Source::File(get("ROOT_CERT_FILE").unwrap_or("/var/run/secrets/istio/root-cert.pem").into())),
            token: Some(Source::File(get("TOKEN_FILE").unwrap_or("/var/run/secrets/tokens/istio-token").into())),
            cluster_id: get("ISTIO_META_CLUSTER_ID").unwrap_or("Kubernetes").to_owned(),
            tcp: Arc::new(crate::plane::MarkedTcp),
        };
        let xds = get("PROXY_CONFIG_XDS_ADDRESS").unwrap_or("istiod.istio-system.svc:15012");
        options.xds = Some(plane(xds));
        options.ca = Some(plane(get("CA_ADDR").unwrap_or(xds)));
        // Whoever mounts a certificate for the workload is its CA.
        if MOUNTED_IDENTITY.iter().all(|path| read(path).is_some()) {
            options.identity_files = Some(MOUNTED_IDENTITY.map(PathBuf::from));
            options.ca = None;
        }
        options.state_of_the_world = get("ISTIO_DELTA_XDS") == Some("false");
        options.renewal = Renewal::from_environment(variables)?;
        let any = |port: u16| Some(SocketAddr::from(([0, 0, 0, 0], port)));
        let local = |port: u16| Some(SocketAddr::from(([127, 0, 0, 1], port)));
        options.addresses = Addresses {
            admin: local(ports::PROXY_ADMIN),
            readiness: any(ports::READINESS),
            metrics: any(ports::PROXY_METRICS),
            merged: any(ports::MERGED_METRICS),
            dns: (role == Role::Sidecar).then(|| local(ports::DNS)).flatten(),
        };
        options.concurrency =
            number(variables, "ISTIO_META_CONCURRENCY")?.or(number(variables, "CONCURRENCY")?).unwrap_or(2);
        if let Some(drain) = configured_duration(&config, "drainDuration", 1)? {
            options.drain_time = drain;
        }
        if let Some(drain) = configured_duration(&config, "terminationDrainDuration", 0)? {
            options.termination.drain = drain;
        }
        // the older way to say it holds where both do
        if let Some(seconds) = number(variables, "TERMINATION_DRAIN_DURATION_SECONDS")? {
            options.termination.drain = Duration::from_secs(seconds as u64);
        }
        if let Some(minimum) = duration(variables, "MINIMUM_DRAIN_DURATION")? {
            options.termination.minimum = minimum;
        }
        options.termination.exit_on_zero = get("EXIT_ON_ZERO_ACTIVE_CONNECTIONS") == Some("true");
        options.dns_upstream = read("/etc/resolv.conf").map(|text| nameservers(&text)).unwrap_or_default();
        if let Some(servers) = get("LATEEN_DNS_UPSTREAM") {
            options.dns_upstream = servers.split(',').filter_map(|server| server.trim().parse().ok()).collect();
        }
        options.app_metrics = get("ISTIO_PROMETHEUS_ANNOTATIONS").and_then(app_metrics);
        options.binary = config["binaryPath"].as_str().filter(|path| !path.is_empty()).map(PathBuf::from);
        options.take_signals = true;
        Ok(options)
    }
}

/// Chain, key and roots of a workload, where something else than our CA provides them.
const MOUNTED_IDENTITY: [&str; 3] = [
    "/var/run/secrets/workload-spiffe-credentials/cert-chain.pem",
    "/var/run/secrets/workload-spiffe-credentials/key.pem",
    "/var/run/secrets/workload-spiffe-credentials/root-cert.pem",
];

/// Istio's own filters, which we have: a control plane sends them to those that list them.
fn extensions() -> Vec<envoy_types::pb::envoy::config::core::v3::Extension> {
    let make = |name: &str, category: &str| envoy_types::pb::envoy::config::core::v3::Extension {
        name: name.into(),
        category: category.into(),
        ..Default::default()
    };
    vec![
        make("istio.alpn", "envoy.filters.http"),
        make("istio.stats", "envoy.filters.http"),
        make("istio.metadata_exchange", "envoy.filters.http"),
        make("envoy.filters.http.peer_metadata", "envoy.filters.http"),
        make("istio.stats", "envoy.filters.network"),
        make("istio.metadata_exchange", "envoy.filters.network"),
    ]
}

fn number(variables: &BTreeMap<String, String>, name: &'static str) -> Result<Option<usize>, InvalidOptions> {
    let Some(value) = variables.get(name).filter(|value| !value.is_empty()) else { return Ok(None) };
    let bad = || InvalidOptions::Bad { name, value: value.clone(), wanted: "a whole number" };
    value.parse().map(Some).map_err(|_| bad())
}

/// A duration as Go writes it, above zero.
fn duration(variables: &BTreeMap<String, String>, name: &'static str) -> Result<Option<Duration>, InvalidOptions> {
    let Some(value) = variables.get(name).filter(|value| !value.is_empty()) else { return Ok(None) };
    let parsed = go_duration(value);
    let bad = || InvalidOptions::Bad { name, value: value.clone(), wanted: "a duration such as 24h or 30m" };
    parsed.filter(|duration| !duration.is_zero()).map(Some).ok_or_else(bad)
}

fn go_duration(text: &str) -> Option<Duration> {
    text.parse::<jiff::SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok())
}

/// A duration in `PROXY_CONFIG`, as JSON of protobuf writes it (`5s`) or as Go does (`1m30s`), of so many seconds
/// at least.
fn configured_duration(
    config: &serde_json::Value,
    name: &'static str,
    seconds_min: u64,
) -> Result<Option<Duration>, InvalidOptions> {
    let value = match &config[name] {
        serde_json::Value::Null => return Ok(None),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let wanted =
        if seconds_min == 0 { "a duration such as 5s" } else { "a duration of at least one second, such as 45s" };
    let duration = go_duration(&value).filter(|duration| duration.as_secs() >= seconds_min);
    duration.map(Some).ok_or(InvalidOptions::Bad { name, value, wanted })
}

fn share(variables: &BTreeMap<String, String>, name: &'static str) -> Result<Option<f64>, InvalidOptions> {
    let Some(value) = variables.get(name).filter(|value| !value.is_empty()) else { return Ok(None) };
    let bad = || InvalidOptions::Bad { name, value: value.clone(), wanted: "a number from 0 to 1" };
    value.parse().ok().filter(|share| (0.0..=1.0).contains(share)).map(Some).ok_or_else(bad)
}

fn text(value: &str) -> Value {
    Value { kind: Some(Kind::StringValue(value.into())) }
}

fn map(entries: impl IntoIterator<Item = (String, Value)>) -> Value {
    Value { kind: Some(Kind::StructValue(Struct { fields: entries.into_iter().collect() })) }
}

/// Node metadata: `ISTIO_META_X=v` is `X: v`, `ISTIO_METAJSON_X={..}` is its content merged in;
/// labels and annotations come from the downward files, and the proxy's own `config` is told, too.
fn metadata(
    variables: &BTreeMap<String, String>,
    config: &serde_json::Value,
    read: &impl Fn(&str) -> Option<String>,
) -> Struct {
    let mut fields = std::collections::HashMap::new();
    if config.is_object() {
        fields.insert("PROXY_CONFIG".to_owned(), from_json(config));
    }
    for (name, value) in variables {
        if let Some(key) = name.strip_prefix("ISTIO_META_") {
            fields.insert(key.to_owned(), text(value));
        } else if let Some(key) = name.strip_prefix("ISTIO_METAJSON_")
            && let Ok(json) = serde_json::from_str::<serde_json::Value>(value)
        {
            fields.insert(key.to_owned(), from_json(&json));
        }
    }
    for (variable, key) in [
        ("POD_NAME", "NAME"),
        ("POD_NAMESPACE", "NAMESPACE"),
        ("INSTANCE_IP", "INSTANCE_IPS"),
        ("SERVICE_ACCOUNT", "SERVICE_ACCOUNT"),
        ("NODE_NAME", "NODE_NAME"),
    ] {
        if let Some(value) = variables.get(variable).filter(|value| !value.is_empty()) {
            fields.insert(key.to_owned(), text(value));
        }
    }
    let version = variables.get("ISTIO_VERSION").map_or(env!("CARGO_PKG_VERSION"), String::as_str);
    fields.insert("ISTIO_VERSION".into(), text(version));
    if let Some(labels) = read("/etc/istio/pod/labels") {
        fields.insert("LABELS".into(), map(downward(&labels)));
    }
    if let Some(annotations) = read("/etc/istio/pod/annotations") {
        fields.insert("ANNOTATIONS".into(), map(downward(&annotations)));
    }
    Struct { fields }
}

/// `key="escaped value"` lines of the downward API.
fn downward(file: &str) -> Vec<(String, Value)> {
    let parse = |line: &str| {
        let (key, value) = line.split_once('=')?;
        let value = serde_json::from_str::<String>(value).ok()?;
        Some((key.to_owned(), text(&value)))
    };
    file.lines().filter_map(parse).collect()
}

/// JSON as protobuf's `Value`.
pub(crate) fn from_json(json: &serde_json::Value) -> Value {
    let kind = match json {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(b) => Kind::BoolValue(*b),
        serde_json::Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        serde_json::Value::String(s) => Kind::StringValue(s.clone()),
        serde_json::Value::Array(items) => Kind::ListValue(ListValue { values: items.iter().map(from_json).collect() }),
        serde_json::Value::Object(fields) => Kind::StructValue(Struct {
            fields: fields.iter().map(|(name, value)| (name.clone(), from_json(value))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}

fn nameservers(resolv: &str) -> Vec<SocketAddr> {
    resolv
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver"))
        .filter_map(|server| server.trim().parse().ok())
        .map(|ip| SocketAddr::new(ip, 53))
        .collect()
}

/// `{"scrape":"true","path":"/metrics","port":"9080"}` as injection writes it.
fn app_metrics(json: &str) -> Option<(u16, String)> {
    let json: serde_json::Value = serde_json::from_str(json).ok()?;
    if json.get("scrape")?.as_str()? != "true" {
        return None;
    }
    let port = json.get("port").and_then(|port| port.as_str()).and_then(|port| port.parse().ok()).unwrap_or(80);
    let path = json.get("path").and_then(|path| path.as_str()).unwrap_or("/metrics");
    Some((port, path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istio_environment() {
        let mut variables = BTreeMap::new();
        for (name, value) in [
            ("POD_NAME", "a-1"),
            ("POD_NAMESPACE", "shop"),
            ("INSTANCE_IP", "10.77.0.5"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_METAJSON_PORTS", "[1]"),
            ("CA_ADDR", "10.77.0.1:15012"),
            (
                "PROXY_CONFIG",
                r#"{"binaryPath":"/usr/local/bin/envoy","concurrency":1,"drainDuration":"1m30s","terminationDrainDuration":"7s"}"#,
            ),
            ("ISTIO_PROMETHEUS_ANNOTATIONS", r#"{"scrape":"true","path":"/m","port":"9090"}"#),
        ] {
            variables.insert(name.to_owned(), value.to_owned());
        }
        let read = |path: &str| (path == "/etc/istio/pod/labels").then(|| "app=\"a\"\nversion=\"v1\"\n".to_owned());
        let options = Options::from_environment(Role::Sidecar, &variables, read).unwrap();
        assert_eq!(options.node.id, "sidecar~10.77.0.5~a-1.shop~shop.svc.cluster.local");
        let metadata = options.node.metadata.unwrap().fields;
        assert_eq!(metadata["NAMESPACE"], text("shop"));
        assert_eq!(metadata["LABELS"], map([("app".into(), text("a")), ("version".into(), text("v1"))]));
        assert_eq!(options.ca.unwrap().address, "10.77.0.1:15012");
        assert_eq!(options.xds.unwrap().server_name, "istiod.istio-system.svc");
        assert_eq!(options.app_metrics, Some((9090, "/m".into())));
        assert_eq!(options.binary, Some("/usr/local/bin/envoy".into()));
        let Some(Kind::StructValue(told)) = &metadata["PROXY_CONFIG"].kind else { panic!("no PROXY_CONFIG is told") };
        assert_eq!(told.fields["binaryPath"], text("/usr/local/bin/envoy"));
        assert_eq!(options.drain_time, Duration::from_secs(90));
        assert_eq!(options.termination.drain, Duration::from_secs(7));
        variables.insert("TERMINATION_DRAIN_DURATION_SECONDS".into(), "9".into());
        let options = Options::from_environment(Role::Sidecar, &variables, read).unwrap();
        assert_eq!(options.termination.drain, Duration::from_secs(9));
        for (config, expect) in [
            (r#"{"drainDuration":"10ms"}"#, None),
            (r#"{"drainDuration":"2s"}"#, Some(2)),
            (r#"{"drainDuration":"soon"}"#, None),
            (r#"{"drainDuration":5}"#, None),
            (r#"{"terminationDrainDuration":"-1s"}"#, None),
        ] {
            variables.insert("PROXY_CONFIG".into(), config.into());
            let options = Options::from_environment(Role::Sidecar, &variables, read);
            assert_eq!(options.ok().map(|options| options.drain_time.as_secs()), expect, "{config}");
        }
        variables.insert("PROXY_CONFIG".into(), r#"{"binaryPath":""}"#.into());
        assert_eq!(Options::from_environment(Role::Sidecar, &variables, read).unwrap().binary, None);
        assert_eq!(options.renewal, Renewal::default());
        for (value, expect) in [("2m", Some(120)), ("24h0m0s", Some(86_400)), ("0s", None), ("-1m", None), ("x", None)]
        {
            variables.insert("SECRET_TTL".into(), value.into());
            let options = Options::from_environment(Role::Sidecar, &variables, read);
            assert_eq!(options.ok().map(|options| options.renewal.ttl.as_secs()), expect, "{value}");
        }
        variables.remove("SECRET_TTL");
        variables.insert("SECRET_GRACE_PERIOD_RATIO".into(), "1.5".into());
        assert!(Options::from_environment(Role::Sidecar, &variables, read).is_err());
        variables.remove("SECRET_GRACE_PERIOD_RATIO");
        variables.remove("POD_NAME");
        assert!(Options::from_environment(Role::Sidecar, &variables, |_| None).is_err());
    }

    #[test]
    fn a_mounted_certificate_is_in_place_of_the_ca() {
        let variables = [("POD_NAME", "a-1"), ("POD_NAMESPACE", "shop"), ("INSTANCE_IP", "10.0.0.1")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        let options = |present: usize| {
            let read = |path: &str| MOUNTED_IDENTITY[..present].contains(&path).then(String::new);
            Options::from_environment(Role::Sidecar, &variables, read).unwrap()
        };
        let all = options(3);
        assert!(all.ca.is_none() && all.xds.is_some());
        assert_eq!(all.identity_files, Some(MOUNTED_IDENTITY.map(PathBuf::from)));
        let some = options(2);
        assert!(some.ca.is_some() && some.identity_files.is_none());
    }

    #[test]
    fn the_kind_of_a_workloads_key() {
        let kind = |pairs: &[(&str, &str)]| {
            let variables = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            Renewal::from_environment(&variables).map(|renewal| renewal.key).ok()
        };
        let (algorithm, curve, size) = ("ECC_SIGNATURE_ALGORITHM", "ECC_CURVE", "WORKLOAD_RSA_KEY_SIZE");
        for (pairs, expect) in [
            (&[][..], Some(KeyKind::EcdsaP256)),
            (&[(algorithm, "ECDSA")], Some(KeyKind::EcdsaP256)),
            (&[(algorithm, "ECDSA"), (curve, "P384"), (size, "2048")], Some(KeyKind::EcdsaP384)),
            (&[(curve, "P256")], Some(KeyKind::EcdsaP256)),
            (&[(size, "2048")], Some(KeyKind::Rsa2048)),
            (&[(size, "1024")], None),
            (&[(algorithm, "EdDSA")], None),
            (&[(algorithm, "ECDSA"), (curve, "P521")], None),
        ] {
            assert_eq!(kind(pairs), expect, "{pairs:?}");
        }
    }
}
