//! What a `Port` does so that a successor process can continue, and what it does as a successor.
//!
//! If a successor does not know a stream, the guest's socket would hang, because no packet for it would ever arrive.
//! So the pairs in use are stored in a [`LiveFile`], before a burst is published. A successor sends a reset to each of
//! these pairs before anything else. So a pair starts fresh if the guest uses it again, or if the successor reads a
//! request a second time because the dead process had not published its burst.

use std::sync::Arc;

use adit_engine::{Kind, Op, PacketHeader, SessionChange};

use super::Port;
use crate::carrier::Carrier;
use crate::live::{LiveFile, LiveTable};

impl<C: Carrier> Port<C> {
    /// Stores the pairs in use in `file` from now on. Resets those that are already in it, once there is a session.
    /// Call this before the first poll.
    pub fn keep_live(&mut self, file: Arc<LiveFile>) {
        let (table, inherited) = LiveTable::new(file);
        self.live = Some(table);
        self.inherited = inherited;
        self.engine.track_pairs();
    }

    /// Number of a predecessor's pairs that are not reset yet.
    pub fn inherited(&self) -> usize {
        self.inherited.len()
    }

    /// Call this before the engine handles the change.
    pub(super) fn session_changed(&mut self, change: SessionChange) {
        let Some(live) = &mut self.live else { return };
        match change {
            // The driver is new, or the device informs it by an event. It has none of the predecessor's streams.
            SessionChange::Attached { epoch } | SessionChange::Restored { epoch } => {
                live.set_epoch(epoch);
                for (local_port, peer_port) in self.inherited.drain(..) {
                    live.closed(local_port, peer_port);
                }
            }
            SessionChange::Continued { epoch } => live.set_epoch(epoch),
            // It is not known yet which driver comes next.
            SessionChange::Lost(_) => {}
        }
    }

    /// Publishes the burst, after storing what a successor must know about it.
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

/// Returns the reset of an inherited stream for a slot. (It takes two fields of the `Port`, because the slot borrows a
/// third.)
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
