//! Which priority serves, and which of its hosts.

use super::Source;

/// Hosts of one priority.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Counts {
    pub(super) healthy: u32,
    pub(super) degraded: u32,
    pub(super) total: u32,
}

/// How the priorities share the load, in percent.
///
/// *Source*: Envoy, "Priority levels" and "Degraded endpoints": a priority counts as whole while
/// 1/1.4 of it is healthy; what it cannot take spills to the next.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loads {
    healthy: Vec<u32>,
    degraded: Vec<u32>,
    panic: Vec<bool>,
    counts: Vec<Counts>,
    overprovisioning: u32,
    panic_percent: u32,
}

impl Loads {
    pub(super) fn new(counts: &[Counts], overprovisioning: u32, panic_threshold: f64, skip: &[usize]) -> Self {
        let panic_percent = panic_threshold.clamp(0.0, 100.0) as u32;
        let mut loads = Self {
            healthy: vec![0; counts.len()],
            degraded: vec![0; counts.len()],
            panic: vec![false; counts.len()],
            counts: counts.to_vec(),
            overprovisioning,
            panic_percent,
        };
        let share = |part: u32, whole: u32| match whole {
            0 => 0,
            _ => (u64::from(overprovisioning) * u64::from(part) / u64::from(whole)).min(100) as u32,
        };
        let used = |index: usize| !skip.contains(&index);
        let of = |count: &dyn Fn(&Counts) -> u32| -> Vec<u32> {
            counts.iter().enumerate().map(|(i, c)| if used(i) { share(count(c), c.total) } else { 0 }).collect()
        };
        let health = of(&|count| count.healthy);
        let degraded = of(&|count| count.degraded);
        let available = health.iter().chain(&degraded).sum::<u32>().min(100);
        if available < 100 {
            for (index, count) in counts.iter().enumerate() {
                let alive = u64::from(count.healthy + count.degraded) * 100;
                loads.panic[index] =
                    used(index) && count.total > 0 && alive < u64::from(panic_percent) * u64::from(count.total);
            }
        }
        if available == 0 {
            // Nobody is available: spread over all hosts; only priorities in panic will use theirs.
            let total: u64 = counts.iter().enumerate().filter(|(i, _)| used(*i)).map(|(_, c)| u64::from(c.total)).sum();
            if let Some(total) = std::num::NonZeroU64::new(total) {
                let mut left = 100;
                for (index, count) in counts.iter().enumerate().filter(|(i, _)| used(*i)) {
                    loads.healthy[index] = (u64::from(count.total) * 100 / total) as u32;
                    left -= loads.healthy[index];
                }
                if let Some(index) = (0..counts.len()).find(|index| used(*index) && counts[*index].total > 0) {
                    loads.healthy[index] += left;
                }
            }
            return loads;
        }
        let mut left = 100;
        for (load, share) in loads.healthy.iter_mut().zip(&health).chain(loads.degraded.iter_mut().zip(&degraded)) {
            *load = (share * 100 / available).min(left);
            left -= *load;
        }
        // Rounding: the first that is used takes the rest.
        match loads.healthy.iter().position(|load| *load > 0) {
            Some(first) => loads.healthy[first] += left,
            None => {
                if let Some(first) = loads.degraded.iter().position(|load| *load > 0) {
                    loads.degraded[first] += left;
                }
            }
        }
        loads
    }

    /// The loads when these priorities are left out; `None` if nobody else is available.
    pub(super) fn without(&self, skip: &[usize]) -> Option<Self> {
        let others = Self::new(&self.counts, self.overprovisioning, f64::from(self.panic_percent), skip);
        let left = self.counts.iter().enumerate().any(|(i, c)| !skip.contains(&i) && c.healthy + c.degraded > 0);
        left.then_some(others)
    }

    /// The priority for a draw or hash, and which of its hosts to use.
    pub(super) fn choose(&self, draw: u64) -> Option<(usize, Source)> {
        let mut at = (draw % 100) as u32 + 1;
        for (loads, source) in [(&self.healthy, Source::Healthy), (&self.degraded, Source::Degraded)] {
            for (index, load) in loads.iter().enumerate() {
                if at <= *load {
                    return Some((index, if self.panic[index] { Source::All } else { source }));
                }
                at -= load;
            }
        }
        None
    }

    /// Percent of the traffic that goes to healthy hosts, by priority.
    pub fn healthy(&self) -> &[u32] {
        &self.healthy
    }

    /// Whether a priority ignores health.
    pub fn in_panic(&self, priority: usize) -> bool {
        self.panic.get(priority).copied().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(hosts: &[(u32, u32, u32)], healthy: &[u32], degraded: &[u32]) {
        let counts: Vec<_> = hosts.iter().map(|h| Counts { healthy: h.0, degraded: h.1, total: h.2 }).collect();
        let loads = Loads::new(&counts, 140, 0.0, &[]);
        assert_eq!((loads.healthy.as_slice(), loads.degraded.as_slice()), (healthy, degraded), "{hosts:?}");
    }

    /// The tables of Envoy's documentation.
    #[test]
    fn priorities_spill_over() {
        check(&[(100, 0, 100), (100, 0, 100)], &[100, 0], &[0, 0]);
        check(&[(72, 0, 100), (100, 0, 100)], &[100, 0], &[0, 0]);
        check(&[(71, 0, 100), (100, 0, 100)], &[99, 1], &[0, 0]);
        check(&[(50, 0, 100), (100, 0, 100)], &[70, 30], &[0, 0]);
        check(&[(25, 0, 100), (25, 0, 100)], &[50, 50], &[0, 0]);
        check(&[(0, 0, 100), (100, 0, 100)], &[0, 100], &[0, 0]);
        check(&[(50, 0, 100), (50, 0, 100), (100, 0, 100)], &[70, 30, 0], &[0, 0, 0]);
        check(&[(0, 0, 3), (0, 0, 0)], &[100, 0], &[0, 0]);
        check(&[(0, 1, 1)], &[0], &[100]);
        check(&[(1, 1, 2)], &[70], &[30]);
        check(&[(0, 0, 0)], &[0], &[0]);
    }

    #[test]
    fn panic_only_below_its_threshold() {
        let counts = [Counts { healthy: 1, degraded: 0, total: 4 }];
        assert!(!Loads::new(&counts, 140, 0.0, &[]).in_panic(0));
        assert!(Loads::new(&counts, 140, 50.0, &[]).in_panic(0));
        assert!(!Loads::new(&counts, 140, 25.0, &[]).in_panic(0));
        let none = [Counts { healthy: 0, degraded: 0, total: 4 }];
        assert_eq!(Loads::new(&none, 140, 0.0, &[]).choose(5), Some((0, Source::Healthy)));
        assert_eq!(Loads::new(&none, 140, 10.0, &[]).choose(5), Some((0, Source::All)));
    }

    #[test]
    fn tried_priorities_are_left_out_while_there_are_others() {
        let whole = Counts { healthy: 1, degraded: 0, total: 1 };
        let loads = Loads::new(&[whole, whole], 140, 0.0, &[]);
        assert_eq!(loads.without(&[0]).unwrap().healthy(), [0, 100]);
        assert_eq!(loads.without(&[0, 1]), None);
    }
}
