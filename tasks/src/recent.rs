//! The goal envelopes that both ends of a stream have, so that each crosses it once.
//!
//! Rule: both ends have the envelopes that were used last, at most [`COUNT_MAX`], and together at most [`BYTES_MAX`] bytes. A
//! `Goal` frame and a `TaskOf` frame use one. Both see the same frames in the same order, so both have the same, and nobody has
//! to ask. The host keeps no bytes, only their digest and length.

use std::collections::VecDeque;

use sha2::{Digest, Sha256};

use crate::dsse::ENVELOPE_MAX;

/// Most envelopes.
pub const COUNT_MAX: usize = 16;
/// Most bytes of all of them.
pub const BYTES_MAX: usize = 2 * ENVELOPE_MAX;

/// The name of an envelope on a stream: sha256 of its bytes.
pub fn digest(envelope: &[u8]) -> [u8; 32] {
    Sha256::digest(envelope).into()
}

/// The envelopes that were used last; `T` is what this end keeps of each.
#[derive(Debug)]
pub struct Recent<T> {
    /// The last one used first.
    entries: VecDeque<Entry<T>>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry<T> {
    digest: [u8; 32],
    len_bytes: usize,
    kept: T,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            bytes: 0,
        }
    }
}

impl<T> Recent<T> {
    /// Uses an envelope; none if it is not there, or not any more.
    pub fn get(&mut self, digest: &[u8; 32]) -> Option<&T> {
        let at = self.entries.iter().position(|e| e.digest == *digest)?;
        let entry = self.entries.remove(at)?;
        self.entries.push_front(entry);
        self.entries.front().map(|e| &e.kept)
    }

    /// What is kept of each.
    pub fn kept(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().map(|e| &e.kept)
    }

    /// The one of which this is kept; does not use it.
    pub fn find(&self, is: impl Fn(&T) -> bool) -> Option<[u8; 32]> {
        self.entries.iter().find(|e| is(&e.kept)).map(|e| e.digest)
    }

    /// Adds an envelope, or uses it if it is there; those go that were not used for longest.
    pub fn add(&mut self, digest: [u8; 32], len_bytes: usize, kept: T) {
        self.remove(&digest);
        self.bytes += len_bytes;
        self.entries.push_front(Entry {
            digest,
            len_bytes,
            kept,
        });
        while self.entries.len() > COUNT_MAX || self.bytes > BYTES_MAX {
            let Some(last) = self.entries.pop_back() else {
                break;
            };
            self.bytes -= last.len_bytes;
        }
    }

    /// Removes an envelope: the other end does not have it.
    pub fn remove(&mut self, digest: &[u8; 32]) {
        if let Some(at) = self.entries.iter().position(|e| e.digest == *digest)
            && let Some(entry) = self.entries.remove(at)
        {
            self.bytes -= entry.len_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_have_the_same_after_any_use() {
        let (mut host, mut guest) = (Recent::default(), Recent::default());
        let mut random = 1u64;
        let mut sent = 0;
        for _ in 0..20_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let n = (random % 24) as u8;
            let digest = [n; 32];
            let len = usize::from(n) * (ENVELOPE_MAX / 23);
            if host.get(&digest).is_none() {
                sent += 1;
                host.add(digest, len, ());
                guest.add(digest, len, n);
            }
            assert_eq!(guest.get(&digest), Some(&n));
            assert!(guest.bytes <= BYTES_MAX && guest.entries.len() <= COUNT_MAX);
            assert_eq!(guest.entries.len(), host.entries.len());
        }
        assert!(sent > 1000, "some fell out");
    }

    #[test]
    fn a_flood_stays_within_its_bounds_and_the_last_used_stay() {
        let mut recent = Recent::default();
        recent.add([0; 32], 10, 0);
        for n in 1..=200 {
            recent.add([n; 32], 10, n);
            assert_eq!(recent.get(&[0; 32]), Some(&0));
        }
        assert_eq!(recent.entries.len(), COUNT_MAX);
        assert_eq!(recent.get(&[200 - COUNT_MAX as u8; 32]), None);
        for n in 0..3 {
            recent.add([n; 32], ENVELOPE_MAX, n);
        }
        assert_eq!((recent.entries.len(), recent.bytes), (2, BYTES_MAX));
        // The same again is not counted twice; one that is too long for all of it is not kept.
        recent.add([2; 32], ENVELOPE_MAX, 2);
        assert_eq!((recent.entries.len(), recent.bytes), (2, BYTES_MAX));
        recent.add([9; 32], BYTES_MAX + 1, 9);
        assert_eq!((recent.entries.len(), recent.bytes), (0, 0));
    }
}
