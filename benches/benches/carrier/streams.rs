//! Streams between inline services: the fastest way to use a stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use adit_benches::duel::{self, Home, check, stamp};
use adit_channel::dial::DialRequest;
use adit_channel::port::Notice;
use adit_channel::ring::{RingBells, RingCarrier, spec};
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::{Service, ServiceEvent, Sink, StreamIo};
use adit_engine::{EngineConfig, Lane};
use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;
use adit_ringbuf_io::attach::Bells;
use adit_testkit::service::Echo;

use super::{BULK, SMALL};

/// The port that the far side listens on.
pub const PORT: u32 = 741;
const BYTES: usize = 4 << 20;
/// Longest turn of a shard: after each turn it is checked whether the work is done.
pub const TURN_MAX: Duration = Duration::from_millis(20);

/// Both ends of a region, each for a process.
pub fn carriers() -> (RingCarrier, RingCarrier) {
    let (near, fd) = Mapped::memfd(BYTES).expect("memory");
    let far = Mapped::from_memfd(fd, BYTES).expect("memory");
    let bells = Bells::new().expect("doorbells");
    let theirs = RingBells::of_guest(bells.try_clone().expect("doorbells"));
    let spec = spec(BYTES).expect("room");
    let host = RingCarrier::host(near, spec, 1, RingBells::of_host(bells));
    let guest = RingCarrier::guest(far, 1 << 20, Features::NONE, theirs);
    (host.expect("a region"), guest.expect("a region"))
}

/// A shard with one port. It belongs to one process.
pub type Side = (Shard<RingCarrier>, PortIndex);

/// Makes both sides before they are pinned: a shard that sees only one processor does not poll.
pub fn sides() -> (Side, Side) {
    let (near, far) = carriers();
    (shard(near), shard(far))
}

fn shard(carrier: RingCarrier) -> Side {
    let mut shard = Shard::new().expect("an epoll set");
    shard.busy_poll(Duration::from_millis(1));
    let port = shard.add(carrier, EngineConfig::default(), 7);
    (shard, port.expect("a port"))
}

/// Dials with a service, and runs the shard until `done`.
fn run_near((mut shard, port): Side, lane: Lane, service: Box<dyn Service>, done: &AtomicBool) {
    let mut service = Some(service);
    while !done.load(Ordering::Relaxed) {
        shard.turn(Some(TURN_MAX)).expect("a turn");
        while let Some(news) = shard.poll_news() {
            if let News::Notice(_, Notice::Session { epoch: Some(_) }) = news {
                let request = DialRequest {
                    port: PORT,
                    hello: None,
                    deadline: None,
                    lane,
                };
                let now = shard.now();
                let sink = service.take().map(Sink::Inline);
                let dialled = shard.port_mut(port).dial(now, request, sink);
                dialled.expect("a session");
            }
        }
    }
}

/// Accepts one stream with a service, and runs the shard until `done`.
fn run_far((mut shard, port): Side, service: Box<dyn Service>, done: &AtomicBool) {
    shard.port_mut(port).listen(PORT).expect("free");
    let mut service = Some(service);
    let mut ended = false;
    while !ended && !done.load(Ordering::Relaxed) {
        shard.turn(Some(TURN_MAX)).expect("a turn");
        while let Some(news) = shard.poll_news() {
            match news {
                News::Notice(_, Notice::Incoming { stream, .. }) => {
                    let now = shard.now();
                    let sink = service.take().map(Sink::Inline);
                    shard.port_mut(port).accept(now, stream, sink);
                }
                News::Notice(_, Notice::Closed { .. } | Notice::Session { epoch: None }) => {
                    ended = true;
                }
                _ => {}
            }
        }
    }
}

/// Writes a message whenever it fits directly into a packet.
struct Source {
    message: Vec<u8>,
    sent: usize,
    count: usize,
}

impl Service for Source {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        if let ServiceEvent::PeerDone = event {
            return;
        }
        if self.sent < self.count && io.straight() > 0 {
            stamp(&mut self.message, self.sent);
            io.write(&self.message);
            self.sent += 1;
        }
        if self.sent < self.count {
            io.ask();
        }
    }
}

/// Puts messages of [`BULK`] bytes together, piece by piece, and checks the number at both ends of each.
#[derive(Default)]
pub struct Pieces {
    ends: [u8; 16],
    filled: usize,
    /// Number of complete messages.
    pub got: usize,
}

