//! `networking.istio.io`: the specs of Istio's traffic kinds, as written.
//!
//! Names are Istio's in snake case, defaults are protobuf's (absent is empty, zero, `None`); what an
//! absent field *means* is decided where the object is compiled. Source: `docs/parity.md`, Traffic 2 to 5.

#![expect(missing_docs, reason = "a field is named and means what Istio's API reference says")]

use std::collections::BTreeMap;

use serde_json::Value;

use crate::scalar::{Duration, Percent, StringMatch};

// --- VirtualService ---

records! {
    /// `VirtualService`: how requests for its hosts are routed.
    pub struct VirtualService {
        pub hosts: Vec<String>,
        /// Empty means `[mesh]`.
        pub gateways: Vec<String>,
        pub http: Vec<HttpRoute>,
        pub tls: Vec<TlsRoute>,
        pub tcp: Vec<TcpRoute>,
        pub export_to: Vec<String>,
    }

    /// One entry of `http`.
    pub struct HttpRoute {
        pub name: String,
        /// `match`: entries are alternatives, fields of one entry must all hold. Empty matches all.
        #[serde(rename = "match")]
        pub matches: Vec<HttpMatchRequest>,
        pub route: Vec<HttpRouteDestination>,
        pub redirect: Option<HttpRedirect>,
        pub direct_response: Option<HttpDirectResponse>,
        pub delegate: Option<Delegate>,
        pub rewrite: Option<HttpRewrite>,
        pub timeout: Option<Duration>,
        pub retries: Option<HttpRetry>,
        pub fault: Option<HttpFaultInjection>,
        pub mirror: Option<Destination>,
        pub mirrors: Vec<HttpMirrorPolicy>,
        /// Older form of `mirror_percentage`.
        pub mirror_percent: Option<u32>,
        pub mirror_percentage: Option<Percent>,
        pub cors_policy: Option<CorsPolicy>,
        pub headers: Option<Headers>,
    }

    /// One alternative of `http[].match`.
    pub struct HttpMatchRequest {
        pub name: String,
        pub uri: Option<StringMatch>,
        pub scheme: Option<StringMatch>,
        pub method: Option<StringMatch>,
        pub authority: Option<StringMatch>,
        pub headers: BTreeMap<String, StringMatch>,
        /// 0 when absent.
        pub port: u16,
        pub source_labels: BTreeMap<String, String>,
        pub gateways: Vec<String>,
        pub query_params: BTreeMap<String, StringMatch>,
        pub ignore_uri_case: bool,
        pub without_headers: BTreeMap<String, StringMatch>,
        pub source_namespace: String,
        pub stat_prefix: String,
    }

    /// One weighted destination of an HTTP route.
    pub struct HttpRouteDestination {
        pub destination: Destination,
        pub weight: i32,
        pub headers: Option<Headers>,
    }

    /// One weighted destination of a TCP or TLS route.
    pub struct RouteDestination {
        pub destination: Destination,
        pub weight: i32,
    }

    /// A service, one of its subsets, one of its ports.
    pub struct Destination {
        pub host: String,
        pub subset: String,
        pub port: Option<PortSelector>,
    }

    /// `port: {number: 80}`
    pub struct PortSelector {
        pub number: u16,
    }

    /// `redirect`
    pub struct HttpRedirect {
        pub uri: String,
        pub prefix_rewrite: String,
        pub authority: String,
        /// 0 when absent.
        pub port: u16,
        pub derive_port: Option<RedirectPort>,
        pub scheme: String,
        /// 0 when absent: 301.
        pub redirect_code: u32,
    }

    /// `directResponse`
    pub struct HttpDirectResponse {
        pub status: u32,
        pub body: Option<HttpBody>,
    }

    /// The body of a direct response.
    pub struct HttpBody {
        pub string: Option<String>,
        /// Base64.
        pub bytes: Option<String>,
    }

    /// `delegate`
    pub struct Delegate {
        pub name: String,
        pub namespace: String,
    }

    /// `rewrite`
    pub struct HttpRewrite {
        pub uri: String,
        pub authority: String,
        pub uri_regex_rewrite: Option<RegexRewrite>,
    }

    /// `rewrite.uriRegexRewrite`
    pub struct RegexRewrite {
        #[serde(rename = "match")]
        pub pattern: String,
        pub rewrite: String,
    }

    /// `retries`
    pub struct HttpRetry {
        /// Absent counts as 0, which disables.
        pub attempts: i32,
        pub per_try_timeout: Option<Duration>,
        pub retry_on: String,
        pub retry_remote_localities: Option<bool>,
        pub retry_ignore_previous_hosts: Option<bool>,
        pub backoff: Option<Duration>,
    }

    /// `fault`
    pub struct HttpFaultInjection {
        pub delay: Option<FaultDelay>,
        pub abort: Option<FaultAbort>,
    }

    /// `fault.delay`
    pub struct FaultDelay {
        pub fixed_delay: Option<Duration>,
        /// Not supported by Istio; refused.
        pub exponential_delay: Option<Duration>,
        pub percentage: Option<Percent>,
        /// Older form of `percentage`.
        pub percent: Option<i32>,
    }

    /// `fault.abort`
    pub struct FaultAbort {
        pub http_status: Option<u32>,
        /// `UNAVAILABLE`, …
        pub grpc_status: Option<String>,
        /// Not supported by Istio; refused.
        pub http2_error: Option<String>,
        pub percentage: Option<Percent>,
    }

    /// One entry of `mirrors`.
    pub struct HttpMirrorPolicy {
        pub destination: Destination,
        pub percentage: Option<Percent>,
    }

    /// `corsPolicy`
    pub struct CorsPolicy {
        /// Older form, exact; used only if `allow_origins` is empty.
        pub allow_origin: Vec<String>,
        pub allow_origins: Vec<StringMatch>,
        pub allow_methods: Vec<String>,
        pub allow_headers: Vec<String>,
        pub expose_headers: Vec<String>,
        pub max_age: Option<Duration>,
        pub allow_credentials: Option<bool>,
        pub unmatched_preflights: Option<UnmatchedPreflights>,
    }

    /// `headers`
    pub struct Headers {
        pub request: Option<HeaderOperations>,
        pub response: Option<HeaderOperations>,
    }

    /// `set`, then `add`, then `remove`.
    pub struct HeaderOperations {
        pub set: BTreeMap<String, String>,
        pub add: BTreeMap<String, String>,
        pub remove: Vec<String>,
    }

    /// One entry of `tls`.
    pub struct TlsRoute {
        #[serde(rename = "match")]
        pub matches: Vec<TlsMatchAttributes>,
        pub route: Vec<RouteDestination>,
    }

    /// One alternative of `tls[].match`.
    pub struct TlsMatchAttributes {
        pub sni_hosts: Vec<String>,
        pub destination_subnets: Vec<String>,
        /// 0 when absent.
        pub port: u16,
        pub source_labels: BTreeMap<String, String>,
        pub gateways: Vec<String>,
        pub source_namespace: String,
    }

    /// One entry of `tcp`.
    pub struct TcpRoute {
        #[serde(rename = "match")]
        pub matches: Vec<L4MatchAttributes>,
        pub route: Vec<RouteDestination>,
    }

    /// One alternative of `tcp[].match`.
    pub struct L4MatchAttributes {
        pub destination_subnets: Vec<String>,
        /// 0 when absent.
        pub port: u16,
        /// Unused by Istio.
        pub source_subnet: String,
        pub source_labels: BTreeMap<String, String>,
        pub gateways: Vec<String>,
        pub source_namespace: String,
    }
}

