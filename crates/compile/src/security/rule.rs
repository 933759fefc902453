//! One rule of an AuthorizationPolicy, as an RBAC policy.
//!
//! `from` and the conditions on the caller become principals, `to` and the conditions on the
//! destination become permissions. Source: `docs/parity.md`, Security 8.2 to 8.6.
//!
//! **Invariants.** A rule that cannot be judged never grants: in a policy that refuses (DENY) or asks
//! (CUSTOM) it matches everything, in one that grants (ALLOW) nothing. On TCP an attribute of HTTP
//! drops a granting rule and widens a refusing one.

use std::fmt;

use api::security::{Condition, Operation, Rule, Source};
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal, permission, principal};
use envoy_types::pb::envoy::r#type::matcher::v3::{MetadataMatcher, StringMatcher};

use super::matchers::{self, HostScope, InvalidValue, Path, Wild, claim, quote, string_claim};

/// What happens to a request that matches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// ALLOW
    Grants,
    /// DENY
    Refuses,
    /// CUSTOM: somebody is asked, before tokens and peers are looked at.
    Asks,
}

/// What the filter sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Transport {
    /// Requests.
    Http,
    /// Connections.
    Tcp,
}

/// Facts that a rule is read with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope<'a> {
    /// The policy's namespace: of service accounts written without one.
    pub(crate) namespace: &'a str,
    /// The mesh's trust domain, then its aliases.
    pub(crate) trust_domains: &'a [String],
}

/// A value that keeps a rule from being judged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Problem {
    /// Path below the rule: `from[0].source.ipBlocks`.
    pub(crate) field: String,
    /// What is wrong there.
    pub(crate) what: InvalidValue,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.what)
    }
}

/// What became of a rule.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Compiled {
    /// `None`: the rule matches nothing on this transport.
    pub(crate) policy: Option<Policy>,
    /// Why it fails closed; empty when it does not.
    pub(crate) problems: Vec<Problem>,
}

/// Compiles one rule.
pub(crate) fn compile(rule: &Rule, verdict: Verdict, transport: Transport, scope: Scope<'_>) -> Compiled {
    let mut reader = Reader { verdict, transport, scope, has_http: false, problems: Vec::new() };
    let policy = reader.rule(rule);
    let policy = if reader.problems.is_empty() {
        // A granting rule that asks for what TCP does not have grants nothing there.
        (!(reader.has_http && transport == Transport::Tcp && verdict == Verdict::Grants)).then_some(policy)
    } else {
        (verdict != Verdict::Grants).then(everything)
    };
    Compiled { policy, problems: reader.problems }
}

/// The policy that matches everything.
pub(crate) fn everything() -> Policy {
    policy(vec![all_of(Vec::new())], vec![all_of(Vec::new())])
}

/// The policy that matches nothing: what an ALLOW policy without rules becomes.
pub(crate) fn nothing() -> Policy {
    policy(vec![Permission::any().negate()], vec![Principal::any().negate()])
}

fn policy(permissions: Vec<Permission>, principals: Vec<Principal>) -> Policy {
    Policy { permissions, principals, ..Policy::default() }
}

/// Permissions and principals are built alike.
trait Matcher: Sized {
    fn any() -> Self;
    fn all(parts: Vec<Self>) -> Self;
    fn either(parts: Vec<Self>) -> Self;
    fn negate(self) -> Self;
}

impl Matcher for Permission {
    fn any() -> Self {
        rule(permission::Rule::Any(true))
    }
    fn all(rules: Vec<Self>) -> Self {
        rule(permission::Rule::AndRules(permission::Set { rules }))
    }
    fn either(rules: Vec<Self>) -> Self {
        rule(permission::Rule::OrRules(permission::Set { rules }))
    }
    fn negate(self) -> Self {
        rule(permission::Rule::NotRule(Box::new(self)))
    }
}

impl Matcher for Principal {
    fn any() -> Self {
        id(principal::Identifier::Any(true))
    }
    fn all(ids: Vec<Self>) -> Self {
        id(principal::Identifier::AndIds(principal::Set { ids }))
    }
    fn either(ids: Vec<Self>) -> Self {
        id(principal::Identifier::OrIds(principal::Set { ids }))
    }
    fn negate(self) -> Self {
        id(principal::Identifier::NotId(Box::new(self)))
    }
}

