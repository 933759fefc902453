//! VirtualService.

use types::HostPattern;

use super::rules::Patterns;
use super::{Check, rules};
use crate::networking::{
    Destination, Headers, HttpFaultInjection, HttpMatchRequest, HttpRedirect, HttpRetry, HttpRewrite, HttpRoute,
    HttpRouteDestination, RouteDestination, VirtualService,
};
use crate::scalar::{StringMatch, grpc_code};

const RETRY_ON: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "envoy-ratelimited",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];
const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"];
const CLAIM_PREFIX: &str = "@request.auth.claims";
const BODY_BYTES_MAX: usize = 1 << 20;
const BODY_BYTES_DUBIOUS: usize = 100 << 10;

pub(super) fn check(check: &mut Check<'_>, spec: &VirtualService) {
    let is_delegate = spec.hosts.is_empty();
    let in_mesh = spec.gateways.is_empty() || spec.gateways.iter().any(|gateway| gateway == "mesh");
    if is_delegate && (!spec.gateways.is_empty() || !spec.tls.is_empty() || !spec.tcp.is_empty()) {
        check.error("spec.hosts", "at least one host is needed", "only a delegate has none, and it has `http` alone");
    }
    if spec.http.is_empty() && spec.tls.is_empty() && spec.tcp.is_empty() {
        check.error("spec", "at least one of http, tls, tcp is needed", "write http: with a route");
    }
    hosts(check, spec, in_mesh && !is_delegate);
    gateways(check, "spec.gateways", &spec.gateways);
    rules::export_to(check, &spec.export_to, false);
    for (index, route) in spec.http.iter().enumerate() {
        http(check, &format!("spec.http[{index}]"), route, in_mesh && !is_delegate, is_delegate);
    }
    shadowed(check, &spec.http);
    let patterns = Patterns::of(&spec.hosts);
    for (index, route) in spec.tls.iter().enumerate() {
        let at = format!("spec.tls[{index}]");
        if route.matches.is_empty() {
            check.error(&at, "match with sniHosts is needed", "write match: [{sniHosts: […]}]");
        }
        for (index, alternative) in route.matches.iter().enumerate() {
            let at = format!("{at}.match[{index}]");
            if alternative.sni_hosts.is_empty() {
                check.error(&at, "sniHosts is needed", "list the server names");
            }
            for (index, sni) in alternative.sni_hosts.iter().enumerate() {
                let at = format!("{at}.sniHosts[{index}]");
                if sni.parse::<std::net::IpAddr>().is_ok() {
                    check.warn(&at, "an address is never a server name", "TLS clients send host names only");
                    continue;
                }
                match HostPattern::parse(sni) {
                    Err(error) => check.error(&at, error.to_string(), "write a host name, or `*.suffix`"),
                    Ok(sni) if patterns.covering(&sni).is_none() => {
                        check.error(
                            &at,
                            format!("{sni} is not covered by the hosts of the object"),
                            "add it to `hosts`",
                        );
                    }
                    Ok(_) => {}
                }
            }
            subnets(check, &at, &alternative.destination_subnets);
            gateways(check, &format!("{at}.gateways"), &alternative.gateways);
        }
        tcp_route(check, &at, &route.route);
    }
    for (index, route) in spec.tcp.iter().enumerate() {
        let at = format!("spec.tcp[{index}]");
        for (index, alternative) in route.matches.iter().enumerate() {
            let at = format!("{at}.match[{index}]");
            subnets(check, &at, &alternative.destination_subnets);
            gateways(check, &format!("{at}.gateways"), &alternative.gateways);
            check.unbuilt_if(!alternative.source_subnet.is_empty(), format!("{at}.sourceSubnet"));
        }
        tcp_route(check, &at, &route.route);
    }
}

fn hosts(check: &mut Check<'_>, spec: &VirtualService, in_mesh: bool) {
    let mut seen = Patterns::default();
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        if host == "*" && in_mesh {
            check.error(
                &field,
                "`*` is not allowed for sidecars",
                "name the hosts, or list only gateways without `mesh`",
            );
            continue;
        }
        rules::host_with_wildcard(check, &field, host);
        let Ok(pattern) = HostPattern::parse(host) else { continue };
        if let Some(first) = seen.overlapping(&pattern) {
            let other = &spec.hosts[first];
            check.error(&field, format!("{pattern} overlaps with {other} of hosts[{first}]"), "remove one of the two");
        }
        seen.insert(&pattern, index);
    }
}