impl HttpRoute {
    /// Whether it takes every request of every proxy, so that no route behind it is reached.
    pub fn matches_everything(&self) -> bool {
        self.matches.is_empty() || self.matches.iter().any(HttpMatchRequest::matches_everything)
    }
}

impl HttpMatchRequest {
    fn matches_everything(&self) -> bool {
        let any_path = match &self.uri {
            None | Some(StringMatch::Present) => true,
            Some(StringMatch::Prefix(prefix)) => prefix.is_empty() || prefix == "/",
            Some(StringMatch::Regex(regex)) => regex == ".*",
            Some(StringMatch::Exact(_)) => false,
        };
        any_path
            && [&self.scheme, &self.method, &self.authority].iter().all(|other| other.is_none())
            && self.headers.is_empty()
            && self.without_headers.is_empty()
            && self.query_params.is_empty()
            && self.port == 0
            && self.source_labels.is_empty()
            && self.gateways.is_empty()
            && self.source_namespace.is_empty()
    }
}

words! {
    /// `redirect.derivePort`
    pub enum RedirectPort {
        #[default]
        FromProtocolDefault = "FROM_PROTOCOL_DEFAULT",
        FromRequestPort = "FROM_REQUEST_PORT",
    }

    /// `corsPolicy.unmatchedPreflights`
    pub enum UnmatchedPreflights {
        #[default]
        Unspecified = "UNSPECIFIED",
        Forward = "FORWARD",
        Ignore = "IGNORE",
    }
}

