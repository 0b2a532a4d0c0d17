//! A burst on the ring: it takes packets from the other side and writes packets to it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use adit_engine::{Lane, PACKET_HEADER_BYTES, PacketHeader};
use adit_ringbuf::{Armed as Ready, Grant, Mapped, PushError, RingMem, Wake};
use vm_memory::GuestAddress;

use super::{LOOK_EVERY, RingCarrier, RingCounters, Role, SMALL, Staged};
use crate::carrier::{
    Armed, Carrier, CarrierCaps, CarrierFault, Interest, RxPacket, SetAside, TxSlot, Woken,
};
use crate::device::aside::Aside;
use crate::device::chain::{Cursor, Seg};
use crate::device::{drain, iovec};

/// Largest payload of one packet in bytes, the same as on a virtqueue.
const PAYLOAD_MAX: u32 = 64 << 10;
/// Capabilities of a ring.
pub(super) const CAPS: CarrierCaps = CarrierCaps {
    max_payload: PAYLOAD_MAX,
    packet_overhead: 0,
    lanes: true,
    tells_reason: true,
    // Several of the largest packets. The rest of a write that does not fill a TCP segment is sent as a short segment.
    run_bytes: 256 << 10,
};
/// Smallest payload in bytes that a slot has room for. Less room at the end of the ring becomes a pad. With less room
/// in the whole ring, the packet waits.
const SLOT_LEAST: usize = 1024;
/// Number of records of lane control that are taken in a row while lane bulk has some.
const CONTROL_RUN_MAX: u32 = 16;

/// After this many bytes of records they are published before the next is written. Otherwise the reader would be idle
/// while this side writes bulk.
const SHOWN_AT_ONCE: usize = 16 << 10;

const WAKER_CHANGED: u32 = 0;
const WAKER_DATA: u32 = 1;
const WAKER_SPACE: u32 = 2;

/// A packet: its header is copied, and its payload is still in the ring.
#[derive(Debug)]
pub struct RingPacket<'a> {
    mem: &'a Mapped,
    header: PacketHeader,
    lane: Lane,
    /// Offset of the payload's end.
    end: usize,
    /// Payload bytes that were not read yet: the last ones.
    remaining: u32,
    /// A copy of the payload, if it is small.
    small: &'a [u8],
    aside: &'a mut Aside,
    counters: &'a mut RingCounters,
}

/// Room for a packet.
#[derive(Debug)]
pub struct RingSlot<'a> {
    mem: &'a Mapped,
    grant: Grant<'a, Mapped>,
    /// If set, bytes are written here first, and not into the grant.
    staged: Option<&'a mut Staged>,
    capacity: u32,
    written: u32,
    /// A failed read may have left bytes after those that were written.
    spoilt: bool,
    data: &'a mut Wake,
    counters: &'a mut RingCounters,
}

fn seg(at: usize, len: u32) -> [Seg; 1] {
    [Seg {
        addr: GuestAddress(at as u64),
        len,
    }]
}

impl RingCarrier {
    /// The order in which to check the lanes: lane control first, but bulk always gets its share.
    fn order(&self) -> [usize; 2] {
        let last = self.lanes.len() - 1;
        match self.control_run >= CONTROL_RUN_MAX {
            false => [0, last],
            true => [last, 0],
        }
    }

    /// Finds the next record: index of its lane, offset and length.
    fn next(&mut self) -> Result<Option<(usize, usize, usize)>, CarrierFault> {
        for index in self.order() {
            let consumer = &mut self.lanes[index].ends.consumer;
            if !consumer.has_header() {
                continue;
            }
            if consumer.wants_release() && self.aside.bytes() == 0 {
                self.space = self.space.or(consumer.release());
            }
            if let Some(record) = consumer.peek()? {
                let (at, len) = (record.at(), record.len());
                // The record stays in place until it is released.
                record.take();
                // Load the next header now. Its cache line is then fetched from the writer while this record is
                // handled.
                std::hint::black_box(consumer.has_header());
                return Ok(Some((index, at, len)));
            }
        }
        Ok(None)
    }

