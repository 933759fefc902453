//! AuthorizationPolicies of one workload, as RBAC filters.
//!
//! Source: `docs/parity.md`, Security 8. Order: CUSTOM, then (tokens), then DENY, then ALLOW. One
//! filter an action; what is only tried out (`istio.io/dry-run`) stands in it as shadow rules.

use std::collections::BTreeMap;

use api::security::{Action, AuthorizationPolicy};
use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::config::rbac::v3::Policy;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{HttpFilter, http_filter};
use envoy_types::pb::google::protobuf::Any;
use mesh::Config;
use types::{Finding, Severity};

use super::ext_authz;
use super::rule::{self, Scope, Transport, Verdict};
use super::wire::{HttpRbac, NetworkRbac, Rules};
use super::{PolicyFacts, PolicyFilters};

const HTTP_RBAC: &str = "envoy.filters.http.rbac";
const NETWORK_RBAC: &str = "envoy.filters.network.rbac";
const STAT_PREFIX: &str = "tcp.";
const DRY_RUN: &str = "istio.io/dry-run";

/// Appends the filters of CUSTOM policies; they come before tokens are read.
pub(crate) fn append_custom(facts: &PolicyFacts<'_>, out: &mut PolicyFilters) {
    let policies: Vec<_> = of_action(facts, Action::Custom).collect();
    let Some(first) = policies.first() else { return };
    let name = provider_name(first);
    let provider = if policies.iter().all(|policy| provider_name(policy) == name) {
        ext_authz::provider(name, facts)
    } else {
        // Istio asks one authorizer a workload only, unless told otherwise.
        Err(ext_authz::InvalidProvider::Several)
    };
    match provider {
        Ok(provider) => {
            for transport in [Transport::Http, Transport::Tcp] {
                if transport == Transport::Tcp && provider.network.is_none() {
                    continue; // an authorizer that speaks HTTP is not asked about connections
                }
                let rules = custom_rules(&policies, facts, transport, "");
                push(out, transport, None, Some(rules), "istio_ext_authz_");
            }
            out.http.push(provider.http);
            out.tcp.extend(provider.network);
        }
        Err(why) => {
            for policy in &policies {
                out.findings.push(closed(policy, "spec.provider", &why.to_string(), why.hint()));
            }
            for transport in [Transport::Http, Transport::Tcp] {
                let rules = custom_rules(&policies, facts, transport, "-deny-due-to-bad-CUSTOM-action");
                push(out, transport, Some(rules), None, "");
            }
        }
    }
    for policy in &policies {
        report(policy, facts, Verdict::Asks, out);
    }
}

/// Appends the filters of DENY, then of ALLOW policies.
pub(crate) fn append(facts: &PolicyFacts<'_>, out: &mut PolicyFilters) {
    for (action, verdict) in [(Action::Deny, Verdict::Refuses), (Action::Allow, Verdict::Grants)] {
        let policies: Vec<_> = of_action(facts, action).collect();
        let (tried, enforced): (Vec<_>, Vec<_>) = policies.iter().partition(|policy| is_dry_run(policy));
        for transport in [Transport::Http, Transport::Tcp] {
            let enforced = (!enforced.is_empty()).then(|| rules(&enforced, verdict, facts, transport));
            let tried = (!tried.is_empty()).then(|| rules(&tried, verdict, facts, transport));
            let shadow_denies = tried.is_some() && verdict == Verdict::Refuses;
            let prefix = if shadow_denies { "istio_dry_run_deny_" } else { "istio_dry_run_allow_" };
            if enforced.is_some() || tried.is_some() {
                push(out, transport, enforced, tried, prefix);
            }
        }
        for policy in &policies {
            report(policy, facts, verdict, out);
        }
    }
}

fn of_action<'a>(facts: &'a PolicyFacts<'_>, action: Action) -> impl Iterator<Item = &'a Config<AuthorizationPolicy>> {
    facts.authorization.iter().copied().filter(move |policy| policy.spec.action == action)
}

fn provider_name(policy: &Config<AuthorizationPolicy>) -> &str {
    policy.spec.provider.as_ref().map_or("", |provider| provider.name.as_str())
}

/// Only ALLOW and DENY can be tried out; elsewhere the mark is refused at admission and does
/// nothing here.
fn is_dry_run(policy: &Config<AuthorizationPolicy>) -> bool {
    policy.annotations.get(DRY_RUN).is_some_and(|value| value == "true")
}

