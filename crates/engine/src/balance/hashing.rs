//! Ring hash and Maglev, with Envoy's hash and key forms.

use xxhash_rust::xxh64::xxh64;

/// A ring of points, each owned by a host.
#[derive(Debug)]
pub(super) struct Ring {
    /// Sorted by hash.
    points: Vec<(u64, u32)>,
}

impl Ring {
    /// A ring of at least `minimum` points (as far as `maximum` allows), in proportion to weights
    /// that sum up to 1. The key of a point is `<host key>_<number>`.
    pub(super) fn new(keys: &[String], weights: &[f64], minimum: u64, maximum: u64) -> Self {
        let least = weights.iter().copied().filter(|weight| *weight > 0.0).fold(f64::INFINITY, f64::min);
        if !least.is_finite() {
            return Self { points: Vec::new() };
        }
        // Whole points for the lightest host.
        let scale = ((least * minimum as f64).ceil() / least).min(maximum as f64);
        let mut points = Vec::with_capacity(scale.ceil() as usize);
        let (mut current, mut target) = (0.0, 0.0);
        let mut text = String::new();
        for (index, (key, weight)) in keys.iter().zip(weights).enumerate() {
            target += scale * weight;
            let mut number = 0u64;
            while current < target {
                text.clear();
                text.push_str(key);
                text.push('_');
                text.push_str(&number.to_string());
                points.push((xxh64(text.as_bytes(), 0), index as u32));
                number += 1;
                current += 1.0;
            }
        }
        points.sort_unstable();
        Self { points }
    }

    /// The host of the first point at or after `hash`, `onward` points further on.
    pub(super) fn pick(&self, hash: u64, onward: u64) -> Option<usize> {
        if self.points.is_empty() {
            return None;
        }
        let first = self.points.partition_point(|(point, _)| *point < hash);
        let at = (first + onward as usize) % self.points.len();
        Some(self.points[at].1 as usize)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.points.len()
    }
}

/// A Maglev table.
#[derive(Debug)]
pub(super) struct Table {
    slots: Vec<u32>,
}

const FREE: u32 = u32::MAX;

impl Table {
    /// A table of `size` (prime) slots, filled in proportion to the weights.
    pub(super) fn new(keys: &[String], weights: &[f64], size: u64) -> Self {
        let most = weights.iter().copied().fold(0.0, f64::max);
        let usable = size > 1 && most > 0.0;
        if !usable {
            return Self { slots: Vec::new() };
        }
        let mut entries: Vec<Entry<'_>> = keys
            .iter()
            .zip(weights)
            .enumerate()
            .filter(|(_, (_, weight))| **weight > 0.0)
            .map(|(index, (key, weight))| Entry {
                key,
                index: index as u32,
                offset: xxh64(key.as_bytes(), 0) % size,
                skip: xxh64(key.as_bytes(), 1) % (size - 1) + 1,
                weight: *weight,
                target: 0.0,
                next: 0,
            })
            .collect();
        // Proxies that got the same endpoints in another order agree.
        entries.sort_by(|a, b| a.key.cmp(b.key));
        let mut slots = vec![FREE; size as usize];
        let mut filled = 0;
        let mut round = 1.0;
        while filled < size {
            for entry in &mut entries {
                if filled == size {
                    break;
                }
                if round * entry.weight < entry.target {
                    continue;
                }
                entry.target += most;
                let slot = loop {
                    let slot = ((entry.offset + entry.skip * entry.next) % size) as usize;
                    entry.next += 1;
                    if slots[slot] == FREE {
                        break slot;
                    }
                };
                slots[slot] = entry.index;
                filled += 1;
            }
            round += 1.0;
        }
        Self { slots }
    }

    /// The host in the hash's slot; a later attempt looks elsewhere.
    pub(super) fn pick(&self, hash: u64, onward: u64) -> Option<usize> {
        if self.slots.is_empty() {
            return None;
        }
        let hash = if onward > 0 { hash ^ (u64::MAX - onward + 1) } else { hash };
        Some(self.slots[(hash % self.slots.len() as u64) as usize] as usize)
    }
}

