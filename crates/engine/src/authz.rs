//! Envoy's RBAC filters: who may do what, on requests and on connections.
//!
//! Rules are lowered from `envoy.config.rbac.v3.RBAC` and evaluated over a [`Subject`]. A rule that
//! allows is read strictly and one that denies widely ([`Reading`]), and a negation turns the
//! reading: what cannot be evaluated (an HTTP attribute on a bare connection) never allows and
//! always denies (property 11). An attribute that is merely absent (no client certificate, no
//! token) does not match, and its negation does (`docs/parity.md`, Security AP-3).
//!
//! **Differences from Envoy, on purpose.** A principal is the peer's mesh identity and nothing else
//! in the certificate (property 17). Rules over `:authority` ignore case and a trailing dot; those
//! that deny ignore the port too (property 10).

use std::borrow::Cow;
use std::cell::OnceCell;
use std::net::IpAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::rbac::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as http;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as network;
use serde_json::Value;
use types::RequestHead;

use crate::facts::ConnFacts;
use crate::matcher::{
    Cidr, HeaderMatcher, Metadata, MetadataMatcher, PathMatcher, Reading, StringMatcher, UriTemplate,
};
use crate::unsupported::{Unsupported, Within as _, each};

/// The filter whose dynamic metadata carries shadow results.
pub const METADATA: &str = "envoy.filters.http.rbac";

/// What rules are asked about.
pub struct Subject<'a> {
    /// The connection.
    pub conn: &'a ConnFacts,
    /// The request after normalisation; `None` on a bare connection.
    pub head: Option<&'a RequestHead>,
    /// The client's address as far as proxies on the way are trusted.
    pub remote: IpAddr,
    /// What earlier filters found out.
    pub metadata: &'a Metadata,
    principal: OnceCell<Option<Cow<'a, str>>>,
}

impl<'a> Subject<'a> {
    /// A request on a connection.
    pub fn request(conn: &'a ConnFacts, head: &'a RequestHead, remote: IpAddr, metadata: &'a Metadata) -> Self {
        Self { conn, head: Some(head), remote, metadata, principal: OnceCell::new() }
    }

    /// A bare connection.
    pub fn connection(conn: &'a ConnFacts, metadata: &'a Metadata) -> Self {
        Self { conn, head: None, remote: conn.peer_ip(), metadata, principal: OnceCell::new() }
    }

    fn principal(&self) -> Option<&str> {
        self.principal.get_or_init(|| self.conn.peer_identity_text()).as_deref()
    }
}

/// What matching rules do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Only what matches passes.
    Allow,
    /// What matches does not pass.
    Deny,
    /// Everything passes.
    Log,
}

/// What rules say about one subject.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict<'a> {
    /// Whether the subject may pass.
    pub allowed: bool,
    /// The policy that matched, if one did.
    pub policy: Option<&'a str>,
}

impl Verdict<'_> {
    /// The text inside `rbac_access_denied_matched_policy[…]`: the policy's name with `_` for white
    /// space, or `none`.
    pub fn details(&self) -> String {
        self.policy.unwrap_or("none").replace(char::is_whitespace, "_")
    }
}

/// One set of rules with one action.
#[derive(Clone, PartialEq, Debug)]
pub struct Rules {
    action: Action,
    /// In order of names: the first match names the verdict.
    policies: Vec<Policy>,
}

#[derive(Clone, PartialEq, Debug)]
struct Policy {
    name: Box<str>,
    permissions: Vec<Permission>,
    principals: Vec<Principal>,
}

#[derive(Clone, PartialEq, Debug)]
enum Permission {
    Any,
    All(Vec<Permission>),
    OneOf(Vec<Permission>),
    Not(Box<Permission>),
    Leaf(Leaf),
}

#[derive(Clone, PartialEq, Debug)]
enum Principal {
    Any,
    All(Vec<Principal>),
    OneOf(Vec<Principal>),
    Not(Box<Principal>),
    Leaf(Leaf),
}

#[derive(Clone, PartialEq, Debug)]
enum Leaf {
    Header(HeaderMatcher),
    Authority(HeaderMatcher),
    Path(PathMatcher),
    Template(UriTemplate),
    Metadata(MetadataMatcher),
    DestinationIp(Cidr),
    /// `start..end`
    DestinationPort(u32, u32),
    ServerName(StringMatcher),
    /// `None`: any authenticated peer.
    Authenticated(Option<StringMatcher>),
    /// The peer of the socket.
    DirectRemoteIp(Cidr),
    /// The peer after PROXY protocol.
    SourceIp(Cidr),
    /// The client behind trusted proxies.
    RemoteIp(Cidr),
}

