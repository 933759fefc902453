//! The HTTP connection manager, as the runtime holds it: how heads are normalised, which filters
//! run, where routes come from, which time-outs and limits a connection has.

use std::sync::Arc;
use std::time::Duration;

use crate::access_log::AccessLog;
use crate::chain::Direction;
use crate::config::Name;
use crate::matcher::Cidr;
use crate::route::RouteTable;

/// Where routes come from.
#[derive(Clone, Debug)]
pub enum RouteSource {
    /// By name, received apart.
    Rds(Name),
    /// In place.
    Inline(Arc<RouteTable>),
}

/// Which HTTP versions a connection may speak.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    /// Told by ALPN, else by the preface.
    Auto,
    /// HTTP/1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// What happens to `x-forwarded-client-cert`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ForwardClientCert {
    /// Removed.
    Sanitize,
    /// Passed on if the connection is mutual TLS, else removed.
    ForwardOnly,
    /// An element is appended if the connection is mutual TLS, else removed.
    AppendForward,
    /// Replaced by one element if the connection is mutual TLS, else removed.
    SanitizeSet,
    /// Passed on always.
    AlwaysForwardOnly,
}

/// Which parts of the peer's certificate XFCC carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClientCertParts {
    /// `Subject`
    pub subject: bool,
    /// `Cert`
    pub cert: bool,
    /// `Chain`
    pub chain: bool,
    /// `DNS`
    pub dns: bool,
    /// `URI`
    pub uri: bool,
}

/// What becomes of the upstream's `server` header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServerHeader {
    /// Always ours.
    Overwrite,
    /// Ours if the upstream sent none.
    AppendIfAbsent,
    /// The upstream's, or none.
    PassThrough,
}

/// What happens to `%2F`, `%5C` in paths.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EscapedSlashes {
    /// They stay.
    Keep,
    /// 400
    Reject,
    /// Decoded, and the client is redirected there.
    UnescapeAndRedirect,
    /// Decoded.
    UnescapeAndForward,
}

/// Time-outs of a connection and its streams; `None` is "never".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HttpTimeouts {
    /// A connection without streams.
    pub idle: Option<Duration>,
    /// A stream on which nothing moves.
    pub stream_idle: Option<Duration>,
    /// Until the whole request is in.
    pub request: Option<Duration>,
    /// Until its head is in.
    pub request_headers: Option<Duration>,
    /// A connection's whole life.
    pub connection_duration_max: Option<Duration>,
    /// A stream's whole life.
    pub stream_duration_max: Option<Duration>,
    /// Between GOAWAY and the end of a draining connection.
    pub drain: Duration,
}

/// Limits and settings of the codecs.
#[derive(Clone, PartialEq, Debug)]
pub struct CodecSettings {
    /// Of a request's head.
    pub header_bytes_max: u32,
    /// Fields of a request's head.
    pub headers_max: u32,
    /// Requests per connection.
    pub requests_per_connection_max: Option<u32>,
    /// HTTP/1.0 is taken.
    pub accept_http10: bool,
    /// Host of an HTTP/1.0 request without one.
    pub default_host_http10: Box<str>,
    /// Streams at once on an HTTP/2 connection.
    pub concurrent_streams_max: u32,
    /// HTTP/2 window of a stream.
    pub stream_window: u32,
    /// HTTP/2 window of a connection.
    pub connection_window: u32,
    /// HTTP/2 clients are told that they may ask for upgrades (extended CONNECT, RFC 8441).
    pub extended_connect: bool,
    /// Requests with `_` in a header name: rejected, or the header dropped, or let through.
    pub underscores: Underscores,
}

/// What happens to header names with `_`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Underscores {
    /// Allowed.
    Allow,
    /// The request is refused.
    Reject,
    /// The header is dropped.
    Drop,
}

impl Default for CodecSettings {
    /// Envoy's defaults.
    fn default() -> Self {
        Self {
            header_bytes_max: 60 * 1024,
            headers_max: 100,
            requests_per_connection_max: None,
            accept_http10: false,
            default_host_http10: "".into(),
            concurrent_streams_max: 1024,
            stream_window: 16 * 1024 * 1024,
            connection_window: 24 * 1024 * 1024,
            extended_connect: false,
            underscores: Underscores::Allow,
        }
    }
}

/// Where spans go and how many.
#[derive(Clone, PartialEq, Debug)]
pub struct Tracing {
    /// Percent of requests that ask for it (0 to 100).
    pub client_sampling: f64,
    /// Percent of all requests.
    pub random_sampling: f64,
    /// Cap in percent.
    pub overall_sampling: f64,
    /// The upstream side gets a span of its own.
    pub spawn_upstream_span: bool,
    /// Bytes of the path in a tag.
    pub path_tag_max: u32,
    /// Tags by name.
    pub tags: Vec<(Box<str>, TagSource)>,
    /// The collector; `None`: no spans, decisions are still made.
    pub provider: Option<TraceProvider>,
}

