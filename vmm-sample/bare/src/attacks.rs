//! A hostile guest's attacks on its ring, one case for each row of the attack catalogue. A guest without an operating system,
//! a real guest and a process that plays the guest all run the same cases.
//!
//! A case starts in a session, and asks for a new session whenever the host ended the last one. All that an attack can observe
//! of the host's reaction is that sessions ended.

use adit_engine::{Op, PACKET_HEADER_BYTES, PacketHeader, Tick};
use adit_ringbuf::layout::PAGE;
use adit_ringbuf::region::{ACCEPTED, GUEST_WORD, HOST_WORD, Side};
use adit_ringbuf::session::{Ends, Event, Guest, State};
use adit_ringbuf::{Geometry, RingMem};

use crate::noise::Noise;

/// Bit of a record's header: the record is complete.
pub(crate) const COMMITTED: u64 = 1 << 31;
/// Bit of a record's header: the record is a pad.
const PAD: u64 = 1 << 32;
/// Words in the region's first page. Both sides read it; only the host should write it.
const HEAD_WORDS: usize = PAGE / 8;
/// How long a case waits for its first session.
const PATIENCE_NS: u64 = 10_000_000_000;
/// Stores between two doorbells.
const STORES: usize = 256;
/// The agent's port on the host, and a port without a listener.
const PORTS: [u32; 2] = [741, 9];

/// An attack while it runs.
pub struct Attack<'a, M> {
    mem: M,
    guest: Guest<M>,
    noise: Noise,
    doorbell: &'a dyn Fn(),
    now: &'a dyn Fn() -> Tick,
    /// The end of the attack: `lasts_ns` after its first session began.
    until: u64,
    lasts_ns: u64,
    head: [u64; HEAD_WORDS],
    /// This side's ends in the current session.
    ends: Option<[Ends<M>; 2]>,
    /// Sessions that the host ended.
    pub lost: u32,
    /// Sessions that began.
    pub sessions: u32,
}

