//! How long a shard polls before it sleeps. The time is bounded, and shorter if earlier polling found nothing.
//!
//! ```text
//! window:  limit/8 ..= limit     halves if polling found nothing, doubles if work came meanwhile or soon after
//! ```
//! An idle shard sleeps: after its last work it polls once, and not again before it is woken. With a limit of zero, the
//! default, it polls only while packets follow each other quickly (`look.rs`).

mod look;

use std::time::Duration;

use look::Look;

/// Longest time to poll before a sleep.
pub const BUSY_POLL_MAX: Duration = Duration::from_millis(1);
/// After this time the shard's owner gets its turn, whether work still arrives or not.
const RUN_MAX: Duration = Duration::from_millis(2);
/// The window is never shorter than the limit divided by this number.
const LEAST: u32 = 8;

/// Decides when to poll, and for how long.
#[derive(Debug)]
pub(crate) struct Polling {
    limit: Duration,
    window: Duration,
    /// `None` on a machine with one CPU.
    look: Option<Look>,
}

impl Default for Polling {
    fn default() -> Self {
        Self::new(Duration::ZERO)
    }
}

impl Polling {
    /// Polls for at most `limit`. Never polls on a machine with one CPU, because nothing else could run meanwhile.
    pub(crate) fn new(limit: Duration) -> Self {
        let alone = std::thread::available_parallelism().is_ok_and(|n| n.get() < 2);
        let limit = if alone {
            Duration::ZERO
        } else {
            limit.min(BUSY_POLL_MAX)
        };
        Self {
            limit,
            window: limit,
            look: (!alone && limit.is_zero()).then(Look::default),
        }
    }

    /// Returns true if the shard polls before its next sleep.
    pub(crate) fn is_on(&self) -> bool {
        match &self.look {
            Some(look) => look.is_on(),
            None => !self.limit.is_zero(),
        }
    }

    /// How long to continue polling after work arrived last.
    pub(crate) fn window(&self) -> Duration {
        match &self.look {
            Some(look) => look.window(),
            None => self.window,
        }
    }

    /// The longest time of one polling phase.
    pub(crate) fn run(&self, timeout: Option<Duration>) -> Duration {
        timeout.map_or(RUN_MAX, |t| t.min(RUN_MAX))
    }

    /// The shard worked for `time` since its last sleep. Now it polls or sleeps.
    pub(crate) fn worked(&mut self, time: Duration) {
        if let Some(look) = &mut self.look {
            look.worked(time);
        }
    }

    /// A polling phase ended. `came` is true if work arrived during it, and `quiet` is the time since it arrived last.
    pub(crate) fn polled(&mut self, came: bool, quiet: Duration) {
        match &mut self.look {
            Some(look) => look.looked(came, quiet),
            None => self.adapt(came),
        }
    }

    fn adapt(&mut self, came: bool) {
        self.window = match came {
            true => (self.window * 2).min(self.limit),
            false => (self.window / 2).max(self.limit / LEAST),
        };
    }

    /// The shard slept for `time`. If that is less than the limit, polling would have avoided the sleep.
    pub(crate) fn slept(&mut self, time: Duration) {
        match &mut self.look {
            Some(look) => look.slept(time),
            None if time < self.limit => self.adapt(true),
            None => {}
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
            look: None,
        }
    }

    #[test]
    fn window_stays_within_its_bounds() {
        let mut p = polling();
        for _ in 0..100 {
            p.polled(false, p.window());
        }
        assert_eq!(p.window(), Duration::from_micros(10));
        p.slept(Duration::from_millis(5));
        assert_eq!(p.window(), Duration::from_micros(10));
        p.slept(Duration::from_micros(60));
        assert_eq!(p.window(), Duration::from_micros(20));
        for _ in 0..100 {
            p.polled(true, Duration::ZERO);
        }
        assert_eq!(p.window(), Duration::from_micros(80));
    }

    #[test]
    fn polling_is_off_by_default_and_never_exceeds_the_cap() {
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
