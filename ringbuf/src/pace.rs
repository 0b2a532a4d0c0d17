//! How a consumer looks on without being in the way.
//!
//! A consumer that has caught up reads the very lines that the producer is writing, so that each record crosses alone. One
//! that pauses for a moment when it was streaming finds many records at once; one that waits for a single answer must
//! not pause at all.

/// Records in a row that make a stream.
const STREAM: u32 = 8;
/// Shortest and longest pause, spins.
const PAUSE_MIN: u32 = 8;
const PAUSE_MAX: u32 = 256;

/// Counts what came in a row.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    streak: u32,
    pause: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            streak: 0,
            pause: PAUSE_MIN,
        }
    }
}

impl Pace {
    /// A record came.
    #[inline]
    pub fn came(&mut self) {
        self.streak = self.streak.saturating_add(1);
    }

    /// Nothing was there: spins once, or for a while if the consumer has just caught up with a stream. Short streaks
    /// lengthen the pause, long ones shorten it; it is bounded to some microseconds.
    #[inline]
    pub fn missed(&mut self) {
        let spins = match self.streak {
            0 | 1 => 1,
            n if n < STREAM => {
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                self.pause
            }
            n => {
                if n > 8 * STREAM {
                    self.pause = (self.pause / 2).max(PAUSE_MIN);
                }
                self.pause
            }
        };
        self.streak = 0;
        for _ in 0..spins {
            core::hint::spin_loop();
        }
    }
}
