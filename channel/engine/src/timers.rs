//! One deadline per slot, in an indexed binary heap. Setting, clearing and finding the earliest cost O(log n) or less.
//! Nothing is allocated once the slab has its final size.

use alloc::vec::Vec;

/// No deadline.
pub(crate) const NEVER: u64 = u64::MAX;
const ABSENT: u32 = u32::MAX;

/// Deadlines by slot.
#[derive(Default)]
pub(crate) struct Timers {
    /// Slots, as a binary min-heap ordered by `when`.
    heap: Vec<u32>,
    /// For each slot: its index in `heap`, or `ABSENT`.
    place: Vec<u32>,
    /// For each slot: its deadline, or `NEVER`.
    when: Vec<u64>,
}

impl Timers {
    /// Makes room for one more slot.
    pub(crate) fn grow(&mut self) {
        self.place.push(ABSENT);
        self.when.push(NEVER);
        self.heap.reserve(self.place.len() - self.heap.len());
    }

    /// Returns how many slots there is room for.
    pub(crate) fn len(&self) -> usize {
        self.place.len()
    }

    /// Sets the deadline of a slot; `NEVER` clears it.
    #[inline]
    pub(crate) fn set(&mut self, slot: u32, at: u64) {
        let before = core::mem::replace(&mut self.when[slot as usize], at);
        if before != at {
            self.changed(slot, before, at);
        }
    }

    fn changed(&mut self, slot: u32, before: u64, at: u64) {
        let s = slot as usize;
        match (self.place[s], at) {
            (ABSENT, _) => {
                self.heap.push(slot);
                self.up(self.heap.len() - 1);
            }
            (at, NEVER) => self.remove(at as usize),
            (place, _) if at < before => self.up(place as usize),
            (place, _) => self.down(place as usize),
        }
    }

    /// Returns the earliest deadline and its slot.
    pub(crate) fn first(&self) -> Option<(u64, u32)> {
        let &slot = self.heap.first()?;
        Some((self.when[slot as usize], slot))
    }

    fn remove(&mut self, at: usize) {
        let gone = self.heap.swap_remove(at);
        self.place[gone as usize] = ABSENT;
        if at < self.heap.len() {
            self.place[self.heap[at] as usize] = at as u32;
            self.up(at);
            self.down(at);
        }
    }

    fn key(&self, at: usize) -> u64 {
        self.when[self.heap[at] as usize]
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.place[self.heap[a] as usize] = a as u32;
        self.place[self.heap[b] as usize] = b as u32;
    }

    fn up(&mut self, mut at: usize) {
        self.place[self.heap[at] as usize] = at as u32;
        while at > 0 {
            let parent = (at - 1) / 2;
            if self.key(parent) <= self.key(at) {
                return;
            }
            self.swap(parent, at);
            at = parent;
        }
    }

    fn down(&mut self, mut at: usize) {
        loop {
            let left = 2 * at + 1;
            if left >= self.heap.len() {
                return;
            }
            let right = left + 1;
            let least = if right < self.heap.len() && self.key(right) < self.key(left) {
                right
            } else {
                left
            };
            if self.key(at) <= self.key(least) {
                return;
            }
            self.swap(at, least);
            at = least;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_sorted_map(steps in proptest::collection::vec((0u32..20, 0u64..50), 1..200)) {
            let mut timers = Timers::default();
            let mut model = BTreeMap::new();
            (0..20).for_each(|_| timers.grow());
            for (slot, at) in steps {
                let at = if at < 10 { NEVER } else { at };
                timers.set(slot, at);
                model.insert(slot, at);
                let least = model.values().copied().min().filter(|&w| w != NEVER);
                prop_assert_eq!(timers.first().map(|(w, _)| w), least);
                if let Some((w, s)) = timers.first() {
                    prop_assert_eq!(model[&s], w);
                }
            }
        }
    }
}
