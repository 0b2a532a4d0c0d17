//! The tunnels whose end `aditd` is told, and those that have ended. No IO.
//!
//! ```text
//! add ──► noted ── ended ──► over ── page ──► under way ── taken ──► forgotten
//!                             │        ▲          │
//!                             │        └── renew ─┘ the connection ended first
//!                             └── more than OVER_MAX: counted as lost
//! ```
//! They outlive the `aditd` that opened them. One that takes what is said of an end has the same again only if its word for that
//! did not arrive.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use adit_channel::port::Totals;
use adit_engine::Tick;

use crate::control::{ENDS_MAX, Ends as Page, NOTES_MAX, TunnelEnd};

/// Tunnels that have ended and wait to be told at most. Each has a note of some hundred bytes, and never more than 1 KiB.
const OVER_MAX: usize = 1024;

/// The tunnels on streams `A`.
#[derive(Debug)]
pub(super) struct Ends<A> {
    noted: HashMap<A, Noted>,
    over: VecDeque<TunnelEnd>,
    lost: u64,
    /// What is told and not taken: so many of `over`, and so many that were lost.
    under_way: Option<(usize, u64)>,
    seq: u64,
}

/// A tunnel with a note.
#[derive(Debug)]
pub(super) struct Noted {
    pub(super) note: Vec<u8>,
    /// When it was asked for.
    pub(super) asked: Tick,
    /// When its stream was open.
    pub(super) opened: Tick,
}

impl<A> Default for Ends<A> {
    fn default() -> Self {
        Self {
            noted: HashMap::new(),
            over: VecDeque::new(),
            lost: 0,
            under_way: None,
            seq: 0,
        }
    }
}

fn us(from: Tick, to: Tick) -> u64 {
    to.0.saturating_sub(from.0) / 1000
}

impl<A: Eq + Hash> Ends<A> {
    /// Adds one.
    pub(super) fn add(&mut self, at: A, noted: Noted) {
        self.noted.insert(at, noted);
    }

    /// A stream has ended, if it was one of them.
    pub(super) fn ended(&mut self, at: A, now: Tick, totals: Totals, broken_off: bool) {
        let Some(Noted {
            note,
            asked,
            opened,
        }) = self.noted.remove(&at)
        else {
            return;
        };
        if self.over.len() >= OVER_MAX {
            self.lost += 1;
            return;
        }
        self.over.push_back(TunnelEnd {
            note,
            to_guest: totals.to_guest,
            from_guest: totals.from_guest,
            lasted_us: us(asked, now),
            dial_us: Some(us(asked, opened)),
            first_byte_us: totals.first.map(|first| us(asked, first)),
            broken_off,
        });
    }

    /// Whether there is something to be told, and what was told before is taken.
    pub(super) fn is_any(&self) -> bool {
        self.under_way.is_none() && (!self.over.is_empty() || self.lost > 0)
    }

    /// Whether there is enough for a page, so that waiting gains nothing.
    pub(super) fn are_many(&self) -> bool {
        self.over.len() >= ENDS_MAX / 2 || self.lost > 0
    }

    /// What is to be told next; none: nothing, or what was told is not taken yet.
    pub(super) fn page(&mut self) -> Option<Page> {
        if !self.is_any() {
            return None;
        }
        let mut bytes = 0;
        let fits = |end: &&TunnelEnd| {
            bytes += end.note.len();
            bytes <= NOTES_MAX
        };
        let ends: Vec<_> = self
            .over
            .iter()
            .take(ENDS_MAX)
            .take_while(fits)
            .cloned()
            .collect();
        self.seq += 1;
        self.under_way = Some((ends.len(), self.lost));
        Some(Page {
            seq: self.seq,
            ends,
            lost: self.lost,
        })
    }

    /// What was told is noted there.
    pub(super) fn taken(&mut self, seq: u64) {
        if seq == self.seq
            && let Some((ends, lost)) = self.under_way.take()
        {
            self.over.drain(..ends);
            self.lost -= lost;
        }
    }

    /// Another `aditd` is there: it is told what the one before has not taken.
    pub(super) fn renew(&mut self) {
        self.under_way = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{NOTE_MAX, PACKET_MAX};
    use crate::control_io::Message;

    fn noted(note: Vec<u8>) -> Noted {
        Noted {
            note,
            asked: Tick(1_000_000),
            opened: Tick(3_000_000),
        }
    }

    #[test]
    fn an_end_is_told_until_it_is_taken_and_then_never_again() {
        let mut ends = Ends::default();
        ends.add("a", noted(vec![1]));
        ends.add("b", noted(vec![2]));
        assert_eq!(ends.page(), None);
        let totals = Totals {
            to_guest: 5,
            from_guest: 6,
            first: Some(Tick(4_000_000)),
        };
        ends.ended("a", Tick(9_000_000), totals, true);
        ends.ended("a", Tick(9_000_000), totals, true);
        ends.ended("other", Tick(9_000_000), totals, true);
        let page = ends.page().unwrap();
        let end = TunnelEnd {
            note: vec![1],
            to_guest: 5,
            from_guest: 6,
            lasted_us: 8000,
            dial_us: Some(2000),
            first_byte_us: Some(3000),
            broken_off: true,
        };
        assert_eq!((page.seq, page.lost, page.ends), (1, 0, vec![end.clone()]));
        assert_eq!(ends.page(), None, "it is under way");
        ends.ended("b", Tick(9_000_000), Totals::default(), false);
        ends.renew();
        let again = ends.page().unwrap();
        assert_eq!((again.seq, again.ends.len(), &again.ends[0]), (2, 2, &end));
        ends.taken(1);
        assert_eq!(ends.page(), None, "that was the word for another page");
        ends.taken(2);
        ends.taken(2);
        assert_eq!(ends.page(), None);
        assert!(ends.over.is_empty() && ends.noted.is_empty());
    }

    #[test]
    fn r111_a_storm_of_ends_is_bounded_fits_its_frames_and_is_counted_to_the_last() {
        let mut ends = Ends::default();
        let all = 3 * OVER_MAX;
        for n in 0..all {
            ends.add(n, noted(vec![7; if n % 3 == 0 { NOTE_MAX } else { 1 }]));
        }
        let end = |ends: &mut Ends<usize>, n| {
            ends.ended(
                n,
                Tick(u64::MAX),
                Totals {
                    to_guest: u64::MAX,
                    from_guest: u64::MAX,
                    first: Some(Tick(u64::MAX)),
                },
                true,
            );
        };
        (0..all).for_each(|n| end(&mut ends, n));
        assert_eq!(ends.over.len(), OVER_MAX);
        let (mut told, mut lost) = (0, 0);
        while let Some(page) = ends.page() {
            let bytes = Message::Ends(page.clone()).encode().unwrap();
            assert!(bytes.len() < PACKET_MAX);
            told += page.ends.len();
            lost += page.lost;
            ends.taken(page.seq);
        }
        assert_eq!((told, lost), (OVER_MAX, 2 * OVER_MAX as u64));
    }
}
