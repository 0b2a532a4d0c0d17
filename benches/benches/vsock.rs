//! `cargo bench --bench vsock [-- --json]`: the virtio-vsock device and the port above it, in this process with the software
//! guest driver. Needs no root and no daemon. On a shared machine absolute times mean nothing: compare the ratios.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure, median};
use adit_channel::carrier::{Carrier, RxPacket};
use adit_channel::device::{GuestCid, HEADER_BYTES};
use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::Sink;
use adit_engine::{EngineConfig, Kind, Op, PacketHeader};
use adit_testkit::service::{Drain, Echo};
use adit_testkit::session::{Device, active_device};
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};
use virtio_queue::{QueueOwnedT, QueueT};

const ROUNDS: usize = 21;
/// Packets in one measured burst. They fill most of a queue of 128; each has two descriptors, sent through an indirect table.
const BURST: usize = 100;
/// Bursts in a round.
const BURSTS: usize = 200;
const HOST_PORT: u32 = 741;

fn main() {
    let json = std::env::args().any(|a| a == "--json");
    let cid = GuestCid::new(3).expect("a guest's CID");
    for figure in packet_cost(cid) {
        figure.print(json);
    }
    for (name, config) in [
        ("6.1", DriverConfig::LINUX_6_1),
        ("6.12", DriverConfig::LINUX_6_12),
    ] {
        for figure in stream(name == "6.1", config, cid) {
            figure.print(json);
        }
    }
}

fn ns_each(elapsed: Duration, n: usize) -> f64 {
    elapsed.as_nanos() as f64 / n as f64
}

// ---- the device alone

/// Cost of a TX packet with 64 bytes: in our device, and in the bare walk that every device on `virtio-queue` needs at least.
fn packet_cost(cid: GuestCid) -> Vec<Figure> {
    let (mut ours, mut walk, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut driver = Driver::new(memory::anonymous(), cid, DriverConfig::LINUX_6_1);
        let mut device = active_device(&driver, cid);
        // No port handles the session here.
        let _ = device.take_session_change();
        let (took, posting) = bursts(&mut driver, |_| take_packets(&mut device));
        ours.push(took);
        own.push(posting);

        let mut driver = Driver::new(memory::anonymous(), cid, DriverConfig::LINUX_6_1);
        let mut queue = driver.tx.queue();
        let (took, posting) = bursts(&mut driver, |mem| bare_walk(mem, &mut queue));
        walk.push(took);
        own.push(posting);
    }
    vec![
        Figure::alone("TX packet with 64 B, device", "ns", Better::Lower, &ours).beside(
            "virtio-queue walk",
            &walk,
            1.6,
            1.3,
        ),
        Figure::alone(
            "harness: posting and reaping a packet",
            "ns",
            Better::Lower,
            &own,
        ),
    ]
}

/// Returns the time per packet in the device, and in the harness.
fn bursts(driver: &mut Driver, mut device: impl FnMut(&VmMemory) -> usize) -> (f64, f64) {
    let mem = driver.memory().clone();
    let header = PacketHeader {
        src_port: 9,
        dst_port: HOST_PORT,
        kind: Kind::Stream as u16,
        op: Op::Rw as u16,
        ..PacketHeader::default()
    };
    let (mut in_device, mut in_harness) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..BURSTS {
        let begin = Instant::now();
        for _ in 0..BURST {
            assert!(driver.send(&header, &[7; 64], 64), "the queue has room");
        }
        driver.tx.publish();
        let posted = Instant::now();
        assert_eq!(device(&mem), BURST);
        let taken = Instant::now();
        assert_eq!(driver.reap_tx(), BURST);
        in_device += taken - posted;
        in_harness += (posted - begin) + taken.elapsed();
    }
    (
        ns_each(in_device, BURST * BURSTS),
        ns_each(in_harness, BURST * BURSTS),
    )
}

fn take_packets(device: &mut Device) -> usize {
    device.begin();
    let (mut n, mut payload) = (0, [0; 64]);
    while let Some(mut packet) = device.rx().expect("no fault") {
        assert_eq!(packet.read(&mut payload).expect("readable"), 64);
        n += 1;
    }
    device.flush();
    n
}

fn bare_walk(mem: &VmMemory, queue: &mut virtio_queue::Queue) -> usize {
    let (mut n, mut packet) = (0, [0; HEADER_BYTES + 64]);
    // One chain at a time: the iterator borrows the queue that `add_used` needs.
    while let Some(chain) = queue.iter(mem).expect("a ready queue").next() {
        let head = chain.head_index();
        let mut reader = chain.reader(mem).expect("readable");
        reader.read_exact(&mut packet).expect("44 + 64 bytes");
        std::hint::black_box(&packet);
        queue.add_used(mem, head, 0).expect("a used ring");
        n += 1;
    }
    queue.needs_notification(mem).expect("an available ring");
    n
}

// ---- streams through port and shard

