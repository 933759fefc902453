//! Everything that can make the mesh answer by itself, end a connection, or mark a request.
//!
//! One closed enum, one table. Istio's users recognise the response flag and the details; the
//! cause is finer, and every rendering (status, flag, details, gRPC code, remedy) is read from
//! the same row. Causes never reach a client as bytes beyond what Istio sends.
//!
//! *Source*: Envoy's response flags and response code details; `docs/parity.md`, Traffic 8.1 and 8.2.

use serde::{Deserialize, Serialize};

/// A gRPC status code.
///
/// *Source*: gRPC core, `statuscodes.md`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct GrpcCode(pub u8);

impl GrpcCode {
    /// The code Envoy derives from an HTTP status for a local reply.
    pub fn from_http(status: u16) -> Self {
        Self(match status {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502 | 503 | 504 => 14,
            _ => 2,
        })
    }
}

/// What a cause looks like from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Surface {
    /// HTTP status of the local reply; 0 when the connection is closed or only marked.
    pub status: u16,
    /// Envoy's response flag; `-` for none.
    pub flag: &'static str,
    /// `%RESPONSE_CODE_DETAILS%`; a detail in braces or brackets is appended by the recorder.
    pub details: &'static str,
    /// Body of the local reply.
    pub body: &'static str,
    /// What to do about it, one line.
    pub remedy: &'static str,
}

