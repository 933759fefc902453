//! Outlier detection: hosts that fail too often in a row are left out for a while.
//!
//! Workers [`mark`] what came of their tries on shared counters; the control thread [`sweep`]s once
//! an interval and lets hosts back in. Success rates are not built; settings that ask for them are
//! refused.
//!
//! *Source*: Envoy, "Outlier detection".

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3::OutlierDetection;
use envoy_types::pb::google::protobuf::UInt32Value;

use crate::shared::{SharedCluster, SharedHost};
use crate::unsupported::{Unsupported, duration};

/// When hosts are ejected, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Answers of 5xx in a row; `None`: not counted.
    pub consecutive_5xx: Option<u32>,
    /// Answers of 502, 503 or 504 in a row.
    pub consecutive_gateway: Option<u32>,
    /// Connect failures, resets and time-outs in a row, if they are told apart from answers.
    pub consecutive_local: Option<u32>,
    /// Failures of our own making are not counted as 5xx.
    pub split_local: bool,
    /// Between sweeps.
    pub interval: Duration,
    /// How long, times the ejections in a row.
    pub base: Duration,
    /// At most so long.
    pub time_max: Duration,
    /// At most this share of the hosts.
    pub percent_max: u32,
    /// One may be ejected whatever the share.
    pub always_one: bool,
    /// The answers that are failures, instead of all 5xx.
    pub failures: Option<Box<[u16]>>,
}

/// What came of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A response with this status (gRPC mapped to HTTP).
    Status(u16),
    /// A connection of bytes was made.
    Connected,
    /// Connect failure or reset.
    Local,
    /// Time-out.
    Timeout,
}

/// A threshold that is either enforced wholly or not at all.
fn threshold(
    count: Option<&UInt32Value>,
    enforcing: Option<&UInt32Value>,
    enforcing_default: u32,
    path: &str,
) -> Result<Option<u32>, Unsupported> {
    let count = count.map_or(5, |value| value.value);
    match enforcing.map_or(enforcing_default, |value| value.value) {
        0 => Ok(None),
        100 => Ok(Some(count).filter(|count| *count > 0)),
        other => Err(Unsupported::new(path, format!("is {other}; only 0 and 100 are supported"))),
    }
}

fn switched_off(value: Option<&UInt32Value>, default: u32, path: &str) -> Result<(), Unsupported> {
    if value.map_or(default, |value| value.value) == 0 {
        Ok(())
    } else {
        Err(Unsupported::new(path, "must be 0: only consecutive failures are supported"))
    }
}

impl Policy {
    /// Lowers the settings.
    pub fn lower(proto: &OutlierDetection) -> Result<Self, Unsupported> {
        switched_off(proto.enforcing_success_rate.as_ref(), 100, "enforcing_success_rate")?;
        switched_off(proto.enforcing_failure_percentage.as_ref(), 0, "enforcing_failure_percentage")?;
        let split_local = proto.split_external_local_origin_errors;
        if split_local {
            let rate = proto.enforcing_local_origin_success_rate.as_ref();
            switched_off(rate, 100, "enforcing_local_origin_success_rate")?;
            let share = proto.enforcing_failure_percentage_local_origin.as_ref();
            switched_off(share, 0, "enforcing_failure_percentage_local_origin")?;
        }
        if !proto.monitors.is_empty() {
            return Err(Unsupported::not_built("monitors"));
        }
        if proto.detect_degraded_hosts.as_ref().is_some_and(|value| value.value) {
            return Err(Unsupported::not_built("detect_degraded_hosts"));
        }
        let time = |value: &Option<_>, default: u64, path: &str| {
            value.as_ref().map_or(Ok(Duration::from_secs(default)), |value| duration(value, path))
        };
        if !time(&proto.max_ejection_time_jitter, 0, "max_ejection_time_jitter")?.is_zero() {
            return Err(Unsupported::not_built("max_ejection_time_jitter"));
        }
        let interval = time(&proto.interval, 10, "interval")?;
        if interval.is_zero() {
            return Err(Unsupported::new("interval", "must be above 0"));
        }
        let base = time(&proto.base_ejection_time, 30, "base_ejection_time")?;
        let percent_max = proto.max_ejection_percent.as_ref().map_or(10, |value| value.value);
        if percent_max > 100 {
            return Err(Unsupported::new("max_ejection_percent", "must not be above 100"));
        }
        let consecutive_5xx = threshold(
            proto.consecutive_5xx.as_ref(),
            proto.enforcing_consecutive_5xx.as_ref(),
            100,
            "enforcing_consecutive_5xx",
        )?;
        let consecutive_gateway = threshold(
            proto.consecutive_gateway_failure.as_ref(),
            proto.enforcing_consecutive_gateway_failure.as_ref(),
            0,
            "enforcing_consecutive_gateway_failure",
        )?;
        let consecutive_local = threshold(
            proto.consecutive_local_origin_failure.as_ref(),
            proto.enforcing_consecutive_local_origin_failure.as_ref(),
            100,
            "enforcing_consecutive_local_origin_failure",
        )?;
        Ok(Self {
            consecutive_5xx,
            consecutive_gateway,
            consecutive_local: consecutive_local.filter(|_| split_local),
            split_local,
            interval,
            base,
            time_max: time(&proto.max_ejection_time, 300, "max_ejection_time")?.max(base),
            percent_max,
            always_one: proto.always_eject_one_host.as_ref().is_some_and(|value| value.value),
            failures: None,
        })
    }

