//! Ephemeral local ports: handed out in order, round and round, so that a pair is not used again soon (a late reset
//! carries nothing but ports, R45). Every search is bounded by the number of ports that can be taken (R48).

/// First ephemeral port: above every port that a service is likely to name.
pub(crate) const EPHEMERAL_MIN: u32 = 1 << 30;
/// Last one: `u32::MAX` is `VMADDR_PORT_ANY` and names no port.
pub(crate) const EPHEMERAL_MAX: u32 = u32::MAX - 1;

/// Hands out ports of `min..=max`.
pub(crate) struct PortAllocator {
    min: u32,
    max: u32,
    next: u32,
}

impl PortAllocator {
    /// Starts somewhere in `min..=max`, as the seed says.
    pub(crate) fn new(min: u32, max: u32, seed: u64) -> Self {
        let span = u64::from(max - min) + 1;
        // The remainder is below `span`, which fits 32 bits or is 2^32.
        let next = min + (mix(seed) % span) as u32;
        Self { min, max, next }
    }

    /// Returns the next port that is not `used`, looking at no more than `tries` of them.
    pub(crate) fn allocate(&mut self, tries: u32, used: impl Fn(u32) -> bool) -> Option<u32> {
        let span = u64::from(self.max - self.min) + 1;
        for _ in 0..u64::from(tries).min(span) {
            let port = self.next;
            self.next = if port >= self.max { self.min } else { port + 1 };
            if !used(port) {
                return Some(port);
            }
        }
        None
    }
}

/// Spreads a seed over 64 bits (the finaliser of SplitMix64).
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r48_wraps_and_finds_the_only_free_port() {
        for seed in 0..64 {
            let mut a = PortAllocator::new(10, 25, seed);
            for free in 10..=25 {
                assert_eq!(a.allocate(16, |p| p != free), Some(free));
            }
        }
    }

    #[test]
    fn r48_all_used_ends_after_one_round() {
        let mut a = PortAllocator::new(10, 25, 7);
        let looks = core::cell::Cell::new(0);
        let used = |_| {
            looks.set(looks.get() + 1);
            true
        };
        assert_eq!(a.allocate(u32::MAX, used), None);
        assert_eq!(looks.get(), 16);
    }

    #[test]
    fn r48_passes_the_top_of_the_range() {
        let mut a = PortAllocator::new(EPHEMERAL_MIN, EPHEMERAL_MAX, 1);
        a.next = EPHEMERAL_MAX;
        assert_eq!(a.allocate(1, |_| false), Some(EPHEMERAL_MAX));
        assert_eq!(a.allocate(1, |_| false), Some(EPHEMERAL_MIN));
    }
}
