//! The virtio-vsock device (virtio 1.3 §5.10), bus-neutral: a VMM puts it behind its own MMIO or PCI transport, or
//! `vhost_user` puts it behind a socket.
//!
//! ```text
//! Inactive ── activate ──► Active ── tear (fault of the guest) ──► Torn
//!     ▲                    │  ▲  │                                     │
//!     │               halt ▼  │ go_on                                  │
//!     │                  Halted │                                      │
//!     └───────── reset ────┴────┴─────────────── reset ────────────────┘
//! ```
//!
//! - Inactive: features and queues are being negotiated; the carrier side yields nothing.
//! - Active: the queues were taken over by value, so nothing that the bus does later can change them.
//! - Halted: the VM is paused. The session goes on, its streams are held; the queues are the bus's again, and `go_on` takes
//!   them where `halt` left them. Whether it is the same driver the bus must know.
//! - Torn: the guest broke the rules of the transport; nothing is read from it until it resets the device.
//!
//! Queue 0 carries packets to the guest (RX), queue 1 packets from it (TX), queue 2 events. The device implements
//! [`Carrier`](crate::carrier::Carrier): it knows packets and CIDs, and no streams.
//!
//! A session begins with `activate` and ends with `reset`. The device tells its shell by itself, through a waker of
//! its own, so that the bus may call them from a vCPU's thread: no packet of a session is yielded before the shell
//! was told of it, and none of the old one afterwards.
//!
//! What it does **not** do: parse ports, keep credit, or hold a descriptor over a burst. So a queue's position says
//! everything about it, and a process that takes over resumes from the used index.

mod ahead;
pub(crate) mod aside;
mod burst;
pub(crate) mod chain;
mod error;
pub(crate) mod iovec;
mod notice;
mod packet;
pub(crate) mod ring;
mod slot;
mod state;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use adit_engine::{ResetReason, SessionChange};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;

pub(crate) use burst::drain;
pub use chain::INDIRECT_MAX;
pub use error::{ActivateError, DeviceError};
pub use packet::{GuestCid, HEADER_BYTES, HOST_CID, PAYLOAD_MAX, WireHeader};
pub use ring::QUEUE_MAX;
pub use slot::{GuestPacket, GuestSlot};
pub use state::{DeviceState, RestoreError, STATE_BYTES, StateError};

use crate::carrier::CarrierFault;
use ahead::Ahead;
use aside::Aside;
use chain::Seg;
use notice::Notice;
use ring::Ring;

/// Index of the queue towards the guest.
pub const RX_QUEUE: u16 = 0;
/// Index of the queue from the guest.
pub const TX_QUEUE: u16 = 1;
/// Index of the event queue.
pub const EVENT_QUEUE: u16 = 2;

/// VIRTIO_VSOCK_F_STREAM (virtio 1.3 §5.10.3).
pub const VSOCK_F_STREAM: u64 = 1 << 0;
const F_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const F_INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the device offers.
pub const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | VSOCK_F_STREAM;

/// Waker of a session's begin and end; 0 and 1 are the kicks.
const WAKER_SESSION: u32 = 2;
/// Waker ids below this belong to the device.
pub(crate) const WAKERS: u32 = 3;

/// Rings the guest's driver: an interrupt, or a call descriptor.
pub trait Signal: Send + Sync {
    /// Tells the driver that `queue` has used buffers.
    fn signal(&self, queue: u16);

    /// Whether one interrupt serves all queues. Such a driver looks at each of them whenever it is interrupted, so that of
    /// the packets it sent it need not be told each time: it hears of many at once (`notice`).
    fn is_shared(&self) -> bool {
        false
    }
}

/// A queue that the bus has configured.
#[derive(Debug)]
pub struct VirtQueue {
    /// Addresses, size and position.
    pub queue: Queue,
    /// Nonblocking eventfd that becomes readable when the driver kicks; `None` = the caller polls.
    pub kick: Option<OwnedFd>,
}

