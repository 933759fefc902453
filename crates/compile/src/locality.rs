//! Localities of endpoints: failover, label priorities, distribution.
//!
//! *Source*: `docs/parity.md`, Traffic 3.3 ("localityLbSetting" and below).

use std::collections::BTreeMap;

use api::networking::LocalityLbSetting;
use mesh::{Endpoint, TrafficDistribution};
use types::{Labels, Locality, wellknown::labels};

use crate::cluster::Outbound;
use crate::context::Context;

/// Endpoints of one locality at one priority.
pub(crate) struct Group<'a> {
    pub(crate) locality: Locality,
    /// 0 is tried first; without gaps.
    pub(crate) priority: u32,
    /// Sum of the endpoints' weights, or the share of a distribution.
    pub(crate) weight: u32,
    pub(crate) endpoints: Vec<&'a Endpoint>,
}

/// Which setting holds: the rule's, else the service's preference, else the mesh's.
enum Setting<'a> {
    Rule(&'a LocalityLbSetting),
    Service(TrafficDistribution),
    Mesh(Option<&'a LocalityLbSetting>),
}

fn setting<'a>(context: &'a Context<'_>, of: &'a Outbound<'_>) -> Option<Setting<'a>> {
    let is_on = |setting: &&LocalityLbSetting| setting.enabled != Some(false);
    if let Some(own) = of.policy.load_balancer.as_ref().and_then(|lb| lb.locality_lb_setting.as_ref()) {
        return Some(own).filter(is_on).map(Setting::Rule);
    }
    if let Some(preference) = of.service.traffic_distribution {
        return Some(Setting::Service(preference));
    }
    match context.snapshot.mesh_config().locality_lb_setting.as_ref() {
        None => Some(Setting::Mesh(None)),
        Some(mesh) => Some(mesh).filter(is_on).map(|mesh| Setting::Mesh(Some(mesh))),
    }
}

/// Whether the cluster weighs localities: its setting came from a rule or the service and does something.
pub(crate) fn weighs_localities(context: &Context<'_>, of: &Outbound<'_>) -> bool {
    match setting(context, of) {
        Some(Setting::Rule(setting)) => !setting.distribute.is_empty() || of.policy.outlier_detection.is_some(),
        Some(Setting::Service(_)) => true,
        Some(Setting::Mesh(_)) | None => false,
    }
}

/// Arranges endpoints by locality and priority for this proxy's own locality.
pub(crate) fn arrange<'a>(
    context: &Context<'_>,
    of: &Outbound<'_>,
    by_locality: BTreeMap<&'a Locality, Vec<&'a Endpoint>>,
) -> Vec<Group<'a>> {
    let plain = |by_locality: BTreeMap<&'a Locality, Vec<&'a Endpoint>>| -> Vec<Group<'a>> {
        by_locality.into_iter().map(|(locality, endpoints)| group(locality, 0, endpoints)).collect()
    };
    let own = &context.view.locality;
    let fails_over = of.policy.outlier_detection.is_some();
    match setting(context, of) {
        Some(Setting::Service(preference)) => {
            let keys: &[&str] = match preference {
                TrafficDistribution::SameZone => &[labels::REGION, labels::ZONE],
                TrafficDistribution::SameNode => &[labels::REGION, labels::ZONE, labels::SUB_ZONE, HOSTNAME],
            };
            let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
            by_labels(context, &keys, by_locality)
        }
        Some(Setting::Rule(setting) | Setting::Mesh(Some(setting)))
            if !own.is_empty() || !setting.failover_priority.is_empty() =>
        {
            if !setting.distribute.is_empty() {
                return match setting.distribute.iter().find(|entry| locality_matches(&entry.from, own)) {
                    Some(entry) => distribute(&entry.to, by_locality),
                    None => plain(by_locality),
                };
            }
            if !fails_over {
                return plain(by_locality);
            }
            if !setting.failover_priority.is_empty() {
                return by_labels(context, &setting.failover_priority, by_locality);
            }
            fail_over(own, Some(setting), by_locality)
        }
        Some(Setting::Mesh(None)) if fails_over && !own.is_empty() => fail_over(own, None, by_locality),
        _ => plain(by_locality),
    }
}

/// Label of a pod's node in `failoverPriority`.
const HOSTNAME: &str = "kubernetes.io/hostname";

fn group<'a>(locality: &Locality, priority: u32, endpoints: Vec<&'a Endpoint>) -> Group<'a> {
    let weight = endpoints.iter().fold(0_u32, |sum, endpoint| sum.saturating_add(endpoint.weight));
    Group { locality: locality.clone(), priority, weight, endpoints }
}

/// 0 same sub-zone, 1 same zone, 2 same region, 3 elsewhere.
fn distance(own: &Locality, other: &Locality) -> u32 {
    match (own.region == other.region, own.zone == other.zone, own.sub_zone == other.sub_zone) {
        (false, _, _) => 3,
        (true, false, _) => 2,
        (true, true, false) => 1,
        (true, true, true) => 0,
    }
}

