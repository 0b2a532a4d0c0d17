//! `cargo bench --bench ring [-- --rounds N] [--realtime] [--json]`: the ring beside its peers, in the same run, round by round.
//!
//! - Two threads pinned to two processors. Ours goes through two mappings of one memfd, as it would between two
//!   processes; rtrb lives in one heap, which costs it nothing.
//! - Every message is copied in, and copied out into another buffer; its number is checked at both ends of it.
//! - The limits of the machine stand beside: how fast lines cross between the two processors, with a flag a slot and
//!   the same copies. No ring that copies is faster.
//! - Ours polls (no events), as the peers do.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use adit_benches::report::{Better, Figure, median};
use adit_ringbuf::{Consumer, Geometry, Mapped, Pace, Producer, RingMem};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Bytes of a ring, and of a peer's.
const RING: usize = 1 << 20;
/// Bytes that one measurement of a bulk size moves.
const BULK: usize = 64 << 20;
/// Messages of one measurement of a small size.
const MESSAGES: usize = 400_000;
/// Round trips of one measurement.
const TRIPS: usize = 20_000;

/// Sends whole messages; waits by looking on.
trait Send1: Send {
    fn send(&mut self, message: &[u8]);
    /// Shows what was held back.
    fn finish(&mut self) {}
}

/// Receives whole messages of a size that is known.
trait Receive1: Send {
    fn receive(&mut self, message: &mut [u8]);
}

struct Ours {
    producer: Producer<Mapped>,
    /// Records that are shown together.
    batch: usize,
    waiting: usize,
}

impl Send1 for Ours {
    fn send(&mut self, message: &[u8]) {
        loop {
            if let Ok(mut grant) = self.producer.reserve(message.len()) {
                grant.write(0, message);
                let _ = grant.commit();
                break;
            }
            let _ = self.producer.publish();
            std::hint::spin_loop();
        }
        self.waiting += 1;
        if self.waiting >= self.batch {
            self.finish();
        }
    }

    fn finish(&mut self) {
        self.waiting = 0;
        let _ = self.producer.publish();
    }
}

struct OursBack {
    consumer: Consumer<Mapped>,
    pace: Pace,
}

impl Receive1 for OursBack {
    fn receive(&mut self, message: &mut [u8]) {
        loop {
            match self.consumer.pop(message).expect("an honest producer") {
                Some(len) => {
                    assert_eq!(len, message.len());
                    self.pace.came();
                    if self.consumer.unreleased() >= RING / 8 {
                        let _ = self.consumer.release();
                    }
                    return;
                }
                None => {
                    let _ = self.consumer.release();
                    self.pace.missed();
                }
            }
        }
    }
}

fn ours(batch: usize, align: usize) -> (Ours, OursBack) {
    let geometry = Geometry::alone(RING, align);
    let (near, fd) = Mapped::memfd(geometry.bytes()).expect("memory");
    let far = Mapped::from_memfd(fd, geometry.bytes()).expect("memory");
    let producer = Producer::new(near, geometry, false).expect("a ring");
    let ours = Ours {
        producer,
        batch,
        waiting: 0,
    };
    let back = OursBack {
        consumer: Consumer::new(far, geometry, false).expect("a ring"),
        pace: Pace::default(),
    };
    (ours, back)
}

impl Send1 for rtrb::Producer<u8> {
    fn send(&mut self, message: &[u8]) {
        while self.push_entire_slice(message).is_err() {
            std::hint::spin_loop();
        }
    }
}

impl Receive1 for rtrb::Consumer<u8> {
    fn receive(&mut self, message: &mut [u8]) {
        while self.pop_entire_slice(message).is_err() {
            std::hint::spin_loop();
        }
    }
}

/// rtrb with whole messages as elements: its best mode for 64 bytes.
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

fn elements() -> (impl Send1, impl Receive1) {
    let (producer, consumer) = rtrb::RingBuffer::new(RING / 64);
    (Elements(producer), Elements(consumer))
}

impl Send1 for PipeWriter {
    fn send(&mut self, message: &[u8]) {
        self.write_all(message).expect("a pipe");
    }
}

impl Receive1 for PipeReader {
    fn receive(&mut self, message: &mut [u8]) {
        self.read_exact(message).expect("a pipe");
    }
}

impl Send1 for UnixStream {
    fn send(&mut self, message: &[u8]) {
        self.write_all(message).expect("a socket");
    }
}

impl Receive1 for UnixStream {
    fn receive(&mut self, message: &mut [u8]) {
        self.read_exact(message).expect("a socket");
    }
}

/// The limit: slots with a flag each, in memory that both map; the copies of a ring, and nothing else of it.
struct Slots {
    mem: Mapped,
    slot: usize,
    at: usize,
}