/// A guest's stream, connected to a sink on the host.
struct Rig {
    driver: Driver,
    shard: Shard<Device>,
    port: PortIndex,
    guest: GuestStream,
    payload: Vec<u8>,
    /// Payload bytes received, from the first packet on.
    received: usize,
}

impl Rig {
    fn new(config: DriverConfig, cid: GuestCid, sink: Sink) -> Self {
        let driver = Driver::new(memory::anonymous(), cid, config);
        let carrier = active_device(&driver, cid);
        let mut shard = Shard::new().expect("an epoll set");
        let port = shard
            .add(carrier, EngineConfig::default(), 1)
            .expect("a port");
        shard.port_mut(port).listen(HOST_PORT).expect("a free port");
        let mut rig = Self {
            driver,
            shard,
            port,
            guest: GuestStream::new(1000, HOST_PORT),
            payload: Vec::new(),
            received: 0,
        };
        rig.turn();
        rig.open(1000, sink);
        rig
    }

    /// The guest opens a stream from this port; from now on it is the rig's.
    fn open(&mut self, port: u32, sink: Sink) {
        self.guest = GuestStream::new(port, HOST_PORT);
        let request = self.guest.header(Op::Request);
        assert!(self.driver.send(&request, &[], 1));
        self.turn();
        let asked = std::iter::from_fn(|| self.shard.poll_news()).find_map(|news| match news {
            News::Notice(_, Notice::Incoming { stream, .. }) => Some(stream),
            _ => None,
        });
        let now = self.shard.now();
        self.shard
            .port_mut(self.port)
            .accept(now, asked.expect("a request"), Some(sink));
        while self.guest.credit() == 0 {
            self.turn();
            self.receive();
        }
    }

    /// The guest ends its stream at once.
    fn close(&mut self) {
        let reset = self.guest.header(Op::Rst);
        assert!(self.driver.send(&reset, &[], 1));
        self.turn();
    }

    /// The driver kicks, and the shard runs one turn.
    fn turn(&mut self) {
        self.driver.tx.publish();
        self.shard.port_mut(self.port);
        self.shard.turn(Some(Duration::ZERO)).expect("a turn");
        self.driver.reap_tx();
    }

    /// Receives packets; returns their payload bytes.
    fn receive(&mut self) -> usize {
        let mut bytes = 0;
        while let Some(wire) = self.driver.receive(&mut self.payload) {
            assert_ne!(wire.header().op, Op::Rst as u16, "the stream lives");
            self.guest.handle(&wire.header(), self.payload.len());
            bytes += self.payload.len();
        }
        self.received += bytes;
        self.driver.rx.publish();
        if self.guest.owes_credit() {
            let update = self.guest.header(Op::CreditUpdate);
            self.driver.send(&update, &[], 1);
        }
        bytes
    }

    /// Sends a packet if credit and queue allow it.
    fn send(&mut self, payload: &[u8]) -> bool {
        if self.guest.credit() < payload.len() as u32 {
            return false;
        }
        let before = self.guest;
        let header = self.guest.payload(payload.len() as u32);
        let sent = self.driver.send(&header, payload, 4096);
        if !sent {
            self.guest = before;
        }
        sent
    }
}

const BULK_BYTES: usize = 32 << 20;

fn stream(first: bool, config: DriverConfig, cid: GuestCid) -> Vec<Figure> {
    let name = |old: &'static str, new: &'static str| if first { old } else { new };
    let (p50, ratio) = round_trips(config, cid);
    let mut figures = vec![
        Figure::alone(
            name(
                "RTT 64 B p50, inline echo, 6.1 driver",
                "RTT 64 B p50, inline echo, 6.12 driver",
            ),
            "ns",
            Better::Lower,
            &p50,
        ),
        Figure::alone(
            name(
                "RTT 64 B p99/p50, 6.1 driver",
                "RTT 64 B p99/p50, 6.12 driver",
            ),
            "x",
            Better::Lower,
            &ratio,
        ),
    ];
    let (new, warm) = first_message(config, cid);
    let name_of_first = name(
        "first 64 KiB of a new stream, from its opening, 6.1 driver",
        "first 64 KiB of a new stream, from its opening, 6.12 driver",
    );
    let first_message = Figure::alone(name_of_first, "ns", Better::Lower, &new);
    figures.push(first_message.beside("a warm stream", &warm, 1.5, 1.1));
    for (size, inline, socket, back) in [
        (
            4096,
            name(
                "4 KiB guest to inline service, 6.1 driver",
                "4 KiB guest to inline service, 6.12 driver",
            ),
            name(
                "4 KiB guest to socket, 6.1 driver",
                "4 KiB guest to socket, 6.12 driver",
            ),
            name(
                "4 KiB socket to guest, 6.1 driver",
                "4 KiB socket to guest, 6.12 driver",
            ),
        ),
        (
            65536,
            name(
                "64 KiB guest to inline service, 6.1 driver",
                "64 KiB guest to inline service, 6.12 driver",
            ),
            name(
                "64 KiB guest to socket, 6.1 driver",
                "64 KiB guest to socket, 6.12 driver",
            ),
            name(
                "64 KiB socket to guest, 6.1 driver",
                "64 KiB socket to guest, 6.12 driver",
            ),
        ),
    ] {
        let mut rounds = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..ROUNDS / 3 {
            rounds[0].push(upload(
                &mut Rig::new(config, cid, Sink::Inline(Box::new(Drain))),
                size,
            ));
            rounds[1].push(upload_to_socket(config, cid, size));
            rounds[2].push(download_from_socket(config, cid, size));
        }
        for (name, rounds) in [inline, socket, back].into_iter().zip(&rounds) {
            figures.push(Figure::alone(name, "MiB/s", Better::Higher, rounds));
        }
    }
    figures
}

