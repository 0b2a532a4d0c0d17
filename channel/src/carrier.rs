//! The interface between the shell (`Port`) and the transport that moves packets. A carrier has one session, keeps
//! packets in order, and knows no streams.
//!
//! RX and TX are seen from the host: `rx` returns packets from the guest (the virtqueue's TX queue), and `tx` returns
//! slots towards the guest (buffers that the guest posted on its RX queue). Neither a slot nor a packet lives longer
//! than a burst.
//!
//! ```text
//! begin → { rx* , tx* } → flush → arm ─ Sleep → wait for a waker
//!                                     └ WorkAppeared → begin …
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use adit_engine::{Lane, PacketHeader, SessionChange};

/// The result of setting a packet's payload aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum SetAside {
    /// This carrier cannot set payload aside: read it now.
    No,
    /// The payload was set aside.
    Kept,
    /// The payload was set aside, and no more can be.
    Full,
}

/// What a carrier supports. The engine's configuration is derived from it; the engine never asks the carrier.
#[derive(Clone, Copy, Debug)]
pub struct CarrierCaps {
    /// Largest payload of one packet, bytes.
    pub max_payload: u32,
    /// See `EngineConfig::packet_overhead`.
    pub packet_overhead: u32,
    /// It has a queue for each [`Lane`] in each direction; otherwise one queue for both lanes.
    pub lanes: bool,
    /// See `EngineConfig::tells_reason`.
    pub tells_reason: bool,
    /// Packets in a row for one socket are written together as soon as they have this many bytes.
    pub run_bytes: u32,
}

/// The session is broken for good: the guest (or another writer of the shared memory) broke the rules of the
/// transport.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {value:#x} (limit {limit:#x})")]
pub struct CarrierFault {
    /// The field or rule that was broken.
    pub what: &'static str,
    /// The value that the peer wrote.
    pub value: u64,
    /// The largest allowed value.
    pub limit: u64,
}

/// Result of `arm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Armed {
    /// Nothing is pending: a waker will become readable.
    Sleep,
    /// Work arrived in the meantime: start another burst.
    WorkAppeared,
}

/// What the shell waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Packets from the guest (always true in practice, because RX must drain).
    pub rx: bool,
    /// A slot towards the guest. True while the engine has something to send and there was no slot.
    pub tx: bool,
}

/// The result of handling a waker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// The session began or ended: pass this to `Engine::handle_session`.
    pub session: Option<SessionChange>,
    /// The set of wakers changed: register it again.
    pub wakers_changed: bool,
    /// What [`Carrier::obstacle`] says has changed, or whether there is a VMM.
    pub obstacle_changed: bool,
}

/// Moves the packets of one session, in order.
pub trait Carrier {
    /// A packet from the guest. Dropping it consumes it.
    type Rx<'a>: RxPacket
    where
        Self: 'a;
    /// A slot towards the guest. Dropping it without `commit` returns it unused.
    type Tx<'a>: TxSlot
    where
        Self: 'a;

