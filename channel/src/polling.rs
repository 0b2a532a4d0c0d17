//! How long a shard looks on before it sleeps: bounded, and less where it was in vain.
//!
//! ```text
//! window:  limit/8 ..= limit     halves when a look was in vain, doubles when work came while looking or soon after it slept
//! ```
//! An idle shard sleeps: it looks on once after its last work, not again before it is woken.

use std::time::Duration;

/// Longest look before a sleep.
pub const BUSY_POLL_MAX: Duration = Duration::from_millis(1);
/// After this long the shard's owner gets its turn, work or no work.
const RUN_MAX: Duration = Duration::from_millis(2);
/// The window never falls below this part of the limit.
const LEAST: u32 = 8;

/// When to look on, and for how long.
#[derive(Debug, Default)]
pub(crate) struct Polling {
    limit: Duration,
    window: Duration,
}

impl Polling {
    /// Looks on for at most `limit`; not at all where there is one CPU only, for nobody else would run meanwhile.
    pub(crate) fn new(limit: Duration) -> Self {
        let alone =
            !limit.is_zero() && std::thread::available_parallelism().is_ok_and(|n| n.get() < 2);
        let limit = if alone {
            Duration::ZERO
        } else {
            limit.min(BUSY_POLL_MAX)
        };
        Self {
            limit,
            window: limit,
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        !self.limit.is_zero()
    }

    /// How long to look since work last came.
    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// How long a look may last in all.
    pub(crate) fn run(&self, timeout: Option<Duration>) -> Duration {
        timeout.map_or(RUN_MAX, |t| t.min(RUN_MAX))
    }

    /// A look ended; work came during it, or not.
    pub(crate) fn looked(&mut self, came: bool) {
        self.window = match came {
            true => (self.window * 2).min(self.limit),
            false => (self.window / 2).max(self.limit / LEAST),
        };
    }

    /// The shard slept that long: had it looked on so long, it would not have had to.
    pub(crate) fn slept(&mut self, time: Duration) {
        if time < self.limit {
            self.looked(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polling() -> Polling {
        let limit = Duration::from_micros(80);
        Polling {
            limit,
            window: limit,
        }
    }

    #[test]
    fn window_stays_within_its_bounds() {
        let mut p = polling();
        for _ in 0..100 {
            p.looked(false);
        }
        assert_eq!(p.window(), Duration::from_micros(10));
        p.slept(Duration::from_millis(5));
        assert_eq!(p.window(), Duration::from_micros(10));
        p.slept(Duration::from_micros(60));
        assert_eq!(p.window(), Duration::from_micros(20));
        for _ in 0..100 {
            p.looked(true);
        }
        assert_eq!(p.window(), Duration::from_micros(80));
    }

    #[test]
    fn off_unless_asked_for_and_never_beyond_the_cap() {
        assert!(!Polling::default().is_on());
        assert!(!Polling::new(Duration::ZERO).is_on());
        let long = Polling::new(Duration::from_secs(5));
        assert!(long.window() <= BUSY_POLL_MAX);
        assert_eq!(
            long.run(Some(Duration::from_nanos(1))),
            Duration::from_nanos(1)
        );
    }
}
