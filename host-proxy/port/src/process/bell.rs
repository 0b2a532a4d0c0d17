//! The guest's bell, and how long a dial takes: what a ring has beside its memory.
//!
//! A guest that the ring cannot interrupt is rung on the stream that it opened to [`BELL_PORT`]; every guest says there how
//! it hears. Only the agent can: the source port is a privileged one.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_channel::carrier::Carrier;
use adit_channel::dial::{DialError, DialRequest};
use adit_channel::hello::{self, Common, Open};
use adit_channel::port::Notice;
use adit_channel::ring::bell::{BELL_PORT, Hears, PING};
use adit_channel::shard::PortIndex;
use adit_channel::sink::Sink;
use adit_engine::{Lane, StreamId, Tick};

use super::{At, KEY_BELL, Process};
use crate::rings::GuestBell;

/// Source ports below this are the agent's.
const PRIVILEGED: u32 = 1024;
/// Dials of each carrier that are measured, once a session.
const PINGS: usize = 9;
const PING_LIMIT: Duration = Duration::from_secs(2);

/// What is known of the guest's end.
pub(super) struct Bell {
    guest: GuestBell,
    /// Our end of its stream.
    heard_on: Option<UnixStream>,
    /// As [`Hears`]; 0: it has not said.
    pub(super) hears: u8,
    ping: Option<Ping>,
    /// Of the ring, of vsock; 0: not measured.
    pub(super) dial_ns: (u64, u64),
}

/// Dials of one carrier, one after the other.
struct Ping {
    at: At,
    began: Instant,
    took: Vec<u64>,
}

impl Bell {
    pub(super) fn new(guest: GuestBell) -> Self {
        Self {
            guest,
            heard_on: None,
            hears: 0,
            ping: None,
            dial_ns: (0, 0),
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
                // Both are measured when both are there.
                rings.bell.ping = None;
                let ring = rings.port;
                self.ping(ring);
                false
            }
            Notice::DialFailed { stream, ref error } => {
                let ping = rings.bell.ping.as_ref();
                let mine = ping.is_some_and(|ping| ping.at == (port, stream));
                if mine {
                    self.pinged(matches!(error, DialError::HelloRefused(_)));
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
                bell.hears = Hears::parse(said[0]).map_or(0, |hears| hears as u8);
                if bell.hears == Hears::Stream as u8 {
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
        rings.bell.hears = 0;
        if let Some(ours) = rings.bell.heard_on.take() {
            self.shard.unwatch(ours.as_fd());
        }
    }

    /// Asks the agent for what it refuses at once, if the port has a session.
    fn ping(&mut self, port: PortIndex) {
        let Ok(service) = PING.parse() else { return };
        let now = self.shard.now();
        let limit = u64::try_from(PING_LIMIT.as_nanos()).unwrap_or(u64::MAX);
        let request = DialRequest {
            port: hello::PORT,
            hello: Some(Open::new(service, Common::default())),
            deadline: Some(Tick(now.0.saturating_add(limit))),
            lane: Lane::Control,
        };
        let Some(rings) = &mut self.rings else { return };
        // Without the ring there is nothing to compare.
        if self.shard.port(rings.port).epoch().is_none() {
            return;
        }
        let took = match rings.bell.ping.take() {
            Some(ping) if ping.at.0 == port => ping.took,
            _ => Vec::with_capacity(PINGS),
        };
        let began = Instant::now();
        if let Ok(stream) = self.shard.port_mut(port).dial(now, request, None) {
            let at = (port, stream);
            rings.bell.ping = Some(Ping { at, began, took });
        }
    }

    fn pinged(&mut self, answered: bool) {
        let (Some(rings), true) = (&mut self.rings, answered) else {
            return;
        };
        let Some(ping) = &mut rings.bell.ping else {
            return;
        };
        let ns = u64::try_from(ping.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        ping.took.push(ns);
        let port = ping.at.0;
        if ping.took.len() < PINGS {
            return self.ping(port);
        }
        ping.took.sort_unstable();
        let middle = ping.took[PINGS / 2];
        rings.bell.ping = None;
        if port == self.port {
            rings.bell.dial_ns.1 = middle;
        } else {
            rings.bell.dial_ns.0 = middle;
            self.ping(self.port);
        }
    }
}
