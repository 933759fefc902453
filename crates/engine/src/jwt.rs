//! Envoy's `jwt_authn` filter: who vouches for the caller.
//!
//! ```text
//! rule by path ► tokens of every location ► issuer, times, audience, signature ► requirement tree
//!                                                                              ► effects on the request
//! ```
//!
//! A request without a token passes where the tree lets it; a token that is there must be valid,
//! on every path: every token found at a place that some provider of the rule reads must be accepted
//! by one of them, even if the tree is satisfied without it (property 14). Headers that claims are
//! written to are the proxy's alone: a client's copy is removed first (property 13).
//!
//! *Source*: Envoy, "JWT Authentication"; `docs/parity.md`, Security 9.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3 as pb;
use serde_json::Value;
use types::{Cause, RequestHead};

use crate::matcher::{HeaderMatcher, Metadata, QueryMatcher, StringMatcher};
use crate::regex::Regex;
use crate::unsupported::{Unsupported, Within as _, duration, each};

mod keys;
mod locate;
mod token;

pub use keys::KeySet;
use locate::Location;
use token::Token;
pub use token::TokenCache;

/// The filter whose dynamic metadata carries verified payloads.
pub const METADATA: &str = "envoy.filters.http.jwt_authn";

/// Envoy's tolerance of clocks, in seconds.
const CLOCK_SKEW: u64 = 60;

/// Why a token is refused: the cause, and the text Envoy says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Refusal {
    cause: Cause,
    text: &'static str,
}

macro_rules! refusals {
    ($($name:ident = ($cause:ident, $text:literal),)*) => {
        impl Refusal { $(pub(crate) const $name: Self = Self { cause: Cause::$cause, text: $text };)* }
    };
}

refusals! {
    MISSING = (JwtMissing, "Jwt is missing"),
    BAD_FORMAT = (JwtBadFormat, "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
    HEADER_BASE64 = (JwtMalformed, "Jwt header is an invalid Base64url encoded"),
    HEADER_JSON = (JwtMalformed, "Jwt header is an invalid JSON"),
    HEADER_ALG = (JwtMalformed, "Jwt header [alg] field is required and must be a string"),
    HEADER_KID = (JwtMalformed, "Jwt header [kid] field is not a string"),
    ALG_NOT_SUPPORTED = (JwtBadAlgorithm, "Jwt header [alg] is not supported"),
    CRITICAL = (JwtBadSignature, "Jwt verification fails"),
    PAYLOAD_BASE64 = (JwtMalformed, "Jwt payload is an invalid Base64url encoded"),
    PAYLOAD_JSON = (JwtMalformed, "Jwt payload is an invalid JSON"),
    ISS = (JwtMalformed, "Jwt payload [iss] field is not a string"),
    SUB = (JwtMalformed, "Jwt payload [sub] field is not a string"),
    IAT = (JwtMalformed, "Jwt payload [iat] field is not an integer"),
    NBF = (JwtMalformed, "Jwt payload [nbf] field is not an integer"),
    EXP = (JwtMalformed, "Jwt payload [exp] field is not an integer"),
    JTI = (JwtMalformed, "Jwt payload [jti] field is not a string"),
    AUD = (JwtMalformed, "Jwt payload [aud] field is not a string or string list"),
    SIGNATURE_BASE64 = (JwtMalformed, "Jwt signature is an invalid Base64url encoded"),
    UNKNOWN_ISSUER = (JwtUnknownIssuer, "Jwt issuer is not configured"),
    NOT_YET_VALID = (JwtNotYetValid, "Jwt not yet valid"),
    EXPIRED = (JwtExpired, "Jwt is expired"),
    NO_EXPIRATION = (JwtExpired, "Jwt is missing exp or nbf or iat"),
    WRONG_AUDIENCE = (JwtWrongAudience, "Audiences in Jwt are not allowed"),
    WRONG_SUBJECT = (JwtBadSignature, "Subject in Jwt is not allowed"),
    BAD_SIGNATURE = (JwtBadSignature, "Jwt verification fails"),
    NO_KEY = (JwtNoKey, "Jwks doesn't have key to match kid or alg from Jwt"),
    KEYS_INVALID = (JwksUnavailable, "Jwks is an invalid JSON"),
    KEYS_NONE_VALID = (JwksUnavailable, "Jwks doesn't have any valid public key"),
    TOO_MANY = (JwtTooMany, "Jwt verification fails"),
}

impl Refusal {
    /// How much it tells: of several, the one that tells most is given.
    fn rank(self) -> u8 {
        match self.cause {
            Cause::JwtMissing => 0,
            Cause::JwtUnknownIssuer => 1,
            _ => 2,
        }
    }

    fn better(self, other: Self) -> Self {
        if other.rank() > self.rank() { other } else { self }
    }
}

/// One issuer's rules.
#[derive(Clone, PartialEq, Debug)]
struct Provider {
    issuer: Box<str>,
    audiences: Vec<Box<str>>,
    subjects: Option<StringMatcher>,
    require_expiration: bool,
    lifetime_max: Option<u64>,
    locations: Vec<Location>,
    forward: bool,
    payload_header: Option<Box<str>>,
    pad_payload: bool,
    payload_key: Option<Box<str>>,
    header_key: Option<Box<str>>,
    space_delimited: Vec<Box<str>>,
    skew: u64,
    claim_headers: Vec<(Box<str>, Vec<Box<str>>)>,
    clear_route_cache: bool,
    keys: Arc<KeySet>,
}

/// What a request must show.
#[derive(Clone, PartialEq, Debug)]
enum Requirement {
    /// A valid token of this provider, for these audiences if they are given.
    Provider(usize, Option<Vec<Box<str>>>),
    Any(Vec<Requirement>),
    All(Vec<Requirement>),
    AllowMissing,
}

/// Which requests, and what they must show (`None`: nothing).
#[derive(Clone, PartialEq, Debug)]
struct Rule {
    path: PathRule,
    headers: Vec<HeaderMatcher>,
    query: Vec<QueryMatcher>,
    requires: Option<Requirement>,
}

#[derive(Clone, PartialEq, Debug)]
enum PathRule {
    Prefix(Box<str>, bool),
    Exact(Box<str>, bool),
    SeparatedPrefix(Box<str>, bool),
    Regex(Regex),
}

/// The filter's settings.
#[derive(Clone, PartialEq, Debug)]
pub struct JwtFilter {
    /// Sorted by name.
    providers: Vec<Provider>,
    rules: Vec<Rule>,
    named: BTreeMap<Box<str>, Requirement>,
    bypass_preflight: bool,
    strip_failure: bool,
    /// Prefix of its statistics.
    pub stat_prefix: Box<str>,
}

/// A route's override.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PerRoute {
    /// Nothing is asked.
    Disabled,
    /// The requirement of this name.
    Requirement(Box<str>),
}