// --- DestinationRule ---

records! {
    /// `DestinationRule`: subsets of a host and how clients talk to it.
    pub struct DestinationRule {
        pub host: String,
        pub traffic_policy: Option<TrafficPolicy>,
        pub subsets: Vec<Subset>,
        pub export_to: Vec<String>,
        pub workload_selector: Option<LabelSelector>,
    }

    /// `selector` / `workloadSelector` of the form `{matchLabels}`.
    pub struct LabelSelector {
        pub match_labels: BTreeMap<String, String>,
    }

    /// A named part of a host's endpoints.
    pub struct Subset {
        pub name: String,
        pub labels: BTreeMap<String, String>,
        pub traffic_policy: Option<TrafficPolicy>,
    }

    /// `trafficPolicy`. Blocks are replaced whole between levels (`docs/parity.md`, Traffic 3.2).
    pub struct TrafficPolicy {
        pub load_balancer: Option<LoadBalancerSettings>,
        pub connection_pool: Option<ConnectionPoolSettings>,
        pub outlier_detection: Option<OutlierDetection>,
        pub tls: Option<ClientTlsSettings>,
        pub port_level_settings: Vec<PortTrafficPolicy>,
        pub tunnel: Option<TunnelSettings>,
        pub proxy_protocol: Option<ProxyProtocol>,
        pub retry_budget: Option<RetryBudget>,
    }

    /// One entry of `portLevelSettings`.
    pub struct PortTrafficPolicy {
        pub port: Option<PortSelector>,
        pub load_balancer: Option<LoadBalancerSettings>,
        pub connection_pool: Option<ConnectionPoolSettings>,
        pub outlier_detection: Option<OutlierDetection>,
        pub tls: Option<ClientTlsSettings>,
    }

    /// `tunnel`
    pub struct TunnelSettings {
        pub protocol: String,
        pub target_host: String,
        pub target_port: u16,
    }

    /// `proxyProtocol`
    pub struct ProxyProtocol {
        pub version: Option<ProxyProtocolVersion>,
    }

    /// `retryBudget`
    pub struct RetryBudget {
        pub percent: Option<f64>,
        pub min_retry_concurrency: u32,
        pub budget_interval: Option<Duration>,
    }

    /// `loadBalancer`
    pub struct LoadBalancerSettings {
        pub simple: Option<SimpleLb>,
        pub consistent_hash: Option<ConsistentHashLb>,
        pub locality_lb_setting: Option<LocalityLbSetting>,
        pub zone_aware_lb_setting: Option<Value>,
        /// Older form of `warmup.duration`.
        pub warmup_duration_secs: Option<Duration>,
        pub warmup: Option<WarmupConfiguration>,
    }

    /// `warmup`
    pub struct WarmupConfiguration {
        pub duration: Option<Duration>,
        pub minimum_percent: Option<f64>,
        pub aggression: Option<f64>,
    }

    /// `consistentHash`
    pub struct ConsistentHashLb {
        pub http_header_name: Option<String>,
        pub http_cookie: Option<HttpCookie>,
        pub use_source_ip: Option<bool>,
        pub http_query_parameter_name: Option<String>,
        pub ring_hash: Option<RingHash>,
        pub maglev: Option<Maglev>,
        /// Older form of `ring_hash.minimum_ring_size`.
        pub minimum_ring_size: Option<u64>,
    }

    /// `consistentHash.httpCookie`
    pub struct HttpCookie {
        pub name: String,
        pub path: String,
        pub ttl: Option<Duration>,
        pub attributes: Vec<CookieAttribute>,
    }

    /// `consistentHash.httpCookie.attributes[]`
    pub struct CookieAttribute {
        pub name: String,
        pub value: String,
    }

    /// `consistentHash.ringHash`
    pub struct RingHash {
        pub minimum_ring_size: Option<u64>,
    }

    /// `consistentHash.maglev`
    pub struct Maglev {
        pub table_size: Option<u64>,
    }

    /// `localityLbSetting`
    pub struct LocalityLbSetting {
        pub distribute: Vec<LocalityDistribute>,
        pub failover: Vec<LocalityFailover>,
        pub failover_priority: Vec<String>,
        /// Absent counts as true.
        pub enabled: Option<bool>,
    }

    /// One entry of `distribute`.
    pub struct LocalityDistribute {
        pub from: String,
        pub to: BTreeMap<String, u32>,
    }

    /// One entry of `failover`.
    pub struct LocalityFailover {
        pub from: String,
        pub to: String,
    }

    /// `connectionPool`
    pub struct ConnectionPoolSettings {
        pub tcp: Option<TcpPoolSettings>,
        pub http: Option<HttpPoolSettings>,
    }

    /// `connectionPool.tcp`; a limit of 0 is unset.
    pub struct TcpPoolSettings {
        pub max_connections: u32,
        pub connect_timeout: Option<Duration>,
        pub tcp_keepalive: Option<TcpKeepalive>,
        pub max_connection_duration: Option<Duration>,
        pub idle_timeout: Option<Duration>,
    }

    /// `tcpKeepalive`
    pub struct TcpKeepalive {
        pub probes: u32,
        pub time: Option<Duration>,
        pub interval: Option<Duration>,
    }

    /// `connectionPool.http`; a limit of 0 is unset.
    pub struct HttpPoolSettings {
        pub http1_max_pending_requests: u32,
        pub http2_max_requests: u32,
        pub max_requests_per_connection: u32,
        pub max_retries: u32,
        pub idle_timeout: Option<Duration>,
        pub h2_upgrade_policy: Option<H2UpgradePolicy>,
        pub use_client_protocol: bool,
        pub max_concurrent_streams: u32,
        pub http2_keep_alive: Option<Http2KeepAlive>,
    }

    /// `http2KeepAlive`
    pub struct Http2KeepAlive {
        pub interval: Option<Duration>,
        pub timeout: Option<Duration>,
    }

    /// `outlierDetection`; present but empty switches all defaults on.
    pub struct OutlierDetection {
        /// Older form.
        pub consecutive_errors: Option<i32>,
        pub split_external_local_origin_errors: bool,
        pub consecutive_local_origin_failures: Option<u32>,
        pub consecutive_gateway_errors: Option<u32>,
        /// Absent: 5.
        pub consecutive_5xx_errors: Option<u32>,
        pub outlier_detection_http_error_codes: Vec<u32>,
        pub interval: Option<Duration>,
        pub base_ejection_time: Option<Duration>,
        /// Absent: 10.
        pub max_ejection_percent: Option<i32>,
        pub min_health_percent: i32,
    }

    /// `tls` of a traffic policy.
    pub struct ClientTlsSettings {
        pub mode: ClientTlsMode,
        pub client_certificate: String,
        pub private_key: String,
        pub ca_certificates: String,
        pub credential_name: String,
        pub subject_alt_names: Vec<String>,
        pub sni: String,
        pub insecure_skip_verify: Option<bool>,
        pub ca_crl: String,
    }
}