    /// Publishes what was written and gives back the space of what was read.
    fn publish(&mut self) {
        for lane_state in &mut self.lanes {
            match lane_state.unstage() {
                Ok(wake) => self.data = self.data.or(wake),
                Err(fault) => {
                    self.fault.get_or_insert(fault);
                }
            }
            self.data = self.data.or(lane_state.ends.producer.publish());
            // Less space is given back when this side sleeps. The writer does not need it earlier.
            if lane_state.ends.consumer.wants_release() {
                self.space = self.space.or(lane_state.ends.consumer.release());
            }
        }
        self.signal_doorbells();
    }

    fn arm_lanes(&mut self, interest: Interest) -> Result<bool, CarrierFault> {
        let mut more = self.fault.is_some();
        for lane_state in &mut self.lanes {
            if self.bells.must_poll() {
                // No doorbell is needed, because this side polls again.
                more |= lane_state.ends.consumer.peek()?.is_some();
                continue;
            }
            if interest.rx {
                let (armed, wake) = lane_state.ends.consumer.arm_data()?;
                self.space = self.space.or(wake);
                more |= armed == Ready::Ready;
            }
            if interest.tx && lane_state.starved {
                let least = PACKET_HEADER_BYTES + SLOT_LEAST;
                let (armed, wake) = lane_state.ends.producer.arm_space(least)?;
                self.data = self.data.or(wake);
                more |= armed == Ready::Ready;
            }
        }
        Ok(more)
    }
}

impl Carrier for RingCarrier {
    type Rx<'a> = RingPacket<'a>;
    type Tx<'a> = RingSlot<'a>;

    fn caps(&self) -> CarrierCaps {
        CAPS
    }

    fn begin(&mut self) {
        // Left over from a burst that ended with a fault.
        drop(self.aside.release());
        // With a doorbell, the session is only polled after a signal.
        if self.lanes.is_empty() || self.bells.must_poll() {
            self.poll_session();
        }
    }