impl PerRoute {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::PerRouteConfig) -> Result<Self, Unsupported> {
        use pb::per_route_config::RequirementSpecifier;
        match proto.requirement_specifier.as_ref().ok_or_else(|| Unsupported::missing("requirement_specifier"))? {
            RequirementSpecifier::Disabled(true) => Ok(Self::Disabled),
            RequirementSpecifier::Disabled(false) => Err(Unsupported::new("disabled", "must be true")),
            RequirementSpecifier::RequirementName(name) => Ok(Self::Requirement(name.as_str().into())),
        }
    }
}

/// What judging a token may read.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// Seconds since the epoch.
    pub now: u64,
    /// The worker's memory of good signatures.
    pub cache: &'a RefCell<TokenCache>,
}

/// A request that may go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Passed {
    /// Tokens that were accepted.
    pub tokens: u32,
    /// The route is to be chosen again, now that claims are known.
    pub clear_route_cache: bool,
}

/// A request that is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Denied {
    /// Why. Its status is the answer's.
    pub cause: Cause,
    /// Body of the answer.
    pub body: &'static str,
    /// `www-authenticate` of a 401.
    pub www_authenticate: Option<String>,
    /// `%RESPONSE_CODE_DETAILS%`
    pub details: String,
}

/// A token found in a request.
struct Found {
    provider: usize,
    location: usize,
    text: String,
    /// Accepted but for the audience, which depends on who asks.
    judged: Result<Arc<Token>, Refusal>,
}

