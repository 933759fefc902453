//! Choosing an endpoint: priorities, localities, then one of Envoy's policies.
//!
//! A [`Balancer`] belongs to one worker and one cluster. It is built over a generation of
//! endpoints and looks again when hosts are ejected or come back ([`Balancer::refresh`]). Draws
//! come from the request's seed, so a pick can be replayed.
//!
//! ```text
//! priority  by health: 140 % of the healthy share, the rest spills over
//! locality  by weight, if the cluster says so
//! host      in turn · less busy of n · random · ring · Maglev table
//! ```
//!
//! *Source*: Envoy, "Load balancing: priority levels, locality weighted, supported load balancers,
//! panic threshold, slow start".
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "shares and ring positions: small whole numbers as floats and back"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crate::cluster::{Balancing, Cluster, Endpoint, EndpointSet, Health, LocalityPolicy, SlowStart};
use crate::draw::{Draw, scale};
use crate::shared::{SharedCluster, SharedHost};

mod edf;
mod hashing;
mod priority;

use edf::Edf;
use hashing::{Ring, Table};
pub use priority::Loads;

/// What a pick depends on beside the endpoints.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    /// The request's draws.
    pub draw: Draw,
    /// 1 for the first attempt of a request; later ones draw anew.
    pub attempt: u32,
    /// Hash of the route's hash policy; `None` chooses at random where a hash is needed.
    pub hash: Option<u64>,
    /// Hosts already tried (`previous_hosts`), to be avoided if there are others.
    pub avoid: &'a [Arc<SharedHost>],
    /// How often to pick anew when an avoided host comes up (`host_selection_retry_max_attempts`).
    pub repicks_max: u32,
    /// Priorities already tried (`previous_priorities`), to be avoided if there are others.
    pub avoid_priorities: &'a [u32],
    /// The moment, for warm-up.
    pub now: Instant,
}

/// The endpoint picked.
#[derive(Clone, Copy, Debug)]
pub struct Pick<'a> {
    /// Its counters.
    pub host: &'a Arc<SharedHost>,
    /// What the control plane says about it.
    pub endpoint: &'a Arc<Endpoint>,
    /// Its priority.
    pub priority: u32,
}

#[derive(Debug)]
struct Host {
    shared: Arc<SharedHost>,
    endpoint: Arc<Endpoint>,
    priority: usize,
    locality: usize,
}

/// The balancer of one cluster in one worker.
#[derive(Debug)]
pub struct Balancer {
    policy: Balancing,
    locality: LocalityPolicy,
    overprovisioning: u32,
    shared: Arc<SharedCluster>,
    set: Arc<EndpointSet>,
    hosts: Vec<Host>,
    /// Numbers of the priorities, as configured, ascending.
    priorities: Vec<u32>,
    /// Weights of the localities, by index.
    locality_weights: Vec<u32>,
    version: u64,
    states: Vec<PriorityState>,
    loads: Loads,
}

/// Which hosts of a priority are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Healthy,
    Degraded,
    All,
}

#[derive(Debug)]
struct PriorityState {
    healthy: Group,
    degraded: Group,
    all: Group,
}

/// A list of hosts and the state of picking from it.
#[derive(Debug, Default)]
struct Group {
    hosts: Vec<u32>,
    /// By locality, with its effective weight; empty unless localities are weighted.
    localities: Vec<(f64, Vec<u32>)>,
    locality_order: Option<Edf>,
    /// One per locality, or one.
    pickers: Vec<Option<Picker>>,
}

#[derive(Debug)]
enum Picker {
    /// The next one.
    Cursor(usize),
    /// The next one by weight.
    Weighted(Edf),
    /// The least busy of so many.
    LessBusy(u32),
    Random,
    Ring(Ring),
    Table(Table),
}

impl Balancer {
    /// Over one generation of endpoints.
    ///
    /// *Cost*: linear in the endpoints; rings and tables are built on the first pick.
    pub fn new(cluster: &Cluster, set: &Arc<EndpointSet>, shared: &Arc<SharedCluster>, now: Instant) -> Self {
        Self::with_policy(cluster.balancing.clone(), cluster.locality.clone(), set, shared, now)
    }