fn gateways(check: &mut Check<'_>, field: &str, gateways: &[String]) {
    for (index, gateway) in gateways.iter().enumerate() {
        let (namespace, name) = gateway.split_once('/').unwrap_or((".", gateway));
        let fits = (namespace == "." || rules::is_dns_label(namespace)) && rules::is_dns_subdomain(name);
        // Older files name gateways by host (`gw.ns.svc.cluster.local`).
        if !fits {
            let hint = "write `name`, `namespace/name`, or `mesh`";
            check.error(&format!("{field}[{index}]"), format!("{gateway:?} is not the name of a gateway"), hint);
        }
    }
}

fn subnets(check: &mut Check<'_>, at: &str, subnets: &[String]) {
    for (index, subnet) in subnets.iter().enumerate() {
        rules::cidr(check, &format!("{at}.destinationSubnets[{index}]"), subnet);
    }
}

fn http(check: &mut Check<'_>, at: &str, route: &HttpRoute, in_mesh: bool, is_delegate: bool) {
    let actions = [
        ("route", !route.route.is_empty()),
        ("redirect", route.redirect.is_some()),
        ("directResponse", route.direct_response.is_some()),
        ("delegate", route.delegate.is_some()),
    ];
    let set: Vec<&str> = actions.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
    match set.as_slice() {
        [] => check.error(
            at,
            "one of route, redirect, directResponse, delegate is needed",
            "write route: with a destination",
        ),
        [_] => {}
        several => check.error(at, format!("{} exclude each other", several.join(" and ")), "keep one of them"),
    }
    if route.redirect.is_some() || route.direct_response.is_some() {
        for (name, set) in [("fault", route.fault.is_some()), ("rewrite", route.rewrite.is_some())] {
            if set {
                check.error(
                    &format!("{at}.{name}"),
                    format!(
                        "{name} cannot stand beside {}",
                        if route.redirect.is_some() { "redirect" } else { "directResponse" }
                    ),
                    "keep one of the two, or split the route",
                );
            }
        }
    }
    if route.delegate.is_some() && is_delegate {
        check.error(&format!("{at}.delegate"), "a delegate cannot delegate again", "put its routes here");
    }
    for (index, alternative) in route.matches.iter().enumerate() {
        http_match(check, &format!("{at}.match[{index}]"), alternative, in_mesh);
    }
    weights(check, at, route.route.iter().map(|d| d.weight));
    for (index, destination) in route.route.iter().enumerate() {
        http_destination(check, &format!("{at}.route[{index}]"), destination);
    }
    if let Some(redirect) = &route.redirect {
        self::redirect(check, &format!("{at}.redirect"), redirect, &route.matches);
    }
    if let Some(response) = &route.direct_response {
        let at = format!("{at}.directResponse");
        if !(200..=600).contains(&response.status) {
            check.error(
                &format!("{at}.status"),
                format!("status {} is not between 200 and 600", response.status),
                "write a status such as 503",
            );
        }
        if let Some(body) = &response.body {
            let length =
                body.string.as_ref().map_or(0, String::len) + body.bytes.as_ref().map_or(0, |b| b.len() / 4 * 3);
            if length > BODY_BYTES_MAX {
                check.error(&format!("{at}.body"), "body is larger than 1 MiB", "serve it from a workload");
            } else if length > BODY_BYTES_DUBIOUS {
                check.warn(&format!("{at}.body"), "body is larger than 100 KiB", "serve it from a workload");
            }
        }
    }
    if let Some(rewrite) = &route.rewrite {
        self::rewrite(check, &format!("{at}.rewrite"), rewrite);
    }
    rules::duration(check, &format!("{at}.timeout"), route.timeout);
    if let Some(retries) = &route.retries {
        self::retries(check, &format!("{at}.retries"), retries);
    }
    if let Some(fault) = &route.fault {
        self::fault(check, &format!("{at}.fault"), fault);
    }
    mirrors(check, at, route);
    if let Some(cors) = &route.cors_policy {
        let at = format!("{at}.corsPolicy");
        for (index, origin) in cors.allow_origins.iter().enumerate() {
            rules::string_match(check, &format!("{at}.allowOrigins[{index}]"), origin);
        }
        for (index, method) in cors.allow_methods.iter().enumerate() {
            if !METHODS.contains(&method.as_str()) {
                check.error(
                    &format!("{at}.allowMethods[{index}]"),
                    format!("{method:?} is not an HTTP method"),
                    "write it in capitals, such as GET",
                );
            }
        }
        for (name, headers) in [("allowHeaders", &cors.allow_headers), ("exposeHeaders", &cors.expose_headers)] {
            for (index, header) in headers.iter().enumerate() {
                header_name(check, &format!("{at}.{name}[{index}]"), header);
            }
        }
        if cors.max_age.is_some_and(|age| age.subsec_nanos() != 0) {
            check.error(&format!("{at}.maxAge"), "maxAge must be whole seconds", "write it like 24h or 30s");
        }
    }
    if let Some(operations) = &route.headers {
        headers(check, &format!("{at}.headers"), operations);
    }
}