words! {
    /// `proxyProtocol.version`
    pub enum ProxyProtocolVersion {
        #[default]
        V1 = "V1",
        V2 = "V2",
    }

    /// `loadBalancer.simple`
    pub enum SimpleLb {
        #[default]
        Unspecified = "UNSPECIFIED",
        /// Older name of `LEAST_REQUEST`.
        LeastConn = "LEAST_CONN",
        Random = "RANDOM",
        Passthrough = "PASSTHROUGH",
        RoundRobin = "ROUND_ROBIN",
        LeastRequest = "LEAST_REQUEST",
    }

    /// `h2UpgradePolicy` of a connection pool and of the mesh.
    pub enum H2UpgradePolicy {
        #[default]
        Default = "DEFAULT",
        DoNotUpgrade = "DO_NOT_UPGRADE",
        Upgrade = "UPGRADE",
    }

    /// `tls.mode` of a traffic policy.
    pub enum ClientTlsMode {
        #[default]
        Disable = "DISABLE",
        Simple = "SIMPLE",
        Mutual = "MUTUAL",
        IstioMutual = "ISTIO_MUTUAL",
    }
}

// --- Gateway ---

records! {
    /// `Gateway`: servers that gateway proxies open.
    pub struct Gateway {
        pub servers: Vec<Server>,
        pub selector: BTreeMap<String, String>,
    }

    /// One server.
    pub struct Server {
        pub port: Option<Port>,
        pub bind: String,
        pub hosts: Vec<String>,
        pub tls: Option<ServerTlsSettings>,
        pub default_endpoint: String,
        pub name: String,
    }

    /// A port with protocol and name, of gateways and sidecars.
    pub struct Port {
        pub number: u16,
        pub protocol: String,
        pub name: String,
        /// Not allowed here; refused.
        pub target_port: u16,
    }

    /// `tls` of a server.
    pub struct ServerTlsSettings {
        pub https_redirect: bool,
        pub mode: ServerTlsMode,
        pub server_certificate: String,
        pub private_key: String,
        pub ca_certificates: String,
        pub credential_name: String,
        pub credential_names: Vec<String>,
        pub tls_certificates: Vec<TlsCertificate>,
        pub ca_cert_credential_name: String,
        pub subject_alt_names: Vec<String>,
        pub verify_certificate_spki: Vec<String>,
        pub verify_certificate_hash: Vec<String>,
        pub min_protocol_version: TlsProtocol,
        pub max_protocol_version: TlsProtocol,
        pub cipher_suites: Vec<String>,
        pub ca_crl: String,
    }

    /// One entry of `tlsCertificates`.
    pub struct TlsCertificate {
        pub server_certificate: String,
        pub private_key: String,
        pub ca_certificates: String,
    }
}

