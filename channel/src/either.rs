//! A carrier of one of two kinds, for a shard with different kinds of carriers.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use adit_engine::{Lane, PacketHeader};

use crate::carrier::{
    Armed, Carrier, CarrierCaps, CarrierFault, Interest, RxPacket, SetAside, TxSlot, Woken,
};

/// A value of one of two kinds: a carrier, a packet or a slot.
#[derive(Debug)]
pub enum Either<A, B> {
    /// The first kind.
    Left(A),
    /// The second kind.
    Right(B),
}

/// Calls the same method on either kind.
macro_rules! both {
    ($either:expr, $inner:ident => $do:expr) => {
        match $either {
            Either::Left($inner) => $do,
            Either::Right($inner) => $do,
        }
    };
}

impl<A: Carrier, B: Carrier> Carrier for Either<A, B> {
    type Rx<'a>
        = Either<A::Rx<'a>, B::Rx<'a>>
    where
        Self: 'a;
    type Tx<'a>
        = Either<A::Tx<'a>, B::Tx<'a>>
    where
        Self: 'a;

    fn caps(&self) -> CarrierCaps {
        both!(self, c => c.caps())
    }

    fn hello_features(&self) -> u64 {
        both!(self, c => c.hello_features())
    }

    fn begin(&mut self) {
        both!(self, c => c.begin());
    }

    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault> {
        Ok(match self {
            Self::Left(c) => c.rx()?.map(Either::Left),
            Self::Right(c) => c.rx()?.map(Either::Right),
        })
    }

    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault> {
        Ok(match self {
            Self::Left(c) => c.tx(lane, want)?.map(Either::Left),
            Self::Right(c) => c.tx(lane, want)?.map(Either::Right),
        })
    }

    fn write_aside(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        both!(self, c => c.write_aside(fd))
    }

    fn read_aside(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        both!(self, c => c.read_aside(dst))
    }

    fn release_aside(&mut self) {
        both!(self, c => c.release_aside());
    }

    fn flush(&mut self) {
        both!(self, c => c.flush());
    }

    fn insist(&mut self) {
        both!(self, c => c.insist());
    }

    fn arm(&mut self, interest: Interest) -> Armed {
        both!(self, c => c.arm(interest))
    }

    fn rest(&self) -> Option<Duration> {
        both!(self, c => c.rest())
    }

    fn is_paused(&self) -> bool {
        both!(self, c => c.is_paused())
    }

    fn obstacle(&self) -> Option<String> {
        both!(self, c => c.obstacle())
    }

    fn glance(&mut self) -> Option<bool> {
        both!(self, c => c.glance())
    }

    fn tear(&mut self) {
        both!(self, c => c.tear());
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        both!(self, c => c.wakers(visit));
    }

    fn woken(&mut self, id: u32) -> Woken {
        both!(self, c => c.woken(id))
    }
}

impl<A: RxPacket, B: RxPacket> RxPacket for Either<A, B> {
    fn header(&self) -> &PacketHeader {
        both!(self, p => p.header())
    }

    fn lane(&self) -> Lane {
        both!(self, p => p.lane())
    }

    fn remaining(&self) -> u32 {
        both!(self, p => p.remaining())
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        both!(self, p => p.read(dst))
    }

    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        both!(self, p => p.write_to(fd, max))
    }

    fn set_aside(&mut self, len: u32) -> SetAside {
        both!(self, p => p.set_aside(len))
    }
}

impl<A: TxSlot, B: TxSlot> TxSlot for Either<A, B> {
    fn capacity(&self) -> u32 {
        both!(self, s => s.capacity())
    }

    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault> {
        both!(self, s => s.write(src))
    }

    fn read_from(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        both!(self, s => s.read_from(fd, max))
    }

    fn may_have_left_some(&self) -> bool {
        both!(self, s => s.may_have_left_some())
    }

    fn commit(self, h: &PacketHeader) {
        both!(self, s => s.commit(h));
    }
}