impl JwtFilter {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::JwtAuthentication) -> Result<Self, Unsupported> {
        if proto.filter_state_rules.is_some() {
            return Err(Unsupported::not_built("filter_state_rules"));
        }
        let mut named: Vec<_> = proto.providers.iter().collect();
        named.sort_by(|a, b| a.0.cmp(b.0));
        let providers = named
            .iter()
            .map(|(name, provider)| Provider::lower(provider).within(&format!("providers[{name}]")))
            .collect::<Result<_, _>>()?;
        let index: HashMap<&str, usize> =
            named.iter().enumerate().map(|(index, (name, _))| (name.as_str(), index)).collect();
        let requirements = proto.requirement_map.iter().collect::<BTreeMap<_, _>>();
        let named = requirements
            .into_iter()
            .map(|(name, proto)| {
                let lowered = Requirement::lower(proto, &index).within(&format!("requirement_map[{name}]"))?;
                Ok((name.as_str().into(), lowered))
            })
            .collect::<Result<BTreeMap<_, _>, Unsupported>>()?;
        Ok(Self {
            providers,
            rules: each(&proto.rules, "rules", |rule| Rule::lower(rule, &index, &named))?,
            named,
            bypass_preflight: proto.bypass_cors_preflight,
            strip_failure: proto.strip_failure_response,
            stat_prefix: proto.stat_prefix.as_str().into(),
        })
    }

    /// Judges a request. One that passes has its tokens and claim headers as configured, and its
    /// verified payloads in `metadata`.
    pub fn authenticate(
        &self,
        head: &mut RequestHead,
        metadata: &mut Metadata,
        by_route: Option<&PerRoute>,
        env: &Env<'_>,
    ) -> Result<Passed, Box<Denied>> {
        // Before claim headers are cleaned: a token may arrive in one.
        let requirement = match by_route {
            Some(PerRoute::Disabled) => None,
            Some(PerRoute::Requirement(name)) => match self.named.get(name) {
                Some(requirement) => Some(requirement),
                // A name nobody knows cannot be met.
                None => return Err(Box::new(self.denied(Refusal::MISSING, head))),
            },
            None => self.rules.iter().find(|rule| rule.matches(head)).and_then(|rule| rule.requires.as_ref()),
        };
        let Some(requirement) = requirement.filter(|_| !(self.bypass_preflight && is_preflight(head))) else {
            self.clean(head);
            return Ok(Passed::default());
        };
        let mut asked = Vec::new();
        requirement.providers(&mut asked);
        if asked.is_empty() {
            asked.extend((0..self.providers.len()).map(|provider| (provider, None)));
        }
        let found = self.find(head, &asked, env);
        self.clean(head);
        let met = requirement.met(self, &found).and_then(|()| self.each_accepted(&found, &asked));
        match met {
            Ok(()) => Ok(self.accept(&found, &asked, head, metadata)),
            Err(refusal) => Err(Box::new(self.denied(refusal, head))),
        }
    }

    /// Every token at every place the asked providers read.
    fn find(&self, head: &RequestHead, asked: &[(usize, Option<&[Box<str>]>)], env: &Env<'_>) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::new();
        for (index, _) in asked {
            if found.iter().any(|known| known.provider == *index) {
                continue;
            }
            let provider = &self.providers[*index];
            for (location, place) in provider.locations.iter().enumerate() {
                for text in place.tokens(head) {
                    let judged = provider.judge(&text, env);
                    found.push(Found { provider: *index, location, text, judged });
                }
            }
        }
        found
    }

    /// Whether one of the asked providers accepts every token found.
    fn each_accepted(&self, found: &[Found], asked: &[(usize, Option<&[Box<str>]>)]) -> Result<(), Refusal> {
        for token in found {
            let place = &self.providers[token.provider].locations[token.location];
            let same = |other: &&Found| {
                other.text == token.text && self.providers[other.provider].locations[other.location] == *place
            };
            let mut refusal = Refusal::UNKNOWN_ISSUER;
            let accepted = found.iter().filter(same).any(|other| match self.accepts(other, asked) {
                Ok(()) => true,
                Err(bad) => {
                    refusal = refusal.better(bad);
                    false
                }
            });
            if !accepted {
                let others = found.iter().any(|other| other.judged.is_ok());
                return Err(if others {
                    Refusal { cause: Refusal::TOO_MANY.cause, text: refusal.text }
                } else {
                    refusal
                });
            }
        }
        Ok(())
    }

    /// Whether a token is good for any of the audiences its provider is asked for.
    fn accepts(&self, token: &Found, asked: &[(usize, Option<&[Box<str>]>)]) -> Result<(), Refusal> {
        let verified = token.judged.as_ref().map_err(|refusal| *refusal)?;
        let mut result = Err(Refusal::WRONG_AUDIENCE);
        for (_, audiences) in asked.iter().filter(|(provider, _)| *provider == token.provider) {
            result = verified.check_audience(audiences.unwrap_or(&self.providers[token.provider].audiences));
            if result.is_ok() {
                break;
            }
        }
        result
    }

    /// Removes what only the proxy may write.
    fn clean(&self, head: &mut RequestHead) {
        for provider in &self.providers {
            if let Some(name) = &provider.payload_header {
                head.fields.remove(name);
            }
            for (name, _) in &provider.claim_headers {
                head.fields.remove(name);
            }
        }
    }

    fn accept(
        &self,
        found: &[Found],
        asked: &[(usize, Option<&[Box<str>]>)],
        head: &mut RequestHead,
        metadata: &mut Metadata,
    ) -> Passed {
        let mut passed = Passed::default();
        let accepted: Vec<_> = found.iter().filter(|token| self.accepts(token, asked).is_ok()).collect();
        // The first provider that accepts a token at a place says whether it stays there. All go before anything is
        // written: a claim may be written where a token came from.
        let mut settled: Vec<(&str, &Location)> = Vec::new();
        for token in &accepted {
            let provider = &self.providers[token.provider];
            let place = &provider.locations[token.location];
            if settled.contains(&(token.text.as_str(), place)) {
                continue;
            }
            settled.push((&token.text, place));
            if !provider.forward {
                place.clear(head);
            }
        }
        // The first provider that accepts a token speaks for it.
        let mut spoken_for: Vec<&str> = Vec::new();
        for token in accepted {
            let Ok(verified) = &token.judged else { continue };
            if spoken_for.contains(&token.text.as_str()) {
                continue;
            }
            spoken_for.push(&token.text);
            let provider = &self.providers[token.provider];
            passed.tokens += 1;
            passed.clear_route_cache |= provider.clear_route_cache;
            provider.write(verified, head, metadata);
        }
        passed
    }

    fn denied(&self, refusal: Refusal, head: &RequestHead) -> Denied {
        const PATH_MAX: usize = 256;
        let www_authenticate = (!self.strip_failure).then(|| {
            let path = head.path();
            let realm = format!(
                "{}://{}{}",
                head.scheme.as_str(),
                String::from_utf8_lossy(head.authority()),
                String::from_utf8_lossy(&path[..path.len().min(PATH_MAX)])
            );
            let realm: String = realm.chars().filter(|c| !c.is_control()).collect();
            let realm = realm.replace('\\', "\\\\").replace('"', "\\\"");
            let error = if refusal == Refusal::MISSING { "" } else { ", error=\"invalid_token\"" };
            format!("Bearer realm=\"{realm}\"{error}")
        });
        Denied {
            cause: refusal.cause,
            body: if self.strip_failure { "" } else { refusal.text },
            www_authenticate,
            details: format!("jwt_authn_access_denied{{{}}}", refusal.text.replace(' ', "_")),
        }
    }
}