    /// What an answer counts as: itself, or 500 for one that is named a failure and 200 for one that is not.
    fn judged(&self, status: u16) -> u16 {
        match &self.failures {
            None => status,
            Some(failures) if failures.contains(&status) => status.max(500),
            Some(_) => 200,
        }
    }

    /// How long the `times`-th ejection in a row lasts.
    pub fn ejection_time(&self, times: u32) -> Duration {
        self.base.saturating_mul(times.max(1)).min(self.time_max)
    }
}

/// Counts an event, and ejects the host if it is one too many. `hosts` is how many the cluster has.
pub fn mark(
    policy: &Policy,
    cluster: &Arc<SharedCluster>,
    host: &Arc<SharedHost>,
    event: Event,
    hosts: usize,
    now: Instant,
) {
    let status = match event {
        Event::Status(status) => {
            // An answer came: nothing is wrong on our side.
            reset(&host.consecutive_local);
            policy.judged(status)
        }
        Event::Connected => {
            reset(&host.consecutive_local);
            if policy.split_local {
                return;
            }
            200
        }
        Event::Local | Event::Timeout if policy.split_local => {
            if reached(&host.consecutive_local, policy.consecutive_local) {
                eject(policy, cluster, host, hosts, now);
            }
            return;
        }
        Event::Local => 503,
        Event::Timeout => 504,
    };
    let mut bad = false;
    if matches!(status, 502..=504) {
        bad |= reached(&host.consecutive_gateway, policy.consecutive_gateway);
    } else {
        reset(&host.consecutive_gateway);
    }
    if matches!(status, 500..=599) {
        bad |= reached(&host.consecutive_5xx, policy.consecutive_5xx);
    } else {
        reset(&host.consecutive_5xx);
    }
    if bad {
        eject(policy, cluster, host, hosts, now);
    }
}

/// Avoids writing a line that other cores read when there is nothing to write.
fn reset(counter: &AtomicU32) {
    if counter.load(Relaxed) != 0 {
        counter.store(0, Relaxed);
    }
}

/// Counts one more; says whether the threshold is reached, and then begins anew.
fn reached(counter: &AtomicU32, threshold: Option<u32>) -> bool {
    let Some(threshold) = threshold else { return false };
    if counter.fetch_add(1, Relaxed) + 1 < threshold {
        return false;
    }
    counter.store(0, Relaxed);
    true
}

