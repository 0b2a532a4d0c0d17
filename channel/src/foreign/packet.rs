//! Packets and slots of a foreign carrier: their payload is in a buffer of this process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use adit_engine::PacketHeader;
use nix::sys::socket::{MsgFlags, recv, send};

use super::{Door, Foreign};
use crate::carrier::{CarrierFault, RxPacket, TxSlot};

/// A packet that was made of a stream's bytes.
#[derive(Debug)]
pub struct ForeignPacket<'a> {
    header: PacketHeader,
    body: &'a [u8],
}

impl<'a> ForeignPacket<'a> {
    pub(super) fn new(header: PacketHeader, body: &'a [u8]) -> Self {
        Self { header, body }
    }
}

impl RxPacket for ForeignPacket<'_> {
    fn header(&self) -> &PacketHeader {
        &self.header
    }

    fn remaining(&self) -> u32 {
        // At most `PAYLOAD_MAX`.
        self.body.len() as u32
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        let n = dst.len().min(self.body.len());
        let (now, later) = self.body.split_at(n);
        dst[..n].copy_from_slice(now);
        self.body = later;
        Ok(n)
    }

    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let n = self.body.len().min(max as usize);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let n = send(fd.as_raw_fd(), &self.body[..n], flags)?;
        self.body = &self.body[n..];
        Ok(n)
    }
}

/// Room for a packet to the guest.
pub struct ForeignSlot<'a, D: Door> {
    of: &'a mut Foreign<D>,
    written: usize,
}

impl<'a, D: Door> ForeignSlot<'a, D> {
    pub(super) fn new(of: &'a mut Foreign<D>) -> Self {
        Self { of, written: 0 }
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.of.to_guest[self.written..]
    }
}

impl<D: Door> TxSlot for ForeignSlot<'_, D> {
    fn capacity(&self) -> u32 {
        super::PAYLOAD_MAX as u32
    }

    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault> {
        let room = self.room();
        let n = src.len().min(room.len());
        room[..n].copy_from_slice(&src[..n]);
        self.written += n;
        Ok(n)
    }

    fn read_from(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let room = self.room();
        let n = room.len().min(max as usize);
        let n = recv(fd.as_raw_fd(), &mut room[..n], MsgFlags::MSG_DONTWAIT)?;
        self.written += n;
        Ok(n)
    }

    fn commit(self, h: &PacketHeader) {
        self.of.take_packet(h, self.written);
    }
}
