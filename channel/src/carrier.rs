//! The joint between the shell (`Port`) and what moves packets: one session, in order, no knowledge of streams.
//!
//! RX is seen from the host: `rx` yields packets from the guest (the virtqueue's TX queue), `tx` yields slots
//! towards the guest (buffers that the guest posted on its RX queue). A slot or a packet is never held over a burst.
//!
//! ```text
//! begin → { rx* , tx* } → flush → arm ─ Sleep → wait for a waker
//!                                     └ WorkAppeared → begin …
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use adit_engine::{Lane, PacketHeader, SessionChange};

/// What became of a packet that was to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum SetAside {
    /// This carrier keeps nothing: read it now.
    No,
    /// It waits.
    Kept,
    /// It waits, and no other can.
    Full,
}

/// What a carrier can do; the engine's configuration is derived from it, the engine never asks.
#[derive(Clone, Copy, Debug)]
pub struct CarrierCaps {
    /// Largest payload of one packet, bytes.
    pub max_payload: u32,
    /// See `EngineConfig::packet_overhead`.
    pub packet_overhead: u32,
    /// It has a queue for each [`Lane`] each way; otherwise one for both.
    pub lanes: bool,
    /// See `EngineConfig::tells_reason`.
    pub tells_reason: bool,
    /// Packets in a row for one socket are written when they have so many bytes.
    pub run_bytes: u32,
}

/// The session is broken for good: the guest (or whoever writes our memory) broke the rules of the transport.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {value:#x} (limit {limit:#x})")]
pub struct CarrierFault {
    /// Which field or rule.
    pub what: &'static str,
    /// What the peer wrote.
    pub value: u64,
    /// What it may be at most.
    pub limit: u64,
}

/// Result of `arm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Armed {
    /// Nothing is pending: a waker will tell.
    Sleep,
    /// Work came in between: go round again.
    WorkAppeared,
}

/// What the shell waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Packets from the guest (always, in practice: RX must drain).
    pub rx: bool,
    /// A slot towards the guest: set while the engine wants to transmit and there was none.
    pub tx: bool,
}

/// What a waker brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// The session began or ended: hand it to `Engine::handle_session`.
    pub session: Option<SessionChange>,
    /// The set of wakers changed: register it anew.
    pub wakers_changed: bool,
}

/// Moves packets of one session in order.
pub trait Carrier {
    /// A packet from the guest; dropped = consumed.
    type Rx<'a>: RxPacket
    where
        Self: 'a;
    /// A slot towards the guest; dropped without `commit` = given back unused.
    type Tx<'a>: TxSlot
    where
        Self: 'a;

    /// Tells what this carrier can do.
    fn caps(&self) -> CarrierCaps;
    /// Starts a burst: one snapshot of guest memory for all of it.
    fn begin(&mut self);
    /// Takes the next packet from the guest. Malformed chains are returned to the guest, counted and skipped inside.
    ///
    /// # Errors
    /// The transport itself is broken; the session must be torn down.
    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault>;
    /// Takes the next slot towards the guest; it may be smaller than `want` payload bytes.
    ///
    /// # Errors
    /// The transport itself is broken; the session must be torn down.
    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault>;
    /// Writes what was [set aside](RxPacket::set_aside), in order, to a descriptor, as far as it takes it.
    ///
    /// # Errors
    /// As `writev`.
    fn write_aside(&mut self, _fd: BorrowedFd<'_>) -> io::Result<usize> {
        Ok(0)
    }
    /// Copies out what was set aside and not written.
    ///
    /// # Errors
    /// The payload's memory cannot be read.
    fn read_aside(&mut self, _dst: &mut [u8]) -> Result<usize, CarrierFault> {
        Ok(0)
    }
    /// Gives back the packets that were set aside, and those that came behind them.
    fn release_aside(&mut self) {}
    /// Publishes what was used since `begin` and is not published yet, and rings whom it must.
    fn flush(&mut self);
    /// Asks to be woken, then looks again.
    fn arm(&mut self, interest: Interest) -> Armed;
    /// How long to sleep at most, though no waker becomes readable: for a carrier whose peer cannot ring, or that has
    /// something to do at a time.
    fn rest(&self) -> Option<Duration> {
        None
    }
    /// Tells whether the peer stands still and may go on: its session is held, and nothing moves.
    fn is_paused(&self) -> bool {
        false
    }
    /// A glance of a shell that looks on: false if a burst would surely find nothing from the peer. A carrier that is
    /// glanced at keeps its own distance from a peer that writes; the shell pauses for one that cannot tell (`None`).
    fn glance(&mut self) -> Option<bool> {
        None
    }
    /// Stops the session after a fault: nothing is taken from the guest until the transport is set up anew.
    fn tear(&mut self);
    /// Visits the descriptors that wake this carrier, each with the id that `woken` takes.
    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32));
    /// A waker became readable: clears it and applies what it brought.
    fn woken(&mut self, id: u32) -> Woken;
}

