//! The saved state of a device while its VM is stopped: enough for another process to continue with the guest's
//! queues.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `ADITVSKS` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | 1: a session follows, 0: the driver had not set the device up (or broke it) |
//! | 16 | 8 | guest CID |
//! | 24 | 8 | epoch of the next session |
//! | 32 | 8 | features that the driver chose |
//! | 40 | 3 × 32 | queues RX, TX, events: size (2), position (2), zero (4), descriptors (8), available (8), used (8) |
//!
//! All fields are little-endian. The bytes are trusted no more than what a guest writes. Lengths, ranges and zeroes
//! are checked here; features and addresses by the code that checks a driver's. One position is the whole state of a
//! queue, because no descriptor is held beyond a burst.
//!
//! Streams are not saved: they end. A restored device begins a new session, and must send the guest the event that
//! says so ([`VsockDevice::tell_transport_reset`]).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use adit_engine::SessionChange;
use vm_memory::{GuestAddressSpace, Permissions};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::chain::{self, Cursor};
use super::{
    ActivateError, DeviceError, EVENT_QUEUE, GuestCid, QUEUE_MAX, QueueConfig, Signal, VirtQueue,
    VirtQueues, VsockDevice,
};
use crate::carrier::CarrierFault;

const MAGIC: [u8; 8] = *b"ADITVSKS";
const VERSION: u32 = 1;
/// Size of a saved state in bytes.
pub const STATE_BYTES: usize = size_of::<Wire>();
const _: () = assert!(STATE_BYTES == 136);
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.3 §5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;
const EVENT_BYTES: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireQueue {
    size: u16,
    position: u16,
    zero: u32,
    desc: u64,
    avail: u64,
    used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Wire {
    magic: [u8; 8],
    version: u32,
    session: u32,
    guest_cid: u64,
    next_epoch: u64,
    features: u64,
    queues: [WireQueue; 3],
}

/// The state of a device, checked as far as possible without the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceState(Wire);

/// Why bytes are not a saved state: the fault of the file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The length is wrong.
    #[error("the saved state of a vsock device has {STATE_BYTES} bytes, but these are {len}")]
    Length {
        /// Actual length in bytes.
        len: usize,
    },
    /// It is something else, or of another version.
    #[error("not a saved vsock device of version {VERSION} (found version {version})")]
    Foreign {
        /// The value at the place of the version.
        version: u32,
    },
    /// A field has a value that is never saved.
    #[error("saved vsock device: {field} has the impossible value {value:#x}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: u64,
    },
}

/// Why a device cannot be restored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The features are not offered here, or the device is in use.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The queues are not in this memory.
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

impl DeviceState {
    /// Returns the bytes to save.
    pub fn to_bytes(&self) -> [u8; STATE_BYTES] {
        let mut bytes = [0; STATE_BYTES];
        bytes.copy_from_slice(self.0.as_bytes());
        bytes
    }

    /// Parses saved bytes.
    ///
    /// # Errors
    /// They are not the result of [`to_bytes`](Self::to_bytes).
    pub fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        let wire =
            Wire::read_from_bytes(bytes).map_err(|_| StateError::Length { len: bytes.len() })?;
        if wire.magic != MAGIC || wire.version != VERSION {
            let version = wire.version;
            return Err(StateError::Foreign { version });
        }
        let field = |field, value| Err(StateError::Field { field, value });
        if wire.session > 1 {
            return field("session", wire.session.into());
        }
        if GuestCid::new(wire.guest_cid).is_none() {
            return field("guest CID", wire.guest_cid);
        }
        // Epochs count sessions. No device can have had so many.
        if wire.next_epoch == 0 || wire.next_epoch > 1 << 48 {
            return field("epoch", wire.next_epoch);
        }
        for queue in &wire.queues {
            if queue.zero != 0 {
                return field("padding", queue.zero.into());
            }
            let empty = queue.size == 0;
            if empty == (wire.session == 1) || queue.size > QUEUE_MAX {
                return field("queue size", queue.size.into());
            }
        }
        Ok(Self(wire))
    }

    /// The guest's CID.
    pub fn guest_cid(&self) -> u64 {
        self.0.guest_cid
    }

    /// Epoch of the first session after a restore.
    pub fn next_epoch(&self) -> u64 {
        self.0.next_epoch
    }

    /// Returns true if the guest's driver had set the device up.
    pub fn has_session(&self) -> bool {
        self.0.session == 1
    }
}

