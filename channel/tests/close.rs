//! Each end sends and then closes at once, over the whole path: software driver, device, engine, `Port`, socket. Every
//! byte must arrive before the end of the stream (R57).

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::Sink;
use adit_engine::{EngineConfig, Op};
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig, memory};
use common::{Device, Signals, cid};

const RUNS: u32 = 100_000;
const HOST_PORT: u32 = 741;
/// After this number of turns of the shard a test counts as hung.
const TURNS_MAX: u32 = 100_000;
const BOTH: u32 = 3;

/// A hash that depends on the order and on the number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Hash {
    bytes: u64,
    value: u64,
}

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        for &b in bytes {
            self.value = (self.value ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

struct World {
    driver: Driver,
    shard: Shard<Device>,
    port: PortIndex,
    /// Guest port of the next stream.
    next: u32,
    payload: Vec<u8>,
    bytes: Vec<u8>,
    noise: u64,
}

/// What the guest's end of a stream has received.
#[derive(Default)]
struct Seen {
    hash: Hash,
    shutdown: bool,
    reset: bool,
}

impl World {
    fn new(config: DriverConfig) -> Self {
        let driver = Driver::new(memory::anonymous(), cid(), config);
        let mut device = Device::new(cid(), 1).expect("a descriptor");
        device
            .ack_features(adit_channel::device::FEATURES)
            .expect("offered");
        let signals = Arc::new(Signals::default());
        device
            .activate(driver.memory().clone(), driver.queues(), signals)
            .expect("usable");
        let mut shard = Shard::new().expect("an epoll set");
        let port = shard
            .add(device, EngineConfig::default(), 1)
            .expect("a port");
        shard.port_mut(port).listen(HOST_PORT).expect("free");
        let mut world = Self {
            driver,
            shard,
            port,
            next: 1024,
            payload: Vec::new(),
            bytes: Vec::new(),
            noise: 57,
        };
        world.turn();
        world
    }

    fn random(&mut self, below: u64) -> u64 {
        self.noise = self
            .noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.noise >> 33) % below
    }

    fn turn(&mut self) {
        self.driver.tx.publish();
        self.shard.port_mut(self.port);
        self.shard.turn(Some(Duration::ZERO)).expect("a turn");
        self.driver.reap_tx();
    }

    /// Handles the packets that arrived at the guest.
    fn receive(&mut self, guest: &mut GuestStream, seen: &mut Seen) {
        while let Some(wire) = self.driver.receive(&mut self.payload) {
            let h = wire.header();
            if h.dst_port != guest.port {
                // A reset that was still owed to an earlier stream.
                assert_eq!(h.op, Op::Rst as u16);
                continue;
            }
            guest.handle(&h, self.payload.len());
            seen.hash.add(&self.payload);
            seen.shutdown |= h.op == Op::Shutdown as u16 && h.flags & 2 != 0;
            seen.reset |= h.op == Op::Rst as u16;
        }
        self.driver.rx.publish();
        if guest.owes_credit() {
            let update = guest.header(Op::CreditUpdate);
            self.driver.send(&update, &[], 1);
        }
    }

    fn send(&mut self, guest: &mut GuestStream, op: Op, flags: u32) {
        let mut header = guest.header(op);
        header.flags = flags;
        while !self.driver.send(&header, &[], 1) {
            self.turn();
        }
    }

    /// Opens a stream from the guest. Returns the guest's end and the host client's end.
    fn open(&mut self) -> (GuestStream, Seen, UnixStream) {
        self.next = if self.next == u32::MAX {
            1024
        } else {
            self.next + 1
        };
        let mut guest = GuestStream::new(self.next, HOST_PORT);
        self.send(&mut guest, Op::Request, 0);
        self.turn();
        let asked = std::iter::from_fn(|| self.shard.poll_news()).find_map(|news| match news {
            News::Notice(_, Notice::Incoming { stream, .. }) => Some(stream),
            _ => None,
        });
        let (near, far) = UnixStream::pair().expect("a pair");
        near.set_nonblocking(true).expect("a socket");
        let now = self.shard.now();
        let stream = asked.expect("a request");
        self.shard
            .port_mut(self.port)
            .accept(now, stream, Some(Sink::Fd(far.into())));
        let mut seen = Seen::default();
        while guest.credit() == 0 {
            self.turn();
            self.receive(&mut guest, &mut seen);
        }
        (guest, seen, near)
    }

    fn noise(&mut self, len: usize) -> Hash {
        let seed = self.random(u64::MAX);
        self.bytes.clear();
        self.bytes.extend(
            (0..len as u64).map(|i| (seed.wrapping_add(i).wrapping_mul(0x9e37_79b9) >> 24) as u8),
        );
        let mut hash = Hash::default();
        hash.add(&self.bytes);
        hash
    }

    /// The guest writes and closes. The host reads to the end.
    fn guest_closes(&mut self, len: usize) {
        let (mut guest, mut seen, mut near) = self.open();
        let want = self.noise(len);
        let bytes = std::mem::take(&mut self.bytes);
        let (mut at, mut got, mut buf) = (0, Hash::default(), vec![0; 16 << 10]);
        let mut closed = false;
        for _ in 0..TURNS_MAX {
            while at < bytes.len() {
                let n = (bytes.len() - at)
                    .min(guest.credit() as usize)
                    .min(1 + self.random(4096) as usize);
                let before = guest;
                let header = guest.payload(n as u32);
                if n == 0 || !self.driver.send(&header, &bytes[at..at + n], 4096) {
                    guest = before;
                    break;
                }
                at += n;
            }
            if at == bytes.len() && !closed {
                // In the same kick as the last byte.
                self.send(&mut guest, Op::Shutdown, BOTH);
                closed = true;
            }
            self.turn();
            self.receive(&mut guest, &mut seen);
            match near.read(&mut buf) {
                Ok(0) => {
                    assert_eq!(got, want, "the stream ended early");
                    self.bytes = bytes;
                    return;
                }
                Ok(n) => got.add(&buf[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
        }
        panic!("no end: {got:?} of {want:?}");
    }

    /// The host's client writes and closes. The guest reads to the end.
    fn host_closes(&mut self, len: usize) {
        let (mut guest, mut seen, near) = self.open();
        let want = self.noise(len);
        let bytes = std::mem::take(&mut self.bytes);
        let (mut at, mut near) = (0, Some(near));
        for _ in 0..TURNS_MAX {
            while let Some(mut client) = near.take() {
                match client.write(&bytes[at..]) {
                    Ok(n) if at + n < bytes.len() => at += n,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {
                        near = Some(client);
                        break;
                    }
                    // All bytes are written: close at once, without a shutdown of the sending first.
                    Ok(_) => {
                        client.shutdown(Shutdown::Both).expect("connected");
                        break;
                    }
                    Err(e) => panic!("{e}"),
                }
                near = Some(client);
            }
            self.turn();
            self.receive(&mut guest, &mut seen);
            if seen.shutdown || seen.reset {
                assert_eq!(seen.hash, want, "the stream ended early");
                self.send(&mut guest, Op::Rst, 0);
                self.turn();
                self.bytes = bytes;
                return;
            }
        }
        panic!("no end: {:?} of {want:?}", seen.hash);
    }
}

#[test]
fn r57_no_byte_is_lost_in_100_000_closes_right_after_the_last_byte() {
    for (config, runs) in [
        (DriverConfig::LINUX_6_1, RUNS / 2),
        (DriverConfig::LINUX_6_12, RUNS / 2),
    ] {
        let mut world = World::new(config);
        for run in 0..runs {
            let most = if run % 500 == 0 { 300_000 } else { 700 };
            let len = world.random(most) as usize;
            if run % 2 == 0 {
                world.guest_closes(len);
            } else {
                world.host_closes(len);
            }
        }
        assert!(
            world.shard.port(world.port).streams() <= 2,
            "streams are left over"
        );
    }
}
