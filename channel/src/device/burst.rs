//! The device as a carrier: it takes packets from the guest's queue in bursts and fills the guest's buffers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use adit_engine::Lane;
use vm_memory::{GuestAddressSpace, GuestMemory, Permissions};

use super::aside::Aside;
use super::chain::{self, Cursor, Malformed};
use super::iovec;
use super::notice;
use super::packet::{HEADER_BYTES, HOST_CID, PAYLOAD_MAX, WireHeader};
use super::slot::{self, GuestPacket, GuestSlot, Parts};
use super::virtqueue::Virtqueue;
use super::{Counters, TX_QUEUE, VsockDevice, WAKER_SESSION};
use crate::carrier::{Armed, Carrier, CarrierCaps, CarrierFault, Interest, Woken};

/// Bytes that newer Linux guests charge for a queued packet (`SKB_TRUESIZE(0)`).
const PACKET_OVERHEAD: u32 = 576;
/// Largest chain of the TX queue in bytes.
const TX_CHAIN_MAX: u64 = HEADER_BYTES as u64 + PAYLOAD_MAX as u64;
/// Largest chain of the RX queue in bytes (virtio 1.3 §2.7.5.2).
const RX_CHAIN_MAX: u64 = u32::MAX as u64;

/// Returns the next head. One call examines at most one queue size of chains, because a guest may post broken chains
/// as fast as they are returned, and that must not keep the shard from its other work. `arm` finds the rest.
fn next_head<M: GuestMemory>(
    mem: &M,
    vq: &mut Virtqueue,
    chains_left: &mut u16,
) -> Result<Option<u16>, CarrierFault> {
    let Some(left) = chains_left.checked_sub(1) else {
        return Ok(None);
    };
    *chains_left = left;
    vq.peek(mem)
}

/// Returns a chain that broke a rule to the guest.
fn refuse<M: GuestMemory>(
    mem: &M,
    vq: &mut Virtqueue,
    counters: &mut Counters,
    head: u16,
    why: Malformed,
) -> Result<(), CarrierFault> {
    counters.refused(&why, head);
    vq.advance();
    vq.push_used(mem, head, 0)
}

