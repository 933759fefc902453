//! Route tables, as the runtime holds them, and the choice of a route.
//!
//! *Source*: Envoy's route configuration: the host chooses the virtual host (exact, longest suffix
//! wildcard, longest prefix wildcard, any), then its first route that matches wins.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use types::RequestHead;

use crate::config::Name;
use crate::cors::CorsPolicy;
use crate::draw::scale;
use crate::fault::Fault;
use crate::headers::HeaderEdits;
use crate::matcher::{HeaderMatcher, Metadata, MetadataMatcher, QueryMatcher, UriTemplate};
use crate::record::Provenance;
use crate::regex::{Regex, Rewrite};
use crate::retry::RetryPolicy;
use crate::unsupported::Unsupported;

mod hosts;

pub use hosts::HostIndex;

/// One route table.
#[derive(Debug)]
pub struct RouteTable {
    /// Its name.
    pub name: Name,
    /// Virtual hosts in order.
    pub virtual_hosts: Vec<VirtualHost>,
    /// Finds them by host.
    pub hosts: HostIndex,
    /// A port in the host does not count.
    pub ignore_port: bool,
    /// Edits of the whole table.
    pub edits: Edits,
    /// Specific edits come last (and win) instead of first.
    pub most_specific_wins: bool,
    /// Settings of filters.
    pub overrides: Overrides,
    /// Headers removed from requests that are not internal.
    pub internal_only_headers: Vec<Box<str>>,
    /// Mirrors of routes without their own.
    pub mirrors: Vec<MirrorPolicy>,
    /// The objects that made it.
    pub provenance: Arc<Provenance>,
    /// Tells one version from another.
    pub fingerprint: u64,
}

impl RouteTable {
    /// Names of the clusters that its requests go to, as often as they are named. (Copies, and names that requests
    /// bring along, aside.)
    pub fn clusters(&self) -> impl Iterator<Item = &Name> {
        let routes = self.virtual_hosts.iter().flat_map(|host| &host.routes);
        routes.flat_map(|route| {
            let (one, several) = match &route.action {
                Action::Forward(forward) => match &forward.target {
                    Target::Cluster(name) => (Some(name), &[][..]),
                    Target::Weighted { clusters, .. } => (None, &clusters[..]),
                    Target::Header(_) => (None, &[][..]),
                },
                Action::Redirect(_) | Action::Direct(_) => (None, &[][..]),
            };
            one.into_iter().chain(several.iter().map(|choice| &choice.name))
        })
    }
}

/// Edits of request and response heads at one level.
#[derive(Debug, Default)]
pub struct Edits {
    /// Request.
    pub request: HeaderEdits,
    /// Response.
    pub response: HeaderEdits,
}

/// One virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Its name.
    pub name: Name,
    /// Domains as written, lower case.
    pub domains: Vec<Box<str>>,
    /// Routes; the first that matches wins.
    pub routes: Vec<Route>,
    /// Plain HTTP is redirected to HTTPS.
    pub require_tls: RequireTls,
    /// Edits of all its routes.
    pub edits: Edits,
    /// Settings of filters.
    pub overrides: Overrides,
    /// `x-envoy-attempt-count` goes upstream.
    pub attempt_count: bool,
    /// `x-envoy-attempt-count` goes downstream.
    pub attempt_count_in_response: bool,
    /// Retries of routes without their own.
    pub retry: Option<Arc<RetryPolicy>>,
    /// Bytes kept for a retry.
    pub replay_bytes_max: Option<u32>,
    /// Mirrors of routes without their own.
    pub mirrors: Vec<MirrorPolicy>,
    /// The objects that made it.
    pub provenance: Arc<Provenance>,
}

/// Whether a virtual host wants TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequireTls {
    /// No.
    None,
    /// From clients that are not internal.
    ExternalOnly,
    /// Always.
    All,
}

/// One route.
#[derive(Debug)]
pub struct Route {
    /// Its name; may be empty.
    pub name: Name,
    /// When it is taken.
    pub matches: RouteMatch,
    /// What it does.
    pub action: Action,
    /// Edits.
    pub edits: Edits,
    /// Settings of filters.
    pub overrides: Overrides,
    /// The decorator's operation.
    pub operation: Option<Name>,
    /// Bytes kept for a retry.
    pub replay_bytes_max: Option<u32>,
    /// The objects that made it.
    pub provenance: Arc<Provenance>,
}

