//! A shard, a `Port` and a guest at the two ends of a vhost-user socket, one step at a time. The shard only runs when
//! a kick, a command or a socket wakes it, as in a separate process.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use adit_channel::device::{FEATURES, HOST_CID, RX_QUEUE, TX_QUEUE};
use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::Sink;
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{EngineConfig, Op, PacketHeader, StreamId};
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig, memory};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserVirtioFeatures;

use crate::common::{CID, cid, pattern};
use crate::vm::Vm;

pub const HOST_PORT: u32 = 741;
/// After this number of turns of the shard a test counts as hung.
const TURNS_MAX: u32 = 200_000;
/// SHUTDOWN flag: the sender sends no more.
pub const SEND: u32 = 2;

/// A stream between a guest's port and a client's socket.
pub struct Stream {
    pub guest: GuestStream,
    pub id: StreamId,
    pub client: UnixStream,
    /// Bytes that the guest received.
    pub got: Vec<u8>,
    pub shut: bool,
    /// Flags of each SHUTDOWN that arrived.
    pub flags: Vec<u32>,
    pub reset: bool,
}

pub struct World {
    pub shard: Shard<VhostUserCarrier>,
    pub port: PortIndex,
    pub vm: Vm,
    pub streams: Vec<Stream>,
    /// Packets without a stream: port of the guest, operation.
    pub strays: Vec<(u32, u16)>,
    next: u32,
    /// The guest does not post its buffers again.
    pub stingy: bool,
    _dir: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("vhost.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let config = VhostUserConfig::new(listener, cid(), "attacks");
        let carrier = VhostUserCarrier::new(config).expect("a carrier");
        let mut shard = Shard::new().expect("an epoll set");
        let config = EngineConfig::default();
        let port = shard.add(carrier, config, 1).expect("a port");
        shard.port_mut(port).listen(HOST_PORT).expect("free");
        let mut world = Self {
            shard,
            port,
            vm: Vm::start(&socket),
            streams: Vec::new(),
            strays: Vec::new(),
            next: 1024,
            stingy: false,
            _dir: dir,
        };
        world.until(|w| w.shard.port(w.port).epoch() == Some(1));
        world
    }

    /// Kicks if the device asked for it, runs one turn of the shard, and handles what arrived at the guest.
    pub fn turn(&mut self) {
        if self.vm.driver.tx.publish() {
            self.vm.kicks[1].write(1).expect("kick");
        }
        if self.vm.driver.rx.publish() {
            self.vm.kicks[0].write(1).expect("kick");
        }
        self.shard.turn(Some(Duration::ZERO)).expect("a turn");
        self.vm.driver.reap_tx();
        if !self.stingy {
            self.receive();
        }
    }

    fn receive(&mut self) {
        let mut payload = Vec::new();
        while let Some(wire) = self.vm.driver.receive(&mut payload) {
            let h = wire.header();
            assert_eq!((wire.src_cid(), wire.dst_cid()), (HOST_CID, CID));
            let known = self.streams.iter_mut().rev();
            let Some(s) = known.into_iter().find(|s| s.guest.port == h.dst_port) else {
                self.strays.push((h.dst_port, h.op));
                continue;
            };
            s.guest.handle(&h, payload.len());
            s.got.extend_from_slice(&payload);
            s.shut |= h.op == Op::Shutdown as u16 && h.flags & SEND != 0;
            s.flags
                .extend((h.op == Op::Shutdown as u16).then_some(h.flags));
            s.reset |= h.op == Op::Rst as u16;
            if s.guest.owes_credit() {
                let update = s.guest.header(Op::CreditUpdate);
                self.vm.driver.send(&update, &[], 1);
            }
        }
    }

    #[track_caller]
    pub fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..TURNS_MAX {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("not reached");
    }

    pub fn turns(&mut self, n: u32) {
        (0..n).for_each(|_| self.turn());
    }

    pub fn send(&mut self, h: &PacketHeader, payload: &[u8]) {
        while !self.vm.driver.send(h, payload, 4096) {
            self.turn();
        }
    }

    pub fn send_op(&mut self, at: usize, op: Op, flags: u32) {
        let h = PacketHeader {
            flags,
            ..self.streams[at].guest.header(op)
        };
        self.send(&h, &[]);
    }

