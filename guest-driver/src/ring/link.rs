//! Keeps the ring attached, for as long as the agent runs.
//!
//! ```text
//! look for a function ── none at all ─► done: vsock
//!    ▲      └── found ─► a stream for doorbells, if it has no interrupts ─► RingEnd: serve, dial ── that stream ends ─┐
//!    └──────────────────────────── after a delay ◄─────────────────────────────────────────────────────────────────────┘
//! ```
//! The carrier itself begins a session again when one ends. Only what it cannot do is done here: find the function, and open
//! the stream for doorbells.

use std::io::{self, Read, Write};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use adit_channel::ring::bell::{BELL_PORT, Hears};

use super::DeviceGuard;
use crate::conn::Conn;
use crate::log;
use crate::serve::Server;
use crate::transport::ring::{RingEnd, carrier};
use crate::transport::{Listen, Transport, Vsock};

/// How long until the ring is looked for again; twice as long each time that it was not there, or not for long.
const AGAIN: Duration = Duration::from_millis(10);
const AGAIN_MAX: Duration = Duration::from_secs(5);
/// One that lasted this long is looked for again at once.
const LASTED: Duration = Duration::from_secs(1);
/// How long until a new host is told how doorbells arrive here.
const ANNOUNCE_AGAIN: Duration = Duration::from_millis(200);
/// How long after the agent's start the first streams wait for a ring that may be there, and how often they look.
const EXPECTED: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);
/// Stack of the threads here.
const STACK_BYTES: usize = 256 << 10;

/// The ring that is attached now, or may be.
#[derive(Clone)]
pub struct Link {
    end: Arc<Mutex<Option<Arc<RingEnd>>>>,
    /// Until when the agent's first streams wait for it.
    expected: Option<Instant>,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            end: Arc::default(),
            expected: super::present().then(|| Instant::now() + EXPECTED),
        }
    }
}

/// A ring in use.
struct Attached {
    end: Arc<RingEnd>,
    /// The stream on which the host was told how doorbells arrive here.
    announced: Option<Conn>,
    /// Gets a message when no doorbell arrives any more.
    stream_ended: Option<Receiver<()>>,
    _kept: DeviceGuard,
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<RingEnd>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials over the ring. Where one is expected, the first dials wait for it: a stream stays on its carrier.
    fn dial_host(&self) -> io::Result<Conn> {
        loop {
            let end = self.lock().clone();
            let dialled = match end {
                Some(end) => end.dial_host(),
                None => Err(io::ErrorKind::NotConnected.into()),
            };
            let waits = |e: &io::Error| e.kind() == io::ErrorKind::NotConnected;
            let over = self.expected.is_none_or(|until| Instant::now() >= until);
            if over || !dialled.as_ref().is_err_and(waits) {
                return dialled;
            }
            thread::sleep(LOOK);
        }
    }

    /// Starts to look for a ring, and serves on it whatever the host dials.
    ///
    /// # Errors
    /// There are no threads left.
    pub fn start(&self, server: Arc<Server>) -> io::Result<()> {
        let link = self.clone();
        let run = move || link.run(&server);
        let thread = thread::Builder::new().name("ring-link".into());
        thread.stack_size(STACK_BYTES).spawn(run).map(drop)
    }

    fn run(&self, server: &Arc<Server>) {
        let mut again = Backoff::default();
        // A reason is logged once for as long as it is the same.
        let mut said = String::new();
        while super::present() {
            let begin = Instant::now();
            if let Ok(attached) = attach(&mut said) {
                said.clear();
                self.serve(attached, server);
            }
            thread::sleep(again.wait(begin.elapsed()));
        }
    }

    /// Serves until no doorbell arrives any more.
    fn serve(&self, attached: Attached, server: &Arc<Server>) {
        let listener = match attached.end.listen() {
            Ok(listener) => listener,
            Err(e) => return log::event("ring-failed", &[("error", &e)]),
        };
        *self.lock() = Some(attached.end.clone());
        let server = server.clone();
        let accept = thread::Builder::new().name("ring-accept".into());
        let accepting = accept.stack_size(STACK_BYTES).spawn(move || {
            server.run_on_ring(listener);
        });
        match &attached.stream_ended {
            _ if accepting.is_err() => log::event("ring-failed", &[("error", &"no thread")]),
            Some(stream_ended) => {
                let _ = stream_ended.recv();
                log::event(
                    "ring-ended",
                    &[("why", &"the stream for the host's doorbells has ended")],
                );
            }
            None => keep_announcing(attached.announced),
        }
        *self.lock() = None;
    }
}

