//! The dials that `aditd` asked for: one record each, from the question until its stream is a tunnel or gone. No IO.
//!
//! ```text
//!              moved: nobody served the ring, so it is dialled again over vsock
//!              ┌──┐
//! insert ──► Asked ── opened ──► Open ── take_open ──► a tunnel, of which this table knows nothing
//!              │                  │
//!              └── take_stream (failed, closed), take (cancelled), drain (aditd has gone)
//! ```
//! A dial is found by its id, which `aditd` chose, and by its stream. It is removed in one place, [`Dials::take`].

use std::collections::HashMap;
use std::hash::Hash;

/// A dial on a stream `A`, for the client `C`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dial<A, C, R> {
    pub(super) at: A,
    pub(super) state: State,
    /// The host's end of the stream, if it came with the question.
    pub(super) client: Option<C>,
    /// To dial again over vsock if nobody serves the ring's other end.
    pub(super) again: Option<R>,
}

/// How far a dial is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The guest, or its agent, has not answered.
    Asked,
    /// The stream is open. Its bytes wait for a client, or for the answer to be on its way to `aditd`.
    Open,
}

/// Why there is no room for a dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// There is a dial with this id. The fault of `aditd`.
    Twice,
    /// There are as many as there may be.
    Full,
}

/// The dials of one connection to `aditd`.
#[derive(Debug)]
pub(super) struct Dials<A, C, R> {
    by_id: HashMap<u64, Dial<A, C, R>>,
    /// Index of `by_id`.
    by_stream: HashMap<A, u64>,
    max: usize,
}

impl<A: Copy + Eq + Hash, C, R> Dials<A, C, R> {
    pub(super) fn new(max: usize) -> Self {
        Self {
            by_id: HashMap::new(),
            by_stream: HashMap::new(),
            max,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Returns an error if there is no room for a dial with this id.
    pub(super) fn room_for(&self, id: u64) -> Result<(), NoRoom> {
        match self.by_id.contains_key(&id) {
            true => Err(NoRoom::Twice),
            false if self.by_id.len() >= self.max => Err(NoRoom::Full),
            false => Ok(()),
        }
    }

    /// Adds a dial. The caller has asked for room.
    pub(super) fn insert(&mut self, id: u64, dial: Dial<A, C, R>) {
        self.by_stream.insert(dial.at, id);
        self.by_id.insert(id, dial);
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Dial<A, C, R>> {
        self.by_id.get_mut(&id)
    }

    /// The stream is open. Returns the id of its dial.
    pub(super) fn opened(&mut self, at: A) -> Option<u64> {
        let id = *self.by_stream.get(&at)?;
        self.by_id.get_mut(&id)?.state = State::Open;
        Some(id)
    }

    /// Removes the dial with this id: the one place where a dial ends.
    pub(super) fn take(&mut self, id: u64) -> Option<Dial<A, C, R>> {
        let dial = self.by_id.remove(&id)?;
        self.by_stream.remove(&dial.at);
        Some(dial)
    }

    /// Removes the dial of this stream.
    pub(super) fn take_stream(&mut self, at: A) -> Option<(u64, Dial<A, C, R>)> {
        let id = *self.by_stream.get(&at)?;
        Some((id, self.take(id)?))
    }

    /// Removes a dial whose stream is open and whose client is here.
    pub(super) fn take_open(&mut self, id: u64) -> Option<(A, C)> {
        let dial = self.by_id.get_mut(&id).filter(|d| d.state == State::Open)?;
        let client = dial.client.take()?;
        Some((self.take(id)?.at, client))
    }

    /// Removes all.
    pub(super) fn drain(&mut self) -> Vec<Dial<A, C, R>> {
        let ids: Vec<u64> = self.by_id.keys().copied().collect();
        ids.into_iter().filter_map(|id| self.take(id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Table = Dials<u32, &'static str, ()>;

    fn dial(at: u32, client: Option<&'static str>) -> Dial<u32, &'static str, ()> {
        Dial {
            at,
            state: State::Asked,
            client,
            again: None,
        }
    }

    fn is_empty(table: &Table) -> bool {
        table.by_id.is_empty() && table.by_stream.is_empty()
    }

    #[test]
    fn an_id_is_used_once_and_the_table_has_a_limit() {
        let mut table = Table::new(2);
        table.insert(7, dial(1, None));
        assert_eq!(table.room_for(7), Err(NoRoom::Twice));
        table.insert(8, dial(2, None));
        assert_eq!(table.room_for(9), Err(NoRoom::Full));
        assert_eq!(table.room_for(7), Err(NoRoom::Twice));
        assert!(table.take(7).is_some() && table.take(7).is_none());
        assert_eq!((table.room_for(7), table.len()), (Ok(()), 1));
    }

    #[test]
    fn only_an_open_dial_with_its_client_becomes_a_tunnel() {
        let mut table = Table::new(9);
        table.insert(1, dial(10, Some("client")));
        table.insert(2, dial(20, None));
        assert_eq!(table.take_open(1), None);
        assert_eq!((table.opened(10), table.opened(20)), (Some(1), Some(2)));
        // The client of this one comes later.
        assert_eq!(table.take_open(2), None);
        assert_eq!(table.take_open(1), Some((10, "client")));
        assert_eq!((table.take_open(1), table.opened(10)), (None, None));
        assert_eq!(table.take(2).map(|d| d.state), Some(State::Open));
        assert!(is_empty(&table));
    }

    #[test]
    fn however_a_dial_ends_nothing_of_it_is_left() {
        for how in 0..3 {
            let mut table = Table::new(9);
            table.insert(1, dial(10, Some("client")));
            let taken = match how {
                0 => table.take(1).map(|d| (1, d)),
                1 => table.take_stream(10),
                _ => table.drain().pop().map(|d| (1, d)),
            };
            assert_eq!(taken, Some((1, dial(10, Some("client")))));
            assert!(is_empty(&table) && table.take_stream(10).is_none());
        }
    }

    #[test]
    fn a_dial_that_is_asked_again_has_its_new_stream_only() {
        let mut table = Table::new(9);
        table.insert(1, dial(10, Some("client")));
        let (id, mut moved) = table.take_stream(10).unwrap();
        moved.at = 11;
        table.insert(id, moved);
        assert_eq!((table.opened(10), table.opened(11)), (None, Some(1)));
        assert_eq!(table.take_open(1), Some((11, "client")));
        assert!(is_empty(&table));
    }
}