    fn with_policy(
        policy: Balancing,
        locality: LocalityPolicy,
        set: &Arc<EndpointSet>,
        shared: &Arc<SharedCluster>,
        now: Instant,
    ) -> Self {
        let mut priorities: Vec<u32> = set.localities.iter().map(|locality| locality.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        let mut hosts = Vec::with_capacity(set.len());
        for (index, locality) in set.localities.iter().enumerate() {
            let priority = priorities.binary_search(&locality.priority).unwrap_or_default();
            for endpoint in &locality.endpoints {
                hosts.push(Host {
                    shared: shared.host(&endpoint.address, now),
                    endpoint: Arc::new(endpoint.clone()),
                    priority,
                    locality: index,
                });
            }
        }
        let mut balancer = Self {
            policy,
            locality,
            overprovisioning: if set.overprovisioning == 0 { 140 } else { set.overprovisioning },
            shared: Arc::clone(shared),
            set: Arc::clone(set),
            hosts,
            priorities,
            locality_weights: set.localities.iter().map(|locality| locality.weight).collect(),
            version: 0,
            states: Vec::new(),
            loads: Loads::default(),
        };
        balancer.look();
        balancer
    }

    /// The generation it was built over.
    pub fn endpoints(&self) -> &Arc<EndpointSet> {
        &self.set
    }

    /// Looks at the hosts' health again if any was ejected or came back since.
    pub fn refresh(&mut self) {
        if self.version != self.shared.health_version.load(Relaxed) {
            self.look();
        }
    }

    /// How the priorities share the load.
    pub fn loads(&self) -> &Loads {
        &self.loads
    }

    fn look(&mut self) {
        self.version = self.shared.health_version.load(Relaxed);
        let mut lists = vec![(Vec::new(), Vec::new(), Vec::new()); self.priorities.len()];
        for (index, host) in self.hosts.iter().enumerate() {
            let index = index as u32;
            let list = &mut lists[host.priority];
            list.2.push(index);
            match host.endpoint.health {
                _ if host.shared.is_ejected() => {}
                Health::Healthy => list.0.push(index),
                Health::Degraded => list.1.push(index),
                Health::Unhealthy => {}
            }
        }
        let counts: Vec<_> = lists
            .iter()
            .map(|(healthy, degraded, all)| priority::Counts {
                healthy: healthy.len() as u32,
                degraded: degraded.len() as u32,
                total: all.len() as u32,
            })
            .collect();
        self.loads = Loads::new(&counts, self.overprovisioning, self.locality.panic_threshold, &[]);
        self.states = lists
            .into_iter()
            .map(|(healthy, degraded, all)| PriorityState {
                healthy: self.group(healthy, &all),
                degraded: self.group(degraded, &all),
                all: self.group(all.clone(), &all),
            })
            .collect();
    }

    /// The hosts of a list by locality, weights lowered by the unavailable share.
    fn group(&self, hosts: Vec<u32>, all: &[u32]) -> Group {
        if !self.locality.weighted || hosts.is_empty() {
            return Group { hosts, pickers: vec![None], ..Group::default() };
        }
        let mut counts = vec![0u32; self.locality_weights.len()];
        for host in all {
            counts[self.hosts[*host as usize].locality] += 1;
        }
        let mut by_locality = vec![Vec::new(); counts.len()];
        for host in &hosts {
            by_locality[self.hosts[*host as usize].locality].push(*host);
        }
        let localities: Vec<_> = by_locality
            .into_iter()
            .enumerate()
            .filter(|(index, hosts)| !hosts.is_empty() && self.locality_weights[*index] > 0)
            .map(|(index, hosts)| {
                let available = hosts.len() as f64 / f64::from(counts[index]);
                let factor = (f64::from(self.overprovisioning) / 100.0 * available).min(1.0);
                (f64::from(self.locality_weights[index]) * factor, hosts)
            })
            .collect();
        let pickers = localities.iter().map(|_| None).collect();
        Group { hosts, localities, locality_order: None, pickers }
    }

    /// Picks an endpoint; `None` when no usable one is left.
    pub fn pick(&mut self, choice: &Choice<'_>) -> Option<Pick<'_>> {
        self.refresh();
        let mut avoiding = None;
        if !choice.avoid_priorities.is_empty() {
            let skip: Vec<usize> = choice
                .avoid_priorities
                .iter()
                .filter_map(|number| self.priorities.binary_search(number).ok())
                .collect();
            avoiding = self.loads.without(&skip);
        }
        let mut found = None;
        for repick in 0..=choice.repicks_max {
            let number = u64::from(choice.attempt) << 16 | u64::from(repick) << 4;
            let draw = choice.draw.numbered("host", number);
            // Envoy keeps a hash on its priority.
            let loads = avoiding.as_ref().unwrap_or(&self.loads);
            let (priority, source) = loads.choose(choice.hash.unwrap_or(draw))?;
            let host = self.pick_in(priority, source, choice, number, draw, repick)?;
            found = Some((host, priority, source));
            if !is_avoided(&self.hosts[host as usize], choice.avoid) {
                break;
            }
            if repick == choice.repicks_max {
                // Better another host out of turn than one that failed.
                let list = &group_of(&self.states[priority], source).hosts;
                let start = scale(draw, list.len() as u64) as usize;
                let other = list[start..]
                    .iter()
                    .chain(&list[..start])
                    .find(|host| !is_avoided(&self.hosts[**host as usize], choice.avoid));
                if let Some(other) = other {
                    found = Some((*other, priority, source));
                }
            }
        }
        let host = &self.hosts[found?.0 as usize];
        Some(Pick { host: &host.shared, endpoint: &host.endpoint, priority: self.priorities[host.priority] })
    }

    fn pick_in(
        &mut self,
        priority: usize,
        source: Source,
        choice: &Choice<'_>,
        number: u64,
        draw: u64,
        repick: u32,
    ) -> Option<u32> {
        let Self { policy, hosts, states, shared, locality_weights, .. } = self;
        let view = View { policy, hosts, shared, locality_weights, now: choice.now };
        let state = &mut states[priority];
        let group = match source {
            Source::Healthy => &mut state.healthy,
            Source::Degraded => &mut state.degraded,
            Source::All => &mut state.all,
        };
        if group.hosts.is_empty() {
            return None;
        }
        let hashes = matches!(view.policy, Balancing::RingHash { .. } | Balancing::Maglev { .. });
        if group.localities.is_empty() || hashes {
            if view.policy == &Balancing::ClusterProvided || (group.localities.is_empty() && group.pickers.is_empty()) {
                return None;
            }
            let weighted = !group.localities.is_empty();
            let picker = group.pickers[0].get_or_insert_with(|| view.picker(&group.hosts, weighted, draw));
            return view.pick(picker, &group.hosts, choice, number, draw, repick);
        }
        let localities = &group.localities;
        let order = group.locality_order.get_or_insert_with(|| {
            let weights: Vec<f64> = localities.iter().map(|(weight, _)| *weight).collect();
            Edf::new(&weights, draw)
        });
        let locality = order.next(|index| localities[index].0)?;
        let list = &localities[locality].1;
        let picker = group.pickers[locality].get_or_insert_with(|| view.picker(list, false, draw));
        view.pick(picker, list, choice, number, draw, repick)
    }
}

fn group_of(state: &PriorityState, source: Source) -> &Group {
    match source {
        Source::Healthy => &state.healthy,
        Source::Degraded => &state.degraded,
        Source::All => &state.all,
    }
}

fn is_avoided(host: &Host, avoid: &[Arc<SharedHost>]) -> bool {
    avoid.iter().any(|tried| Arc::ptr_eq(tried, &host.shared))
}

/// What picking reads.
#[derive(Clone, Copy)]
struct View<'a> {
    policy: &'a Balancing,
    hosts: &'a [Host],
    shared: &'a SharedCluster,
    locality_weights: &'a [u32],
    now: Instant,
}

impl View<'_> {
    fn picker(self, list: &[u32], locality_weighted: bool, draw: u64) -> Picker {
        let even = list.windows(2).all(|pair| self.plain_weight(pair[0]) == self.plain_weight(pair[1]));
        match self.policy {
            Balancing::RoundRobin(None) if even => Picker::Cursor(scale(draw, list.len() as u64) as usize),
            Balancing::LeastRequest { choices, slow_start: None, .. } if even => Picker::LessBusy((*choices).max(2)),
            Balancing::RoundRobin(_) | Balancing::LeastRequest { .. } => {
                let weights: Vec<f64> = list.iter().map(|host| self.weight(*host)).collect();
                Picker::Weighted(Edf::new(&weights, draw))
            }
            Balancing::Random | Balancing::ClusterProvided => Picker::Random,
            Balancing::RingHash { minimum, maximum } => {
                let (keys, weights) = self.shares(list, locality_weighted);
                Picker::Ring(Ring::new(&keys, &weights, *minimum, *maximum))
            }
            Balancing::Maglev { table_size } => {
                let (keys, weights) = self.shares(list, locality_weighted);
                Picker::Table(Table::new(&keys, &weights, *table_size))
            }
        }
    }

