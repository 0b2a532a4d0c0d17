//! Tests of the engine: hostile packets one by one (`attacks`), ends of streams (`close`), windows (`windows`), which
//! stream sends next (`schedule`), arithmetic against a model (`model`), two engines in virtual time against an oracle
//! (`pair`), the record of pairs in use (`pairs`).

// Many tests check events and packets, and ignore the disposition.
#![allow(unused_must_use)]

mod attacks;
mod close;
mod model;
mod pair;
mod pairs;
mod schedule;
mod windows;

use alloc::vec::Vec;

use crate::{
    Answer, Disposition, Engine, EngineConfig, Event, Kind, Lane, Op, PacketHeader, ResetReason,
    SessionChange, StreamId, Tick, Violation,
};

pub(crate) const SERVICE: u32 = 741;
pub(crate) const MS: u64 = 1_000_000;

/// One engine, and a peer whose packets the test writes by hand.
pub(crate) struct Rig {
    pub(crate) e: Engine,
    pub(crate) now: Tick,
}

impl Rig {
    pub(crate) fn new(cfg: EngineConfig) -> Self {
        let mut e = Engine::new(cfg, 1);
        e.handle_session(Tick(0), SessionChange::Attached { epoch: 1 });
        e.listen(SERVICE, Kind::Stream).unwrap();
        Self { e, now: Tick(0) }
    }

    /// A packet from the peer's `port` to our port `to`, with a window of 256 KiB.
    pub(crate) fn packet(op: Op, port: u32, to: u32) -> PacketHeader {
        PacketHeader {
            src_port: port,
            dst_port: to,
            kind: 1,
            op: op as u16,
            buf_alloc: 256 << 10,
            ..PacketHeader::default()
        }
    }

    pub(crate) fn handle(&mut self, h: PacketHeader) -> Disposition {
        self.e.handle_packet(self.now, &h, h.len)
    }

    pub(crate) fn op(&mut self, op: Op, port: u32) -> Disposition {
        self.handle(Self::packet(op, port, SERVICE))
    }

    pub(crate) fn data(&mut self, port: u32, len: u32) -> Disposition {
        self.handle(PacketHeader {
            len,
            ..Self::packet(Op::Rw, port, SERVICE)
        })
    }

    pub(crate) fn shut(&mut self, port: u32, flags: u32) -> Disposition {
        self.handle(PacketHeader {
            flags,
            ..Self::packet(Op::Shutdown, port, SERVICE)
        })
    }

    pub(crate) fn credit(&mut self, port: u32, buf_alloc: u32, fwd_cnt: u32) -> Disposition {
        self.handle(PacketHeader {
            buf_alloc,
            fwd_cnt,
            ..Self::packet(Op::CreditUpdate, port, SERVICE)
        })
    }

    /// Opens a stream from the peer's `port` and accepts it; its RESPONSE is sent.
    pub(crate) fn open(&mut self, port: u32) -> StreamId {
        assert_eq!(self.op(Op::Request, port), Disposition::Consume);
        let Some(Event::Incoming {
            stream,
            local_port: SERVICE,
            ..
        }) = self.e.poll_event()
        else {
            panic!("no incoming stream");
        };
        self.e.answer(self.now, stream, Answer::Accept);
        assert_eq!(self.ops(), [(Op::Response, port)]);
        stream
    }

    /// Opens a stream to the peer; the peer has answered.
    pub(crate) fn dial(&mut self, peer_port: u32, lane: Lane) -> StreamId {
        let s = self
            .e
            .connect(self.now, peer_port, Kind::Stream, lane)
            .unwrap();
        assert_eq!(self.ops(), [(Op::Request, peer_port)]);
        let (local, _) = self.e.ports(s).unwrap();
        assert_eq!(
            self.handle(Self::packet(Op::Response, peer_port, local)),
            Disposition::Consume
        );
        assert_eq!(self.events(), [Event::Connected { stream: s }]);
        s
    }

    /// Polls all packets without a body: (operation, peer's port).
    pub(crate) fn ops(&mut self) -> Vec<(Op, u32)> {
        self.sent()
            .iter()
            .map(|h| (Op::parse(h.op).unwrap(), h.dst_port))
            .collect()
    }

    /// As `ops`, with whole headers. Bodies use all the bytes that they may.
    pub(crate) fn sent(&mut self) -> Vec<PacketHeader> {
        let mut all = Vec::new();
        while let Some(t) = self.e.poll_transmit(self.now, 4096) {
            all.push(match t.body {
                Some((s, len)) => self.e.commit_body(self.now, s, len),
                None => t.header,
            });
        }
        assert!(!self.e.wants_transmit());
        all
    }

    pub(crate) fn events(&mut self) -> Vec<Event> {
        core::iter::from_fn(|| self.e.poll_event()).collect()
    }

    /// Moves the time to the next deadline and handles it.
    pub(crate) fn wait(&mut self) {
        self.now = self.e.poll_timeout().expect("a deadline");
        self.e.handle_timeout(self.now);
    }

    /// Asserts that the stream of `port` ended with `reason`, that the peer got a reset, and that nothing is left of
    /// the stream.
    pub(crate) fn ended(&mut self, stream: StreamId, port: u32, reason: ResetReason) {
        assert_eq!(
            self.events(),
            [Event::Closed {
                stream,
                reason: Some(reason)
            }]
        );
        assert_eq!(self.ops(), [(Op::Rst, port)]);
        self.empty();
    }

    pub(crate) fn empty(&mut self) {
        assert_eq!(
            (self.e.streams(), self.e.lent(), self.e.table.used()),
            (0, 0, 0)
        );
        assert_eq!(self.e.poll_timeout(), None);
        assert!(!self.e.wants_transmit() && self.e.poll_event().is_none());
    }
}

/// SplitMix64 random numbers: one seed repeats a run.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub(crate) fn unexpected(op: Op) -> Violation {
    Violation::Unexpected { op: op as u16 }
}
