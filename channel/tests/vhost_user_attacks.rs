//! Hostile and unlucky guests over a real vhost-user socket: frontend, frontend's thread, shard, port, client's socket. The
//! shard looks only when a kick, a command or a socket wakes it, as in a process of its own.

mod common;
#[path = "common/vm.rs"]
mod vm;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use adit_benches::queue::Buffer;
use adit_benches::stream::GuestStream;
use adit_benches::{Driver, DriverConfig, memory};
use adit_channel::device::{FEATURES, HEADER_BYTES, HOST_CID, RX_QUEUE, TX_QUEUE, WireHeader};
use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::Sink;
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{EngineConfig, Op, PacketHeader, ResetReason, StreamId};
use common::{CID, cid, pattern};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm::Vm;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const HOST_PORT: u32 = 741;
/// A hang, in turns of the shard.
const TURNS_MAX: u32 = 200_000;
const SEND: u32 = 2;

/// A stream between a guest's port and a client's socket.
struct Stream {
    guest: GuestStream,
    id: StreamId,
    client: UnixStream,
    /// What the guest received.
    got: Vec<u8>,
    shut: bool,
    reset: bool,
}

struct World {
    shard: Shard<VhostUserCarrier>,
    port: PortIndex,
    vm: Vm,
    streams: Vec<Stream>,
    /// Packets for no stream: port of the guest, operation.
    strays: Vec<(u32, u16)>,
    next: u32,
    /// The guest posts no buffers again.
    stingy: bool,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
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

