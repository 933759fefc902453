//! RequestAuthentications of one workload, as a token filter.
//!
//! Source: `docs/parity.md`, Security 9. All matching objects are merged. Deviation from Istio
//! (`docs/decisions/security-and-gateways.md`): every token a request carries must be valid, not just one of them.

use std::collections::{BTreeMap, BTreeSet};

use api::security::{JwtRule, RequestAuthentication};
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::config::route::v3::{RouteMatch, route_match};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement, JwtRequirementAndList, JwtRequirementOrList,
    RequirementRule, jwt_provider, jwt_requirement, requirement_rule,
};
use envoy_types::pb::google::protobuf::Empty;
use mesh::Config;
use types::{Finding, Severity};

use super::authz::http_filter;
use super::matchers::{JWT_FILTER, JWT_PAYLOAD};
use super::wire::JwtAuthentication;
use super::{Place, PolicyFacts, PolicyFilters};

/// A key that signs nothing, so that every token of its issuer is refused; Envoy takes no empty set.
///
/// Nobody has its private half: `x` is the SHA-256 of "Lateen: a key without a private half, 0",
/// which happens to be on the curve, and `y` is the even one of the two that belong to it.
const NO_KEYS: &str = concat!(
    r#"{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","use":"sig","kid":"no-key-of-this-issuer","#,
    r#""x":"ZZkhi8rt-Dp180xFysegiV4-CjbSrC1o-g2x_Ijrtu8","y":"l6l8Us2J_IrihtkZwt7c-afX4FZ8Cxi4a14gm0LQZwA"}]}"#,
);

/// One rule and where it stands.
struct Entry<'a> {
    rule: &'a JwtRule,
    config: &'a Config<RequestAuthentication>,
    index: usize,
}

/// Appends the filter, if some object asks for it.
pub(crate) fn append(facts: &PolicyFacts<'_>, out: &mut PolicyFilters) {
    let mut entries: Vec<Entry<'_>> = facts
        .authentication
        .iter()
        .copied()
        .flat_map(|config| {
            let rules = config.spec.jwt_rules.iter().enumerate();
            rules.map(move |(index, rule)| Entry { rule, config, index })
        })
        .collect();
    if entries.is_empty() {
        return;
    }
    entries.sort_by(|a, b| a.rule.issuer.cmp(&b.rule.issuer));
    let mut providers = BTreeMap::new();
    let mut names = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let name = format!("origins-{index}");
        providers.insert(name.clone(), provider(entry, facts, out));
        names.push(name);
    }
    let issuers: BTreeSet<_> = entries.iter().map(|entry| entry.rule.issuer.as_str()).collect();
    let issuers_tell_apart = issuers.len() == entries.len() && !issuers.contains("");
    let strict = (names.len() > 1 && issuers_tell_apart).then(|| every_token(&providers));
    out.http.push(http_filter(JWT_FILTER, everywhere(providers, requirement(&names)).pack()));
    out.http.extend(strict.map(|config| http_filter(EVERY_TOKEN, config.pack())));
}

/// Name of the filter that judges what tokens are left.
const EVERY_TOKEN: &str = "lateen.filters.http.every_token";

/// "Whatever is there is valid", over the issuers of the first filter, which must tell the rules apart.
///
/// A filter of its own: as a last step of the first one, Envoy would clean the claim headers that were
/// written just before, and not write them again where the token was taken away.
fn every_token(providers: &BTreeMap<String, JwtProvider>) -> JwtAuthentication {
    let judged = providers.iter().map(|(name, provider)| {
        let judged = JwtProvider {
            forward: true,
            forward_payload_header: String::new(),
            payload_in_metadata: String::new(),
            normalize_payload_in_metadata: None,
            claim_to_headers: Vec::new(),
            clear_route_cache: false,
            ..provider.clone()
        };
        (name.clone(), judged)
    });
    everywhere(judged.collect(), allow_missing())
}

fn everywhere(providers: BTreeMap<String, JwtProvider>, requirement: JwtRequirement) -> JwtAuthentication {
    JwtAuthentication {
        providers,
        rules: vec![RequirementRule {
            r#match: Some(RouteMatch {
                path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
                ..RouteMatch::default()
            }),
            requirement_type: Some(requirement_rule::RequirementType::Requires(requirement)),
        }],
        bypass_cors_preflight: true,
    }
}

/// One issuer: its token, or none. Several: Istio's form (one of them, or none at all).
fn requirement(names: &[String]) -> JwtRequirement {
    if let [name] = names {
        return any(vec![provided(name), allow_missing()]);
    }
    let mut alternatives: Vec<_> = names.iter().map(|name| provided(name)).collect();
    alternatives.push(all(names.iter().map(|name| any(vec![provided(name), allow_missing()])).collect()));
    any(alternatives)
}

fn requires(kind: jwt_requirement::RequiresType) -> JwtRequirement {
    JwtRequirement { requires_type: Some(kind) }
}

fn provided(name: &str) -> JwtRequirement {
    requires(jwt_requirement::RequiresType::ProviderName(name.to_owned()))
}

fn allow_missing() -> JwtRequirement {
    requires(jwt_requirement::RequiresType::AllowMissing(Empty::default()))
}

