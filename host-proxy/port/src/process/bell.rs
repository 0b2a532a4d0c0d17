//! The guest's bell, and how long a round trip takes: what a ring has beside its memory.
//!
//! A guest that the ring cannot interrupt is rung on the stream that it opened to [`BELL_PORT`]; every guest says there how
//! it hears. Only the agent can: the source port is a privileged one.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use adit_channel::carrier::Carrier;
use adit_channel::dial::DialRequest;
use adit_channel::hello::{self, Common, Open};
use adit_channel::port::Notice;
use adit_channel::ring::bell::{BELL_PORT, Hears, PING};
use adit_channel::shard::PortIndex;
use adit_channel::sink::{Service, ServiceEvent, Sink, StreamIo};
use adit_engine::{StreamId, Tick};

use super::dials::LANE;
use super::{At, KEY_BELL, Process};
use crate::rings::GuestBell;

/// Source ports below this are the agent's.
const PRIVILEGED: u32 = 1024;
/// Round trips of each carrier that are measured, once a session, and their bytes.
const PINGS: usize = 32;
const PING_BYTES: usize = 64;
const PING_LIMIT: Duration = Duration::from_secs(2);

/// What is known of the guest's end.
pub(super) struct Bell {
    guest: GuestBell,
    /// Our end of its stream.
    heard_on: Option<UnixStream>,
    /// `None`: it has not said.
    pub(super) hears: Option<Hears>,
    ping: Option<Ping>,
    /// Of the ring, of vsock; 0: not measured.
    pub(super) rtt_ns: (u64, u64),
}

/// A stream on which is measured, and what came of it.
struct Ping {
    at: At,
    middle_ns: Arc<AtomicU64>,
}

/// The host's end of it: sends, and takes the time until it has it back.
struct Pinger {
    began: Instant,
    back: usize,
    took: Vec<u64>,
    middle_ns: Arc<AtomicU64>,
}

impl Pinger {
    fn send(&mut self, io: &mut StreamIo<'_>) {
        self.began = Instant::now();
        self.back = 0;
        io.write(&[0x5a; PING_BYTES]);
    }
}

impl Service for Pinger {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        match event {
            ServiceEvent::Opened => self.send(io),
            ServiceEvent::Data(bytes) => {
                io.take(bytes.len());
                self.back += bytes.len();
                if self.back < PING_BYTES {
                    return;
                }
                let ns = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                self.took.push(ns);
                if self.took.len() < PINGS {
                    return self.send(io);
                }
                self.took.sort_unstable();
                self.middle_ns.store(self.took[PINGS / 2], Relaxed);
                io.finish();
            }
            ServiceEvent::Writable | ServiceEvent::PeerDone => {}
        }
    }
}

impl Bell {
    pub(super) fn new(guest: GuestBell) -> Self {
        Self {
            guest,
            heard_on: None,
            hears: None,
            ping: None,
            rtt_ns: (0, 0),
        }
    }
}

impl<C: Carrier> Process<C> {
    /// Handles what is the bell's business; returns whether it was.
    pub(super) fn bell_notice(&mut self, port: PortIndex, notice: &Notice) -> bool {
        let Some(rings) = &mut self.rings else {
            return false;
        };
        match *notice {
            Notice::Session { .. } => {
                // What was measured was another session's.
                rings.bell.ping = None;
                rings.bell.rtt_ns = (0, 0);
                let ring = rings.port;
                self.ping(ring);
                false
            }
            // The agent is there, and listens: it may not have when it attached.
            Notice::Incoming { .. } | Notice::Dialed { .. }
                if port == rings.port && rings.bell.rtt_ns.1 == 0 =>
            {
                self.ping(port);
                false
            }
            Notice::Closed { stream, .. } => {
                let ping = rings.bell.ping.take_if(|ping| ping.at == (port, stream));
                let mine = ping.is_some();
                if let Some(ping) = ping {
                    self.pinged(port, ping.middle_ns.load(Relaxed));
                }
                mine
            }
            Notice::Incoming {
                stream,
                local_port: BELL_PORT,
                peer_port,
            } if port == self.port => {
                self.bell_opened(stream, peer_port);
                true
            }
            _ => false,
        }
    }

