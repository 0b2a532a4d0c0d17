//! The virtio-vsock device (virtio 1.3 §5.10), bus-neutral: a VMM puts it behind its own MMIO or PCI transport, or
//! `vhost_user` puts it behind a socket.
//!
//! ```text
//! Inactive ── activate ──► Active ── tear (fault of the guest) ──► Torn
//!     ▲                      │                                       │
//!     └───────── reset ──────┴───────────────── reset ───────────────┘
//! ```
//!
//! - Inactive: features and queues are being negotiated; the carrier side yields nothing.
//! - Active: the queues were taken over by value, so nothing that the bus does later can change them.
//! - Torn: the guest broke the rules of the transport; nothing is read from it until it resets the device.
//!
//! Queue 0 carries packets to the guest (RX), queue 1 packets from it (TX), queue 2 events. The device implements
//! [`Carrier`]: it knows packets and CIDs, and no streams.
//!
//! A session begins with `activate` and ends with `reset`. The device tells its shell by itself, through a waker of
//! its own, so that the bus may call them from a vCPU's thread: no packet of a session is yielded before the shell
//! was told of it, and none of the old one afterwards.
//!
//! What it does **not** do: parse ports, keep credit, or hold a descriptor over a burst. So a queue's position says
//! everything about it, and a process that takes over resumes from the used index.

mod aside;
pub(crate) mod chain;
mod iovec;
mod packet;
pub(crate) mod ring;
mod slot;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use adit_engine::{Lane, ResetReason, SessionChange};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::{GuestAddressSpace, GuestMemory, Permissions};

pub use chain::INDIRECT_MAX;
pub use packet::{GuestCid, HEADER_BYTES, HOST_CID, PAYLOAD_MAX, WireHeader};
pub use ring::QUEUE_MAX;
pub use slot::{GuestPacket, GuestSlot};

use crate::carrier::{Armed, Carrier, CarrierCaps, CarrierFault, Interest, Woken};
use aside::Aside;
use chain::{Cursor, Malformed, Seg};
use ring::Ring;
use slot::Lent;

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
#[cfg(feature = "vhost-user")]
pub(crate) const WAKERS: u32 = 3;

/// Truesize that newer Linux guests charge for a queued packet, bytes (`SKB_TRUESIZE(0)`).
const PACKET_OVERHEAD: u32 = 576;

/// Largest chain of the TX queue, bytes.
const TX_CHAIN_MAX: u64 = HEADER_BYTES as u64 + PAYLOAD_MAX as u64;
/// Largest chain of the RX queue, bytes (virtio 1.3 §2.7.5.2).
const RX_CHAIN_MAX: u64 = u32::MAX as u64;

/// Rings the guest's driver: an interrupt, or a call descriptor.
pub trait Signal: Send + Sync {
    /// Tells the driver that `queue` has used buffers.
    fn signal(&self, queue: u16);
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

/// Feature negotiation failed: the driver's or the bus's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The driver acknowledged what was not offered.
    #[error("features {acked:#x} contain {unknown:#x}, which was not offered")]
    FeatureNotOffered {
        /// What the driver acknowledged.
        acked: u64,
        /// The bits that were not offered.
        unknown: u64,
    },
    /// Features are fixed while the device is active.
    #[error("features cannot change while the device is active")]
    Active,
}

/// The queues cannot be used: the driver's or the bus's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// The device is active already; it must be reset first.
    #[error("device is active already")]
    Active,
    /// The driver is a legacy one.
    #[error("driver did not acknowledge VIRTIO_F_VERSION_1 (features {acked:#x})")]
    Legacy {
        /// What the driver acknowledged.
        acked: u64,
    },
    /// A queue's size is not a power of two, or too large.
    #[error("queue {queue}: size {size} is not a power of two in 1..={max}")]
    QueueSize {
        /// Index of the queue.
        queue: u16,
        /// The size the driver chose.
        size: u16,
        /// The largest size.
        max: u16,
    },
    /// A queue is not ready, or does not lie in guest memory.
    #[error(
        "queue {queue}: not ready or not in guest memory (descriptors {desc:#x}, available {avail:#x}, used {used:#x})"
    )]
    QueueAddress {
        /// Index of the queue.
        queue: u16,
        /// Guest address of the descriptor table.
        desc: u64,
        /// Guest address of the available ring.
        avail: u64,
        /// Guest address of the used ring.
        used: u64,
    },
}

