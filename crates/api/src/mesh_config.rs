//! `meshConfig`: settings of the whole mesh, as written, with Istio's defaults on request.
//!
//! *Source*: Istio, "Global Mesh Options"; `docs/parity.md`, Traffic 5.8. Absent fields stay `None` so
//! that files merge; the methods answer with the default.

#![expect(missing_docs, reason = "a field is named and means what Istio's API reference says")]

use std::collections::BTreeMap;

use serde_json::Value;

use types::{TrustDomain, wellknown};

use crate::networking::{
    ConnectionPoolSettings, H2UpgradePolicy, HttpRetry, LocalityLbSetting, OutboundMode, OutboundTrafficPolicy,
    OutlierDetection, TcpKeepalive,
};
use crate::scalar::Duration;

records! {
    /// `meshConfig`
    pub struct MeshConfig {
        pub proxy_listen_port: Option<u16>,
        pub proxy_inbound_listen_port: Option<u16>,
        pub proxy_http_port: Option<u16>,
        pub connect_timeout: Option<Duration>,
        pub protocol_detection_timeout: Option<Duration>,
        pub tcp_keepalive: Option<TcpKeepalive>,
        pub ingress_class: Option<String>,
        pub ingress_service: Option<String>,
        pub ingress_controller_mode: Option<String>,
        pub ingress_selector: Option<String>,
        pub enable_tracing: Option<bool>,
        pub access_log_file: Option<String>,
        pub access_log_format: Option<String>,
        pub access_log_encoding: Option<AccessLogEncoding>,
        pub enable_envoy_access_log_service: Option<bool>,
        pub disable_envoy_listener_log: Option<bool>,
        pub default_config: Option<ProxyConfig>,
        pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
        pub inbound_traffic_policy: Option<InboundTrafficPolicy>,
        pub config_sources: Option<Value>,
        pub enable_auto_mtls: Option<bool>,
        pub trust_domain: Option<TrustDomain>,
        pub trust_domain_aliases: Vec<TrustDomain>,
        pub ca_certificates: Option<Value>,
        pub default_service_export_to: Vec<String>,
        pub default_virtual_service_export_to: Vec<String>,
        pub default_destination_rule_export_to: Vec<String>,
        pub root_namespace: Option<String>,
        pub locality_lb_setting: Option<LocalityLbSetting>,
        pub dns_refresh_rate: Option<Duration>,
        pub h2_upgrade_policy: Option<H2UpgradePolicy>,
        pub inbound_cluster_stat_name: Option<String>,
        pub outbound_cluster_stat_name: Option<String>,
        pub certificates: Option<Value>,
        pub service_settings: Option<Value>,
        pub service_entry_visibility: Option<Value>,
        pub service_scope_configs: Option<Value>,
        pub enable_prometheus_merge: Option<bool>,
        pub verify_certificate_at_client: Option<bool>,
        pub ca: Option<Value>,
        pub extension_providers: Vec<ExtensionProvider>,
        pub default_providers: Option<DefaultProviders>,
        pub discovery_selectors: Vec<crate::k8s::Selector>,
        pub path_normalization: Option<PathNormalization>,
        pub default_http_retry_policy: Option<HttpRetry>,
        pub default_inbound_http_retry_policy: Option<HttpRetry>,
        pub default_traffic_policy: Option<DefaultTrafficPolicy>,
        #[serde(rename = "meshMTLS")]
        pub mesh_mtls: Option<TlsConfig>,
        pub tls_defaults: Option<TlsConfig>,
        pub hbone_idle_timeout: Option<Duration>,
    }

    /// `inboundTrafficPolicy`
    pub struct InboundTrafficPolicy {
        pub mode: Option<InboundMode>,
    }

    /// `pathNormalization`
    pub struct PathNormalization {
        pub normalization: Normalization,
    }

    /// `defaultTrafficPolicy`
    pub struct DefaultTrafficPolicy {
        pub connection_pool: Option<ConnectionPoolSettings>,
        pub outlier_detection: Option<OutlierDetection>,
    }

    /// `meshMTLS`, `tlsDefaults`
    pub struct TlsConfig {
        pub min_protocol_version: crate::networking::TlsProtocol,
        pub cipher_suites: Vec<String>,
        pub ecdh_curves: Vec<String>,
    }

    /// `defaultProviders`
    pub struct DefaultProviders {
        pub tracing: Vec<String>,
        pub metrics: Vec<String>,
        pub access_logging: Vec<String>,
    }

    /// One entry of `extensionProviders`; exactly one is set.
    pub struct ExtensionProvider {
        pub name: String,
        pub envoy_ext_authz_http: Option<ExtAuthzHttp>,
        pub envoy_ext_authz_grpc: Option<ExtAuthzGrpc>,
        pub zipkin: Option<ZipkinProvider>,
        pub envoy_file_access_log: Option<FileAccessLog>,
        pub prometheus: Option<Value>,
        pub opentelemetry: Option<Value>,
        pub skywalking: Option<Value>,
        pub datadog: Option<Value>,
        pub lightstep: Option<Value>,
        pub opencensus: Option<Value>,
        pub stackdriver: Option<Value>,
        pub envoy_http_als: Option<Value>,
        pub envoy_tcp_als: Option<Value>,
        pub envoy_otel_als: Option<Value>,
        pub sds: Option<Value>,
    }

    /// `envoyExtAuthzHttp`
    pub struct ExtAuthzHttp {
        pub service: String,
        #[serde(deserialize_with = "crate::scalar::port")]
        pub port: u16,
        /// Absent: 600 s.
        pub timeout: Option<Duration>,
        pub path_prefix: String,
        pub fail_open: bool,
        pub clear_route_cache: Option<bool>,
        /// Empty: 403.
        pub status_on_error: String,
        /// Older form, used only when the new one is empty.
        pub include_headers_in_check: Vec<String>,
        pub include_request_headers_in_check: Vec<String>,
        pub include_additional_headers_in_check: BTreeMap<String, String>,
        pub include_request_body_in_check: Option<ExtAuthzBody>,
        pub headers_to_upstream_on_allow: Vec<String>,
        pub headers_to_downstream_on_deny: Vec<String>,
        pub headers_to_downstream_on_allow: Vec<String>,
    }

    /// `envoyExtAuthzGrpc`
    pub struct ExtAuthzGrpc {
        pub service: String,
        #[serde(deserialize_with = "crate::scalar::port")]
        pub port: u16,
        /// Absent: 600 s.
        pub timeout: Option<Duration>,
        pub fail_open: bool,
        pub clear_route_cache: Option<bool>,
        /// Empty: 403.
        pub status_on_error: String,
        pub include_request_body_in_check: Option<ExtAuthzBody>,
    }

    /// `includeRequestBodyInCheck`
    pub struct ExtAuthzBody {
        pub max_request_bytes: u32,
        pub allow_partial_message: bool,
        pub pack_as_bytes: bool,
    }

    /// `zipkin`
    pub struct ZipkinProvider {
        pub service: String,
        #[serde(deserialize_with = "crate::scalar::port")]
        pub port: u16,
        pub max_tag_length: Option<u32>,
        pub enable64bit_trace_id: bool,
        /// Empty: `/api/v2/spans`.
        pub path: String,
        /// `USE_B3` (also when absent), `USE_B3_WITH_W3C_PROPAGATION`
        pub trace_context_option: String,
        /// Absent: 5 s.
        pub timeout: Option<Duration>,
        pub headers: Option<Value>,
    }

    /// `envoyFileAccessLog`
    pub struct FileAccessLog {
        pub path: String,
        pub log_format: Option<LogFormat>,
        pub omit_empty_values: bool,
    }

    /// `logFormat`; one is set.
    pub struct LogFormat {
        pub text: Option<String>,
        pub labels: Option<Value>,
    }

    /// `defaultConfig`, `proxy.istio.io/config`, the ProxyConfig kind.
    pub struct ProxyConfig {
        pub config_path: Option<String>,
        pub binary_path: Option<String>,
        pub service_cluster: Option<String>,
        pub drain_duration: Option<Duration>,
        pub termination_drain_duration: Option<Duration>,
        pub discovery_address: Option<String>,
        pub proxy_admin_port: Option<u16>,
        pub control_plane_auth_policy: Option<String>,
        pub custom_config_file: Option<String>,
        pub stat_name_length: Option<u32>,
        pub concurrency: Option<u32>,
        pub proxy_bootstrap_template_path: Option<String>,
        pub interception_mode: Option<String>,
        pub tracing: Option<Tracing>,
        pub envoy_access_log_service: Option<Value>,
        pub envoy_metrics_service: Option<Value>,
        pub proxy_metadata: BTreeMap<String, String>,
        pub runtime_values: BTreeMap<String, String>,
        pub status_port: Option<u16>,
        pub extra_stat_tags: Vec<String>,
        pub gateway_topology: Option<GatewayTopology>,
        pub proxy_stats_matcher: Option<Value>,
        pub readiness_probe: Option<Value>,
        pub hold_application_until_proxy_starts: Option<bool>,
        pub ca_certificates_pem: Vec<String>,
        pub image: Option<Value>,
        pub private_key_provider: Option<Value>,
        pub proxy_headers: Option<ProxyHeaders>,
        pub file_flush_interval: Option<Duration>,
        pub file_flush_min_size_kb: Option<u32>,
        pub stats_compression: Option<bool>,
        pub stats_eviction_interval: Option<Duration>,
        /// Of the ProxyConfig kind.
        pub selector: Option<crate::networking::LabelSelector>,
        /// Of the ProxyConfig kind.
        pub environment_variables: BTreeMap<String, String>,
    }

    /// `proxyHeaders`
    pub struct ProxyHeaders {
        pub forwarded_client_cert: Option<Value>,
        pub set_current_client_cert_details: Option<Value>,
        pub request_id: HeaderSwitch,
        pub server: ServerHeader,
        pub attempt_count: HeaderSwitch,
        pub envoy_debug_headers: HeaderSwitch,
        pub metadata_exchange_headers: Option<Value>,
        pub preserve_http1_header_case: bool,
        pub x_forwarded_host: HeaderSetting,
        pub x_forwarded_port: HeaderSetting,
    }

    /// A header that is written unless it is switched off.
    pub struct HeaderSwitch {
        pub disabled: bool,
    }

    /// A header that is written only where it is asked for.
    pub struct HeaderSetting {
        pub enabled: bool,
    }

    /// `proxyHeaders.server`
    pub struct ServerHeader {
        /// The application's own passes.
        pub disabled: bool,
        /// In place of the proxy's name.
        pub value: String,
    }

    /// `gatewayTopology`
    pub struct GatewayTopology {
        pub num_trusted_proxies: u32,
        pub forward_client_cert_details: Option<String>,
        pub proxy_protocol: Option<Value>,
    }

    /// `defaultConfig.tracing`
    pub struct Tracing {
        pub zipkin: Option<TracingZipkin>,
        pub lightstep: Option<Value>,
        pub datadog: Option<Value>,
        pub stackdriver: Option<Value>,
        #[serde(rename = "openCensusAgent")]
        pub open_census_agent: Option<Value>,
        /// Percent; absent and 0: 1.
        pub sampling: Option<f64>,
        pub tls_settings: Option<Value>,
        pub custom_tags: BTreeMap<String, CustomTag>,
        pub max_path_tag_length: Option<u32>,
        pub enable_istio_tags: Option<bool>,
    }

    /// `tracing.zipkin`
    pub struct TracingZipkin {
        /// `host:port`
        pub address: String,
    }

    /// One entry of `customTags`; exactly one is set.
    pub struct CustomTag {
        pub literal: Option<TagLiteral>,
        pub environment: Option<TagSource>,
        pub header: Option<TagSource>,
        pub formatter: Option<Value>,
    }

    /// A fixed tag.
    pub struct TagLiteral {
        pub value: String,
    }

    /// A tag from a header or a variable.
    pub struct TagSource {
        pub name: String,
        pub default_value: String,
    }
}

