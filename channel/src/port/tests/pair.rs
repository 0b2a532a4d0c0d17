//! Two shards with one `Port` each, connected in memory, and sockets to use them.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use adit_engine::{EngineConfig, SessionChange, StreamId};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::memory::{Memory, Pipe};
use crate::dial::DialRequest;
use crate::hello::Open;
use crate::port::Notice;
use crate::shard::{News, PortIndex, Shard};
use crate::sink::Sink;

/// A condition that does not hold after this number of turns has failed.
const TURNS_MAX: u32 = 200_000;

pub(super) const HERE: PortIndex = PortIndex(0);

/// Two connected shards with one `Port` each.
pub(super) struct Pair {
    pub(super) a: Shard<Memory>,
    pub(super) b: Shard<Memory>,
    pub(super) heard: [Vec<Notice>; 2],
}

impl Pair {
    pub(super) fn new() -> Self {
        Self::with(EngineConfig::default(), 128)
    }

    pub(super) fn with(config: EngineConfig, slots: usize) -> Self {
        let (ab, ba) = (Pipe::new(slots), Pipe::new(slots));
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let memory = |rx: &Arc<Pipe>, tx: &Arc<Pipe>| Memory {
            rx: rx.clone(),
            tx: tx.clone(),
            session: EventFd::from_value_and_flags(1, flags).unwrap(),
            changes: [SessionChange::Attached { epoch: 1 }].into(),
            fault: false,
            torn: false,
        };
        let shard = |carrier, seed| {
            let mut shard = Shard::new().unwrap();
            assert_eq!(shard.add(carrier, config, seed).unwrap(), HERE);
            shard
        };
        let mut pair = Self {
            a: shard(memory(&ba, &ab), 1),
            b: shard(memory(&ab, &ba), 2),
            heard: Default::default(),
        };
        for port in [1, 2, 741] {
            pair.b.port_mut(HERE).listen(port).unwrap();
        }
        pair.until(|p| p.a.port(HERE).epoch().is_some() && p.b.port(HERE).epoch().is_some());
        pair
    }

    pub(super) fn turn(&mut self) {
        for (shard, heard) in [(&mut self.a, 0), (&mut self.b, 1)] {
            // The other side may have posted a slot. The memory carrier does not signal that, so poll the `Port`.
            shard.port_mut(HERE);
            shard.turn(Some(Duration::ZERO)).unwrap();
            while let Some(news) = shard.poll_news() {
                if let News::Notice(_, notice) = news {
                    self.heard[heard].push(notice);
                }
            }
        }
    }

    #[track_caller]
    pub(super) fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..TURNS_MAX {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("not reached; heard {:?}", self.heard);
    }

    pub(super) fn dial(&mut self, port: u32, hello: Option<Open>) -> StreamId {
        let request = DialRequest {
            port,
            hello,
            deadline: None,
            lane: adit_engine::Lane::Bulk,
        };
        let now = self.a.now();
        self.a.port_mut(HERE).dial(now, request, None).unwrap()
    }

    /// The next stream that the other side opens to `b`.
    #[track_caller]
    pub(super) fn asked(&mut self) -> StreamId {
        let mut found = None;
        self.until(|p| {
            let at = p.heard[1]
                .iter()
                .position(|n| matches!(n, Notice::Incoming { .. }));
            if let Some(Notice::Incoming { stream, .. }) = at.map(|i| p.heard[1].remove(i)) {
                found = Some(stream);
            }
            found.is_some()
        });
        found.unwrap()
    }

    pub(super) fn accept(&mut self, stream: StreamId, sink: Sink) {
        let now = self.b.now();
        self.b.port_mut(HERE).accept(now, stream, Some(sink));
    }

    /// Opens a stream between two sockets, and returns the application's socket on each side.
    pub(super) fn connect(&mut self) -> (UnixStream, UnixStream, StreamId) {
        let (near, near_sink) = socket();
        let (far, far_sink) = socket();
        let stream = self.dial(1, None);
        let theirs = self.asked();
        self.accept(theirs, far_sink);
        self.until(|p| {
            p.heard[0].contains(&Notice::Dialed {
                stream,
                accept: None,
            })
        });
        let now = self.a.now();
        assert!(self.a.port_mut(HERE).attach(now, stream, near_sink, &[]));
        (near, far, stream)
    }

    pub(super) fn idle(&mut self) -> bool {
        let ports = [self.a.port(HERE), self.b.port(HERE)];
        ports.iter().all(|p| p.streams() == 0)
    }
}

pub(super) fn socket() -> (UnixStream, Sink) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, Sink::Fd(OwnedFd::from(theirs)))
}

pub(super) fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x as u8
        })
        .collect()
}

/// Bytes to write and bytes that were read. They are moved in pieces of odd sizes, as the socket allows.
pub(super) struct Flow<'a> {
    pub(super) to: &'a UnixStream,
    pub(super) from: &'a UnixStream,
    pub(super) data: Vec<u8>,
    pub(super) sent: usize,
    pub(super) got: Vec<u8>,
    pub(super) step: usize,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        to: &'a UnixStream,
        from: &'a UnixStream,
        data: Vec<u8>,
        step: usize,
    ) -> Self {
        Self {
            to,
            from,
            data,
            sent: 0,
            got: Vec::new(),
            step,
        }
    }

    /// Returns true when all bytes have arrived.
    pub(super) fn go(&mut self) -> bool {
        for _ in 0..16 {
            let end = self.data.len().min(self.sent + self.step);
            match { self.to }.write(&self.data[self.sent..end]) {
                Ok(n) => self.sent += n,
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
            let mut buf = vec![0; self.step + 3];
            match { self.from }.read(&mut buf) {
                Ok(n) => self.got.extend_from_slice(&buf[..n]),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
        }
        self.got.len() >= self.data.len()
    }
}

#[track_caller]
pub(super) fn read_to_end(pair: &mut Pair, from: &UnixStream) -> Vec<u8> {
    let mut got = Vec::new();
    pair.until(|_| {
        let mut buf = [0; 8192];
        loop {
            match { from }.read(&mut buf) {
                Ok(0) => return true,
                Ok(n) => got.extend_from_slice(&buf[..n]),
                Err(e) => {
                    assert_eq!(
                        e.kind(),
                        io::ErrorKind::WouldBlock,
                        "the stream ended early"
                    );
                    return false;
                }
            }
        }
    });
    got
}