    /// Returns what this carrier supports.
    fn caps(&self) -> CarrierCaps;
    /// Features that hellos over it have to offer: what it lacks, the two ends make up for.
    fn hello_features(&self) -> u64 {
        0
    }
    /// Starts a burst, with one snapshot of guest memory for the whole burst.
    fn begin(&mut self);
    /// Takes the next packet from the guest. Malformed chains are returned to the guest, counted and skipped.
    ///
    /// # Errors
    /// The transport is broken; the session must be torn down.
    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault>;
    /// Takes the next slot towards the guest. It may have less room than `want` payload bytes.
    ///
    /// # Errors
    /// The transport is broken; the session must be torn down.
    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault>;
    /// Writes the payload that was [set aside](RxPacket::set_aside) to a descriptor, in order, as much as the
    /// descriptor accepts.
    ///
    /// # Errors
    /// As `writev`.
    fn write_aside(&mut self, _fd: BorrowedFd<'_>) -> io::Result<usize> {
        Ok(0)
    }
    /// Copies out the payload that was set aside and not written.
    ///
    /// # Errors
    /// The payload's memory cannot be read.
    fn read_aside(&mut self, _dst: &mut [u8]) -> Result<usize, CarrierFault> {
        Ok(0)
    }
    /// Returns the packets whose payload was set aside to the guest, and the packets that arrived after them.
    fn release_aside(&mut self) {}
    /// Publishes the buffers that were used and not published since `begin`, and notifies the peer if needed.
    fn flush(&mut self);
    /// Has the next [`flush`](Self::flush) wake the peer, whether it has asked for that or not: what it asked may be lost.
    fn insist(&mut self) {}
    /// Asks for notifications, then checks for work again.
    fn arm(&mut self, interest: Interest) -> Armed;
    /// The longest time to sleep although no waker becomes readable. For a carrier whose peer cannot signal a
    /// doorbell, or that has work at a certain time.
    fn rest(&self) -> Option<Duration> {
        None
    }
    /// Returns true if the peer is paused: the session is kept, and nothing moves.
    fn is_paused(&self) -> bool {
        false
    }
    /// Why there can be no session now, for people; `None`: nothing is known to be in its way.
    fn obstacle(&self) -> Option<String> {
        None
    }
    /// A cheap check for a shell that polls. `Some(false)`: a burst would find nothing from the peer. A carrier that
    /// supports this check keeps its own distance from a peer that is writing. `None`: it has no such check, and the
    /// shell pauses between bursts instead.
    fn glance(&mut self) -> Option<bool> {
        None
    }
    /// Stops the session after a fault. Nothing is taken from the guest until the transport is set up again.
    fn tear(&mut self);
    /// Visits the descriptors that wake this carrier, each with the id for `woken`.
    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32));
    /// Handles a waker that became readable: resets it and applies its news.
    fn woken(&mut self, id: u32) -> Woken;
}

/// Forwards those methods that a carrier does not implement itself to the carrier in one of its fields.
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

        fn insist(&mut self) {
            self.$field.insist();
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

/// A packet from the guest. The header is a private copy; the payload is still in guest memory.
pub trait RxPacket {
    /// The header. It was read from guest memory once.
    fn header(&self) -> &PacketHeader;
    /// The lane on which the packet arrived.
    fn lane(&self) -> Lane {
        Lane::Bulk
    }
    /// Payload bytes that were not read yet. At first these are the bytes that the descriptors actually have after the
    /// header.
    fn remaining(&self) -> u32;
    /// Copies payload bytes out.
    ///
    /// # Errors
    /// The payload's memory cannot be read.
    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault>;
    /// Writes at most `max` payload bytes from guest memory straight to a descriptor (one copy, by `writev`).
    ///
    /// # Errors
    /// As `writev`: `WouldBlock`, `BrokenPipe`, …
    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize>;
    /// Leaves the next `len` payload bytes in guest memory, so that one [`Carrier::write_aside`] writes them together
    /// with those of other packets. They are written before the burst ends. After [`SetAside::Full`] they are written
    /// before the next packet is taken.
    fn set_aside(&mut self, _len: u32) -> SetAside {
        SetAside::No
    }
}

/// A slot towards the guest.
pub trait TxSlot {
    /// Payload bytes that fit after the header.
    fn capacity(&self) -> u32;
    /// Copies payload bytes in, after those that were written before.
    ///
    /// # Errors
    /// The slot's memory cannot be written.
    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault>;
    /// Reads at most `max` bytes from a descriptor straight into guest memory (one copy, by `readv`). 0 = end of file.
    ///
    /// # Errors
    /// As `readv`: `WouldBlock`, `ConnectionReset`, …
    fn read_from(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize>;
    /// Returns true if the descriptor may have more, although fewer bytes were read of it than it was asked for.
    fn may_have_left_some(&self) -> bool {
        false
    }
    /// Writes the header and marks the slot as used, with the bytes that were written.
    fn commit(self, h: &PacketHeader);
}
