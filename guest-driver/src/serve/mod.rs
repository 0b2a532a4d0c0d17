//! The listener: streams that the host dials.
//!
//! `hello open {service}` → the guest's policy allows it → the service opens what is behind it → `accept` or `refuse {why}` → the service's bytes. Which
//! services there are, `services` says.
//!
//! A stream beyond the tunnels' share (`shares`) always gets an answer that says so, even if there is no descriptor left for it.

mod admission;
pub mod agent;
pub mod blob;
pub mod exec;
pub mod files;
pub mod freeze;
mod hand;
mod named;
mod note;
mod ping;
mod serials;
mod services;
mod shares;
mod tcp;

use std::fmt::Display;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use adit_blob::Store;
use adit_channel::hello::{self, Accept, Common, Hello, Open, Refuse};
use adit_channel::refusal::{Refusal, is_shortage};
use adit_channel::stream::Listener;

use self::agent::Agent;
use self::exec::Exec;
use self::files::Files;
use self::freeze::Freeze;
use self::services::Services;
use self::shares::{Shares, busy};
use crate::config::NamedService;
use crate::log;
use crate::policy::Standing;
use crate::transport::{HostStream, Listen};

pub use self::admission::Admission;
pub use self::named::unnamed;
pub use self::shares::CONNS_MAX;
pub use self::tcp::forbidden;

/// How long the listener itself may take to send a refusal.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);
/// How long the host may take to send its hello, and to read our answer.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Characters of a `traceparent`.
const TRACE_LEN: usize = 55;
/// Threads that wait for the next stream of a ring at most, where one has been served.
const TURNS_MAX: usize = 4;
/// Stack of a stream's thread: its buffers are on the heap.
const STACK_BYTES: usize = 128 * 1024;

/// How a `traceparent` ends of which somebody records the trace: its stream is an event.
const RECORDED: &str = "-01";

/// The `traceparent` of a stream, as a W3C trace has it; `-`: the host gave none that is one.
fn trace(open: &Open) -> &str {
    let text = std::str::from_utf8(open.extensions.trace.as_bytes()).unwrap_or_default();
    let is_one = |b: u8| b.is_ascii_digit() || matches!(b, b'a'..=b'f' | b'-');
    match text.len() == TRACE_LEN && text.bytes().all(is_one) {
        true => text,
        false => "-",
    }
}

/// What the agent sends of itself in every hello.
#[derive(Debug)]
pub struct Identity {
    /// A random number for this boot.
    pub boot_nonce: [u8; 16],
    /// The last epoch of the host that was seen.
    pub epoch: AtomicU64,
    /// Which hellos are the host's.
    pub admission: Admission,
}

impl Identity {
    /// Fields of a hello that we send.
    pub fn common(&self) -> Common {
        Common {
            features: 0,
            epoch: self.epoch.load(Ordering::Relaxed),
            boot_nonce: self.boot_nonce,
        }
    }

    /// Remembers the host's epoch.
    pub fn saw(&self, peer: &Common) {
        if peer.epoch != 0 {
            self.epoch.store(peer.epoch, Ordering::Relaxed);
        }
    }
}

/// Serves the host's streams.
pub struct Server {
    services: Services,
    identity: Arc<Identity>,
    active: AtomicUsize,
    shares: Shares,
}

/// Threads that take turns with the streams of a ring.
struct Turns {
    streams: Listener,
    /// How many wait for the next one.
    waiting: AtomicUsize,
}