/// Where a tag's value comes from.
#[derive(Clone, PartialEq, Debug)]
pub enum TagSource {
    /// A fixed text.
    Literal(Box<str>),
    /// A variable of the proxy's environment, else a text.
    Environment(Box<str>, Box<str>),
    /// A request header, else a text.
    Header(Box<str>, Box<str>),
    /// Request metadata by filter and path, else a text.
    Metadata(Box<str>, Vec<Box<str>>, Box<str>),
}

/// A collector of spans.
#[derive(Clone, PartialEq, Debug)]
pub enum TraceProvider {
    /// Zipkin v2 JSON over HTTP.
    Zipkin {
        /// Cluster to send to.
        cluster: Name,
        /// `Host` of the calls.
        host: Box<str>,
        /// Path of the endpoint.
        path: Box<str>,
        /// 128-bit trace ids.
        long_ids: bool,
        /// `traceparent` is written beside B3.
        w3c: bool,
        /// A server's span has the id of the client's that called it.
        shared_spans: bool,
    },
    /// OTLP over gRPC.
    OpenTelemetry {
        /// Cluster to send to.
        cluster: Name,
        /// `:authority` of the calls.
        authority: Box<str>,
        /// `service.name`
        service: Box<str>,
    },
}

/// One HTTP connection manager.
#[derive(Debug)]
pub struct Hcm {
    /// Prefix of its metrics.
    pub stat_prefix: Box<str>,
    /// Which way the traffic goes.
    pub direction: Direction,
    /// HTTP versions.
    pub codec: Codec,
    /// Codec settings.
    pub settings: CodecSettings,
    /// Where routes come from.
    pub routes: RouteSource,
    /// Filters in order, the router last.
    pub filters: Vec<Filter>,
    /// Time-outs.
    pub timeouts: HttpTimeouts,
    /// Our name in `server`.
    pub server_name: Box<str>,
    /// What becomes of the upstream's.
    pub server_header: ServerHeader,
    /// The peer is the edge: its address counts, its trust headers do not.
    pub use_remote_address: bool,
    /// Trusted proxies in front.
    pub xff_trusted_hops: u32,
    /// XFF is not appended to.
    pub skip_xff_append: bool,
    /// Addresses that count as internal.
    pub internal_ranges: Vec<Cidr>,
    /// A request id is made if absent.
    pub generate_request_id: bool,
    /// What a request id tells of traces.
    pub request_ids: RequestIds,
    /// An edge keeps the client's request id.
    pub preserve_external_request_id: bool,
    /// The response carries the request id.
    pub request_id_in_response: bool,
    /// XFCC.
    pub forward_client_cert: ForwardClientCert,
    /// Parts of XFCC.
    pub client_cert_parts: ClientCertParts,
    /// `x-forwarded-port` is set.
    pub append_x_forwarded_port: bool,
    /// Paths are normalised.
    pub normalize_path: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// Escaped slashes.
    pub escaped_slashes: EscapedSlashes,
    /// A port in the host is removed: any, or the listener's.
    pub strip_port: StripPort,
    /// A dot at the end of the host is removed.
    pub strip_trailing_dot: bool,
    /// Upgrades allowed, lower case (`websocket`).
    pub upgrades: Vec<Box<str>>,
    /// Where the log goes.
    pub access_log: Vec<Arc<AccessLog>>,
    /// Sampling and tags.
    pub tracing: Option<Arc<Tracing>>,
}

/// What a request id tells of traces.
///
/// *Source*: Envoy, `UuidRequestIdConfig`; both are the default.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestIds {
    /// Why a request is traced is written into its id.
    pub pack_trace_reason: bool,
    /// The id decides whether it is traced; else every request is, unless its context says otherwise.
    pub decide_traces: bool,
}

impl Default for RequestIds {
    fn default() -> Self {
        Self { pack_trace_reason: true, decide_traces: true }
    }
}

/// Whether the port in a host is removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StripPort {
    /// No.
    Keep,
    /// If it is the listener's.
    Matching,
    /// Always.
    Any,
}

/// One HTTP filter with its name.
#[derive(Debug)]
pub struct Filter {
    /// Name in the configuration; per-route settings refer to it.
    pub name: Box<str>,
    /// Off unless a route turns it on.
    pub disabled: bool,
    /// What it does.
    pub kind: FilterKind,
}