impl WireQueue {
    const NONE: Self = Self {
        size: 0,
        position: 0,
        zero: 0,
        desc: 0,
        avail: 0,
        used: 0,
    };

    /// As a bus would have configured it. The position is that of both rings.
    fn config(&self) -> QueueConfig {
        QueueConfig {
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
            next_avail: self.position,
            next_used: self.position,
        }
    }
}

impl<M: GuestAddressSpace> VsockDevice<M> {
    /// Returns the state of the device. Call it between two bursts, while the vCPUs are stopped.
    pub fn save(&self) -> DeviceState {
        let mut wire = Wire {
            magic: MAGIC,
            version: VERSION,
            session: 0,
            guest_cid: self.guest_cid.get(),
            next_epoch: self.epoch,
            features: 0,
            queues: [WireQueue::NONE; 3],
        };
        let active = self.active.as_ref().filter(|a| !a.torn);
        if let Some(active) = active
            && let Some(event) = &active.event
        {
            wire.session = 1;
            wire.features = self.acked;
            wire.queues = [&active.rx, &active.tx, event].map(|queue| {
                let config = queue.config();
                WireQueue {
                    size: config.size,
                    position: config.next_avail,
                    zero: 0,
                    desc: config.desc_table,
                    avail: config.avail_ring,
                    used: config.used_ring,
                }
            });
        }
        DeviceState(wire)
    }

    /// Continues where a saved device stopped, with a new session on the guest's queues. `kicks` are those of RX and
    /// TX. The caller must then [inform the guest](Self::tell_transport_reset). This device keeps its own guest CID,
    /// whatever the saved one was.
    ///
    /// # Errors
    /// The state does not fit the memory or this device. Nothing changes.
    pub fn restore(
        &mut self,
        state: &DeviceState,
        mem: M,
        kicks: [Option<OwnedFd>; 2],
        signal: Arc<dyn Signal>,
    ) -> Result<(), RestoreError> {
        let wire = &state.0;
        if !state.has_session() {
            self.epoch = self.epoch.max(wire.next_epoch);
            return Ok(());
        }
        let [rx, tx, event] = &wire.queues;
        let [rx_kick, tx_kick] = kicks;
        let with = |queue: &WireQueue, kick| VirtQueue {
            queue: queue.config(),
            kick,
        };
        let queues = VirtQueues {
            rx: with(rx, rx_kick),
            tx: with(tx, tx_kick),
            event: Some(event.config()),
        };
        let (acked, epoch) = (self.acked, self.epoch);
        self.ack_features(wire.features)?;
        self.epoch = epoch.max(wire.next_epoch);
        match self.begin_session(mem, queues, signal) {
            Ok(epoch) => {
                self.set_change(SessionChange::Restored { epoch });
                Ok(())
            }
            Err(e) => {
                (self.acked, self.epoch) = (acked, epoch);
                Err(e.into())
            }
        }
    }

    /// Informs the guest that its connections are gone (TRANSPORT_RESET on the event queue). Returns true if that is
    /// done, or there is no driver. Returns false if the guest has posted no event buffer: call again when it kicks
    /// the event queue.
    ///
    /// # Errors
    /// The guest broke the rules of the event queue; the session must be torn down.
    pub fn tell_transport_reset(&mut self) -> Result<bool, CarrierFault> {
        let Some(active) = self.active.as_mut().filter(|a| !a.torn) else {
            return Ok(true);
        };
        let Some(queue) = &mut active.event else {
            return Ok(true);
        };
        let mem = active.mem.memory();
        let mem = &*mem;
        // Unusable buffers are returned to the guest, at most one queue size of them.
        for _ in 0..=queue.size() {
            let Some(head) = queue.peek(mem)? else {
                if queue.enable_notify(mem)? {
                    continue;
                }
                return Ok(false);
            };
            queue.advance();
            let limit = u64::from(u32::MAX);
            let walked = chain::walk(mem, queue, head, Permissions::Write, limit, &mut self.segs);
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            let fits = matches!(walked, Ok(room) if room >= EVENT_BYTES)
                && Cursor::default().copy_in(mem, &self.segs, &event).is_ok();
            if !fits {
                self.counters.malformed_chains += 1;
            }
            queue.push_used(mem, head, if fits { event.len() as u32 } else { 0 })?;
            if queue.publish(mem)? && queue.must_notify(mem)? {
                self.counters.signals += 1;
                active.signal.signal(EVENT_QUEUE);
            }
            if fits {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
