//! Keeps the ring attached, for as long as the agent runs.
//!
//! ```text
//! look for a function ── none at all ─► done: vsock
//!    ▲      └── there ─► a bell, if it has no interrupts ─► RingEnd: serve, dial ── the bell ends ─┐
//!    └──────────────────────────── a while later ◄────────────────────────────────────────────────┘
//! ```
//! Sessions that end and begin are the carrier's business; what is done here again is only what it cannot: find the
//! function, and open the stream that rings this guest.

use std::io::{self, Read, Write};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use adit_channel::ring::bell::{BELL_PORT, Hears};

use super::Kept;
use crate::conn::Conn;
use crate::log;
use crate::serve::Server;
use crate::transport::ring::{RingEnd, carrier};
use crate::transport::{Listen, Transport, Vsock};

/// How long until the ring is looked for again, and twice as long each time that it was not there, or not for long.
const AGAIN: Duration = Duration::from_millis(10);
const AGAIN_MAX: Duration = Duration::from_secs(5);
/// One that lasted so long is looked for at once.
const LASTED: Duration = Duration::from_secs(1);
/// How long until a host that has forgotten is told again how we hear.
const TELL_AGAIN: Duration = Duration::from_millis(200);
/// How long after the agent's start a ring that may be there is waited for, and how often it is looked for.
const EXPECTED: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);
/// Stack of the threads here.
const STACK_BYTES: usize = 256 << 10;

/// The ring that is attached now, or may be.
#[derive(Clone)]
pub struct Link {
    end: Arc<Mutex<Option<Arc<RingEnd>>>>,
    /// When the agent's first streams wait for it no longer.
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
struct Running {
    end: Arc<RingEnd>,
    /// The stream on which the host was told how we hear.
    said: Option<Conn>,
    /// Tells when nobody hears the host any more.
    deafened: Option<Receiver<()>>,
    _kept: Kept,
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<RingEnd>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dials over the ring. Where one is expected, what is dialled first waits a while for it: it stays where it begins.
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
    /// There is no thread to be had.
    pub fn start(&self, server: Arc<Server>) -> io::Result<()> {
        let link = self.clone();
        let run = move || link.run(&server);
        let thread = thread::Builder::new().name("ring-link".into());
        thread.stack_size(STACK_BYTES).spawn(run).map(drop)
    }

    fn run(&self, server: &Arc<Server>) {
        let mut again = Again::default();
        // What is said once is not said again for as long as it is so.
        let mut said = String::new();
        while super::present() {
            let begin = Instant::now();
            if let Ok(running) = attach(&mut said) {
                said.clear();
                self.serve(running, server);
            }
            thread::sleep(again.wait(begin.elapsed()));
        }
    }

    /// Serves until nobody hears the host.
    fn serve(&self, running: Running, server: &Arc<Server>) {
        let listener = match running.end.streams() {
            Ok(listener) => listener,
            Err(e) => return log::event("ring-failed", &[("error", &e)]),
        };
        *self.lock() = Some(running.end.clone());
        let server = server.clone();
        let accept = thread::Builder::new().name("ring-accept".into());
        let accepting = accept.stack_size(STACK_BYTES).spawn(move || {
            // It fails when the ring's end is dropped.
            while let Ok(incoming) = listener.accept() {
                // One that fails was given up by the host.
                let _ = incoming.accept().map(|stream| server.admit(stream));
            }
        });
        match &running.deafened {
            _ if accepting.is_err() => log::event("ring-failed", &[("error", &"no thread")]),
            Some(deafened) => {
                let _ = deafened.recv();
                log::event("ring-ended", &[("why", &"the host's bell has ended")]);
            }
            None => say_again(running.said),
        }
        *self.lock() = None;
    }
}

/// How long until the ring is looked for again.
struct Again(Duration);

impl Default for Again {
    fn default() -> Self {
        Self(AGAIN)
    }
}

impl Again {
    /// It was there for so long, or was not.
    fn wait(&mut self, lasted: Duration) -> Duration {
        if lasted >= LASTED {
            self.0 = AGAIN;
        }
        let next = (self.0 * 2).min(AGAIN_MAX);
        std::mem::replace(&mut self.0, next)
    }
}

/// Tells the host again how we hear, whenever it has forgotten: for ever.
fn say_again(mut said: Option<Conn>) {
    loop {
        match said.take() {
            // It says nothing: what comes is the end.
            Some(conn) => drop((&conn).read(&mut [0])),
            None => thread::sleep(AGAIN_MAX),
        }
        thread::sleep(TELL_AGAIN);
        said = tell(Hears::Interrupts).ok();
    }
}

/// Takes the function, has the host ring it, and asks for a session.
fn attach(said: &mut String) -> io::Result<Running> {
    let mut device = super::find(said).ok_or(io::ErrorKind::NotFound)?;
    let bell = tell(match device.hears() {
        Hears::Nothing => Hears::Stream,
        hears => hears,
    });
    let (mut conn, mut deafened) = (None, None);
    match bell {
        Ok(stream) if device.hears() == Hears::Nothing => {
            deafened = Some(device.hear(stream)?);
        }
        Ok(stream) => conn = Some(stream),
        // Deaf, it would have to look on for ever: the ring waits until vsock is back.
        Err(e) if device.hears() == Hears::Nothing => return Err(e),
        // The host shows less.
        Err(_) => {}
    }
    let function = device.function.clone();
    let hears = device.hears();
    let (memory, bells, kept) = device.split();
    let end = RingEnd::start(carrier(memory, bells).map_err(io::Error::other)?)?;
    let hears = format!("{hears:?}").to_lowercase();
    log::event("ring", &[("function", &function), ("hears", &hears)]);
    Ok(Running {
        end: Arc::new(end),
        said: conn,
        deafened,
        _kept: kept,
    })
}

/// Tells the host how we hear, on a stream that rings us where nothing else does.
fn tell(hears: Hears) -> io::Result<Conn> {
    let stream = Vsock.dial_host_at(BELL_PORT)?;
    (&stream).write_all(&[hears as u8])?;
    Ok(stream)
}

/// Vsock, and the ring where it is attached.
pub struct Carriers<T> {
    /// What is always there.
    pub vsock: T,
    /// What may be.
    pub ring: Link,
}

impl<T: Transport> Transport for Carriers<T> {
    fn listen(&self) -> io::Result<Box<dyn Listen>> {
        self.vsock.listen()
    }

    fn dial_host(&self) -> io::Result<Conn> {
        // Not attached, or it ended: the host is there all the same.
        self.ring.dial_host().or_else(|_| self.vsock.dial_host())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_back_within_a_second_is_found_within_a_second() {
        let (mut again, at) = (Again::default(), Duration::ZERO);
        // Its bell ended; it is looked for at once, and again and again.
        for back in (0..1000).map(Duration::from_millis) {
            let mut now = again.wait(LASTED);
            while now < back {
                now += again.wait(at);
            }
            assert!(now - back <= back.max(AGAIN) + AGAIN, "{back:?}: {now:?}");
        }
        // One that goes as soon as it has come is no reason to hurry.
        let waits: Vec<_> = (0..12).map(|_| again.wait(LASTED / 2)).collect();
        assert_eq!(waits.last(), Some(&AGAIN_MAX));
        assert!(waits.is_sorted());
    }
}
