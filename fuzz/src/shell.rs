//! The smallest shell around an engine, for targets: it records the engine's outputs and asserts what must always hold.
//!
//! - A stream id is announced once, ends once, and does not appear again.
//! - Delivered bytes are inside the granted windows, and the windows are inside the pool.
//! - Sent bytes are inside the peer's credit.
//! - Outputs end: no poll returns something for ever.

use std::collections::BTreeMap;

use adit_engine::{
    Answer, Disposition, Engine, EngineConfig, Event, How, Kind, Lane, Op, PacketHeader, RST_MAX,
    ResetReason, SessionChange, StreamId, Tick, Transmit,
};

use crate::input::Input;

/// Ports with a listener.
pub const SERVICES: [u32; 2] = [741, 22];

/// What the shell knows about a stream.
#[derive(Clone, Copy, Debug)]
struct Known {
    id: StreamId,
    ports: (u32, u32),
    incoming: bool,
    held: u64,
}

/// What may be sent to the peer on a port pair (ours, its).
#[derive(Clone, Copy, Debug, Default)]
struct Credit {
    sent: u64,
    /// The largest window, and the most received bytes, that the peer announced and could mean.
    window: u64,
    taken: u64,
}

/// An engine and its outputs.
pub struct Shell {
    /// The engine.
    pub engine: Engine,
    /// The current time.
    pub now: Tick,
    config: EngineConfig,
    known: BTreeMap<u32, Known>,
    credit: BTreeMap<(u32, u32), Credit>,
    stale: Vec<StreamId>,
    /// Ports and window of the last packet.
    asked: ((u32, u32), u64),
    epoch: u64,
}

impl Shell {
    /// Makes an engine with a session. The input chooses the configuration.
    pub fn new(input: &mut Input<'_>) -> Self {
        let mut config = EngineConfig {
            max_streams: input.pick(&[1, 2, 8, 64]),
            pool_bytes: input.pick(&[0, 1 << 10, 20_000, 1 << 20]),
            initial_window: input.pick(&[1, 100, 8 << 10, 64 << 10]),
            max_window: input.pick(&[1, 1 << 10, 256 << 10, u32::MAX]),
            connect_timeout: input.pick(&[0, 2_000_000_000, u64::MAX]),
            shutdown_timeout: input.pick(&[0, 8_000_000_000, u64::MAX]),
            quantum: input.pick(&[0, 1, 4096, u32::MAX]),
            packet_overhead: input.pick(&[0, 1, 576, u32::MAX]),
            tells_reason: false,
        };
        let seed = input.u64();
        config.tells_reason = seed & 1 != 0;
        let mut shell = Self {
            engine: Engine::new(config, seed),
            now: Tick(0),
            config,
            known: BTreeMap::new(),
            credit: BTreeMap::new(),
            stale: Vec::new(),
            asked: ((0, 0), 0),
            epoch: 0,
        };
        for port in SERVICES {
            shell.engine.listen(port, Kind::Stream).expect("room");
        }
        shell.engine.track_pairs();
        shell.session(Some(()));
        shell
    }

    /// The session restarts or ends.
    pub fn session(&mut self, on: Option<()>) {
        self.epoch += 1;
        let change = match on {
            Some(()) if self.epoch.is_multiple_of(2) => {
                SessionChange::Restored { epoch: self.epoch }
            }
            Some(()) if self.epoch.is_multiple_of(3) => {
                SessionChange::Continued { epoch: self.epoch }
            }
            Some(()) => SessionChange::Attached { epoch: self.epoch },
            None => SessionChange::Lost(ResetReason::CarrierFault),
        };
        self.engine.handle_session(self.now, change);
        self.events(&mut Input(&[]));
        assert!(self.known.is_empty(), "a stream outlived its session");
        assert_eq!((self.engine.streams(), self.engine.lent()), (0, 0));
        // A driver that continues gets resets for its old streams. A new one gets nothing.
        if matches!(change, SessionChange::Continued { .. }) {
            while let Some(t) = self.engine.poll_transmit(self.now, 0) {
                assert_eq!((t.header.op, t.body), (Op::Rst as u16, None));
            }
        }
        assert!(!self.engine.wants_transmit());
        assert_eq!(self.engine.poll_timeout(), None);
        self.credit.clear();
    }