/// When a route is taken: everything must hold.
#[derive(Debug)]
pub struct RouteMatch {
    /// The path, without query.
    pub path: PathMatch,
    /// Headers and pseudo-headers.
    pub headers: Vec<HeaderMatcher>,
    /// Query parameters.
    pub query: Vec<QueryMatcher>,
    /// What filters wrote.
    pub metadata: Vec<MetadataMatcher>,
    /// A share of the requests.
    pub fraction: Option<Fraction>,
    /// gRPC requests only.
    pub grpc: bool,
}

/// How a path is compared.
#[derive(Debug)]
pub enum PathMatch {
    /// It begins so.
    Prefix(Box<[u8]>),
    /// It begins so, in any case.
    PrefixIgnoreCase(Box<[u8]>),
    /// It is so.
    Exact(Box<[u8]>),
    /// It is so, in any case.
    ExactIgnoreCase(Box<[u8]>),
    /// It begins so, in whole segments; without the slash at the end.
    Separated(Box<[u8]>, bool),
    /// It matches from end to end.
    Regex(Regex),
    /// It fits the template.
    Template(UriTemplate),
    /// The method is CONNECT.
    Connect,
}

/// A share of a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fraction {
    /// So many
    pub numerator: u32,
    /// of so many.
    pub denominator: u32,
}

impl Fraction {
    /// Lowers Envoy's message.
    pub fn lower(proto: &FractionalPercent) -> Result<Self, Unsupported> {
        let denominator = match DenominatorType::try_from(proto.denominator) {
            Ok(DenominatorType::Hundred) => 100,
            Ok(DenominatorType::TenThousand) => 10_000,
            Ok(DenominatorType::Million) => 1_000_000,
            Err(_) => return Err(Unsupported::new("denominator", "is not known")),
        };
        Ok(Self { numerator: proto.numerator, denominator })
    }

    /// It is everything.
    pub fn is_whole(self) -> bool {
        self.numerator >= self.denominator
    }

    /// Whether this draw is among them.
    pub fn holds(self, draw: u64) -> bool {
        scale(draw, self.denominator.into()) < u64::from(self.numerator)
    }

    /// From 0 to 1.
    pub fn share(self) -> f64 {
        (f64::from(self.numerator) / f64::from(self.denominator.max(1))).min(1.0)
    }
}

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Sends the request on.
    Forward(Box<Forward>),
    /// Redirects the client.
    Redirect(Box<Redirect>),
    /// Answers.
    Direct(Direct),
}

/// A fixed answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Direct {
    /// Status.
    pub status: u16,
    /// Body; `text/plain` unless a response edit says otherwise.
    pub body: Bytes,
}

/// A redirect.
#[derive(Debug)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// `None`: the request's.
    pub scheme: Option<Box<str>>,
    /// Empty: the request's.
    pub host: Box<str>,
    /// 0: none of its own.
    pub port: u16,
    /// Path.
    pub path: RedirectPath,
    /// The query is dropped.
    pub strip_query: bool,
}

/// The path of a redirect.
#[derive(Debug)]
pub enum RedirectPath {
    /// The request's.
    Keep,
    /// This one; with its own query if it has one.
    Path(Box<str>),
    /// In place of the matched prefix.
    Prefix(Box<str>),
    /// By regex.
    Regex(Rewrite),
}

/// Where requests go and how.
#[derive(Debug)]
pub struct Forward {
    /// Where to.
    pub target: Target,
    /// Status when there is no such cluster.
    pub not_found_status: u16,
    /// The path upstream.
    pub path: PathRewrite,
    /// The host upstream.
    pub host: HostRewrite,
    /// `x-forwarded-host` is appended on host rewrites.
    pub append_x_forwarded_host: bool,
    /// From the end of the request to the end of the response; `None`: no limit.
    pub timeout: Option<Duration>,
    /// Overrides the connection manager's stream idle time-out; `Some(None)`: none.
    pub idle_timeout: Option<Option<Duration>>,
    /// `grpc-timeout` counts, capped by this; a cap of zero is none.
    pub grpc_timeout_max: Option<Duration>,
    /// A stream's whole life.
    pub stream_duration: Option<StreamDuration>,
    /// Retries.
    pub retry: Option<Arc<RetryPolicy>>,
    /// Copies.
    pub mirrors: Vec<MirrorPolicy>,
    /// Keys for consistent hashing.
    pub hash: Vec<HashPolicy>,
    /// Upgrades switched on or off against the connection manager's list, lower case.
    pub upgrades: Vec<(Box<str>, bool)>,
}

