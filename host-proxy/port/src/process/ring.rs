//! The VM's ring: a second port beside the one of its vsock.
//!
//! A dial chooses its port once: a service of the agent uses the ring while both sides use it, and a plain vsock port always
//! uses vsock. A stream never changes its carrier. If the ring fails, its streams end.

use std::io;

use adit_channel::carrier::Carrier;
use adit_channel::either::Either;
use adit_channel::port::Port;
use adit_channel::ring::bell::BELL_PORT;
use adit_channel::ring::{Dock, RingState};
use adit_channel::shard::PortIndex;
use adit_engine::{EngineConfig, ResetReason};

use super::bell::Bell;
use super::{KEY_RINGS, Process, RingNews, Rings};
use crate::control::{Ring, Target};
use crate::control_io::Message;
use crate::rings::RingInbox;

/// Reason in the status before the first ring.
const NONE_YET: &str = "no VMM has offered a ring";

/// The dock of the second port.
fn dock<C: Carrier>(port: &Port<Either<C, Dock>>) -> Option<&Dock> {
    match port.carrier() {
        Either::Right(dock) => Some(dock),
        Either::Left(_) => None,
    }
}

impl<C: Carrier> Process<C> {
    /// Lets the VM have a ring. Rings arrive in `inbox`.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn with_rings(mut self, inbox: RingInbox) -> io::Result<Self> {
        let dock = Either::Right(Dock::new()?);
        let port = (self.shard).add(dock, EngineConfig::default(), !self.options.seed)?;
        for &at in &self.options.serve_ports {
            let listened = self.shard.port_mut(port).listen(at);
            listened.map_err(io::Error::other)?;
        }
        let bell = self.shard.port_mut(self.port).listen(BELL_PORT);
        bell.map_err(io::Error::other)?;
        self.shard.watch(inbox.bell(), KEY_RINGS)?;
        self.rings = Some(Rings {
            port,
            bell: Bell::new(inbox.guest_bell()),
            inbox,
            docked: None,
            why: NONE_YET.to_owned(),
            faulted: 0,
        });
        Ok(self)
    }

    /// The ring's port, if a dial to this target should use it.
    pub(super) fn ring_for(&self, to: &Target) -> Option<PortIndex> {
        let Target::Service(_) = to else { return None };
        let rings = self.rings.as_ref().filter(|_| self.uses_ring())?;
        Some(rings.port)
    }

    /// Whether both sides use a ring.
    pub(super) fn uses_ring(&self) -> bool {
        let port = self.rings.as_ref().map(|r| self.shard.port(r.port));
        port.is_some_and(|p| p.epoch().is_some() && dock(p).is_some_and(Dock::running))
    }

    pub(super) fn rings_changed(&mut self) {
        let Some(rings) = &mut self.rings else { return };
        for news in rings.inbox.take() {
            let port = self.shard.port_mut(rings.port);
            let Either::Right(dock) = port.carrier_mut() else {
                return;
            };
            match news {
                RingNews::Came {
                    id,
                    carrier,
                    info,
                    kept,
                } => {
                    tracing::info!(path = info.path, bytes = info.bytes, "a ring was added");
                    dock.dock(*carrier);
                    rings.docked = Some((id, info));
                    self.keeping.set_ring(kept);
                }
                RingNews::Went { id, why } if rings.docked.as_ref().is_some_and(|d| d.0 == id) => {
                    tracing::info!(why, "the ring was removed");
                    dock.undock();
                    rings.docked = None;
                    self.keeping.set_ring(Vec::new());
                    rings.why = format!("the ring was removed: {why}");
                }
                RingNews::Went { .. } => {}
            }
        }
    }

    pub(super) fn ring_session(&mut self, epoch: Option<u64>) {
        let what = if epoch.is_some() { "on" } else { "off" };
        tracing::info!(epoch, "session of the ring {what}");
    }

    pub(super) fn ring_stream_closed(&mut self, port: PortIndex, reason: Option<ResetReason>) {
        if let (Some(rings), Some(ResetReason::CarrierFault)) = (&mut self.rings, reason) {
            rings.faulted += u32::from(rings.port == port);
        }
    }

    /// Logs how many streams ended with the ring: one line for all of them.
    pub(super) fn log_faulted(&mut self) {
        let Some(rings) = &mut self.rings else { return };
        if let streams @ 1.. = std::mem::take(&mut rings.faulted) {
            let reason = ResetReason::CarrierFault;
            tracing::info!(streams, %reason, "streams of the ring ended");
        }
    }

    /// Tells `aditd` the state of the ring, if it changed.
    pub(super) fn say_ring(&mut self) {
        let (Some(rings), Some(aditd)) = (&self.rings, &self.aditd) else {
            return;
        };
        // After the status: aditd ignores other frames until the status has said which VM this is.
        if self.said.is_none() || !aditd.outbox.is_empty() {
            return;
        }
        let port = self.shard.port(rings.port);
        let info = rings.docked.as_ref().map(|(_, info)| info);
        let state = dock(port)
            .and_then(Dock::ring)
            .map(|ring| (ring.state(), ring));
        let why = match &state {
            None => rings.why.clone(),
            Some((RingState::Running { .. }, _)) => "both sides use the ring".to_owned(),
            Some((RingState::Waiting, _)) => "the guest does not use the ring yet".to_owned(),
            Some((RingState::Held, ring)) => {
                let faults = [ring.last_fault(), port.last_fault()];
                let fault = faults.into_iter().find(|f| !f.is_empty());
                format!("the ring broke: {}", fault.unwrap_or("no reason is known"))
            }
        };
        let ring = Ring {
            running: matches!(state, Some((RingState::Running { .. }, _))),
            why,
            memory: info.map_or_else(String::new, |i| format!("{} by {}", i.memory, i.path)),
            bytes: info.map_or(0, |i| i.bytes),
            line_ns: info.map_or(0, |i| i.line_ns),
            hears: rings.bell.hears.map_or(0, |hears| hears as u8),
            rtt_ns: rings.bell.rtt_ns,
            // It fits: the table has far fewer.
            streams: port.streams() as u32,
        };
        let said = self.said_ring.as_ref();
        if said == Some(&ring) {
            return self.ring_pace.settled();
        }
        let only_streams = said.is_some_and(|said| {
            let streams = said.streams;
            Ring {
                streams,
                ..ring.clone()
            } == *said
        });
        let now = self.shard.now();
        if !only_streams || self.ring_pace.allows(now) {
            self.ring_pace.said(now);
            self.said_ring = Some(ring.clone());
            self.say(Message::Ring(ring), vec![]);
        }
    }

    /// What the ring's port adds to a status: whether it has a session, streams, bytes in each direction, faults.
    pub(super) fn ring_counts(&self) -> (bool, u32, (u64, u64), u64) {
        let Some(rings) = &self.rings else {
            return Default::default();
        };
        let port = self.shard.port(rings.port);
        let counters = port.counters();
        (
            port.epoch().is_some(),
            port.streams() as u32,
            (counters.bytes_to_guest, counters.bytes_from_guest),
            counters.faults,
        )
    }
}
