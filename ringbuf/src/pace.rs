//! How a consumer polls without slowing the producer down.
//!
//! A consumer that has caught up reads the same cache lines that the producer is writing. Then each record crosses
//! alone, and the producer waits until its line comes back. A consumer that pauses for a moment finds many records at
//! once. But a consumer that waits for a single answer must not pause at all, and one record alone does not show which
//! case it is. So the consumer tries a pause now and then: rarely enough to stay out of the 99th percentile of single
//! answers, often enough to detect a stream quickly.

/// After this many catch-ups in a row without a pause, one pause is tried.
const TRY: u32 = 1024;
/// Number of polls without the processor's pause instruction, which takes longer than a cache line transfer. An answer
/// comes within these polls, or much later.
const EAGER: u32 = 512;
/// Pause before the first poll, in spins. No answer comes earlier, and meanwhile the producer has the cache line
/// alone.
const FIRST: u32 = 3;
/// The first pause, the shortest and the longest, in spins.
const PAUSE_FIRST: u32 = 32;
const PAUSE_MIN: u32 = 4;
const PAUSE_MAX: u32 = 512;
/// Fewer records than this after a pause: not a stream.
const STREAM: u32 = 4;
/// Fewer bytes than `FEW` after a pause make the next pause longer, more than `MANY` make it shorter.
const FEW: usize = 64 << 10;
const MANY: usize = 256 << 10;

/// Counts the records that arrived in a row, and decides when to pause.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Records and bytes since the last catch-up.
    records: u32,
    bytes: usize,
    /// Polls since then that found nothing.
    missed: u32,
    /// Number of catch-ups without a pause.
    caught_up: u32,
    /// Length of the pause in spins; 0 for no pause.
    pause: u32,
}

impl Pace {
    /// Call when a record of `bytes` bytes arrived.
    #[inline]
    pub fn came(&mut self, bytes: usize) {
        self.came_many(1, bytes);
    }

    /// Call when several records arrived, of `bytes` bytes together.
    #[inline]
    pub fn came_many(&mut self, records: usize, bytes: usize) {
        let records = u32::try_from(records).unwrap_or(u32::MAX);
        self.records = self.records.saturating_add(records);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Call when there was no record. Pauses if it has just caught up with a stream, for at most some tens of
    /// microseconds.
    #[inline]
    pub fn missed(&mut self) {
        let spins = if self.records > 0 {
            self.catch_up()
        } else {
            self.missed = self.missed.saturating_add(1);
            u32::from(self.missed > EAGER)
        };
        for _ in 0..spins {
            core::hint::spin_loop();
        }
    }

    /// Returns how long to pause, in spins.
    fn catch_up(&mut self) -> u32 {
        let records = core::mem::take(&mut self.records);
        let bytes = core::mem::take(&mut self.bytes);
        self.missed = 0;
        if self.pause == 0 {
            self.caught_up += 1;
            if self.caught_up >= TRY {
                (self.caught_up, self.pause) = (0, PAUSE_FIRST);
            }
            return self.pause.max(FIRST);
        }
        self.pause = match bytes {
            _ if records < STREAM => 0,
            ..FEW => (self.pause * 2).min(PAUSE_MAX),
            FEW..MANY => self.pause,
            MANY.. => (self.pause / 2).max(PAUSE_MIN),
        };
        self.pause.max(FIRST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pace: &mut Pace, records: u32, bytes: usize) -> u32 {
        (0..records).for_each(|_| pace.came(bytes));
        pace.catch_up()
    }

    #[test]
    fn single_answers_are_rarely_delayed_by_a_pause() {
        for bytes in [64, 65_536] {
            let mut pace = Pace::default();
            let paused = (0..10_000)
                .filter(|_| run(&mut pace, 1, bytes) > FIRST)
                .count();
            assert!(paused <= 10, "{paused}");
        }
    }

    #[test]
    fn a_stream_is_detected_and_gets_pauses() {
        let mut pace = Pace::default();
        // First the two sides run in lock step: one record per poll, whether it is a stream or not.
        while run(&mut pace, 1, 64) == FIRST {}
        assert!(run(&mut pace, 40, 64) > PAUSE_FIRST);
        for _ in 0..20 {
            let _ = run(&mut pace, 40, 64);
        }
        assert_eq!(run(&mut pace, 40, 64), PAUSE_MAX);
        for _ in 0..20 {
            let _ = run(&mut pace, 5000, 64);
        }
        assert_eq!(run(&mut pace, 5000, 64), PAUSE_MIN.max(FIRST));
        assert_eq!(run(&mut pace, 1, 64), FIRST, "the stream has ended");
    }
}
