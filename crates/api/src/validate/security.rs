//! PeerAuthentication, RequestAuthentication, AuthorizationPolicy.
//!
//! *Source*: `docs/parity.md`, Security 7.1, 8.1, 8.5, 9. What is not built yet is refused, never left out.

use serde_json::Value;

use super::virtual_service::labels;
use super::{Check, rules};
use crate::networking::LabelSelector;
use crate::security::{
    Action, AuthorizationPolicy, Condition, JwtRule, Operation, PeerAuthentication, RequestAuthentication, Rule,
    Source, TargetRef,
};

const LIST_MAX: usize = 512;

pub(super) fn peer_authentication(check: &mut Check<'_>, spec: &PeerAuthentication) {
    selector(check, spec.selector.as_ref());
    if !spec.port_level_mtls.is_empty() && spec.selector.as_ref().is_none_or(|s| s.match_labels.is_empty()) {
        check.error("spec.portLevelMtls", "portLevelMtls needs a selector", "add selector.matchLabels");
    }
    if spec.port_level_mtls.contains_key(&0) {
        check.error("spec.portLevelMtls", "port must be between 1 and 65535", "write the number of a port");
    }
}

fn selector(check: &mut Check<'_>, selector: Option<&LabelSelector>) {
    if let Some(selector) = selector {
        labels(check, "spec.selector.matchLabels", &selector.match_labels);
        if selector.match_labels.keys().any(String::is_empty) {
            check.error("spec.selector.matchLabels", "a label has no key", "write key and value");
        }
        if selector.match_labels.iter().any(|(key, value)| key.contains('*') || value.contains('*')) {
            check.error(
                "spec.selector.matchLabels",
                "`*` is not allowed in a selector",
                "name labels in full, or leave the selector out for all workloads",
            );
        }
    }
}

fn targets(check: &mut Check<'_>, has_selector: bool, one: Option<&TargetRef>, several: &[TargetRef]) {
    let any = one.is_some() || !several.is_empty();
    if any && has_selector {
        check.error("spec.targetRefs", "selector and targetRefs exclude each other", "keep the selector");
    }
    // A target is a Gateway API object or a waypoint: without them the policy would guard nothing.
    check.unbuilt_if(one.is_some(), "spec.targetRef");
    check.unbuilt_if(!several.is_empty(), "spec.targetRefs");
}

// --- RequestAuthentication ---

pub(super) fn request_authentication(check: &mut Check<'_>, spec: &RequestAuthentication) {
    selector(check, spec.selector.as_ref());
    targets(check, spec.selector.is_some(), spec.target_ref.as_ref(), &spec.target_refs);
    for (index, rule) in spec.jwt_rules.iter().enumerate() {
        jwt_rule(check, &format!("spec.jwtRules[{index}]"), rule);
    }
}

fn jwt_rule(check: &mut Check<'_>, at: &str, rule: &JwtRule) {
    if rule.issuer.is_empty() && rule.jwks.is_empty() && rule.jwks_uri.is_empty() {
        check.error(&format!("{at}.issuer"), "issuer is needed", "write the value of the token's `iss`");
    }
    if rule.audiences.iter().any(String::is_empty) {
        check.error(
            &format!("{at}.audiences"),
            "an audience is empty",
            "write the value of the token's `aud`, or leave audiences out",
        );
    }
    if !rule.jwks_uri.is_empty() {
        let is_http = rule.jwks_uri.starts_with("http://") || rule.jwks_uri.starts_with("https://");
        if !is_http || rule.jwks_uri.len() > 2048 {
            check.error(
                &format!("{at}.jwksUri"),
                "jwksUri must be an http or https URL of at most 2048 characters",
                "write the address of the key set",
            );
        }
    }
    if !rule.jwks.is_empty()
        && let Err(message) = jwks(&rule.jwks)
    {
        check.error(&format!("{at}.jwks"), message, "paste the issuer's key set: {\"keys\": […]}");
    }
    for (index, header) in rule.from_headers.iter().enumerate() {
        if !rules::is_header_name(&header.name) {
            check.error(
                &format!("{at}.fromHeaders[{index}].name"),
                format!("{:?} is not a header's name", header.name),
                "use letters, digits and `-`",
            );
        }
    }
    for (name, list) in [("fromParams", &rule.from_params), ("fromCookies", &rule.from_cookies)] {
        if list.iter().any(String::is_empty) {
            check.error(&format!("{at}.{name}"), "a name is empty", "write the name, or remove the entry");
        }
    }
    if !rule.output_payload_to_header.is_empty() && !rules::is_header_name(&rule.output_payload_to_header) {
        check.error(&format!("{at}.outputPayloadToHeader"), "not a header's name", "use letters, digits and `-`");
    }
    for (index, entry) in rule.output_claim_to_headers.iter().enumerate() {
        let at = format!("{at}.outputClaimToHeaders[{index}]");
        let fits = !entry.header.is_empty()
            && entry.header.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !fits {
            check.error(
                &format!("{at}.header"),
                format!("{:?} is not a header of letters, digits, `-` and `_`", entry.header),
                "rename the header",
            );
        }
        if entry.claim.is_empty() {
            check.error(&format!("{at}.claim"), "claim is needed", "name the claim whose value goes into the header");
        }
    }
    rules::duration(check, &format!("{at}.timeout"), rule.timeout);
}

