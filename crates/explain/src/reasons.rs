//! Which objects made a decision, and why others did not win.

use std::sync::Arc;

use engine::RuntimeConfig;
use engine::chain::{FilterChain, Terminal};
use engine::hcm::RouteSource;
use engine::matcher::Metadata;
use engine::record::Provenance;
use engine::route::{Action, Forward, HostRewrite, PathRewrite, Route, RouteMatch, RouteTable, VirtualHost};
use serde_json::Value;
use types::{ObjectRef, RequestHead};

use crate::report::{Because, Lost};

/// The objects of a resource.
pub(crate) fn because(of: &Provenance) -> Vec<Because> {
    let parsed: Value = serde_json::from_str(&of.lateen).unwrap_or(Value::Null);
    let texts = parsed["objects"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut all: Vec<Because> = Vec::new();
    for one in texts.filter_map(parse_object) {
        if !all.contains(&one) {
            all.push(one);
        }
    }
    all
}

/// `Kind namespace/name field`
fn parse_object(text: &str) -> Option<Because> {
    let mut words = text.splitn(3, ' ');
    let (kind, name) = (words.next()?, words.next()?);
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    Some(Because {
        object: ObjectRef::new(kind, namespace, name),
        field: words.next().unwrap_or_default().into(),
        position: None,
    })
}

/// The rule that a text such as `ns[shop]-policy[deny]-rule[0]` names.
pub(crate) fn policy(text: &str) -> Option<Because> {
    let (_, rest) = text.split_once("ns[")?;
    let (namespace, rest) = rest.split_once("]-policy[")?;
    let (name, rest) = rest.split_once(']')?;
    let rule = rest.strip_prefix("-rule[").and_then(|rest| rest.split_once(']')).map(|(rule, _)| rule);
    Some(Because {
        object: ObjectRef::new("AuthorizationPolicy", namespace, name),
        field: rule.map(|rule| format!("spec.rules[{rule}]")).unwrap_or_default().into(),
        position: None,
    })
}

/// The whole of an object.
pub(crate) fn whole(object: &ObjectRef) -> Because {
    Because { object: object.clone(), field: "".into(), position: None }
}

/// Virtual host and route that a record's provenance points at.
pub(crate) struct Found<'a> {
    pub(crate) host: &'a VirtualHost,
    pub(crate) route: Option<usize>,
}

/// The route table that a chain uses.
pub(crate) fn table<'a>(config: &'a RuntimeConfig, chain: &'a FilterChain) -> Option<&'a Arc<RouteTable>> {
    let Terminal::Http(hcm) = &chain.terminal else { return None };
    match &hcm.routes {
        RouteSource::Inline(table) => Some(table),
        RouteSource::Rds(name) => config.routes.get(name),
    }
}

impl<'a> Found<'a> {
    /// Finds what was recorded, by identity.
    pub(crate) fn of(table: &'a RouteTable, host: &Arc<Provenance>, route: Option<&Arc<Provenance>>) -> Option<Self> {
        let host = table.virtual_hosts.iter().find(|candidate| Arc::ptr_eq(&candidate.provenance, host))?;
        let route =
            route.and_then(|route| host.routes.iter().position(|candidate| Arc::ptr_eq(&candidate.provenance, route)));
        Some(Self { host, route })
    }

    pub(crate) fn forward(&self) -> Option<&'a Forward> {
        match &self.host.routes[self.route?].action {
            Action::Forward(forward) => Some(forward),
            Action::Redirect(_) | Action::Direct(_) => None,
        }
    }

    /// Routes before the chosen one with what they miss; those behind it, which were not looked at.
    pub(crate) fn lost(&self, head: &RequestHead, metadata: &Metadata) -> Vec<Lost> {
        let routes = &self.host.routes;
        let chosen = self.route.unwrap_or(routes.len());
        let lost = |at: usize, route: &Route| Lost {
            what: label(at, route),
            why: if at < chosen { why_not(&route.matches, head, metadata) } else { "an earlier route fits".to_owned() },
            because: because(&route.provenance),
        };
        routes.iter().enumerate().filter(|(at, _)| *at != chosen).map(|(at, route)| lost(at, route)).collect()
    }
}

