//! Which hellos of one key were served: a window over their serial numbers, so that none is served twice. It takes no more room
//! with time.
//!
//! ```text
//!        forgotten, refused │ seen or not, a bit each │ new
//!   ───────────────────────┴─────────────────── highest ┴────►
//! ```
//! Numbers may come in any order, as far as streams that the host dials at once overtake each other. One that is further behind
//! counts as seen.

/// Numbers that are told apart. More than the streams that a host dials at once.
pub const WINDOW: u64 = 4096;

const WORDS: usize = (WINDOW / 64) as usize;

/// The window.
#[derive(Debug)]
pub struct Serials {
    /// The highest that was seen; 0: none, so it is nobody's number.
    highest: u64,
    /// Bit n % [`WINDOW`]: n was seen, for the numbers of the window.
    seen: Box<[u64; WORDS]>,
}

impl Default for Serials {
    fn default() -> Self {
        Self {
            highest: 0,
            seen: Box::new([0; WORDS]),
        }
    }
}

impl Serials {
    /// Takes a number. Returns false if it was taken before, or is too old to be known.
    #[must_use]
    pub fn take(&mut self, serial: u64) -> bool {
        if serial == 0 || self.highest.saturating_sub(serial) >= WINDOW {
            return false;
        }
        // What comes into the window was not seen. A step past all of it clears each bit once.
        for before in (self.highest..serial).take(WINDOW as usize) {
            *self.word(before + 1) &= !bit(before + 1);
        }
        self.highest = self.highest.max(serial);
        let is_new = *self.word(serial) & bit(serial) == 0;
        *self.word(serial) |= bit(serial);
        is_new
    }

    fn word(&mut self, serial: u64) -> &mut u64 {
        &mut self.seen[(serial % WINDOW / 64) as usize]
    }
}

fn bit(serial: u64) -> u64 {
    1 << (serial % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_number_is_taken_once_in_any_order_within_the_window() {
        let mut serials = Serials::default();
        assert!(!serials.take(0));
        assert!(serials.take(1) && !serials.take(1));
        assert!(serials.take(WINDOW + 1));
        // Just outside, and just inside.
        assert!(!serials.take(1) && serials.take(2) && !serials.take(2));
        assert!(serials.take(u64::MAX) && !serials.take(u64::MAX));
        assert!(!serials.take(WINDOW + 2));
        assert!(serials.take(u64::MAX - WINDOW + 1) && !serials.take(u64::MAX - WINDOW));
    }

    proptest! {
        #[test]
        fn it_is_a_set_that_forgets_what_is_far_behind(
            steps in proptest::collection::vec((0..3 * WINDOW, any::<bool>()), 1..200)
        ) {
            let (mut serials, mut all, mut highest) = (Serials::default(), BTreeSet::new(), 0_u64);
            for (step, ahead) in steps {
                let serial = match ahead {
                    true => highest + step % 5,
                    false => (highest + WINDOW / 2).saturating_sub(step),
                };
                let known = serial > 0 && serial + WINDOW > highest;
                prop_assert_eq!(serials.take(serial), known && all.insert(serial));
                if known {
                    highest = highest.max(serial);
                }
            }
        }
    }
}