/// One attack.
pub type Case<M> = fn(&mut Attack<'_, M>);

/// All cases. Each name starts with its row in the catalogue.
pub fn cases<M: RingMem + Clone>() -> [(&'static str, Case<M>); 12] {
    [
        ("r01-fetched-twice", |a| a.fetched_twice()),
        ("r02-positions-ahead", |a| a.positions_ahead()),
        ("r03-positions-back", |a| a.positions_back()),
        ("r04-pads", |a| a.pads()),
        ("r05-borders", |a| a.borders()),
        ("r06-headers", |a| a.headers()),
        ("r07-messages", |a| a.messages()),
        ("r08-ids", |a| a.ids()),
        ("r10-doorbells", |a| a.doorbells()),
        ("r15-handshakes", |a| a.handshakes()),
        ("r16-ranges", |a| a.ranges()),
        ("everything", |a| a.everything()),
    ]
}

impl<'a, M: RingMem + Clone> Attack<'a, M> {
    /// Prepares an attack by a guest that has found its region. `doorbell` signals both of the host's doorbells, `now` is a
    /// clock. The attack lasts `lasts_ns` from its first session on. It waits for that session as long as a host may delay
    /// it after an earlier attack.
    pub fn new(
        mem: M,
        guest: Guest<M>,
        seed: u64,
        doorbell: &'a dyn Fn(),
        now: &'a dyn Fn() -> Tick,
        lasts_ns: u64,
    ) -> Self {
        let head = core::array::from_fn(|n| mem.load(8 * n));
        Self {
            mem,
            guest,
            noise: Noise::new(seed),
            doorbell,
            now,
            until: now().0 + PATIENCE_NS,
            lasts_ns,
            head,
            ends: None,
            lost: 0,
            sessions: 0,
        }
    }

    /// Runs the case, then leaves the region in a state from which a new guest can attach.
    pub fn run(&mut self, case: Case<M>) {
        let _ = self.guest.attach();
        case(self);
        self.mend();
        // The next guest counts on from the request in this word, not from the host's answer. So leave one that is higher.
        let next = (self.mem.load(HOST_WORD) >> 8) + 1;
        self.mem.zero(GUEST_WORD, PAGE);
        self.mem.store(GUEST_WORD, next << 8 | State::Closed as u64);
        (self.doorbell)();
    }

    /// Restores the region's first page. Overwriting it harms this guest only, so this guest must repair it.
    fn mend(&self) {
        for (n, &word) in self.head.iter().enumerate() {
            // The host counts the epoch and computes the checksum over it. It writes both before it answers.
            self.mem.store(8 * n, word);
        }
    }

    fn goes_on(&self) -> bool {
        (self.now)().0 < self.until
    }

    /// Waits until both sides are in a session; asks for a new one if there is none. Returns false when the time is over.
    fn session(&mut self) -> bool {
        while self.goes_on() {
            if self.alive() {
                return true;
            }
            (self.doorbell)();
            core::hint::spin_loop();
        }
        false
    }

    /// Like [`session`](Self::session), but returns this side's ends. The caller returns them with [`keep`](Self::keep).
    fn ends(&mut self) -> Option<[Ends<M>; 2]> {
        if !self.session() {
            return None;
        }
        if let Some(ends) = self.ends.take() {
            return Some(ends);
        }
        let ends = |lane| self.guest.ends(lane, true).ok().flatten();
        Some([ends(0)?, ends(1)?])
    }

    fn keep(&mut self, ends: [Ends<M>; 2]) {
        self.ends = Some(ends);
        (self.doorbell)();
    }

    /// Reads the host's state, and asks for a new session if the last one ended.
    fn step(&mut self) {
        match self.guest.poll().map(|turn| turn.event) {
            Ok(None) => return,
            Ok(Some(Event::Attached { .. })) => {
                if self.sessions == 0 {
                    self.until = (self.now)().0 + self.lasts_ns;
                }
                self.sessions += 1;
            }
            Ok(Some(Event::Lost(_))) => {
                self.lost += 1;
                self.again();
            }
            // The attack overwrote the region's head.
            Err(_) => self.again(),
        }
        self.ends = None;
    }

    fn again(&mut self) {
        self.mend();
        let _ = self.guest.attach();
    }

    fn alive(&mut self) -> bool {
        self.step();
        self.guest.state() == State::Run
    }

    /// The two rings of a lane: to the host, and to the guest.
    fn lane(&self, lane: usize) -> Option<[Geometry; 2]> {
        let region = self.guest.region()?;
        let of = |towards| region.geometry(lane, towards, false, false);
        Some([of(Side::Host), of(Side::Guest)])
    }

    fn store_random(&mut self, from: usize, to: usize) {
        for _ in 0..STORES {
            let at = from + 8 * self.noise.below((to - from) / 8);
            let word = self.noise.word();
            self.mem.store(at, word);
        }
        (self.doorbell)();
    }

    /// A valid packet.
    fn packet(&mut self, op: Op) -> PacketHeader {
        let port = self.noise.number() as u32;
        PacketHeader {
            src_port: port,
            dst_port: PORTS[self.noise.below(2)],
            len: 0,
            kind: 1,
            op: op as u16,
            flags: 0,
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
        }
    }

    /// Sends a packet correctly. A packet that does not fit is dropped.
    fn send(ends: &mut Ends<M>, header: &PacketHeader, body: &[u8]) {
        let len = PACKET_HEADER_BYTES + body.len();
        if let Ok(mut grant) = ends.producer.reserve(len) {
            grant.write(0, &header.to_ring_bytes());
            grant.write(PACKET_HEADER_BYTES, body);
            let _ = grant.commit();
        }
        let _ = ends.producer.publish();
    }

    /// Discards what the host sent.
    fn discard(ends: &mut Ends<M>) {
        while let Ok(Some(record)) = ends.consumer.peek() {
            record.take();
        }
        let _ = ends.consumer.release();
    }

    /// Changes words while the host reads them.
    fn fetched_twice(&mut self) {
        while self.session() {
            let Some([to_host, _]) = self.lane(1) else {
                continue;
            };
            for _ in 0..64 {
                let wanted = [COMMITTED | 24, COMMITTED | 0x7fff_ffff, 0, u64::MAX];
                for n in 0..16 {
                    let word = self.noise.one_of(&wanted);
                    self.mem.store(to_host.data + 64 * (n % 8), word);
                    self.mem.store(to_host.data + 64 * (n % 8), COMMITTED | 24);
                }
                (self.doorbell)();
            }
            self.store_random(GUEST_WORD + 8, GUEST_WORD + PAGE);
        }
    }

    /// Stores `position` as this side's consumer position. The packets before it make the host answer, so that the host
    /// reads the position.
    fn positions(&mut self, position: fn(&mut Noise, u64) -> u64) {
        while let Some(mut ends) = self.ends() {
            for (lane, ends) in ends.iter_mut().enumerate() {
                for _ in 0..STORES {
                    let header = self.packet(Op::Request);
                    Self::send(ends, &header, &[]);
                }
                let Some([_, to_guest]) = self.lane(lane) else {
                    continue;
                };
                let said = position(&mut self.noise, to_guest.size as u64);
                self.mem.store(to_guest.cons, said);
            }
            self.keep(ends);
        }
    }

    /// The consumer position is ahead of everything that was written.
    fn positions_ahead(&mut self) {
        self.positions(|noise, size| {
            noise.one_of(&[size, size + 1, 1 << 31, u32::MAX.into(), u64::MAX, 1 << 63])
        });
    }

    /// The consumer position goes back. Then the host's own words are overwritten, which the host never reads back.
    fn positions_back(&mut self) {
        self.positions(|noise, size| noise.number() % size);
        // The time is over: start a second period for the second attack.
        self.until = (self.now)().0 + self.lasts_ns;
        self.again();
        while self.session() {
            self.store_random(HOST_WORD + 8, HOST_WORD + PAGE);
        }
    }

    /// Overwrites the first record header of each session.
    fn first_header(&mut self, header: fn(&mut Noise, Geometry) -> u64) {
        while self.session() {
            let lane = self.noise.below(2);
            let Some([to_host, _]) = self.lane(lane) else {
                continue;
            };
            let word = header(&mut self.noise, to_host);
            self.mem.store(to_host.data, word);
            (self.doorbell)();
        }
    }

    /// Pads that end before the end of the ring, behind it, or nowhere.
    fn pads(&mut self) {
        self.first_header(|noise, ring| {
            let size = ring.size as u64;
            let len = [0, 8, 56, size - 64, size - 8, size, size + 8, 0x7fff_ffff];
            PAD | COMMITTED | noise.one_of(&len)
        });
    }

    /// Lengths at every limit, of records and in packet headers.
    fn borders(&mut self) {
        while let Some(mut ends) = self.ends() {
            let body = [7; 100];
            for len in [0, 1, 99, 100, 101, 1 << 16, (1 << 16) + 1, u32::MAX] {
                for op in [Op::Request, Op::Response, Op::Shutdown, Op::Rw] {
                    let header = PacketHeader {
                        len,
                        ..self.packet(op)
                    };
                    ends.iter_mut()
                        .for_each(|ends| Self::send(ends, &header, &body));
                }
            }
            ends.iter_mut().for_each(Self::discard);
            self.keep(ends);
            if self.noise.below(16) > 0 {
                continue;
            }
            let Some([to_host, _]) = self.lane(0) else {
                continue;
            };
            let max = to_host.record_max as u64;
            let len = [0, 1, 7, 8, 23, max, max + 1, max + 8, 0x7fff_ffff];
            let word = COMMITTED | self.noise.one_of(&len);
            // Covers every place where the next header can be.
            for at in (0..to_host.size).step_by(64) {
                self.mem.store(to_host.data + at, word);
            }
            (self.doorbell)();
        }
    }

    /// Headers without the bit that every header has, of unknown kinds, and with undefined bits.
    fn headers(&mut self) {
        self.first_header(|noise, _| match noise.below(4) {
            0 => noise.number() & 0x7fff_ffff | 1,
            1 => COMMITTED | 24 | (2 + noise.number() % 254) << 32,
            2 => COMMITTED | 24 | 1 << (40 + noise.below(24)),
            _ => noise.word(),
        });
    }

    /// Every operation, type and flag, in every state of the session and between two states.
    fn messages(&mut self) {
        let mut n = 0u32;
        while let Some(mut ends) = self.ends() {
            for _ in 0..STORES {
                n = n.wrapping_add(1);
                let header = PacketHeader {
                    op: (n & 0xff) as u16,
                    kind: [1, 1, 1, 0, 2, 255][n as usize / 256 % 6],
                    flags: self.noise.number() as u32 & 0xffff,
                    ..self.packet(Op::Rw)
                };
                Self::send(&mut ends[n as usize % 2], &header, &[1; 8]);
            }
            ends.iter_mut().for_each(Self::discard);
            self.keep(ends);
            if n.is_multiple_of(16 * STORES as u32) {
                let word = self.noise.number() << 8 | self.noise.below(256) as u64;
                self.mem.store(GUEST_WORD, word);
                (self.doorbell)();
            }
        }
    }

    /// Packets of unknown streams, and with random ids. The host ignores them, and the session goes on.
    fn ids(&mut self) {
        while let Some(mut ends) = self.ends() {
            for op in [
                Op::Response,
                Op::Shutdown,
                Op::Rw,
                Op::CreditUpdate,
                Op::CreditRequest,
                Op::Rst,
            ] {
                let random = [0; 4].map(|_: u32| self.noise.number() as u32);
                let header = PacketHeader {
                    src_port: random[0],
                    dst_port: random[1],
                    buf_alloc: random[2],
                    fwd_cnt: random[3],
                    ..self.packet(op)
                };
                ends.iter_mut()
                    .for_each(|ends| Self::send(ends, &header, &[]));
            }
            ends.iter_mut().for_each(Self::discard);
            self.keep(ends);
        }
    }

    /// Doorbells without end, with no work behind them.
    fn doorbells(&mut self) {
        while self.session() {
            (0..STORES).for_each(|_| (self.doorbell)());
        }
    }

    /// Waits for a value of the host's word. Returns `None` when the time is over.
    fn host_word(&self, wanted: impl Fn(u64) -> bool) -> Option<u64> {
        while self.goes_on() {
            let word = self.mem.load(HOST_WORD);
            if wanted(word) {
                return Some(word);
            }
            (self.doorbell)();
            core::hint::spin_loop();
        }
        None
    }

    /// Features that were not offered, features that change later, a second request in a session, a repeated request.
    fn handshakes(&mut self) {
        while self.session() {
            let bits = self.noise.word();
            self.mem.store(ACCEPTED, bits);
            (self.doorbell)();
            if !self.alive() {
                continue;
            }
            // A handshake by hand: a request that `guest` does not know of; after the answer, features that were not offered.
            let request = self.noise.number() >> 9 | 1;
            self.mem
                .store(GUEST_WORD, request << 8 | State::Want as u64);
            (self.doorbell)();
            let ready = request << 8 | State::Ready as u64;
            self.host_word(|word| word == ready);
            self.mem.store(ACCEPTED, 1 << self.noise.below(64));
            self.mem.store(GUEST_WORD, request << 8 | State::Run as u64);
            (self.doorbell)();
            // Wait for the reaction: otherwise the next request would most often end the session first, for another reason.
            let poisoned = request << 8 | State::Poisoned as u64;
            if self.host_word(|word| word != ready) == Some(poisoned) {
                self.lost += 1;
            }
            // Repeat this request, and the one before it.
            for old in [request, request.wrapping_sub(1)] {
                self.mem.store(GUEST_WORD, old << 8 | State::Want as u64);
                (self.doorbell)();
            }
            self.again();
        }
    }

    /// Ring offsets and sizes that overlap, overflow or end outside the region. The host wrote them and never reads them.
    fn ranges(&mut self) {
        while self.session() {
            for _ in 0..STORES {
                let at = 8 * self.noise.below(32);
                let word =
                    self.noise
                        .one_of(&[0, 8, 4096, 1 << 31, 1 << 63, u64::MAX - 4095, u64::MAX]);
                self.mem.store(at, word);
            }
            (self.doorbell)();
            // A session that begins on such a head.
            let _ = self.guest.attach();
            (self.doorbell)();
        }
    }

    fn everything(&mut self) {
        let bytes = self.mem.len();
        while self.session() {
            (0..8).for_each(|_| self.store_random(0, bytes));
        }
    }
}