impl From<Queue> for VirtQueue {
    fn from(queue: Queue) -> Self {
        Self { queue, kick: None }
    }
}

/// The queues of a device.
#[derive(Debug)]
pub struct VirtQueues {
    /// Queue 0, to the guest.
    pub rx: VirtQueue,
    /// Queue 1, from the guest.
    pub tx: VirtQueue,
    /// Queue 2; vhost-user frontends keep it to themselves.
    pub event: Option<Queue>,
}

/// What happened on a device since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Packets taken from the guest and handed on.
    pub packets_from_guest: u64,
    /// Packets written to the guest.
    pub packets_to_guest: u64,
    /// Payload bytes copied from or to guest memory, by us or by the kernel.
    pub bytes_copied: u64,
    /// Packets dropped because they named a CID that is not this device's guest or not the host.
    pub dropped_cid: u64,
    /// Chains given back unused because they broke a rule.
    pub malformed_chains: u64,
    /// Of those, packets with more payload than [`PAYLOAD_MAX`].
    pub oversized_packets: u64,
    /// Times the driver was notified.
    pub signals: u64,
    /// Writes to the read-only configuration space.
    pub ignored_config_writes: u64,
    /// Times the session was torn down because the guest broke the transport.
    pub faults: u64,
}

struct Active<M> {
    mem: M,
    rx: Ring,
    tx: Ring,
    /// Nothing is sent on it before there is a transport reset to tell of.
    event: Option<Ring>,
    kicks: [Option<OwnedFd>; 2],
    signal: Arc<dyn Signal>,
    torn: bool,
}

/// A virtio-vsock device.
pub struct VsockDevice<M: GuestAddressSpace> {
    guest_cid: GuestCid,
    acked: u64,
    active: Option<Active<M>>,
    /// The session goes on without queues.
    halted: bool,
    /// The memory of the running burst.
    snapshot: Option<M::T>,
    /// The chain in hand; empty between calls, kept for its allocation.
    segs: Vec<Seg>,
    /// Packets of the running burst whose payload goes out together.
    aside: Aside,
    ahead: Ahead,
    notice: Notice,
    fault: Option<CarrierFault>,
    counters: Counters,
    /// Epoch of the next session.
    epoch: u64,
    /// What the shell was not told yet; a later change makes an earlier one void.
    change: Option<SessionChange>,
    /// Readable while there is a change to tell.
    changed: EventFd,
}

