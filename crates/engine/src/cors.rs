//! Cross-origin requests: preflights answered here, headers added to responses.
//!
//! *Source*: Envoy's CORS filter; `docs/parity.md`, Traffic 2.5. An origin that is not allowed gets no headers,
//! and its request is served all the same.

use std::sync::Arc;

use envoy_types::pb::envoy::extensions::filters::http::cors::v3 as pb;
use types::{Fields, RequestHead};

use crate::matcher::StringMatcher;
use crate::route::Fraction;
use crate::unsupported::{Unsupported, Within as _, each};

/// Settings of a route.
#[derive(Debug, Clone, PartialEq)]
pub struct CorsPolicy {
    enabled: bool,
    origins: Vec<StringMatcher>,
    methods: Box<str>,
    headers: Box<str>,
    expose: Arc<str>,
    max_age: Box<str>,
    credentials: bool,
    private_network: bool,
    forward_unmatched: bool,
}

/// What the response to an allowed origin carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    origin: Box<[u8]>,
    credentials: bool,
    expose: Arc<str>,
}

impl Allowed {
    /// Adds the headers, in place of the upstream's own.
    pub fn apply(&self, fields: &mut Fields) {
        fields.set("access-control-allow-origin", &self.origin);
        if self.credentials {
            fields.set("access-control-allow-credentials", b"true");
        }
        if !self.expose.is_empty() {
            fields.set("access-control-expose-headers", self.expose.as_bytes());
        }
    }
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on; headers for the response if the origin is allowed.
    Pass(Option<Allowed>),
    /// Answer 200 with these headers.
    Preflight(Vec<(&'static str, Vec<u8>)>),
}

impl CorsPolicy {
    /// Lowers settings. Watching only (`shadow_enabled`) changes nothing.
    pub fn lower(proto: &pb::CorsPolicy) -> Result<Self, Unsupported> {
        let enabled = match proto.filter_enabled.as_ref().and_then(|enabled| enabled.default_value.as_ref()) {
            None => true,
            Some(share) => match Fraction::lower(share).within("filter_enabled.default_value")? {
                none if none.numerator == 0 => false,
                all if all.is_whole() => true,
                _ => return Err(Unsupported::new("filter_enabled", "must be all or nothing")),
            },
        };
        let flag = |value: Option<&envoy_types::pb::google::protobuf::BoolValue>, default: bool| {
            value.map_or(default, |value| value.value)
        };
        Ok(Self {
            enabled,
            origins: each(&proto.allow_origin_string_match, "allow_origin_string_match", StringMatcher::lower)?,
            methods: proto.allow_methods.as_str().into(),
            headers: proto.allow_headers.as_str().into(),
            expose: proto.expose_headers.as_str().into(),
            max_age: proto.max_age.as_str().into(),
            credentials: flag(proto.allow_credentials.as_ref(), false),
            private_network: flag(proto.allow_private_network_access.as_ref(), false),
            forward_unmatched: flag(proto.forward_not_matching_preflights.as_ref(), true),
        })
    }

    /// Decides for a request.
    pub fn request(&self, head: &RequestHead) -> Verdict {
        let mut origins = head.fields.get_all("origin").filter(|origin| !origin.is_empty());
        let (Some(origin), more) = (origins.next(), origins.next().is_some()) else { return Verdict::Pass(None) };
        if !self.enabled {
            return Verdict::Pass(None);
        }
        // More than one origin is none that could be allowed.
        let allowed = !more && self.allows(origin);
        let is_preflight = head.method() == "OPTIONS"
            && head.fields.get("access-control-request-method").is_some_and(|method| !method.is_empty());
        match (is_preflight, allowed) {
            (false, false) => Verdict::Pass(None),
            (false, true) => Verdict::Pass(Some(Allowed {
                origin: origin.into(),
                credentials: self.credentials,
                expose: Arc::clone(&self.expose),
            })),
            (true, false) if self.forward_unmatched => Verdict::Pass(None),
            (true, false) => Verdict::Preflight(Vec::new()),
            (true, true) => Verdict::Preflight(self.preflight(origin, head)),
        }
    }

    fn allows(&self, origin: &[u8]) -> bool {
        self.origins.iter().any(|matcher| matcher.matches(b"*") || matcher.matches(origin))
    }

    fn preflight(&self, origin: &[u8], head: &RequestHead) -> Vec<(&'static str, Vec<u8>)> {
        let mut headers = vec![("access-control-allow-origin", origin.to_vec())];
        if self.credentials {
            headers.push(("access-control-allow-credentials", b"true".to_vec()));
        }
        for (name, value) in [
            ("access-control-allow-methods", &*self.methods),
            ("access-control-allow-headers", &*self.headers),
            ("access-control-expose-headers", &*self.expose),
            ("access-control-max-age", &*self.max_age),
        ] {
            if !value.is_empty() {
                headers.push((name, value.as_bytes().to_vec()));
            }
        }
        let asks = head.fields.get("access-control-request-private-network") == Some(b"true");
        if self.private_network && asks {
            headers.push(("access-control-allow-private-network", b"true".to_vec()));
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::r#type::matcher::v3 as m;
    use envoy_types::pb::google::protobuf::BoolValue;

    use super::*;

    fn origin(pattern: m::string_matcher::MatchPattern) -> m::StringMatcher {
        m::StringMatcher { ignore_case: false, match_pattern: Some(pattern) }
    }

    fn policy() -> pb::CorsPolicy {
        use m::string_matcher::MatchPattern as P;
        pb::CorsPolicy {
            allow_origin_string_match: vec![
                origin(P::Exact("https://a.example".into())),
                origin(P::Prefix("https://b".into())),
            ],
            allow_methods: "GET,PUT".into(),
            max_age: "3600".into(),
            expose_headers: "x-a".into(),
            allow_credentials: Some(BoolValue { value: true }),
            ..pb::CorsPolicy::default()
        }
    }

    fn check(policy: &pb::CorsPolicy, method: &str, headers: &[(&str, &str)], expect: &str) {
        let mut head = RequestHead::new(method, "h", "/");
        for (name, value) in headers {
            head.fields.push(name, value.as_bytes());
        }
        let text = |list: Vec<(&str, Vec<u8>)>| {
            list.iter()
                .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value)))
                .collect::<Vec<_>>()
                .join("; ")
                .replace("access-control-", "")
        };
        let got = match CorsPolicy::lower(policy).unwrap().request(&head) {
            Verdict::Pass(None) => "pass".to_owned(),
            Verdict::Pass(Some(allowed)) => {
                let mut fields = Fields::new();
                fields.push("access-control-allow-origin", b"upstream's");
                allowed.apply(&mut fields);
                format!("pass, {}", text(fields.iter().map(|(name, value)| (name, value.to_vec())).collect()))
            }
            Verdict::Preflight(list) => format!("200 {}", text(list)),
        };
        assert_eq!(got, expect, "{method} {headers:?}");
    }

    const PREFLIGHT: (&str, &str) = ("access-control-request-method", "PUT");

    #[test]
    fn requests() {
        let p = policy();
        check(&p, "GET", &[], "pass");
        let headers = "pass, allow-origin: https://a.example; allow-credentials: true; expose-headers: x-a";
        check(&p, "GET", &[("origin", "https://a.example")], headers);
        check(&p, "GET", &[("origin", "https://evil")], "pass");
        check(&p, "GET", &[("origin", "https://a.example"), ("origin", "https://evil")], "pass");
        check(&p, "OPTIONS", &[("origin", "https://a.example")], headers);
    }

    #[test]
    fn preflights() {
        let mut p = policy();
        let answer = "200 allow-origin: https://bx; allow-credentials: true; allow-methods: GET,PUT; expose-headers: x-a; max-age: 3600";
        check(&p, "OPTIONS", &[("origin", "https://bx"), PREFLIGHT], answer);
        check(&p, "OPTIONS", &[PREFLIGHT], "pass");
        check(&p, "OPTIONS", &[("origin", "https://evil"), PREFLIGHT], "pass");
        p.forward_not_matching_preflights = Some(BoolValue { value: false });
        check(&p, "OPTIONS", &[("origin", "https://evil"), PREFLIGHT], "200 ");
    }

    #[test]
    fn any_origin_is_echoed() {
        let any = origin(m::string_matcher::MatchPattern::Exact("*".into()));
        let p = pb::CorsPolicy { allow_origin_string_match: vec![any], ..pb::CorsPolicy::default() };
        check(&p, "GET", &[("origin", "https://x")], "pass, allow-origin: https://x");
    }
}
