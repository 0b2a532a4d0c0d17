//! Ephemeral local ports. They are used in order, around the whole range, so that a port pair is not used again soon:
//! a late reset carries only ports (R45). Every search is bounded by the number of ports that can be in use (R48).

/// First ephemeral port: above the ports that services usually have.
pub(crate) const EPHEMERAL_MIN: u32 = 1 << 30;
/// Last ephemeral port: `u32::MAX` is `VMADDR_PORT_ANY` and not a port.
pub(crate) const EPHEMERAL_MAX: u32 = u32::MAX - 1;

/// Allocates ports of `min..=max`.
pub(crate) struct PortAllocator {
    min: u32,
    max: u32,
    next: u32,
}

impl PortAllocator {
    /// Starts at a port in `min..=max` that the seed selects.
    pub(crate) fn new(min: u32, max: u32, seed: u64) -> Self {
        let span = u64::from(max - min) + 1;
        // The remainder is less than `span`, and `span` is at most 2^32, so the remainder fits into 32 bits.
        let next = min + (mix(seed) % span) as u32;
        Self { min, max, next }
    }

    /// Returns the next port that is not `used`. Tries at most `tries` ports.
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
    fn r48_finds_the_only_free_port_after_a_wrap() {
        for seed in 0..64 {
            let mut a = PortAllocator::new(10, 25, seed);
            for free in 10..=25 {
                assert_eq!(a.allocate(16, |p| p != free), Some(free));
            }
        }
    }

    #[test]
    fn r48_search_ends_after_one_round_if_all_ports_are_used() {
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
    fn r48_continues_at_the_bottom_after_the_last_port() {
        let mut a = PortAllocator::new(EPHEMERAL_MIN, EPHEMERAL_MAX, 1);
        a.next = EPHEMERAL_MAX;
        assert_eq!(a.allocate(1, |_| false), Some(EPHEMERAL_MAX));
        assert_eq!(a.allocate(1, |_| false), Some(EPHEMERAL_MIN));
    }
}