/// Life of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StreamDuration {
    /// In all; `None`: no limit.
    pub max: Option<Duration>,
    /// `grpc-timeout` counts, capped by this; a cap of zero is none.
    pub grpc_timeout_max: Option<Duration>,
}

/// Where to.
#[derive(Debug)]
pub enum Target {
    /// One cluster.
    Cluster(Name),
    /// One of several, by weight.
    Weighted {
        /// Choices.
        clusters: Vec<WeightedCluster>,
        /// Sum of the weights, more than 0.
        total: u64,
    },
    /// The cluster that this request header names.
    Header(Box<str>),
}

/// A weighted choice.
#[derive(Debug)]
pub struct WeightedCluster {
    /// The cluster.
    pub name: Name,
    /// Its weight.
    pub weight: u32,
    /// Edits.
    pub edits: Edits,
    /// Settings of filters.
    pub overrides: Overrides,
    /// Host upstream; overrides the route's.
    pub host: Option<Box<str>>,
}

/// What happens to the path upstream.
#[derive(Debug)]
pub enum PathRewrite {
    /// Nothing.
    Keep,
    /// In place of the matched prefix (or whole path).
    Prefix(Box<str>),
    /// By regex, the query aside.
    Regex(Rewrite),
}

/// What happens to the host upstream.
#[derive(Debug)]
pub enum HostRewrite {
    /// Nothing.
    Keep,
    /// This one.
    Literal(Box<str>),
    /// The endpoint's name.
    Auto,
    /// What this header says.
    Header(Box<str>),
}

/// A copy to another cluster.
#[derive(Debug)]
pub struct MirrorPolicy {
    /// Where to.
    pub cluster: Name,
    /// A share of the requests; `None`: all.
    pub fraction: Option<Fraction>,
    /// `-shadow` is appended to the host.
    pub shadow_suffix: bool,
}

/// A key for consistent hashing.
#[derive(Debug)]
pub struct HashPolicy {
    /// What is hashed.
    pub source: HashSource,
    /// If it gives a hash, the ones after it do not count.
    pub terminal: bool,
}

/// What is hashed.
#[derive(Debug)]
pub enum HashSource {
    /// A header.
    Header(Box<str>),
    /// A cookie; with a ttl it is made when absent.
    Cookie {
        /// Name.
        name: Box<str>,
        /// `Some`: made when absent; zero is a session cookie.
        ttl: Option<Duration>,
        /// Path of a cookie made.
        path: Box<str>,
        /// Attributes of a cookie made.
        attributes: Vec<(Box<str>, Box<str>)>,
    },
    /// The peer's address.
    SourceIp,
    /// A query parameter.
    Query(Box<str>),
}

/// Settings of filters at one level, by the filter's name.
#[derive(Debug, Default)]
pub struct Overrides(pub Vec<(Box<str>, Override)>);

impl Overrides {
    /// The setting for the filter called `name`.
    pub fn get(&self, name: &str) -> Option<&Override> {
        self.0.iter().find(|(filter, _)| **filter == *name).map(|(_, setting)| setting)
    }
}

/// A setting of one filter.
#[derive(Debug)]
pub enum Override {
    /// It does not run.
    Disabled,
    /// It runs although switched off in the list.
    Enabled,
    /// Faults.
    Fault(Box<Fault>),
    /// CORS.
    Cors(Box<CorsPolicy>),
    /// Policy; `None` switches it off.
    Rbac(Option<Box<crate::authz::Rbac>>),
    /// Tokens.
    Jwt(crate::jwt::PerRoute),
    /// External authorization.
    ExtAuthz(crate::ext_authz::PerRoute),
    /// Edits of heads, query and trailers.
    HeaderMutation(Box<crate::header_mutation::Mutations>),
}

/// What a request found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Index of the virtual host.
    pub virtual_host: usize,
    /// Index of the route in it.
    pub route: Option<usize>,
}

