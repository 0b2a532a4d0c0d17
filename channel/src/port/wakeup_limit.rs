//! Limits the wake-ups from a peer that signals its doorbells without having work (R10). Pure: the caller passes the
//! time.
//!
//! ```text
//! watched ── FRUITLESS_MAX fruitless signals in a row ──► muted 1 ms ─► watched ─ again ─► muted 2 ms … 16 ms at most
//!   ▲                                                          │              │
//!   └─────────────── work of the peer was found ───────────────┴──────────────┘   or no signal for 50 ms
//! ```
//! A wake-up that finds work resets everything. So a peer that signals only when it has work is never delayed, even if
//! that work was sometimes taken already.

use std::time::Duration;

use adit_engine::Tick;

/// Number of fruitless signals in a row after which the doorbells are muted.
pub(super) const FRUITLESS_MAX: u32 = 16;
/// Length of the first pause. Each pause is twice as long as the last, up to `MOST`: 63 wake-ups per second.
const FIRST: Duration = Duration::from_millis(1);
const MOST: Duration = Duration::from_millis(16);
/// Signals with more time than this between them are no burden.
const QUIET: Duration = Duration::from_millis(50);

/// What the caller must do with the doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Action {
    /// Nothing changes.
    None,
    /// Stop watching the doorbells.
    Mute,
    /// Watch the doorbells again.
    Unmute,
}

#[derive(Debug)]
pub(super) struct WakeupLimit {
    /// A doorbell was signalled since the last burst.
    signalled: bool,
    /// Number of fruitless signals in a row.
    fruitless: u32,
    /// Time of the last such signal.
    last: Tick,
    /// The doorbells are muted until this time.
    until: Option<Tick>,
    /// Length of the next pause.
    next: Duration,
}

impl Default for WakeupLimit {
    fn default() -> Self {
        Self {
            signalled: false,
            fruitless: 0,
            last: Tick(0),
            until: None,
            next: FIRST,
        }
    }
}

impl WakeupLimit {
    /// A doorbell was signalled. The next burst shows whether there is work.
    pub(super) fn signalled(&mut self) {
        self.signalled = true;
    }

    /// A burst is over; `found` is true if it found work of the peer. Returns whether a signal was fruitless, and what
    /// to do.
    pub(super) fn burst(&mut self, now: Tick, found: bool) -> (bool, Action) {
        let signalled = std::mem::take(&mut self.signalled);
        if found {
            self.reset();
            return (false, self.unmute());
        }
        if self.until.is_some_and(|until| until <= now) {
            return (signalled, self.unmute());
        }
        if !signalled || self.until.is_some() {
            return (signalled, Action::None);
        }
        if now.0.saturating_sub(self.last.0) > nanos(QUIET) {
            self.reset();
        }
        self.last = now;
        self.fruitless = self.fruitless.saturating_add(1);
        if self.fruitless < FRUITLESS_MAX {
            return (true, Action::None);
        }
        self.until = Some(Tick(now.0.saturating_add(nanos(self.next))));
        self.next = (self.next * 2).min(MOST);
        (true, Action::Mute)
    }

    fn reset(&mut self) {
        self.fruitless = 0;
        self.next = FIRST;
    }

    fn unmute(&mut self) -> Action {
        match self.until.take() {
            Some(_) => Action::Unmute,
            None => Action::None,
        }
    }

    /// Time until which the doorbells are muted; `None` if they are watched.
    pub(super) fn until(&self) -> Option<Tick> {
        self.until
    }
}

/// Converts a time of at most 50 ms.
fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Simulates a peer that signals every `apart` ns for a minute. Every `work`-th signal has work; with 0, none has.
    /// Returns the number of wake-ups, and the longest time that a signal was ignored.
    fn minute(apart: u64, work: u64) -> (u64, u64) {
        let (mut limit, mut wakeups, mut longest) = (WakeupLimit::default(), 0, 0);
        let (mut n, mut now) = (0, 0);
        while now < 60_000 * MS {
            match limit.until() {
                // All signals during the pause count as one at its end.
                Some(until) => {
                    longest = longest.max(until.0 - now);
                    now = until.0;
                }
                None => {
                    now += apart;
                    limit.signalled();
                }
            }
            n += 1;
            wakeups += 1;
            let _ = limit.burst(Tick(now), work != 0 && n % work == 0);
        }
        (wakeups, longest)
    }

    #[test]
    fn r10_a_storm_for_a_minute_causes_at_most_two_wakeups_a_pause() {
        let (wakeups, longest) = minute(1000, 0);
        // Each pause causes two wake-ups: its end, and the signal that starts the next one.
        assert!(wakeups <= 2 * 60 * 63 + 40, "{wakeups}");
        assert_eq!(longest, 16 * MS);
    }

    #[test]
    fn a_peer_with_work_is_never_delayed() {
        for every in 1..=u64::from(FRUITLESS_MAX) {
            assert_eq!(minute(1000, every).1, 0, "each {every}th ring");
        }
        // A peer with a rare fruitless signal is not delayed either.
        assert_eq!(minute(51 * MS, 0).1, 0);
    }

    #[test]
    fn work_ends_a_pause_at_once_and_resets_its_length() {
        let mut limit = WakeupLimit::default();
        let storm = |limit: &mut WakeupLimit, now: u64| {
            for _ in 1..FRUITLESS_MAX {
                limit.signalled();
                assert_eq!(limit.burst(Tick(now), false), (true, Action::None));
            }
            limit.signalled();
            assert_eq!(limit.burst(Tick(now), false), (true, Action::Mute));
            limit.until().unwrap().0 - now
        };
        for now in [100 * MS, 105 * MS] {
            assert_eq!(storm(&mut limit, now), MS);
            // A burst with another cause, for example an end of our own stream.
            assert_eq!(limit.burst(Tick(now), false), (false, Action::None));
            assert_eq!(limit.burst(Tick(now), true), (false, Action::Unmute));
        }
        // Without work each pause is longer than the last, and ends by itself.
        let mut now = 200 * MS;
        let mut pauses = vec![storm(&mut limit, now)];
        for _ in 0..6 {
            now = limit.until().unwrap().0;
            assert_eq!(limit.burst(Tick(now - 1), false).1, Action::None);
            assert_eq!(limit.burst(Tick(now), false).1, Action::Unmute);
            limit.signalled();
            assert_eq!(limit.burst(Tick(now), false).1, Action::Mute);
            pauses.push(limit.until().unwrap().0 - now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 16, 16].map(|ms| ms * MS));
    }
}
