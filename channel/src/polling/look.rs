//! The look before a sleep of a shard that does not busy-poll: whether to look, and for how long.
//!
//! ```text
//! off ── `needed` sleeps in a row, each shorter than SHORT ──► on ── a look that finds nothing ──► off
//! needed: 1 ..= NEEDED_MAX    halves if a look finds work, doubles if not, NEEDED_MAX at once if others keep the core
//! window: LOOK_MIN ..= LOOK_MAX    LOOK_MIN and the time of the work since the last sleep
//! ```
//! - A wake-up takes tens of microseconds, most of them in a halted virtual CPU or a sleeping core. Where an answer
//!   comes sooner than that, a look finds it. Anywhere else a look only costs, so it ends after its window and is not
//!   repeated before packets follow each other quickly again.
//! - Who has to take a whole window of bytes needs about as long for it as this thread did. So after longer work a look
//!   is longer, and a longer sleep counts as short. Without that, bulk data would go on with a sleep for each window.
//! - A look gives the core to whoever else wants it, between any two checks. So it takes time that would be idle, and does not
//!   keep the one waiting whose answer it looks for: on two cores four programs that answer each other never sleep.
//! - There is at most one look a packet: at 1,000 packets a second all looks together take at most 7 % of a core and the
//!   time of the work itself, and with pauses between the packets nothing. An idle shard never looks.
//! - If the guest's vCPU keeps this core, looks find nothing, and become rare. If another thread kept it for long, they become
//!   rare at once: a thread that sleeps is given the core sooner than one that has just had its turn.

use std::time::Duration;

/// The longest look after one packet.
const LOOK_MIN: Duration = Duration::from_micros(60);
/// The longest look after much work.
const LOOK_MAX: Duration = Duration::from_micros(150);
/// A sleep below this, and what the window is longer than [`LOOK_MIN`], was ended by something that a look would
/// probably have found: the time of a wake-up is a part of it.
const SHORT: Duration = Duration::from_micros(120);
/// Where looks find nothing there is one for so many short sleeps.
const NEEDED_MAX: u32 = 64;
/// A look that took so much longer than its window: another thread kept the core for more than an answer.
const INTERRUPTED: Duration = Duration::from_micros(300);

/// Decides about looks. Pure: the caller measures.
#[derive(Debug)]
pub(crate) struct Look {
    on: bool,
    /// Short sleeps in a row.
    short: u32,
    /// Number of them that switches looks on.
    needed: u32,
    /// How long the next look lasts after the last work.
    window: Duration,
}

impl Default for Look {
    fn default() -> Self {
        Self {
            on: false,
            short: 0,
            needed: 1,
            window: LOOK_MIN,
        }
    }
}

impl Look {
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// The shard worked for `time` since its last sleep. Now it looks or sleeps.
    pub(crate) fn worked(&mut self, time: Duration) {
        self.window = (LOOK_MIN + time).min(LOOK_MAX);
    }

    /// The shard slept for `time`.
    pub(crate) fn slept(&mut self, time: Duration) {
        self.short = match time < SHORT + (self.window - LOOK_MIN) {
            true => self.short.saturating_add(1),
            false => self.short / 2,
        };
        self.on |= self.short >= self.needed;
    }