    fn rx(&mut self) -> Result<Option<RingPacket<'_>>, CarrierFault> {
        // The shell has not handled a session change yet, so the streams that it knows may belong to another session.
        if self.lanes.is_empty() || self.change.is_some() {
            return Ok(None);
        }
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let Some((index, at, len)) = self.next()? else {
            return Ok(None);
        };
        self.pace.came(len);
        if len < PACKET_HEADER_BYTES {
            return Err(CarrierFault {
                what: "record is shorter than a packet header; bytes",
                value: len as u64,
                limit: PACKET_HEADER_BYTES as u64,
            });
        }
        let mut encoded = [0; PACKET_HEADER_BYTES];
        let is_small = len <= SMALL;
        if is_small {
            RingMem::read(&self.mem, at, &mut self.small[..len]);
            encoded.copy_from_slice(&self.small[..PACKET_HEADER_BYTES]);
        } else {
            RingMem::read(&self.mem, at, &mut encoded);
        }
        let control = index == 0 && self.lanes.len() > 1;
        self.control_run = if control { self.control_run + 1 } else { 0 };
        self.counters.records_in += 1;
        // A record has at most a quarter of 2 GiB.
        let remaining = (len - PACKET_HEADER_BYTES) as u32;
        Ok(Some(RingPacket {
            mem: &self.mem,
            header: PacketHeader::from_ring_bytes(&encoded),
            lane: if control { Lane::Control } else { Lane::Bulk },
            end: at + len,
            remaining,
            small: if is_small {
                &self.small[PACKET_HEADER_BYTES..len]
            } else {
                &[]
            },
            aside: &mut self.aside,
            counters: &mut self.counters,
        }))
    }

    fn tx(&mut self, lane: Lane, want: u32) -> Result<Option<RingSlot<'_>>, CarrierFault> {
        let index = self.lane_index(lane);
        if self.change.is_some() {
            return Ok(None);
        }
        let Some(lane_state) = self.lanes.get_mut(index) else {
            return Ok(None);
        };
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        self.data = self.data.or(lane_state.unstage()?);
        if lane_state.ends.producer.unpublished() >= SHOWN_AT_ONCE {
            self.data = self.data.or(lane_state.ends.producer.publish());
        }
        let want = want.min(PAYLOAD_MAX) as usize;
        let least = PACKET_HEADER_BYTES + want.min(SLOT_LEAST);
        let grant = match lane_state
            .ends
            .producer
            .reserve_some(least, PACKET_HEADER_BYTES + want)
        {
            Ok(grant) => grant,
            Err(PushError::Full) => {
                lane_state.starved = true;
                return Ok(None);
            }
            Err(PushError::Corrupt(corrupt)) => return Err(corrupt.into()),
            Err(PushError::TooLong { len, max }) => {
                return Err(CarrierFault {
                    what: "region has records too short for any packet; bytes",
                    value: max as u64,
                    limit: len as u64,
                });
            }
        };
        lane_state.starved = false;
        // At most PAYLOAD_MAX.
        let capacity = (grant.len() - PACKET_HEADER_BYTES) as u32;
        Ok(Some(RingSlot {
            mem: &self.mem,
            grant,
            staged: Some(&mut lane_state.staged),
            capacity,
            written: 0,
            spoilt: false,
            data: &mut self.data,
            counters: &mut self.counters,
        }))
    }

    fn write_aside(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let all = self.aside.bytes();
        let Aside { segs, cursor, .. } = &mut self.aside;
        let n = iovec::write_to(&self.mem, segs, cursor, fd, all)?;
        self.counters.bytes_copied += n as u64;
        Ok(n)
    }

    fn read_aside(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        let Aside { segs, cursor, .. } = &mut self.aside;
        let Some((addr, n)) = cursor.piece(segs, dst.len()) else {
            return Ok(0);
        };
        RingMem::read(&self.mem, addr.0 as usize, &mut dst[..n]);
        cursor.advance(segs, n);
        self.counters.bytes_copied += n as u64;
        Ok(n)
    }

    fn release_aside(&mut self) {
        drop(self.aside.release());
    }

    fn flush(&mut self) {
        self.publish();
    }

    fn insist(&mut self) {
        self.data = Wake::Yes;
    }

    fn arm(&mut self, interest: Interest) -> Armed {
        // A pending session change wakes the shell by its own waker, and the burst after it checks the rings.
        if self.change.is_some() {
            return Armed::Sleep;
        }
        let more = match self.arm_lanes(interest) {
            Ok(more) => more,
            Err(fault) => {
                // The next `rx` returns this fault to the caller.
                self.fault.get_or_insert(fault);
                true
            }
        };
        self.signal_doorbells();
        if more && !self.lanes.is_empty() {
            Armed::WorkAppeared
        } else {
            Armed::Sleep
        }
    }

    fn rest(&self) -> Option<Duration> {
        let held = self.retry_delay.rest(Instant::now());
        let poll = self.bells.must_poll().then_some(LOOK_EVERY);
        [held, poll].into_iter().flatten().min()
    }

    fn glance(&mut self) -> Option<bool> {
        let has_record = self
            .lanes
            .iter()
            .any(|lane_state| lane_state.ends.consumer.has_header());
        if !has_record {
            self.pace.missed();
        }
        Some(has_record)
    }

    fn tear(&mut self) {
        let Some(_) = self.epoch.take() else { return };
        let why = match &self.fault {
            Some(fault) => fault.to_string(),
            None => "the other side broke the ring".to_owned(),
        };
        self.clear_session();
        self.failed(&why);
        self.data = match &mut self.role {
            Role::Host(host) => host.poison(),
            Role::Guest(guest) => guest.poison(),
        };
        self.signal_doorbells();
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.changed.as_fd(), WAKER_CHANGED);
        let waiters = [
            (&self.bells.data_heard, WAKER_DATA),
            (&self.bells.space_heard, WAKER_SPACE),
        ];
        for (bell, id) in waiters {
            if let Some(fd) = bell.fd() {
                visit(fd, id);
            }
        }
    }

    fn woken(&mut self, id: u32) -> Woken {
        let cleared = match id {
            WAKER_DATA => self.bells.data_heard.clear(),
            WAKER_SPACE => self.bells.space_heard.clear(),
            _ => {
                drain(self.changed.as_fd());
                Ok(())
            }
        };
        self.counters.heard += u64::from(id != WAKER_CHANGED);
        if let Err(e) = cleared {
            tracing::debug!(error = %e, "cannot reset the doorbell");
        }
        self.poll_session();
        Woken {
            session: self.change.take(),
            wakers_changed: false,
            ..Woken::default()
        }
    }
}