/// Returns a chain of the TX queue to the guest, after the chains that are kept.
fn give_back<M: GuestMemory>(
    mem: &M,
    vq: &mut Virtqueue,
    aside: &mut Aside,
    head: u16,
) -> Result<(), CarrierFault> {
    match aside.hold_back(head) {
        true => Ok(()),
        false => vq.push_used(mem, head, 0),
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
            lanes: false,
            tells_reason: false,
            // With more bytes the system call does not become cheaper.
            run_bytes: 64 << 10,
        }
    }

    fn begin(&mut self) {
        if self.change.is_some() {
            // The shell has not handled a session change yet, so the streams that it knows belong to another session.
            return;
        }
        let Some(active) = self.active.as_mut().filter(|a| !a.torn) else {
            return;
        };
        // Left over from an earlier burst.
        self.ahead.clear();
        self.aside.release();
        let mem = self.snapshot.insert(active.mem.memory());
        for vq in [&mut active.rx, &mut active.tx] {
            if let Err(fault) = vq.disable_notify(&**mem) {
                self.fault.get_or_insert(fault);
            }
        }
    }

    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault> {
        let tx = self.active.as_ref().map(|a| &a.tx);
        if tx.is_some_and(|tx| tx.unpublished() >= tx.size().div_ceil(4)) {
            // Publish at once: a guest whose queue was full can continue while this burst goes on.
            self.publish();
        }
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return Ok(None);
        };
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let (mem, vq): (&M::M, _) = (mem, &mut active.tx);
        let mut chains_left = vq.size();
        let (head, header, cursor, remaining) = loop {
            let Some(head) = next_head(mem, vq, &mut chains_left)? else {
                return Ok(None);
            };
            let segs = &mut self.segs;
            let walked = match self.ahead.take(segs) {
                Some((ahead, walked)) if ahead == head => walked,
                _ => chain::walk(mem, vq, head, Permissions::Read, TX_CHAIN_MAX, segs),
            };
            vq.advance();
            self.notice.took(segs.len());
            self.ahead.prefetch(mem, vq, TX_CHAIN_MAX);
            let total = match walked {
                Ok(total) if total >= HEADER_BYTES as u64 => total,
                Ok(len) => {
                    let why = Malformed::TooSmall { len };
                    self.counters.refused(&why, head);
                    give_back(mem, vq, &mut self.aside, head)?;
                    continue;
                }
                Err(why) => {
                    self.counters.refused(&why, head);
                    give_back(mem, vq, &mut self.aside, head)?;
                    continue;
                }
            };
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
                give_back(mem, vq, &mut self.aside, head)?;
                continue;
            }
            // At most PAYLOAD_MAX.
            let remaining = (total - HEADER_BYTES as u64) as u32;
            break (head, wire.header(), cursor, remaining);
        };
        self.counters.packets_from_guest += 1;
        let parts = Parts {
            mem,
            vq,
            segs: &self.segs,
            counters: &mut self.counters,
            aside: &mut self.aside,
            fault: &mut self.fault,
        };
        Ok(Some(GuestPacket::new(
            parts, head, header, cursor, remaining,
        )))
    }

    fn tx(&mut self, _lane: Lane, _want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault> {
        let (Some(active), Some(mem)) = (&mut self.active, &self.snapshot) else {
            return Ok(None);
        };
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let (mem, vq): (&M::M, _) = (mem, &mut active.rx);
        let mut chains_left = vq.size();
        let (head, total) = loop {
            let Some(head) = next_head(mem, vq, &mut chains_left)? else {
                return Ok(None);
            };
            let write = Permissions::Write;
            match chain::walk(mem, vq, head, write, RX_CHAIN_MAX, &mut self.segs) {
                Ok(total) if total >= HEADER_BYTES as u64 => break (head, total),
                Ok(len) => {
                    let why = Malformed::TooSmall { len };
                    refuse(mem, vq, &mut self.counters, head, why)?;
                }
                Err(why) => refuse(mem, vq, &mut self.counters, head, why)?,
            }
        };
        let capacity = (total - HEADER_BYTES as u64).min(u64::from(PAYLOAD_MAX)) as u32;
        let parts = Parts {
            mem,
            vq,
            segs: &self.segs,
            counters: &mut self.counters,
            aside: &mut self.aside,
            fault: &mut self.fault,
        };
        Ok(Some(GuestSlot::new(parts, head, self.guest_cid, capacity)))
    }

    fn write_aside(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let Some(mem) = &self.snapshot else {
            return Ok(0);
        };
        let all = self.aside.bytes();
        let Aside { segs, cursor, .. } = &mut self.aside;
        let n = iovec::write_to(&**mem, segs, cursor, fd, all)?;
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
        if self.notice.sleep() {
            self.notify_driver(TX_QUEUE);
        }
        // A pending session change wakes the shell by its own waker, and the burst after it checks the queues.
        let change_pending = self.change.is_some();
        let Some(active) = self.active.as_mut().filter(|a| !a.torn && !change_pending) else {
            self.snapshot = None;
            return Armed::Sleep;
        };
        let mem = match &self.snapshot {
            Some(mem) => mem.clone(),
            None => active.mem.memory(),
        };
        let mut more = self.fault.is_some();
        for (wanted, vq) in [(interest.rx, &mut active.tx), (interest.tx, &mut active.rx)] {
            let result = if wanted {
                vq.enable_notify(&*mem)
            } else {
                vq.disable_notify(&*mem).map(|()| false)
            };
            match result {
                Ok(work) => more |= work,
                Err(fault) => {
                    // The next `rx` returns this fault to the caller.
                    self.fault.get_or_insert(fault);
                    more = true;
                }
            }
        }
        // A sleeping device must not keep a memory mapping alive.
        self.snapshot = None;
        if more {
            Armed::WorkAppeared
        } else {
            Armed::Sleep
        }
    }

    fn rest(&self) -> Option<Duration> {
        let active = self.active.as_ref().filter(|a| !a.torn)?;
        active.tx.is_notification_due().then_some(notice::REST)
    }

    fn is_paused(&self) -> bool {
        self.halted
    }

    fn tear(&mut self) {
        self.snapshot = None;
        self.fault = None;
        self.halted = false;
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
                ..Woken::default()
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

/// Resets an eventfd. It is nonblocking, because another reader may already have reset it.
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
