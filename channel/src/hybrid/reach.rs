//! Connects the guest to the programs that listen on the host.
//!
//! A Unix listener with a full backlog gives no signal when it has room again. So its streams are retried from time to
//! time, in their order. The engine ends a stream that gets no answer in time, and resets it at the guest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use adit_engine::{StreamId, Tick};

use crate::socket_path::connect_now;

/// Time in ns between two retries of listeners with full backlogs.
const RETRY_NS: u64 = 10_000_000;

/// The result of a connection attempt.
#[derive(Debug)]
pub(super) enum Reached {
    /// Connected; the socket is nonblocking.
    Socket(UnixStream),
    /// Nothing listens.
    Nobody,
    /// A program listens, but its backlog is full now.
    Later,
}

pub(super) struct Reach {
    path: PathBuf,
    /// Waiting streams by host port. Bounded by the number of the engine's open streams.
    waiting: BTreeMap<u32, VecDeque<StreamId>>,
    /// Time of the next retry.
    at: Tick,
}

impl Reach {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            waiting: BTreeMap::new(),
            at: Tick(0),
        }
    }

    /// Connects to the program that serves a port.
    pub(super) fn dial(&mut self, now: Tick, stream: StreamId, port: u32) -> Reached {
        // Queue after the streams that already wait for this port.
        let reached = match self.waiting.contains_key(&port) {
            true => Reached::Later,
            false => self.connect(port),
        };
        if let Reached::Later = reached {
            if self.waiting.is_empty() {
                self.at = Tick(now.0.saturating_add(RETRY_NS));
            }
            self.waiting.entry(port).or_default().push_back(stream);
        }
        reached
    }

    fn connect(&self, port: u32) -> Reached {
        match connect_now(&socket_of(&self.path, port)) {
            Ok(socket) => Reached::Socket(socket),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Reached::Later,
            Err(_) => Reached::Nobody,
        }
    }

    /// Time of the next retry, if any stream waits.
    pub(super) fn retry_at(&self) -> Option<Tick> {
        (!self.waiting.is_empty()).then_some(self.at)
    }

    /// Retries the waiting streams if it is time. Returns those that no longer wait.
    pub(super) fn retry(&mut self, now: Tick) -> Vec<(StreamId, Reached)> {
        let mut done = Vec::new();
        if self.waiting.is_empty() || self.at > now {
            return done;
        }
        self.at = Tick(now.0.saturating_add(RETRY_NS));
        for (port, mut queue) in std::mem::take(&mut self.waiting) {
            while let Some(&stream) = queue.front() {
                match self.connect(port) {
                    Reached::Later => break,
                    reached => done.push((stream, reached)),
                }
                queue.pop_front();
            }
            if !queue.is_empty() {
                self.waiting.insert(port, queue);
            }
        }
        done
    }

    /// Removes a stream that ended while it waited.
    pub(super) fn forget(&mut self, stream: StreamId) {
        self.waiting.retain(|_, queue| {
            queue.retain(|waits| *waits != stream);
            !queue.is_empty()
        });
    }
}

/// Path of the socket for a port of the host.
fn socket_of(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}