/// What a filter does: a closed list.
#[derive(Debug)]
pub enum FilterKind {
    /// Peers exchange who they are.
    MetadataExchange(MetadataExchange),
    /// The ALPN list for mesh TLS, by upstream protocol.
    Alpn(AlpnOverrides),
    /// Istio's metrics.
    Stats(Stats),
    /// Policy: enforced and shadow rules.
    Rbac(Box<crate::authz::Rbac>),
    /// An authorizer outside is asked.
    ExtAuthz(Box<crate::ext_authz::ExtAuthz>),
    /// Tokens: who vouches for the caller.
    Jwt(Box<crate::jwt::JwtFilter>),
    /// Delays and aborts; routes carry the settings.
    Fault(Box<crate::fault::Fault>),
    /// CORS; routes carry the settings.
    Cors,
    /// Edits of heads, query and trailers; routes carry more.
    HeaderMutation(Box<crate::header_mutation::HeaderMutation>),
    /// What calls of gRPC came to.
    GrpcStats(GrpcStats),
    /// gRPC-Web (requests of that kind are refused: not built).
    GrpcWeb,
    /// Forwards. The last one.
    Router(Router),
}

/// Which calls of gRPC are told apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GrpcStats {
    /// By method.
    pub methods: GrpcMethods,
    /// Dots in names of services are written as `_`.
    pub replaces_dots: bool,
}

/// Methods with counts of their own; all others share theirs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum GrpcMethods {
    /// None.
    #[default]
    None,
    /// All.
    All,
    /// These: services with their methods.
    Listed(Vec<(Box<str>, Vec<Box<str>>)>),
}

impl GrpcStats {
    /// Whether calls of this method have counts of their own.
    pub fn tells_apart(&self, service: &str, method: &str) -> bool {
        match &self.methods {
            GrpcMethods::None => false,
            GrpcMethods::All => true,
            GrpcMethods::Listed(list) => {
                list.iter().any(|(of, methods)| **of == *service && methods.iter().any(|one| **one == *method))
            }
        }
    }
}

/// How peers exchange who they are over HTTP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MetadataExchange {
    /// Headers of the client are read and removed.
    pub downstream_headers: bool,
    /// Headers of the server are read and removed.
    pub upstream_headers: bool,
    /// Our headers go to the client, if it sent its own.
    pub to_downstream: bool,
    /// Our headers go to the server.
    pub to_upstream: bool,
    /// But not to clusters outside the mesh.
    pub skip_external: bool,
}

/// ALPN lists by upstream protocol; empty: the cluster's own list.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AlpnOverrides {
    /// Upstream HTTP/1.0.
    pub http10: Arc<[Box<str>]>,
    /// Upstream HTTP/1.1.
    pub http11: Arc<[Box<str>]>,
    /// Upstream HTTP/2.
    pub http2: Arc<[Box<str>]>,
}

/// Settings of Istio's metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// `destination_service` is not taken from the Host header.
    pub disable_host_header_fallback: bool,
}

/// Settings of the router.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Router {
    /// No `x-envoy-upstream-service-time` and the like.
    pub suppress_envoy_headers: bool,
}

impl Hcm {
    /// The metrics filter, if there is one.
    pub fn stats(&self) -> Option<&Stats> {
        self.filters.iter().find_map(|filter| match &filter.kind {
            FilterKind::Stats(stats) => Some(stats),
            _ => None,
        })
    }

    /// The ALPN lists for mesh TLS, if a filter gives any.
    pub fn alpn(&self) -> Option<&AlpnOverrides> {
        self.filters.iter().find_map(|filter| match &filter.kind {
            FilterKind::Alpn(overrides) => Some(overrides),
            _ => None,
        })
    }

    /// The router: the last filter, by lowering.
    pub fn router(&self) -> Option<&Router> {
        match &self.filters.last()?.kind {
            FilterKind::Router(router) => Some(router),
            _ => None,
        }
    }

    /// Whether the router keeps `x-envoy-*` to itself.
    pub fn suppresses_envoy_headers(&self) -> bool {
        self.router().is_some_and(|router| router.suppress_envoy_headers)
    }

    /// The filter that counts calls of gRPC, if there is one.
    pub fn grpc_stats(&self) -> Option<&GrpcStats> {
        self.filters.iter().find_map(|filter| match &filter.kind {
            FilterKind::GrpcStats(stats) if !filter.disabled => Some(stats),
            _ => None,
        })
    }

    /// The name of the route table it waits for.
    pub fn rds_name(&self) -> Option<&Name> {
        match &self.routes {
            RouteSource::Rds(name) => Some(name),
            RouteSource::Inline(_) => None,
        }
    }
}