fn any(requirements: Vec<JwtRequirement>) -> JwtRequirement {
    requires(jwt_requirement::RequiresType::RequiresAny(JwtRequirementOrList { requirements }))
}

fn all(requirements: Vec<JwtRequirement>) -> JwtRequirement {
    requires(jwt_requirement::RequiresType::RequiresAll(JwtRequirementAndList { requirements }))
}

fn provider(entry: &Entry<'_>, facts: &PolicyFacts<'_>, out: &mut PolicyFilters) -> JwtProvider {
    let rule = entry.rule;
    let mut spaced: Vec<String> = vec!["permission".to_owned(), "scope".to_owned()];
    for claim in &rule.space_delimited_claims {
        if !spaced.contains(claim) {
            spaced.push(claim.clone());
        }
    }
    let from_headers =
        rule.from_headers.iter().map(|h| JwtHeader { name: h.name.clone(), value_prefix: h.prefix.clone() });
    let claims = rule.output_claim_to_headers.iter().map(|c| JwtClaimToHeader {
        header_name: c.header.clone(),
        claim_name: c.claim.clone(),
        ..JwtClaimToHeader::default()
    });
    JwtProvider {
        issuer: rule.issuer.clone(),
        audiences: rule.audiences.clone(),
        forward: rule.forward_original_token,
        from_headers: from_headers.collect(),
        from_params: rule.from_params.clone(),
        from_cookies: rule.from_cookies.clone(),
        forward_payload_header: rule.output_payload_to_header.clone(),
        payload_in_metadata: JWT_PAYLOAD.to_owned(),
        normalize_payload_in_metadata: Some(jwt_provider::NormalizePayload { space_delimited_claims: spaced }),
        claim_to_headers: claims.collect(),
        clear_route_cache: facts.place == Place::Gateway,
        jwks_source_specifier: Some(jwt_provider::JwksSourceSpecifier::LocalJwks(DataSource {
            specifier: Some(data_source::Specifier::InlineString(key_set(entry, facts, out))),
            ..DataSource::default()
        })),
        ..JwtProvider::default()
    }
}

/// The keys: inline, else fetched by the control plane; without usable ones tokens are refused.
fn key_set(entry: &Entry<'_>, facts: &PolicyFacts<'_>, out: &mut PolicyFilters) -> String {
    let rule = entry.rule;
    if !rule.jwks.is_empty() {
        if is_key_set(&rule.jwks) {
            return rule.jwks.clone();
        }
        out.findings.push(unusable(entry, "jwks", "is not a JSON Web Key Set with at least one key"));
        return NO_KEYS.to_owned();
    }
    let field = if rule.jwks_uri.is_empty() { "issuer" } else { "jwksUri" };
    match facts.services.key_set(rule) {
        Some(Ok(keys)) if is_key_set(keys) => return keys.to_string(),
        Some(Ok(_)) => out.findings.push(unusable(entry, field, "what was fetched is not a JSON Web Key Set")),
        Some(Err(reason)) => {
            out.findings.push(unusable(entry, field, &format!("the keys of the issuer cannot be had: {reason}")));
        }
        // Whoever has no control plane never gets further, so this is said too.
        None => out.findings.push(unusable(entry, field, "the keys of the issuer have not been fetched yet")),
    }
    NO_KEYS.to_owned()
}

fn is_key_set(text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<serde_json::Value>(text) else { return false };
    value.get("keys").and_then(serde_json::Value::as_array).is_some_and(|keys| keys.iter().any(is_key))
}

/// Whether a key has the numbers that its type needs. Envoy refuses a whole listener for a set
/// without any such key.
fn is_key(key: &serde_json::Value) -> bool {
    let text = |name: &str| key.get(name).and_then(serde_json::Value::as_str).unwrap_or_default();
    let is_number = |name: &str| {
        let number = text(name).trim_end_matches('=');
        !number.is_empty() && number.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    match text("kty") {
        "RSA" => is_number("n") && is_number("e"),
        "EC" => matches!(text("crv"), "P-256" | "P-384" | "P-521") && is_number("x") && is_number("y"),
        "OKP" => text("crv") == "Ed25519" && is_number("x"),
        "oct" => is_number("k"),
        _ => false,
    }
}

fn unusable(entry: &Entry<'_>, field: &str, what: &str) -> Finding {
    Finding {
        code: "LAT0302".into(),
        severity: Severity::Error,
        object: Some(entry.config.object.clone()),
        field: format!("spec.jwtRules[{}].{field}", entry.index).into(),
        position: None,
        message: format!("{what}; tokens of issuer {:?} are refused", entry.rule.issuer).into(),
        hint: "put the key set into `jwks`, or make `jwksUri` reachable".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_sets() {
        for good in [
            r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}"#,
            r#"{"keys":[{"kty":"XX"},{"kty":"oct","k":"AQ=="}]}"#,
            r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AQ"}]}"#,
            NO_KEYS,
        ] {
            assert!(is_key_set(good), "{good}");
        }
        for bad in [
            "",
            "{}",
            r#"{"keys":[]}"#,
            r#"{"keys":[{"kty":"RSA","n":"A B","e":"AQAB"}]}"#,
            r#"{"keys":[{"kty":"EC","crv":"P-1","x":"A","y":"A"}]}"#,
        ] {
            assert!(!is_key_set(bad), "{bad}");
        }
    }
}
