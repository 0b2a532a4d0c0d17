//! How long a carrier whose sessions break waits with the next one. Pure: what time it is, its owner says.
//!
//! ```text
//! fault ─► held 10 ms ─► session ─► fault ─► held 20 ms ─► … ─► at most 500 ms
//!                           └─ lasted a second ─► the next fault costs 10 ms again
//! ```

use std::time::{Duration, Instant};

/// After a fault the next session begins so much later, and twice as much each time, up to the most.
const FIRST: Duration = Duration::from_millis(10);
const MOST: Duration = Duration::from_millis(500);
/// A session that lasted so long is forgiven for.
const FORGIVEN: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Hold {
    /// No session before then.
    until: Option<Instant>,
    /// How long the next fault costs.
    next: Duration,
    /// When the session began that there is.
    began: Option<Instant>,
}

impl Default for Hold {
    fn default() -> Self {
        Self {
            until: None,
            next: FIRST,
            began: None,
        }
    }
}

impl Hold {
    /// A session began.
    pub(super) fn began(&mut self, now: Instant) {
        self.began = Some(now);
    }

    /// It broke, or could not begin.
    pub(super) fn fault(&mut self, now: Instant) {
        let lasted = self.began.take().map(|began| now - began);
        if lasted.is_some_and(|lasted| lasted >= FORGIVEN) {
            self.next = FIRST;
        }
        self.until = Some(now + self.next);
        self.next = (self.next * 2).min(MOST);
    }

    /// Tells whether there may be no session, or was not until somebody [`ends`](Self::ends) it.
    pub(super) fn is_on(&self) -> bool {
        self.until.is_some()
    }

    /// How long there is no session yet; `None`: there may be one.
    pub(super) fn rest(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now))
    }

    /// Ends it, if its time is over; returns whether it did.
    pub(super) fn ends(&mut self, now: Instant) -> bool {
        self.until.take_if(|until| now >= *until).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_costs_twice_the_last_one_until_a_session_lasted() {
        let mut now = Instant::now();
        let mut hold = Hold::default();
        let mut costs = Vec::new();
        let fault = |hold: &mut Hold, now: &mut Instant, lasted: Duration| {
            hold.began(*now);
            *now += lasted;
            hold.fault(*now);
            let rest = hold.rest(*now).unwrap();
            assert!(hold.is_on() && !hold.ends(*now + rest - Duration::from_nanos(1)));
            *now += rest;
            assert!(hold.ends(*now) && !hold.is_on() && !hold.ends(*now));
            rest.as_millis()
        };
        for _ in 0..8 {
            costs.push(fault(&mut hold, &mut now, FORGIVEN / 2));
        }
        assert_eq!(costs, [10, 20, 40, 80, 160, 320, 500, 500]);
        assert_eq!(fault(&mut hold, &mut now, FORGIVEN), 10);
        assert_eq!(fault(&mut hold, &mut now, Duration::ZERO), 20);
        // One that never began forgives nothing.
        hold.fault(now);
        assert_eq!(hold.rest(now), Some(4 * FIRST));
    }
}