fn fail_over<'a>(
    own: &Locality,
    setting: Option<&LocalityLbSetting>,
    by_locality: BTreeMap<&'a Locality, Vec<&'a Endpoint>>,
) -> Vec<Group<'a>> {
    let target = setting
        .and_then(|setting| setting.failover.iter().find(|entry| *entry.from == *own.region))
        .map(|entry| entry.to.as_str());
    let groups = by_locality
        .into_iter()
        .map(|(locality, endpoints)| {
            let mut priority = distance(own, locality);
            if priority == 3 && target.is_some_and(|target| *target != *locality.region) {
                priority = 4;
            }
            group(locality, priority, endpoints)
        })
        .collect();
    without_gaps(groups)
}

fn without_gaps(mut groups: Vec<Group<'_>>) -> Vec<Group<'_>> {
    let mut used: Vec<u32> = groups.iter().map(|group| group.priority).collect();
    used.sort_unstable();
    used.dedup();
    for group in &mut groups {
        let position = used.iter().position(|priority| *priority == group.priority).unwrap_or_default();
        group.priority = u32::try_from(position).unwrap_or_default();
    }
    groups
}

/// One priority per leading key that an endpoint does not share with the proxy.
fn by_labels<'a>(
    context: &Context<'_>,
    keys: &[String],
    by_locality: BTreeMap<&'a Locality, Vec<&'a Endpoint>>,
) -> Vec<Group<'a>> {
    let view = context.view;
    let mut groups = Vec::new();
    for (locality, endpoints) in by_locality {
        let mut by_priority: BTreeMap<u32, Vec<&Endpoint>> = BTreeMap::new();
        for endpoint in endpoints {
            let node = endpoint.workload.as_ref().map_or("", |workload| &*workload.node);
            let shared = keys
                .iter()
                .take_while(|key| {
                    let (name, wanted) = match key.split_once('=') {
                        Some((name, value)) => (name, Some(value)),
                        None => (key.as_str(), None),
                    };
                    let mine = wanted.unwrap_or_else(|| value_of(name, &view.labels, &view.locality, &view.node));
                    value_of(name, &endpoint.labels, &endpoint.locality, node) == mine
                })
                .count();
            let missing = u32::try_from(keys.len() - shared).unwrap_or(u32::MAX);
            by_priority.entry(missing).or_default().push(endpoint);
        }
        groups.extend(by_priority.into_iter().map(|(priority, endpoints)| group(locality, priority, endpoints)));
    }
    without_gaps(groups)
}

fn value_of<'a>(name: &str, of: &'a Labels, locality: &'a Locality, node: &'a str) -> &'a str {
    match name {
        labels::REGION => &locality.region,
        labels::ZONE => &locality.zone,
        labels::SUB_ZONE => &locality.sub_zone,
        HOSTNAME => node,
        other => of.get(other).map(String::as_str).unwrap_or_default(),
    }
}

/// `region/zone/sub-zone`, where a part may be `*` and missing parts match all.
fn locality_matches(pattern: &str, locality: &Locality) -> bool {
    let parts = [&*locality.region, &*locality.zone, &*locality.sub_zone];
    pattern.split('/').zip(parts).all(|(wanted, part)| wanted == "*" || wanted.is_empty() || wanted == part)
}

/// Shares by locality; what is not listed keeps its place and gets no endpoints.
fn distribute<'a>(
    to: &BTreeMap<String, u32>,
    by_locality: BTreeMap<&'a Locality, Vec<&'a Endpoint>>,
) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> =
        by_locality.into_iter().map(|(locality, endpoints)| group(locality, 0, endpoints)).collect();
    let mut is_listed = vec![false; groups.len()];
    // A narrower pattern comes first, so that a wider one only gets what is left.
    let mut patterns: Vec<_> = to.iter().collect();
    patterns.sort_by_key(|(pattern, _)| std::cmp::Reverse((!pattern.contains('*'), pattern.len())));
    for (pattern, share) in patterns {
        let members: Vec<usize> = (0..groups.len())
            .filter(|index| !is_listed[*index] && locality_matches(pattern, &groups[*index].locality))
            .collect();
        let total: u64 = members.iter().map(|index| u64::from(groups[*index].weight)).sum();
        for index in members {
            is_listed[index] = true;
            let scaled = (u64::from(*share) * u64::from(groups[index].weight)).div_ceil(total.max(1));
            groups[index].weight = u32::try_from(scaled).unwrap_or(u32::MAX);
        }
    }
    for (group, listed) in groups.iter_mut().zip(is_listed) {
        if !listed {
            group.endpoints.clear();
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let here = Locality::parse("east/east-1/rack-1");
        for (pattern, expect) in [
            ("east/*", true),
            ("east/east-1/*", true),
            ("east", true),
            ("*", true),
            ("west/*", false),
            ("east/east-2/*", false),
        ] {
            assert_eq!(locality_matches(pattern, &here), expect, "{pattern}");
        }
    }

    #[test]
    fn distances() {
        let here = Locality::parse("a/b/c");
        for (other, expect) in [("a/b/c", 0), ("a/b/d", 1), ("a/x/c", 2), ("z/b/c", 3)] {
            assert_eq!(distance(&here, &Locality::parse(other)), expect, "{other}");
        }
    }
}