    fn pick(
        self,
        picker: &mut Picker,
        list: &[u32],
        choice: &Choice<'_>,
        number: u64,
        draw: u64,
        repick: u32,
    ) -> Option<u32> {
        let index = match picker {
            Picker::Cursor(next) => {
                let index = *next % list.len();
                *next = index + 1;
                index
            }
            Picker::Weighted(order) => order.next(|index| self.weight(list[index]))?,
            Picker::Random => scale(draw, list.len() as u64) as usize,
            Picker::LessBusy(choices) => (0..u64::from(*choices))
                .map(|n| scale(choice.draw.numbered("host_candidate", number | n), list.len() as u64) as usize)
                .min_by_key(|index| self.hosts[list[*index] as usize].shared.requests.get())?,
            Picker::Ring(ring) => ring.pick(choice.hash.unwrap_or(draw), u64::from(repick))?,
            Picker::Table(table) => table.pick(choice.hash.unwrap_or(draw), u64::from(repick))?,
        };
        list.get(index).copied()
    }

    fn plain_weight(self, host: u32) -> u32 {
        self.hosts[host as usize].endpoint.weight.max(1)
    }

    /// The weight of a host now: warm-up and, for least request, how busy it is.
    fn weight(self, host: u32) -> f64 {
        let mut weight = f64::from(self.plain_weight(host));
        let shared = &self.hosts[host as usize].shared;
        let slow_start = match self.policy {
            Balancing::RoundRobin(slow_start) => slow_start.as_ref(),
            Balancing::LeastRequest { active_request_bias, slow_start, .. } => {
                if *active_request_bias > 0.0 {
                    weight /= f64::from(shared.requests.get() + 1).powf(*active_request_bias);
                }
                slow_start.as_ref()
            }
            _ => None,
        };
        slow_start.map_or(weight, |slow_start| weight * self.warmth(slow_start, shared))
    }