impl Rules {
    /// Lowers `envoy.config.rbac.v3.RBAC`.
    pub fn lower(proto: &pb::Rbac) -> Result<Self, Unsupported> {
        let action = match pb::rbac::Action::try_from(proto.action) {
            Ok(pb::rbac::Action::Allow) => Action::Allow,
            Ok(pb::rbac::Action::Deny) => Action::Deny,
            Ok(pb::rbac::Action::Log) => Action::Log,
            Err(_) => return Err(Unsupported::new("action", format!("{} is unknown", proto.action))),
        };
        if proto.audit_logging_options.as_ref().is_some_and(|options| !options.logger_configs.is_empty()) {
            return Err(Unsupported::not_built("audit_logging_options.logger_configs"));
        }
        let mut named: Vec<_> = proto.policies.iter().collect();
        named.sort_by(|a, b| a.0.cmp(b.0));
        let policies = named
            .into_iter()
            .map(|(name, policy)| Policy::lower(name, policy).within(&format!("policies[{name}]")))
            .collect::<Result<_, _>>()?;
        Ok(Self { action, policies })
    }

    /// What these rules do.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Names of the policies, sorted.
    pub fn policies(&self) -> impl Iterator<Item = &str> {
        self.policies.iter().map(|policy| &*policy.name)
    }

    /// Decides.
    pub fn decide(&self, subject: &Subject<'_>) -> Verdict<'_> {
        // LOG and DENY rather mark too much than too little.
        let reading = if self.action == Action::Allow { Reading::Strict } else { Reading::Wide };
        let policy = self.policies.iter().find(|policy| policy.matches(subject, reading)).map(|policy| &*policy.name);
        let allowed = match self.action {
            Action::Allow => policy.is_some(),
            Action::Deny => policy.is_none(),
            Action::Log => true,
        };
        Verdict { allowed, policy }
    }
}

impl Policy {
    fn lower(name: &str, proto: &pb::Policy) -> Result<Self, Unsupported> {
        if proto.condition.is_some() || proto.checked_condition.is_some() || proto.cel_config.is_some() {
            return Err(Unsupported::not_built("condition"));
        }
        if proto.permissions.is_empty() {
            return Err(Unsupported::missing("permissions"));
        }
        if proto.principals.is_empty() {
            return Err(Unsupported::missing("principals"));
        }
        Ok(Self {
            name: name.into(),
            permissions: each(&proto.permissions, "permissions", Permission::lower)?,
            principals: each(&proto.principals, "principals", Principal::lower)?,
        })
    }