fn slots(size: usize) -> (Slots, Slots) {
    let slot = (size + 64).next_multiple_of(64);
    let (near, fd) = Mapped::memfd(RING).expect("memory");
    let far = Mapped::from_memfd(fd, RING).expect("memory");
    let [a, b] = [near, far].map(|mem| Slots { mem, slot, at: 0 });
    (a, b)
}

impl Slots {
    fn next(&mut self) -> usize {
        let at = self.at;
        self.at = if at + 2 * self.slot > RING {
            0
        } else {
            at + self.slot
        };
        at
    }
}

impl Send1 for Slots {
    fn send(&mut self, message: &[u8]) {
        let at = self.next();
        while self.mem.load(at) != 0 {
            std::hint::spin_loop();
        }
        self.mem.write(at + 64, message);
        self.mem.store(at, 1);
    }
}

impl Receive1 for Slots {
    fn receive(&mut self, message: &mut [u8]) {
        let at = self.next();
        while self.mem.load(at) != 1 {
            std::hint::spin_loop();
        }
        self.mem.read(at + 64, message);
        self.mem.store(at, 0);
    }
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    // Refused: another set of processors is ours, and the figures are worse for all alike.
    let _ = set.set(cpu);
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// Messages a second, from the first to the last that is received.
fn throughput((mut s, mut r): (impl Send1, impl Receive1), size: usize) -> f64 {
    let count = (BULK / size).clamp(200, MESSAGES);
    let begin = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(0);
            let mut message = vec![7; size];
            begin.wait();
            for n in 0..count as u64 {
                message[..8].copy_from_slice(&n.to_le_bytes());
                message[size - 8..].copy_from_slice(&n.to_le_bytes());
                s.send(&message);
            }
            s.finish();
        });
        let receiver = scope.spawn(|| {
            pin(1);
            let mut message = vec![0; size];
            begin.wait();
            let mut first = Instant::now();
            for n in 0..count as u64 {
                r.receive(&mut message);
                assert_eq!(message[..8], n.to_le_bytes(), "message {n}");
                assert_eq!(message[size - 8..], n.to_le_bytes(), "message {n}");
                if n == 0 {
                    first = Instant::now();
                }
            }
            (count - 1) as f64 / first.elapsed().as_secs_f64()
        });
        receiver.join().expect("every message in order")
    })
}

/// Median and 99th percentile of a round trip, ns.
fn round_trip(
    (mut to, mut there): (impl Send1, impl Receive1),
    (mut from, mut back): (impl Send1, impl Receive1),
    size: usize,
) -> (f64, f64) {
    let begin = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(1);
            let mut message = vec![0; size];
            begin.wait();
            for _ in 0..TRIPS {
                there.receive(&mut message);
                from.send(&message);
                from.finish();
            }
        });
        let near = scope.spawn(|| {
            pin(0);
            let mut message = vec![9; size];
            begin.wait();
            let mut times: Vec<f64> = (0..TRIPS)
                .map(|_| {
                    let sent = Instant::now();
                    to.send(&message);
                    to.finish();
                    back.receive(&mut message);
                    sent.elapsed().as_nanos() as f64
                })
                .collect();
            times.sort_by(f64::total_cmp);
            (times[TRIPS / 2], times[TRIPS * 99 / 100])
        });
        near.join().expect("every message comes back")
    })
}

/// A word with its lines to itself.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU64);

/// The limit of flags alone, ns: there on one line, and back on the same (0) or another (1).
fn lines(back: usize) -> f64 {
    let lines = Arc::new([Line::default(), Line::default()]);
    let far = lines.clone();
    let begin = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(1);
            begin.wait();
            for n in 0..TRIPS as u64 {
                while far[0].0.load(Ordering::Acquire) != 2 * n + 1 {
                    std::hint::spin_loop();
                }
                far[back].0.store(2 * n + 2, Ordering::Release);
            }
        });
        let near = scope.spawn(|| {
            pin(0);
            begin.wait();
            let times = (0..TRIPS as u64).map(|n| {
                let sent = Instant::now();
                lines[0].0.store(2 * n + 1, Ordering::Release);
                while lines[back].0.load(Ordering::Acquire) != 2 * n + 2 {
                    std::hint::spin_loop();
                }
                sent.elapsed().as_nanos() as f64
            });
            median(&times.collect::<Vec<_>>())
        });
        near.join().expect("it comes back")
    })
}

fn pipe() -> (PipeWriter, PipeReader) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    (writer, reader)
}

fn sockets() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("sockets")
}

