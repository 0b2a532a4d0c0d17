//! Which goals of one key a guest has admitted: the order of their numbers is free, and none runs twice.
//!
//! ```text
//!  key_seq ──────────────────────────────────────────────────────────►
//!   … forgotten: refused …│ floor │ 12 · 15 16 · · 19      above: new
//!                                   └ admitted, each with its digest ┘
//! ```
//! Of a goal with number *n* and digest *d*:
//!
//! | the window has | the goal is |
//! |---|---|
//! | *n* with *d* | known: its steps go on by their own rules |
//! | *n* with another digest | refused: nobody signs one number twice |
//! | not *n*, and *n* is at or below the floor | refused: it may have been admitted and forgotten |
//! | not *n*, and *n* is above the floor | new, also where higher numbers were admitted before it |
//!
//! **Invariant.** Every goal that was ever admitted is in the window, or at or below the floor. What may run is new or in the
//! window. So a goal that was forgotten never runs, and of one that is in the window the guest has every task that ended.
//!
//! **Full.** The window has at most [`GOALS_MAX`] goals. When one more is admitted, the lowest number falls out and becomes the
//! floor. A full window's lowest member is its floor as well: what is below would be the first to fall out again, before its
//! second step.
//!
//! No clock has a part in it: one that is set back makes a goal valid again, and not new.
//!
//! **Two keys.** A goal that two keys signed is two orders: a host can pass it on with either signature. What the guest still
//! remembers of it is not done again, whoever signed; once it is forgotten under one key, it may be new under the other.

use serde::{Deserialize, Serialize};

/// Most goals of one key that are remembered one by one.
pub const GOALS_MAX: usize = 256;

/// Where a goal is in a key's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It was admitted before.
    Known,
    /// It was not, and may be.
    New,
    /// Its number belongs to another goal.
    Other,
    /// It may have been admitted and forgotten.
    Forgotten {
        /// The highest number that is refused for that.
        floor: u64,
    },
}

/// The goals admitted from one key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct Window {
    /// The highest number that was forgotten.
    floor: Option<u64>,
    /// Numbers with digests, ascending.
    goals: Vec<(u64, [u8; 32])>,
}

/// A window as it is on disk, not checked.
#[derive(Deserialize)]
struct Stored {
    floor: Option<u64>,
    goals: Vec<(u64, [u8; 32])>,
}

impl TryFrom<Stored> for Window {
    type Error = &'static str;

    fn try_from(stored: Stored) -> Result<Self, Self::Error> {
        let Stored { floor, goals } = stored;
        if goals.len() > GOALS_MAX || !goals.is_sorted_by(|a, b| a.0 < b.0) {
            return Err("a window has too many goals, or not in order");
        }
        Ok(Self { floor, goals })
    }
}

impl Window {
    /// The window of a guest that knows only the highest goal of a key: whatever is below was forgotten.
    pub fn of_last(key_seq: u64, digest: [u8; 32]) -> Self {
        Self {
            floor: Some(key_seq),
            goals: vec![(key_seq, digest)],
        }
    }

    /// Where a goal is.
    pub fn place(&self, key_seq: u64, digest: &[u8; 32]) -> Place {
        if let Ok(at) = self.at(key_seq) {
            return match self.goals[at].1 == *digest {
                true => Place::Known,
                false => Place::Other,
            };
        }
        match self.floor() {
            Some(floor) if key_seq <= floor => Place::Forgotten { floor },
            _ => Place::New,
        }
    }

    /// Admits a goal if it is new; the lowest falls out if there are too many then. Returns where it was before.
    pub fn admit(&mut self, key_seq: u64, digest: [u8; 32]) -> Place {
        let place = self.place(key_seq, &digest);
        if place == Place::New {
            let at = self.at(key_seq).unwrap_or_else(|at| at);
            self.goals.insert(at, (key_seq, digest));
            if self.goals.len() > GOALS_MAX {
                self.floor = Some(self.goals.remove(0).0);
            }
        }
        place
    }

    /// Forgets every goal up to a number, as far as there are any: their tasks need not be remembered any more.
    pub fn forget(&mut self, up_to: u64) {
        let count = self.goals.partition_point(|g| g.0 <= up_to);
        if let Some((highest, _)) = self.goals.drain(..count).next_back() {
            self.floor = self.floor.max(Some(highest));
        }
    }

    /// Whether it has this number.
    pub fn has(&self, key_seq: u64) -> bool {
        self.at(key_seq).is_ok()
    }

    /// The highest goal, if it has any.
    pub fn last(&self) -> Option<(u64, [u8; 32])> {
        self.goals.last().copied()
    }