/// OPTIONS with an origin and the method that is asked for.
fn is_preflight(head: &RequestHead) -> bool {
    let has = |name| head.fields.get(name).is_some_and(|value| !value.is_empty());
    head.method() == "OPTIONS" && has("origin") && has("access-control-request-method")
}

impl Provider {
    fn lower(proto: &pb::JwtProvider) -> Result<Self, Unsupported> {
        use pb::jwt_provider::JwksSourceSpecifier;
        let text = |value: &str| (!value.is_empty()).then(|| value.into());
        let header_name = |value: &str, path: &str| {
            if value.starts_with(':') || value.eq_ignore_ascii_case("host") {
                return Err(Unsupported::new(path, format!("{value:?} cannot be written to")));
            }
            Ok(value.to_ascii_lowercase().into_boxed_str())
        };
        if !proto.failed_status_in_metadata.is_empty() {
            return Err(Unsupported::not_built("failed_status_in_metadata"));
        }
        let mut locations = Vec::new();
        for (index, header) in proto.from_headers.iter().enumerate() {
            if header.name.is_empty() {
                return Err(Unsupported::missing(format!("from_headers[{index}].name")));
            }
            locations.push(Location::Header {
                name: header.name.to_ascii_lowercase().into(),
                prefix: header.value_prefix.as_str().into(),
            });
        }
        locations.extend(proto.from_params.iter().map(|name| Location::Query(name.as_str().into())));
        locations.extend(proto.from_cookies.iter().map(|name| Location::Cookie(name.as_str().into())));
        if locations.is_empty() {
            locations.push(Location::Header { name: "authorization".into(), prefix: "Bearer ".into() });
            locations.push(Location::Query("access_token".into()));
        }
        let keys = match &proto.jwks_source_specifier {
            None => return Err(Unsupported::missing("jwks_source_specifier")),
            Some(JwksSourceSpecifier::LocalJwks(source)) => {
                use core::data_source::Specifier;
                let document = match &source.specifier {
                    Some(Specifier::InlineString(text)) => text.as_bytes(),
                    Some(Specifier::InlineBytes(bytes)) => bytes.as_slice(),
                    _ => return Err(Unsupported::new("local_jwks", "must be inline")),
                };
                Arc::new(KeySet::parse(document))
            }
            // The control plane fetches what `jwksUri` names, and sends it.
            Some(JwksSourceSpecifier::RemoteJwks(_)) => return Err(Unsupported::not_built("remote_jwks")),
        };
        let claim_headers = each(&proto.claim_to_headers, "claim_to_headers", |claim| {
            let mut path: Vec<Box<str>> = claim.claim_path.iter().map(|segment| segment.key.as_str().into()).collect();
            if path.is_empty() {
                path = claim.claim_name.split('.').map(Into::into).collect();
            }
            if claim.header_name.is_empty() || path.iter().any(|key| key.is_empty()) {
                return Err(Unsupported::new("", "needs a header name and a claim name"));
            }
            Ok((header_name(&claim.header_name, "header_name")?, path))
        })?;
        let payload_header: Option<Box<str>> = match &*proto.forward_payload_header {
            "" => None,
            name => Some(header_name(name, "forward_payload_header")?),
        };
        let normalize = proto.normalize_payload_in_metadata.as_ref();
        Ok(Self {
            issuer: proto.issuer.as_str().into(),
            audiences: proto.audiences.iter().map(|audience| audience.as_str().into()).collect(),
            subjects: proto.subjects.as_ref().map(StringMatcher::lower).transpose().within("subjects")?,
            require_expiration: proto.require_expiration,
            lifetime_max: proto
                .max_lifetime
                .as_ref()
                .map(|value| duration(value, "max_lifetime").map(|value| value.as_secs()))
                .transpose()?,
            locations,
            forward: proto.forward,
            payload_header,
            pad_payload: proto.pad_forward_payload_header,
            payload_key: text(&proto.payload_in_metadata),
            header_key: text(&proto.header_in_metadata),
            space_delimited: normalize
                .map(|normalize| normalize.space_delimited_claims.iter().map(|claim| claim.as_str().into()).collect())
                .unwrap_or_default(),
            skew: if proto.clock_skew_seconds == 0 { CLOCK_SKEW } else { proto.clock_skew_seconds.into() },
            claim_headers,
            clear_route_cache: proto.clear_route_cache,
            keys,
        })
    }