/// Whether `text` is a key set whose keys have a type.
fn jwks(text: &str) -> Result<(), String> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let Some(keys) = value.get("keys").and_then(Value::as_array) else {
        return Err("a key set needs a list `keys`".to_owned());
    };
    if keys.is_empty() {
        return Err("the key set has no keys".to_owned());
    }
    for (index, key) in keys.iter().enumerate() {
        let text = |name: &str| key.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        let needed: &[&str] = match text("kty") {
            Some("RSA") => &["n", "e"],
            Some("EC") => &["crv", "x", "y"],
            Some("OKP") => &["crv", "x"],
            Some("oct") => &["k"],
            Some(other) => return Err(format!("keys[{index}] has the unknown type {other:?}")),
            None => return Err(format!("keys[{index}] has no `kty`")),
        };
        if let Some(missing) = needed.iter().find(|name| text(name).is_none()) {
            return Err(format!("keys[{index}] lacks `{missing}`"));
        }
    }
    Ok(())
}

// --- AuthorizationPolicy ---

pub(super) fn authorization_policy(check: &mut Check<'_>, spec: &AuthorizationPolicy) {
    selector(check, spec.selector.as_ref());
    targets(check, spec.selector.is_some(), spec.target_ref.as_ref(), &spec.target_refs);
    let provider = spec.provider.as_ref().map_or("", |provider| provider.name.as_str());
    match spec.action {
        Action::Custom if provider.is_empty() => {
            check.error(
                "spec.provider.name",
                "action CUSTOM needs a provider",
                "name one of meshConfig.extensionProviders",
            );
        }
        Action::Allow | Action::Deny | Action::Audit if spec.provider.is_some() => {
            check.error("spec.provider", format!("action {} takes no provider", spec.action), "set action: CUSTOM");
        }
        _ => {}
    }
    if spec.rules.is_empty() && matches!(spec.action, Action::Deny | Action::Custom) {
        check.error(
            "spec.rules",
            format!("action {} needs rules", spec.action),
            "write rules: [{}] to match everything",
        );
    }
    if spec.rules.len() > LIST_MAX {
        check.error("spec.rules", format!("more than {LIST_MAX} rules"), "split the policy in two");
    }
    if let Some(value) = check.object.meta.annotations.get("istio.io/dry-run") {
        let at = "metadata.annotations[\"istio.io/dry-run\"]";
        match (value.as_str(), spec.action) {
            ("false", _) | ("true", Action::Allow | Action::Deny) => {}
            ("true", action) => {
                check.error(at, format!("action {action} cannot be tried out"), "remove the annotation");
            }
            (other, _) => {
                check.error(at, format!("{other:?} is neither \"true\" nor \"false\""), "write \"true\" or \"false\"");
            }
        }
    }
    for (index, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{index}]");
        empty_lists(check, &at, index);
        if rule.from.len() > LIST_MAX {
            check.error(&format!("{at}.from"), format!("more than {LIST_MAX} entries"), "split the rule in two");
        }
        for (index, from) in rule.from.iter().enumerate() {
            let at = format!("{at}.from[{index}].source");
            match &from.source {
                None => check.error(&at, "source is needed", "write source: {principals: […]} or the like"),
                Some(source) => self::source(check, &at, source, spec.action),
            }
        }
        for (index, to) in rule.to.iter().enumerate() {
            let at = format!("{at}.to[{index}].operation");
            match &to.operation {
                None => check.error(&at, "operation is needed", "write operation: {paths: […]} or the like"),
                Some(operation) => self::operation(check, &at, operation),
            }
        }
        for (index, when) in rule.when.iter().enumerate() {
            condition(check, &format!("{at}.when[{index}]"), when, spec.action);
        }
        if spec.action == Action::Deny && widens_on_tcp(rule) {
            let message = "on TCP ports the HTTP fields are left out, so that the rule denies more";
            check.warn(&at, message, "add ports to the operation");
        }
    }
}

