//! The host's side of the figures (feature `host`): streams to a guest that serves [`crate::streams`]. Both sides poll.
//!
//! A VMM gives the guest a region and runs it. The rest is here, so that every VMM measures the same.
//!
//! On a busy machine both sides may have to share a processor. A round trip then takes milliseconds, not microseconds. So each
//! measurement ends after `MEASURE_MAX` with what it has, and only a guest that does not answer at all is an error.

use std::boxed::Box;
use std::fs::File;
use std::string::String;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::vec;
use std::vec::Vec;

use adit_channel::dial::DialRequest;
use adit_channel::port::Notice;
use adit_channel::ring::{self, RingBells, RingCarrier};
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::{Service, ServiceEvent, Sink, StreamIo};
use adit_engine::{EngineConfig, Lane};
use adit_ringbuf::Mapped;
use anyhow::{Context, bail, ensure};

use crate::abi::{REGION_UNIT, Verdict};
use crate::streams::PORT;

/// Bytes of the region.
const REGION_BYTES: u64 = 2 * REGION_UNIT;
/// Bytes of one message of a round trip.
const MESSAGE_BYTES: usize = 64;
/// Round trips at most.
const TRIPS: usize = 22_000;
/// The first of so many parts of the round trips is not counted: caches and windows are cold.
const WARM_UP: usize = 11;
/// Bytes of one write.
const WRITE_BYTES: usize = 64 << 10;
/// Bytes that are written in all, at most.
const BULK_BYTES: usize = 128 << 20;
/// Longest time of one measurement.
const MEASURE_MAX: Duration = Duration::from_secs(5);
/// A guest that answers nothing for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// How long the shard polls before it sleeps, and how long it sleeps. A busy guest answers within this time, so the shard does
/// not sleep while it measures.
const POLL: Duration = Duration::from_millis(1);

/// Runs a guest to its verdict, and returns the verdict and the guest's text.
pub type Run = Box<dyn FnOnce() -> anyhow::Result<(Verdict, String)> + Send>;

/// The results.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Round trips of 64 bytes on an open stream, ns: median and 99th percentile.
    pub rtt_ns: [u64; 2],
    /// 64 KiB writes on a stream that are all echoed: MiB/s in each direction.
    pub bulk_mib_s: f64,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [median, p99] = self.rtt_ns;
        write!(
            f,
            "ring and engine in user mode, both sides poll: 64 B there and back {median} ns (99 of 100 within {p99} ns), \
             64 KiB writes echoed at {:.0} MiB/s each way",
            self.bulk_mib_s
        )
    }
}

/// Measures. `load` makes a guest whose region is the file's first bytes, as many as its second argument says.
///
/// # Errors
/// There is no guest, it does not attach or answer, or its verdict is not [`Verdict::Done`].
pub fn measure(load: impl FnOnce(File, u64) -> anyhow::Result<Run>) -> anyhow::Result<Figures> {
    let (memory, fd) = Mapped::memfd(REGION_BYTES as usize)?;
    let spec = ring::spec(REGION_BYTES as usize).context("the region is too small for a ring")?;
    let carrier = RingCarrier::host(memory, spec, 1, RingBells::polled())?;
    let guest = load(File::from(fd), REGION_BYTES)?;
    let guest = std::thread::spawn(guest);
    let mut host = Host::new(carrier)?;
    let rtt_ns = host.round_trips()?;
    let bulk_mib_s = host.bulk()?;
    // Ends the session, and with it the guest.
    drop(host);
    let done = guest.join().ok().context("the guest's thread panicked")?;
    let (verdict, text) = done?;
    ensure!(
        verdict == Verdict::Done,
        "the guest's verdict: {verdict:?}, {text}"
    );
    Ok(Figures { rtt_ns, bulk_mib_s })
}

struct Host {
    shard: Shard<RingCarrier>,
    port: PortIndex,
    /// Bytes that came back from the guest: while they grow, the guest is not silent.
    echoed: Arc<AtomicUsize>,
}

impl Host {
    fn new(carrier: RingCarrier) -> anyhow::Result<Self> {
        let mut shard = Shard::new()?;
        shard.busy_poll(POLL);
        let port = shard.add(carrier, EngineConfig::default(), 7)?;
        let echoed = Arc::default();
        let mut host = Self {
            shard,
            port,
            echoed,
        };
        host.until(|news| matches!(news, News::Notice(_, Notice::Session { epoch: Some(_) })))
            .context("the guest does not attach")?;
        Ok(host)
    }

