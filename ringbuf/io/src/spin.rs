//! How long to poll before sleeping. Each poll phase is bounded. If polling finds nothing, it uses only a bounded
//! share of a processor.

use std::time::{Duration, Instant};

/// Polling that finds nothing may use one part in this many of a processor.
const SHARE: u32 = 10;
/// Checks of the other side's word between two reads of the clock. A clock read costs as much as ten checks.
const LOOKS: u32 = 16;
/// Checks at the start without a pause instruction: an answer comes within a microsecond, or much later.
const EAGER: u32 = 64;

/// Polls before sleeping.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    limit: Duration,
    /// Time that may still be spent without success, as of `at`.
    allowed: Duration,
    at: Option<Instant>,
}

impl Default for Spin {
    /// Fifty microseconds: what it costs to wake a sleeper.
    fn default() -> Self {
        Self::new(Duration::from_micros(50))
    }
}

impl Spin {
    /// Polls for at most `limit` at a time, and for at most a tenth of a processor while nothing comes. With zero it
    /// sleeps at once.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            allowed: limit,
            at: None,
        }
    }

    /// Calls `attempt` until it returns something or the time is over.
    pub(crate) fn poll<T, E>(
        &mut self,
        mut attempt: impl FnMut() -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        if self.limit.is_zero() {
            return Ok(None);
        }
        for _ in 0..EAGER {
            if let Some(found) = attempt()? {
                return Ok(Some(found));
            }
        }
        let begin = Instant::now();
        if let Some(at) = self.at.replace(begin) {
            let earned = (begin - at) / SHARE;
            self.allowed = (self.allowed + earned).min(self.limit);
        }
        let limit = self.allowed;
        loop {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                if let Some(found) = attempt()? {
                    return Ok(Some(found));
                }
            }
            let spent = begin.elapsed();
            if spent >= limit {
                self.allowed = self.allowed.saturating_sub(spent);
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fruitless_polling_ends_and_stays_within_its_share() {
        let mut spin = Spin::default();
        let begin = Instant::now();
        let mut tries = 0u64;
        let mut attempt = || {
            tries += 1;
            Ok::<_, ()>(None::<()>)
        };
        assert_eq!(spin.poll(&mut attempt), Ok(None));
        // The time that the first call used is not granted again at once.
        assert_eq!(spin.poll(&mut attempt), Ok(None));
        let earned = begin.elapsed() / SHARE;
        assert!(spin.allowed <= earned, "{:?} of {earned:?}", spin.allowed);
        assert!(tries > 2 * u64::from(EAGER));
    }

    #[test]
    fn a_zero_limit_never_polls() {
        let mut spin = Spin::new(Duration::ZERO);
        let found = spin.poll(|| -> Result<Option<()>, ()> { panic!("polled") });
        assert_eq!(found, Ok(None));
    }
}
