//! Opens, closes and resets from every side at the same time, over a real vhost-user socket (R58). Two application
//! threads share their streams; then there are the shard's thread, the frontend's thread, and a guest that answers,
//! resets streams, and resets its driver at random.

mod common;
#[path = "common/vm.rs"]
mod vm;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use adit_channel::device::{FEATURES, RX_QUEUE, TX_QUEUE};
use adit_channel::dial::DialError;
use adit_channel::shard::{Shard, ShardThread};
use adit_channel::stream::{Dialer, Stream, Target};
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{EngineConfig, How, Op, PacketHeader, ResetReason};
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig, memory};
use common::{cid, pattern};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vm::{PATIENCE, Vm};

/// Number of dials of each application thread.
const ROUNDS: usize = if cfg!(debug_assertions) { 8000 } else { 20_000 };
/// On average the guest's driver is reset once per this many packets.
const PACKETS_A_RESET: u64 = 400;
const GUEST_PORT: u32 = 22;
const BOTH: u32 = 3;
const SENT: usize = 6000;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// A stream on the guest's side.
struct Open {
    stream: GuestStream,
    /// Number of bytes that arrived. They must be a prefix of the pattern; other bytes would come from another stream.
    got: usize,
}

/// The guest: a thread that drives its virtqueues.
struct Guest {
    vm: Vm,
    open: HashMap<u32, Open>,
    random: Random,
    /// Statistics for the end: streams, and resets of the driver.
    streams: usize,
    resets: usize,
    payload: Vec<u8>,
    sent: Vec<u8>,
}

impl Guest {
    fn send(&mut self, h: &PacketHeader, payload: &[u8]) {
        while !self.vm.driver.send(h, payload, 1000) {
            self.publish();
            self.vm.driver.reap_tx();
            std::thread::yield_now();
        }
    }

    fn publish(&mut self) {
        if self.vm.driver.tx.publish() {
            self.vm.kicks[1].write(1).expect("kick");
        }
        if self.vm.driver.rx.publish() {
            self.vm.kicks[0].write(1).expect("kick");
        }
    }

    fn send_op(&mut self, port: u32, op: Op, flags: u32) {
        if let Some(open) = self.open.get_mut(&port) {
            let h = PacketHeader {
                flags,
                ..open.stream.header(op)
            };
            self.send(&h, &[]);
        }
        if op == Op::Rst {
            // Nothing will answer it.
            self.open.remove(&port);
        }
    }

    /// Takes a packet and reacts to it. Returns false if there was none.
    fn step(&mut self) -> bool {
        let mut payload = std::mem::take(&mut self.payload);
        let wire = self.vm.driver.receive(&mut payload);
        if let Some(wire) = &wire {
            let h = wire.header();
            if h.op == Op::Request as u16 {
                let stream = GuestStream::new(GUEST_PORT, h.src_port);
                self.open.insert(h.src_port, Open { stream, got: 0 });
                self.streams += 1;
            }
            if let Some(open) = self.open.get_mut(&h.src_port) {
                open.stream.handle(&h, payload.len());
                let end = open.got + payload.len();
                assert_eq!(
                    self.sent.get(open.got..end),
                    Some(&payload[..]),
                    "bytes of another stream"
                );
                open.got = end;
                self.react(&h);
            }
        }
        self.payload = payload;
        self.publish();
        self.vm.driver.reap_tx();
        if wire.is_some() && self.random.below(PACKETS_A_RESET) == 0 {
            self.reset();
        }
        wire.is_some()
    }

    fn react(&mut self, h: &PacketHeader) {
        let port = h.src_port;
        let ended = h.op == Op::Rst as u16;
        if h.op == Op::Request as u16 {
            let answer = [Op::Response, Op::Rst][usize::from(self.random.below(8) == 0)];
            self.send_op(port, answer, 0);
        }
        if h.op == Op::Shutdown as u16 && h.flags & BOTH == BOTH {
            self.send_op(port, Op::Rst, 0);
        }
        match self.random.below(12) {
            _ if ended => {}
            // Some of these follow directly after the response.
            0 => self.send_op(port, Op::Rst, 0),
            1 => self.send_op(port, Op::Shutdown, BOTH),
            2 => self.send_op(port, Op::Shutdown, 2),
            3 | 4 => {
                let open = self
                    .open
                    .get_mut(&port)
                    .filter(|o| o.stream.credit() >= 500);
                if let Some(h) = open.map(|o| o.stream.payload(500)) {
                    self.send(&h, &[9; 500]);
                }
            }
            _ => self.send_op(port, Op::CreditUpdate, 0),
        }
        if ended {
            self.open.remove(&port);
        }
    }