    fn matches(&self, subject: &Subject<'_>, reading: Reading) -> bool {
        self.permissions.iter().any(|permission| permission.matches(subject, reading))
            && self.principals.iter().any(|principal| principal.matches(subject, reading))
    }
}

fn any(value: bool) -> Result<(), Unsupported> {
    if value { Ok(()) } else { Err(Unsupported::new("any", "must be true")) }
}

fn metadata(proto: &pb::SourcedMetadata) -> Result<Leaf, Unsupported> {
    if proto.metadata_source != pb::MetadataSource::Dynamic as i32 {
        return Err(Unsupported::not_built("metadata_source"));
    }
    let matcher = proto.metadata_matcher.as_ref().ok_or_else(|| Unsupported::missing("metadata_matcher"))?;
    MetadataMatcher::lower(matcher).within("metadata_matcher").map(Leaf::Metadata)
}

fn header(proto: &envoy_types::pb::envoy::config::route::v3::HeaderMatcher) -> Result<Leaf, Unsupported> {
    let matcher = HeaderMatcher::lower(proto).within("header")?;
    Ok(match &*matcher.name {
        ":authority" | "host" => Leaf::Authority(matcher.ignoring_case()),
        _ => Leaf::Header(matcher),
    })
}

impl Permission {
    #[expect(deprecated, reason = "Envoy's older fields, which control planes still write")]
    fn lower(proto: &pb::Permission) -> Result<Self, Unsupported> {
        use pb::permission::Rule;
        Ok(match proto.rule.as_ref().ok_or_else(|| Unsupported::missing("rule"))? {
            Rule::Any(value) => any(*value).map(|()| Self::Any)?,
            Rule::AndRules(set) => Self::All(filled(&set.rules, "and_rules.rules", Self::lower)?),
            Rule::OrRules(set) => Self::OneOf(filled(&set.rules, "or_rules.rules", Self::lower)?),
            Rule::NotRule(inner) => Self::Not(Box::new(Self::lower(inner).within("not_rule")?)),
            Rule::Header(matcher) => Self::Leaf(header(matcher)?),
            Rule::UrlPath(matcher) => Self::Leaf(Leaf::Path(PathMatcher::lower(matcher).within("url_path")?)),
            Rule::UriTemplate(typed) => Self::Leaf(Leaf::Template(UriTemplate::lower(typed).within("uri_template")?)),
            Rule::DestinationIp(range) => Self::Leaf(Leaf::DestinationIp(Cidr::lower(range).within("destination_ip")?)),
            Rule::DestinationPort(port) if *port <= 65_535 => Self::Leaf(Leaf::DestinationPort(*port, *port + 1)),
            Rule::DestinationPort(_) => return Err(Unsupported::new("destination_port", "is above 65535")),
            Rule::DestinationPortRange(range) => {
                let port = |value: i32| {
                    u32::try_from(value)
                        .ok()
                        .filter(|port| *port <= 65_536)
                        .ok_or_else(|| Unsupported::new("destination_port_range", "is not a range of ports"))
                };
                Self::Leaf(Leaf::DestinationPort(port(range.start)?, port(range.end)?))
            }
            Rule::Metadata(matcher) => Self::Leaf(Leaf::Metadata(MetadataMatcher::lower(matcher).within("metadata")?)),
            Rule::SourcedMetadata(sourced) => Self::Leaf(metadata(sourced).within("sourced_metadata")?),
            Rule::RequestedServerName(matcher) => Self::Leaf(Leaf::ServerName(
                StringMatcher::lower(matcher).within("requested_server_name")?.ignoring_case(),
            )),
            Rule::Matcher(_) => return Err(Unsupported::not_built("matcher")),
        })
    }

    fn matches(&self, subject: &Subject<'_>, reading: Reading) -> bool {
        match self {
            Self::Any => true,
            Self::All(rules) => rules.iter().all(|rule| rule.matches(subject, reading)),
            Self::OneOf(rules) => rules.iter().any(|rule| rule.matches(subject, reading)),
            Self::Not(rule) => !rule.matches(subject, reading.inverted()),
            Self::Leaf(leaf) => leaf.matches(subject, reading),
        }
    }
}

impl Principal {
    #[expect(deprecated, reason = "Envoy's older fields, which control planes still write")]
    fn lower(proto: &pb::Principal) -> Result<Self, Unsupported> {
        use pb::principal::Identifier;
        let cidr = |range, path: &str| Cidr::lower(range).within(path);
        Ok(match proto.identifier.as_ref().ok_or_else(|| Unsupported::missing("identifier"))? {
            Identifier::Any(value) => any(*value).map(|()| Self::Any)?,
            Identifier::AndIds(set) => Self::All(filled(&set.ids, "and_ids.ids", Self::lower)?),
            Identifier::OrIds(set) => Self::OneOf(filled(&set.ids, "or_ids.ids", Self::lower)?),
            Identifier::NotId(inner) => Self::Not(Box::new(Self::lower(inner).within("not_id")?)),
            Identifier::Authenticated(peer) => Self::Leaf(Leaf::Authenticated(
                peer.principal_name
                    .as_ref()
                    .map(|name| StringMatcher::lower(name).within("authenticated.principal_name"))
                    .transpose()?,
            )),
            Identifier::SourceIp(range) => Self::Leaf(Leaf::SourceIp(cidr(range, "source_ip")?)),
            Identifier::DirectRemoteIp(range) => Self::Leaf(Leaf::DirectRemoteIp(cidr(range, "direct_remote_ip")?)),
            Identifier::RemoteIp(range) => Self::Leaf(Leaf::RemoteIp(cidr(range, "remote_ip")?)),
            Identifier::Header(matcher) => Self::Leaf(header(matcher)?),
            Identifier::UrlPath(matcher) => Self::Leaf(Leaf::Path(PathMatcher::lower(matcher).within("url_path")?)),
            Identifier::Metadata(matcher) => {
                Self::Leaf(Leaf::Metadata(MetadataMatcher::lower(matcher).within("metadata")?))
            }
            Identifier::SourcedMetadata(sourced) => Self::Leaf(metadata(sourced).within("sourced_metadata")?),
            Identifier::FilterState(_) => return Err(Unsupported::not_built("filter_state")),
            Identifier::Custom(_) => return Err(Unsupported::not_built("custom")),
        })
    }

