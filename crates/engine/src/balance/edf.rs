//! Earliest deadline first: weighted turns that come as evenly spread as they can.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A weighted order over `0..n`.
#[derive(Debug)]
pub(super) struct Edf {
    heap: BinaryHeap<Turn>,
    now: f64,
    order: u64,
}

#[derive(Debug)]
struct Turn {
    deadline: f64,
    order: u64,
    index: usize,
}

impl PartialEq for Turn {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Turn {}

impl PartialOrd for Turn {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Turn {
    /// The greatest is the next one: earliest deadline, then the one that waits longer.
    fn cmp(&self, other: &Self) -> Ordering {
        other.deadline.total_cmp(&self.deadline).then(other.order.cmp(&self.order))
    }
}

impl Edf {
    /// Every index of `weights` whose weight is above 0; `draw` says where the first round begins,
    /// so that many proxies do not all begin with the same host.
    pub(super) fn new(weights: &[f64], draw: u64) -> Self {
        let mut edf = Self { heap: BinaryHeap::with_capacity(weights.len()), now: 0.0, order: 0 };
        let mut salt = draw;
        for (index, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            salt = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31) ^ index as u64;
            let phase = (salt >> 11) as f64 / (1u64 << 53) as f64;
            edf.heap.push(Turn { deadline: phase / weight, order: edf.order, index });
            edf.order += 1;
        }
        edf
    }

    /// Whose turn it is; `weight` gives the weight of that index until its next turn.
    pub(super) fn next(&mut self, weight: impl Fn(usize) -> f64) -> Option<usize> {
        let turn = self.heap.pop()?;
        self.now = turn.deadline;
        let weight = weight(turn.index).max(1e-9);
        self.heap.push(Turn { deadline: self.now + 1.0 / weight, order: self.order, index: turn.index });
        self.order += 1;
        Some(turn.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_follow_weights() {
        let weights = [3.0, 1.0, 0.0];
        let mut edf = Edf::new(&weights, 12345);
        let mut counts = [0; 3];
        for _ in 0..400 {
            counts[edf.next(|index| weights[index]).unwrap()] += 1;
        }
        assert_eq!(counts[2], 0);
        assert!((299..=301).contains(&counts[0]), "{counts:?}");
        assert!(Edf::new(&[], 0).next(|_| 1.0).is_none());
    }
}