fn rule_name(policy: &Config<AuthorizationPolicy>, index: usize) -> String {
    format!("ns[{}]-policy[{}]-rule[{index}]", policy.namespace(), policy.name())
}

/// Name and compiled rule of every rule of a policy.
fn compiled(
    policy: &Config<AuthorizationPolicy>,
    verdict: Verdict,
    facts: &PolicyFacts<'_>,
    transport: Transport,
) -> Vec<(String, Policy)> {
    let scope = Scope { namespace: policy.namespace(), trust_domains: &facts.trust_domains };
    if policy.spec.rules.is_empty() {
        // ALLOW without rules allows nothing. The others are refused at admission without rules;
        // should one come through, it fails closed.
        let only = if verdict == Verdict::Grants { rule::nothing() } else { rule::everything() };
        return vec![(rule_name(policy, 0), only)];
    }
    let rules = policy.spec.rules.iter().enumerate();
    rules
        .filter_map(|(index, rule)| {
            let compiled = rule::compile(rule, verdict, transport, scope);
            compiled.policy.map(|policy_of_rule| (rule_name(policy, index), policy_of_rule))
        })
        .collect()
}

fn rules(
    policies: &[&&Config<AuthorizationPolicy>],
    verdict: Verdict,
    facts: &PolicyFacts<'_>,
    transport: Transport,
) -> Rules {
    let all: BTreeMap<_, _> = policies.iter().flat_map(|policy| compiled(policy, verdict, facts, transport)).collect();
    Rules { action: i32::from(verdict != Verdict::Grants), policies: all }
}

fn custom_rules(
    policies: &[&Config<AuthorizationPolicy>],
    facts: &PolicyFacts<'_>,
    transport: Transport,
    ending: &str,
) -> Rules {
    let mut all = BTreeMap::new();
    for policy in policies {
        for (name, compiled) in compiled(policy, Verdict::Asks, facts, transport) {
            all.insert(format!("{}-{name}{ending}", ext_authz::marker(provider_name(policy))), compiled);
        }
    }
    Rules { action: 1, policies: all }
}

fn push(out: &mut PolicyFilters, transport: Transport, rules: Option<Rules>, shadow: Option<Rules>, prefix: &str) {
    match transport {
        Transport::Http => {
            let rbac = HttpRbac { rules, shadow_rules: shadow, shadow_rules_stat_prefix: prefix.to_owned() };
            out.http.push(http_filter(HTTP_RBAC, rbac.pack()));
        }
        Transport::Tcp => {
            let rbac = NetworkRbac {
                rules,
                shadow_rules: shadow,
                stat_prefix: STAT_PREFIX.to_owned(),
                shadow_rules_stat_prefix: prefix.to_owned(),
            };
            out.tcp.push(network_filter(NETWORK_RBAC, rbac.pack()));
        }
    }
}

/// An HTTP filter of that name.
pub(crate) fn http_filter(name: &str, config: Any) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    }
}

/// A network filter of that name.
pub(crate) fn network_filter(name: &str, config: Any) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(filter::ConfigType::TypedConfig(config)) }
}

/// Findings on rules that fail closed.
fn report(policy: &Config<AuthorizationPolicy>, facts: &PolicyFacts<'_>, verdict: Verdict, out: &mut PolicyFilters) {
    let scope = Scope { namespace: policy.namespace(), trust_domains: &facts.trust_domains };
    let consequence = match verdict {
        Verdict::Grants => "the rule allows nothing",
        Verdict::Refuses => "the rule refuses everything",
        Verdict::Asks => "the rule asks the authorizer about everything",
    };
    if policy.spec.rules.is_empty() && verdict != Verdict::Grants {
        out.findings.push(closed(policy, "spec.rules", "without rules the policy matches everything", "give it rules"));
    }
    for (index, rule) in policy.spec.rules.iter().enumerate() {
        for problem in rule::compile(rule, verdict, Transport::Http, scope).problems {
            let field = format!("spec.rules[{index}].{}", problem.field);
            out.findings.push(closed(policy, &field, &format!("{}; {consequence}", problem.what), "correct the value"));
        }
    }
}

fn closed(policy: &Config<AuthorizationPolicy>, field: &str, message: &str, hint: &str) -> Finding {
    Finding {
        code: "LAT0301".into(),
        severity: Severity::Error,
        object: Some(policy.object.clone()),
        field: field.into(),
        position: None,
        message: message.into(),
        hint: hint.into(),
    }
}