    /// The driver resets the device and starts again, at any time.
    fn reset(&mut self) {
        self.resets += 1;
        self.open.clear();
        self.vm.enable(false);
        for queue in [0, 1] {
            self.vm.frontend.get_vring_base(queue).expect("base");
        }
        for queue in [RX_QUEUE, TX_QUEUE] {
            for addr in memory::queue_addrs(queue) {
                self.vm.driver.write(addr, &[0; 0x1000]);
            }
        }
        let mem = self.vm.driver.memory().clone();
        let config = [DriverConfig::LINUX_6_1, DriverConfig::LINUX_6_12][self.resets % 2];
        self.vm.driver = Driver::new(mem, cid(), config);
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = FEATURES | protocol;
        self.vm.frontend.set_features(features).expect("offered");
        for queue in [RX_QUEUE, TX_QUEUE] {
            self.vm.set_vring(queue, 0);
        }
        self.vm.enable(true);
    }
}

/// Counts the results of dials.
#[derive(Default)]
struct Tally {
    dialed: AtomicUsize,
    refused: AtomicUsize,
    lost: AtomicUsize,
}

/// Dials, and does random operations on its own stream and on the other thread's.
fn application(dialer: &Dialer, seed: u64, shared: &Mutex<Option<Arc<Stream>>>, tally: &Tally) {
    let mut random = Random(seed);
    let sent = pattern(SENT, 58);
    let target = Target {
        port: GUEST_PORT,
        hello: None,
    };
    let mut rounds = 0;
    while rounds < ROUNDS {
        rounds += 1;
        // Some dials give up early.
        let limit = if random.below(20) == 0 {
            Duration::from_micros(50)
        } else {
            PATIENCE
        };
        let stream = match dialer.dial(&target, limit) {
            Ok(stream) => stream,
            Err(DialError::Refused | DialError::Reset) => {
                tally.refused.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            // The guest's driver is being reset.
            Err(DialError::NoSession) => {
                rounds -= 1;
                std::thread::yield_now();
                continue;
            }
            Err(DialError::Timeout | DialError::Busy) => {
                tally.lost.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Err(e) => panic!("{e}"),
        };
        tally.dialed.fetch_add(1, Ordering::Relaxed);
        stream.set_deadline(Some(Instant::now() + PATIENCE));
        let ours = Arc::new(stream);
        let theirs = shared.lock().expect("no panic").replace(ours.clone());
        // From here on both threads may use both streams. Only one of them writes, so that the bytes are in order.
        let mut written = 0;
        for _ in 0..random.below(4) {
            let n = 1 + random.below(1500) as usize;
            match (&*ours).write(&sent[written..(written + n).min(SENT)]) {
                Ok(n) => written += n,
                Err(_) => break,
            }
        }
        for stream in [Some(ours), theirs].into_iter().flatten() {
            match random.below(6) {
                0 => drop(stream.shutdown(How::Send)),
                1 => drop(stream.shutdown(How::Both)),
                2 => drop(stream.shutdown(How::Receive)),
                3 => {
                    let _ = stream.shutdown(How::Send);
                    stream.set_deadline(Some(Instant::now() + Duration::from_micros(200)));
                    let mut buf = [0; 300];
                    if let Ok(n) = (&*stream).read(&mut buf) {
                        assert!(buf[..n].iter().all(|&b| b == 9));
                    }
                }
                // The thread that drops the last reference resets the stream.
                4 => {
                    if let Ok(stream) = Arc::try_unwrap(stream) {
                        stream.reset(ResetReason::Local);
                    }
                }
                _ => drop(stream),
            }
        }
    }
    shared.lock().expect("no panic").take();
}

fn backend(dir: &tempfile::TempDir) -> (ShardThread, Dialer) {
    let listener = UnixListener::bind(dir.path().join("vhost.sock")).expect("a socket");
    let config = VhostUserConfig::new(listener, cid(), "races");
    let carrier = VhostUserCarrier::new(config).expect("a carrier");
    let mut shard = Shard::new().expect("an epoll set");
    let port = shard
        .add(carrier, EngineConfig::default(), 1)
        .expect("a port");
    let dialer = shard.handle(port).dialer();
    (shard.spawn("races").expect("a thread"), dialer)
}

#[test]
fn r58_opens_closes_and_resets_from_every_side_at_a_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let (_shard, dialer) = backend(&dir);
    let mut guest = Guest {
        vm: Vm::start(&dir.path().join("vhost.sock")),
        open: HashMap::new(),
        random: Random(58),
        streams: 0,
        resets: 0,
        payload: Vec::new(),
        sent: pattern(SENT, 58),
    };
    let (shared, tally) = (Arc::new(Mutex::new(None)), Arc::new(Tally::default()));
    let threads: Vec<JoinHandle<()>> = [1, 2]
        .map(|seed| {
            let (dialer, shared, tally) = (dialer.clone(), shared.clone(), tally.clone());
            std::thread::spawn(move || application(&dialer, seed, &shared, &tally))
        })
        .into();
    while threads.iter().any(|t| !t.is_finished()) {
        if !guest.step() {
            std::thread::yield_now();
        }
    }
    for thread in threads {
        thread.join().expect("an application");
    }
    // No thread has a stream any more, so the host must end the streams that are still open.
    let end = Instant::now() + PATIENCE;
    while !guest.open.is_empty() {
        if !guest.step() {
            assert!(
                Instant::now() < end,
                "{} streams are left over",
                guest.open.len()
            );
            std::thread::yield_now();
        }
    }
    let [dialed, refused, lost] =
        [&tally.dialed, &tally.refused, &tally.lost].map(|n| n.load(Ordering::Relaxed));
    println!(
        "{dialed} dialed, {refused} refused, {lost} lost; {} driver resets",
        guest.resets
    );
    assert_eq!(dialed + refused + lost, 2 * ROUNDS);
    assert!(dialed > ROUNDS / 2 && guest.streams >= dialed && guest.resets > 5);
    // A stream without disturbance works.
    let undisturbed = std::thread::spawn(move || {
        let target = Target {
            port: GUEST_PORT,
            hello: None,
        };
        // The driver may have been reset just now.
        let mut stream = loop {
            match dialer.dial(&target, PATIENCE) {
                Err(DialError::NoSession | DialError::Reset) => std::thread::yield_now(),
                dialed => break dialed.expect("the guest answers"),
            }
        };
        stream.write_all(&pattern(SENT, 58)).expect("open");
        stream.shutdown(How::Send).expect("open");
        stream.set_deadline(Some(Instant::now() + PATIENCE));
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("its end");
    });
    guest.serve_one(&undisturbed);
    undisturbed.join().expect("an application");
}

impl Guest {
    /// Answers, takes all bytes, and ends when the other side does.
    fn serve_one(&mut self, until: &JoinHandle<()>) {
        let mut payload = Vec::new();
        while !until.is_finished() {
            let Some(wire) = self.vm.driver.receive(&mut payload) else {
                self.publish();
                self.vm.driver.reap_tx();
                std::thread::yield_now();
                continue;
            };
            let h = wire.header();
            let port = h.src_port;
            if h.op == Op::Request as u16 {
                let stream = GuestStream::new(GUEST_PORT, port);
                self.open.insert(port, Open { stream, got: 0 });
                self.send_op(port, Op::Response, 0);
            }
            let Some(open) = self.open.get_mut(&port) else {
                continue;
            };
            open.stream.handle(&h, payload.len());
            open.got += payload.len();
            if h.op == Op::Shutdown as u16 {
                assert_eq!(open.got, SENT);
                self.send_op(port, Op::Shutdown, BOTH);
            }
        }
    }
}