/// Whether a rule has fields of HTTP, and no port that keeps it from connections of bytes.
fn widens_on_tcp(rule: &Rule) -> bool {
    let operations = || rule.to.iter().filter_map(|to| to.operation.as_ref());
    let sources = || rule.from.iter().filter_map(|from| from.source.as_ref());
    let has_ports = rule.when.iter().any(|when| when.key == "destination.port")
        || (!rule.to.is_empty() && operations().all(|of| !of.ports.is_empty() || !of.not_ports.is_empty()));
    let mut lists = operations()
        .flat_map(|of| [&of.methods, &of.not_methods, &of.paths, &of.not_paths, &of.hosts, &of.not_hosts])
        .chain(sources().flat_map(|of| [&of.request_principals, &of.not_request_principals]));
    let has_http = lists.any(|list| !list.is_empty()) || rule.when.iter().any(|when| when.key.starts_with("request."));
    has_http && !has_ports
}

/// `from: []` says nothing and would match everyone: more likely a slip than meant.
fn empty_lists(check: &mut Check<'_>, at: &str, index: usize) {
    let raw = check.object.raw.clone();
    let rule = raw.pointer(&format!("/spec/rules/{index}"));
    for name in ["from", "to", "when"] {
        let is_empty = rule.and_then(|rule| rule.get(name)).and_then(Value::as_array).is_some_and(Vec::is_empty);
        if is_empty {
            check.error(
                &format!("{at}.{name}"),
                format!("an empty `{name}` would match everything"),
                "remove it if that is meant",
            );
        }
    }
    let Some(rule) = rule else { return };
    let lists = ["from", "to"].into_iter().flat_map(|side| {
        let inner = if side == "from" { "source" } else { "operation" };
        let entries = rule.get(side).and_then(Value::as_array).into_iter().flatten().enumerate();
        entries.filter_map(move |(index, entry)| {
            Some((format!("{at}.{side}[{index}].{inner}"), entry.get(inner)?.as_object()?))
        })
    });
    for (at, fields) in lists {
        for (name, value) in fields {
            if value.as_array().is_some_and(Vec::is_empty) {
                check.error(
                    &format!("{at}.{name}"),
                    format!("an empty `{name}` would not restrict anything"),
                    "remove it, or list values",
                );
            }
        }
    }
}

fn no_empty(check: &mut Check<'_>, at: &str, lists: &[(&str, &[String])], what: &str) {
    if lists.iter().all(|(_, list)| list.is_empty()) {
        check.error(at, format!("{what} says nothing"), "list values in one of its fields");
    }
    for (name, list) in lists {
        for (index, value) in list.iter().enumerate() {
            if value.is_empty() {
                check.error(&format!("{at}.{name}[{index}]"), "value is empty", "write a value, or remove the entry");
            }
        }
    }
}

fn source(check: &mut Check<'_>, at: &str, source: &Source, action: Action) {
    let lists: [(&str, &[String]); 14] = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
    ];
    no_empty(check, at, &lists, "source");
    for (name, list) in &lists {
        let is_block = name.ends_with("pBlocks");
        let is_account = name.ends_with("erviceAccounts");
        for (index, value) in list.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
            let field = format!("{at}.{name}[{index}]");
            if is_block {
                rules::cidr(check, &field, value);
            } else if is_account {
                service_account(check, &field, value);
            } else {
                stars(check, &field, value);
            }
            if name.ends_with("rustDomains") && value.contains('/') {
                check.error(&field, "a trust domain holds no `/`", "write the domain alone, such as cluster.local");
            }
        }
        if action == Action::Custom && !is_block && !list.is_empty() {
            let message = format!("{name} is not known yet when a CUSTOM policy is evaluated");
            check.error(&format!("{at}.{name}"), message, "use it in an ALLOW or DENY policy");
        }
    }
    let has_accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let has_identity = [&source.principals, &source.not_principals, &source.namespaces, &source.not_namespaces];
    if has_accounts && has_identity.iter().any(|list| !list.is_empty()) {
        check.error(
            at,
            "serviceAccounts cannot stand beside principals or namespaces",
            "put them into two entries of `from`",
        );
    }
    if source.service_accounts.len() > 16 || source.not_service_accounts.len() > 16 {
        check.error(&format!("{at}.serviceAccounts"), "more than 16 service accounts", "split the rule in two");
    }
}

fn service_account(check: &mut Check<'_>, field: &str, value: &str) {
    let slashes = value.matches('/').count();
    if value.contains('*') || slashes > 1 || value.len() > 320 || value.split('/').any(str::is_empty) {
        check.error(
            field,
            format!("{value:?} is not of the form `account` or `namespace/account`"),
            "wildcards are not allowed",
        );
    }
}