impl RouteTable {
    /// Chooses virtual host and route; `None` if no virtual host takes the host.
    ///
    /// *Cost*: a hash look-up for the host and one pass over its routes; no allocation.
    pub fn choose(&self, head: &RequestHead, metadata: &Metadata, draw: u64) -> Option<Choice> {
        let host = head.authority();
        let host = if self.ignore_port { without_port(host) } else { host };
        let virtual_host = self.hosts.find(host)?;
        let routes = &self.virtual_hosts[virtual_host].routes;
        let route = routes.iter().position(|route| route.matches.holds(head, metadata, draw));
        Some(Choice { virtual_host, route })
    }
}

/// The host without a port; a bare IPv6 address in brackets keeps them.
pub fn without_port(host: &[u8]) -> &[u8] {
    match host.iter().rposition(|b| *b == b':') {
        Some(colon)
            if !host[colon..].contains(&b']')
                && host[colon + 1..].iter().all(u8::is_ascii_digit)
                && (host.first() == Some(&b'[') || !host[..colon].contains(&b':')) =>
        {
            &host[..colon]
        }
        _ => host,
    }
}

impl RouteMatch {
    /// Whether a request fits. `draw` is the request's one draw for shares of traffic.
    pub fn holds(&self, head: &RequestHead, metadata: &Metadata, draw: u64) -> bool {
        let connect = head.method() == "CONNECT";
        let path = match &self.path {
            PathMatch::Connect => connect,
            path => !connect && path.holds(head.path_only()),
        };
        path && self.headers.iter().all(|matcher| matcher.matches(head))
            && self.query.iter().all(|matcher| matcher.matches(head.query()))
            && (!self.grpc || head.is_grpc())
            && self.fraction.is_none_or(|fraction| fraction.holds(draw))
            && self.metadata.iter().all(|matcher| matcher.matches(metadata))
    }
}

impl std::fmt::Display for PathMatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |bytes: &[u8]| format!("{:?}", String::from_utf8_lossy(bytes));
        match self {
            Self::Prefix(prefix) => write!(f, "prefix {}", text(prefix)),
            Self::PrefixIgnoreCase(prefix) => write!(f, "prefix {} in any case", text(prefix)),
            Self::Exact(exact) => f.write_str(&text(exact)),
            Self::ExactIgnoreCase(exact) => write!(f, "{} in any case", text(exact)),
            Self::Separated(prefix, true) => write!(f, "whole segments {}", text(prefix)),
            Self::Separated(prefix, false) => write!(f, "whole segments {} in any case", text(prefix)),
            Self::Regex(regex) => write!(f, "regex {:?}", regex.as_str()),
            Self::Template(_) => f.write_str("a template"),
            Self::Connect => f.write_str("CONNECT"),
        }
    }
}

fn starts_with_ignore_case(path: &[u8], prefix: &[u8]) -> bool {
    path.len() >= prefix.len() && path[..prefix.len()].eq_ignore_ascii_case(prefix)
}

impl PathMatch {
    /// Whether a path without query fits. `Connect` never does.
    pub fn holds(&self, path: &[u8]) -> bool {
        match self {
            Self::Prefix(prefix) => path.starts_with(prefix),
            Self::PrefixIgnoreCase(prefix) => starts_with_ignore_case(path, prefix),
            Self::Exact(exact) => path == &**exact,
            Self::ExactIgnoreCase(exact) => path.eq_ignore_ascii_case(exact),
            Self::Separated(prefix, case_sensitive) => {
                let begins =
                    if *case_sensitive { path.starts_with(prefix) } else { starts_with_ignore_case(path, prefix) };
                begins && matches!(path.get(prefix.len()), None | Some(b'/'))
            }
            Self::Regex(regex) => regex.is_match(path),
            Self::Template(template) => template.matches(path),
            Self::Connect => false,
        }
    }

    /// How much of `path` a prefix rewrite replaces, given that it fits.
    pub fn matched_len(&self, path: &[u8]) -> usize {
        match self {
            Self::Prefix(prefix) | Self::PrefixIgnoreCase(prefix) | Self::Separated(prefix, _) => prefix.len(),
            Self::Exact(_) | Self::ExactIgnoreCase(_) | Self::Regex(_) | Self::Template(_) => path.len(),
            Self::Connect => 0,
        }
    }
}