fn eject(policy: &Policy, cluster: &SharedCluster, host: &SharedHost, hosts: usize, now: Instant) {
    let out = u64::from(cluster.ejected.get());
    let within = (out + 1) * 100 <= u64::from(policy.percent_max) * hosts as u64;
    if !(within || (policy.always_one && out == 0)) || host.ejected.swap(true, Relaxed) {
        return;
    }
    cluster.ejected.enter();
    host.ejected_at.store(cluster.nanos(now), Relaxed);
    // The time grows no further once it is at its maximum.
    let times = host.ejections.load(Relaxed);
    if times == 0 || policy.base.saturating_mul(times) < policy.time_max {
        host.ejections.store(times + 1, Relaxed);
    }
    cluster.health_version.fetch_add(1, Relaxed);
}

/// Ends ejections whose time has passed; returns when to come again.
pub fn sweep(policy: &Policy, cluster: &SharedCluster, now: Instant) -> Duration {
    let nanos = cluster.nanos(now);
    let mut changed = false;
    for host in cluster.hosts() {
        let times = host.ejections.load(Relaxed);
        if !host.is_ejected() {
            // Well behaved since the last sweep: the next ejection is shorter.
            if times > 0 {
                host.ejections.store(times - 1, Relaxed);
            }
            continue;
        }
        let out_for = Duration::from_nanos(nanos.saturating_sub(host.ejected_at.load(Relaxed)));
        if out_for >= policy.ejection_time(times) && host.ejected.swap(false, Relaxed) {
            for counter in [&host.consecutive_5xx, &host.consecutive_gateway, &host.consecutive_local] {
                counter.store(0, Relaxed);
            }
            cluster.ejected.leave();
            changed = true;
        }
    }
    if changed {
        cluster.health_version.fetch_add(1, Relaxed);
    }
    policy.interval
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::BoolValue;

    use super::*;
    use crate::cluster::Address;

    /// What `outlierDetection: {}` is compiled to.
    fn istio() -> OutlierDetection {
        OutlierDetection {
            enforcing_success_rate: number(0),
            always_eject_one_host: Some(BoolValue { value: true }),
            ..OutlierDetection::default()
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "as the messages hold it")]
    fn number(value: u32) -> Option<UInt32Value> {
        Some(UInt32Value { value })
    }

    struct Bed {
        policy: Policy,
        cluster: Arc<SharedCluster>,
        hosts: Vec<Arc<SharedHost>>,
        start: Instant,
    }

    fn bed(proto: &OutlierDetection, hosts: u8) -> Bed {
        let start = Instant::now();
        let cluster = SharedCluster::detached("c", start);
        let host = |last: u8| cluster.host(&Address::Ip(([10, 0, 0, last], 80).into()), start);
        Bed { policy: Policy::lower(proto).unwrap(), hosts: (0..hosts).map(host).collect(), cluster, start }
    }

    impl Bed {
        fn mark(&self, host: usize, events: &[Event], after: u64) {
            for event in events {
                let now = self.start + Duration::from_secs(after);
                mark(&self.policy, &self.cluster, &self.hosts[host], *event, self.hosts.len(), now);
            }
        }

        fn sweep(&self, after: u64) {
            sweep(&self.policy, &self.cluster, self.start + Duration::from_secs(after));
        }

        fn ejected(&self) -> Vec<usize> {
            (0..self.hosts.len()).filter(|host| self.hosts[*host].is_ejected()).collect()
        }
    }

    const BAD: Event = Event::Status(500);

    #[test]
    fn five_in_a_row() {
        let bed = bed(&istio(), 3);
        bed.mark(0, &[BAD; 4], 0);
        bed.mark(0, &[Event::Status(404), BAD, BAD, BAD, BAD], 0);
        assert!(bed.ejected().is_empty());
        let version = bed.cluster.health_version.load(Relaxed);
        bed.mark(0, &[BAD], 0);
        assert_eq!(bed.ejected(), [0]);
        assert_ne!(bed.cluster.health_version.load(Relaxed), version);
    }

    #[test]
    fn named_statuses_are_failures_and_no_others() {
        let mut bed = bed(&istio(), 3);
        bed.policy.failures = Some([429, 503].into());
        bed.mark(0, &[Event::Status(429), Event::Status(503), Event::Status(429), Event::Status(429)], 0);
        bed.mark(1, &[BAD; 9], 0);
        assert!(bed.ejected().is_empty());
        bed.mark(0, &[Event::Status(429)], 0);
        assert_eq!(bed.ejected(), [0]);
    }

    #[test]
    fn failures_of_our_own_count_as_5xx_unless_split() {
        let mixed = [Event::Local, Event::Timeout, BAD, Event::Local, Event::Local];
        let bed_of = |split| {
            bed(
                &OutlierDetection {
                    split_external_local_origin_errors: split,
                    enforcing_local_origin_success_rate: number(0),
                    consecutive_local_origin_failure: number(3),
                    ..istio()
                },
                3,
            )
        };
        let together = bed_of(false);
        together.mark(0, &mixed, 0);
        assert_eq!(together.ejected(), [0]);
        let apart = bed_of(true);
        apart.mark(0, &mixed, 0);
        assert!(apart.ejected().is_empty());
        apart.mark(0, &[Event::Local], 0);
        assert_eq!(apart.ejected(), [0]);
    }

    #[test]
    fn gateway_errors_have_their_own_count() {
        let gateway = OutlierDetection {
            consecutive_gateway_failure: number(3),
            enforcing_consecutive_gateway_failure: number(100),
            consecutive_5xx: number(0),
            ..istio()
        };
        let bed = bed(&gateway, 3);
        bed.mark(0, &[Event::Status(502), Event::Status(503), BAD, Event::Status(504), Event::Local], 0);
        assert!(bed.ejected().is_empty());
        bed.mark(0, &[Event::Timeout], 0);
        assert_eq!(bed.ejected(), [0]);
    }

    #[test]
    fn not_more_than_the_share_but_one_where_that_is_asked() {
        let check = |percent: u32, hosts: u8, always_one: bool, expect: usize| {
            let proto = OutlierDetection {
                max_ejection_percent: number(percent),
                always_eject_one_host: Some(BoolValue { value: always_one }),
                ..istio()
            };
            let bed = bed(&proto, hosts);
            for host in 0..usize::from(hosts) {
                bed.mark(host, &[BAD; 5], 0);
            }
            assert_eq!(bed.ejected().len(), expect, "{percent} % of {hosts}, always one: {always_one}");
        };
        for always_one in [false, true] {
            let at_least = usize::from(always_one);
            check(10, 3, always_one, at_least);
            check(0, 3, always_one, at_least);
            check(10, 20, always_one, 2);
            check(50, 4, always_one, 2);
            check(100, 3, always_one, 3);
        }
        let unsaid = OutlierDetection { always_eject_one_host: None, ..istio() };
        assert!(!Policy::lower(&unsaid).unwrap().always_one, "as in Envoy since 1.28");
    }

    #[test]
    fn ejections_grow_and_shrink() {
        let bed = bed(&istio(), 3);
        bed.mark(0, &[BAD; 5], 0);
        bed.sweep(29);
        assert_eq!(bed.ejected(), [0]);
        bed.sweep(30);
        assert!(bed.ejected().is_empty());
        bed.mark(0, &[BAD; 5], 31);
        bed.sweep(31 + 59);
        assert_eq!(bed.ejected(), [0]);
        bed.sweep(31 + 60);
        assert!(bed.ejected().is_empty());
        // Two quiet sweeps forget both.
        bed.sweep(101);
        bed.sweep(111);
        bed.mark(0, &[BAD; 5], 112);
        bed.sweep(142);
        assert!(bed.ejected().is_empty());
        assert_eq!(bed.policy.ejection_time(3), Duration::from_secs(90));
        assert_eq!(bed.policy.ejection_time(1000), Duration::from_mins(5));
    }

    #[test]
    fn what_is_not_built_is_refused() {
        let refused = |proto: OutlierDetection| Policy::lower(&proto).unwrap_err().path;
        assert_eq!(refused(OutlierDetection::default()), "enforcing_success_rate");
        let share = OutlierDetection { enforcing_failure_percentage: number(1), ..istio() };
        assert_eq!(refused(share), "enforcing_failure_percentage");
        let half = OutlierDetection { enforcing_consecutive_5xx: number(50), ..istio() };
        assert_eq!(refused(half), "enforcing_consecutive_5xx");
    }
}