impl<M: GuestAddressSpace> VsockDevice<M> {
    /// Makes the device of the guest `guest_cid`. Sessions are counted from `first_epoch` on.
    ///
    /// # Errors
    /// There is no descriptor to be had.
    pub fn new(guest_cid: GuestCid, first_epoch: u64) -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            epoch: first_epoch,
            change: None,
            changed: EventFd::from_flags(flags)?,
            guest_cid,
            acked: 0,
            active: None,
            halted: false,
            snapshot: None,
            segs: Vec::new(),
            aside: Aside::default(),
            ahead: Ahead::default(),
            notice: Notice::default(),
            fault: None,
            counters: Counters::default(),
        })
    }

    /// Returns the CID that the device tells its guest.
    pub fn guest_cid(&self) -> GuestCid {
        self.guest_cid
    }

    /// Returns the features on offer.
    pub fn features(&self) -> u64 {
        FEATURES
    }

    /// Takes the features that the driver chose.
    ///
    /// # Errors
    /// A bit was not offered, or a session is on: nothing changes.
    pub fn ack_features(&mut self, acked: u64) -> Result<(), DeviceError> {
        if self.active.is_some() || self.halted && acked != self.acked {
            return Err(DeviceError::Active);
        }
        let unknown = acked & !FEATURES;
        if unknown != 0 {
            return Err(DeviceError::FeatureNotOffered { acked, unknown });
        }
        self.acked = acked;
        Ok(())
    }

    /// Reads the configuration space (guest_cid, 8 bytes); what lies behind it reads as zero.
    pub fn read_config(&self, offset: u64, dst: &mut [u8]) {
        let config = self.guest_cid.get().to_le_bytes();
        dst.fill(0);
        let Some(src) = usize::try_from(offset).ok().and_then(|o| config.get(o..)) else {
            return;
        };
        let n = src.len().min(dst.len());
        dst[..n].copy_from_slice(&src[..n]);
    }

    /// Ignores and counts a write: the configuration space is read-only.
    pub fn write_config(&mut self, _offset: u64, _src: &[u8]) {
        self.counters.ignored_config_writes += 1;
    }

    /// Takes over the queues and goes live.
    ///
    /// # Errors
    /// The device is active, or a queue cannot be used: nothing changes.
    pub fn activate(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<(), ActivateError> {
        let epoch = self.begin_session(mem, queues, signal)?;
        self.tell(SessionChange::Attached { epoch });
        Ok(())
    }

    /// As [`activate`](Self::activate), for a driver that still has streams of a session before.
    ///
    /// # Errors
    /// As [`activate`](Self::activate).
    pub fn activate_continued(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<(), ActivateError> {
        let epoch = self.begin_session(mem, queues, signal)?;
        self.tell(SessionChange::Continued { epoch });
        Ok(())
    }

    /// Stops the queues of a session that may go on: nothing is completed any more, and the shell is told nothing. Returns
    /// where they stood; `None` if there is no session that could go on.
    pub fn halt(&mut self) -> Option<Stopped> {
        if self.change.is_some() {
            // The shell has not heard of it yet.
            return None;
        }
        let active = self.active.take_if(|a| !a.torn)?;
        self.snapshot = None;
        self.segs.clear();
        self.aside.release();
        self.fault = None;
        self.halted = true;
        Some(Stopped {
            bases: [active.rx.base(), active.tx.base()],
            kicks: active.kicks,
        })
    }

    /// Goes on with the session that `halt` left, on the queues of the same driver.
    ///
    /// # Errors
    /// The device is not halted, or a queue cannot be used: it stays halted.
    pub fn go_on(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<(), ActivateError> {
        if !self.halted {
            return Err(ActivateError::Active);
        }
        self.go_live(mem, queues, signal)?;
        self.halted = false;
        Ok(())
    }

    /// Returns the number of the session; the caller says what kind it is.
    fn begin_session(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<u64, ActivateError> {
        self.go_live(mem, queues, signal)?;
        self.halted = false;
        let epoch = self.epoch;
        self.epoch += 1;
        Ok(epoch)
    }

    fn go_live(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<(), ActivateError> {
        if self.active.is_some() {
            return Err(ActivateError::Active);
        }
        if self.acked & F_VERSION_1 == 0 {
            return Err(ActivateError::Legacy { acked: self.acked });
        }
        let event_idx = self.acked & F_EVENT_IDX != 0;
        let indirect = self.acked & F_INDIRECT != 0;
        let snapshot = mem.memory();
        let ring = |index, queue| Ring::new(index, queue, &*snapshot, event_idx, indirect);
        let rx = ring(RX_QUEUE, &queues.rx.queue)?;
        let tx = ring(TX_QUEUE, &queues.tx.queue)?;
        let event = queues
            .event
            .as_ref()
            .map(|q| ring(EVENT_QUEUE, q))
            .transpose()?;
        drop(snapshot);
        self.segs.reserve(usize::from(rx.size().max(tx.size())));
        self.fault = None;
        self.notice = Notice::default();
        self.active = Some(Active {
            mem,
            rx,
            tx,
            event,
            kicks: [queues.rx.kick, queues.tx.kick],
            signal,
            torn: false,
        });
        Ok(())
    }

    fn tell(&mut self, change: SessionChange) {
        self.change = Some(change);
        // Fails only when 2^64 - 2 changes are pending: it is readable.
        let _ = self.changed.write(1);
    }

    /// Takes the change of session that the shell was not told yet; what `woken` does for the waker of the device.
    pub fn take_session_change(&mut self) -> Option<SessionChange> {
        self.change.take()
    }

    /// Tells whether the device is active (torn or not; not halted).
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// Replaces guest memory between bursts (hot-plug).
    ///
    /// # Errors
    /// A queue does not lie in the new memory: the device keeps the old.
    pub fn set_memory(&mut self, mem: M) -> Result<(), ActivateError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let snapshot = mem.memory();
        for (queue, ring) in [(RX_QUEUE, &active.rx), (TX_QUEUE, &active.tx)] {
            if !ring.lies_in(&*snapshot) {
                return Err(ring.not_in_memory(queue));
            }
        }
        drop(snapshot);
        self.snapshot = None;
        active.mem = mem;
        Ok(())
    }

    /// Replaces how the driver is notified.
    pub fn set_signal(&mut self, signal: Arc<dyn Signal>) {
        if let Some(active) = &mut self.active {
            active.signal = signal;
        }
    }

    /// Replaces the kick descriptor of queue 0 or 1. Returns the old one, for whoever has it in an epoll set.
    pub fn set_kick(&mut self, queue: u16, kick: Option<OwnedFd>) -> Option<OwnedFd> {
        let slot = self.active.as_mut()?.kicks.get_mut(usize::from(queue))?;
        std::mem::replace(slot, kick)
    }

    /// Goes back to the state before negotiation; returns where the two queues stood. Nothing is completed any more.
    /// The session's streams end for `reason`: [`ResetReason::Epoch`] where the guest's driver reset the device.
    pub fn reset(&mut self, reason: ResetReason) -> Stopped {
        self.snapshot = None;
        self.segs.clear();
        self.aside.release();
        self.fault = None;
        self.acked = 0;
        match self.active.take() {
            None => {
                if std::mem::take(&mut self.halted) {
                    self.tell(SessionChange::Lost(reason));
                }
                Stopped::default()
            }
            Some(active) => {
                if !active.torn {
                    self.tell(SessionChange::Lost(reason));
                }
                Stopped {
                    bases: [active.rx.base(), active.tx.base()],
                    kicks: active.kicks,
                }
            }
        }
    }

    /// Returns the counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Shows the driver what was used, and tells it. Of what it sent it may hear [later](notice).
    fn publish(&mut self) {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return;
        };
        for ring in [&mut active.rx, &mut active.tx] {
            match ring.publish(&**mem) {
                Ok(false) => {}
                Ok(true) => self.notice.moved(),
                Err(fault) => {
                    self.fault.get_or_insert(fault);
                }
            }
        }
        let due = !active.signal.is_shared() || self.notice.is_much(active.tx.size());
        self.tell_driver(RX_QUEUE);
        if due {
            self.tell_driver(TX_QUEUE);
        }
    }

    /// Notifies the driver of what it was shown on a queue, if it asked for it.
    fn tell_driver(&mut self, queue: u16) {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return;
        };
        let ring = match queue {
            RX_QUEUE => &mut active.rx,
            _ => {
                self.notice.told();
                &mut active.tx
            }
        };
        match ring.must_tell(&**mem) {
            Ok(false) => {}
            Ok(true) => {
                self.counters.signals += 1;
                active.signal.signal(queue);
            }
            Err(fault) => {
                self.fault.get_or_insert(fault);
            }
        }
    }
}

/// What was in a device that was reset.
#[derive(Debug, Default)]
pub struct Stopped {
    /// Positions in the available rings of queues 0 and 1.
    pub bases: [u16; 2],
    /// The kick descriptors, for whoever has them in an epoll set.
    pub kicks: [Option<OwnedFd>; 2],
}