    /// Handles a packet from the peer. Returns how many of its bytes go to a sink.
    pub fn packet(&mut self, h: &PacketHeader, body: u32) -> u32 {
        let pair = (h.dst_port, h.src_port);
        let credit = self.credit.entry(pair).or_default();
        // `fwd_cnt` is the lower half of a count: the most that it can mean.
        let ahead = u64::from((credit.sent as u32).wrapping_sub(h.fwd_cnt));
        if let Some(taken) = credit.sent.checked_sub(ahead) {
            credit.window = credit.window.max(u64::from(h.buf_alloc));
            credit.taken = credit.taken.max(taken);
        }
        self.asked = (pair, u64::from(h.buf_alloc));
        let delivered = match self.engine.handle_packet(self.now, h, body) {
            Disposition::Consume | Disposition::Ignore(_) => 0,
            Disposition::Tear(v) => panic!("a stream's fault is not the channel's: {v}"),
            Disposition::Deliver { stream, len } => {
                let known = self
                    .known
                    .get_mut(&stream.slot())
                    .expect("a stream that was announced");
                assert_eq!((known.id, known.ports), (stream, pair));
                assert!(len > 0 && len == h.len && len <= body);
                known.held += u64::from(len);
                len
            }
        };
        self.check();
        delivered
    }

    /// Time passes, mostly until a deadline.
    pub fn wait(&mut self, input: &mut Input<'_>) {
        let at = match (input.u8() & 3, self.engine.poll_timeout()) {
            (0, _) => self.now.0.saturating_add(input.u64() >> input.u8().min(63)),
            (_, Some(at)) => at.0,
            (_, None) => self.now.0.saturating_add(1_000_000),
        };
        // A century, in ns.
        self.now = self.now.max(Tick(at.min(1 << 62)));
        self.engine.handle_timeout(self.now);
        let next = self.engine.poll_timeout();
        assert!(
            next.is_none_or(|at| at > self.now),
            "{next:?} has passed at {:?}",
            self.now
        );
        self.check();
    }

    /// Polls all events. The input decides the answer to an incoming stream.
    pub fn events(&mut self, input: &mut Input<'_>) {
        let most = 8 * self.config.max_streams.max(1) + 8;
        for _ in 0..most {
            let Some(event) = self.engine.poll_event() else {
                let held: u64 = self.known.values().map(|k| k.held).sum();
                assert!(
                    held <= self.engine.lent(),
                    "{held} bytes held, outside of every window"
                );
                return self.check();
            };
            match event {
                Event::Incoming {
                    stream,
                    local_port,
                    peer_port,
                } => {
                    assert!(SERVICES.contains(&local_port));
                    let (pair, window) = self.asked;
                    assert_eq!(
                        pair,
                        (local_port, peer_port),
                        "an incoming stream that did not ask"
                    );
                    let credit = Credit {
                        window,
                        ..Credit::default()
                    };
                    self.credit.insert(pair, credit);
                    self.enter(stream, pair, true);
                    match input.u8() & 7 {
                        0 => self.engine.answer(self.now, stream, Answer::Refuse),
                        1 => {}
                        _ => self.engine.answer(self.now, stream, Answer::Accept),
                    }
                }
                Event::Connected { stream } => assert!(!self.get(stream).incoming),
                Event::Writable { stream }
                | Event::PeerShutdown { stream, .. }
                | Event::HungUp { stream } => {
                    self.get(stream);
                }
                Event::Closed { stream, reason } => {
                    let known = self.get(stream);
                    assert!(
                        reason.is_some() || known.held == 0,
                        "ended in order with bytes held"
                    );
                    self.known.remove(&stream.slot());
                    self.stale.push(stream);
                    if self.stale.len() > 4 {
                        self.stale.remove(0);
                    }
                }
            }
        }
        panic!("more than {most} events");
    }

    fn get(&self, stream: StreamId) -> Known {
        let known = self
            .known
            .get(&stream.slot())
            .expect("a stream that was announced");
        assert_eq!(known.id, stream);
        *known
    }

    fn enter(&mut self, id: StreamId, ports: (u32, u32), incoming: bool) {
        let known = Known {
            id,
            ports,
            incoming,
            held: 0,
        };
        assert!(
            self.known.insert(id.slot(), known).is_none(),
            "slot given twice"
        );
    }