fn http_match(check: &mut Check<'_>, at: &str, alternative: &HttpMatchRequest, in_mesh: bool) {
    if let Some(uri) = &alternative.uri
        && let StringMatch::Regex(pattern) = uri
    {
        rules::regex(check, &format!("{at}.uri.regex"), pattern);
    }
    let fields =
        [("scheme", &alternative.scheme), ("method", &alternative.method), ("authority", &alternative.authority)];
    for (name, value) in fields {
        if let Some(value) = value {
            rules::string_match(check, &format!("{at}.{name}"), value);
        }
    }
    for (map, headers) in [("headers", &alternative.headers), ("withoutHeaders", &alternative.without_headers)] {
        for (name, value) in headers {
            let field = format!("{at}.{map}[\"{name}\"]");
            if name.to_ascii_lowercase().starts_with(CLAIM_PREFIX) {
                if in_mesh {
                    check.error(&field, "claims are matched at gateways only", "list gateways without `mesh`");
                }
            } else {
                header_name(check, &field, name);
            }
            rules::string_match(check, &field, value);
        }
    }
    for (name, value) in &alternative.query_params {
        let field = format!("{at}.queryParams[\"{name}\"]");
        if name.is_empty() {
            check.error(&field, "query parameter has no name", "write the name before the colon");
        }
        rules::string_match(check, &field, value);
    }
    gateways(check, &format!("{at}.gateways"), &alternative.gateways);
    labels(check, &format!("{at}.sourceLabels"), &alternative.source_labels);
}

pub(super) fn labels(check: &mut Check<'_>, at: &str, labels: &std::collections::BTreeMap<String, String>) {
    for (key, value) in labels {
        if !rules::is_label_key(key) {
            check.error(
                at,
                format!("{key:?} is not a label's key"),
                "write `name` or `domain/name` with letters, digits, `-`, `_`, `.`",
            );
        }
        if !rules::is_label_value(value) {
            check.error(at, format!("{value:?} is not a label's value"), "at most 63 letters, digits, `-`, `_`, `.`");
        }
    }
}

fn weights(check: &mut Check<'_>, at: &str, weights: impl Iterator<Item = i32>) {
    let weights: Vec<i32> = weights.collect();
    for (index, weight) in weights.iter().enumerate() {
        if *weight < 0 {
            check.error(
                &format!("{at}.route[{index}].weight"),
                format!("weight {weight} must not be negative"),
                "write 0 to send nothing there",
            );
        }
    }
    let sum: i64 = weights.iter().map(|weight| i64::from(*weight)).sum();
    if weights.len() > 1 && sum == 0 {
        check.error(
            &format!("{at}.route"),
            "the weights of several destinations sum to 0",
            "give them weights, such as 90 and 10",
        );
    }
    if sum > i64::from(u32::MAX) {
        check.error(
            &format!("{at}.route"),
            "the weights sum to more than 4294967295",
            "write percentages, such as 90 and 10",
        );
    }
}

fn destination(check: &mut Check<'_>, at: &str, destination: &Destination) {
    rules::host(check, &format!("{at}.host"), &destination.host);
    if !destination.subset.is_empty() && !rules::is_dns_label(&destination.subset) {
        check.error(
            &format!("{at}.subset"),
            format!("{:?} is not the name of a subset", destination.subset),
            "use lower-case letters, digits and `-`",
        );
    }
    if let Some(port) = &destination.port {
        rules::port_number(check, &format!("{at}.port.number"), port.number);
    }
}

fn http_destination(check: &mut Check<'_>, at: &str, route: &HttpRouteDestination) {
    destination(check, &format!("{at}.destination"), &route.destination);
    if let Some(operations) = &route.headers {
        headers(check, &format!("{at}.headers"), operations);
    }
}

fn tcp_route(check: &mut Check<'_>, at: &str, routes: &[RouteDestination]) {
    if routes.is_empty() {
        check.error(
            &format!("{at}.route"),
            "at least one destination is needed",
            "write route: [{destination: {host: …}}]",
        );
    }
    weights(check, at, routes.iter().map(|d| d.weight));
    for (index, route) in routes.iter().enumerate() {
        destination(check, &format!("{at}.route[{index}].destination"), &route.destination);
    }
}