macro_rules! causes {
    ($($(#[doc = $doc:literal])+ $name:ident = ($status:literal, $flag:literal, $details:literal, $body:literal, $remedy:literal),)*) => {
        /// Why the mesh itself answered, closed, or marked.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Cause { $($(#[doc = $doc])+ $name,)* }

        impl Cause {
            /// Every cause, in order of declaration.
            pub const ALL: &'static [Cause] = &[$(Cause::$name,)*];

            /// The one table: status, flag, details, body, remedy.
            pub const fn surface(self) -> Surface {
                match self {
                    $(Self::$name => Surface { status: $status, flag: $flag, details: $details, body: $body, remedy: $remedy },)*
                }
            }

            /// The cause's own name, snake case, stable: for records, metrics and JSON.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }
        }
    };
}

causes! {
    // ---- routing ----
    /// No virtual host or route matched.
    NoRoute = (404, "NR", "route_not_found", "", "add a VirtualService or Service for this host and path"),
    /// The chosen route names a cluster the proxy does not have.
    ClusterNotFound = (503, "NC", "cluster_not_found", "", "define the subset in a DestinationRule, or fix the destination's host and port"),
    /// The route answers by itself (`directResponse`, `block_all`).
    DirectResponse = (200, "-", "direct_response", "", "this is configured: see the route's object"),
    /// The route redirects.
    Redirect = (301, "-", "direct_response", "", "this is configured: see the route's object"),
    /// Plain HTTP where the gateway demands HTTPS (`httpsRedirect`).
    HttpsRedirect = (301, "-", "direct_response", "", "call the gateway over HTTPS"),
    /// No filter chain matched the connection.
    NoFilterChain = (0, "NR", "filter_chain_not_found", "", "plaintext to a STRICT port, or a server name no Gateway serves"),
    /// A CORS preflight answered by the proxy.
    CorsPreflight = (200, "-", "cors_response", "", "this is configured: see the route's corsPolicy"),
    // ---- upstream ----
    /// No endpoint could be picked.
    NoHealthyUpstream = (503, "UH", "no_healthy_upstream", "no healthy upstream", "no ready endpoint: check the pods, the selector, outlier detection"),
    /// The connection could not be made.
    ConnectFailed = (503, "UF", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure", "the endpoint refuses connections: is the application listening on that port?"),
    /// The connection was not made in time.
    ConnectTimeout = (503, "UF", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: connection timeout", "the endpoint does not answer: network policy, wrong port, or overload"),
    /// The TLS handshake with the upstream failed.
    UpstreamTlsFailed = (503, "UF", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure", "mutual TLS does not fit: compare the DestinationRule with the PeerAuthentication"),
    /// The upstream closed the connection before a response head.
    UpstreamClosed = (503, "UC", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: connection termination", "the application closed the connection: crash, or keep-alive shorter than the proxy's"),
    /// The upstream reset the stream before a response head.
    UpstreamReset = (503, "UR", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: remote reset", "the application reset the stream"),
    /// The upstream refused the stream (nothing was processed).
    UpstreamRefusedStream = (503, "UR", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: remote refused stream reset", "the application is draining or at its stream limit"),
    /// The upstream failed after its response head: the body ends in a reset.
    UpstreamResetMidResponse = (0, "UR", "upstream_reset_after_response_started", "", "the application died in the middle of its answer"),
    /// The upstream closed in the middle of the response body.
    UpstreamClosedMidResponse = (0, "UC", "upstream_reset_after_response_started", "", "the application died in the middle of its answer"),
    /// The upstream broke the protocol.
    UpstreamProtocolError = (502, "UPE", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: protocol error", "the application's answer is not valid HTTP, or the port's protocol is declared wrongly"),
    /// The proxy gave the stream up itself.
    LocalReset = (503, "LR", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: local reset", "retry; the proxy replaced a connection"),
    /// A circuit breaker is open: connections or pending requests.
    UpstreamOverflow = (503, "UO", "upstream_reset_before_response_started", "upstream connect error or disconnect/reset before headers. reset reason: overflow", "raise connectionPool limits, or add endpoints"),
    /// All retries are used up; the last failure is marked beside it.
    RetryLimitExceeded = (0, "URX", "upstream_reset_before_response_started", "", "the last attempt's failure is the reason"),
    /// The route's time-out passed.
    RequestTimeout = (504, "UT", "response_timeout", "upstream request timeout", "the application is slower than the VirtualService's timeout"),
    /// The last per-try time-out passed.
    PerTryTimeout = (504, "UT", "upstream_per_try_timeout", "upstream request timeout", "the application is slower than retries.perTryTimeout"),
    /// A name could not be resolved.
    DnsFailed = (503, "DF", "dns_resolution_failed", "DNS resolution failure", "the host does not resolve from the proxy"),
    // ---- faults ----
    /// An injected delay held the request.
    FaultDelay = (0, "DI", "", "", "this is configured: fault.delay"),
    /// An injected abort answered.
    FaultAbort = (503, "FI", "fault_filter_abort", "fault filter abort", "this is configured: fault.abort"),
    // ---- policy ----
    /// A DENY rule matched, or no ALLOW rule did (HTTP).
    RbacDenied = (403, "-", "rbac_access_denied_matched_policy", "RBAC: access denied", "see the AuthorizationPolicy named in the details; none: no ALLOW rule fits the request"),
    /// The same, for a connection.
    RbacDeniedConnection = (0, "-", "rbac_access_denied_matched_policy", "", "see the AuthorizationPolicy named in the details; none: no ALLOW rule fits the request"),
    /// External authorization said no.
    ExtAuthzDenied = (403, "UAEX", "ext_authz_denied", "", "the external authorizer refused the request"),
    /// External authorization could not be asked, and the provider fails closed.
    ExtAuthzError = (403, "UAEX", "ext_authz_error", "", "the external authorizer is unreachable; see its provider in meshConfig"),
    /// A token is required and none was sent.
    JwtMissing = (401, "-", "jwt_authn_access_denied", "Jwt is missing", "send a token"),
    /// Not three base64url sections.
    JwtBadFormat = (401, "-", "jwt_authn_access_denied", "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections", "the token is malformed"),
    /// A section is not what it must be.
    JwtMalformed = (401, "-", "jwt_authn_access_denied", "Jwt header is an invalid JSON", "the token is malformed"),
    /// `alg` is not one the proxy takes.
    JwtBadAlgorithm = (401, "-", "jwt_authn_access_denied", "Jwt header [alg] is not supported", "sign with an algorithm of the key set"),
    /// The signature does not verify.
    JwtBadSignature = (401, "-", "jwt_authn_access_denied", "Jwt verification fails", "the token was not signed by a key of the issuer"),
    /// `exp` has passed.
    JwtExpired = (401, "-", "jwt_authn_access_denied", "Jwt is expired", "get a fresh token"),
    /// `nbf` is to come.
    JwtNotYetValid = (401, "-", "jwt_authn_access_denied", "Jwt not yet valid", "wait, or mend the clock"),
    /// No rule names the token's issuer.
    JwtUnknownIssuer = (401, "-", "jwt_authn_access_denied", "Jwt issuer is not configured", "add a RequestAuthentication rule for the issuer"),
    /// No audience of the token is wanted.
    JwtWrongAudience = (403, "-", "jwt_authn_access_denied", "Audiences in Jwt are not allowed", "the token is for somebody else"),
    /// The key set has no key for the token.
    JwtNoKey = (401, "-", "jwt_authn_access_denied", "Jwks doesn't have key to match kid or alg from Jwt", "the key set is older than the token, or of another issuer"),
    /// The key set could not be had.
    JwksUnavailable = (401, "-", "jwt_authn_access_denied", "Jwks remote fetch is failed", "the issuer's keys cannot be fetched or read"),
    /// More than one token where only one counts.
    JwtTooMany = (401, "-", "jwt_authn_access_denied", "Jwt verification fails", "every token a request carries must be valid"),
    // ---- limits and broken peers ----
    /// The body is larger than a filter may hold.
    PayloadTooLarge = (413, "-", "request_payload_too_large", "Payload Too Large", "send less"),
    /// The head is larger than allowed.
    HeadersTooLarge = (431, "DPE", "http1.headers_too_large", "Request Header Fields Too Large", "send fewer or shorter headers"),
    /// Malformed HTTP from downstream.
    BadRequest = (400, "DPE", "http1.codec_error", "Bad Request", "the client's request is not valid HTTP"),
    /// Malformed HTTP/2 from downstream: a stream's head or frames, or frames that end the connection.
    BadStream = (400, "DPE", "http2.violation.of.messaging.rule", "", "the client's HTTP/2 is not valid"),
    /// Neither `Host` nor `:authority`, or more than one.
    MissingHost = (400, "-", "missing_host_header", "", "send exactly one Host"),
    /// A path the normaliser refuses.
    BadPath = (400, "-", "path_normalization_failed", "", "the path is not valid"),
    /// HTTP/1.0 where it is not taken.
    UpgradeRequired = (426, "-", "low_version", "Upgrade Required", "use HTTP/1.1"),
    /// An upgrade that is not configured.
    UpgradeRefused = (403, "-", "upgrade_failed", "", "only websocket upgrades are configured"),
    /// Header, body or request not received in time.
    RequestReceiveTimeout = (408, "-", "request_overall_timeout", "request timeout", "the client is too slow"),
    /// The head did not arrive in time.
    RequestHeaderTimeout = (408, "-", "request_header_timeout", "request header timeout", "the client is too slow"),
    /// Nothing moved on a stream for too long; 504 once the request is whole.
    StreamIdleTimeout = (408, "SI", "stream_idle_timeout", "stream timeout", "neither side sent anything for the idle time-out"),
    /// The stream lasted longer than allowed; 504 once the request is whole.
    MaxStreamDuration = (408, "DT", "max_duration_timeout", "downstream duration timeout", "this is configured: maxStreamDuration"),
    /// The TLS handshake with the client failed.
    DownstreamTlsFailed = (0, "-", "downstream_tls_failed", "", "the client's certificate or TLS version does not fit the port's mode"),
    /// The client went away.
    DownstreamGone = (0, "DC", "downstream_remote_disconnect", "", "the client closed before the answer"),
    /// The client reset its stream.
    DownstreamReset = (0, "DR", "http2.remote_reset", "", "the client cancelled"),
    /// The client flooded the connection with frames.
    DownstreamFlood = (0, "DPE", "codec_error:Flooding_was_detected_in_this_HTTP/2_session,_and_it_must_be_closed", "", "the client misbehaves"),
    /// The request uses a feature of the configuration that the proxy refuses to guess at.
    ConfigRefused = (500, "NFCF", "filter_config_not_found", "", "see the findings: the object is not understood and fails closed"),
    /// A bug in the proxy, contained.
    Internal = (500, "-", "internal_error", "", "report this"),
}

impl Cause {
    /// The gRPC status a gRPC caller gets with the local reply.
    pub fn grpc_code(self) -> GrpcCode {
        match self {
            Self::MaxStreamDuration => GrpcCode(4),
            other => GrpcCode::from_http(other.surface().status),
        }
    }

    /// Envoy's words for `reset reason:`; `None` when the cause is not a reset of an attempt.
    pub fn reset_reason(self) -> Option<&'static str> {
        Some(match self {
            Self::ConnectFailed | Self::UpstreamTlsFailed => "remote connection failure",
            Self::ConnectTimeout => "connection timeout",
            Self::UpstreamClosed => "connection termination",
            Self::UpstreamReset => "remote reset",
            Self::UpstreamRefusedStream => "remote refused stream reset",
            Self::UpstreamProtocolError => "protocol error",
            Self::LocalReset => "local reset",
            Self::UpstreamOverflow => "overflow",
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reset_says_so_in_its_body() {
        for cause in Cause::ALL {
            if let Some(reason) = cause.reset_reason() {
                assert!(cause.surface().body.ends_with(&format!("reset reason: {reason}")), "{cause:?}");
            }
        }
    }

    #[test]
    fn grpc_codes_follow_the_status() {
        assert_eq!(Cause::NoRoute.grpc_code(), GrpcCode(12));
        assert_eq!(Cause::RbacDenied.grpc_code(), GrpcCode(7));
        assert_eq!(Cause::NoHealthyUpstream.grpc_code(), GrpcCode(14));
        assert_eq!(Cause::MaxStreamDuration.grpc_code(), GrpcCode(4));
    }
}