    /// Everything about a token but its audience.
    fn judge(&self, text: &str, env: &Env<'_>) -> Result<Arc<Token>, Refusal> {
        let token = Token::parse(text)?;
        if !self.issuer.is_empty() && token.issuer() != &*self.issuer {
            return Err(Refusal::UNKNOWN_ISSUER);
        }
        if self.subjects.as_ref().is_some_and(|subjects| !subjects.matches(token.subject().as_bytes())) {
            return Err(Refusal::WRONG_SUBJECT);
        }
        token.check_time(env.now, self.skew)?;
        if self.require_expiration && token.expires().is_none() {
            return Err(Refusal::NO_EXPIRATION);
        }
        if let Some(most) = self.lifetime_max {
            let (Some(start), Some(end)) = (token.issued_at(), token.expires()) else {
                return Err(Refusal::NO_EXPIRATION);
            };
            if end.saturating_sub(start) > most {
                return Err(Refusal::EXPIRED);
            }
        }
        env.cache.borrow_mut().verified(token, text, &self.keys)
    }

    /// Claims and payload, where they were asked for.
    fn write(&self, token: &Token, head: &mut RequestHead, metadata: &mut Metadata) {
        if let Some(name) = &self.payload_header {
            let mut value = token.payload_text.to_string();
            while self.pad_payload && !value.len().is_multiple_of(4) {
                value.push('=');
            }
            head.fields.push(name, value.as_bytes());
        }
        for (name, path) in &self.claim_headers {
            let claim = path.iter().try_fold(&*token.payload, |value, key| value.as_object()?.get(&**key));
            if let Some(value) = claim.and_then(header_value) {
                head.fields.push(name, value.as_bytes());
            }
        }
        if let Some(key) = &self.payload_key {
            metadata.set(METADATA, key, self.normalized(token));
        }
        if let Some(key) = &self.header_key {
            metadata.set(METADATA, key, Arc::clone(&token.header));
        }
    }