fn rule(rule: permission::Rule) -> Permission {
    Permission { rule: Some(rule) }
}

fn id(identifier: principal::Identifier) -> Principal {
    Principal { identifier: Some(identifier) }
}

/// All parts; without parts, anything.
fn all_of<M: Matcher>(mut parts: Vec<M>) -> M {
    if parts.is_empty() {
        parts.push(M::any());
    }
    M::all(parts)
}

fn peer(name: StringMatcher) -> Principal {
    id(principal::Identifier::Authenticated(principal::Authenticated { principal_name: Some(name) }))
}

#[expect(deprecated, reason = "the newer sourced_metadata says the same, and Istio sends this one")]
fn payload(matcher: MetadataMatcher) -> Principal {
    id(principal::Identifier::Metadata(matcher))
}

/// How the alternatives of a field are put together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Always a set, even of one.
    Set,
    /// One alternative stands alone.
    Bare,
}

/// Whether a connection has the attribute.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layer {
    Any,
    HttpOnly,
}

/// One field and its `not` twin.
struct Field<'a> {
    path: String,
    values: &'a [String],
    not_values: &'a [String],
    layer: Layer,
    form: Form,
}

impl<'a> Field<'a> {
    fn new(path: &str, name: &str, values: &'a [String], not_values: &'a [String]) -> Self {
        let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        Self { path, values, not_values, layer: Layer::Any, form: Form::Set }
    }

    fn http(self) -> Self {
        Self { layer: Layer::HttpOnly, ..self }
    }

    fn bare(self) -> Self {
        Self { form: Form::Bare, ..self }
    }
}

/// One value of a field.
struct Value<'a> {
    text: &'a str,
    /// A match of this value leads to refusal or a question, so it had better match too much.
    refuses: bool,
}