    fn matches(&self, subject: &Subject<'_>, reading: Reading) -> bool {
        match self {
            Self::Any => true,
            Self::All(ids) => ids.iter().all(|id| id.matches(subject, reading)),
            Self::OneOf(ids) => ids.iter().any(|id| id.matches(subject, reading)),
            Self::Not(id) => !id.matches(subject, reading.inverted()),
            Self::Leaf(leaf) => leaf.matches(subject, reading),
        }
    }
}

fn filled<T, U>(items: &[T], path: &str, lower: impl Fn(&T) -> Result<U, Unsupported>) -> Result<Vec<U>, Unsupported> {
    if items.is_empty() { Err(Unsupported::missing(path)) } else { each(items, path, lower) }
}

impl Leaf {
    fn matches(&self, subject: &Subject<'_>, reading: Reading) -> bool {
        // What only a request has, on a bare connection: not to be known.
        let unknown = reading == Reading::Wide;
        let conn = subject.conn;
        match self {
            Self::Header(matcher) => subject.head.map_or(unknown, |head| matcher.matches_under(head, reading)),
            Self::Authority(matcher) => {
                subject.head.map_or(unknown, |head| authority_matches(matcher, head.authority(), reading))
            }
            Self::Path(matcher) => subject.head.map_or(unknown, |head| matcher.matches(head)),
            Self::Template(template) => subject
                .head
                .map_or(unknown, |head| template.matches(crate::matcher::without_fragment(head.path_only()))),
            Self::Metadata(matcher) => matcher.matches(subject.metadata),
            Self::DestinationIp(range) => range.contains(conn.local.ip()),
            Self::DestinationPort(start, end) => (*start..*end).contains(&u32::from(conn.local.port())),
            Self::ServerName(matcher) => matcher.matches(conn.server_name.as_deref().unwrap_or_default().as_bytes()),
            Self::Authenticated(None) => subject.principal().is_some(),
            Self::Authenticated(Some(matcher)) => {
                subject.principal().is_some_and(|principal| matcher.matches(principal.as_bytes()))
            }
            Self::DirectRemoteIp(range) => range.contains(conn.direct_peer.ip()),
            Self::SourceIp(range) => range.contains(conn.peer_ip()),
            Self::RemoteIp(range) => range.contains(subject.remote),
        }
    }
}

/// Matches the authority without a trailing dot; widely also without the port.
fn authority_matches(matcher: &HeaderMatcher, authority: &[u8], reading: Reading) -> bool {
    let (host, port) = split_port(authority);
    let bare = host.strip_suffix(b".").unwrap_or(host);
    let mut full = bare.to_vec();
    full.extend_from_slice(port);
    let with_port = matcher.matches_value(Some(&full));
    match reading {
        Reading::Strict => with_port,
        Reading::Wide => with_port || matcher.matches_value(Some(bare)) || matcher.matches_value(Some(authority)),
    }
}

/// Host, and `:port` with its colon or nothing.
fn split_port(authority: &[u8]) -> (&[u8], &[u8]) {
    let digits = authority.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    match authority.len().checked_sub(digits + 1) {
        Some(colon) if authority[colon] == b':' => {
            let host = &authority[..colon];
            // A bare IPv6 address has colons and no brackets, hence no port.
            if host.contains(&b':') && !host.ends_with(b"]") { (authority, b"") } else { authority.split_at(colon) }
        }
        _ => (authority, b""),
    }
}

/// An RBAC filter: rules that are enforced, and rules that are only watched.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Rbac {
    rules: Option<Rules>,
    shadow: Option<Rules>,
    stat_prefix: Box<str>,
    shadow_prefix: Box<str>,
}

/// What an RBAC filter says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome<'a> {
    /// The enforced rules' verdict, if there are any.
    pub enforced: Option<Verdict<'a>>,
    /// The watched rules' verdict, if there are any.
    pub shadow: Option<Verdict<'a>>,
}