    /// The payload with space-delimited claims as lists.
    fn normalized(&self, token: &Token) -> Arc<Value> {
        let delimited = |payload: &Value| {
            self.space_delimited.iter().any(|claim| payload.get(&**claim).is_some_and(Value::is_string))
        };
        if !delimited(&token.payload) {
            return Arc::clone(&token.payload);
        }
        let mut payload = Value::clone(&token.payload);
        for claim in &self.space_delimited {
            if let Some(Value::String(text)) = payload.get(&**claim) {
                let list = text.split(' ').filter(|word| !word.is_empty()).map(Value::from).collect();
                payload[&**claim] = Value::Array(list);
            }
        }
        Arc::new(payload)
    }
}

/// A claim as a header; lists and objects as base64 of their JSON. One that would break the header
/// is left out.
fn header_value(claim: &Value) -> Option<String> {
    let text = match claim {
        Value::Null => return None,
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => claim.to_string(),
        Value::Array(_) | Value::Object(_) => {
            // The JSON is protobuf's, which escapes angle brackets.
            STANDARD.encode(claim.to_string().replace('<', "\\u003c").replace('>', "\\u003e"))
        }
    };
    let legal = !text.bytes().any(|b| matches!(b, b'\r' | b'\n' | 0));
    legal.then(|| text.trim_matches([' ', '\t']).to_owned())
}

impl Requirement {
    fn lower(proto: &pb::JwtRequirement, providers: &HashMap<&str, usize>) -> Result<Self, Unsupported> {
        use pb::jwt_requirement::RequiresType;
        let provider = |name: &str| {
            providers
                .get(name)
                .copied()
                .ok_or_else(|| Unsupported::new("provider_name", format!("{name:?} is not a provider")))
        };
        let list = |list: &[pb::JwtRequirement], path: &str| {
            if list.len() < 2 {
                return Err(Unsupported::new(path, "needs two requirements or more"));
            }
            each(list, path, |item| Self::lower(item, providers))
        };
        Ok(match proto.requires_type.as_ref().ok_or_else(|| Unsupported::missing("requires_type"))? {
            RequiresType::ProviderName(name) => Self::Provider(provider(name)?, None),
            RequiresType::ProviderAndAudiences(both) => {
                let audiences = both.audiences.iter().map(|audience| audience.as_str().into()).collect();
                Self::Provider(provider(&both.provider_name)?, Some(audiences))
            }
            RequiresType::RequiresAny(any) => Self::Any(list(&any.requirements, "requires_any.requirements")?),
            RequiresType::RequiresAll(all) => Self::All(list(&all.requirements, "requires_all.requirements")?),
            RequiresType::AllowMissing(_) => Self::AllowMissing,
            // A token that is there must be valid.
            RequiresType::AllowMissingOrFailed(_) => return Err(Unsupported::not_built("allow_missing_or_failed")),
            RequiresType::ExtractOnlyWithoutValidation(_) => {
                return Err(Unsupported::not_built("extract_only_without_validation"));
            }
        })
    }

    /// The providers it asks, with the audiences it asks for.
    fn providers<'a>(&'a self, out: &mut Vec<(usize, Option<&'a [Box<str>]>)>) {
        match self {
            Self::Provider(index, audiences) => {
                let one = (*index, audiences.as_deref());
                if !out.contains(&one) {
                    out.push(one);
                }
            }
            Self::Any(list) | Self::All(list) => list.iter().for_each(|inner| inner.providers(out)),
            Self::AllowMissing => {}
        }
    }

