//! A VirtualService's HTTP entries as routes.
//!
//! *Source*: `docs/parity.md`, Traffic 2.2 to 2.6.

use api::networking as net;
use base64_free::decode_base64;
use envoy_types::pb::envoy::config::core::v3::{
    DataSource, HeaderValue, HeaderValueOption, RuntimeFractionalPercent, data_source, header_value_option,
};
use envoy_types::pb::envoy::config::route::v3::{
    Decorator, DirectResponseAction, RedirectAction, Route, RouteAction, RouteMatch, WeightedCluster, redirect_action,
    route, route_action, route_match, weighted_cluster,
};
use envoy_types::pb::envoy::extensions::filters::common::fault::v3::{FaultDelay, fault_delay};
use envoy_types::pb::envoy::extensions::filters::http::cors::v3::CorsPolicy;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3::{FaultAbort, HttpFault, fault_abort};
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatchAndSubstitute, RegexMatcher};
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType};
use envoy_types::pb::google::protobuf::Any;
use mesh::{EffectivePolicy, HttpEntry, Service, VirtualService};

use super::matching::{self, Source};
use super::{match_all, retry};
use crate::context::Context;
use crate::names;
use crate::security::matchers;
use crate::wire::{self, boolean, pack};

/// Whether the table is a sidecar's or a gateway server's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// A destination without port means the table's port.
    Sidecar,
    /// A destination without port means the service's only port, else the server's.
    Gateway {
        /// The server terminates TLS, so requests are `https`.
        is_tls: bool,
    },
}

/// The inputs of one translation.
pub(crate) struct Inputs<'a> {
    pub(crate) context: &'a Context<'a>,
    pub(crate) virtual_service: &'a VirtualService,
    /// `mesh`, or the gateway objects (`namespace/name`) in effect.
    pub(crate) gateways: &'a [&'a str],
    /// Of the sidecar's table, or of the gateway's server.
    pub(crate) port: u16,
    pub(crate) place: Place,
}

/// The cluster of a destination; `port` is the gateway server's, or the sidecar's service port.
pub(crate) fn destination_cluster(context: &Context<'_>, destination: &net::Destination, port: u16) -> String {
    let place = if context.is_sidecar() { Place::Sidecar } else { Place::Gateway { is_tls: false } };
    let (host, port) = resolve_at(context, destination, port, place);
    names::cluster(port, &destination.subset, &host)
}

/// The routes in order; the first that matches everything is the last. Empty if no entry is for
/// this proxy and port.
pub(crate) fn routes(of: &Inputs<'_>) -> Vec<Route> {
    let view = of.context.view;
    let source = Source { labels: &view.labels, namespace: &view.namespace, gateways: of.gateways, port: of.port };
    let top_fits = of.virtual_service.gateways.iter().any(|gateway| of.gateways.contains(&&**gateway));
    let mut out = Vec::new();
    for entry in &of.virtual_service.http {
        if entry.route.matches.is_empty() {
            if top_fits {
                out.push(translate(of, entry, None));
                return out;
            }
            continue;
        }
        for request in &entry.route.matches {
            if !matching::fits_source(request, top_fits, &source) {
                continue;
            }
            let route = translate(of, entry, Some(request));
            let is_last = route.r#match.as_ref().is_some_and(matching::is_catch_all);
            out.push(route);
            if is_last {
                return out;
            }
        }
    }
    out
}

/// Whether a route matches every request; gateways move such routes to the end.
pub(crate) fn is_catch_all(route: &Route) -> bool {
    route.r#match.as_ref().is_some_and(matching::is_catch_all)
}

