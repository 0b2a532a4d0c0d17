//! What a port does so that a successor of its process can go on, and what it does as a successor.
//!
//! A guest's socket whose stream this process does not know would hang: nobody says anything to it any more. So the pairs
//! in use stand in a [`LiveFile`], entered before a burst is published; a successor sends a reset to each of them ahead of
//! everything else, so that a pair that the guest uses again, or whose request it reads a second time because the dead
//! process did not come to publish, begins anew.

use std::sync::Arc;

use adit_engine::{Kind, Op, PacketHeader, SessionChange};

use super::Port;
use crate::carrier::Carrier;
use crate::live::{LiveFile, LiveTable};

impl<C: Carrier> Port<C> {
    /// Keeps the pairs in use in `file` from now on, and resets those that are in it already, once there is a session. To
    /// be called before the first poll.
    pub fn keep_live(&mut self, file: Arc<LiveFile>) {
        let (table, inherited) = LiveTable::new(file);
        self.live = Some(table);
        self.inherited = inherited;
        self.engine.track_pairs();
    }

    /// Pairs of a predecessor that are still to be reset.
    pub fn inherited(&self) -> usize {
        self.inherited.len()
    }

    /// Before the engine hears of it.
    pub(super) fn session_changed(&mut self, change: SessionChange) {
        let Some(live) = &mut self.live else { return };
        match change {
            // Its driver is new, or told by itself: it has none of the predecessor's streams.
            SessionChange::Attached { epoch } | SessionChange::Restored { epoch } => {
                live.set_epoch(epoch);
                for (local_port, peer_port) in self.inherited.drain(..) {
                    live.closed(local_port, peer_port);
                }
            }
            SessionChange::Continued { epoch } => live.set_epoch(epoch),
            // Whose driver comes next is not known yet.
            SessionChange::Lost(_) => {}
        }
    }

    /// Publishes the burst: first what a successor must know of it.
    pub(super) fn flush(&mut self) {
        if let Some(live) = &mut self.live {
            for change in self.engine.drain_pairs() {
                live.apply(change);
            }
        }
        self.carrier.flush();
        if let Some(live) = &mut self.live {
            live.published();
        }
    }
}

/// The reset of an inherited stream, to be put into a slot. (Two fields of a port: the slot borrows a third.)
pub(super) fn next_reset(
    inherited: &mut Vec<(u32, u32)>,
    live: &mut Option<LiveTable>,
) -> Option<PacketHeader> {
    let (local_port, peer_port) = inherited.pop()?;
    if let Some(live) = live {
        live.closed(local_port, peer_port);
    }
    Some(PacketHeader {
        src_port: local_port,
        dst_port: peer_port,
        kind: Kind::Stream as u16,
        op: Op::Rst as u16,
        ..PacketHeader::default()
    })
}
