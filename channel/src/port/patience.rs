//! How long a port goes on hearing a peer that rings for nothing (R10). Pure: what time it is, its owner says.
//!
//! ```text
//! heard ── IN_VAIN_MAX rings in a row found nothing ──► deaf 1 ms ─► heard ─ nothing again ─► deaf 2 ms … 16 ms at most
//!   ▲                                                     │             │
//!   └─────────────── work of the peer's was found ────────┴─────────────┘   or nobody rang for 50 ms
//! ```
//! A wake-up by a doorbell that finds work costs nothing and forgives everything: a peer that rings when it has something
//! to say, and now and then when that was taken already, is never kept waiting.

use std::time::Duration;

use adit_engine::Tick;

/// Rings in a row that find nothing before the first one is not heard.
pub(super) const IN_VAIN_MAX: u32 = 16;
/// How long then; twice as long each time, up to the most: 63 wake-ups a second.
const FIRST: Duration = Duration::from_millis(1);
const MOST: Duration = Duration::from_millis(16);
/// Rings that are so far apart are in nobody's way.
const QUIET: Duration = Duration::from_millis(50);

/// What is to become of the doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Hearing {
    /// Nothing changes.
    Same,
    /// They are not heard from now on.
    Deaf,
    /// They are heard again.
    Back,
}

#[derive(Debug)]
pub(super) struct Patience {
    /// A doorbell rang since the last burst.
    rang: bool,
    /// Rings in a row that found nothing.
    in_vain: u32,
    /// When the last of them was.
    last: Tick,
    /// Deaf until then.
    until: Option<Tick>,
    /// How long the next time.
    next: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            rang: false,
            in_vain: 0,
            last: Tick(0),
            until: None,
            next: FIRST,
        }
    }
}

impl Patience {
    /// A doorbell rang: the next burst says whether there was anything.
    pub(super) fn rang(&mut self) {
        self.rang = true;
    }

    /// A burst is over, and found work of the peer's or not. Returns whether it was rung for in vain, and what follows.
    pub(super) fn burst(&mut self, now: Tick, found: bool) -> (bool, Hearing) {
        let rang = std::mem::take(&mut self.rang);
        if found {
            self.forgive();
            return (false, self.back());
        }
        if self.until.is_some_and(|until| until <= now) {
            return (rang, self.back());
        }
        if !rang || self.until.is_some() {
            return (rang, Hearing::Same);
        }
        if now.0.saturating_sub(self.last.0) > nanos(QUIET) {
            self.forgive();
        }
        self.last = now;
        self.in_vain = self.in_vain.saturating_add(1);
        if self.in_vain < IN_VAIN_MAX {
            return (true, Hearing::Same);
        }
        self.until = Some(Tick(now.0.saturating_add(nanos(self.next))));
        self.next = (self.next * 2).min(MOST);
        (true, Hearing::Deaf)
    }

    fn forgive(&mut self) {
        self.in_vain = 0;
        self.next = FIRST;
    }

    fn back(&mut self) -> Hearing {
        match self.until.take() {
            Some(_) => Hearing::Back,
            None => Hearing::Same,
        }
    }

    /// Until when nothing is heard; `None`: everything is.
    pub(super) fn until(&self) -> Option<Tick> {
        self.until
    }
}

/// At most 50 ms.
fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A peer that rings every `apart` ns for a minute. `work`: every how many rings it has something to say; 0: never.
    /// Returns the wake-ups, and the longest time that a ring was not heard.
    fn minute(apart: u64, work: u64) -> (u64, u64) {
        let (mut patience, mut wakeups, mut longest) = (Patience::default(), 0, 0);
        let (mut n, mut now) = (0, 0);
        while now < 60_000 * MS {
            match patience.until() {
                // What rings meanwhile is one ring when it is over.
                Some(until) => {
                    longest = longest.max(until.0 - now);
                    now = until.0;
                }
                None => {
                    now += apart;
                    patience.rang();
                }
            }
            n += 1;
            wakeups += 1;
            let _ = patience.burst(Tick(now), work != 0 && n % work == 0);
        }
        (wakeups, longest)
    }

    #[test]
    fn r10_a_storm_for_a_minute_is_heard_sixty_times_a_second_at_most() {
        let (wakeups, longest) = minute(1000, 0);
        // The end of a pause, and the ring that begins the next one.
        assert!(wakeups <= 2 * 60 * 63 + 40, "{wakeups}");
        assert_eq!(longest, 16 * MS);
    }

    #[test]
    fn whoever_has_something_to_say_is_never_kept_waiting() {
        for every in 1..=u64::from(IN_VAIN_MAX) {
            assert_eq!(minute(1000, every).1, 0, "each {every}th ring");
        }
        // Nor is who rings for nothing once in a while.
        assert_eq!(minute(51 * MS, 0).1, 0);
    }

    #[test]
    fn work_ends_a_pause_at_once_and_begins_anew() {
        let mut patience = Patience::default();
        let storm = |patience: &mut Patience, now: u64| {
            for _ in 1..IN_VAIN_MAX {
                patience.rang();
                assert_eq!(patience.burst(Tick(now), false), (true, Hearing::Same));
            }
            patience.rang();
            assert_eq!(patience.burst(Tick(now), false), (true, Hearing::Deaf));
            patience.until().unwrap().0 - now
        };
        for now in [100 * MS, 105 * MS] {
            assert_eq!(storm(&mut patience, now), MS);
            // A burst for another reason: a stream's own end, say.
            assert_eq!(patience.burst(Tick(now), false), (false, Hearing::Same));
            assert_eq!(patience.burst(Tick(now), true), (false, Hearing::Back));
        }
        // Without work it lasts longer each time, and is over by itself.
        let mut now = 200 * MS;
        let mut pauses = vec![storm(&mut patience, now)];
        for _ in 0..6 {
            now = patience.until().unwrap().0;
            assert_eq!(patience.burst(Tick(now - 1), false).1, Hearing::Same);
            assert_eq!(patience.burst(Tick(now), false).1, Hearing::Back);
            patience.rang();
            assert_eq!(patience.burst(Tick(now), false).1, Hearing::Deaf);
            pauses.push(patience.until().unwrap().0 - now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 16, 16].map(|ms| ms * MS));
    }
}