fn translate(of: &Inputs<'_>, entry: &HttpEntry, request: Option<&net::HttpMatchRequest>) -> Route {
    let spec = &entry.route;
    let mut route = Route {
        name: match request {
            Some(request) if !request.name.is_empty() => format!("{}.{}", spec.name, request.name),
            _ => spec.name.clone(),
        },
        r#match: Some(request.map_or_else(match_all, matching::route_match)),
        metadata: wire::provenance_metadata(&entry.from),
        stat_prefix: request.map(|request| request.stat_prefix.clone()).unwrap_or_default(),
        ..Route::default()
    };
    let edits = Edits::of(spec.headers.as_ref());
    let mut authority = edits.authority.clone();
    edits.write(
        &mut route.request_headers_to_add,
        &mut route.request_headers_to_remove,
        &mut route.response_headers_to_add,
        &mut route.response_headers_to_remove,
    );
    let mut single_destination = None;
    if let Some(redirect) = &spec.redirect {
        route.action = Some(route::Action::Redirect(redirect_action(redirect, of)));
    } else if let Some(direct) = &spec.direct_response {
        route.action = Some(route::Action::DirectResponse(direct_response(direct)));
    } else {
        let (action, single) = forward(of, entry, &mut route, &mut authority);
        single_destination = single;
        route.action = Some(route::Action::Route(action));
    }
    let operation = operation(of, route.r#match.as_ref(), single_destination.as_ref());
    route.decorator = Some(Decorator { operation, propagate: None });
    let mut per_filter: Vec<(String, Any)> = Vec::new();
    if let Some(fault) = &spec.fault {
        per_filter.push(("envoy.filters.http.fault".into(), pack(&fault_config(fault))));
    }
    if let Some(cors) = &spec.cors_policy {
        per_filter.push(("envoy.filters.http.cors".into(), pack(&cors_config(cors))));
    }
    route.typed_per_filter_config = wire::stable_map(per_filter);
    route
}

/// `host:port` and the path matched; without one destination the VirtualService's name stands in.
fn operation(of: &Inputs<'_>, matched: Option<&RouteMatch>, single: Option<&(String, u16)>) -> String {
    let path = match matched.and_then(|matched| matched.path_specifier.as_ref()) {
        Some(route_match::PathSpecifier::Prefix(prefix)) => format!("{prefix}*"),
        Some(route_match::PathSpecifier::Path(path)) => path.clone(),
        Some(route_match::PathSpecifier::SafeRegex(regex)) => regex.regex.clone(),
        _ => String::new(),
    };
    match single {
        Some((host, port)) => format!("{host}:{port}{path}"),
        None => format!("{}:{}{path}", of.virtual_service.object.name, of.port),
    }
}

// --- forwarding ---

/// Host and port of a destination: aliases lead to their target.
fn resolve_at(context: &Context<'_>, destination: &net::Destination, port: u16, place: Place) -> (String, u16) {
    let host = context.snapshot.resolve_alias(&destination.host).to_owned();
    let named = destination.port.as_ref().map(|port| port.number).filter(|number| *number != 0);
    let port = named.unwrap_or_else(|| match place {
        Place::Sidecar => port,
        Place::Gateway { .. } => match context.scope.service(&host) {
            Some(service) if service.ports.len() == 1 => service.ports[0].number,
            _ => port,
        },
    });
    (host, port)
}

fn resolve(of: &Inputs<'_>, destination: &net::Destination) -> (String, u16) {
    resolve_at(of.context, destination, of.port, of.place)
}

fn cluster_of(of: &Inputs<'_>, destination: &net::Destination) -> String {
    let (host, port) = resolve(of, destination);
    names::cluster(port, &destination.subset, &host)
}

#[expect(deprecated, reason = "Istio sets the limit of gRPC's own time-out with this field")]
fn forward(
    of: &Inputs<'_>,
    entry: &HttpEntry,
    route: &mut Route,
    authority: &mut Option<String>,
) -> (RouteAction, Option<(String, u16)>) {
    let spec = &entry.route;
    let timeout = spec.timeout.map(|timeout| timeout.0);
    let mut action = super::action(timeout);
    debug_assert_eq!(action.timeout, action.max_grpc_timeout);

    // One destination gets everything, whatever its weight; of several those with 0 get nothing.
    let several = spec.route.len() > 1;
    let live: Vec<_> = spec.route.iter().filter(|weighted| !several || weighted.weight != 0).collect();
    let mut single = None;
    if let [only] = live.as_slice() {
        let edits = Edits::of(only.headers.as_ref());
        if authority.is_none() {
            authority.clone_from(&edits.authority);
        }
        edits.write(
            &mut route.request_headers_to_add,
            &mut route.request_headers_to_remove,
            &mut route.response_headers_to_add,
            &mut route.response_headers_to_remove,
        );
        single = Some(resolve(of, &only.destination));
        action.cluster_specifier = Some(route_action::ClusterSpecifier::Cluster(cluster_of(of, &only.destination)));
    } else {
        let clusters = live.iter().map(|weighted| weighted_cluster(of, weighted)).collect();
        action.cluster_specifier = Some(route_action::ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters,
            ..WeightedCluster::default()
        }));
    }
    action.hash_policy = live.iter().flat_map(|weighted| hash_of_destination(of, &weighted.destination)).collect();
    action.retry_policy =
        retry::policy(spec.retries.as_ref(), of.context.snapshot.mesh_config(), !action.hash_policy.is_empty());
    if let Some(rewrite) = &spec.rewrite {
        if let Some(regex) = &rewrite.uri_regex_rewrite {
            action.regex_rewrite = Some(RegexMatchAndSubstitute {
                pattern: Some(RegexMatcher { regex: regex.pattern.clone(), ..RegexMatcher::default() }),
                substitution: regex.rewrite.clone(),
            });
        } else {
            action.prefix_rewrite.clone_from(&rewrite.uri);
        }
        if !rewrite.authority.is_empty() {
            *authority = Some(rewrite.authority.clone());
        }
    }
    if let Some(host) = authority.take() {
        action.host_rewrite_specifier = Some(route_action::HostRewriteSpecifier::HostRewriteLiteral(host));
    }
    action.append_x_forwarded_host = of.context.proxy_headers().is_some_and(|headers| headers.x_forwarded_host.enabled);
    action.request_mirror_policies = mirrors(of, spec);
    (action, single)
}