words! {
    /// `tls.mode` of a server.
    pub enum ServerTlsMode {
        #[default]
        Passthrough = "PASSTHROUGH",
        Simple = "SIMPLE",
        Mutual = "MUTUAL",
        AutoPassthrough = "AUTO_PASSTHROUGH",
        IstioMutual = "ISTIO_MUTUAL",
        OptionalMutual = "OPTIONAL_MUTUAL",
    }

    /// `minProtocolVersion`, `maxProtocolVersion`
    pub enum TlsProtocol {
        #[default]
        Auto = "TLS_AUTO",
        V1_0 = "TLSV1_0",
        V1_1 = "TLSV1_1",
        V1_2 = "TLSV1_2",
        V1_3 = "TLSV1_3",
    }
}

// --- ServiceEntry, WorkloadEntry ---

records! {
    /// `ServiceEntry`: a service the platform does not know.
    pub struct ServiceEntry {
        pub hosts: Vec<String>,
        pub addresses: Vec<String>,
        pub ports: Vec<ServicePort>,
        pub location: Location,
        pub resolution: Resolution,
        pub endpoints: Vec<WorkloadEntry>,
        pub workload_selector: Option<WorkloadSelector>,
        pub export_to: Vec<String>,
        pub subject_alt_names: Vec<String>,
    }

    /// A port of a ServiceEntry.
    pub struct ServicePort {
        pub number: u16,
        pub protocol: String,
        pub name: String,
        /// 0 when absent.
        pub target_port: u16,
    }

    /// `WorkloadEntry`, also the endpoints of a ServiceEntry.
    pub struct WorkloadEntry {
        pub address: String,
        pub ports: BTreeMap<String, u16>,
        pub labels: BTreeMap<String, String>,
        pub network: String,
        pub locality: String,
        /// 0 when absent: 1.
        pub weight: u32,
        pub service_account: String,
    }

    /// `workloadSelector` of the form `{labels}`.
    pub struct WorkloadSelector {
        pub labels: BTreeMap<String, String>,
    }
}