words! {
    /// `accessLogEncoding`
    pub enum AccessLogEncoding {
        #[default]
        Text = "TEXT",
        Json = "JSON",
    }

    /// `inboundTrafficPolicy.mode`
    pub enum InboundMode {
        #[default]
        Passthrough = "PASSTHROUGH",
        Localhost = "LOCALHOST",
    }

    /// `pathNormalization.normalization`
    pub enum Normalization {
        /// `BASE`
        #[default]
        Default = "DEFAULT",
        None = "NONE",
        Base = "BASE",
        MergeSlashes = "MERGE_SLASHES",
        DecodeAndMergeSlashes = "DECODE_AND_MERGE_SLASHES",
    }
}

impl MeshConfig {
    /// Default 10 s.
    pub fn connect_timeout(&self) -> std::time::Duration {
        self.connect_timeout.map_or(std::time::Duration::from_secs(10), |d| d.0)
    }

    /// Default 0: wait for ever.
    pub fn protocol_detection_timeout(&self) -> std::time::Duration {
        self.protocol_detection_timeout.map_or(std::time::Duration::ZERO, |d| d.0)
    }

    /// Default 60 s.
    pub fn dns_refresh_rate(&self) -> std::time::Duration {
        self.dns_refresh_rate.map_or(std::time::Duration::from_mins(1), |d| d.0)
    }