fn weighted_cluster(of: &Inputs<'_>, weighted: &net::HttpRouteDestination) -> weighted_cluster::ClusterWeight {
    let edits = Edits::of(weighted.headers.as_ref());
    let mut out = weighted_cluster::ClusterWeight {
        name: cluster_of(of, &weighted.destination),
        weight: wire::uint(u32::try_from(weighted.weight).unwrap_or_default()),
        ..weighted_cluster::ClusterWeight::default()
    };
    edits.write(
        &mut out.request_headers_to_add,
        &mut out.request_headers_to_remove,
        &mut out.response_headers_to_add,
        &mut out.response_headers_to_remove,
    );
    if let Some(host) = edits.authority {
        out.host_rewrite_specifier =
            Some(weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host));
    }
    out
}

fn mirrors(of: &Inputs<'_>, spec: &net::HttpRoute) -> Vec<route_action::RequestMirrorPolicy> {
    let mut out = Vec::new();
    let mut push = |destination: &net::Destination, fraction: Option<FractionalPercent>| {
        if let Some(fraction) = fraction {
            out.push(route_action::RequestMirrorPolicy {
                cluster: cluster_of(of, destination),
                runtime_fraction: Some(RuntimeFractionalPercent {
                    default_value: Some(fraction),
                    runtime_key: String::new(),
                }),
                trace_sampled: boolean(false),
                disable_shadow_host_suffix_append: true,
                ..route_action::RequestMirrorPolicy::default()
            });
        }
    };
    if let Some(mirror) = &spec.mirror {
        let fraction = match (spec.mirror_percentage, spec.mirror_percent) {
            (Some(percent), _) => mirrored(percent.millionths()),
            (None, Some(percent)) => (percent > 0).then(|| hundredths(percent.min(100))),
            (None, None) => Some(hundredths(100)),
        };
        push(mirror, fraction);
    }
    for mirror in &spec.mirrors {
        push(
            &mirror.destination,
            mirror.percentage.map_or_else(|| Some(hundredths(100)), |percent| mirrored(percent.millionths())),
        );
    }
    out
}

/// Explicit 0 % is off.
fn mirrored(millionths: u32) -> Option<FractionalPercent> {
    (millionths > 0).then(|| of_million(millionths))
}

fn of_million(numerator: u32) -> FractionalPercent {
    FractionalPercent { numerator, denominator: DenominatorType::Million.into() }
}

fn hundredths(numerator: u32) -> FractionalPercent {
    FractionalPercent { numerator, denominator: DenominatorType::Hundred.into() }
}

