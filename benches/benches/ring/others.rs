//! The other contenders, except those of `benches/peers`; and the limits of the machine.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use adit_benches::duel::{self, Ends, Home, RING, Receive1, Send1};
use adit_ringbuf::{Mapped, RingMem};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

/// rtrb with bytes as elements. It sends whole messages.
struct Bytes<T> {
    end: T,
    batch: usize,
    /// Hands out messages where the batch was copied to, and does not copy each once more.
    drains: bool,
    /// Messages of a batch that are not sent or not read yet.
    held: Vec<u8>,
    at: usize,
}

impl Send1 for Bytes<rtrb::Producer<u8>> {
    fn send(&mut self, message: &[u8]) {
        if self.batch == 1 {
            while self.end.push_entire_slice(message).is_err() {
                std::hint::spin_loop();
            }
            return;
        }
        self.held.extend_from_slice(message);
        if self.held.len() >= self.batch * message.len() {
            self.finish();
        }
    }

    fn finish(&mut self) {
        while !self.held.is_empty() && self.end.push_entire_slice(&self.held).is_err() {
            std::hint::spin_loop();
        }
        self.held.clear();
    }
}

impl Receive1 for Bytes<rtrb::Consumer<u8>> {
    fn receive(&mut self, message: &mut [u8]) {
        if self.batch == 1 {
            while self.end.pop_entire_slice(message).is_err() {
                std::hint::spin_loop();
            }
            return;
        }
        if self.at == self.held.len() {
            self.fetch(message.len());
        }
        message.copy_from_slice(&self.held[self.at..self.at + message.len()]);
        self.at += message.len();
    }

    fn receive_some(&mut self, message: &mut [u8], take: &mut dyn FnMut(&[u8])) {
        if !self.drains {
            self.receive(message);
            return take(message);
        }
        self.fetch(message.len());
        self.held.chunks_exact(message.len()).for_each(take);
    }
}

impl Bytes<rtrb::Consumer<u8>> {
    /// Takes the messages that are there, at least one and at most a batch.
    fn fetch(&mut self, size: usize) {
        let mut there = 0;
        while there == 0 {
            there = self.end.slots() / size * size;
            std::hint::spin_loop();
        }
        self.held.resize(there.min(self.batch * size), 0);
        self.end
            .pop_entire_slice(&mut self.held)
            .expect("it is there");
        self.at = 0;
    }
}

/// rtrb in its fastest form for long messages: one call copies a message in or out.
pub fn rtrb_bytes(batch: usize, drains: bool) -> Ends {
    let (producer, consumer) = rtrb::RingBuffer::new(RING);
    let sender = Bytes {
        end: producer,
        batch,
        drains,
        held: Vec::new(),
        at: 0,
    };
    let receiver = Bytes {
        end: consumer,
        batch,
        drains,
        held: Vec::new(),
        at: 0,
    };
    (Box::new(sender), Box::new(receiver))
}

/// rtrb with whole messages as elements.
struct Elements<T>(T);

impl Send1 for Elements<rtrb::Producer<[u8; 64]>> {
    fn send(&mut self, message: &[u8]) {
        let mut element: [u8; 64] = message.try_into().expect("64 bytes");
        while let Err(rtrb::PushError::Full(back)) = self.0.push(element) {
            element = back;
            std::hint::spin_loop();
        }
    }
}

impl Receive1 for Elements<rtrb::Consumer<[u8; 64]>> {
    fn receive(&mut self, message: &mut [u8]) {
        loop {
            if let Ok(element) = self.0.pop() {
                return message.copy_from_slice(&element);
            }
            std::hint::spin_loop();
        }
    }
}

/// rtrb in its fastest form for messages of 64 bytes.
pub fn rtrb_elements() -> Ends {
    let (producer, consumer) = rtrb::RingBuffer::new(RING / 64);
    (Box::new(Elements(producer)), Box::new(Elements(consumer)))
}

impl Send1 for File<PipeWriter> {
    fn send(&mut self, message: &[u8]) {
        self.0.write_all(message).expect("a pipe");
    }
}

struct File<T>(T);

impl Receive1 for File<PipeReader> {
    fn receive(&mut self, message: &mut [u8]) {
        self.0.read_exact(message).expect("a pipe");
    }
}

pub fn pipe() -> Ends {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    (Box::new(File(writer)), Box::new(File(reader)))
}

