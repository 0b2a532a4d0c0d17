//! The host's side of one guest over Unix sockets, compatible with Firecracker and Cloud Hypervisor. Tools written for
//! those work with any VMM that links this.
//!
//! ```text
//! host ── connect PATH, "CONNECT 5000\n" ──► dial port 5000 of the guest ── "OK 1073741824\n" ──► its bytes
//! guest ── dials port 7000 ──► connect PATH_7000 ──► its bytes; refused if nothing listens there
//! ```
//! When a stream is open, its socket belongs to the shard, which moves bytes between it and guest memory with one
//! copy.
//!
//! All of this runs on the thread that moves the bytes, so nothing here blocks: not for a client that sends nothing
//! (`clients`), and not for a listener that accepts nothing (`reach`).

mod clients;
mod reach;

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use adit_engine::{EngineConfig, ResetReason, StreamId, Tick};

use crate::carrier::Carrier;
use crate::dial::DialRequest;
use crate::port::Notice;
use crate::shard::{News, PortIndex, Shard};
use crate::sink::Sink;
use crate::socket_path;
#[cfg(feature = "test-util")]
pub use clients::{Asked, asked};
use clients::{Clients, Request};
use reach::{Reach, Reached};

#[cfg(feature = "test-util")]
/// Longest line of a client, with its end.
pub const LINE_MAX: usize = clients::LINE_MAX;
const KEY_LISTENER: u32 = 0;
/// Key of the client with index 0.
const KEY_FIRST: u32 = 1;
/// Time in ns that a guest may take to answer.
const DIAL_LIMIT_NS: u64 = 5_000_000_000;
/// Time in ns during which no client is accepted after the descriptors ran out. Without the pause the loop would spin.
const REST_NS: u64 = 100_000_000;

/// A shard with the guest's `Port`, and the event loop around it.
pub struct Host<C: Carrier> {
    shard: Shard<C>,
    port: PortIndex,
    listener: Option<UnixListener>,
    /// No client is accepted until this time.
    paused_until: Option<Tick>,
    clients: Clients,
    dialing: HashMap<StreamId, UnixStream>,
    reach: Option<Reach>,
}

impl<C: Carrier> Host<C> {
    /// Makes the socket at `uds`. If `uds` is `None`, the host cannot reach the guest, and the guest cannot reach the
    /// host. `seed` must be random, as for [`Shard::add`].
    ///
    /// # Errors
    /// The socket cannot be made ([`socket_path::SocketPathError`] tells why), or this process has no free
    /// descriptors.
    pub fn new(carrier: C, uds: Option<&Path>, seed: u64) -> io::Result<Self> {
        let mut shard = Shard::new()?;
        let port = shard.add(carrier, EngineConfig::default(), seed)?;
        // For each port that the guest dials, `reach` looks for a socket.
        shard.port_mut(port).listen_to_all();
        let listener = uds.map(|path| -> io::Result<_> {
            let listener = socket_path::listen(path)?;
            listener.set_nonblocking(true)?;
            shard.watch(listener.as_fd(), KEY_LISTENER)?;
            Ok(listener)
        });
        Ok(Self {
            listener: listener.transpose()?,
            shard,
            port,
            paused_until: None,
            clients: Clients::default(),
            dialing: HashMap::new(),
            reach: uds.map(Reach::new),
        })
    }

    /// Serves until the process ends. Returns only if the kernel refuses to wait, with the error.
    pub fn run(mut self) -> io::Error {
        loop {
            if let Err(e) = self.turn(None) {
                return e;
            }
        }
    }

    /// Waits once, for at most `limit`, and handles the events.
    fn turn(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let now = self.shard.now();
        let until = |at: Tick| Duration::from_nanos(at.0.saturating_sub(now.0));
        let wait = self.deadline().map(until);
        self.shard.turn(wait.into_iter().chain(limit).min())?;
        while let Some(news) = self.shard.poll_news() {
            match news {
                News::Ready { key: KEY_LISTENER } => self.accept(),
                News::Ready { key } => self.read_request((key - KEY_FIRST) as usize),
                News::Notice(_, notice) => self.notice(notice),
            }
        }
        self.pass_time(self.shard.now());
        Ok(())
    }

    /// The next deadline of this file's own timers.
    fn deadline(&self) -> Option<Tick> {
        let retry = self.reach.as_ref().and_then(Reach::retry_at);
        let all = [self.clients.deadline(), self.paused_until, retry];
        all.into_iter().flatten().min()
    }