/// Medians of rounds of 2,000 round trips, and p99/p50 of each round.
fn round_trips(config: DriverConfig, cid: GuestCid) -> (Vec<f64>, Vec<f64>) {
    let mut rig = Rig::new(config, cid, Sink::Inline(Box::new(Echo)));
    let (mut p50s, mut ratios) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut times: Vec<f64> = (0..2000)
            .map(|_| {
                let begin = Instant::now();
                assert!(rig.send(&[7; 64]), "credit for 64 bytes");
                let mut back = 0;
                while back < 64 {
                    rig.turn();
                    back += rig.receive();
                }
                begin.elapsed().as_nanos() as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let p50 = median(&times);
        p50s.push(p50);
        ratios.push(times[times.len() * 99 / 100] / p50);
    }
    (p50s, ratios)
}

/// Medians of rounds: the first 64 KiB that a guest sends on a new stream to an inline service, and the same on a stream that is
/// warm.
fn first_message(config: DriverConfig, cid: GuestCid) -> (Vec<f64>, Vec<f64>) {
    const STREAMS: u32 = 50;
    const MESSAGES: usize = 24;
    let service = || Sink::Inline(Box::new(Drain));
    let mut rig = Rig::new(config, cid, service());
    let message = vec![7; 64 << 10];
    let (mut firsts, mut lasts) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS as u32 {
        let (mut first, mut last) = (Vec::new(), Vec::new());
        for stream in 0..STREAMS {
            rig.close();
            rig.open(2000 + round * STREAMS + stream, service());
            let mut times = (0..MESSAGES).map(|_| {
                let (begin, mut left) = (Instant::now(), &message[..]);
                while !left.is_empty() {
                    let n = left.len().min(rig.guest.credit() as usize);
                    if n > 0 && rig.send(&left[..n]) {
                        left = &left[n..];
                    }
                    rig.turn();
                    rig.receive();
                }
                begin.elapsed().as_nanos() as f64
            });
            first.extend(times.next());
            last.extend(times.last());
        }
        firsts.push(median(&first));
        lasts.push(median(&last));
    }
    (firsts, lasts)
}

fn mib_per_s(bytes: usize, elapsed: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / elapsed.as_secs_f64()
}

fn upload(rig: &mut Rig, size: usize) -> f64 {
    let payload = vec![7; size];
    let begin = Instant::now();
    let mut sent = 0;
    while sent < BULK_BYTES {
        // As Linux does: what does not fit the window is sent in smaller packets.
        let mut n = size;
        while n > 0 && sent < BULK_BYTES {
            n = size.min(rig.guest.credit() as usize);
            if n == 0 || !rig.send(&payload[..n]) {
                break;
            }
            sent += n;
        }
        rig.turn();
        rig.receive();
    }
    mib_per_s(sent, begin.elapsed())
}

/// A thread reads the socket and discards the data.
fn upload_to_socket(config: DriverConfig, cid: GuestCid, size: usize) -> f64 {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let reader = std::thread::spawn(move || {
        let mut buf = vec![0; 256 << 10];
        while theirs.read(&mut buf).is_ok_and(|n| n > 0) {}
    });
    let mut rig = Rig::new(config, cid, Sink::Fd(ours.into()));
    let rate = upload(&mut rig, size);
    drop(rig);
    reader.join().expect("the reader ends");
    rate
}

/// A thread writes to the socket whenever it has room.
fn download_from_socket(config: DriverConfig, cid: GuestCid, size: usize) -> f64 {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let writer = std::thread::spawn(move || {
        let buf = vec![7; size];
        let mut left = BULK_BYTES;
        while left > 0 && theirs.write_all(&buf[..size.min(left)]).is_ok() {
            left = left.saturating_sub(size);
        }
    });
    let mut rig = Rig::new(config, cid, Sink::Fd(ours.into()));
    let begin = Instant::now();
    while rig.received < BULK_BYTES {
        rig.turn();
        rig.receive();
    }
    let rate = mib_per_s(rig.received, begin.elapsed());
    writer.join().expect("the writer ends");
    rate
}