// --- consistent hashing ---

fn hash_of_destination(of: &Inputs<'_>, destination: &net::Destination) -> Vec<route_action::HashPolicy> {
    let (host, port) = resolve(of, destination);
    let Some(service) = of.context.scope.service(&host) else {
        return Vec::new();
    };
    let names_port = destination.port.is_some();
    hash_policy(of.context, service, port, &destination.subset, names_port)
}

/// The hash policy of a service: subset port, subset, port (if the route names it), top level.
pub(crate) fn hash_policy(
    context: &Context<'_>,
    service: &Service,
    port: u16,
    subset: &str,
    names_port: bool,
) -> Vec<route_action::HashPolicy> {
    let Some(rule) = context.rule(service) else {
        return Vec::new();
    };
    let subset = rule.subset(subset).and_then(|subset| subset.spec.traffic_policy.as_ref());
    let at_port = |policy: &net::TrafficPolicy| {
        let entry =
            policy.port_level_settings.iter().find(|entry| entry.port.as_ref().is_some_and(|of| of.number == port));
        entry.and_then(|entry| entry.load_balancer.clone())
    };
    let top = rule.traffic_policy.as_deref();
    let settings = subset
        .and_then(|policy| at_port(policy).or_else(|| policy.load_balancer.clone()))
        .or_else(|| top.filter(|_| names_port).and_then(at_port))
        .or_else(|| top.and_then(|policy| policy.load_balancer.clone()));
    settings.and_then(|lb| lb.consistent_hash).map(|hash| consistent_hash(&hash)).unwrap_or_default()
}

fn consistent_hash(hash: &net::ConsistentHashLb) -> Vec<route_action::HashPolicy> {
    use route_action::hash_policy::{
        ConnectionProperties, Cookie, CookieAttribute, Header, PolicySpecifier, QueryParameter,
    };
    let specifier = if let Some(name) = &hash.http_header_name {
        PolicySpecifier::Header(Header { header_name: name.clone(), ..Header::default() })
    } else if let Some(cookie) = &hash.http_cookie {
        PolicySpecifier::Cookie(Cookie {
            name: cookie.name.clone(),
            ttl: cookie.ttl.and_then(|ttl| wire::duration(ttl.0)),
            path: cookie.path.clone(),
            attributes: cookie
                .attributes
                .iter()
                .map(|attribute| CookieAttribute { name: attribute.name.clone(), value: attribute.value.clone() })
                .collect(),
        })
    } else if hash.use_source_ip == Some(true) {
        PolicySpecifier::ConnectionProperties(ConnectionProperties { source_ip: true })
    } else if let Some(name) = &hash.http_query_parameter_name {
        PolicySpecifier::QueryParameter(QueryParameter { name: name.clone() })
    } else {
        return Vec::new();
    };
    vec![route_action::HashPolicy { terminal: false, policy_specifier: Some(specifier) }]
}

/// Whether bytes towards a service are balanced by the client's address.
pub(crate) fn hashes_source_ip(policy: &EffectivePolicy) -> bool {
    let hash = policy.load_balancer.as_ref().and_then(|lb| lb.consistent_hash.as_ref());
    hash.is_some_and(|hash| hash.use_source_ip == Some(true))
}

// --- redirects, direct responses ---

fn redirect_action(of: &net::HttpRedirect, inputs: &Inputs<'_>) -> RedirectAction {
    use redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
    let mut port = match of.derive_port {
        Some(net::RedirectPort::FromRequestPort) => u32::from(inputs.port),
        Some(net::RedirectPort::FromProtocolDefault) | None => u32::from(of.port),
    };
    let scheme = match (of.scheme.as_str(), inputs.place) {
        ("", Place::Gateway { is_tls: true }) => "https",
        ("", _) => "http",
        (given, _) => given,
    };
    // The default port of the scheme is not written.
    if matches!((port, scheme), (80, "http") | (443, "https")) {
        port = 0;
    }
    RedirectAction {
        host_redirect: of.authority.clone(),
        port_redirect: port,
        scheme_rewrite_specifier: (!of.scheme.is_empty())
            .then(|| SchemeRewriteSpecifier::SchemeRedirect(of.scheme.clone())),
        path_rewrite_specifier: Some(if of.prefix_rewrite.is_empty() {
            PathRewriteSpecifier::PathRedirect(of.uri.clone())
        } else {
            PathRewriteSpecifier::PrefixRewrite(of.prefix_rewrite.clone())
        }),
        response_code: match of.redirect_code {
            302 => RedirectResponseCode::Found,
            303 => RedirectResponseCode::SeeOther,
            307 => RedirectResponseCode::TemporaryRedirect,
            308 => RedirectResponseCode::PermanentRedirect,
            _ => RedirectResponseCode::MovedPermanently,
        }
        .into(),
        ..RedirectAction::default()
    }
}