    /// Opens a stream from a port of the guest.
    pub fn open_from(&mut self, port: u32) -> usize {
        let mut guest = GuestStream::new(port, HOST_PORT);
        let request = guest.header(Op::Request);
        self.send(&request, &[]);
        let mut id = None;
        self.until(|w| {
            while let Some(news) = w.shard.poll_news() {
                if let News::Notice(
                    _,
                    Notice::Incoming {
                        stream, peer_port, ..
                    },
                ) = news
                {
                    assert_eq!(peer_port, port);
                    id = Some(stream);
                }
            }
            id.is_some()
        });
        let (client, sink) = UnixStream::pair().expect("a pair");
        client.set_nonblocking(true).expect("a flag");
        let (id, now) = (id.expect("told"), self.shard.now());
        let sink = Some(Sink::Fd(sink.into()));
        self.shard.port_mut(self.port).accept(now, id, sink);
        let (got, shut, reset) = (Vec::new(), false, false);
        self.streams.push(Stream {
            guest,
            id,
            client,
            got,
            shut,
            flags: Vec::new(),
            reset,
        });
        let at = self.streams.len() - 1;
        self.until(|w| w.streams[at].guest.credit() > 0);
        at
    }

    pub fn open(&mut self) -> usize {
        self.next += 1;
        self.open_from(self.next)
    }

    /// Sends what credit and queue allow. Returns the number of bytes.
    pub fn guest_writes(&mut self, at: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let guest = &mut self.streams[at].guest;
            let n = (guest.credit() as usize).min(bytes.len() - done).min(4096);
            let before = *guest;
            let h = guest.payload(n as u32);
            if n == 0 || !self.vm.driver.send(&h, &bytes[done..done + n], 1021) {
                self.streams[at].guest = before;
                break;
            }
            done += n;
        }
        done
    }

    pub fn client_reads(&mut self, at: usize, into: &mut Vec<u8>) -> bool {
        let mut buf = [0; 16 << 10];
        loop {
            match self.streams[at].client.read(&mut buf) {
                Ok(0) => return true,
                Ok(n) => into.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return true,
                Err(e) => panic!("{e}"),
            }
        }
    }

    pub fn client_writes(&mut self, at: usize, bytes: &[u8]) -> usize {
        match self.streams[at].client.write(bytes) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
            Err(e) => panic!("{e}"),
        }
    }

    /// Moves bytes in both directions and checks each one.
    #[track_caller]
    pub fn exchange(&mut self, at: usize, len: usize) {
        let (up, down) = (pattern(len, 1), pattern(len, 2));
        let (mut sent, mut said, mut got) = (0, 0, Vec::new());
        let had = self.streams[at].got.len();
        self.until(|w| {
            sent += w.guest_writes(at, &up[sent..]);
            said += if said < len {
                w.client_writes(at, &down[said..])
            } else {
                0
            };
            w.client_reads(at, &mut got);
            got.len() >= len && w.streams[at].got.len() >= had + len
        });
        assert!(
            got == up && self.streams[at].got[had..] == down,
            "{len} bytes"
        );
    }

    pub fn assert_works(&mut self) {
        let at = self.open();
        self.exchange(at, 1000);
    }

    /// Stops both vrings and asks for their positions, as QEMU does. The shard runs meanwhile.
    pub fn stop(&mut self) -> [u16; 2] {
        self.vm.enable(false);
        let frontend = self.vm.frontend.clone();
        let asked = std::thread::spawn(move || {
            [0, 1].map(|q| frontend.get_vring_base(q).expect("base") as u16)
        });
        self.until(|_| asked.is_finished());
        asked.join().expect("answered")
    }

    /// Starts the vrings at their positions.
    pub fn resume(&mut self, bases: [u16; 2]) {
        assert!(self.shard.port(self.port).is_paused());
        for (queue, base) in [(RX_QUEUE, bases[0]), (TX_QUEUE, bases[1])] {
            self.vm.set_vring(queue, base);
        }
        self.vm.enable(true);
        self.until(|w| !w.shard.port(w.port).is_paused());
    }
}

/// The guest's driver resets the device and starts again, in the same memory.
pub fn reboot(world: &mut World, config: DriverConfig) {
    let before = world.shard.port(world.port).epoch();
    world.stop();
    world.streams.clear();
    for queue in [RX_QUEUE, TX_QUEUE] {
        for addr in memory::queue_addrs(queue) {
            world.vm.driver.write(addr, &[0; 0x1000]);
        }
    }
    let mem = world.vm.driver.memory().clone();
    world.vm.driver = Driver::new(mem, cid(), config);
    let off = if config.event_idx { 0 } else { 1 << 29 };
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let features = FEATURES & !off | protocol;
    world.vm.frontend.set_features(features).expect("offered");
    world.resume([0, 0]);
    assert!(world.shard.port(world.port).epoch() > before);
}
