//! The guest's doorbell over vsock, and the measurement of round trips: what a ring needs beside its memory.
//!
//! If the ring's device cannot interrupt the guest, the host writes a byte to the stream that the guest opened to [`BELL_PORT`].
//! Every guest opens that stream, and says there how it is woken. Only the agent can open it: the source port is privileged.

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
/// Round trips that are measured on each carrier, once a session.
const PINGS: usize = 32;
/// Bytes of one message.
const PING_BYTES: usize = 64;
const PING_LIMIT: Duration = Duration::from_secs(2);

/// The guest's end of the doorbell.
pub(super) struct Bell {
    guest: GuestBell,
    /// Our end of the guest's stream.
    heard_on: Option<UnixStream>,
    /// How the guest is woken. `None`: it has not said.
    pub(super) hears: Option<Hears>,
    ping: Option<Ping>,
    /// Of the ring and of vsock; 0: not measured.
    pub(super) rtt_ns: (u64, u64),
}

/// A stream on which round trips are measured, and the result.
struct Ping {
    at: At,
    middle_ns: Arc<AtomicU64>,
}

/// The host's end of that stream: sends, and measures the time until the echo is complete.
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
    /// Handles notices about the doorbell and the measurement. Returns whether this was one.
    pub(super) fn bell_notice(&mut self, port: PortIndex, notice: &Notice) -> bool {
        let Some(rings) = &mut self.rings else {
            return false;
        };
        match *notice {
            Notice::Session { .. } => {
                // The results belong to another session.
                rings.bell.ping = None;
                rings.bell.rtt_ns = (0, 0);
                let ring = rings.port;
                self.ping(ring);
                false
            }
            // The agent listens now. Perhaps it did not yet when the session began.
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
        // A newer stream replaces the older one: the agent was restarted.
        self.bell_ended();
        let sink = Some(Sink::Fd(theirs.into()));
        self.shard.port_mut(self.port).accept(now, stream, sink);
        let watched = ours
            .set_nonblocking(true)
            .and_then(|()| self.shard.watch(ours.as_fd(), KEY_BELL));
        match (watched, &mut self.rings) {
            (Ok(()), Some(rings)) => rings.bell.heard_on = Some(ours),
            _ => tracing::warn!("cannot watch the guest's doorbell stream"),
        }
    }

    /// The guest's stream is readable.
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
                    // Wakes the guest for a doorbell that was sent before this stream existed.
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

    /// Starts a measurement: the agent echoes what is sent. Does nothing unless ring and vsock both have a session.
    fn ping(&mut self, port: PortIndex) {
        let Ok(service) = PING.parse() else { return };
        let now = self.shard.now();
        let limit = u64::try_from(PING_LIMIT.as_nanos()).unwrap_or(u64::MAX);
        let request = DialRequest {
            port: hello::PORT,
            hello: Some(Open::new(service, Common::default())),
            deadline: Some(Tick(now.0.saturating_add(limit))),
            // Measured on the same lane that clients' dials use.
            lane: LANE,
        };
        let Some(rings) = &mut self.rings else { return };
        // The measurement compares ring and vsock, so it needs both. With the ring alone it would never end, and begin again
        // with every dial.
        let has_session = |port| self.shard.port(port).epoch().is_some();
        if !has_session(rings.port) || !has_session(self.port) {
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
        // The ring's first measurement does not count: the agent has just started, and perhaps the guest too. Vsock is
        // measured later, at a calmer time, so then the ring is measured again.
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