    /// 0 to 1: how far a new host has warmed up.
    fn warmth(self, slow_start: &SlowStart, host: &SharedHost) -> f64 {
        let age = self.shared.nanos(self.now).saturating_sub(host.since) as f64;
        let window = slow_start.window.as_nanos() as f64;
        if age >= window {
            return 1.0;
        }
        let share = (age.max(1_000_000.0) / window).min(1.0);
        share.powf(1.0 / slow_start.aggression.max(0.01)).max(slow_start.min_weight)
    }

    /// Keys and normalised weights, for rings and tables.
    fn shares(self, list: &[u32], locality_weighted: bool) -> (Vec<String>, Vec<f64>) {
        let keys = list.iter().map(|host| self.hosts[*host as usize].endpoint.address.to_string()).collect();
        let mut weights: Vec<f64> = list.iter().map(|host| f64::from(self.plain_weight(*host))).collect();
        if locality_weighted {
            let mut sums = vec![0.0; self.locality_weights.len()];
            for (host, weight) in list.iter().zip(&weights) {
                sums[self.hosts[*host as usize].locality] += weight;
            }
            for (host, weight) in list.iter().zip(&mut weights) {
                let locality = self.hosts[*host as usize].locality;
                *weight *= f64::from(self.locality_weights[locality]) / sums[locality];
            }
        }
        let sum: f64 = weights.iter().sum();
        if sum > 0.0 {
            for weight in &mut weights {
                *weight /= sum;
            }
        }
        (keys, weights)
    }
}

#[cfg(test)]
mod tests;