words! {
    /// `location`
    pub enum Location {
        #[default]
        MeshExternal = "MESH_EXTERNAL",
        MeshInternal = "MESH_INTERNAL",
    }

    /// `resolution`
    pub enum Resolution {
        #[default]
        None = "NONE",
        Static = "STATIC",
        Dns = "DNS",
        DnsRoundRobin = "DNS_ROUND_ROBIN",
        DynamicDns = "DYNAMIC_DNS",
    }
}

// --- Sidecar ---

records! {
    /// `Sidecar`: what a sidecar sees and accepts.
    pub struct Sidecar {
        pub workload_selector: Option<WorkloadSelector>,
        pub ingress: Vec<IstioIngressListener>,
        pub egress: Vec<IstioEgressListener>,
        pub inbound_connection_pool: Option<ConnectionPoolSettings>,
        pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
    }

    /// One entry of `ingress`.
    pub struct IstioIngressListener {
        pub port: Option<Port>,
        pub bind: String,
        pub capture_mode: CaptureMode,
        pub default_endpoint: String,
        pub tls: Option<ServerTlsSettings>,
        pub connection_pool: Option<ConnectionPoolSettings>,
    }

    /// One entry of `egress`.
    pub struct IstioEgressListener {
        pub port: Option<Port>,
        pub bind: String,
        pub capture_mode: CaptureMode,
        pub hosts: Vec<String>,
    }

    /// `outboundTrafficPolicy` of a Sidecar and of the mesh.
    pub struct OutboundTrafficPolicy {
        pub mode: Option<OutboundMode>,
        pub egress_proxy: Option<Destination>,
        /// Of `ALLOW_ANY_DYNAMIC_DNS`.
        pub tls: Option<Value>,
    }
}

words! {
    /// `captureMode`
    pub enum CaptureMode {
        #[default]
        Default = "DEFAULT",
        Iptables = "IPTABLES",
        None = "NONE",
    }

    /// `outboundTrafficPolicy.mode`. Absent is the mesh's mode, whose default is `ALLOW_ANY`.
    pub enum OutboundMode {
        RegistryOnly = "REGISTRY_ONLY",
        #[default]
        AllowAny = "ALLOW_ANY",
        AllowAnyDynamicDns = "ALLOW_ANY_DYNAMIC_DNS",
    }
}