/// How long until the ring is looked for again.
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(AGAIN)
    }
}

impl Backoff {
    /// The ring lasted this long; zero: it was not there.
    fn wait(&mut self, lasted: Duration) -> Duration {
        if lasted >= LASTED {
            self.0 = AGAIN;
        }
        let next = (self.0 * 2).min(AGAIN_MAX);
        std::mem::replace(&mut self.0, next)
    }
}

/// Tells the host again how doorbells arrive here, whenever it has started anew.
fn keep_announcing(mut announced: Option<Conn>) {
    loop {
        match announced.take() {
            // The host sends nothing: a read returns at its end.
            Some(conn) => drop((&conn).read(&mut [0])),
            None => thread::sleep(AGAIN_MAX),
        }
        thread::sleep(ANNOUNCE_AGAIN);
        announced = announce(Hears::Interrupts).ok();
    }
}

/// Uses the function, tells the host how doorbells arrive, and asks for a session.
fn attach(said: &mut String) -> io::Result<Attached> {
    let mut device = super::find(said).ok_or(io::ErrorKind::NotFound)?;
    let bell = announce(match device.hears() {
        Hears::Nothing => Hears::Stream,
        hears => hears,
    });
    let (mut conn, mut stream_ended) = (None, None);
    match bell {
        Ok(stream) if device.hears() == Hears::Nothing => {
            stream_ended = Some(device.use_stream(stream)?);
        }
        Ok(stream) => conn = Some(stream),
        // Without doorbells it would have to poll: the ring waits until vsock is back.
        Err(e) if device.hears() == Hears::Nothing => return Err(e),
        // `adit vm show` says less then.
        Err(_) => {}
    }
    let function = device.function.clone();
    let hears = device.hears();
    let (memory, bells, kept) = device.split();
    let end = RingEnd::start(carrier(memory, bells).map_err(io::Error::other)?)?;
    let hears = format!("{hears:?}").to_lowercase();
    log::event("ring", &[("function", &function), ("hears", &hears)]);
    Ok(Attached {
        end: Arc::new(end),
        announced: conn,
        stream_ended,
        _kept: kept,
    })
}

/// Tells the host how doorbells arrive here, on a stream that brings them where nothing else does.
fn announce(hears: Hears) -> io::Result<Conn> {
    let stream = Vsock.dial_host_at(BELL_PORT)?;
    (&stream).write_all(&[hears as u8])?;
    Ok(stream)
}

/// Vsock, and the ring where it is attached.
pub struct Carriers<T> {
    /// Always there.
    pub vsock: T,
    /// There or not.
    pub ring: Link,
}

impl<T: Transport> Transport for Carriers<T> {
    fn listen(&self) -> io::Result<Box<dyn Listen>> {
        self.vsock.listen()
    }

    fn dial_host(&self) -> io::Result<Conn> {
        // Not attached, or it has ended: vsock is there.
        self.ring.dial_host().or_else(|_| self.vsock.dial_host())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_back_within_a_second_is_found_within_a_second() {
        let (mut again, at) = (Backoff::default(), Duration::ZERO);
        // Its stream ended; it is looked for at once, and again and again.
        for back in (0..1000).map(Duration::from_millis) {
            let mut now = again.wait(LASTED);
            while now < back {
                now += again.wait(at);
            }
            assert!(now - back <= back.max(AGAIN) + AGAIN, "{back:?}: {now:?}");
        }
        // A ring that ends at once is looked for less and less often.
        let waits: Vec<_> = (0..12).map(|_| again.wait(LASTED / 2)).collect();
        assert_eq!(waits.last(), Some(&AGAIN_MAX));
        assert!(waits.is_sorted());
    }
}