impl<'a> Outcome<'a> {
    /// The verdict that refuses, if one does.
    pub fn denied(&self) -> Option<Verdict<'a>> {
        self.enforced.filter(|verdict| !verdict.allowed)
    }

    /// Whether there are enforced rules, and they let it pass.
    pub fn is_allowed(&self) -> bool {
        self.enforced.is_some_and(|verdict| verdict.allowed)
    }
}

impl Rbac {
    /// Lowers the HTTP filter.
    pub fn lower(proto: &http::Rbac) -> Result<Self, Unsupported> {
        if proto.matcher.is_some() {
            return Err(Unsupported::not_built("matcher"));
        }
        if proto.shadow_matcher.is_some() {
            return Err(Unsupported::not_built("shadow_matcher"));
        }
        Ok(Self {
            rules: proto.rules.as_ref().map(Rules::lower).transpose().within("rules")?,
            shadow: proto.shadow_rules.as_ref().map(Rules::lower).transpose().within("shadow_rules")?,
            stat_prefix: proto.rules_stat_prefix.as_str().into(),
            shadow_prefix: proto.shadow_rules_stat_prefix.as_str().into(),
        })
    }

    /// Lowers a route's override; `None` switches the filter off.
    pub fn lower_per_route(proto: &http::RbacPerRoute) -> Result<Option<Self>, Unsupported> {
        proto.rbac.as_ref().map(Self::lower).transpose().within("rbac")
    }

    /// Lowers the network filter.
    pub fn lower_network(proto: &network::Rbac) -> Result<Self, Unsupported> {
        if proto.matcher.is_some() {
            return Err(Unsupported::not_built("matcher"));
        }
        if proto.shadow_matcher.is_some() {
            return Err(Unsupported::not_built("shadow_matcher"));
        }
        if proto.delay_deny.is_some() {
            return Err(Unsupported::not_built("delay_deny"));
        }
        match network::rbac::EnforcementType::try_from(proto.enforcement_type) {
            Ok(network::rbac::EnforcementType::OneTimeOnFirstByte) => {}
            // A connection is judged once, when it is there.
            Ok(network::rbac::EnforcementType::Continuous) => {
                return Err(Unsupported::not_built("enforcement_type CONTINUOUS"));
            }
            Err(_) => return Err(Unsupported::new("enforcement_type", "is unknown")),
        }
        Ok(Self {
            rules: proto.rules.as_ref().map(Rules::lower).transpose().within("rules")?,
            shadow: proto.shadow_rules.as_ref().map(Rules::lower).transpose().within("shadow_rules")?,
            stat_prefix: proto.stat_prefix.as_str().into(),
            shadow_prefix: proto.shadow_rules_stat_prefix.as_str().into(),
        })
    }

    /// The enforced rules.
    pub fn rules(&self) -> Option<&Rules> {
        self.rules.as_ref()
    }

    /// The watched rules.
    pub fn shadow_rules(&self) -> Option<&Rules> {
        self.shadow.as_ref()
    }

    /// Prefix of the statistics of enforced rules.
    pub fn stat_prefix(&self) -> &str {
        &self.stat_prefix
    }

    /// Prefix of the statistics and metadata of watched rules.
    pub fn shadow_prefix(&self) -> &str {
        &self.shadow_prefix
    }

    /// Decides.
    pub fn evaluate(&self, subject: &Subject<'_>) -> Outcome<'_> {
        Outcome {
            enforced: self.rules.as_ref().map(|rules| rules.decide(subject)),
            shadow: self.shadow.as_ref().map(|rules| rules.decide(subject)),
        }
    }

    /// Writes the watched rules' verdict where external authorization, logs and traces read it.
    pub fn record_shadow(&self, outcome: &Outcome<'_>, metadata: &mut Metadata) {
        let Some(verdict) = outcome.shadow else { return };
        let key = |name: &str| format!("{}{name}", self.shadow_prefix);
        if let Some(policy) = verdict.policy {
            metadata.set(METADATA, &key("shadow_effective_policy_id"), Arc::new(Value::String(policy.to_owned())));
        }
        let result = if verdict.allowed { "allowed" } else { "denied" };
        metadata.set(METADATA, &key("shadow_engine_result"), Arc::new(Value::String(result.to_owned())));
    }
}

#[cfg(test)]
#[expect(deprecated, reason = "Envoy's older fields, which control planes still write")]
mod tests;