    fn pass_time(&mut self, now: Tick) {
        while let Some(index) = self.clients.late(now) {
            self.disconnect(index);
        }
        if self.paused_until.is_some_and(|at| at <= now) {
            self.pause_accepting(None);
        }
        let reached = self.reach.as_mut().map(|r| r.retry(now));
        for (stream, reached) in reached.into_iter().flatten() {
            self.reached(now, stream, reached);
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        match listener.accept() {
            Ok((socket, _)) => self.add_client(socket),
            // The client is already gone.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            // There are no descriptors left. The client waits in the backlog, so the listener stays readable.
            Err(e) => match self.clients.oldest() {
                Some(index) => self.disconnect(index),
                None => {
                    tracing::warn!(error = %e, "cannot accept a client");
                    self.pause_accepting(Some(Tick(self.shard.now().0.saturating_add(REST_NS))));
                }
            },
        }
    }

    /// Stops watching the listener until a time, or watches it again.
    fn pause_accepting(&mut self, until: Option<Tick>) {
        let Some(listener) = &self.listener else {
            return;
        };
        self.paused_until = until;
        if until.is_some() {
            self.shard.unwatch(listener.as_fd());
        } else if self.shard.watch(listener.as_fd(), KEY_LISTENER).is_err() {
            // There is no memory for the registration now.
            self.paused_until = Some(Tick(self.shard.now().0.saturating_add(REST_NS)));
        }
    }

    fn add_client(&mut self, socket: UnixStream) {
        let index = self.clients.free().or_else(|| {
            let oldest = self.clients.oldest()?;
            self.disconnect(oldest);
            Some(oldest)
        });
        let Some(index) = index else { return };
        // The index is less than CLIENTS_MAX.
        let key = KEY_FIRST + index as u32;
        let watched = socket
            .set_nonblocking(true)
            .and_then(|()| self.shard.watch(socket.as_fd(), key));
        if watched.is_ok() {
            self.clients.insert(index, socket, self.shard.now());
            // Most clients have sent their line by now.
            self.read_request(index);
        }
    }

    fn remove_client(&mut self, index: usize) -> Option<UnixStream> {
        let client = self.clients.remove(index)?;
        self.shard.unwatch(client.socket.as_fd());
        Some(client.socket)
    }

    /// Closes a client's connection.
    fn disconnect(&mut self, index: usize) {
        tracing::debug!("a client that sent no port number is disconnected");
        drop(self.remove_client(index));
    }

    /// A client has sent which port it wants.
    fn read_request(&mut self, index: usize) {
        let port = match self.clients.read(index) {
            Request::Incomplete => return,
            Request::Port(port) => Some(port),
            Request::Invalid => None,
        };
        let (Some(socket), Some(port)) = (self.remove_client(index), port) else {
            return;
        };
        let now = self.shard.now();
        let request = DialRequest {
            port,
            hello: None,
            deadline: Some(Tick(now.0 + DIAL_LIMIT_NS)),
            lane: adit_engine::Lane::Bulk,
        };
        // Fails if the guest has no driver. Then the client sees the end of its connection.
        if let Ok(stream) = self.shard.port_mut(self.port).dial(now, request, None) {
            self.dialing.insert(stream, socket);
        }
    }

    fn notice(&mut self, notice: Notice) {
        let now = self.shard.now();
        match notice {
            Notice::Incoming {
                stream, local_port, ..
            } => {
                let reach = self.reach.as_mut();
                let reached = reach.map_or(Reached::Nobody, |r| r.dial(now, stream, local_port));
                self.reached(now, stream, reached);
            }
            Notice::Dialed { stream, .. } => {
                let port = self.shard.port_mut(self.port);
                let Some(mut socket) = self.dialing.remove(&stream) else {
                    return port.reset(now, stream, ResetReason::Local);
                };
                // Other VMMs print the stream's host port here. No client depends on the number.
                match writeln!(socket, "OK {}", stream.slot()) {
                    Ok(()) => {
                        port.attach(now, stream, Sink::Fd(socket.into()), &[]);
                    }
                    Err(_) => port.reset(now, stream, ResetReason::Local),
                }
            }
            Notice::DialFailed { stream, .. } => drop(self.dialing.remove(&stream)),
            Notice::Closed { stream, .. } => {
                // The stream timed out, or the guest gave it up.
                self.reach.iter_mut().for_each(|r| r.forget(stream));
            }
            Notice::Session { .. } | Notice::Obstacle => {}
        }
    }

    fn reached(&mut self, now: Tick, stream: StreamId, reached: Reached) {
        let port = self.shard.port_mut(self.port);
        match reached {
            Reached::Socket(s) => port.accept(now, stream, Some(Sink::Fd(OwnedFd::from(s)))),
            Reached::Nobody => port.refuse(now, stream),
            Reached::Later => {}
        }
    }
}

#[cfg(test)]
mod tests;
