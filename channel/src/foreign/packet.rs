//! Packets and slots of a foreign carrier: their payload is in a buffer of this process, or in a pipe where there is much of it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use adit_engine::PacketHeader;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::pipe::{self, Pipe};
use super::{Door, Foreign};
use crate::carrier::{CarrierFault, RxPacket, TxSlot};

/// A packet that was made of a stream's bytes.
#[derive(Debug)]
pub struct ForeignPacket<'a> {
    header: PacketHeader,
    body: Body<'a>,
}

/// Where the rest of a packet's payload is.
#[derive(Debug)]
pub(super) enum Body<'a> {
    Bytes(&'a [u8]),
    /// In the pipe. The buffer has room for it.
    Piped(&'a mut Pipe, &'a mut [u8]),
}

impl Body<'_> {
    /// Takes all that is left out of the pipe, at once.
    fn unpipe(&mut self) -> nix::Result<()> {
        let Body::Piped(pipe, buf) = self else {
            return Ok(());
        };
        let mut n = 0;
        while pipe.holds() > 0 {
            n += pipe.read(&mut buf[n..])?;
        }
        let Body::Piped(_, buf) = std::mem::replace(self, Body::Bytes(&[])) else {
            return Ok(());
        };
        *self = Body::Bytes(&buf[..n]);
        Ok(())
    }
}

impl<'a> ForeignPacket<'a> {
    pub(super) fn new(header: PacketHeader, body: Body<'a>) -> Self {
        Self { header, body }
    }
}

impl RxPacket for ForeignPacket<'_> {
    fn header(&self) -> &PacketHeader {
        &self.header
    }

    fn remaining(&self) -> u32 {
        // At most `PAYLOAD_MAX`.
        match &self.body {
            Body::Bytes(bytes) => bytes.len() as u32,
            Body::Piped(pipe, _) => pipe.holds() as u32,
        }
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        self.body.unpipe().map_err(|e| CarrierFault {
            what: "cannot read a pipe of this process; errno",
            value: e as u64,
            limit: 0,
        })?;
        match &mut self.body {
            Body::Bytes(bytes) => {
                let n = dst.len().min(bytes.len());
                let (now, later) = bytes.split_at(n);
                dst[..n].copy_from_slice(now);
                *bytes = later;
                Ok(n)
            }
            Body::Piped(..) => Ok(0),
        }
    }

    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        match &mut self.body {
            Body::Bytes(bytes) => {
                let n = bytes.len().min(max as usize);
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                let n = send(fd.as_raw_fd(), &bytes[..n], flags)?;
                *bytes = &bytes[n..];
                Ok(n)
            }
            Body::Piped(pipe, _) if pipe::is_nonblocking(fd) => Ok(pipe.give(fd, max as usize)?),
            // It might wait in `splice`. What is not taken here is read and held, and goes out from there.
            Body::Piped(..) => Ok(0),
        }
    }
}

/// Room for a packet to the guest.
pub struct ForeignSlot<'a, D: Door> {
    of: &'a mut Foreign<D>,
    written: usize,
    /// They are in the pipe.
    piped: bool,
}

impl<'a, D: Door> ForeignSlot<'a, D> {
    pub(super) fn new(of: &'a mut Foreign<D>) -> Self {
        Self {
            of,
            written: 0,
            piped: false,
        }
    }

    /// Takes bytes of a descriptor into the pipe. `None`: that is not worth it, or not possible.
    fn pipe(&mut self, fd: BorrowedFd<'_>, max: usize) -> Option<io::Result<usize>> {
        let is_worth = self.of.streams && self.written == 0 && max >= pipe::WORTH;
        if !is_worth || !pipe::is_nonblocking(fd) {
            return None;
        }
        match self.of.pipes.as_mut()?.to_guest.fill(fd, max) {
            // A descriptor of a kind that `splice` does not know.
            Err(Errno::EINVAL) => None,
            Err(e) => Some(Err(e.into())),
            Ok(n) => {
                self.piped = true;
                Some(Ok(n))
            }
        }
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
        let n = match self.pipe(fd, max as usize) {
            Some(n) => n?,
            None => {
                let room = self.room();
                let n = room.len().min(max as usize);
                recv(fd.as_raw_fd(), &mut room[..n], MsgFlags::MSG_DONTWAIT)?
            }
        };
        self.of.streams = n >= pipe::WORTH;
        self.written += n;
        Ok(n)
    }

    fn may_have_left_some(&self) -> bool {
        // A pipe may be full before the descriptor is empty.
        self.piped
    }

    fn commit(self, h: &PacketHeader) {
        self.of.take_packet(h, self.written);
    }
}