    fn met(&self, filter: &JwtFilter, found: &[Found]) -> Result<(), Refusal> {
        match self {
            Self::Provider(index, audiences) => {
                let asked = [(*index, audiences.as_deref())];
                let mut refusal = Refusal::MISSING;
                for token in found.iter().filter(|token| token.provider == *index) {
                    match filter.accepts(token, &asked) {
                        Ok(()) => return Ok(()),
                        Err(bad) => refusal = refusal.better(bad),
                    }
                }
                Err(refusal)
            }
            Self::All(list) => list.iter().try_for_each(|inner| inner.met(filter, found)),
            Self::Any(list) => {
                let mut refusal = Refusal::MISSING;
                for inner in list.iter().filter(|inner| **inner != Self::AllowMissing) {
                    match inner.met(filter, found) {
                        Ok(()) => return Ok(()),
                        Err(bad) => refusal = refusal.better(bad),
                    }
                }
                let may_be_missing = list.contains(&Self::AllowMissing);
                if may_be_missing && refusal == Refusal::MISSING { Ok(()) } else { Err(refusal) }
            }
            // Tokens that are there are judged all the same.
            Self::AllowMissing => Ok(()),
        }
    }
}

impl Rule {
    fn lower(
        proto: &pb::RequirementRule,
        providers: &HashMap<&str, usize>,
        named: &BTreeMap<Box<str>, Requirement>,
    ) -> Result<Self, Unsupported> {
        use pb::requirement_rule::RequirementType;
        use route::route_match::PathSpecifier;
        let matches = proto.r#match.as_ref().ok_or_else(|| Unsupported::missing("match"))?;
        for (path, used) in [
            ("match.runtime_fraction", matches.runtime_fraction.is_some()),
            ("match.cookies", !matches.cookies.is_empty()),
            ("match.grpc", matches.grpc.is_some()),
            ("match.tls_context", matches.tls_context.is_some()),
            ("match.dynamic_metadata", !matches.dynamic_metadata.is_empty()),
            ("match.filter_state", !matches.filter_state.is_empty()),
        ] {
            if used {
                return Err(Unsupported::not_built(path));
            }
        }
        let case = matches.case_sensitive.as_ref().is_none_or(|value| value.value);
        let path = match matches.path_specifier.as_ref().ok_or_else(|| Unsupported::missing("match.path_specifier"))? {
            PathSpecifier::Prefix(text) => PathRule::Prefix(text.as_str().into(), case),
            PathSpecifier::Path(text) => PathRule::Exact(text.as_str().into(), case),
            PathSpecifier::PathSeparatedPrefix(text) => PathRule::SeparatedPrefix(text.as_str().into(), case),
            PathSpecifier::SafeRegex(regex) => PathRule::Regex(Regex::lower(regex).within("match.safe_regex")?),
            PathSpecifier::ConnectMatcher(_) => return Err(Unsupported::not_built("match.connect_matcher")),
            PathSpecifier::PathMatchPolicy(_) => return Err(Unsupported::not_built("match.path_match_policy")),
        };
        let requires = match &proto.requirement_type {
            None => None,
            Some(RequirementType::Requires(requirement)) => {
                // Envoy: an empty requirement asks for nothing.
                match &requirement.requires_type {
                    None => None,
                    Some(_) => Some(Requirement::lower(requirement, providers).within("requires")?),
                }
            }
            Some(RequirementType::RequirementName(name)) => {
                Some(named.get(name.as_str()).cloned().ok_or_else(|| {
                    Unsupported::new("requirement_name", format!("{name:?} is not in requirement_map"))
                })?)
            }
        };
        Ok(Self {
            path,
            headers: each(&matches.headers, "match.headers", HeaderMatcher::lower)?,
            query: each(&matches.query_parameters, "match.query_parameters", QueryMatcher::lower)?,
            requires,
        })
    }

    fn matches(&self, head: &RequestHead) -> bool {
        self.path.matches(head.path_only())
            && self.headers.iter().all(|matcher| matcher.matches(head))
            && self.query.iter().all(|matcher| matcher.matches(head.query()))
    }
}

impl PathRule {
    fn matches(&self, path: &[u8]) -> bool {
        let equal = |a: &[u8], b: &str, case: bool| {
            if case { a == b.as_bytes() } else { a.eq_ignore_ascii_case(b.as_bytes()) }
        };
        let begins = |text: &str, case| path.get(..text.len()).is_some_and(|head| equal(head, text, case));
        match self {
            Self::Prefix(text, case) => begins(text, *case),
            Self::Exact(text, case) => equal(path, text, *case),
            Self::SeparatedPrefix(text, case) => {
                begins(text, *case) && matches!(path.get(text.len()), None | Some(b'/'))
            }
            Self::Regex(regex) => regex.is_match(path),
        }
    }
}

#[cfg(test)]
mod tests;