/// Counts a stream for as long as it lives.
struct Slot(Arc<Server>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Server {
    /// Serves these local TCP ports and no others, keeps in `blobs` what the host sends, and has `agent` follow its orders.
    pub fn new(
        ports: Vec<u16>,
        blobs: Arc<Store>,
        agent: Option<Agent>,
        identity: Arc<Identity>,
    ) -> Arc<Self> {
        let shares = Shares::now();
        Arc::new(Self {
            services: Services::new(ports, blobs, agent, shares),
            identity,
            active: AtomicUsize::new(0),
            shares,
        })
    }

    /// Serves these ports instead, from the next stream on. Streams that are open go on.
    pub fn allow(&self, ports: Vec<u16>) {
        self.services.tcp.allow(ports);
    }

    /// Serves these under their names instead, in the same way.
    pub fn offer(&self, services: Vec<NamedService>) {
        self.services.named.offer(services);
    }

    /// Runs commands, as far as the policy allows.
    pub fn runs(&self, exec: Exec) {
        self.services.runs(exec);
    }

    /// Has files read and written, as far as the policy allows.
    pub fn copies(&self, files: Files) {
        self.services.copies(files);
    }

    /// Has file systems stand still for a while.
    pub fn freezes(&self, freeze: Freeze) {
        self.services.freezes(freeze);
    }

    /// Serves only hellos with the MAC of the host's key, also before the host has given one.
    pub fn require_key(&self, required: bool) {
        self.identity.admission.require(required);
    }

    /// Has this policy decide what the host may dial, from the next stream on.
    pub fn govern(&self, policy: Arc<Standing>) {
        self.services.govern(policy);
    }

    /// Accepts until the listener is gone.
    ///
    /// # Errors
    /// The listener failed for good.
    pub fn run(self: &Arc<Self>, listener: &dyn Listen) -> io::Result<()> {
        // Closed to make room for a stream that then is refused: without it, there would be no descriptor to answer on.
        let mut spare = shares::spare();
        loop {
            match listener.accept() {
                Ok(Some(conn)) => {
                    spare = spare.or_else(shares::spare);
                    if spare.is_some() && !self.shares.exceeded_by(&conn) {
                        self.admit(conn);
                    } else {
                        self.refuse_busy(&conn, "it has no descriptors left");
                    }
                }
                Ok(None) => log::event("stream-refused", &[("why", &"peer is not the host")]),
                Err(e) if e.raw_os_error().is_some_and(is_shortage) => {
                    log::event("accept-failed", &[("error", &e)]);
                    if spare.take().is_none() {
                        // Only the end of something else frees descriptors; to try again at once would spin.
                        thread::sleep(Duration::from_millis(100));
                        spare = shares::spare();
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Serves the streams that the host dials over a ring, until the ring's end is gone.
    ///
    /// Most streams need a thread for their beginning only: so a thread that is done with one waits for the next, and whoever
    /// takes the last place of those who wait has another one wait in its place.
    pub fn run_on_ring(self: &Arc<Self>, streams: Listener) {
        let turns = Arc::new(Turns {
            streams,
            waiting: AtomicUsize::new(1),
        });
        self.take_turns(&turns, usize::MAX);
    }

    /// Until the ring's end is gone, or so many others wait for streams.
    fn take_turns(self: &Arc<Self>, turns: &Arc<Turns>, others: usize) {
        while let Ok(incoming) = turns.streams.accept() {
            let is_last = turns.waiting.fetch_sub(1, Ordering::AcqRel) == 1;
            // If this fails, the host has given the stream up.
            if let Ok(stream) = incoming.accept() {
                match is_last.then(|| self.another_turn(turns)).transpose() {
                    Ok(_) => match self.slot() {
                        Some(_slot) => self.serve(stream),
                        None => self.refuse_full(&stream),
                    },
                    Err(e) => self.refuse_without_thread(&stream, &e),
                }
            }
            if turns.waiting.fetch_add(1, Ordering::AcqRel) >= others {
                turns.waiting.fetch_sub(1, Ordering::AcqRel);
                return;
            }
        }
    }

    fn another_turn(self: &Arc<Self>, turns: &Arc<Turns>) -> io::Result<()> {
        let thread = thread::Builder::new().name("ring-accept".into());
        let (server, its) = (self.clone(), turns.clone());
        turns.waiting.fetch_add(1, Ordering::AcqRel);
        let run = move || server.take_turns(&its, TURNS_MAX);
        let started = thread.stack_size(STACK_BYTES).spawn(run);
        started.map(drop).inspect_err(|_| {
            turns.waiting.fetch_sub(1, Ordering::AcqRel);
        })
    }

    /// A place among the streams; none: there are as many as there may be.
    fn slot(self: &Arc<Self>) -> Option<Slot> {
        let slot = Slot(self.clone());
        (self.active.fetch_add(1, Ordering::Relaxed) < self.shares.streams).then_some(slot)
    }

    fn refuse_full(&self, conn: &impl HostStream) {
        self.refuse_busy(conn, &format!("{} streams are open", self.shares.streams));
    }

    fn refuse_without_thread(&self, conn: &impl HostStream, why: &io::Error) {
        log::event("stream-refused", &[("why", why)]);
        self.refuse_busy(conn, &why.to_string());
    }

    /// Serves one stream on a thread, or refuses it.
    fn admit(self: &Arc<Self>, conn: impl HostStream) {
        let Some(slot) = self.slot() else {
            return self.refuse_full(&conn);
        };
        // Passed to the thread once it runs: if it does not start, the stream is still here and gets an answer.
        let (give, take) = sync_channel(1);
        let started = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Ok(conn) = take.recv() {
                    slot.0.serve(conn);
                }
            });
        match started {
            Ok(_) => drop(give.send(conn)),
            Err(e) => self.refuse_without_thread(&conn, &e),
        }
    }

    /// Refuses a stream as busy without reading its hello.
    fn refuse_busy(&self, conn: &impl HostStream, why: &str) {
        // A peer that does not read the refusal must not keep other streams waiting for long.
        let _ = conn.set_timeout(Some(REFUSAL_LIMIT));
        self.refuse(conn, busy(why));
    }

    fn serve(&self, conn: impl HostStream) {
        let _ = conn.set_timeout(Some(HELLO_LIMIT));
        let open = match hello::read(&mut conn.io()) {
            Ok(Hello::Open(open)) => open,
            Ok(_) => return log::event("hello-refused", &[("error", &"not an open")]),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return,
            Err(e) => return log::event("hello-refused", &[("error", &e)]),
        };
        if let Err(refusal) = self.identity.admission.check(&open) {
            log::event(
                "stream-refused",
                &[("service", &open.service), ("why", &refusal.text())],
            );
            // Whoever it is, it learns nothing of this guest.
            return refuse_as(&conn, Common::default(), refusal);
        }
        self.identity.saw(&open.common);
        let trace = trace(&open);
        let known = match self.services.is_for_the_host(&open) && !conn.is_hosts() {
            true => self.identity.admission.is_hosts(),
            false => Ok(()),
        };
        let (version, run) = match known.and_then(|()| self.services.open(&open)) {
            Ok(opened) => opened,
            Err(refusal) => {
                let fields: [(&str, &dyn Display); 4] = [
                    ("service", &open.service),
                    ("status", &refusal.code()),
                    ("why", &refusal.text()),
                    ("trace", &trace),
                ];
                log::event("stream-refused", &fields);
                return self.refuse(&conn, refusal);
            }
        };
        let features = open.common.features & conn.features();
        let common = Common {
            features,
            ..self.identity.common()
        };
        let accept = Hello::Accept(Accept { common, version });
        if conn.io().write_all(&accept.encode()).is_err() {
            return;
        }
        if trace.ends_with(RECORDED) {
            log::event("stream", &[("service", &open.service), ("trace", &trace)]);
        }
        if let Err(e) = run(conn.speaking(features)) {
            let fields: [(&str, &dyn Display); 3] =
                [("service", &open.service), ("error", &e), ("trace", &trace)];
            log::event("relay-failed", &fields);
        }
    }

    fn refuse(&self, conn: &impl HostStream, refusal: Refusal) {
        refuse_as(conn, self.identity.common(), refusal);
    }
}

fn refuse_as(conn: &impl HostStream, common: Common, refusal: Refusal) {
    let hello = Hello::Refuse(Refuse { common, refusal });
    let _ = conn.io().write_all(&hello.encode());
    let _ = conn.end_sending();
}

#[cfg(test)]
mod tests;
