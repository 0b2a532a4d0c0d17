//! What a device is while its VM is held: enough for another process to go on with the guest's queues.
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
//! All little endian. What is read is believed no more than what a guest writes: lengths, ranges and zeroes are checked here,
//! features and addresses by the same code that checks a driver's. One position says all about a queue, because no
//! descriptor is held over a burst.
//!
//! Streams are not in it: they end. A restored device begins a session of its own, and owes the guest the event that says
//! so ([`VsockDevice::tell_transport_reset`]).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use adit_engine::SessionChange;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, Permissions};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::chain::{self, Cursor};
use super::{
    ActivateError, DeviceError, EVENT_QUEUE, GuestCid, QUEUE_MAX, Signal, VirtQueue, VirtQueues,
    VsockDevice,
};
use crate::carrier::CarrierFault;

const MAGIC: [u8; 8] = *b"ADITVSKS";
const VERSION: u32 = 1;
/// Bytes of a saved state.
pub const STATE_BYTES: usize = size_of::<Wire>();
const _: () = assert!(STATE_BYTES == 136);
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.3 §5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;
const EVENT_BYTES: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct WireRing {
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
    rings: [WireRing; 3],
}

/// A device's state, checked as far as it can be without the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceState(Wire);

/// Why bytes are no state: the file's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Another length.
    #[error("a saved vsock device has {STATE_BYTES} bytes, and these are {len}")]
    Length {
        /// How many there are.
        len: usize,
    },
    /// Something else, or of another version.
    #[error("no saved vsock device of version {VERSION} (version {version})")]
    Foreign {
        /// What stands where the version would.
        version: u32,
    },
    /// A field has a value that none is saved with.
    #[error("saved vsock device: {field} is {value:#x}")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Why a device cannot go on from a state.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Features that are not offered here, or a device in use.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Queues that do not lie in this memory.
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

impl DeviceState {
    /// Returns the bytes to keep.
    pub fn to_bytes(&self) -> [u8; STATE_BYTES] {
        let mut bytes = [0; STATE_BYTES];
        bytes.copy_from_slice(self.0.as_bytes());
        bytes
    }

    /// Reads kept bytes.
    ///
    /// # Errors
    /// They are not what [`to_bytes`](Self::to_bytes) gives.
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
        // Epochs count sessions; a device would have to live for ages.
        if wire.next_epoch == 0 || wire.next_epoch > 1 << 48 {
            return field("epoch", wire.next_epoch);
        }
        for ring in &wire.rings {
            if ring.zero != 0 {
                return field("padding", ring.zero.into());
            }
            let empty = ring.size == 0;
            if empty == (wire.session == 1) || ring.size > QUEUE_MAX {
                return field("queue size", ring.size.into());
            }
        }
        Ok(Self(wire))
    }

    /// The CID that the guest had.
    pub fn guest_cid(&self) -> u64 {
        self.0.guest_cid
    }

    /// Epoch of the session that begins when a device goes on from this state.
    pub fn next_epoch(&self) -> u64 {
        self.0.next_epoch
    }

    /// Whether the guest's driver had set the device up.
    pub fn has_session(&self) -> bool {
        self.0.session == 1
    }
}

impl WireRing {
    const NONE: Self = Self {
        size: 0,
        position: 0,
        zero: 0,
        desc: 0,
        avail: 0,
        used: 0,
    };

    fn queue(&self) -> Result<Queue, ActivateError> {
        let invalid = ActivateError::QueueSize {
            queue: 0,
            size: self.size,
            max: QUEUE_MAX,
        };
        let mut queue = Queue::new(self.size).map_err(|_| invalid)?;
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(self.desc);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.avail);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used);
        queue.set_used_ring_address(low, high);
        queue.set_next_avail(self.position);
        queue.set_next_used(self.position);
        queue.set_ready(true);
        Ok(queue)
    }
}

impl<M: GuestAddressSpace> VsockDevice<M> {
    /// Returns what the device is, between two bursts and with the guest's processors held.
    pub fn save(&self) -> DeviceState {
        let mut wire = Wire {
            magic: MAGIC,
            version: VERSION,
            session: 0,
            guest_cid: self.guest_cid.get(),
            next_epoch: self.epoch,
            features: 0,
            rings: [WireRing::NONE; 3],
        };
        let active = self.active.as_ref().filter(|a| !a.torn);
        if let Some(active) = active
            && let Some(event) = &active.event
        {
            wire.session = 1;
            wire.features = self.acked;
            wire.rings = [&active.rx, &active.tx, event].map(|ring| {
                let [desc, avail, used] = ring.addresses();
                WireRing {
                    size: ring.size(),
                    position: ring.base(),
                    zero: 0,
                    desc,
                    avail,
                    used,
                }
            });
        }
        DeviceState(wire)
    }

    /// Goes on where a saved device stood: a new session on the guest's queues. `kicks` are those of RX and TX. The caller
    /// then [tells the guest](Self::tell_transport_reset). The guest's CID is this device's, whatever the saved one's was.
    ///
    /// # Errors
    /// The state does not fit the memory or this device: nothing changes.
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
        let [rx, tx, event] = &wire.rings;
        let [rx_kick, tx_kick] = kicks;
        let with = |ring: &WireRing, kick| -> Result<_, ActivateError> {
            let queue = ring.queue()?;
            Ok(VirtQueue { queue, kick })
        };
        let queues = VirtQueues {
            rx: with(rx, rx_kick)?,
            tx: with(tx, tx_kick)?,
            event: Some(event.queue()?),
        };
        let (acked, epoch) = (self.acked, self.epoch);
        self.ack_features(wire.features)?;
        self.epoch = epoch.max(wire.next_epoch);
        match self.begin_session(mem, queues, signal) {
            Ok(epoch) => {
                self.tell(SessionChange::Restored { epoch });
                Ok(())
            }
            Err(e) => {
                (self.acked, self.epoch) = (acked, epoch);
                Err(e.into())
            }
        }
    }

    /// Tells the guest that its connections are gone (TRANSPORT_RESET on the event queue). True: told, or there is nobody to
    /// tell. False: the guest has no buffer there; again when it kicks the event queue.
    ///
    /// # Errors
    /// The guest broke the rules of the event queue: the session must be torn down.
    pub fn tell_transport_reset(&mut self) -> Result<bool, CarrierFault> {
        let Some(active) = self.active.as_mut().filter(|a| !a.torn) else {
            return Ok(true);
        };
        let Some(ring) = &mut active.event else {
            return Ok(true);
        };
        let mem = active.mem.memory();
        let mem = &*mem;
        // A guest that posts what cannot be used gets it back, a queue full at a time.
        for _ in 0..=ring.size() {
            let Some(head) = ring.peek(mem)? else {
                if ring.enable_notify(mem)? {
                    continue;
                }
                return Ok(false);
            };
            ring.advance();
            let limit = u64::from(u32::MAX);
            let walked = chain::walk(mem, ring, head, Permissions::Write, limit, &mut self.segs);
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            let told = matches!(walked, Ok(room) if room >= EVENT_BYTES)
                && Cursor::default().copy_in(mem, &self.segs, &event).is_ok();
            if !told {
                self.counters.malformed_chains += 1;
            }
            ring.push_used(mem, head, if told { event.len() as u32 } else { 0 })?;
            if ring.publish(mem)? && ring.must_tell(mem)? {
                self.counters.signals += 1;
                active.signal.signal(EVENT_QUEUE);
            }
            if told {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