fn redirect(check: &mut Check<'_>, at: &str, redirect: &HttpRedirect, matches: &[HttpMatchRequest]) {
    let empty = redirect.uri.is_empty()
        && redirect.prefix_rewrite.is_empty()
        && redirect.authority.is_empty()
        && redirect.port == 0
        && redirect.derive_port.is_none()
        && redirect.scheme.is_empty();
    if empty {
        check.error(at, "redirect says nothing", "set uri, authority, scheme or port");
    }
    if !redirect.prefix_rewrite.is_empty() {
        if !redirect.uri.is_empty() {
            check.error(at, "uri and prefixRewrite exclude each other", "keep one of the two");
        }
        let all_prefixes = matches.iter().all(|m| matches!(m.uri, Some(StringMatch::Prefix(_))));
        if matches.is_empty() || !all_prefixes {
            check.error(
                &format!("{at}.prefixRewrite"),
                "prefixRewrite needs a uri prefix in every match",
                "match by uri: {prefix: …}, or use uri",
            );
        }
    }
    if !matches!(redirect.redirect_code, 0 | 301 | 302 | 303 | 307 | 308) {
        let hint = "use 301, 302, 303, 307 or 308";
        check.error(&format!("{at}.redirectCode"), format!("{} is not a redirect", redirect.redirect_code), hint);
    }
    if !matches!(redirect.scheme.as_str(), "" | "http" | "https") {
        check.error(
            &format!("{at}.scheme"),
            format!("scheme {:?} is neither http nor https", redirect.scheme),
            "use http or https",
        );
    }
    if redirect.port != 0 && redirect.derive_port.is_some() {
        check.error(at, "port and derivePort exclude each other", "keep one of the two");
    }
}

fn rewrite(check: &mut Check<'_>, at: &str, rewrite: &HttpRewrite) {
    if rewrite.uri.is_empty() && rewrite.authority.is_empty() && rewrite.uri_regex_rewrite.is_none() {
        check.error(at, "rewrite says nothing", "set uri, uriRegexRewrite or authority");
    }
    if let Some(regex) = &rewrite.uri_regex_rewrite {
        if !rewrite.uri.is_empty() {
            check.error(at, "uri and uriRegexRewrite exclude each other", "keep one of the two");
        }
        rules::regex(check, &format!("{at}.uriRegexRewrite.match"), &regex.pattern);
    }
}

pub(super) fn retries(check: &mut Check<'_>, at: &str, retries: &HttpRetry) {
    if retries.attempts < 0 {
        check.error(&format!("{at}.attempts"), "attempts must not be negative", "write 0 to switch retries off");
    }
    if retries.attempts == 0
        && (!retries.retry_on.is_empty() || retries.per_try_timeout.is_some() || retries.backoff.is_some())
    {
        check.error(
            &format!("{at}.attempts"),
            "attempts 0 disables retries, so nothing else may be set",
            "set attempts, or remove the rest",
        );
    }
    rules::duration(check, &format!("{at}.perTryTimeout"), retries.per_try_timeout);
    rules::duration(check, &format!("{at}.backoff"), retries.backoff);
    for word in retries.retry_on.split(',').filter(|_| !retries.retry_on.is_empty()) {
        let is_status = word.parse::<u16>().is_ok_and(|status| (100..600).contains(&status));
        if !is_status && !RETRY_ON.contains(&word) {
            let near = crate::suggest::nearest(word.trim(), RETRY_ON.iter().copied());
            let hint = near.map_or_else(
                || format!("use {} or a status code", RETRY_ON.join(", ")),
                |near| format!("did you mean {near:?}?"),
            );
            check.error(&format!("{at}.retryOn"), format!("{word:?} is not a condition for a retry"), &hint);
        }
    }
}