fn label(at: usize, route: &Route) -> String {
    let first = because(&route.provenance).into_iter().next();
    match first {
        _ if !route.name.is_empty() => route.name.to_string(),
        Some(object) => format!(
            "{}{}",
            object.object.name,
            if object.field.is_empty() { String::new() } else { format!(" {}", object.field) }
        ),
        None => format!("route {at}"),
    }
}

/// Time-outs, retries and rewrites of a route, in words.
pub(crate) fn settings(forward: &Forward) -> String {
    let mut parts = Vec::new();
    if let Some(timeout) = forward.timeout {
        parts.push(format!("timeout {timeout:?}"));
    }
    if let Some(retry) = &forward.retry
        && retry.retries_max > 0
    {
        let per_try = retry.per_try_timeout.map(|limit| format!(" of {limit:?} each")).unwrap_or_default();
        parts.push(format!("{} retries{per_try}", retry.retries_max));
    }
    match &forward.path {
        PathRewrite::Keep => {}
        PathRewrite::Prefix(prefix) => parts.push(format!("path rewritten to {prefix}")),
        PathRewrite::Regex(_) => parts.push("path rewritten by regex".to_owned()),
    }
    match &forward.host {
        HostRewrite::Keep => {}
        HostRewrite::Literal(host) => parts.push(format!("host rewritten to {host}")),
        HostRewrite::Auto => parts.push("host rewritten to the endpoint's".to_owned()),
        HostRewrite::Header(header) => parts.push(format!("host taken from {header}")),
    }
    parts.join(", ")
}

fn shown(value: Option<&[u8]>) -> String {
    value.map_or_else(|| "absent".to_owned(), |value| format!("{:?}", String::from_utf8_lossy(value)))
}

/// The first part of a match that does not hold.
fn why_not(matches: &RouteMatch, head: &RequestHead, metadata: &Metadata) -> String {
    let is_connect = head.method() == "CONNECT";
    if is_connect || !matches.path.holds(head.path_only()) {
        return format!("path is {}, wanted {}", shown(Some(head.path_only())), matches.path);
    }
    for matcher in &matches.headers {
        if !matcher.matches(head) {
            let value = head.header(&matcher.name);
            return format!("header {} is {}, wanted {matcher}", matcher.name, shown(value.as_deref()));
        }
    }
    for matcher in &matches.query {
        if !matcher.matches(head.query()) {
            return format!("query parameter {} is not {matcher}", matcher.name());
        }
    }
    if matches.grpc && !head.is_grpc() {
        return "gRPC only".to_owned();
    }
    for matcher in &matches.metadata {
        if !matcher.matches(metadata) {
            return format!("no verified claim has {matcher}");
        }
    }
    match matches.fraction {
        Some(share) => format!("takes {} of {} requests, not this one", share.numerator, share.denominator),
        None => "it fits, but was chosen against before a filter changed the request".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_read_back() {
        let provenance = Provenance {
            istio_config: "".into(),
            lateen: r#"{"objects":["VirtualService shop/reviews spec.http[0]","Gateway a/b","VirtualService shop/reviews spec.http[0]"]}"#.into(),
        };
        let shown: Vec<String> = because(&provenance).iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["VirtualService shop/reviews spec.http[0]", "Gateway a/b"]);
        assert!(because(&Provenance::default()).is_empty());
    }

    #[test]
    fn policies_are_read_back() {
        let read = |text: &str| policy(text).map(|because| because.to_string());
        assert_eq!(
            read("rbac_access_denied_matched_policy[ns[shop]-policy[deny-x]-rule[1]]").as_deref(),
            Some("AuthorizationPolicy shop/deny-x spec.rules[1]")
        );
        assert_eq!(read("rbac_access_denied_matched_policy[none]"), None);
    }
}
