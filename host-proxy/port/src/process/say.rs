//! What a process sends to `aditd` without a request.

use adit_channel::carrier::Carrier;

use super::Process;
use crate::control::{
    FEATURE_ACCEPTED, FEATURE_CONNECT, FEATURE_ENDS, FEATURE_KEY, FEATURE_LIMITS, FEATURE_TUNNELS,
    Features, Held, Status, Stuck, Way,
};
use crate::control_io::Message;
use crate::ways;

/// Longest text of a fault, in characters.
const FAULT_MAX: usize = 500;
/// Longest reason of a way, in characters.
const WHY_MAX: usize = 1000;

impl<C: Carrier> Process<C> {
    /// Tells `aditd` the state of the channel, if it changed: once a turn, and only when nothing else waits to be sent. How many
    /// streams there are is no news for a while.
    pub(super) fn say_status(&mut self) {
        let now = self.shard.now();
        let port = self.shard.port(self.port);
        let Some(aditd) = &self.aditd else {
            return;
        };
        if !aditd.outbox.is_empty() {
            return;
        }
        let counters = port.counters();
        let (ring, streams, bytes, faults) = self.ring_counts();
        let status = Status {
            vm: self.options.vm.clone(),
            cid: self.options.cid,
            pid: std::process::id(),
            session: ring || port.epoch().is_some() && !port.is_paused(),
            epoch: self.last_epoch,
            // It fits: the table has far fewer.
            streams: streams + port.streams() as u32,
            bytes: (
                bytes.0 + counters.bytes_to_guest,
                bytes.1 + counters.bytes_from_guest,
            ),
            faults: faults + counters.faults,
            last_fault: self.last_fault(),
        };
        let same_but = |streams: u32, said: &Status| {
            let bytes = said.bytes;
            Status {
                bytes,
                streams,
                ..status.clone()
            } == *said
        };
        let said = self.said.as_ref();
        if said.is_some_and(|said| same_but(status.streams, said)) {
            return self.status_pace.settled();
        }
        let only_streams = said.is_some_and(|said| same_but(said.streams, said));
        if !only_streams || self.status_pace.allows(now) {
            self.status_pace.said(now);
            let first = self.said.replace(status.clone()).is_none();
            if first {
                // Ahead of the status, after which aditd dials.
                let of_all =
                    FEATURE_CONNECT | FEATURE_TUNNELS | FEATURE_ENDS | FEATURE_LIMITS | FEATURE_KEY;
                let accepted = self.offers.as_ref().map_or(0, |_| FEATURE_ACCEPTED);
                let bits = of_all | accepted;
                self.say(Message::Features(Features { bits }), vec![]);
            }
            self.say(Message::Status(status), vec![]);
            if first && self.options.vmm {
                self.say(Message::Held(Held {}), vec![]);
            }
        }
    }

    /// Tells `aditd` which way to the guest was chosen, if that changed.
    pub(super) fn say_way(&mut self) {
        let Some(ways) = &self.ways else { return };
        let (choice, why) = ways.choice(self.uses_ring());
        let number = ways::Way::number(choice.way);
        if std::mem::replace(&mut self.way, number) != number {
            // It is for the guest that was there before.
            self.key = None;
        }
        let way = Way {
            way: number,
            why: why.chars().take(WHY_MAX).collect(),
        };
        // After the first status: aditd ignores other frames until the status has said which VM this is.
        let can_say = self.aditd.is_some() && self.said.is_some();
        if !can_say || self.said_way.as_ref() == Some(&way) {
            return;
        }
        self.said_way = Some(way.clone());
        self.say(Message::Way(way), vec![]);
    }

    /// Tells `aditd` which tunnels have ended, when nothing else waits to be sent.
    pub(super) fn say_ends(&mut self) {
        let is_free = self.aditd.as_ref().is_some_and(|a| a.outbox.is_empty());
        // After the features, which say what this is.
        if !is_free || self.said.is_none() || !self.ends.is_any() {
            return self.ends_pace.settled();
        }
        let now = self.shard.now();
        let at_once = self.ends.are_many() || self.done;
        if (at_once || self.ends_pace.allows(now))
            && let Some(page) = self.ends.page()
        {
            self.ends_pace.said(now);
            self.say(Message::Ends(page), vec![]);
        }
    }

    /// Why a VMM cannot get its channel; otherwise, why the last session ended.
    fn last_fault(&self) -> String {
        let port = self.shard.port(self.port);
        let refused = self.keeping.refused();
        let fault = refused
            .or_else(|| port.carrier().obstacle())
            .unwrap_or_else(|| port.last_fault().to_owned());
        fault.chars().take(FAULT_MAX).collect()
    }

    /// Sends `aditd` what a successor would need, if it changed.
    pub(super) fn say_kept(&mut self) {
        if self.aditd.is_none() {
            return;
        }
        match self.keeping.newer_than(self.said_seq) {
            Ok(None) => {}
            Ok(Some((handover, fds))) => {
                self.said_seq = handover.seq;
                self.say(Message::Handover(handover), fds);
            }
            Err(e) => tracing::warn!(error = %e, "cannot hand the state over to aditd"),
        }
        let stuck = self.keeping.stuck();
        if stuck != self.said_stuck {
            self.said_stuck.clone_from(&stuck);
            let reason = stuck.unwrap_or_default();
            self.say(Message::Stuck(Stuck { reason }), vec![]);
        }
    }
}