    /// Kicks if the device asked for it; one turn of the shard; what came for the guest.
    fn turn(&mut self) {
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
            s.reset |= h.op == Op::Rst as u16;
            if s.guest.owes_credit() {
                let update = s.guest.header(Op::CreditUpdate);
                self.vm.driver.send(&update, &[], 1);
            }
        }
    }

    #[track_caller]
    fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..TURNS_MAX {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("not reached");
    }

    fn turns(&mut self, n: u32) {
        (0..n).for_each(|_| self.turn());
    }

    fn send(&mut self, h: &PacketHeader, payload: &[u8]) {
        while !self.vm.driver.send(h, payload, 4096) {
            self.turn();
        }
    }

    fn say(&mut self, at: usize, op: Op, flags: u32) {
        let h = PacketHeader {
            flags,
            ..self.streams[at].guest.header(op)
        };
        self.send(&h, &[]);
    }

    /// Opens a stream from a port of the guest.
    fn open_from(&mut self, port: u32) -> usize {
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
            reset,
        });
        let at = self.streams.len() - 1;
        self.until(|w| w.streams[at].guest.credit() > 0);
        at
    }

    fn open(&mut self) -> usize {
        self.next += 1;
        self.open_from(self.next)
    }

    /// Sends what credit and queue allow; returns how far it got.
    fn guest_writes(&mut self, at: usize, bytes: &[u8]) -> usize {
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

    fn client_reads(&mut self, at: usize, into: &mut Vec<u8>) -> bool {
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

    fn client_writes(&mut self, at: usize, bytes: &[u8]) -> usize {
        match self.streams[at].client.write(bytes) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
            Err(e) => panic!("{e}"),
        }
    }

    /// Bytes both ways, each exact.
    #[track_caller]
    fn exchange(&mut self, at: usize, len: usize) {
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

    fn alive(&mut self) {
        let at = self.open();
        self.exchange(at, 1000);
    }

    /// Stops both rings and asks where they stood, as QEMU does; the shard goes on meanwhile.
    fn stop(&mut self) -> [u16; 2] {
        self.vm.enable(false);
        let frontend = self.vm.frontend.clone();
        let asked = std::thread::spawn(move || {
            [0, 1].map(|q| frontend.get_vring_base(q).expect("base") as u16)
        });
        self.until(|_| asked.is_finished());
        self.streams.clear();
        asked.join().expect("answered")
    }

    /// Starts the rings where they stand.
    fn resume(&mut self, bases: [u16; 2]) {
        let before = self.shard.port(self.port).epoch();
        for (queue, base) in [(RX_QUEUE, bases[0]), (TX_QUEUE, bases[1])] {
            self.vm.set_ring(queue, base);
        }
        self.vm.enable(true);
        self.until(|w| w.shard.port(w.port).epoch() > before);
    }
}

#[test]
fn r26_a_guest_that_never_looks_at_used_buffers_bounds_itself() {
    let mut world = World::new();
    let at = world.open();
    world.stingy = true;
    let before = world
        .shard
        .port(world.port)
        .carrier()
        .counters()
        .packets_to_guest;
    let bytes = pattern(4 << 20, 1);
    let mut said = 0;
    for _ in 0..2000 {
        said += world.client_writes(at, &bytes[said..]);
        world.turn();
    }
    let sent = world
        .shard
        .port(world.port)
        .carrier()
        .counters()
        .packets_to_guest
        - before;
    assert!(sent <= 128, "{sent} packets into 128 buffers");
    assert!(said < bytes.len(), "the client waits");
    assert_eq!(
        world.shard.port(world.port).counters().bytes_copied,
        0,
        "nothing is held for it"
    );
    // And when it looks, all of it is there.
    world.stingy = false;
    world.until(|w| {
        said += if said < bytes.len() {
            w.client_writes(at, &bytes[said..])
        } else {
            0
        };
        w.streams[at].got.len() == bytes.len()
    });
    assert!(world.streams[at].got == bytes);
}

#[test]
fn r38_empty_packets_pile_nothing_up() {
    let mut world = World::new();
    let at = world.open();
    for _ in 0..20_000 {
        let h = world.streams[at].guest.payload(0);
        world.send(&h, &[]);
    }
    world.turns(10);
    assert_eq!(world.shard.port(world.port).counters().bytes_copied, 0);
    world.exchange(at, 10_000);
}

#[test]
fn r44_a_guest_speaks_for_itself_only() {
    let mut world = World::new();
    let wrong = [0, 1, 2, 4, 5, u64::from(u32::MAX), CID | 1 << 32, u64::MAX];
    let mut sent = 0;
    for (src, dst) in wrong
        .map(|c| (c, HOST_CID))
        .into_iter()
        .chain(wrong.map(|c| (CID, c)))
    {
        if (src, dst) == (CID, HOST_CID) {
            continue;
        }
        for op in [Op::Request, Op::Rw, Op::Rst] {
            let h = GuestStream::new(9, HOST_PORT).header(op);
            assert!(
                world
                    .vm
                    .driver
                    .send_wire(&WireHeader::new(src, dst, &h), 0, 1)
            );
            sent += 1;
        }
        world.turns(3);
    }
    assert_eq!(
        world
            .shard
            .port(world.port)
            .carrier()
            .counters()
            .dropped_cid,
        sent
    );
    assert_eq!(world.shard.port(world.port).streams(), 0);
    assert!(world.strays.is_empty(), "answered: {:?}", world.strays);
    world.alive();
}

#[test]
fn r45_a_reset_is_not_answered_and_a_reused_pair_lives() {
    let mut world = World::new();
    for port in 0..50 {
        let h = GuestStream::new(port, HOST_PORT).header(Op::Rst);
        world.send(&h, &[]);
    }
    world.turns(10);
    assert!(world.strays.is_empty(), "answered: {:?}", world.strays);
    for _ in 0..50 {
        // Both sides reset at a time, and the guest asks again from the same port in the same breath.
        let at = world.open_from(77);
        let (id, now) = (world.streams[at].id, world.shard.now());
        world
            .shard
            .port_mut(world.port)
            .reset(now, id, ResetReason::Local);
        world.say(at, Op::Rst, 0);
        let again = world.open_from(77);
        world.exchange(again, 500);
        assert!(
            !world.streams[again].reset,
            "the former stream's reset hit the new one"
        );
        world.say(again, Op::Rst, 0);
        world.until(|w| w.shard.port(w.port).streams() == 0);
    }
}

#[test]
fn r49_half_close_each_way_then_a_mebibyte_the_other() {
    let mut world = World::new();
    let bytes = pattern(1 << 20, 3);
    let at = world.open();
    world.say(at, Op::Shutdown, SEND);
    let mut nothing = Vec::new();
    world.until(|w| w.client_reads(at, &mut nothing));
    assert!(nothing.is_empty());
    let mut said = 0;
    world.until(|w| {
        said += if said < bytes.len() {
            w.client_writes(at, &bytes[said..])
        } else {
            0
        };
        w.streams[at].got.len() == bytes.len()
    });
    assert!(world.streams[at].got == bytes);

    let at = world.open();
    world.streams[at]
        .client
        .shutdown(std::net::Shutdown::Write)
        .expect("open");
    world.until(|w| w.streams[at].shut);
    let (mut sent, mut got) = (0, Vec::new());
    world.until(|w| {
        sent += w.guest_writes(at, &bytes[sent..]);
        w.client_reads(at, &mut got);
        got.len() == bytes.len()
    });
    assert!(got == bytes);
}

#[test]
fn r50_a_client_that_left_and_a_guest_that_posts_nothing_cost_no_wake_ups() {
    let mut world = World::new();
    let at = world.open();
    world.stingy = true;
    let bytes = pattern(1 << 20, 1);
    let mut said = 0;
    for _ in 0..500 {
        said += world.client_writes(at, &bytes[said..]);
        world.turn();
    }
    let stream = world.streams.remove(at);
    drop(stream.client);
    world.turns(50);
    let polls = world.shard.port(world.port).counters().polls;
    world.turns(500);
    let now = world.shard.port(world.port).counters().polls;
    assert!(now <= polls + 2, "{} polls for nothing", now - polls);
}

#[test]
fn r51_a_thousand_pauses_under_traffic_and_each_time_it_goes_on() {
    for event_idx in [true, false] {
        let mut world = World::new();
        if !event_idx {
            reboot(
                &mut world,
                DriverConfig {
                    event_idx,
                    ..DriverConfig::LINUX_6_1
                },
            );
        }
        for i in 0..500 {
            let at = world.open();
            world.exchange(at, 100 + i);
            let left = pattern(3000, 9);
            world.guest_writes(at, &left);
            world.vm.driver.tx.publish();
            let bases = world.stop();
            assert_eq!(world.shard.port(world.port).streams(), 0);
            world.resume(bases);
        }
        world.alive();
    }
}

/// The guest's driver resets the device and starts over, in the same memory.
fn reboot(world: &mut World, config: DriverConfig) {
    world.stop();
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
}

#[test]
fn r52_a_client_that_left_costs_its_own_stream() {
    let mut world = World::new();
    let (gone, other) = (world.open(), world.open());
    let (dead, _) = UnixStream::pair().expect("a pair");
    drop(std::mem::replace(&mut world.streams[gone].client, dead));
    let bytes = pattern(2000, 1);
    for _ in 0..20 {
        world.guest_writes(gone, &bytes);
        world.turn();
    }
    world.until(|w| w.streams[gone].reset || w.streams[gone].shut);
    world.exchange(other, 100_000);
}

#[test]
fn r54_bytes_are_exact_in_odd_sizes_both_ways_at_once() {
    let mut world = World::new();
    for len in [1, 2, 43, 44, 45, 4051, 4052, 4095, 4097, 65_537, 3 << 20] {
        let at = world.open();
        world.exchange(at, len);
    }
}

#[test]
fn r55_one_stopped_reader_of_a_hundred_stops_itself() {
    let mut world = World::new();
    let all: Vec<usize> = (0..100).map(|_| world.open()).collect();
    let bytes = pattern(64 << 10, 5);
    let (mut sent, mut got) = (vec![0; 100], vec![Vec::new(); 100]);
    // The first client never reads; the guest always offers it what its credit allows.
    let endless = pattern(1 << 20, 6);
    world.until(|w| {
        sent[0] += w.guest_writes(all[0], &endless[sent[0]..]);
        for i in 1..100 {
            sent[i] += w.guest_writes(all[i], &bytes[sent[i]..]);
            w.client_reads(all[i], &mut got[i]);
        }
        got[1..].iter().all(|g| g.len() == bytes.len())
    });
    assert!(got[1..].iter().all(|g| *g == bytes));
    assert!(sent[0] < endless.len(), "it stopped");
}

#[test]
fn r56_message_sockets_are_refused_in_their_own_type() {
    let mut world = World::new();
    for flags in [0, 1, 2, 3] {
        let mut guest = GuestStream::new(55, HOST_PORT);
        let h = PacketHeader {
            kind: 2,
            flags,
            ..guest.header(Op::Request)
        };
        world.send(&h, &[]);
        world.until(|w| w.strays.pop() == Some((55, Op::Rst as u16)));
        assert_eq!(world.shard.port(world.port).streams(), 0);
    }
    world.alive();
}

#[test]
fn r58_closes_resets_and_driver_resets_in_any_order_leave_nothing_and_lose_nothing() {
    let mut world = World::new();
    let mut seed = 58u64;
    let mut random = move |n: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % n
    };
    let bytes = pattern(8000, 4);
    let mut resets = 0;
    for round in 0..400u64 {
        let at = world.open();
        let (mut sent, mut got) = (0, Vec::new());
        for _ in 0..random(20) {
            sent += world.guest_writes(at, &bytes[sent..]);
            world.turns(random(3) as u32);
            world.client_reads(at, &mut got);
        }
        let mut client = world.streams[at].client.try_clone().expect("a descriptor");
        match random(5) {
            0 => {
                let (id, now) = (world.streams[at].id, world.shard.now());
                world
                    .shard
                    .port_mut(world.port)
                    .reset(now, id, ResetReason::Local);
            }
            1 => world.say(at, Op::Rst, 0),
            2 => world.say(at, Op::Shutdown, 3),
            3 => {
                let bases = world.stop();
                world.resume(bases);
            }
            _ => {
                resets += 1;
                reboot(
                    &mut world,
                    [DriverConfig::LINUX_6_1, DriverConfig::LINUX_6_12][round as usize % 2],
                );
            }
        }
        // What the client has is a beginning of what was sent, and then it ends.
        world.until(|_| {
            loop {
                let mut buf = [0; 4096];
                match client.read(&mut buf) {
                    Ok(n @ 1..) => got.extend_from_slice(&buf[..n]),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break false,
                    _ => break true,
                }
            }
        });
        assert!(
            got.len() <= sent && got == bytes[..got.len()],
            "round {round}"
        );
    }
    world.until(|w| w.shard.port(w.port).streams() == 0);
    assert!(resets > 20);
    world.alive();
}

