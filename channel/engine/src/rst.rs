//! Resets owed for port pairs that are no stream of ours (R43, R45, R46): a small set without duplicates, filled at a
//! bounded rate. What does not fit is dropped and counted: the peer's own timeouts cover it. Resets of streams are not
//! here: they are never dropped (the stream's slot keeps them).

use alloc::collections::VecDeque;

use crate::{Lane, Tick};

/// Most resets owed at a time.
pub const RST_MAX: usize = 256;
/// One more reset may be queued every so many ns: 10,000 a second in the long run.
pub(crate) const RST_INTERVAL_NS: u64 = 100_000;
/// Resets that may be queued at once before the rate counts.
pub(crate) const RST_BURST: u64 = 1024;

/// One reset to send. Ports are ours and the peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rst {
    pub(crate) local_port: u32,
    pub(crate) peer_port: u32,
    /// Socket type as the peer wrote it: Linux looks sockets up by it.
    pub(crate) kind: u16,
    /// Where the packet came that it answers: it must not overtake what was sent to the pair there before.
    pub(crate) lane: Lane,
}

/// The set, in order of arrival.
pub(crate) struct RstSet {
    owed: VecDeque<Rst>,
    /// When the rate would allow the next one if the burst were used up (virtual scheduling, ns).
    due: u64,
}

impl RstSet {
    pub(crate) fn new() -> Self {
        Self {
            owed: VecDeque::new(),
            due: 0,
        }
    }

    /// Owes a reset; false if it was dropped.
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

    /// Forgets what is owed to a pair: a new request for it came in, which a late reset would kill.
    pub(crate) fn cancel(&mut self, local_port: u32, peer_port: u32) {
        self.owed
            .retain(|r| r.local_port != local_port || r.peer_port != peer_port);
    }

    /// Takes the next one, of a lane or of any.
    pub(crate) fn pop(&mut self, lane: Option<Lane>) -> Option<Rst> {
        let at = self.owed.iter().position(|rst| on(rst, lane))?;
        self.owed.remove(at)
    }

    /// Tells whether there is none, on a lane or on any.
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
        assert_eq!(queued, RST_MAX, "full set drops");
        // Drained at once, a storm of 60 s and a million packets gets the burst and the rate, no more.
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
    fn same_pair_is_owed_once_and_cancelled_whole() {
        let mut set = RstSet::new();
        assert!(set.insert(Tick(0), rst(5)) && set.insert(Tick(0), rst(5)));
        assert!(set.insert(Tick(0), Rst { kind: 2, ..rst(5) }));
        assert!(set.insert(Tick(0), rst(6)));
        set.cancel(1, 5);
        assert_eq!(set.pop(None), Some(rst(6)));
        assert!(set.is_empty(None));
    }
}
