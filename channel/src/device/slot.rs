//! The items that a burst hands out: [`GuestPacket`] (a chain of the TX queue) and [`GuestSlot`] (a chain of the RX
//! queue).
//!
//! Both borrow the device and the burst's memory snapshot, so neither can outlive the burst. Neither can leak a
//! descriptor: a packet returns its chain when it is dropped, and a slot takes its chain only when it is committed.

use std::io;
use std::os::fd::BorrowedFd;

use adit_engine::PacketHeader;
use vm_memory::{GuestMemory, GuestMemoryError};

use super::aside::Aside;
use super::chain::{Cursor, Seg};
use super::packet::{HEADER_BYTES, HOST_CID, WireHeader};
use super::virtqueue::Virtqueue;
use super::{Counters, GuestCid, iovec};
use crate::carrier::{CarrierFault, RxPacket, SetAside, TxSlot};

/// The parts of the device that a packet or slot borrows.
pub(super) struct Parts<'a, M> {
    pub(super) mem: &'a M,
    pub(super) vq: &'a mut Virtqueue,
    pub(super) segs: &'a [Seg],
    pub(super) counters: &'a mut Counters,
    /// Packets whose payload was set aside.
    pub(super) aside: &'a mut Aside,
    /// Stores a fault that is found in a place that cannot return an error.
    pub(super) fault: &'a mut Option<CarrierFault>,
}

impl<M: GuestMemory> Parts<'_, M> {
    fn give_back(&mut self, head: u16, len: u32) {
        if let Err(fault) = self.vq.push_used(self.mem, head, len) {
            self.fault.get_or_insert(fault);
        }
    }
}

/// A packet from the guest, in the buffers that the guest's driver posted.
pub struct GuestPacket<'a, M: GuestMemory> {
    parts: Parts<'a, M>,
    head: u16,
    header: PacketHeader,
    cursor: Cursor,
    remaining: u32,
}

impl<'a, M: GuestMemory> GuestPacket<'a, M> {
    /// `cursor` must be after the header, with `remaining` bytes left.
    pub(super) fn new(
        parts: Parts<'a, M>,
        head: u16,
        header: PacketHeader,
        cursor: Cursor,
        remaining: u32,
    ) -> Self {
        Self {
            parts,
            head,
            header,
            cursor,
            remaining,
        }
    }

    fn moved(&mut self, n: usize) {
        // The caller asked for at most `remaining` bytes.
        self.remaining -= n as u32;
        self.parts.counters.bytes_copied += n as u64;
    }
}

impl<M: GuestMemory> RxPacket for GuestPacket<'_, M> {
    fn header(&self) -> &PacketHeader {
        &self.header
    }

    fn remaining(&self) -> u32 {
        self.remaining
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        let want = dst.len().min(self.remaining as usize);
        let n = self
            .cursor
            .copy_out(self.parts.mem, self.parts.segs, &mut dst[..want])
            .map_err(|e| payload_fault(&e))?;
        self.moved(n);
        Ok(n)
    }

    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let max = max.min(self.remaining) as usize;
        let n = iovec::write_to(self.parts.mem, self.parts.segs, &mut self.cursor, fd, max)?;
        self.moved(n);
        Ok(n)
    }

    fn set_aside(&mut self, len: u32) -> SetAside {
        let len = len.min(self.remaining);
        self.remaining -= len;
        self.parts.aside.add(self.parts.segs, &mut self.cursor, len)
    }
}

impl<M: GuestMemory> Drop for GuestPacket<'_, M> {
    fn drop(&mut self) {
        // The used length is 0, because the device wrote nothing into a TX chain. Chains are returned in their order.
        if !self.parts.aside.hold_back(self.head) {
            self.parts.give_back(self.head, 0);
        }
    }
}

/// A slot for a packet, in buffers that the guest's driver posted.
pub struct GuestSlot<'a, M: GuestMemory> {
    parts: Parts<'a, M>,
    head: u16,
    guest_cid: GuestCid,
    cursor: Cursor,
    capacity: u32,
    written: u32,
}

impl<'a, M: GuestMemory> GuestSlot<'a, M> {
    /// `segs` must have room for the header and at least `capacity` bytes.
    pub(super) fn new(parts: Parts<'a, M>, head: u16, guest_cid: GuestCid, capacity: u32) -> Self {
        let mut cursor = Cursor::default();
        cursor.advance(parts.segs, HEADER_BYTES);
        Self {
            parts,
            head,
            guest_cid,
            cursor,
            capacity,
            written: 0,
        }
    }

    fn moved(&mut self, n: usize) {
        // The caller asked for at most `capacity - written` bytes.
        self.written += n as u32;
        self.parts.counters.bytes_copied += n as u64;
    }
}

impl<M: GuestMemory> TxSlot for GuestSlot<'_, M> {
    fn capacity(&self) -> u32 {
        self.capacity
    }

    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault> {
        let want = src.len().min((self.capacity - self.written) as usize);
        let n = self
            .cursor
            .copy_in(self.parts.mem, self.parts.segs, &src[..want])
            .map_err(|e| payload_fault(&e))?;
        self.moved(n);
        Ok(n)
    }

    fn read_from(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let max = max.min(self.capacity - self.written) as usize;
        if max == 0 {
            // Returning 0 would mean end of file.
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no room in the slot",
            ));
        }
        let n = iovec::read_from(self.parts.mem, self.parts.segs, &mut self.cursor, fd, max)?;
        self.moved(n);
        Ok(n)
    }

    fn commit(mut self, h: &PacketHeader) {
        // The header never announces more bytes than were written: the buffer after them still has its old content.
        let h = PacketHeader {
            len: self.written,
            ..*h
        };
        let wire = WireHeader::new(HOST_CID, self.guest_cid.get(), &h).to_bytes();
        let parts = &mut self.parts;
        if let Err(e) = Cursor::default().copy_in(parts.mem, parts.segs, &wire) {
            parts.fault.get_or_insert(payload_fault(&e));
            return;
        }
        parts.vq.advance();
        parts.counters.packets_to_guest += 1;
        parts.give_back(self.head, HEADER_BYTES as u32 + self.written);
    }
}

/// A buffer that `walk` found in guest memory is missing in the same snapshot.
pub(super) fn payload_fault(e: &GuestMemoryError) -> CarrierFault {
    tracing::debug!(error = %e, "buffer is not accessible");
    CarrierFault {
        what: "buffer is not accessible any more",
        value: 0,
        limit: 0,
    }
}
