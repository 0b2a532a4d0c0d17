//! Who listens on the host for what the guest dials.
//!
//! A Unix listener with a full backlog gives no sign when it has room again, so its streams are tried from time to time, in
//! the order in which they came. The engine ends a stream that has no answer in time, and the guest is reset then.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use adit_engine::{StreamId, Tick};

use crate::socket_path::connect_now;

/// Time between two looks at listeners with full backlogs.
const RETRY_NS: u64 = 10_000_000;

/// What came of a dial.
#[derive(Debug)]
pub(super) enum Reached {
    /// A listener's socket; nonblocking.
    Socket(UnixStream),
    /// Nobody listens.
    Nobody,
    /// Somebody does, and takes nothing now.
    Later,
}

pub(super) struct Reach {
    path: PathBuf,
    /// By host port; bounded by what the engine has open.
    waiting: BTreeMap<u32, VecDeque<StreamId>>,
    /// When they are tried again.
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

    /// Connects to whoever serves a port.
    pub(super) fn dial(&mut self, now: Tick, stream: StreamId, port: u32) -> Reached {
        // Behind those that wait for it already.
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

    /// When somebody is to be tried again.
    pub(super) fn retry_at(&self) -> Option<Tick> {
        (!self.waiting.is_empty()).then_some(self.at)
    }

    /// Tries those that wait, if it is time; returns those that wait no longer.
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

    /// A stream ended while it waited.
    pub(super) fn forget(&mut self, stream: StreamId) {
        self.waiting.retain(|_, queue| {
            queue.retain(|waits| *waits != stream);
            !queue.is_empty()
        });
    }
}

/// Where the host serves a port of its own.
fn socket_of(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}
