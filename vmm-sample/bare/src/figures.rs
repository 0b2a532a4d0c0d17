//! The host's half of the figures (feature `host`): streams to a guest that serves [`crate::streams`], both sides looking on.
//!
//! A VMM gives the guest a region and runs it; the rest is here, so that it is the same whatever runs the guest.

use std::boxed::Box;
use std::fs::File;
use std::string::String;
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
const BYTES: u64 = 2 * REGION_UNIT;
/// Bytes of a question.
const SMALL: usize = 64;
/// Questions that count, behind a tenth as many that do not.
const TRIPS: usize = 20_000;
/// Bytes of a write, and of all of them.
const PIECE: usize = 64 << 10;
const BULK: usize = 128 << 20;
/// A guest that does nothing is not waited for longer.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the shard looks on before it sleeps: a guest that is busy is never gone for as long.
const LOOK: Duration = Duration::from_millis(1);

/// What runs a guest to its verdict, and returns what it said.
pub type Run = Box<dyn FnOnce() -> anyhow::Result<(Verdict, String)> + Send>;

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Round trips of 64 bytes on an open stream, ns: the middle one, and the 99th of a hundred.
    pub rtt_ns: [u64; 2],
    /// 64 KiB writes on a stream, and all of it back: MiB/s each way.
    pub bulk_mib_s: f64,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [middle, late] = self.rtt_ns;
        write!(
            f,
            "ring and engine in user mode, both sides look on: 64 B there and back {middle} ns (99 of 100 within {late} ns), \
             64 KiB writes echoed at {:.0} MiB/s each way",
            self.bulk_mib_s
        )
    }
}

/// Measures: `load` makes a guest that has a file's first bytes as its region.
///
/// # Errors
/// There is no such guest, it does not attach, or it gives a verdict that is not good.
pub fn measure(load: impl FnOnce(File, u64) -> anyhow::Result<Run>) -> anyhow::Result<Figures> {
    let (memory, fd) = Mapped::memfd(BYTES as usize)?;
    let spec = ring::spec(BYTES as usize).context("room for a region")?;
    let carrier = RingCarrier::host(memory, spec, 1, RingBells::polled())?;
    let guest = load(File::from(fd), BYTES)?;
    let guest = std::thread::spawn(guest);
    let mut host = Host::new(carrier)?;
    let rtt_ns = host.trips()?;
    let bulk_mib_s = host.bulk()?;
    // The guest ends when its session does.
    drop(host);
    let done = guest.join().ok().context("the guest's thread panicked")?;
    let (verdict, said) = done?;
    ensure!(
        verdict == Verdict::Done,
        "the guest's verdict: {verdict:?}, {said}"
    );
    Ok(Figures { rtt_ns, bulk_mib_s })
}

struct Host {
    shard: Shard<RingCarrier>,
    port: PortIndex,
}

impl Host {
    fn new(carrier: RingCarrier) -> anyhow::Result<Self> {
        let mut shard = Shard::new()?;
        shard.busy_poll(LOOK);
        let port = shard.add(carrier, EngineConfig::default(), 7)?;
        let mut host = Self { shard, port };
        host.until(|news| matches!(news, News::Notice(_, Notice::Session { epoch: Some(_) })))
            .context("the guest does not attach")?;
        Ok(host)
    }

    /// Turns until something is told.
    fn until(&mut self, told: impl Fn(&News) -> bool) -> anyhow::Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            self.shard.turn(Some(LOOK))?;
            while let Some(news) = self.shard.poll_news() {
                if told(&news) {
                    return Ok(());
                }
                if let News::Notice(_, Notice::DialFailed { error, .. }) = news {
                    return Err(error.into());
                }
            }
        }
        bail!("nothing in {} s", LIMIT.as_secs())
    }

    /// Dials with a service, and turns until it has ended its stream.
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

    fn trips(&mut self) -> anyhow::Result<[u64; 2]> {
        let times = Arc::default();
        let asker = Asker {
            asked: 0,
            last: Instant::now(),
            times: Arc::clone(&times),
        };
        self.run(Lane::Control, Box::new(asker))?;
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = times.get_mut(TRIPS / 10..).unwrap_or_default();
        counted.sort_unstable();
        let at = |part: usize| counted.get(TRIPS * part / 100).copied();
        Ok([at(50), at(99)].map(Option::unwrap_or_default))
    }

    fn bulk(&mut self) -> anyhow::Result<f64> {
        let mover = Mover {
            piece: vec![0x5a; PIECE],
            sent: 0,
            got: 0,
        };
        let begin = Instant::now();
        self.run(Lane::Bulk, Box::new(mover))?;
        Ok(BULK as f64 / f64::from(1 << 20) / begin.elapsed().as_secs_f64())
    }
}

/// Asks, and asks again when it was answered.
struct Asker {
    asked: u64,
    last: Instant,
    times: Arc<Mutex<Vec<u64>>>,
}

impl Service for Asker {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        match event {
            ServiceEvent::Opened => {}
            ServiceEvent::Data(bytes) if bytes.len() < SMALL => return,
            ServiceEvent::Data(bytes) => {
                let now = Instant::now();
                // Another answer than the question: the stream ends without its figures.
                if bytes.get(..8) != Some(&self.asked.to_le_bytes()) {
                    return io.reset();
                }
                io.take(SMALL);
                let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
                times.push((now - self.last).as_nanos() as u64);
                if times.len() == TRIPS + TRIPS / 10 {
                    return io.finish();
                }
            }
            ServiceEvent::Writable | ServiceEvent::PeerDone => return,
        }
        self.asked += 1;
        let mut question = [0x5a; SMALL];
        question[..8].copy_from_slice(&self.asked.to_le_bytes());
        self.last = Instant::now();
        io.write(&question);
    }
}

/// Sends, and takes all of it back.
struct Mover {
    piece: Vec<u8>,
    sent: usize,
    got: usize,
}

impl Service for Mover {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        if let ServiceEvent::Data(bytes) = event {
            io.take(bytes.len());
            self.got += bytes.len();
            if self.got == BULK {
                return io.finish();
            }
        }
        while self.sent < BULK && io.room() > 0 {
            let n = io.write(&self.piece[..PIECE.min(BULK - self.sent)]);
            if n == 0 {
                break;
            }
            self.sent += n;
        }
        if self.sent < BULK {
            io.ask();
        }
    }
}