/// The methods that a carrier leaves to the one that it has in a field.
macro_rules! carried_by {
    ($field:ident: $inner:ty) => {
        type Rx<'a>
            = <$inner as $crate::carrier::Carrier>::Rx<'a>
        where
            Self: 'a;
        type Tx<'a>
            = <$inner as $crate::carrier::Carrier>::Tx<'a>
        where
            Self: 'a;

        fn caps(&self) -> $crate::carrier::CarrierCaps {
            self.$field.caps()
        }

        fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, $crate::carrier::CarrierFault> {
            self.$field.rx()
        }

        fn tx(
            &mut self,
            lane: ::adit_engine::Lane,
            want: u32,
        ) -> Result<Option<Self::Tx<'_>>, $crate::carrier::CarrierFault> {
            self.$field.tx(lane, want)
        }

        fn write_aside(&mut self, fd: ::std::os::fd::BorrowedFd<'_>) -> ::std::io::Result<usize> {
            self.$field.write_aside(fd)
        }

        fn read_aside(&mut self, dst: &mut [u8]) -> Result<usize, $crate::carrier::CarrierFault> {
            self.$field.read_aside(dst)
        }

        fn release_aside(&mut self) {
            self.$field.release_aside();
        }

        fn flush(&mut self) {
            self.$field.flush();
        }

        fn arm(&mut self, interest: $crate::carrier::Interest) -> $crate::carrier::Armed {
            self.$field.arm(interest)
        }

        fn rest(&self) -> Option<::std::time::Duration> {
            self.$field.rest()
        }

        fn is_paused(&self) -> bool {
            self.$field.is_paused()
        }
    };
}
pub(crate) use carried_by;

/// A packet from the guest: header already private, payload still in guest memory.
pub trait RxPacket {
    /// The header, fetched once.
    fn header(&self) -> &PacketHeader;
    /// The lane that it came on.
    fn lane(&self) -> Lane {
        Lane::Bulk
    }
    /// Payload bytes not yet read; at first what the descriptors really hold after the header.
    fn remaining(&self) -> u32;
    /// Copies payload out.
    ///
    /// # Errors
    /// The payload's memory cannot be read.
    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault>;
    /// Writes at most `max` payload bytes from guest memory straight to a descriptor (one copy, by `writev`).
    ///
    /// # Errors
    /// As `writev`: `WouldBlock`, `BrokenPipe`, …
    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize>;
    /// Keeps the next `len` payload bytes where they are, for one [`Carrier::write_aside`] with those of other packets.
    /// They are written before the burst ends, and before the next packet where the answer is [`SetAside::Full`].
    fn set_aside(&mut self, _len: u32) -> SetAside {
        SetAside::No
    }
}

/// A slot towards the guest.
pub trait TxSlot {
    /// Payload bytes that fit after the header.
    fn capacity(&self) -> u32;
    /// Copies payload in, after what was put in before.
    ///
    /// # Errors
    /// The slot's memory cannot be written.
    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault>;
    /// Reads at most `max` bytes from a descriptor straight into guest memory (one copy, by `readv`). 0 = end of file.
    ///
    /// # Errors
    /// As `readv`: `WouldBlock`, `ConnectionReset`, …
    fn read_from(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize>;
    /// Writes the header and marks the slot used with what was put in.
    fn commit(self, h: &PacketHeader);
}
