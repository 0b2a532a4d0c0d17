//! The virtio-vsock device (virtio 1.3 §5.10), without a bus. A VMM puts it behind its own MMIO or PCI transport, or
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
//! - Inactive: features and queues are being negotiated. The carrier returns no packets and no slots.
//! - Active: the device owns the queues by value, so the bus cannot change them any more.
//! - Halted: the VM is paused. The session and its streams are kept. The bus has the queues again, and `go_on`
//!   continues at the positions where `halt` stopped. The bus must know whether the driver is still the same.
//! - Torn: the guest broke the rules of the transport. Nothing is read from it until it resets the device.
//!
//! Queue 0 carries packets to the guest (RX), queue 1 packets from it (TX), queue 2 events. The device implements
//! [`Carrier`](crate::carrier::Carrier): it knows packets and CIDs, but no streams.
//!
//! A session begins with `activate` and ends with `reset`. The device informs its shell through a waker of its own, so
//! the bus may call both from a vCPU's thread. The shell gets no packet of a new session before it was informed of
//! that session, and no packet of the old one afterwards.
//!
//! The device does **not** parse ports, keep credit, or hold a descriptor beyond a burst. So the position of a queue
//! is its whole state, and a successor process continues at the used index.

mod ahead;
pub(crate) mod aside;
mod burst;
pub(crate) mod chain;
mod error;
pub(crate) mod iovec;
mod notice;
mod packet;
mod prefetch;
mod queue_config;
pub mod raw;
mod slot;
mod state;
pub(crate) mod virtqueue;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use adit_engine::{ResetReason, SessionChange};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;

pub(crate) use burst::drain;
pub use chain::INDIRECT_MAX;
pub use error::{ActivateError, DeviceError};
pub use packet::{GuestCid, HEADER_BYTES, HOST_CID, PAYLOAD_MAX, WireHeader};
pub use queue_config::QueueConfig;
pub use slot::{GuestPacket, GuestSlot};
pub use state::{DeviceState, RestoreError, STATE_BYTES, StateError};
pub use virtqueue::QUEUE_MAX;

use crate::carrier::CarrierFault;
use ahead::Ahead;
use aside::Aside;
use chain::Seg;
use notice::Notice;
use virtqueue::Virtqueue;

/// Index of the queue towards the guest (RX).
pub const RX_QUEUE: u16 = 0;
/// Index of the queue from the guest (TX).
pub const TX_QUEUE: u16 = 1;
/// Index of the event queue.
pub const EVENT_QUEUE: u16 = 2;

/// VIRTIO_VSOCK_F_STREAM (virtio 1.3 §5.10.3).
pub const VSOCK_F_STREAM: u64 = 1 << 0;
const F_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const F_INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Features that the device offers.
pub const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | VSOCK_F_STREAM;

/// Waker id for the begin and end of a session. Ids 0 and 1 are the kicks.
const WAKER_SESSION: u32 = 2;
/// Waker ids below this belong to the device.
pub(crate) const WAKERS: u32 = 3;

/// Notifies the guest's driver: an interrupt, or a call descriptor.
pub trait Signal: Send + Sync {
    /// Notifies the driver that `queue` has used buffers.
    fn signal(&self, queue: u16);

    /// Returns true if one interrupt serves all queues. Such a driver checks all queues after each interrupt. So the
    /// device does not notify it of each sent packet, but of many at once (`notice`).
    fn is_shared(&self) -> bool {
        false
    }
}

/// A queue that the bus has configured, and its kick.
#[derive(Debug)]
pub struct VirtQueue {
    /// Addresses, size and position of the queue.
    pub queue: QueueConfig,
    /// Nonblocking eventfd that becomes readable when the driver kicks; `None` if the caller polls.
    pub kick: Option<OwnedFd>,
}

impl<Q: Into<QueueConfig>> From<Q> for VirtQueue {
    fn from(queue: Q) -> Self {
        let queue = queue.into();
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
    /// Queue 2. vhost-user frontends handle it themselves.
    pub event: Option<QueueConfig>,
}

/// What happened on a device since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Packets that were taken from the guest and passed on.
    pub packets_from_guest: u64,
    /// Packets written to the guest.
    pub packets_to_guest: u64,
    /// Payload bytes that this process or the kernel copied from or to guest memory.
    pub bytes_copied: u64,
    /// Packets that were dropped because a CID is neither this device's guest nor the host.
    pub dropped_cid: u64,
    /// Chains that were returned unused because they broke a rule.
    pub malformed_chains: u64,
    /// Among those, packets with more payload than [`PAYLOAD_MAX`].
    pub oversized_packets: u64,
    /// How often the driver was notified.
    pub signals: u64,
    /// Writes to the read-only configuration space.
    pub ignored_config_writes: u64,
    /// How often the session was torn down because the guest broke the transport.
    pub faults: u64,
}