struct Active<M> {
    mem: M,
    rx: Ring,
    tx: Ring,
    /// Checked and kept; nothing is sent on it before there is a transport reset to tell of.
    _event: Option<Ring>,
    kicks: [Option<OwnedFd>; 2],
    signal: Arc<dyn Signal>,
    torn: bool,
}

/// A virtio-vsock device.
pub struct VsockDevice<M: GuestAddressSpace> {
    guest_cid: GuestCid,
    acked: u64,
    active: Option<Active<M>>,
    /// The memory of the running burst.
    snapshot: Option<M::T>,
    /// The chain in hand; empty between calls, kept for its allocation.
    segs: Vec<Seg>,
    /// Packets of the running burst whose payload goes out together.
    aside: Aside,
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
            snapshot: None,
            segs: Vec::new(),
            aside: Aside::default(),
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
    /// A bit was not offered, or the device is active: nothing changes.
    pub fn ack_features(&mut self, acked: u64) -> Result<(), DeviceError> {
        if self.active.is_some() {
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
        self.active = Some(Active {
            mem,
            rx,
            tx,
            _event: event,
            kicks: [queues.rx.kick, queues.tx.kick],
            signal,
            torn: false,
        });
        let epoch = self.epoch;
        self.epoch += 1;
        self.tell(SessionChange::Attached { epoch });
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

    /// Tells whether the device is active (torn or not).
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
            None => Stopped::default(),
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

    /// Returns queue `index` to the driver's notice: publishes, and signals if it asked for it.
    fn publish(&mut self) {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return;
        };
        for (queue, ring) in [(RX_QUEUE, &mut active.rx), (TX_QUEUE, &mut active.tx)] {
            match ring.publish(&**mem) {
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
}

/// What was in a device that was reset.
#[derive(Debug, Default)]
pub struct Stopped {
    /// Positions in the available rings of queues 0 and 1.
    pub bases: [u16; 2],
    /// The kick descriptors, for whoever has them in an epoll set.
    pub kicks: [Option<OwnedFd>; 2],
}

/// Next head, but no more in one call than a queue holds: a guest that posts broken chains as fast as they are given
/// back must not keep a shard from its other work. The rest is found by `arm`.
fn next_head<M: GuestMemory>(
    mem: &M,
    ring: &mut Ring,
    chains_left: &mut u16,
) -> Result<Option<u16>, CarrierFault> {
    let Some(left) = chains_left.checked_sub(1) else {
        return Ok(None);
    };
    *chains_left = left;
    ring.peek(mem)
}

/// Gives a chain back that broke a rule.
fn refuse<M: GuestMemory>(
    mem: &M,
    ring: &mut Ring,
    counters: &mut Counters,
    head: u16,
    why: Malformed,
) -> Result<(), CarrierFault> {
    counters.refused(&why, head);
    ring.advance();
    ring.push_used(mem, head, 0)
}

/// Gives back a chain from the guest, behind those that are held back.
fn give_back<M: GuestMemory>(
    mem: &M,
    ring: &mut Ring,
    aside: &mut Aside,
    head: u16,
) -> Result<(), CarrierFault> {
    match aside.hold_back(head) {
        true => Ok(()),
        false => ring.push_used(mem, head, 0),
    }
}

impl Counters {
    fn refused(&mut self, why: &Malformed, head: u16) {
        tracing::debug!(head, %why, "chain refused");
        self.malformed_chains += 1;
        if matches!(why, Malformed::TooLarge { .. }) {
            self.oversized_packets += 1;
        }
    }
}

impl<M: GuestAddressSpace> Carrier for VsockDevice<M> {
    type Rx<'a>
        = GuestPacket<'a, M::M>
    where
        Self: 'a;
    type Tx<'a>
        = GuestSlot<'a, M::M>
    where
        Self: 'a;

    fn caps(&self) -> CarrierCaps {
        CarrierCaps {
            max_payload: PAYLOAD_MAX,
            packet_overhead: PACKET_OVERHEAD,
        }
    }

    fn begin(&mut self) {
        if self.change.is_some() {
            // The streams that the shell knows are another session's.
            return;
        }
        let Some(active) = self.active.as_mut().filter(|a| !a.torn) else {
            return;
        };
        // Left from a burst that ended in a fault.
        self.aside.release();
        let mem = self.snapshot.insert(active.mem.memory());
        for ring in [&mut active.rx, &mut active.tx] {
            if let Err(fault) = ring.disable_notify(&**mem) {
                self.fault.get_or_insert(fault);
            }
        }
    }

    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault> {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return Ok(None);
        };
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let (mem, ring): (&M::M, _) = (mem, &mut active.tx);
        let mut chains_left = ring.size();
        let (head, header, cursor, remaining) = loop {
            let Some(head) = next_head(mem, ring, &mut chains_left)? else {
                return Ok(None);
            };
            let read = Permissions::Read;
            let total = match chain::walk(mem, ring, head, read, TX_CHAIN_MAX, &mut self.segs) {
                Ok(total) if total >= HEADER_BYTES as u64 => total,
                Ok(len) => {
                    let why = Malformed::TooSmall { len };
                    self.counters.refused(&why, head);
                    ring.advance();
                    give_back(mem, ring, &mut self.aside, head)?;
                    continue;
                }
                Err(why) => {
                    self.counters.refused(&why, head);
                    ring.advance();
                    give_back(mem, ring, &mut self.aside, head)?;
                    continue;
                }
            };
            ring.advance();
            let (mut bytes, mut cursor) = ([0; HEADER_BYTES], Cursor::default());
            if let Err(e) = cursor.copy_out(mem, &self.segs, &mut bytes) {
                tracing::debug!(error = %e, "header is not accessible");
                return Err(CarrierFault {
                    what: "packet header is not accessible any more",
                    value: u64::from(head),
                    limit: 0,
                });
            }
            let wire = WireHeader::from_bytes(&bytes);
            if wire.src_cid() != self.guest_cid.get() || wire.dst_cid() != HOST_CID {
                self.counters.dropped_cid += 1;
                give_back(mem, ring, &mut self.aside, head)?;
                continue;
            }
            // At most PAYLOAD_MAX.
            let remaining = (total - HEADER_BYTES as u64) as u32;
            break (head, wire.header(), cursor, remaining);
        };
        self.counters.packets_from_guest += 1;
        let lent = Lent {
            mem,
            ring,
            segs: &self.segs,
            counters: &mut self.counters,
            aside: &mut self.aside,
            fault: &mut self.fault,
        };
        Ok(Some(GuestPacket::new(
            lent, head, header, cursor, remaining,
        )))
    }

    fn tx(&mut self, _lane: Lane, _want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault> {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return Ok(None);
        };
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let (mem, ring): (&M::M, _) = (mem, &mut active.rx);
        let mut chains_left = ring.size();
        let (head, total) = loop {
            let Some(head) = next_head(mem, ring, &mut chains_left)? else {
                return Ok(None);
            };
            let write = Permissions::Write;
            match chain::walk(mem, ring, head, write, RX_CHAIN_MAX, &mut self.segs) {
                Ok(total) if total >= HEADER_BYTES as u64 => break (head, total),
                Ok(len) => {
                    let why = Malformed::TooSmall { len };
                    refuse(mem, ring, &mut self.counters, head, why)?;
                }
                Err(why) => refuse(mem, ring, &mut self.counters, head, why)?,
            }
        };
        let capacity = (total - HEADER_BYTES as u64).min(u64::from(PAYLOAD_MAX)) as u32;
        let lent = Lent {
            mem,
            ring,
            segs: &self.segs,
            counters: &mut self.counters,
            aside: &mut self.aside,
            fault: &mut self.fault,
        };
        Ok(Some(GuestSlot::new(lent, head, self.guest_cid, capacity)))
    }

    fn write_aside(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let Some(mem) = &self.snapshot else {
            return Ok(0);
        };
        let Aside { segs, cursor, .. } = &mut self.aside;
        let n = iovec::write_to(&**mem, segs, cursor, fd, usize::MAX)?;
        self.counters.bytes_copied += n as u64;
        Ok(n)
    }

    fn read_aside(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        let Some(mem) = &self.snapshot else {
            return Ok(0);
        };
        let Aside { segs, cursor, .. } = &mut self.aside;
        let n = cursor
            .copy_out(&**mem, segs, dst)
            .map_err(|e| slot::payload_fault(&e))?;
        self.counters.bytes_copied += n as u64;
        Ok(n)
    }

    fn release_aside(&mut self) {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return;
        };
        for head in self.aside.release() {
            if let Err(fault) = active.tx.push_used(&**mem, head, 0) {
                self.fault.get_or_insert(fault);
            }
        }
    }

    fn flush(&mut self) {
        self.publish();
    }

    fn arm(&mut self, interest: Interest) -> Armed {
        self.publish();
        // A change that was not told wakes by itself, and the burst after it looks at the rings.
        let untold = self.change.is_some();
        let Some(active) = self.active.as_mut().filter(|a| !a.torn && !untold) else {
            self.snapshot = None;
            return Armed::Sleep;
        };
        let mem = match &self.snapshot {
            Some(mem) => mem.clone(),
            None => active.mem.memory(),
        };
        let mut more = self.fault.is_some();
        for (wanted, ring) in [(interest.rx, &mut active.tx), (interest.tx, &mut active.rx)] {
            let result = if wanted {
                ring.enable_notify(&*mem)
            } else {
                ring.disable_notify(&*mem).map(|()| false)
            };
            match result {
                Ok(work) => more |= work,
                Err(fault) => {
                    // Told to the caller by the next `rx`.
                    self.fault.get_or_insert(fault);
                    more = true;
                }
            }
        }
        // A sleeping device keeps no mapping alive.
        self.snapshot = None;
        if more {
            Armed::WorkAppeared
        } else {
            Armed::Sleep
        }
    }

    fn tear(&mut self) {
        self.snapshot = None;
        self.fault = None;
        if let Some(active) = self.active.as_mut().filter(|a| !a.torn) {
            active.torn = true;
            self.counters.faults += 1;
        }
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.changed.as_fd(), WAKER_SESSION);
        let Some(active) = &self.active else { return };
        for (id, kick) in (0u32..).zip(&active.kicks) {
            if let Some(kick) = kick {
                visit(kick.as_fd(), id);
            }
        }
    }

    fn woken(&mut self, id: u32) -> Woken {
        if id == WAKER_SESSION {
            drain(self.changed.as_fd());
            let session = self.take_session_change();
            let wakers_changed = session.is_some();
            return Woken {
                session,
                wakers_changed,
            };
        }
        let kick = self
            .active
            .as_ref()
            .and_then(|a| a.kicks.get(id as usize))
            .and_then(Option::as_ref);
        if let Some(kick) = kick {
            drain(kick.as_fd());
        }
        Woken::default()
    }
}

/// Clears an eventfd. It is nonblocking; a second reader may have been faster.
pub(crate) fn drain(fd: BorrowedFd<'_>) {
    let mut count = [0; 8];
    loop {
        match nix::unistd::read(fd, &mut count) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::EAGAIN) | Ok(_) => return,
            Err(e) => {
                tracing::debug!(error = %io::Error::from(e), "kick descriptor cannot be read");
                return;
            }
        }
    }
}