/// Where the second slot lies.
const SLOT: u64 = 0x1_0000_0000;

#[test]
fn memory_added_while_running_is_used_and_memory_replaced_is_not() {
    let mut world = World::new();
    let at = world.open();
    world.exchange(at, 1000);
    let info = |gpa: u64, user: u64, file: &std::fs::File| VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: memory::MEMORY_BYTES as u64,
        userspace_addr: user,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    let main = info(0, world.vm.host_address(0), &world.vm.file);
    for i in 0..20u8 {
        // A new file each time: a host address that was kept would lead into an old one.
        let (_, added) = memory::memfd();
        let user = 0x6000_0000_0000;
        let table = [main, info(SLOT, user, &added)];
        world.vm.frontend.set_mem_table(&table).expect("a table");
        let offset = FileOffset::new(added.try_clone().expect("a descriptor"), 0);
        let ranges = [(GuestAddress(SLOT), memory::MEMORY_BYTES, Some(offset))];
        let slot = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).expect("memory");
        // GET_FEATURES is answered behind the table: from now on the slot is the guest's.
        let frontend = world.vm.frontend.clone();
        let asked = std::thread::spawn(move || frontend.get_features().expect("features"));
        world.until(|_| asked.is_finished());
        asked.join().expect("answered");
        let bytes = pattern(3000, i);
        world.until(|w| w.streams[at].guest.credit() >= 3000);
        let h = world.streams[at].guest.payload(3000);
        let mut whole = WireHeader::new(CID, HOST_CID, &h).to_bytes().to_vec();
        whole.extend(&bytes);
        slot.write_slice(&whole, GuestAddress(SLOT + 0x1000))
            .expect("memory");
        let buffers = [
            Buffer {
                addr: SLOT + 0x1000,
                len: HEADER_BYTES as u32 + 7,
            },
            Buffer {
                addr: SLOT + 0x1000 + HEADER_BYTES as u64 + 7,
                len: 2993,
            },
        ];
        assert!(world.vm.driver.send_buffers(&buffers));
        let mut got = Vec::new();
        world.until(|w| {
            w.client_reads(at, &mut got);
            got.len() >= 3000
        });
        assert!(got == bytes, "table {i}");
        world.exchange(at, 2000);
    }
}