impl Pieces {
    /// Takes bytes up to the end of a message. Returns true if the message is complete.
    pub fn completes(&mut self, bytes: &mut &[u8]) -> bool {
        let n = bytes.len().min(BULK - self.filled);
        // Looks for the message's first eight bytes and last eight bytes.
        for (at, end) in [(0, 0), (BULK - 8, 8)] {
            let (from, to) = (at.max(self.filled), (at + 8).min(self.filled + n));
            if from < to {
                let into = &mut self.ends[end + from - at..end + to - at];
                into.copy_from_slice(&bytes[from - self.filled..to - self.filled]);
            }
        }
        self.filled += n;
        *bytes = &bytes[n..];
        if self.filled < BULK {
            return false;
        }
        self.filled = 0;
        check(&self.ends, self.got);
        self.got += 1;
        true
    }
}

/// Reads messages, and measures how many come.
struct Drain {
    pieces: Pieces,
    count: usize,
    begin: Instant,
    rate: Arc<std::sync::Mutex<f64>>,
    done: Arc<AtomicBool>,
}

impl Service for Drain {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        let ServiceEvent::Data(mut bytes) = event else {
            return;
        };
        io.take(bytes.len());
        while self.pieces.completes(&mut bytes) {
            let (got, warm) = (self.pieces.got, self.count / 8);
            if got == warm {
                self.begin = Instant::now();
            }
            if got == self.count {
                let rate = (self.count - warm) as f64 / self.begin.elapsed().as_secs_f64();
                *self.rate.lock().expect("one thread") = rate;
                self.done.store(true, Ordering::Relaxed);
                io.finish();
            }
        }
    }
}

/// Messages per second on one stream.
pub fn bulk() -> Vec<f64> {
    let (near, far) = sides();
    let count = duel::count(BULK);
    let (_, rate) = duel::run(
        Home::Processes,
        || {
            let source = Source {
                message: vec![7; BULK],
                sent: 0,
                count,
            };
            // The near side runs until its process ends: the far side has the clock.
            let over = Arc::new(AtomicBool::new(false));
            let service = Ends {
                inner: source,
                over: over.clone(),
            };
            run_near(near, Lane::Bulk, Box::new(service), &over);
            Vec::new()
        },
        || {
            let (rate, done) = (Arc::default(), Arc::new(AtomicBool::new(false)));
            let drain = Drain {
                pieces: Pieces::default(),
                count,
                begin: Instant::now(),
                rate: Arc::clone(&rate),
                done,
            };
            // The far side ends the stream, and runs until the near side has ended it too.
            run_far(far, Box::new(drain), &AtomicBool::new(false));
            let rate = *rate.lock().expect("one thread");
            vec![rate]
        },
    );
    rate
}

/// Wraps a service: when the peer ends the stream, sets a flag and ends the stream too.
struct Ends<S> {
    inner: S,
    over: Arc<AtomicBool>,
}

impl<S: Service> Service for Ends<S> {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        if let ServiceEvent::PeerDone = event {
            io.finish();
            self.over.store(true, Ordering::Relaxed);
            return;
        }
        self.inner.on_event(event, io);
    }
}

/// Sends one message, waits for its echo, and repeats.
struct Asker {
    message: [u8; SMALL],
    asked: usize,
    last: Instant,
    times: Arc<std::sync::Mutex<Vec<f64>>>,
    done: Arc<AtomicBool>,
}

impl Service for Asker {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        match event {
            ServiceEvent::Opened => self.last = Instant::now(),
            ServiceEvent::Data(bytes) if bytes.len() < SMALL => return,
            ServiceEvent::Data(bytes) => {
                check(&bytes[..SMALL], self.asked - 1);
                io.take(SMALL);
                let now = Instant::now();
                let mut times = self.times.lock().expect("one thread");
                times.push((now - self.last).as_nanos() as f64);
                self.last = now;
                if times.len() == duel::trip_count() {
                    self.done.store(true, Ordering::Relaxed);
                    return;
                }
            }
            _ => return,
        }
        stamp(&mut self.message, self.asked);
        self.asked += 1;
        io.write(&self.message);
    }
}

/// Median and 99th percentile of a round trip, ns.
pub fn trips() -> Vec<f64> {
    let (near, far) = sides();
    let (said, _) = duel::run(
        Home::Processes,
        || {
            let times = Arc::new(std::sync::Mutex::new(Vec::new()));
            let done = Arc::new(AtomicBool::new(false));
            let asker = Asker {
                message: [9; SMALL],
                asked: 0,
                last: Instant::now(),
                times: times.clone(),
                done: done.clone(),
            };
            run_near(near, Lane::Control, Box::new(asker), &done);
            let mut times = times.lock().expect("one thread");
            duel::warm(&mut times)
        },
        || {
            run_far(far, Box::new(Echo), &AtomicBool::new(false));
            Vec::new()
        },
    );
    said
}