struct Reader<'a> {
    verdict: Verdict,
    transport: Transport,
    scope: Scope<'a>,
    has_http: bool,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn rule(&mut self, rule: &Rule) -> Policy {
        let (mut base_permissions, mut base_principals) = (Vec::new(), Vec::new());
        for (index, condition) in rule.when.iter().enumerate() {
            self.condition(&format!("when[{index}]"), condition, &mut base_permissions, &mut base_principals);
        }
        let mut principals = Vec::new();
        for (index, from) in rule.from.iter().enumerate() {
            let path = format!("from[{index}].source");
            let mut parts = Vec::new();
            match from.source.as_ref().filter(|source| **source != Source::default()) {
                Some(source) => self.source(&path, source, &mut parts),
                None => self.problem(&path, InvalidValue::Empty),
            }
            parts.extend(base_principals.iter().cloned());
            principals.push(all_of(parts));
        }
        if rule.from.is_empty() {
            principals.push(all_of(base_principals));
        }
        let mut permissions = Vec::new();
        for (index, to) in rule.to.iter().enumerate() {
            let path = format!("to[{index}].operation");
            let mut parts = Vec::new();
            match to.operation.as_ref().filter(|operation| **operation != Operation::default()) {
                Some(operation) => self.operation(&path, operation, &mut parts),
                None => self.problem(&path, InvalidValue::Empty),
            }
            parts.extend(base_permissions.iter().cloned());
            permissions.push(all_of(parts));
        }
        if rule.to.is_empty() {
            permissions.push(all_of(base_permissions));
        }
        policy(permissions, principals)
    }

    fn problem(&mut self, field: &str, what: InvalidValue) {
        self.problems.push(Problem { field: field.to_owned(), what });
    }

    /// Appends the field's matchers: any of the values, and none of the others.
    fn field<M: Matcher>(
        &mut self,
        out: &mut Vec<M>,
        field: &Field<'_>,
        make: impl Fn(&Value<'_>) -> Result<Vec<M>, InvalidValue>,
    ) {
        if field.values.is_empty() && field.not_values.is_empty() {
            return;
        }
        let is_missing = field.layer == Layer::HttpOnly && self.transport == Transport::Tcp;
        self.has_http |= field.layer == Layer::HttpOnly;
        let grants = self.verdict == Verdict::Grants;
        for (values, negative) in [(field.values, false), (field.not_values, true)] {
            let mut alternatives = Vec::new();
            for text in values {
                let made = if text.is_empty() {
                    Err(InvalidValue::Empty)
                } else {
                    make(&Value { text, refuses: grants == negative })
                };
                match made {
                    Ok(made) => alternatives.extend(made),
                    Err(what) => self.problem(&field.path, what),
                }
            }
            if is_missing || alternatives.is_empty() {
                continue;
            }
            let matcher = if field.form == Form::Bare && alternatives.len() == 1 {
                alternatives.remove(0)
            } else {
                M::either(alternatives)
            };
            out.push(if negative { matcher.negate() } else { matcher });
        }
    }

    /// A field whose attribute a CUSTOM rule cannot know yet.
    fn known_later(&mut self, path: &str, what: &'static str, lists: [&[String]; 2]) {
        if self.verdict == Verdict::Asks && lists.iter().any(|list| !list.is_empty()) {
            self.problem(path, InvalidValue::TooEarly(what));
        }
    }

    fn source(&mut self, path: &str, source: &Source, out: &mut Vec<Principal>) {
        let s = source;
        self.principals(path, "principals", &s.principals, &s.not_principals, out);
        self.request_principals(path, "requestPrincipals", &s.request_principals, &s.not_request_principals, out);
        self.service_accounts(path, "serviceAccounts", &s.service_accounts, &s.not_service_accounts, out);
        self.trust_domains(path, "trustDomains", &s.trust_domains, &s.not_trust_domains, out);
        self.namespaces(path, "namespaces", &s.namespaces, &s.not_namespaces, out);
        self.remote_ip(path, "remoteIpBlocks", &s.remote_ip_blocks, &s.not_remote_ip_blocks, out);
        self.source_ip(path, "ipBlocks", &s.ip_blocks, &s.not_ip_blocks, out);
    }

    fn principals(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.known_later(path, "the caller's identity", [yes, no]);
        let domains = self.scope.trust_domains;
        self.field(out, &Field::new(path, name, yes, no), |value| {
            Ok(aliases_of_principal(value.text, domains).iter().map(|text| peer(principal_matcher(text))).collect())
        });
    }

    fn service_accounts(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.known_later(path, "the caller's service account", [yes, no]);
        let own = self.scope.namespace;
        self.field(out, &Field::new(path, name, yes, no), |value| {
            let (namespace, account) = value.text.split_once('/').unwrap_or((own, value.text));
            if namespace.is_empty() || account.is_empty() || account.contains('/') || value.text.contains('*') {
                return Err(InvalidValue::ServiceAccount(value.text.to_owned()));
            }
            Ok(vec![peer(matchers::regex(&identity_pattern("[^/]+", &quote(namespace), &quote(account))))])
        });
    }

    fn trust_domains(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.known_later(path, "the caller's trust domain", [yes, no]);
        let known = self.scope.trust_domains;
        self.field(out, &Field::new(path, name, yes, no), |value| {
            if value.text.contains('/') {
                return Err(InvalidValue::TrustDomain(value.text.to_owned()));
            }
            let is_ours =
                value.text == types::wellknown::DEFAULT_TRUST_DOMAIN || known.iter().any(|td| td == value.text);
            if is_ours && !known.is_empty() {
                return Ok(known.iter().map(|td| peer(matchers::prefix(&format!("spiffe://{td}/")))).collect());
            }
            Ok(vec![peer(match Wild::parse(value.text) {
                Wild::Any => matchers::regex("spiffe://.+"),
                Wild::Exact(td) => matchers::prefix(&format!("spiffe://{td}/")),
                Wild::Prefix(td) => matchers::prefix(&format!("spiffe://{td}")),
                Wild::Suffix(td) => matchers::regex(&format!("spiffe://[^/]*{}/.*", quote(td))),
            })])
        });
    }

    fn namespaces(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.known_later(path, "the caller's namespace", [yes, no]);
        self.field(out, &Field::new(path, name, yes, no), |value| {
            let namespace = quote(value.text).replace("\\*", "[^/]*");
            Ok(vec![peer(matchers::regex(&identity_pattern("[^/]+", &namespace, "[^/]+")))])
        });
    }

    fn request_principals(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.known_later(path, "the token's principal", [yes, no]);
        self.field(out, &Field::new(path, name, yes, no).http().bare(), |value| {
            let (issuer, subject) = request_principal(value.text);
            Ok(vec![Principal::all(vec![payload(string_claim("iss", issuer)), payload(string_claim("sub", subject))])])
        });
    }

    fn remote_ip(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.field(out, &Field::new(path, name, yes, no), |value| {
            Ok(vec![id(principal::Identifier::RemoteIp(matchers::cidr(value.text)?))])
        });
    }

    fn source_ip(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.field(out, &Field::new(path, name, yes, no), |value| {
            Ok(vec![id(principal::Identifier::DirectRemoteIp(matchers::cidr(value.text)?))])
        });
    }

    fn operation(&mut self, path: &str, operation: &Operation, out: &mut Vec<Permission>) {
        let o = operation;
        self.field(out, &Field::new(path, "hosts", &o.hosts, &o.not_hosts).http(), |value| {
            let scope = if value.refuses { HostScope::AnyPort } else { HostScope::AsWritten };
            Ok(vec![rule(permission::Rule::Header(matchers::host(value.text, scope)))])
        });
        self.field(out, &Field::new(path, "methods", &o.methods, &o.not_methods).http(), |value| {
            Ok(vec![rule(permission::Rule::Header(matchers::header(":method", value.text)))])
        });
        self.field(out, &Field::new(path, "paths", &o.paths, &o.not_paths).http(), |value| {
            Ok(vec![rule(match matchers::path(value.text)? {
                Path::Text(matcher) => permission::Rule::UrlPath(matcher),
                Path::Template(template) => permission::Rule::UriTemplate(template),
            })])
        });
        self.ports(path, "ports", &o.ports, &o.not_ports, out);
    }

    fn ports(&mut self, path: &str, name: &str, yes: &[String], no: &[String], out: &mut Vec<Permission>) {
        self.field(out, &Field::new(path, name, yes, no), |value| {
            Ok(vec![rule(permission::Rule::DestinationPort(matchers::port(value.text)?))])
        });
    }

    fn condition(
        &mut self,
        path: &str,
        condition: &Condition,
        permissions: &mut Vec<Permission>,
        principals: &mut Vec<Principal>,
    ) {
        let (yes, no) = (condition.values.as_slice(), condition.not_values.as_slice());
        let key = condition.key.as_str();
        if yes.is_empty() && no.is_empty() {
            return self.problem(path, InvalidValue::NoValues(key.to_owned()));
        }
        match key {
            "source.ip" => self.source_ip(path, "values", yes, no, principals),
            "remote.ip" => self.remote_ip(path, "values", yes, no, principals),
            "source.namespace" => self.namespaces(path, "values", yes, no, principals),
            "source.principal" => self.principals(path, "values", yes, no, principals),
            "source.serviceAccount" => self.service_accounts(path, "values", yes, no, principals),
            "source.trustDomain" => self.trust_domains(path, "values", yes, no, principals),
            "request.auth.principal" => self.request_principals(path, "values", yes, no, principals),
            "request.auth.audiences" => self.claim(path, &["aud"], yes, no, principals),
            "request.auth.presenter" => self.claim(path, &["azp"], yes, no, principals),
            "destination.ip" => self.field(permissions, &Field::new(path, "values", yes, no), |value| {
                Ok(vec![rule(permission::Rule::DestinationIp(matchers::cidr(value.text)?))])
            }),
            "destination.port" => self.ports(path, "values", yes, no, permissions),
            "connection.sni" => self.field(permissions, &Field::new(path, "values", yes, no), |value| {
                Ok(vec![rule(permission::Rule::RequestedServerName(Wild::parse(value.text).matcher()))])
            }),
            _ => self.keyed_condition(path, key, yes, no, principals),
        }
    }

    /// `request.headers[x]`, `request.auth.claims[a][b]`.
    fn keyed_condition(&mut self, path: &str, key: &str, yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        if let Some(parts) = key.strip_prefix("request.headers").and_then(matchers::bracketed)
            && let [name] = parts[..]
            && is_header_name(name)
        {
            let name = name.to_ascii_lowercase();
            return self.field(out, &Field::new(path, "values", yes, no).http(), |value| {
                Ok(vec![id(principal::Identifier::Header(matchers::header(&name, value.text)))])
            });
        }
        if let Some(parts) = key.strip_prefix("request.auth.claims").and_then(matchers::bracketed) {
            return self.claim(path, &parts, yes, no, out);
        }
        let what = if key.starts_with("experimental.envoy.filters.") {
            InvalidValue::NotYet(key.to_owned())
        } else {
            InvalidValue::Key(key.to_owned())
        };
        self.problem(path, what);
    }

    fn claim(&mut self, path: &str, parts: &[&str], yes: &[String], no: &[String], out: &mut Vec<Principal>) {
        self.known_later(path, "the token", [yes, no]);
        self.field(out, &Field::new(path, "values", yes, no).http().bare(), |value| {
            Ok(vec![payload(claim(parts, Wild::parse(value.text).matcher()))])
        });
    }
}