    /// A command of the shell for a stream that the input chooses: one that is known, or was.
    pub fn command(&mut self, input: &mut Input<'_>) {
        let which = input.u8();
        let ids: Vec<StreamId> = self
            .known
            .values()
            .map(|k| k.id)
            .chain(self.stale.iter().copied())
            .collect();
        let id = ids.get(usize::from(which) % ids.len().max(1)).copied();
        match (input.u8() % 8, id) {
            (0, _) | (_, None) => self.connect(input),
            (1 | 2, Some(id)) => self.engine.offer(id, input.edge32()),
            (3 | 4, Some(id)) => self.consume(id, input.edge32()),
            (5, Some(id)) => {
                let how = input.pick(&[How::Send, How::Receive, How::Both]);
                self.engine.shutdown(self.now, id, how);
                if how != How::Send
                    && let Some(known) = self.known.get_mut(&id.slot()).filter(|k| k.id == id)
                {
                    known.held = 0;
                }
            }
            (6, Some(id)) => {
                let answer = input.pick(&[Answer::Accept, Answer::Refuse]);
                self.engine.answer(self.now, id, answer);
            }
            (_, Some(id)) => self.engine.reset(self.now, id, ResetReason::Local),
        }
        self.check();
    }

    fn connect(&mut self, input: &mut Input<'_>) {
        let lane = input.pick(&[Lane::Bulk, Lane::Control]);
        let port = input.pick(&[9, 22, 741]);
        if let Ok(id) = self.engine.connect(self.now, port, Kind::Stream, lane) {
            let ports = self.engine.ports(id).expect("new");
            self.credit.insert(ports, Credit::default());
            self.enter(id, ports, false);
        }
    }

    fn consume(&mut self, id: StreamId, n: u32) {
        self.engine.consumed(self.now, id, n);
        if let Some(known) = self.known.get_mut(&id.slot()).filter(|k| k.id == id) {
            known.held = known.held.saturating_sub(u64::from(n));
        }
    }

    /// Ports of a known stream, so that a packet can hit it.
    pub fn ports(&self, which: u8) -> Option<(u32, u32)> {
        let n = self.known.len().max(1);
        self.known
            .values()
            .nth(usize::from(which) % n)
            .map(|k| k.ports)
    }

    /// The next packet for a slot of this size.
    pub fn transmit(&mut self, capacity: u32) -> Option<Transmit> {
        let t = self.engine.poll_transmit(self.now, capacity);
        if let Some(Transmit {
            header,
            body: Some((id, len)),
            ..
        }) = t
        {
            assert!(len > 0 && len <= capacity && header.op == Op::Rw as u16);
            let known = self.get(id);
            assert_eq!((header.src_port, header.dst_port), known.ports);
        }
        t
    }

    /// Reports that `n` bytes of the last packet's body are in its slot.
    pub fn commit(&mut self, id: StreamId, n: u32) -> PacketHeader {
        let h = self.engine.commit_body(self.now, id, n);
        assert_eq!((h.op, h.len), (Op::Rw as u16, n));
        let credit = self.credit.entry((h.src_port, h.dst_port)).or_default();
        credit.sent += u64::from(n);
        assert!(
            credit.sent <= credit.taken + credit.window,
            "{credit:?}: sent without credit"
        );
        self.check();
        h
    }

    /// Sends everything, in packets of at most `capacity` bytes. At most `bodies` packets have a body.
    pub fn send_all(&mut self, capacity: u32, bodies: u32, fill: u8) {
        let (mut owed, mut left) = (0, bodies);
        while left > 0 {
            let Some(t) = self.transmit(capacity) else {
                break;
            };
            match t.body {
                None => owed += 1,
                Some((id, 1..)) if fill == 0 => {
                    left -= 1;
                    self.engine.offer(id, 0);
                }
                Some((id, len)) => {
                    left -= 1;
                    self.commit(id, 1 + len.wrapping_mul(u32::from(fill)) % len);
                }
            }
            assert!(
                owed as usize
                    <= RST_MAX + 16 * (1 + self.config.max_streams as usize) + 8 * bodies as usize
            );
        }
        let _ = self.engine.drain_pairs().count();
    }

    /// What must hold at any time.
    fn check(&self) {
        let (lent, pool) = (self.engine.lent(), self.config.pool_bytes);
        assert!(lent <= pool, "{lent} lent of {pool}");
        assert!(self.known.len() <= self.config.max_streams.max(1) as usize);
        assert_eq!(self.engine.streams(), self.known.len());
    }
}