impl Send1 for File<UnixStream> {
    fn send(&mut self, message: &[u8]) {
        self.0.write_all(message).expect("a socket");
    }
}

impl Receive1 for File<UnixStream> {
    fn receive(&mut self, message: &mut [u8]) {
        self.0.read_exact(message).expect("a socket");
    }
}

pub fn unix_stream() -> Ends {
    let (a, b) = UnixStream::pair().expect("sockets");
    (Box::new(File(a)), Box::new(File(b)))
}

impl Send1 for File<OwnedFd> {
    fn send(&mut self, message: &[u8]) {
        use std::os::fd::AsRawFd;
        let sent = send(self.0.as_raw_fd(), message, MsgFlags::empty());
        assert_eq!(sent, Ok(message.len()));
    }
}

impl Receive1 for File<OwnedFd> {
    fn receive(&mut self, message: &mut [u8]) {
        use std::os::fd::AsRawFd;
        let received = recv(self.0.as_raw_fd(), message, MsgFlags::empty());
        assert_eq!(received, Ok(message.len()));
    }
}

pub fn seqpacket() -> Ends {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    let (a, b) = socketpair(family, kind, None, SockFlag::empty()).expect("sockets");
    (Box::new(File(a)), Box::new(File(b)))
}

/// The limit for everything that copies: slots of one size in memory that both sides map. Copies in and out, and does as little
/// else as possible: the writer publishes every 16 KiB or slot, the reader every eighth of the ring.
struct Slots {
    mem: Mapped,
    slot: usize,
    slots: u64,
    tell: u64,
    done: u64,
    told: u64,
    /// The other side's counter when it was last read.
    seen: u64,
}

const WRITTEN: usize = 0;
const READ: usize = 128;
const FIRST: usize = 4096;

pub fn slots(size: usize) -> Ends {
    let slot = size.next_multiple_of(64);
    let slots = (RING / slot) as u64;
    let (near, fd) = Mapped::memfd(FIRST + RING).expect("memory");
    let far = Mapped::from_memfd(fd, FIRST + RING).expect("memory");
    let end = |mem, tell| Slots {
        mem,
        slot,
        slots,
        tell,
        done: 0,
        told: 0,
        seen: 0,
    };
    let writer = end(near, (16_384 / slot as u64).max(1));
    (Box::new(writer), Box::new(end(far, (slots / 8).max(1))))
}

impl Slots {
    fn at(&self) -> usize {
        FIRST + (self.done % self.slots) as usize * self.slot
    }

    fn next(&mut self, own: usize) {
        self.done += 1;
        if self.done - self.told >= self.tell {
            self.tell(own);
        }
    }

    fn tell(&mut self, own: usize) {
        self.mem.store(own, self.done);
        self.told = self.done;
    }
}

impl Send1 for Slots {
    fn send(&mut self, message: &[u8]) {
        while self.done - self.seen >= self.slots {
            self.seen = self.mem.load(READ);
            std::hint::spin_loop();
        }
        self.mem.write(self.at(), message);
        self.next(WRITTEN);
    }

    fn finish(&mut self) {
        self.tell(WRITTEN);
    }
}

impl Receive1 for Slots {
    fn receive(&mut self, message: &mut [u8]) {
        while self.seen == self.done {
            self.seen = self.mem.load(WRITTEN);
            std::hint::spin_loop();
        }
        self.mem.read(self.at(), message);
        self.next(READ);
    }
}

/// The other possible layout of a ring of records: lengths in band, and the writer's position published in a cache line of its
/// own. Checks nothing and never sleeps: it shows the best that this layout can do.
struct Published {
    mem: Mapped,
    batch: u64,
    waiting: u64,
    own: u64,
    told: u64,
    seen: u64,
    /// Takes up to 32 messages in one call.
    drains: bool,
}

pub fn published(batch: u64, drains: bool) -> Ends {
    let (near, fd) = Mapped::memfd(FIRST + RING).expect("memory");
    let far = Mapped::from_memfd(fd, FIRST + RING).expect("memory");
    let end = |mem| Published {
        mem,
        batch,
        waiting: 0,
        own: 0,
        told: 0,
        seen: 0,
        drains,
    };
    (Box::new(end(near)), Box::new(end(far)))
}

impl Published {
    const SIZE: u64 = RING as u64;

