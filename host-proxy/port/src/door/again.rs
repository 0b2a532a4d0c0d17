//! When a doorkeeper looks again at what it watches, although nothing has changed: a VMM is there a moment before it can be used, and gone
//! a moment before that is known, and nobody is told.

use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

/// Looks without a change, at most.
const AGAIN_MAX: u32 = 6;
/// The time before the first. Each is twice the one before.
pub(super) const AGAIN_FIRST: Duration = Duration::from_millis(25);

/// How often it was looked again, and when that is next.
#[derive(Debug, Default)]
pub(super) struct Again {
    looked: u32,
    at: Option<Instant>,
}

impl Again {
    /// Something has changed: all looks are there again.
    pub(super) fn changed(&mut self) {
        self.looked = 0;
    }

    /// Nothing has to be looked at any more.
    pub(super) fn over(&mut self) {
        *self = Self::default();
    }

    /// Leaves the first looks out.
    pub(super) fn spare(&mut self, looks: u32) {
        self.looked = self.looked.max(looks);
    }

    /// Looks again after a while, unless it has done so too often. Returns whether it will.
    pub(super) fn later(&mut self) -> bool {
        if self.at.is_none() && self.looked < AGAIN_MAX {
            self.at = Some(Instant::now() + AGAIN_FIRST * (1 << self.looked));
            self.looked += 1;
        }
        self.at.is_some()
    }

    /// How long to wait for something else.
    pub(super) fn limit(&self) -> PollTimeout {
        self.at.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now());
            // Rounded up, so that the time has come when it ends.
            PollTimeout::from(u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX))
        })
    }

    /// Whether it is time to look. That is said once.
    pub(super) fn is_due(&mut self) -> bool {
        self.at.take_if(|at| *at <= Instant::now()).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_looked_so_often_and_no_more_until_something_changes() {
        let mut again = Again::default();
        assert_eq!(again.limit(), PollTimeout::NONE);
        for _ in 0..2 {
            let mut looks = 0;
            while again.later() {
                // One that is due already is not begun a second time.
                assert!(again.later());
                assert_ne!(again.limit(), PollTimeout::NONE);
                again.at = Some(Instant::now());
                assert!(again.is_due() && !again.is_due());
                looks += 1;
            }
            assert_eq!(looks, AGAIN_MAX);
            again.changed();
        }
        again.spare(AGAIN_MAX);
        assert!(!again.later());
        again.over();
        assert!(again.later());
    }
}