/// Letters, digits and the signs that a header's name may hold; a pseudo-header has its colon.
///
/// *Source*: RFC 9110 5.6.2; Envoy refuses a whole listener for another one.
fn is_header_name(name: &str) -> bool {
    let name = name.strip_prefix(':').unwrap_or(name);
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// A whole identity, its parts compared by position (property 17).
fn identity_pattern(domain: &str, namespace: &str, account: &str) -> String {
    format!("spiffe://{domain}/ns/{namespace}/sa/{account}")
}

/// `td/ns/x/sa/y`, `x*`, `*x`, `*`, over the peer's URI. Nothing but a SPIFFE URI is a principal.
fn principal_matcher(text: &str) -> StringMatcher {
    match Wild::parse(text) {
        Wild::Any => matchers::regex("spiffe://.+"),
        Wild::Exact(text) => matchers::exact(&format!("spiffe://{text}")),
        Wild::Prefix(text) => matchers::prefix(&format!("spiffe://{text}")),
        Wild::Suffix(text) => matchers::regex(&format!("spiffe://.*{}", quote(text))),
    }
}

/// `issuer/subject`, split at the last slash, since an issuer may be a URL.
fn request_principal(text: &str) -> (StringMatcher, StringMatcher) {
    let anything = || matchers::regex(".+");
    match (text, text.rsplit_once('/')) {
        ("*", _) => (anything(), anything()),
        (_, Some((issuer, subject))) => {
            let issuer = match issuer.strip_prefix('*') {
                Some("") => anything(),
                Some(rest) => matchers::suffix(rest),
                None => matchers::exact(issuer),
            };
            let subject = match (text.starts_with('*'), subject.strip_suffix('*')) {
                (false, Some("")) => anything(),
                (false, Some(rest)) => matchers::prefix(rest),
                _ => matchers::exact(subject),
            };
            (issuer, subject)
        }
        // Without a slash only a wildcard can match `issuer/subject`.
        (_, None) => match Wild::parse(text) {
            Wild::Suffix(rest) => (anything(), matchers::suffix(rest)),
            Wild::Prefix(rest) => (matchers::prefix(rest), anything()),
            // No token has an empty issuer: nothing matches.
            Wild::Any | Wild::Exact(_) => (matchers::exact(""), matchers::exact(text)),
        },
    }
}

/// A principal under every name of its trust domain.
///
/// *Source*: `docs/parity.md`, Security 8.8.
fn aliases_of_principal(text: &str, trust_domains: &[String]) -> Vec<String> {
    let parts: Vec<&str> = text.split('/').collect();
    let (Some(&domain), 5) = (parts.first(), parts.len()) else {
        return vec![text.to_owned()];
    };
    let covers = |known: &str| match domain.strip_prefix('*') {
        Some(end) => known.ends_with(end),
        None => known == domain,
    };
    let is_ours = domain == types::wellknown::DEFAULT_TRUST_DOMAIN || trust_domains.iter().any(|known| covers(known));
    if domain == "*" || !is_ours || trust_domains.is_empty() {
        return vec![text.to_owned()];
    }
    let path = parts[1..].join("/");
    let mut out: Vec<String> = Vec::new();
    for known in trust_domains {
        // `*-td` already covers the domains that end so.
        let alias = if domain.starts_with('*') && covers(known) { text.to_owned() } else { format!("{known}/{path}") };
        if !out.contains(&alias) {
            out.push(alias);
        }
    }
    out
}

#[cfg(test)]
#[path = "rule_tests.rs"]
mod tests;