    fn bell_opened(&mut self, stream: StreamId, peer_port: u32) {
        let now = self.shard.now();
        let pair = match peer_port < PRIVILEGED {
            true => UnixStream::pair(),
            false => Err(ErrorKind::PermissionDenied.into()),
        };
        let Ok((ours, theirs)) = pair else {
            return self.shard.port_mut(self.port).refuse(now, stream);
        };
        // A newer one replaces the older: the agent was started anew.
        self.bell_ended();
        let sink = Some(Sink::Fd(theirs.into()));
        self.shard.port_mut(self.port).accept(now, stream, sink);
        let watched = ours
            .set_nonblocking(true)
            .and_then(|()| self.shard.watch(ours.as_fd(), KEY_BELL));
        match (watched, &mut self.rings) {
            (Ok(()), Some(rings)) => rings.bell.heard_on = Some(ours),
            _ => tracing::warn!("the guest's bell is not heard"),
        }
    }

    /// Something came on the guest's stream.
    pub(super) fn bell_ready(&mut self) {
        let Some(bell) = self.rings.as_mut().map(|rings| &mut rings.bell) else {
            return;
        };
        let Some(ours) = &bell.heard_on else { return };
        let mut said = [0; 8];
        match { ours }.read(&mut said) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => self.bell_ended(),
            Ok(_) => {
                bell.hears = Hears::parse(said[0]);
                if bell.hears == Some(Hears::Stream) {
                    bell.guest.set(ours.try_clone().ok());
                    // What was rung into the void before.
                    let _ = { ours }.write(&[1]);
                }
            }
        }
    }

    fn bell_ended(&mut self) {
        let Some(rings) = &mut self.rings else { return };
        rings.bell.guest.set(None);
        rings.bell.hears = None;
        if let Some(ours) = rings.bell.heard_on.take() {
            self.shard.unwatch(ours.as_fd());
        }
    }

    /// Has the agent send back what is sent, if the port has a session.
    fn ping(&mut self, port: PortIndex) {
        let Ok(service) = PING.parse() else { return };
        let now = self.shard.now();
        let limit = u64::try_from(PING_LIMIT.as_nanos()).unwrap_or(u64::MAX);
        let request = DialRequest {
            port: hello::PORT,
            hello: Some(Open::new(service, Common::default())),
            deadline: Some(Tick(now.0.saturating_add(limit))),
            // What is shown is what clients' dials have.
            lane: LANE,
        };
        let Some(rings) = &mut self.rings else { return };
        // Without the ring there is nothing to compare.
        if self.shard.port(rings.port).epoch().is_none() {
            return;
        }
        let middle_ns = Arc::<AtomicU64>::default();
        let pinger = Pinger {
            began: Instant::now(),
            back: 0,
            took: Vec::with_capacity(PINGS),
            middle_ns: middle_ns.clone(),
        };
        let sink = Some(Sink::Inline(Box::new(pinger)));
        if let Ok(stream) = self.shard.port_mut(port).dial(now, request, sink) {
            let at = (port, stream);
            rings.bell.ping = Some(Ping { at, middle_ns });
        }
    }

    fn pinged(&mut self, port: PortIndex, middle_ns: u64) {
        let Some(rings) = &mut self.rings else { return };
        // The ring's first round trips are those of an agent that has just started, perhaps in a guest that has: they count
        // for nothing, or vsock's would be of a calmer time.
        let (vsock, ring) = (self.port, rings.port);
        match (port == vsock, rings.bell.rtt_ns.1) {
            (true, _) => {
                rings.bell.rtt_ns.1 = middle_ns;
                self.ping(ring);
            }
            (false, 0) => self.ping(vsock),
            (false, _) => rings.bell.rtt_ns.0 = middle_ns,
        }
    }
}
