//! Resets owed to port pairs that have no stream (R43, R45, R46): a small set without duplicates, filled at a bounded
//! rate. A reset that does not fit is dropped and counted; the peer's own timeouts then end its stream. Resets of
//! streams are not in this set. They are never dropped, because the stream's slot keeps them.

use alloc::collections::VecDeque;

use crate::{Lane, Tick};

/// Maximum number of resets that are owed at a time.
pub const RST_MAX: usize = 256;
/// Time in ns per queued reset in the long run: 10,000 a second.
pub(crate) const RST_INTERVAL_NS: u64 = 100_000;
/// Number of resets that may be queued at once before the rate limit applies.
pub(crate) const RST_BURST: u64 = 1024;

/// One reset to send. `local_port` is ours, `peer_port` is the peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rst {
    pub(crate) local_port: u32,
    pub(crate) peer_port: u32,
    /// Socket type as the peer wrote it: Linux uses it to look up sockets.
    pub(crate) kind: u16,
    /// Lane of the packet that this reset answers. It must not overtake packets that were sent to the pair on that
    /// lane before.
    pub(crate) lane: Lane,
}

/// The set, in order of arrival.
pub(crate) struct RstSet {
    owed: VecDeque<Rst>,
    /// Time at which the rate limit allows the next reset when the burst is used up (virtual scheduling, ns).
    due: u64,
}

impl RstSet {
    pub(crate) fn new() -> Self {
        Self {
            owed: VecDeque::new(),
            due: 0,
        }
    }

    /// Queues a reset. Returns false if it was dropped.
    pub(crate) fn insert(&mut self, now: Tick, rst: Rst) -> bool {
        if self.owed.contains(&rst) {
            return true;
        }
        let due = self.due.max(now.0);
        if self.owed.len() >= RST_MAX || due - now.0 > RST_BURST * RST_INTERVAL_NS {
            return false;
        }
        self.due = due.saturating_add(RST_INTERVAL_NS);
        self.owed.push_back(rst);
        true
    }

    /// Removes the resets for a pair, because a new request for it arrived. A late reset would end the new stream.
    pub(crate) fn cancel(&mut self, local_port: u32, peer_port: u32) {
        self.owed
            .retain(|r| r.local_port != local_port || r.peer_port != peer_port);
    }

    /// Takes the next reset, of one lane or of any.
    pub(crate) fn pop(&mut self, lane: Option<Lane>) -> Option<Rst> {
        let at = self.owed.iter().position(|rst| on(rst, lane))?;
        self.owed.remove(at)
    }

    /// Returns true if no reset is owed, on one lane or on any.
    pub(crate) fn is_empty(&self, lane: Option<Lane>) -> bool {
        !self.owed.iter().any(|rst| on(rst, lane))
    }

    pub(crate) fn clear(&mut self) {
        self.owed.clear();
    }
}

fn on(rst: &Rst, lane: Option<Lane>) -> bool {
    lane.is_none_or(|lane| rst.lane == lane)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rst(n: u32) -> Rst {
        Rst {
            local_port: 1,
            peer_port: n,
            kind: 1,
            lane: Lane::Bulk,
        }
    }

    #[test]
    fn r46_set_and_rate_are_bounded() {
        let mut set = RstSet::new();
        let queued = (0..100_000)
            .filter(|&n| set.insert(Tick(0), rst(n)))
            .count();
        assert_eq!(queued, RST_MAX, "a full set drops");
        // Everything is sent at once. A storm of a million packets in 60 s gets the burst plus the rate, and no more.
        let mut sent = 0u64;
        for n in 0..1_000_000u32 {
            let now = Tick(u64::from(n) * 60_000);
            set.insert(now, rst(n));
            sent += u64::from(set.pop(None).is_some());
        }
        let bound = RST_BURST + RST_MAX as u64 + 60_000_000_000 / RST_INTERVAL_NS + 2;
        assert!(sent <= bound, "{sent} > {bound}");
    }

    #[test]
    fn a_pair_is_owed_one_reset_a_kind_and_cancel_removes_all() {
        let mut set = RstSet::new();
        assert!(set.insert(Tick(0), rst(5)) && set.insert(Tick(0), rst(5)));
        assert!(set.insert(Tick(0), Rst { kind: 2, ..rst(5) }));
        assert!(set.insert(Tick(0), rst(6)));
        set.cancel(1, 5);
        assert_eq!(set.pop(None), Some(rst(6)));
        assert!(set.is_empty(None));
    }
}