/// Values of one kind, a round each.
#[derive(Default)]
struct Rounds(std::collections::BTreeMap<(&'static str, usize), Vec<f64>>);

impl Rounds {
    fn add(&mut self, name: &'static str, size: usize, value: f64) {
        self.0.entry((name, size)).or_default().push(value);
    }

    fn of(&self, name: &'static str, size: usize) -> &[f64] {
        self.0.get(&(name, size)).map_or(&[], Vec::as_slice)
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.iter().any(|a| a == "--realtime") {
        adit_benches::realtime::realtime();
    }
    let json = args.iter().any(|a| a == "--json");
    let rounds = args.iter().position(|a| a == "--rounds");
    let rounds = rounds
        .and_then(|i| args.get(i + 1)?.parse().ok())
        .unwrap_or(15);
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        eprintln!("skipped: a ring between two processors needs two");
        return;
    }
    let sizes = [64, 1024, 4096, 16_384, 65_536];
    let mut all = Rounds::default();
    for _ in 0..rounds {
        for size in sizes {
            all.add("ours", size, throughput(ours(1, 8), size));
            all.add("ours, 32 at a time", size, throughput(ours(32, 8), size));
            all.add("rtrb", size, throughput(rtrb::RingBuffer::new(RING), size));
            all.add("pipe", size, throughput(pipe(), size));
            all.add("Unix stream", size, throughput(sockets(), size));
            all.add("cross-core stream", size, throughput(slots(size), size));
        }
        all.add("rtrb elements", 64, throughput(elements(), 64));
        let (p50, p99) = round_trip(ours(1, 64), ours(1, 64), 64);
        all.add("RTT", 64, p50);
        all.add("RTT tail", 64, p99 / p50);
        all.add("RTT rtrb", 64, round_trip(elements(), elements(), 64).0);
        all.add("RTT bound", 64, round_trip(slots(64), slots(64), 64).0);
        all.add("RTT one line", 64, lines(0));
        all.add("RTT two lines", 64, lines(1));
        let (p50, _) = round_trip(ours(1, 64), ours(1, 64), 48);
        all.add("RTT", 48, p50);
    }
    report(&all).iter().for_each(|figure| figure.print(json));
}

fn report(all: &Rounds) -> Vec<Figure> {
    let single = |name| Figure::alone(name, "msgs/s", Better::Higher, all.of("ours", 64));
    let [bytes, elements] = ["rtrb", "rtrb elements"].map(|n| all.of(n, 64));
    let best = if median(bytes) > median(elements) {
        bytes
    } else {
        elements
    };
    let batch = all.of("ours, 32 at a time", 64);
    let mut figures = vec![
        single("64 B, each published alone").beside("rtrb's best", best, 1.2, 1.5),
        single("64 B, each published alone, and sockets").beside(
            "Unix stream",
            all.of("Unix stream", 64),
            60.0,
            60.0,
        ),
        Figure::alone("64 B, 32 at a time", "msgs/s", Better::Higher, batch).beside(
            "rtrb's best",
            best,
            1.25,
            1.45,
        ),
    ];
    for (size, must) in [(1024, 0.93), (4096, 0.95), (16_384, 0.95), (65_536, 0.95)] {
        let of = |name| -> Vec<f64> {
            let scale = size as f64 / 1e9;
            all.of(name, size).iter().map(|n| n * scale).collect()
        };
        let best = ["rtrb", "pipe", "Unix stream"].map(of);
        let best = best
            .into_iter()
            .max_by(|a, b| median(a).total_cmp(&median(b)));
        let ours = of("ours");
        let name = format!("{} KiB", size / 1024);
        figures.push(Figure::alone(&name, "GB/s", Better::Higher, &ours).beside(
            "cross-core stream",
            &of("cross-core stream"),
            must,
            1.0,
        ));
        figures.push(
            Figure::alone(
                format!("{name}, and the best peer"),
                "GB/s",
                Better::Higher,
                &ours,
            )
            .beside(
                "rtrb, pipe or socket",
                &best.unwrap_or_default(),
                0.97,
                1.05,
            ),
        );
    }
    let rtt = |size| {
        Figure::alone(
            format!("RTT {size} B p50"),
            "ns",
            Better::Lower,
            all.of("RTT", size),
        )
    };
    figures.push(rtt(64).beside("flag and payload", all.of("RTT bound", 64), 1.2, 1.08));
    figures.push(rtt(64).beside("rtrb", all.of("RTT rtrb", 64), 1.0, 1.0));
    figures.push(rtt(48).beside("a line each way", all.of("RTT two lines", 64), 1.3, 1.15));
    figures.push(
        Figure::alone(
            "RTT 64 B p99/p50",
            "x",
            Better::Lower,
            all.of("RTT tail", 64),
        )
        .goal(2.0, 1.6),
    );
    figures.push(Figure::alone(
        "limit: one line there and back",
        "ns",
        Better::Lower,
        all.of("RTT one line", 64),
    ));
    figures
}