fn fault(check: &mut Check<'_>, at: &str, fault: &HttpFaultInjection) {
    if fault.delay.is_none() && fault.abort.is_none() {
        check.error(at, "fault needs delay or abort", "write one of them, or remove fault");
    }
    if let Some(delay) = &fault.delay {
        let at = format!("{at}.delay");
        if delay.exponential_delay.is_some() {
            check.error(&format!("{at}.exponentialDelay"), "exponentialDelay is not supported", "use fixedDelay");
        } else if delay.fixed_delay.is_none() {
            check.error(&at, "fixedDelay is needed", "write how long, such as fixedDelay: 7s");
        }
        rules::duration(check, &format!("{at}.fixedDelay"), delay.fixed_delay);
        rules::percent(check, &format!("{at}.percentage"), delay.percentage);
        if let Some(percent) = delay.percent {
            if (0..=100).contains(&percent) {
                check.warn(&format!("{at}.percent"), "percent is deprecated", "use percentage: {value: …}");
            } else {
                check.error(
                    &format!("{at}.percent"),
                    format!("percent {percent} is not between 0 and 100"),
                    "write a whole number from 0 to 100",
                );
            }
        } else if delay.percentage.is_none() {
            check.warn(&at, "without a percentage no request is delayed", "add percentage: {value: 100}");
        }
    }
    if let Some(abort) = &fault.abort {
        let at = format!("{at}.abort");
        if abort.http2_error.is_some() {
            check.error(&format!("{at}.http2Error"), "http2Error is not supported", "use httpStatus or grpcStatus");
        }
        match (abort.http_status, &abort.grpc_status) {
            (None, None) if abort.http2_error.is_none() => {
                check.warn(&at, "abort without httpStatus or grpcStatus does nothing", "write httpStatus: 500");
            }
            (Some(_), Some(_)) => {
                check.error(&at, "httpStatus and grpcStatus exclude each other", "keep one of the two");
            }
            (Some(status), None) if !(200..=600).contains(&status) => {
                check.error(
                    &format!("{at}.httpStatus"),
                    format!("status {status} is not between 200 and 600"),
                    "write a status such as 503",
                );
            }
            (None, Some(name)) if grpc_code(name).is_none() => {
                check.error(
                    &format!("{at}.grpcStatus"),
                    format!("{name:?} is not a gRPC status"),
                    "write a name such as UNAVAILABLE",
                );
            }
            _ => {}
        }
        rules::percent(check, &format!("{at}.percentage"), abort.percentage);
        if abort.percentage.is_none() {
            check.warn(&at, "without a percentage no request is aborted", "add percentage: {value: 100}");
        }
    }
}

fn mirrors(check: &mut Check<'_>, at: &str, route: &HttpRoute) {
    if route.mirror.is_some() && !route.mirrors.is_empty() {
        check.error(at, "mirror and mirrors exclude each other", "put it into mirrors");
    }
    if let Some(mirror) = &route.mirror {
        destination(check, &format!("{at}.mirror"), mirror);
    }
    for (index, mirror) in route.mirrors.iter().enumerate() {
        destination(check, &format!("{at}.mirrors[{index}].destination"), &mirror.destination);
        rules::percent(check, &format!("{at}.mirrors[{index}].percentage"), mirror.percentage);
    }
    rules::percent(check, &format!("{at}.mirrorPercentage"), route.mirror_percentage);
    if route.mirror_percent.is_some() {
        check.warn(&format!("{at}.mirrorPercent"), "mirrorPercent is deprecated", "use mirrorPercentage: {value: …}");
    }
}

fn header_name(check: &mut Check<'_>, field: &str, name: &str) {
    let bare = name.strip_prefix(':').unwrap_or(name);
    if !rules::is_header_name(bare) {
        check.error(field, format!("{name:?} is not a header's name"), "use letters, digits and `-`");
    }
}

fn headers(check: &mut Check<'_>, at: &str, headers: &Headers) {
    for (side, operations) in [("request", &headers.request), ("response", &headers.response)] {
        let Some(operations) = operations else { continue };
        let is_request = side == "request";
        for (verb, values) in [("set", &operations.set), ("add", &operations.add)] {
            for (name, value) in values {
                let field = format!("{at}.{side}.{verb}[\"{name}\"]");
                let is_authority = name.eq_ignore_ascii_case("host") || name == ":authority";
                if is_authority != is_request && (is_authority || name.starts_with(':')) {
                    check.error(
                        &field,
                        format!("header {name:?} cannot be changed"),
                        "use rewrite for path and authority",
                    );
                } else {
                    header_name(check, &field, name);
                }
                if !rules::is_header_value(value) {
                    check.error(&field, "value holds a control character", "remove line breaks and the like");
                }
            }
        }
        for (index, name) in operations.remove.iter().enumerate() {
            let field = format!("{at}.{side}.remove[{index}]");
            if name.starts_with(':') || name.eq_ignore_ascii_case("host") {
                check.error(
                    &field,
                    format!("header {name:?} cannot be removed"),
                    "use rewrite: {authority: …} to change it",
                );
            } else {
                header_name(check, &field, name);
            }
        }
    }
}

/// Routes behind a route that matches everything are never reached.
fn shadowed(check: &mut Check<'_>, routes: &[HttpRoute]) {
    let Some(first) = routes.iter().position(HttpRoute::matches_everything) else {
        return;
    };
    for index in first + 1..routes.len() {
        let message = format!("never reached: http[{first}] matches every request");
        check.add(
            "IST0130",
            types::Severity::Warning,
            &format!("spec.http[{index}]"),
            message,
            "move the catch-all to the end",
        );
    }
}