struct Active<M> {
    mem: M,
    rx: Virtqueue,
    tx: Virtqueue,
    /// Only used to send a transport reset.
    event: Option<Virtqueue>,
    kicks: [Option<OwnedFd>; 2],
    signal: Arc<dyn Signal>,
    torn: bool,
}

/// A virtio-vsock device.
pub struct VsockDevice<M: GuestAddressSpace> {
    guest_cid: GuestCid,
    acked: u64,
    active: Option<Active<M>>,
    /// The session is kept without queues.
    halted: bool,
    /// The guest memory of the current burst.
    snapshot: Option<M::T>,
    /// The current chain. Empty between calls, and kept for its allocation.
    segs: Vec<Seg>,
    /// Packets of the current burst whose payload is written together.
    aside: Aside,
    ahead: Ahead,
    notice: Notice,
    fault: Option<CarrierFault>,
    counters: Counters,
    /// Epoch of the next session.
    epoch: u64,
    /// The session change that the shell has not taken yet. A later change replaces an earlier one.
    change: Option<SessionChange>,
    /// Readable while there is a session change.
    changed: EventFd,
}

impl<M: GuestAddressSpace> VsockDevice<M> {
    /// Makes the device of the guest `guest_cid`. The first session has the epoch `first_epoch`.
    ///
    /// # Errors
    /// This process has no free descriptors.
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

    /// Returns the CID that the guest reads from the device.
    pub fn guest_cid(&self) -> GuestCid {
        self.guest_cid
    }

    /// Returns the features that the device offers.
    pub fn features(&self) -> u64 {
        FEATURES
    }

    /// Sets the features that the driver chose.
    ///
    /// # Errors
    /// A bit was not offered, or a session is active. Nothing changes.
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

    /// Reads the configuration space (guest_cid, 8 bytes). Bytes after it read as zero.
    pub fn read_config(&self, offset: u64, dst: &mut [u8]) {
        self.guest_cid.read_config(offset, dst);
    }

    /// Ignores and counts a write: the configuration space is read-only.
    pub fn write_config(&mut self, _offset: u64, _src: &[u8]) {
        self.counters.ignored_config_writes += 1;
    }

