//! How a consumer looks on without being in the way.
//!
//! A consumer that has caught up reads the very lines that the producer is writing, so that each record crosses alone, and
//! the producer waits for its line to come back. One that pauses for a moment finds many records at once. But one that
//! waits for a single answer must not pause at all, and from one record alone nobody can tell which of the two it is.
//! So it tries: seldom enough not to be seen in the 99th percentile of answers, often enough to find a stream at once.

/// Times in a row that it caught up without a pause, until it tries one.
const TRY: u32 = 1024;
/// Looks without even the processor's own pause, which takes longer than a line does: an answer comes soon, or not soon.
const EAGER: u32 = 512;
/// Before the first look of all: no answer comes sooner, and its writer has the line to itself.
const FIRST: u32 = 3;
/// The first pause, the shortest and the longest, spins.
const PAUSE_FIRST: u32 = 32;
const PAUSE_MIN: u32 = 4;
const PAUSE_MAX: u32 = 512;
/// Fewer records after a pause: it was no stream.
const STREAM: u32 = 4;
/// Fewer bytes after a pause than `FEW`, more than `MANY`: a longer or a shorter pause.
const FEW: usize = 64 << 10;
const MANY: usize = 256 << 10;

/// Counts what came in a row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Records and bytes since it last caught up.
    records: u32,
    bytes: usize,
    /// Looks in vain since.
    missed: u32,
    /// Times that it caught up without a pause.
    caught_up: u32,
    /// Spins; zero: it does not pause.
    pause: u32,
}

impl Pace {
    /// A record of so many bytes came.
    #[inline]
    pub fn came(&mut self, bytes: usize) {
        self.records = self.records.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Nothing was there: pauses if it has just caught up with a stream, for some tens of microseconds at most.
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

    /// Returns how long to pause.
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
    fn single_answers_are_waited_for_without_a_pause_but_seldom() {
        for bytes in [64, 65_536] {
            let mut pace = Pace::default();
            let paused = (0..10_000)
                .filter(|_| run(&mut pace, 1, bytes) > FIRST)
                .count();
            assert!(paused <= 10, "{paused}");
        }
    }

    #[test]
    fn a_stream_is_found_and_paused_for() {
        let mut pace = Pace::default();
        // In lock step at first: a record each time, whatever it is that comes.
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
        assert_eq!(run(&mut pace, 1, 64), FIRST, "it has ended");
    }
}