/// `*` may stand alone, at the beginning, or at the end.
fn stars(check: &mut Check<'_>, field: &str, value: &str) {
    let inner = value.strip_prefix('*').or_else(|| value.strip_suffix('*')).unwrap_or(value);
    if inner.contains('*') {
        check.error(
            field,
            format!("{value:?} may hold `*` only at its beginning or its end"),
            "use a prefix (`a*`) or a suffix (`*a`)",
        );
    }
}

fn operation(check: &mut Check<'_>, at: &str, operation: &Operation) {
    let lists: [(&str, &[String]); 8] = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    no_empty(check, at, &lists, "operation");
    for (name, list) in &lists {
        for (index, value) in list.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
            let field = format!("{at}.{name}[{index}]");
            match *name {
                "ports" | "notPorts" => port(check, &field, value),
                "paths" | "notPaths" if value.contains(['{', '}']) => template(check, &field, value),
                _ => stars(check, &field, value),
            }
        }
    }
}

fn port(check: &mut Check<'_>, field: &str, value: &str) {
    if value.parse::<u16>().is_err() || value.starts_with('+') {
        check.error(field, format!("{value:?} is not a port"), "write a number between 0 and 65535 in quotes");
    }
}

/// A path template: `{*}` is one segment, `{**}` the rest.
fn template(check: &mut Check<'_>, field: &str, value: &str) {
    let mut seen_rest = false;
    for segment in value.split('/') {
        match segment {
            "{*}" | "{**}" if seen_rest => {
                check.error(
                    field,
                    "`{**}` must be the last operator of a template",
                    "move it to the end, or use `{*}` for one segment",
                );
                return;
            }
            "{*}" => {}
            "{**}" => seen_rest = true,
            other if other.contains(['{', '}', '*']) => {
                let message = format!("{other:?} is neither text nor a whole operator");
                check.error(field, message, "use `{*}` for one segment, `{**}` for the rest, and no plain `*`");
                return;
            }
            _ => {}
        }
    }
    if !value.starts_with('/') {
        check.error(field, "a path template begins with /", "write a `/` before it");
    }
}

/// Keys of `when` that are whole words.
const KEYS: &[&str] = &[
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "destination.ip",
    "destination.port",
    "connection.sni",
];

fn condition(check: &mut Check<'_>, at: &str, when: &Condition, action: Action) {
    if when.key.is_empty() {
        check.error(&format!("{at}.key"), "key is needed", "name an attribute, such as request.headers[x]");
        return;
    }
    if when.values.is_empty() && when.not_values.is_empty() {
        check.error(at, "values or notValues are needed", "list values to compare with");
    }
    let bracketed = |prefix: &str| {
        when.key.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('[') && rest.ends_with(']') && rest.len() > 2)
    };
    let is_experimental = when.key.starts_with("experimental.envoy.filters.");
    if is_experimental {
        check.unbuilt(&format!("{at}.key"));
    } else if !KEYS.contains(&when.key.as_str()) && !bracketed("request.headers") && !bracketed("request.auth.claims") {
        let hint = crate::suggest::nearest(&when.key, KEYS.iter().copied()).map_or_else(
            || format!("use request.headers[…], request.auth.claims[…], {}", KEYS.join(", ")),
            |near| format!("did you mean {near:?}?"),
        );
        check.error(&format!("{at}.key"), format!("key {:?} is not known", when.key), &hint);
    }
    for (name, list) in [("values", &when.values), ("notValues", &when.not_values)] {
        for (index, value) in list.iter().enumerate() {
            let field = format!("{at}.{name}[{index}]");
            match when.key.as_str() {
                _ if value.is_empty() => check.error(&field, "value is empty", "write a value, or remove the entry"),
                "source.ip" | "remote.ip" | "destination.ip" => rules::cidr(check, &field, value),
                "destination.port" => port(check, &field, value),
                "source.serviceAccount" => service_account(check, &field, value),
                _ if is_experimental => {}
                _ => stars(check, &field, value),
            }
        }
    }
    let is_identity = when.key.starts_with("request.auth.")
        || matches!(
            when.key.as_str(),
            "source.namespace" | "source.principal" | "source.serviceAccount" | "source.trustDomain"
        );
    if action == Action::Custom && is_identity {
        let message = format!("{} is not known yet when a CUSTOM policy is evaluated", when.key);
        check.error(&format!("{at}.key"), message, "use it in an ALLOW or DENY policy");
    }
}