    /// Runs the shard until it reports what is wanted.
    fn until(&mut self, wanted: impl Fn(&News) -> bool) -> anyhow::Result<()> {
        let (mut before, mut answered) = (self.echoed(), Instant::now());
        loop {
            self.shard.turn(Some(POLL))?;
            while let Some(news) = self.shard.poll_news() {
                if wanted(&news) {
                    return Ok(());
                }
                if let News::Notice(_, Notice::DialFailed { error, .. }) = news {
                    return Err(error.into());
                }
            }
            if self.echoed() != before {
                (before, answered) = (self.echoed(), Instant::now());
            } else if answered.elapsed() >= SILENCE_MAX {
                bail!("nothing came from the guest for {SILENCE_MAX:?}");
            }
        }
    }

    fn echoed(&self) -> usize {
        self.echoed.load(Ordering::Relaxed)
    }

    /// Dials with a service, and runs the shard until the service has ended its stream.
    fn run(&mut self, lane: Lane, service: Box<dyn Service>) -> anyhow::Result<()> {
        let request = DialRequest {
            port: PORT,
            hello: None,
            deadline: None,
            lane,
        };
        let now = self.shard.now();
        let port = self.shard.port_mut(self.port);
        let dialled = port.dial(now, request, Some(Sink::Inline(service)))?;
        self.until(|news| {
            matches!(news, News::Notice(_, Notice::Closed { stream, .. }) if *stream == dialled)
        })
    }

    fn round_trips(&mut self) -> anyhow::Result<[u64; 2]> {
        let times = Arc::default();
        let begun = Instant::now();
        let asker = Asker {
            asked: 0,
            begun,
            last: begun,
            times: Arc::clone(&times),
            echoed: Arc::clone(&self.echoed),
        };
        self.run(Lane::Control, Box::new(asker))?;
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        let warm_up = times.len() / WARM_UP;
        let counted = times.get_mut(warm_up..).unwrap_or_default();
        counted.sort_unstable();
        let at = |percent: usize| counted.get(counted.len() * percent / 100).copied();
        Ok([at(50), at(99)].map(Option::unwrap_or_default))
    }

    fn bulk(&mut self) -> anyhow::Result<f64> {
        let before = self.echoed();
        let begun = Instant::now();
        let mover = Mover {
            piece: vec![0x5a; WRITE_BYTES],
            begun,
            goal: BULK_BYTES,
            sent: 0,
            got: 0,
            echoed: Arc::clone(&self.echoed),
        };
        self.run(Lane::Bulk, Box::new(mover))?;
        let mib = (self.echoed() - before) as f64 / f64::from(1 << 20);
        Ok(mib / begun.elapsed().as_secs_f64())
    }
}

/// Sends one message, waits for its echo, and repeats.
struct Asker {
    asked: u64,
    begun: Instant,
    /// When the last message was sent.
    last: Instant,
    times: Arc<Mutex<Vec<u64>>>,
    echoed: Arc<AtomicUsize>,
}

impl Service for Asker {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        match event {
            ServiceEvent::Opened => {}
            ServiceEvent::Data(bytes) if bytes.len() < MESSAGE_BYTES => return,
            ServiceEvent::Data(bytes) => {
                let now = Instant::now();
                // The echo of another message: the measurement is wrong, so the stream ends without it.
                if bytes.get(..8) != Some(&self.asked.to_le_bytes()) {
                    return io.reset();
                }
                io.take(MESSAGE_BYTES);
                self.echoed.fetch_add(MESSAGE_BYTES, Ordering::Relaxed);
                let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
                times.push((now - self.last).as_nanos() as u64);
                if times.len() == TRIPS || now - self.begun >= MEASURE_MAX {
                    return io.finish();
                }
            }
            ServiceEvent::Writable | ServiceEvent::PeerDone => return,
        }
        self.asked += 1;
        let mut message = [0x5a; MESSAGE_BYTES];
        message[..8].copy_from_slice(&self.asked.to_le_bytes());
        self.last = Instant::now();
        io.write(&message);
    }
}

/// Writes as fast as there is room, and reads all of it back.
struct Mover {
    piece: Vec<u8>,
    begun: Instant,
    /// How many bytes to send.
    goal: usize,
    sent: usize,
    got: usize,
    echoed: Arc<AtomicUsize>,
}

impl Service for Mover {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        if let ServiceEvent::Data(bytes) = event {
            io.take(bytes.len());
            self.got += bytes.len();
            self.echoed.fetch_add(bytes.len(), Ordering::Relaxed);
        }
        // The time is over: only wait for what is on its way.
        if self.got > 0 && self.begun.elapsed() >= MEASURE_MAX {
            self.goal = self.sent;
        }
        if self.got == self.goal {
            return io.finish();
        }
        while self.sent < self.goal && io.room() > 0 {
            let n = io.write(&self.piece[..WRITE_BYTES.min(self.goal - self.sent)]);
            if n == 0 {
                break;
            }
            self.sent += n;
        }
        if self.sent < self.goal {
            io.ask();
        }
    }
}
