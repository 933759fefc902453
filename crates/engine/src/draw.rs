//! Random draws from one seed, one name for each purpose.
//!
//! A record of a request with its seed can be replayed, and a new filter does not shift the draws
//! of another.

/// The draws of one request or connection.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    seed: u64,
}

/// SplitMix64's finaliser: every input bit reaches every output bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

const fn name_hash(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut at = 0;
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        at += 1;
    }
    hash
}

impl Draw {
    /// The draws of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The draw called `name`.
    pub fn named(self, name: &str) -> u64 {
        self.numbered(name, 0)
    }

    /// The `number`-th draw called `name` (one per attempt, per pick).
    pub fn numbered(self, name: &str, number: u64) -> u64 {
        let salted = self.seed ^ name_hash(name).rotate_left(17) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mix(mix(salted).wrapping_add(0x9e37_79b9_7f4a_7c15))
    }

    /// A draw in `0..bound`; 0 for a bound of 0.
    pub fn below(self, name: &str, bound: u64) -> u64 {
        scale(self.named(name), bound)
    }
}

/// Maps a full-range draw to `0..bound` without visible bias; 0 for a bound of 0.
pub fn scale(draw: u64, bound: u64) -> u64 {
    let wide = u128::from(draw) * u128::from(bound);
    u64::try_from(wide >> 64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_shift_each_other() {
        let draw = Draw::new(7);
        assert_eq!(draw.named("route_weight"), Draw::new(7).named("route_weight"));
        assert_ne!(draw.named("route_weight"), draw.named("fault_delay"));
        assert_ne!(draw.numbered("host", 1), draw.numbered("host", 2));
    }

    #[test]
    fn close_seeds_spread_evenly() {
        let mut buckets = [0u32; 10];
        for seed in 0..100_000 {
            buckets[usize::try_from(Draw::new(seed).below("route_weight", 10)).unwrap()] += 1;
        }
        assert!(buckets.iter().all(|n| (9_600..10_400).contains(n)), "{buckets:?}");
    }

    #[test]
    fn scale_stays_below() {
        assert_eq!(scale(u64::MAX, 3), 2);
        assert_eq!(scale(0, 3), 0);
        assert_eq!(scale(5, 0), 0);
    }
}
