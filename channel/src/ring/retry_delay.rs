//! The delay before the next session after a fault. Pure: the caller passes the time.
//!
//! ```text
//! fault ─► wait 10 ms ─► session ─► fault ─► wait 20 ms ─► … ─► at most 500 ms
//!                           └─ lasted a second ─► the next fault costs 10 ms again
//! ```

use std::time::{Duration, Instant};

/// Delay after the first fault. Each further fault doubles it, up to `MOST`.
const FIRST: Duration = Duration::from_millis(10);
const MOST: Duration = Duration::from_millis(500);
/// A session that lasted this long resets the delay.
const FORGIVEN: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct RetryDelay {
    /// No session may begin before this time.
    until: Option<Instant>,
    /// Delay after the next fault.
    next: Duration,
    /// Begin of the current session.
    began: Option<Instant>,
}

impl Default for RetryDelay {
    fn default() -> Self {
        Self {
            until: None,
            next: FIRST,
            began: None,
        }
    }
}

impl RetryDelay {
    /// A session began.
    pub(super) fn began(&mut self, now: Instant) {
        self.began = Some(now);
    }

    /// The session broke, or could not begin.
    pub(super) fn fault(&mut self, now: Instant) {
        let lasted = self.began.take().map(|began| now - began);
        if lasted.is_some_and(|lasted| lasted >= FORGIVEN) {
            self.next = FIRST;
        }
        self.until = Some(now + self.next);
        self.next = (self.next * 2).min(MOST);
    }

    /// Returns true during the delay, until [`end_if_over`](Self::end_if_over) ends it.
    pub(super) fn is_waiting(&self) -> bool {
        self.until.is_some()
    }

    /// Time until a session may begin; `None` if it may begin now.
    pub(super) fn rest(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now))
    }

    /// Ends the delay if it is over. Returns true if it did.
    pub(super) fn end_if_over(&mut self, now: Instant) -> bool {
        self.until.take_if(|until| now >= *until).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_costs_twice_the_last_one_until_a_session_lasted() {
        let mut now = Instant::now();
        let mut delay = RetryDelay::default();
        let mut costs = Vec::new();
        let fault = |delay: &mut RetryDelay, now: &mut Instant, lasted: Duration| {
            delay.began(*now);
            *now += lasted;
            delay.fault(*now);
            let rest = delay.rest(*now).unwrap();
            assert!(
                delay.is_waiting() && !delay.end_if_over(*now + rest - Duration::from_nanos(1))
            );
            *now += rest;
            assert!(delay.end_if_over(*now) && !delay.is_waiting() && !delay.end_if_over(*now));
            rest.as_millis()
        };
        for _ in 0..8 {
            costs.push(fault(&mut delay, &mut now, FORGIVEN / 2));
        }
        assert_eq!(costs, [10, 20, 40, 80, 160, 320, 500, 500]);
        assert_eq!(fault(&mut delay, &mut now, FORGIVEN), 10);
        assert_eq!(fault(&mut delay, &mut now, Duration::ZERO), 20);
        // A session that never began does not reset the delay.
        delay.fault(now);
        assert_eq!(delay.rest(now), Some(4 * FIRST));
    }
}