struct Entry<'a> {
    key: &'a str,
    index: u32,
    offset: u64,
    skip: u64,
    weight: f64,
    target: f64,
    next: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("10.0.0.{i}:80")).collect()
    }

    fn even(n: usize) -> Vec<f64> {
        vec![1.0 / n as f64; n]
    }

    #[test]
    fn a_ring_has_its_minimum() {
        assert_eq!(Ring::new(&keys(3), &even(3), 1024, 8_388_608).len(), 1026);
        assert_eq!(Ring::new(&keys(3), &even(3), 1024, 10).len(), 10);
        assert_eq!(Ring::new(&[], &[], 1024, 10).pick(1, 0), None);
    }

    #[test]
    fn a_table_is_even_and_weighted() {
        let table = Table::new(&keys(3), &[0.5, 0.25, 0.25], 65_537);
        let mut counts = [0u32; 3];
        table.slots.iter().for_each(|host| counts[*host as usize] += 1);
        assert!(counts[0].abs_diff(32_768) < 4 && counts[1].abs_diff(16_384) < 4, "{counts:?}");
    }

    #[test]
    fn order_of_endpoints_does_not_matter() {
        let forward = Table::new(&keys(3), &even(3), 1009);
        let mut back = keys(3);
        back.reverse();
        let backward = Table::new(&back, &even(3), 1009);
        assert!((0..1009).all(|hash| forward.pick(hash, 0).map(|host| 2 - host) == backward.pick(hash, 0)));
    }

    proptest! {
        /// When one of n hosts leaves, keys of the others stay (ring), or nearly all do (Maglev).
        #[test]
        fn few_keys_move(n in 3usize..8, gone in 0usize..8) {
            let gone = gone % n;
            let mut fewer = keys(n);
            fewer.remove(gone);
            let rings = (Ring::new(&keys(n), &even(n), 1024, 1 << 20), Ring::new(&fewer, &even(n - 1), 1024, 1 << 20));
            let tables = (Table::new(&keys(n), &even(n), 5003), Table::new(&fewer, &even(n - 1), 5003));
            let (mut ring_moved, mut table_moved) = (0, 0);
            for key in 0u32..1000 {
                let hash = xxh64(&key.to_le_bytes(), 7);
                let before = rings.0.pick(hash, 0).unwrap();
                let after = &fewer[rings.1.pick(hash, 0).unwrap()];
                ring_moved += u32::from(before != gone && keys(n)[before] != *after);
                let before = tables.0.pick(hash, 0).unwrap();
                let after = &fewer[tables.1.pick(hash, 0).unwrap()];
                table_moved += u32::from(before != gone && keys(n)[before] != *after);
            }
            prop_assert!(ring_moved < 250, "ring moved {ring_moved}");
            prop_assert!(table_moved < 200, "table moved {table_moved}");
        }

        /// Both spread keys over all hosts.
        #[test]
        fn both_spread(n in 1usize..10) {
            let ring = Ring::new(&keys(n), &even(n), 1024, 1 << 20);
            let table = Table::new(&keys(n), &even(n), 5003);
            let mut counts = vec![(0u32, 0u32); n];
            for key in 0u32..10_000 {
                let hash = xxh64(&key.to_le_bytes(), 3);
                counts[ring.pick(hash, 0).unwrap()].0 += 1;
                counts[table.pick(hash, 0).unwrap()].1 += 1;
            }
            let fair = 10_000 / n as u32;
            for (ring, table) in counts {
                prop_assert!(ring > fair / 2 && ring < fair * 2, "ring {ring} of {fair}");
                prop_assert!(table > fair * 8 / 10 && table < fair * 12 / 10, "table {table} of {fair}");
            }
        }
    }
}