fn direct_response(of: &net::HttpDirectResponse) -> DirectResponseAction {
    let body = of.body.as_ref().and_then(|body| {
        let specifier = match (&body.string, &body.bytes) {
            (Some(text), _) => data_source::Specifier::InlineString(text.clone()),
            (None, Some(encoded)) => data_source::Specifier::InlineBytes(decode_base64(encoded)?),
            (None, None) => return None,
        };
        Some(DataSource { specifier: Some(specifier), ..DataSource::default() })
    });
    DirectResponseAction { status: of.status, body, ..DirectResponseAction::default() }
}

// --- header edits ---

/// Edits of one level, in the order in which they are applied.
#[derive(Default)]
struct Edits {
    request_add: Vec<HeaderValueOption>,
    request_remove: Vec<String>,
    response_add: Vec<HeaderValueOption>,
    response_remove: Vec<String>,
    /// `host` or `:authority` among the request's edits: it rewrites the host.
    authority: Option<String>,
}

impl Edits {
    fn of(headers: Option<&net::Headers>) -> Self {
        let mut edits = Self::default();
        let Some(headers) = headers else {
            return edits;
        };
        if let Some(request) = &headers.request {
            for (name, value) in request.set.iter().chain(&request.add) {
                if is_authority(name) && edits.authority.is_none() {
                    edits.authority = Some(value.clone());
                }
            }
            edits.request_add = values(request);
            edits.request_remove = removals(request);
        }
        if let Some(response) = &headers.response {
            edits.response_add = values(response);
            edits.response_remove = removals(response);
        }
        edits
    }

    fn write(
        &self,
        request_add: &mut Vec<HeaderValueOption>,
        request_remove: &mut Vec<String>,
        response_add: &mut Vec<HeaderValueOption>,
        response_remove: &mut Vec<String>,
    ) {
        request_add.extend(self.request_add.iter().cloned());
        request_remove.extend(self.request_remove.iter().cloned());
        response_add.extend(self.response_add.iter().cloned());
        response_remove.extend(self.response_remove.iter().cloned());
    }
}

fn is_authority(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority")
}