    /// Takes the queues over and becomes active.
    ///
    /// # Errors
    /// The device is active, or a queue cannot be used. Nothing changes.
    pub fn activate(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<(), ActivateError> {
        let epoch = self.begin_session(mem, queues, signal)?;
        self.set_change(SessionChange::Attached { epoch });
        Ok(())
    }

    /// As [`activate`](Self::activate), for a driver that still has streams of an earlier session.
    pub fn activate_continued(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<(), ActivateError> {
        let epoch = self.begin_session(mem, queues, signal)?;
        self.set_change(SessionChange::Continued { epoch });
        Ok(())
    }

    /// Stops the queues, and keeps the session so that it can continue. No buffer is completed after this call. The
    /// shell gets no session change. Returns the positions of the queues, or `None` if no session can continue.
    pub fn halt(&mut self) -> Option<Stopped> {
        if self.change.is_some() {
            // The shell has not been informed of this session yet.
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

    /// Continues the session that `halt` stopped, on the queues of the same driver.
    ///
    /// # Errors
    /// The device is not halted, or a queue cannot be used. In the second case it stays halted.
    pub fn go_on(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<(), ActivateError> {
        if !self.halted {
            return Err(ActivateError::Active);
        }
        self.take_over_queues(mem, queues, signal)?;
        self.halted = false;
        Ok(())
    }

    /// Becomes active and returns the number of the session. The caller sends the matching `SessionChange`.
    fn begin_session(
        &mut self,
        mem: M,
        queues: VirtQueues,
        signal: Arc<dyn Signal>,
    ) -> Result<u64, ActivateError> {
        self.take_over_queues(mem, queues, signal)?;
        self.halted = false;
        let epoch = self.epoch;
        self.epoch += 1;
        Ok(epoch)
    }

    fn take_over_queues(
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
        let make = |index, queue| Virtqueue::new(index, queue, &*snapshot, event_idx, indirect);
        let rx = make(RX_QUEUE, &queues.rx.queue)?;
        let tx = make(TX_QUEUE, &queues.tx.queue)?;
        let event = queues
            .event
            .as_ref()
            .map(|q| make(EVENT_QUEUE, q))
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

    fn set_change(&mut self, change: SessionChange) {
        self.change = Some(change);
        // The write fails only when the counter is full, and then the eventfd is readable anyway.
        let _ = self.changed.write(1);
    }

    /// Takes the session change that the shell has not handled yet. `woken` does the same for the waker of the device.
    pub fn take_session_change(&mut self) -> Option<SessionChange> {
        self.change.take()
    }

    /// Returns true if the device is active (torn or not), but not if it is halted.
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// Replaces guest memory between bursts (hot-plug). When this returns, the device has no reference to the old
    /// memory. An inactive device has none either, and takes the new one when it becomes active.
    ///
    /// # Errors
    /// A queue is not in the new memory. The device keeps the old memory.
    pub fn set_memory(&mut self, mem: M) -> Result<(), ActivateError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let snapshot = mem.memory();
        let data = [(RX_QUEUE, &active.rx), (TX_QUEUE, &active.tx)];
        let event = active.event.as_ref().map(|vq| (EVENT_QUEUE, vq));
        for (index, vq) in data.into_iter().chain(event) {
            let queue = vq.config();
            if !queue.lies_in(&*snapshot) {
                return Err(queue.not_in_memory(index));
            }
        }
        drop(snapshot);
        self.snapshot = None;
        active.mem = mem;
        Ok(())
    }

    /// Replaces the way in which the driver is notified.
    pub fn set_signal(&mut self, signal: Arc<dyn Signal>) {
        if let Some(active) = &mut self.active {
            active.signal = signal;
        }
    }

    /// Replaces the kick descriptor of queue 0 or 1. Returns the old one, so that the caller can remove it from its
    /// epoll set.
    pub fn set_kick(&mut self, queue: u16, kick: Option<OwnedFd>) -> Option<OwnedFd> {
        let slot = self.active.as_mut()?.kicks.get_mut(usize::from(queue))?;
        std::mem::replace(slot, kick)
    }

    /// Returns to the state before negotiation. Returns the positions of the two queues. No buffer is completed after
    /// this call. The session's streams end with `reason`: [`ResetReason::Epoch`] if the guest's driver reset the
    /// device.
    pub fn reset(&mut self, reason: ResetReason) -> Stopped {
        self.snapshot = None;
        self.segs.clear();
        self.aside.release();
        self.fault = None;
        self.acked = 0;
        match self.active.take() {
            None => {
                if std::mem::take(&mut self.halted) {
                    self.set_change(SessionChange::Lost(reason));
                }
                Stopped::default()
            }
            Some(active) => {
                if !active.torn {
                    self.set_change(SessionChange::Lost(reason));
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

    /// Publishes the used buffers to the driver and notifies it. For TX buffers the notification may come
    /// [later](notice).
    fn publish(&mut self) {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return;
        };
        for vq in [&mut active.rx, &mut active.tx] {
            match vq.publish(&**mem) {
                Ok(false) => {}
                Ok(true) => self.notice.moved(),
                Err(fault) => {
                    self.fault.get_or_insert(fault);
                }
            }
        }
        let due = !active.signal.is_shared() || self.notice.is_much(active.tx.size());
        self.notify_driver(RX_QUEUE);
        if due {
            self.notify_driver(TX_QUEUE);
        }
    }

    /// Notifies the driver of the buffers that were published on a queue, if the driver asked for it.
    fn notify_driver(&mut self, queue: u16) {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return;
        };
        let vq = match queue {
            RX_QUEUE => &mut active.rx,
            _ => {
                self.notice.notified();
                &mut active.tx
            }
        };
        match vq.must_notify(&**mem) {
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

/// What remains of a device that was stopped or reset.
#[derive(Debug, Default)]
pub struct Stopped {
    /// Positions in the available rings of queues 0 and 1.
    pub bases: [u16; 2],
    /// The kick descriptors, so that the caller can remove them from its epoll set.
    pub kicks: [Option<OwnedFd>; 2],
}
