//! Picks over whole clusters.

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::cluster::{Address, LocalityEndpoints};
use crate::shared::SharedCluster;

/// Endpoints as `(last byte of the address, health, weight)`.
fn locality(priority: u32, weight: u32, endpoints: &[(u8, Health, u32)]) -> LocalityEndpoints {
    LocalityEndpoints {
        priority,
        weight,
        endpoints: endpoints
            .iter()
            .map(|(last, health, weight)| Endpoint {
                address: address(*last),
                health: *health,
                weight: *weight,
                hostname: "".into(),
                transport_match: Vec::new(),
                workload: "".into(),
            })
            .collect(),
        ..LocalityEndpoints::default()
    }
}

fn address(last: u8) -> Address {
    Address::Ip(([10, 0, 0, last], 80).into())
}

struct Bed {
    balancer: Balancer,
    shared: Arc<SharedCluster>,
    start: Instant,
}

fn bed(policy: Balancing, weighted: bool, panic_threshold: f64, localities: Vec<LocalityEndpoints>) -> Bed {
    let start = Instant::now();
    let shared = SharedCluster::detached("c", start);
    let set = Arc::new(EndpointSet { localities, overprovisioning: 140 });
    let balancer = Balancer::with_policy(policy, LocalityPolicy { weighted, panic_threshold }, &set, &shared, start);
    Bed { balancer, shared, start }
}

/// The same under another name, where a bed stands already.
fn new_bed(policy: Balancing, panic_threshold: f64, localities: Vec<LocalityEndpoints>) -> Bed {
    bed(policy, false, panic_threshold, localities)
}

impl Bed {
    fn choice(&self, seed: u64) -> Choice<'static> {
        Choice {
            draw: Draw::new(seed),
            attempt: 1,
            hash: None,
            avoid: &[],
            repicks_max: 0,
            avoid_priorities: &[],
            now: self.start,
        }
    }

    /// How often each endpoint is picked in `n` picks.
    fn spread(&mut self, n: u64) -> BTreeMap<String, u32> {
        let mut counts = BTreeMap::new();
        for seed in 0..n {
            let choice = self.choice(seed);
            if let Some(pick) = self.balancer.pick(&choice) {
                *counts.entry(pick.endpoint.address.to_string()).or_default() += 1;
            }
        }
        counts
    }

    fn eject(&self, last: u8) {
        self.shared.host(&address(last), self.start).ejected.store(true, Relaxed);
        self.shared.health_version.fetch_add(1, Relaxed);
    }
}

fn count(spread: &BTreeMap<String, u32>, last: u8) -> u32 {
    spread.get(&format!("10.0.0.{last}:80")).copied().unwrap_or(0)
}

const UP: Health = Health::Healthy;

fn least_request() -> Balancing {
    Balancing::LeastRequest { choices: 2, active_request_bias: 1.0, slow_start: None }
}

#[test]
fn every_policy_uses_every_host_and_only_healthy_ones() {
    for policy in [
        Balancing::RoundRobin(None),
        least_request(),
        Balancing::Random,
        Balancing::RingHash { minimum: 1024, maximum: 1 << 20 },
        Balancing::Maglev { table_size: 1009 },
    ] {
        let hosts = [(1, UP, 1), (2, UP, 1), (3, Health::Unhealthy, 1), (4, UP, 1)];
        let mut bed = bed(policy.clone(), false, 0.0, vec![locality(0, 1, &hosts)]);
        bed.eject(4);
        let spread = bed.spread(400);
        assert_eq!(spread.len(), 2, "{policy:?}: {spread:?}");
        assert!((100..300).contains(&count(&spread, 1)), "{policy:?}: {spread:?}");
    }
}

#[test]
fn turns_are_even() {
    let mut bed = bed(Balancing::RoundRobin(None), false, 0.0, vec![locality(0, 1, &[(1, UP, 1), (2, UP, 1)])]);
    assert_eq!(count(&bed.spread(100), 1), 50);
}

#[test]
fn weights_count() {
    for policy in [Balancing::RoundRobin(None), least_request()] {
        let mut bed = bed(policy, false, 0.0, vec![locality(0, 1, &[(1, UP, 3), (2, UP, 1)])]);
        let spread = bed.spread(400);
        assert!((298..=302).contains(&count(&spread, 1)), "{spread:?}");
    }
}

#[test]
fn the_busy_host_gets_less() {
    let mut bed = bed(least_request(), false, 0.0, vec![locality(0, 1, &[(1, UP, 1), (2, UP, 1)])]);
    bed.shared.host(&address(1), bed.start).requests.enter();
    let spread = bed.spread(1000);
    // Only when both draws hit it.
    assert!((200..300).contains(&count(&spread, 1)), "{spread:?}");
}

#[test]
fn nobody_healthy_is_nobody() {
    let mut bed = bed(least_request(), false, 0.0, vec![locality(0, 1, &[(1, UP, 1)])]);
    assert_eq!(bed.spread(1).len(), 1);
    bed.eject(1);
    assert!(bed.spread(10).is_empty());
    let mut panics = new_bed(least_request(), 50.0, vec![locality(0, 1, &[(1, Health::Unhealthy, 1)])]);
    assert_eq!(panics.spread(10).len(), 1);
    let mut empty = new_bed(least_request(), 50.0, vec![]);
    assert!(empty.spread(10).is_empty());
}