/// Names that no edit may touch; admission refuses them, and what got in is left out.
fn is_protected(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

fn values(of: &net::HeaderOperations) -> Vec<HeaderValueOption> {
    use header_value_option::HeaderAppendAction;
    let option = |(name, value): (&String, &String), action: HeaderAppendAction| HeaderValueOption {
        header: Some(HeaderValue { key: name.clone(), value: value.clone(), ..HeaderValue::default() }),
        append_action: action.into(),
        ..HeaderValueOption::default()
    };
    let set = of.set.iter().filter(|(name, _)| !is_protected(name));
    let add = of.add.iter().filter(|(name, _)| !is_protected(name));
    set.map(|pair| option(pair, HeaderAppendAction::OverwriteIfExistsOrAdd))
        .chain(add.map(|pair| option(pair, HeaderAppendAction::AppendIfExistsOrAdd)))
        .collect()
}

fn removals(of: &net::HeaderOperations) -> Vec<String> {
    of.remove.iter().filter(|name| !is_protected(name)).cloned().collect()
}

// --- faults, CORS ---

fn fault_config(of: &net::HttpFaultInjection) -> HttpFault {
    let percent = |percentage: Option<api::scalar::Percent>, older: Option<i32>| match (percentage, older) {
        (Some(percentage), _) => of_million(percentage.millionths()),
        (None, Some(older)) if older > 0 => hundredths(u32::try_from(older).unwrap_or_default().min(100)),
        // Nothing said is 0 %.
        (None, _) => FractionalPercent::default(),
    };
    HttpFault {
        delay: of.delay.as_ref().map(|delay| FaultDelay {
            percentage: Some(percent(delay.percentage, delay.percent)),
            fault_delay_secifier: delay
                .fixed_delay
                .and_then(|delay| wire::duration(delay.0))
                .map(fault_delay::FaultDelaySecifier::FixedDelay),
        }),
        abort: of.abort.as_ref().and_then(|abort| {
            let error = match (abort.http_status, abort.grpc_status.as_deref()) {
                (Some(status), _) => fault_abort::ErrorType::HttpStatus(status),
                (None, Some(name)) => fault_abort::ErrorType::GrpcStatus(api::scalar::grpc_code(name)?),
                (None, None) => return None,
            };
            Some(FaultAbort {
                percentage: Some(percent(abort.percentage, None)),
                error_type: Some(error),
                ..FaultAbort::default()
            })
        }),
        ..HttpFault::default()
    }
}

fn cors_config(of: &net::CorsPolicy) -> CorsPolicy {
    use api::scalar::StringMatch;
    let origins = if of.allow_origins.is_empty() {
        of.allow_origin.iter().map(|origin| any_or_exact(origin)).collect()
    } else {
        of.allow_origins
            .iter()
            .map(|origin| match origin {
                StringMatch::Present => matchers::regex(".*"),
                StringMatch::Exact(text) => any_or_exact(text),
                StringMatch::Prefix(text) => matchers::prefix(text),
                StringMatch::Regex(text) => matchers::regex(text),
            })
            .collect()
    };
    let forwards = of.unmatched_preflights != Some(net::UnmatchedPreflights::Ignore);
    CorsPolicy {
        allow_origin_string_match: origins,
        allow_methods: of.allow_methods.join(","),
        allow_headers: of.allow_headers.join(","),
        expose_headers: of.expose_headers.join(","),
        max_age: of.max_age.map(|age| age.0.as_secs().to_string()).unwrap_or_default(),
        allow_credentials: of.allow_credentials.and_then(boolean),
        filter_enabled: Some(RuntimeFractionalPercent {
            default_value: Some(hundredths(100)),
            runtime_key: String::new(),
        }),
        forward_not_matching_preflights: boolean(forwards),
        ..CorsPolicy::default()
    }
}

/// The exact origin `*` means any; the proxy knows that.
fn any_or_exact(origin: &str) -> envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher {
    matchers::exact(origin)
}

/// Standard base64, small and without a dependency: bodies of direct responses only.
mod base64_free {
    /// Decodes; `None` for anything else.
    pub(super) fn decode_base64(text: &str) -> Option<Vec<u8>> {
        let digit = |byte: u8| -> Option<u32> {
            Some(u32::from(match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' | b'-' => 62,
                b'/' | b'_' => 63,
                _ => return None,
            }))
        };
        let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace() && *byte != b'=').collect();
        let mut out = Vec::with_capacity(digits.len() * 3 / 4);
        for chunk in digits.chunks(4) {
            let mut bits = 0_u32;
            for byte in chunk {
                bits = bits << 6 | digit(*byte)?;
            }
            bits <<= 6 * (4 - chunk.len());
            let bytes = bits.to_be_bytes();
            let count = match chunk.len() {
                4 => 3,
                3 => 2,
                2 => 1,
                _ => return None,
            };
            out.extend_from_slice(&bytes[1..=count]);
        }
        Some(out)
    }

    #[cfg(test)]
    mod tests {
        use super::decode_base64;

        #[test]
        fn decodes() {
            for (text, expect) in
                [("", &b""[..]), ("Zg==", b"f"), ("Zm8=", b"fo"), ("Zm9v", b"foo"), ("Zm9vYg", b"foob")]
            {
                assert_eq!(decode_base64(text).as_deref(), Some(expect), "{text}");
            }
            assert_eq!(decode_base64("Z"), None);
            assert_eq!(decode_base64("Zm9*"), None);
        }
    }
}
