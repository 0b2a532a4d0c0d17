//! The slab of streams, the map from port pair to slot, and intrusive lists of the slots that have work to do.
//!
//! A slot is in a list at most once, so a list cannot be longer than the slab. Adding and removing costs O(1) and
//! allocates nothing. The map is a `BTreeMap`: O(log n) for any ports that a hostile peer chooses. The last hit is
//! cached in front of it.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::{Index, IndexMut};

use crate::stream::{Phase, Stream};
use crate::{Lane, PairChange, StreamId};

const NIL: u32 = u32::MAX;

/// The lists that a slot can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListId {
    /// The stream owes events to the caller.
    Events = 0,
    /// The stream owes control packets to the peer, on lane control.
    OwedControl = 1,
    /// The same, on lane bulk.
    OwedBulk = 2,
    /// The stream has bytes to send and credit for them, on lane control.
    DataControl = 3,
    /// The same, on lane bulk.
    DataBulk = 4,
}
const LISTS: usize = 5;
/// A stream has one lane, so the lists of both lanes share a link.
const LINKS: usize = 3;

impl ListId {
    pub(crate) fn data(lane: Lane) -> Self {
        match lane {
            Lane::Control => Self::DataControl,
            Lane::Bulk => Self::DataBulk,
        }
    }

    pub(crate) fn owed(lane: Lane) -> Self {
        match lane {
            Lane::Control => Self::OwedControl,
            Lane::Bulk => Self::OwedBulk,
        }
    }

    fn link(self) -> usize {
        (self as usize).div_ceil(2)
    }
}

#[derive(Clone, Copy)]
struct Link {
    prev: u32,
    next: u32,
    on: bool,
}

#[derive(Clone, Copy)]
struct Ends {
    head: u32,
    tail: u32,
}

struct Slot {
    stream: Stream,
    links: [Link; LINKS],
}

/// Slab, map and lists.
pub(crate) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    map: BTreeMap<u64, u32>,
    last_hit: (u64, u32),
    lists: [Ends; LISTS],
    max: u32,
    /// Pair changes since the last `drain_pairs`; `None` if they are not recorded.
    pub(crate) changes: Option<Vec<PairChange>>,
}

impl Index<u32> for Table {
    type Output = Stream;
    fn index(&self, slot: u32) -> &Stream {
        &self.slots[slot as usize].stream
    }
}

impl IndexMut<u32> for Table {
    fn index_mut(&mut self, slot: u32) -> &mut Stream {
        &mut self.slots[slot as usize].stream
    }
}

fn key(local_port: u32, peer_port: u32) -> u64 {
    u64::from(local_port) << 32 | u64::from(peer_port)
}