#[test]
fn failover_by_priority() {
    let hosts = |first| (first..first + 2).map(|last| (last, UP, 1)).collect::<Vec<_>>();
    let mut bed = bed(least_request(), false, 0.0, vec![locality(0, 1, &hosts(1)), locality(1, 1, &hosts(3))]);
    assert_eq!(count(&bed.spread(100), 3) + count(&bed.spread(100), 4), 0);
    bed.eject(1);
    let spread = bed.spread(1000);
    // 1.4 * 1/2 stay, the rest spills.
    assert!((650..750).contains(&count(&spread, 2)), "{spread:?}");
    bed.eject(2);
    let spread = bed.spread(100);
    assert_eq!(count(&spread, 3) + count(&spread, 4), 100);
}

#[test]
fn localities_by_weight() {
    let parts =
        vec![locality(0, 80, &[(1, UP, 1)]), locality(0, 20, &[(2, UP, 1), (3, UP, 1)]), locality(0, 0, &[(4, UP, 1)])];
    for policy in [least_request(), Balancing::RoundRobin(None), Balancing::Random] {
        let mut bed = bed(policy, true, 0.0, parts.clone());
        let spread = bed.spread(1000);
        assert!((798..=802).contains(&count(&spread, 1)), "{spread:?}");
        assert_eq!(count(&spread, 4), 0);
    }
    let mut hashed = bed(Balancing::Maglev { table_size: 5003 }, true, 0.0, parts);
    let spread = hashed.spread(2000);
    assert!((1500..1700).contains(&count(&spread, 1)), "{spread:?}");
    assert_eq!(count(&spread, 4), 0);
}

#[test]
fn tried_hosts_are_avoided_while_there_are_others() {
    let mut bed = bed(least_request(), false, 0.0, vec![locality(0, 1, &[(1, UP, 1), (2, UP, 1)])]);
    let tried = [bed.shared.host(&address(1), bed.start)];
    for seed in 0..200 {
        let choice = Choice { avoid: &tried, repicks_max: 5, ..bed.choice(seed) };
        assert_eq!(bed.balancer.pick(&choice).unwrap().endpoint.address, address(2));
    }
    let both = [Arc::clone(&tried[0]), bed.shared.host(&address(2), bed.start)];
    let choice = Choice { avoid: &both, repicks_max: 5, ..bed.choice(0) };
    assert!(bed.balancer.pick(&choice).is_some());
}

#[test]
fn tried_priorities_are_avoided_while_there_are_others() {
    let mut bed = bed(least_request(), false, 0.0, vec![locality(0, 1, &[(1, UP, 1)]), locality(1, 1, &[(2, UP, 1)])]);
    let choice = Choice { avoid_priorities: &[0], ..bed.choice(0) };
    assert_eq!(bed.balancer.pick(&choice).unwrap().priority, 1);
    let choice = Choice { avoid_priorities: &[0, 1], ..bed.choice(0) };
    assert_eq!(bed.balancer.pick(&choice).unwrap().priority, 0);
}

#[test]
fn a_hash_sticks() {
    let hosts: Vec<_> = (1..6).map(|last| (last, UP, 1)).collect();
    for policy in [Balancing::RingHash { minimum: 1024, maximum: 1 << 20 }, Balancing::Maglev { table_size: 65_537 }] {
        let mut bed = bed(policy, false, 0.0, vec![locality(0, 1, &hosts)]);
        for hash in [0, 1, 99, u64::MAX, 0xdead_beef] {
            let mut seen = Vec::new();
            for seed in 0..20 {
                let choice = Choice { hash: Some(hash), ..bed.choice(seed) };
                seen.push(bed.balancer.pick(&choice).unwrap().endpoint.address.clone());
            }
            seen.dedup();
            assert_eq!(seen.len(), 1);
        }
    }
}

#[test]
fn new_hosts_warm_up() {
    let slow = SlowStart { window: Duration::from_secs(10), aggression: 1.0, min_weight: 0.1 };
    let hosts = [(1, UP, 1), (2, UP, 1)];
    let start = Instant::now();
    let shared = SharedCluster::detached("c", start);
    shared.host(&address(1), start);
    let joined = start + Duration::from_secs(100);
    shared.host(&address(2), joined);
    let set = Arc::new(EndpointSet { localities: vec![locality(0, 1, &hosts)], overprovisioning: 140 });
    let policy = LocalityPolicy { weighted: false, panic_threshold: 0.0 };
    let share_after = |seconds: u64| {
        let mut balancer =
            Balancer::with_policy(Balancing::RoundRobin(Some(slow.clone())), policy.clone(), &set, &shared, joined);
        let mut new = 0;
        for seed in 0..1000 {
            let choice = Choice {
                draw: Draw::new(seed),
                attempt: 1,
                hash: None,
                avoid: &[],
                repicks_max: 0,
                avoid_priorities: &[],
                now: joined + Duration::from_secs(seconds),
            };
            new += u32::from(balancer.pick(&choice).unwrap().endpoint.address == address(2));
        }
        new
    };
    // Weights 1 : 0.1, 1 : 0.5, 1 : 1.
    assert!((85..97).contains(&share_after(0)), "{}", share_after(0));
    assert!((325..342).contains(&share_after(5)), "{}", share_after(5));
    assert!((498..503).contains(&share_after(20)), "{}", share_after(20));
}