    /// Where a record of so many bytes goes. A record never wraps.
    fn place(&self, total: u64) -> u64 {
        let left = Self::SIZE - self.own % Self::SIZE;
        if left < total {
            self.own + left
        } else {
            self.own
        }
    }

    fn offset(position: u64) -> usize {
        FIRST + (position % Self::SIZE) as usize
    }
}

impl Send1 for Published {
    fn send(&mut self, message: &[u8]) {
        let total = (8 + message.len() as u64).next_multiple_of(8);
        let at = self.place(total);
        if at + total - self.seen > Self::SIZE {
            self.finish();
            while at + total - self.seen > Self::SIZE {
                self.seen = self.mem.load(READ);
                std::hint::spin_loop();
            }
        }
        self.mem
            .store_relaxed(Self::offset(at), message.len() as u64);
        self.mem.write(Self::offset(at) + 8, message);
        self.own = at + total;
        self.waiting += 1;
        if self.waiting >= self.batch {
            self.finish();
        }
    }

    fn finish(&mut self) {
        self.waiting = 0;
        self.mem.store(WRITTEN, self.own);
    }
}

impl Receive1 for Published {
    fn receive(&mut self, message: &mut [u8]) {
        self.wait();
        self.take(message);
    }

    fn receive_some(&mut self, message: &mut [u8], take: &mut dyn FnMut(&[u8])) {
        self.wait();
        for _ in 0..if self.drains { 32 } else { 1 } {
            if self.seen == self.own {
                break;
            }
            self.take(message);
            take(message);
        }
    }
}

impl Published {
    fn wait(&mut self) {
        while self.seen == self.own {
            self.mem.store(READ, self.own);
            self.told = self.own;
            self.seen = self.mem.load(WRITTEN);
            std::hint::spin_loop();
        }
    }

    #[inline(always)]
    fn take(&mut self, message: &mut [u8]) {
        let at = self.place((8 + message.len() as u64).next_multiple_of(8));
        let len = self.mem.load(Self::offset(at)) as usize;
        assert_eq!(len, message.len());
        self.mem.read(Self::offset(at) + 8, message);
        self.own = at + (8 + len as u64).next_multiple_of(8);
        if self.own - self.told >= Self::SIZE / 8 {
            self.mem.store(READ, self.own);
            self.told = self.own;
        }
    }
}

/// What a round trip with flags alone takes, ns, median and 99th percentile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// One cache line for both directions.
    OneLine,
    /// One cache line for each direction.
    TwoLines,
    /// One cache line for each direction, and a cache line of payload behind each.
    Payload,
}

pub fn flags(kind: Flags) -> Vec<f64> {
    let (near, fd) = Mapped::memfd(1 << 16).expect("memory");
    let far = Mapped::from_memfd(fd, 1 << 16).expect("memory");
    let back = if kind == Flags::OneLine { 0 } else { 4096 };
    let payload = kind == Flags::Payload;
    let (said, _) = duel::run(
        Home::Processes,
        || {
            let mut line = [5; 64];
            duel::trips(|n| {
                let n = n as u64;
                if payload {
                    near.write(1024, &line);
                }
                near.store(0, 2 * n + 1);
                while near.load(back) != 2 * n + 2 {
                    std::hint::spin_loop();
                }
                if payload {
                    near.read(8192, &mut line);
                }
            })
        },
        || {
            let mut line = [5; 64];
            for n in 0..duel::trip_count() as u64 {
                while far.load(0) != 2 * n + 1 {
                    std::hint::spin_loop();
                }
                if payload {
                    far.read(1024, &mut line);
                    far.write(8192, &line);
                }
                far.store(back, 2 * n + 2);
            }
            Vec::new()
        },
    );
    said
}

/// Two processes that wake each other with eventfds, and sleep in between.
pub fn eventfds() -> Vec<f64> {
    let bell = || EventFd::from_value_and_flags(0, EfdFlags::empty()).expect("an eventfd");
    let (there, back) = (bell(), bell());
    let (said, _) = duel::run(
        Home::Processes,
        || {
            duel::trips(|_| {
                there.write(1).expect("an eventfd");
                back.read().expect("an eventfd");
            })
        },
        || {
            for _ in 0..duel::trip_count() {
                there.read().expect("an eventfd");
                back.write(1).expect("an eventfd");
            }
            Vec::new()
        },
    );
    said
}
