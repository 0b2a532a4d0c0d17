//! The tunnels that have a tag, by number and by stream. No IO.
//!
//! They outlive the `aditd` that opened them; the next one finds them here, with what the first had noted of each.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use crate::control::{TAGS_MAX, TUNNELS_MAX, Tunnels};

/// The tunnels on streams `A`.
#[derive(Debug)]
pub(super) struct Table<A> {
    by_number: BTreeMap<u64, (A, Vec<u8>)>,
    /// Index of `by_number`.
    by_stream: HashMap<A, u64>,
    last: u64,
}

impl<A> Default for Table<A> {
    fn default() -> Self {
        Self {
            by_number: BTreeMap::new(),
            by_stream: HashMap::new(),
            last: 0,
        }
    }
}

impl<A: Copy + Eq + Hash> Table<A> {
    /// Adds one.
    pub(super) fn add(&mut self, at: A, tag: Vec<u8>) {
        self.last += 1;
        self.by_stream.insert(at, self.last);
        self.by_number.insert(self.last, (at, tag));
    }

    /// A stream has ended, if it was one of them.
    pub(super) fn ended(&mut self, at: A) {
        if let Some(number) = self.by_stream.remove(&at) {
            self.by_number.remove(&number);
        }
    }

    /// The stream of a tunnel; none: it has ended.
    pub(super) fn stream(&self, number: u64) -> Option<A> {
        Some(self.by_number.get(&number)?.0)
    }

    /// Those behind a number, as many as one frame holds.
    pub(super) fn page(&self, after: u64) -> Tunnels {
        let mut bytes = 0;
        let mut tunnels = Vec::new();
        let mut rest = self.by_number.range(after.saturating_add(1)..);
        let mut last = true;
        for (number, (_, tag)) in &mut rest {
            bytes += tag.len();
            if !tunnels.is_empty() && (bytes > TAGS_MAX || tunnels.len() == TUNNELS_MAX) {
                last = false;
                break;
            }
            tunnels.push((*number, tag.clone()));
        }
        Tunnels {
            after,
            tunnels,
            last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{PACKET_MAX, TAG_MAX};
    use crate::control_io::Message;

    #[test]
    fn a_tunnel_is_listed_until_its_stream_ends_and_its_number_is_never_anothers() {
        let mut table = Table::default();
        table.add("a", vec![1]);
        table.add("b", vec![2]);
        assert_eq!(table.page(0).tunnels, [(1, vec![1]), (2, vec![2])]);
        table.ended("a");
        table.ended("a");
        assert_eq!((table.stream(1), table.stream(2)), (None, Some("b")));
        table.add("a", vec![3]);
        assert_eq!(table.page(2).tunnels, [(3, vec![3])]);
        table.ended("a");
        table.ended("b");
        assert!(table.by_number.is_empty() && table.by_stream.is_empty());
        assert_eq!(table.page(u64::MAX).tunnels, []);
    }

    #[test]
    fn a_page_fits_a_frame_and_the_pages_have_all() {
        let mut table = Table::default();
        for n in 0..5000_u32 {
            let len = if n % 2 == 0 { 1 } else { TAG_MAX };
            table.add(n, vec![7; len]);
        }
        let (mut after, mut found) = (0, 0);
        loop {
            let page = table.page(after);
            let bytes = Message::Tunnels(page.clone()).encode().unwrap();
            assert!(bytes.len() < PACKET_MAX && !page.tunnels.is_empty());
            assert!(page.tunnels.iter().all(|(number, _)| *number > after));
            found += page.tunnels.len();
            after = page.tunnels.last().unwrap().0;
            if page.last {
                break;
            }
        }
        assert_eq!(found, 5000);
    }
}