impl Table {
    pub(crate) fn new(max: u32) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            map: BTreeMap::new(),
            last_hit: (0, NIL),
            lists: [Ends {
                head: NIL,
                tail: NIL,
            }; LISTS],
            max,
            changes: None,
        }
    }

    /// Returns how many slots were ever used. All slots are below this number.
    pub(crate) fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Returns how many slots are in use.
    pub(crate) fn used(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    /// Returns how many more streams are possible.
    pub(crate) fn left(&self) -> u32 {
        self.max - self.used()
    }

    /// Finds the slot of a port pair.
    pub(crate) fn find(&mut self, local_port: u32, peer_port: u32) -> Option<u32> {
        let key = key(local_port, peer_port);
        if self.last_hit.0 == key && self.last_hit.1 != NIL {
            return Some(self.last_hit.1);
        }
        let slot = *self.map.get(&key)?;
        self.last_hit = (key, slot);
        Some(slot)
    }

    /// Returns true if a stream uses the pair.
    pub(crate) fn contains(&self, local_port: u32, peer_port: u32) -> bool {
        self.map.contains_key(&key(local_port, peer_port))
    }

    /// Puts a stream into a free slot and maps its pair to it. The slot keeps its generation. Returns `None` if the
    /// table is full.
    pub(crate) fn insert(&mut self, stream: Stream) -> Option<u32> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.len() < self.max => {
                let link = Link {
                    prev: NIL,
                    next: NIL,
                    on: false,
                };
                self.slots.push(Slot {
                    stream: Stream::FREE,
                    links: [link; LINKS],
                });
                // Reserve now, so that freeing a slot never allocates.
                self.free.reserve(self.slots.len());
                self.len() - 1
            }
            None => return None,
        };
        let generation = self[slot].generation;
        self.map
            .insert(key(stream.local_port, stream.peer_port), slot);
        if let Some(changes) = &mut self.changes {
            changes.push(PairChange::Opened {
                local_port: stream.local_port,
                peer_port: stream.peer_port,
            });
        }
        self[slot] = Stream {
            generation,
            mapped: true,
            ..stream
        };
        Some(slot)
    }

    /// Removes the pair of a slot from the map: packets for the pair no longer find the slot.
    pub(crate) fn unmap(&mut self, slot: u32) {
        let s = &mut self[slot];
        if core::mem::take(&mut s.mapped) {
            let (local_port, peer_port) = (s.local_port, s.peer_port);
            self.map.remove(&key(local_port, peer_port));
            self.last_hit = (0, NIL);
            if let Some(changes) = &mut self.changes {
                changes.push(PairChange::Closed {
                    local_port,
                    peer_port,
                });
            }
        }
    }

    /// Frees a slot that is in no list.
    pub(crate) fn free(&mut self, slot: u32) {
        self.unmap(slot);
        let generation = self[slot].generation;
        self[slot] = Stream {
            generation,
            ..Stream::FREE
        };
        self.free.push(slot);
    }

    /// Returns the id of the stream in a slot.
    pub(crate) fn id(&self, slot: u32) -> StreamId {
        StreamId {
            slot,
            generation: self[slot].generation,
        }
    }

    /// Returns the slot of an id; `None` if the id is stale.
    pub(crate) fn get(&self, id: StreamId) -> Option<u32> {
        let s = &self.slots.get(id.slot as usize)?.stream;
        (s.generation == id.generation && s.phase != Phase::Free).then_some(id.slot)
    }

    /// Makes the current id of a slot stale.
    pub(crate) fn retire_id(&mut self, slot: u32) {
        let s = &mut self[slot];
        s.generation = s.generation.wrapping_add(1);
    }

    pub(crate) fn first(&self, list: ListId) -> Option<u32> {
        let head = self.lists[list as usize].head;
        (head != NIL).then_some(head)
    }

    pub(crate) fn is_empty(&self, list: ListId) -> bool {
        self.first(list).is_none()
    }

    /// Adds a slot to a list (at the end, if it is not in it yet), or removes it.
    #[inline]
    pub(crate) fn set(&mut self, list: ListId, slot: u32, on: bool) {
        match (self.link(list, slot).on, on) {
            (false, true) => self.push(list, slot),
            (true, false) => self.remove(list, slot),
            _ => {}
        }
    }

    /// Moves the first slot of a list to its end.
    pub(crate) fn rotate(&mut self, list: ListId) {
        if let Some(slot) = self.first(list)
            && self.has_several(list)
        {
            self.remove(list, slot);
            self.push(list, slot);
        }
    }

    /// Returns true if the list has more than one slot.
    pub(crate) fn has_several(&self, list: ListId) -> bool {
        let ends = self.lists[list as usize];
        ends.head != ends.tail
    }

    #[inline]
    fn link(&mut self, list: ListId, slot: u32) -> &mut Link {
        &mut self.slots[slot as usize].links[list.link()]
    }

    fn push(&mut self, list: ListId, slot: u32) {
        let tail = self.lists[list as usize].tail;
        *self.link(list, slot) = Link {
            prev: tail,
            next: NIL,
            on: true,
        };
        if tail == NIL {
            self.lists[list as usize].head = slot;
        } else {
            self.link(list, tail).next = slot;
        }
        self.lists[list as usize].tail = slot;
    }

    fn remove(&mut self, list: ListId, slot: u32) {
        let Link { prev, next, .. } = core::mem::replace(
            self.link(list, slot),
            Link {
                prev: NIL,
                next: NIL,
                on: false,
            },
        );
        if prev == NIL {
            self.lists[list as usize].head = next;
        } else {
            self.link(list, prev).next = next;
        }
        if next == NIL {
            self.lists[list as usize].tail = prev;
        } else {
            self.link(list, next).prev = prev;
        }
    }
}