impl RingPacket<'_> {
    /// The payload that was not read yet.
    fn rest(&self) -> [Seg; 1] {
        seg(self.end - self.remaining as usize, self.remaining)
    }

    fn moved(&mut self, n: usize) {
        // The caller asked for at most `remaining` bytes.
        self.remaining -= n as u32;
        self.counters.bytes_copied += n as u64;
    }
}

impl RxPacket for RingPacket<'_> {
    fn header(&self) -> &PacketHeader {
        &self.header
    }

    fn lane(&self) -> Lane {
        self.lane
    }

    fn remaining(&self) -> u32 {
        self.remaining
    }

    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        let left = self.remaining as usize;
        let n = dst.len().min(left);
        match self.small.len().checked_sub(left) {
            Some(done) => dst[..n].copy_from_slice(&self.small[done..done + n]),
            None => RingMem::read(self.mem, self.end - left, &mut dst[..n]),
        }
        self.moved(n);
        Ok(n)
    }

    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let max = max.min(self.remaining) as usize;
        let n = iovec::write_to(self.mem, &self.rest(), &mut Cursor::default(), fd, max)?;
        self.moved(n);
        Ok(n)
    }

    fn set_aside(&mut self, len: u32) -> SetAside {
        let (len, rest) = (len.min(self.remaining), self.rest());
        self.remaining -= len;
        self.aside.add(&rest, &mut Cursor::default(), len)
    }
}

impl RingSlot<'_> {
    /// The packet is not small: move the bytes written so far into the grant. Later bytes go there directly.
    fn unstage(&mut self) {
        if let Some(staged) = self.staged.take() {
            let end = PACKET_HEADER_BYTES + self.written as usize;
            self.grant
                .write(PACKET_HEADER_BYTES, &staged.bytes[PACKET_HEADER_BYTES..end]);
        }
    }

    fn moved(&mut self, n: usize) {
        // The caller asked for at most `capacity - written` bytes.
        self.written += n as u32;
        self.counters.bytes_copied += n as u64;
    }
}

impl TxSlot for RingSlot<'_> {
    fn capacity(&self) -> u32 {
        self.capacity
    }

    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault> {
        let n = src.len().min((self.capacity - self.written) as usize);
        let at = PACKET_HEADER_BYTES + self.written as usize;
        match &mut self.staged {
            Some(staged) if at + n <= SMALL => staged.bytes[at..at + n].copy_from_slice(&src[..n]),
            _ => {
                self.unstage();
                self.grant.write(at, &src[..n]);
            }
        }
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
        self.unstage();
        let at = self.grant.at() + PACKET_HEADER_BYTES + self.written as usize;
        let room = seg(at, self.capacity - self.written);
        let read = iovec::read_from(self.mem, &room, &mut Cursor::default(), fd, max);
        let n = read.inspect_err(|e| self.spoilt |= e.kind() != io::ErrorKind::WouldBlock)?;
        self.moved(n);
        Ok(n)
    }

    fn commit(mut self, h: &PacketHeader) {
        // The header never announces more bytes than were written.
        let h = PacketHeader {
            len: self.written,
            ..*h
        };
        let encoded = h.to_ring_bytes();
        self.counters.records_out += 1;
        let len = PACKET_HEADER_BYTES + self.written as usize;
        if let Some(staged) = self.staged {
            staged.bytes[..PACKET_HEADER_BYTES].copy_from_slice(&encoded);
            staged.len = len;
            return self.grant.unused();
        }
        self.grant.write(0, &encoded);
        *self.data = self.data.or(self.grant.commit_first(len, self.spoilt));
    }
}