    /// The highest number that is refused unless it is a member's.
    pub fn floor(&self) -> Option<u64> {
        let lowest = self.goals.first().map(|g| g.0);
        self.floor
            .max(lowest.filter(|_| self.goals.len() == GOALS_MAX))
    }

    fn at(&self, key_seq: u64) -> Result<usize, usize> {
        self.goals.binary_search_by_key(&key_seq, |g| g.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u64) -> [u8; 32] {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&n.to_le_bytes());
        digest
    }

    fn full(numbers: impl Iterator<Item = u64>) -> Window {
        let mut window = Window::default();
        for n in numbers {
            assert_eq!(window.admit(n, digest(n)), Place::New);
        }
        window
    }

    #[test]
    fn r85_goals_come_in_any_order_and_each_number_is_one_goals() {
        let count = GOALS_MAX as u64;
        let mut window = full((1..=count).rev());
        for n in 1..=count {
            assert_eq!(window.admit(n, digest(n)), Place::Known);
            assert_eq!(window.admit(n, digest(n + 1)), Place::Other);
        }
        // Full: the lowest member is the floor.
        assert_eq!(window.place(0, &digest(0)), Place::Forgotten { floor: 1 });
        assert_eq!(window.admit(count + 1, digest(0)), Place::New);
        assert_eq!(window.place(1, &digest(1)), Place::Forgotten { floor: 2 });
        assert_eq!(window.place(2, &digest(2)), Place::Known);
    }

    #[test]
    fn r85_the_highest_number_there_is_blocks_nothing_below_it() {
        let mut window = full([u64::MAX, 0, 5].into_iter());
        assert_eq!(window.admit(u64::MAX, digest(1)), Place::Other);
        for n in 10..10 + 2 * GOALS_MAX as u64 {
            assert_eq!(window.admit(n, digest(n)), Place::New);
        }
        assert_eq!(window.place(u64::MAX, &digest(u64::MAX)), Place::Known);
        window.forget(u64::MAX);
        let floor = u64::MAX;
        assert_eq!(window.admit(9999, digest(1)), Place::Forgotten { floor });
        let own = window.admit(u64::MAX, digest(u64::MAX));
        assert_eq!(own, Place::Forgotten { floor });
    }

    #[test]
    fn what_is_forgotten_to_make_room_stays_forgotten() {
        let mut window = full([3, 6, 9].into_iter());
        window.forget(2);
        assert_eq!(window.floor(), None);
        window.forget(7);
        assert_eq!((window.floor(), window.has(9)), (Some(6), true));
        for n in [3, 4, 6] {
            let place = window.admit(n, digest(n));
            assert_eq!(place, Place::Forgotten { floor: 6 });
        }
        assert_eq!(window.admit(7, digest(7)), Place::New);
        window.forget(1);
        assert_eq!(window.floor(), Some(6));
    }

    #[test]
    fn a_guest_that_knew_only_the_highest_goal_still_knows_it_and_refuses_what_is_below() {
        let mut window = Window::of_last(7, digest(7));
        assert_eq!(window.place(7, &digest(7)), Place::Known);
        assert_eq!(window.place(7, &digest(8)), Place::Other);
        assert_eq!(window.place(6, &digest(6)), Place::Forgotten { floor: 7 });
        assert_eq!(window.admit(9, digest(9)), Place::New);
        assert_eq!(window.admit(8, digest(8)), Place::New);
    }

    #[test]
    fn a_window_has_golden_bytes_and_none_but_a_window_is_read() {
        let window = Window {
            floor: Some(300),
            goals: vec![(301, [0xab; 32]), (400, [0xcd; 32])],
        };
        let bytes = postcard::to_stdvec(&window).unwrap();
        let want = format!("01ac0202ad02{}9003{}", "ab".repeat(32), "cd".repeat(32));
        assert_eq!(crate::hex(&bytes), want);
        assert_eq!(postcard::from_bytes::<Window>(&bytes).unwrap(), window);
        let empty = postcard::to_stdvec(&Window::default()).unwrap();
        assert_eq!(empty, [0, 0]);
        for goals in [
            vec![(2, [0; 32]), (1, [0; 32])],
            vec![(2, [0; 32]), (2, [1; 32])],
            (0..=GOALS_MAX as u64).map(|n| (n, [0; 32])).collect(),
        ] {
            let bytes = postcard::to_stdvec(&Window { floor: None, goals }).unwrap();
            assert!(postcard::from_bytes::<Window>(&bytes).is_err());
        }
    }
}