    /// Looking ended: the last work, if any came, was `quiet` before its end. `came` is true if work came.
    pub(crate) fn looked(&mut self, came: bool, quiet: Duration) {
        if came {
            self.needed = (self.needed / 2).max(1);
        }
        if quiet < self.window {
            // It ended for another reason than that nothing came.
            return;
        }
        (self.on, self.short) = (false, 0);
        self.needed = match quiet < self.window + INTERRUPTED {
            true => (self.needed * 2).min(NEEDED_MAX),
            false => NEEDED_MAX,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1000;

    /// What a shard did.
    #[derive(Debug, Default)]
    struct Counts {
        sleeps: u64,
        looks: u64,
        /// Time spent looking, ns.
        looking: u64,
    }

    /// Packets that arrive `gaps` ns after each other. `wakeup` ns pass between a packet and the end of a sleep.
    /// `alone` is false if nothing can arrive while this thread looks, because it has the sender's core.
    fn run(gaps: impl Iterator<Item = u64>, wakeup: u64, alone: bool) -> Counts {
        let (mut look, mut counts) = (Look::default(), Counts::default());
        let max = LOOK_MIN.as_nanos() as u64;
        for gap in gaps {
            if look.is_on() {
                counts.looks += 1;
                let came = alone && gap < max;
                counts.looking += if came { gap } else { max };
                let quiet = if came { 0 } else { max };
                look.looked(came, Duration::from_nanos(quiet));
                if came {
                    continue;
                }
            }
            counts.sleeps += 1;
            look.slept(Duration::from_nanos(gap + wakeup));
        }
        counts
    }

    fn every(gap: u64, n: usize) -> impl Iterator<Item = u64> {
        std::iter::repeat_n(gap, n)
    }

    #[test]
    fn answers_that_follow_quickly_are_found_without_a_sleep() {
        let counts = run(every(5 * US, 1000), 20 * US, true);
        assert!(counts.sleeps <= 2, "{counts:?}");
        // Requests 5 ms apart, of five packets each.
        let gaps = [5000 * US, 6 * US, 6 * US, 6 * US, 6 * US];
        let counts = run(gaps.into_iter().cycle().take(5000), 20 * US, true);
        assert!(counts.sleeps <= 3 * 1000 + 2, "{counts:?}");
    }

    #[test]
    fn packets_with_pauses_are_never_looked_for() {
        for gap in [120, 150, 1000, 100_000] {
            let counts = run(every(gap * US, 10_000), 0, true);
            assert_eq!((counts.looks, counts.sleeps), (0, 10_000), "{gap} us");
        }
    }

    /// A peer that takes a window of bytes as fast as this thread brought it.
    #[test]
    fn bulk_data_goes_on_without_sleeps_though_each_answer_takes_longer_than_the_shortest_look() {
        let (work, answer, wakeup) = (60, 80, 60);
        let [work, answer, wakeup] = [work, answer, wakeup].map(Duration::from_micros);
        let (mut look, mut sleeps) = (Look::default(), 0);
        for _ in 0..1000 {
            look.worked(work);
            if look.is_on() && answer < look.window() {
                look.looked(true, Duration::ZERO);
                continue;
            }
            sleeps += 1;
            look.slept(answer + wakeup);
        }
        assert!(answer > LOOK_MIN && sleeps <= 2, "{sleeps}");
    }

    #[test]
    fn a_look_is_as_long_as_the_work_before_it_and_has_an_end() {
        let mut look = Look::default();
        assert_eq!(look.window(), LOOK_MIN);
        look.worked(Duration::from_micros(10));
        assert_eq!(look.window(), Duration::from_micros(70));
        look.worked(Duration::from_secs(1));
        assert_eq!(look.window(), LOOK_MAX);
    }

    /// One long sleep among many short ones, as a scheduler makes it, does not end looks for long.
    #[test]
    fn one_long_sleep_does_not_undo_many_short_ones() {
        let mut look = Look::default();
        look.slept(Duration::from_micros(20));
        look.looked(false, Duration::from_millis(3));
        let mut sleeps = 0;
        while !look.is_on() {
            sleeps += 1;
            let long = sleeps % 50 == 0;
            look.slept(Duration::from_micros(if long { 900 } else { 30 }));
        }
        assert!(sleeps <= 2 * NEEDED_MAX, "{sleeps}");
    }

    #[test]
    fn looks_become_rare_where_the_sender_has_the_same_core() {
        let counts = run(every(5 * US, 10_000), 20 * US, false);
        assert!(counts.looks <= 10_000 / 64 + 7, "{counts:?}");
    }

    #[test]
    fn looks_become_rare_at_once_if_another_thread_gets_the_core() {
        let mut look = Look::default();
        look.slept(Duration::from_micros(20));
        assert!(look.is_on());
        look.looked(false, Duration::from_millis(3));
        for _ in 1..NEEDED_MAX {
            look.slept(Duration::from_micros(20));
            assert!(!look.is_on());
        }
        look.slept(Duration::from_micros(20));
        assert!(look.is_on());
    }

    /// Whatever the pattern of 1,000 packets a second, looks take at most a fourteenth of the time.
    #[test]
    fn a_thousand_packets_a_second_cost_at_most_a_fourteenth_of_a_core() {
        for burst in 1..=100_usize {
            for within in [1, 10, 30, 59, 75, 115] {
                let pause = burst as u64 * 1000 * US - (burst as u64 - 1) * within * US;
                let gaps = std::iter::once(pause).chain(every(within * US, burst - 1));
                let gaps: Vec<u64> = gaps.collect();
                let counts = run(gaps.into_iter().cycle().take(burst * 100), 5 * US, true);
                let time = burst as u64 * 100 * 1000 * US;
                assert!(counts.looking * 14 <= time, "{burst} {within} {counts:?}");
            }
        }
    }
}