    /// Default true.
    pub fn enable_auto_mtls(&self) -> bool {
        self.enable_auto_mtls.unwrap_or(true)
    }

    /// Default `ALLOW_ANY`.
    pub fn outbound_mode(&self) -> OutboundMode {
        self.outbound_traffic_policy.as_ref().and_then(|p| p.mode).unwrap_or_default()
    }

    /// Default `PASSTHROUGH`.
    pub fn inbound_mode(&self) -> InboundMode {
        self.inbound_traffic_policy.as_ref().and_then(|p| p.mode).unwrap_or_default()
    }

    /// Default `istio-system`.
    pub fn root_namespace(&self) -> &str {
        match self.root_namespace.as_deref() {
            None | Some("") => wellknown::DEFAULT_ROOT_NAMESPACE,
            Some(name) => name,
        }
    }

    /// Default `cluster.local`.
    pub fn trust_domain(&self) -> TrustDomain {
        self.trust_domain.clone().unwrap_or_default()
    }

    /// Default 15001.
    pub fn proxy_listen_port(&self) -> u16 {
        self.proxy_listen_port.unwrap_or(wellknown::ports::OUTBOUND)
    }

    /// Default 15006.
    pub fn proxy_inbound_listen_port(&self) -> u16 {
        self.proxy_inbound_listen_port.unwrap_or(wellknown::ports::INBOUND)
    }

    /// Default true; nothing is emitted without a provider.
    pub fn enable_tracing(&self) -> bool {
        self.enable_tracing.unwrap_or(true)
    }

    /// `BASE` unless set; `DEFAULT` is `BASE`.
    pub fn normalization(&self) -> Normalization {
        match self.path_normalization.as_ref().map(|p| p.normalization).unwrap_or_default() {
            Normalization::Default => Normalization::Base,
            other => other,
        }
    }

    /// Where access logs go; `None` when off (Istio's default).
    pub fn access_log_file(&self) -> Option<&str> {
        self.access_log_file.as_deref().filter(|path| !path.is_empty())
    }

    /// The provider of that name.
    pub fn extension_provider(&self, name: &str) -> Option<&ExtensionProvider> {
        self.extension_providers.iter().find(|p| p.name == name)
    }
}

impl ProxyConfig {
    /// Percent of requests traced when neither client nor Telemetry decides; default 1.
    pub fn trace_sampling(&self) -> f64 {
        match self.tracing.as_ref().and_then(|tracing| tracing.sampling) {
            None | Some(0.0) => 1.0,
            Some(percent) => percent.clamp(0.0, 100.0),
        }
    }
}
