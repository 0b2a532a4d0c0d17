//! JOINT (signatures are agreed; bodies and private parts are the engine author's).
#![allow(missing_docs, clippy::todo, unused_variables)]
use crate::{Kind, PacketHeader};

/// Nanoseconds on a monotonic clock, supplied by the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub u64);

/// Names a stream for ever: a stale id is harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId { slot: u32, generation: u32 }
impl StreamId {
    /// Index into a dense table of at most `EngineConfig::max_streams` entries.
    pub fn slot(self) -> u32 { self.slot }
    pub fn generation(self) -> u32 { self.generation }
}

/// What a peer did that virtio forbids. Carries evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation { UnknownOp { op: u16 }, UnknownKind { kind: u16 }, LengthMismatch { header: u32, body: u32 }, CreditExceeded { len: u32, window: u32 }, FwdCntAhead { fwd_cnt: u32, tx_cnt: u32 }, BadFlags { flags: u32 }, Unexpected { op: u16 }, RstOverflow }

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason { Peer, Refused, Timeout, Credit, Protocol(Violation), Epoch, CarrierFault, Local }

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane { Control, Bulk }

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How { Receive, Send, Both }

#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Streams at a time, both directions together (default 1,024).
    pub max_streams: u32,
    /// Bytes of receive window that all streams of this VM share (default 8 MiB).
    pub pool_bytes: u64,
    /// Window a stream starts with (default 8 KiB) and may grow to by use (default 256 KiB).
    pub initial_window: u32,
    pub max_window: u32,
    /// ns until an unanswered request ends in `Timeout` (default 2 s), and until a shut-down stream is reset (default 8 s).
    pub connect_timeout: u64,
    pub shutdown_timeout: u64,
    /// Bytes a stream may send in its turn (deficit round robin; default 4,096... the engine author's choice).
    pub quantum: u32,
    /// A newer Linux guest resets a stream that holds more than buf_alloc / this many bytes packets (0 = no limit; default 576).
    pub packet_overhead: u32,
}
impl Default for EngineConfig { fn default() -> Self { todo!() } }

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionChange { Attached { epoch: u64 }, Lost(ResetReason) }

/// What to do with the body of the packet just handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Disposition {
    /// Nothing to deliver: drop the packet.
    Consume,
    /// Move `len` bytes to the stream's sink (or hold them: they are inside its window).
    Deliver { stream: StreamId, len: u32 },
    /// Dropped, count it; the channel goes on.
    Ignore(Violation),
    /// The whole channel must be torn down.
    Tear(Violation),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer asks for `local_port` (one that `listen` named); `answer` it.
    Incoming { stream: StreamId, local_port: u32, peer_port: u32 },
    Connected { stream: StreamId },
    /// Credit came back to a stream that had offered bytes and none to send them with (advisory).
    Writable { stream: StreamId },
    /// The peer will send no more (Send), receive no more (Receive), or both.
    PeerShutdown { stream: StreamId, how: How },
    /// The stream is gone; its id is stale from now on. `None`: both directions ended in order.
    Closed { stream: StreamId, reason: Option<ResetReason> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer { Accept, Refuse }

/// A packet to send. With `body`, read up to `len` bytes from the stream's sink into the slot, then call `commit_body`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit { pub header: PacketHeader, pub lane: Lane, pub body: Option<(StreamId, u32)> }

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenError { TableFull { max: u32 } }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectError { TableFull { max: u32 }, NoCredit, NoPort, NoSession }

pub struct Engine {}
impl Engine {
    pub fn new(cfg: EngineConfig, seed: u64) -> Self { todo!() }
    // ---- getters
    pub fn streams(&self) -> usize { todo!() }
    pub fn ports(&self, s: StreamId) -> Option<(u32, u32)> { todo!() }
    // ---- inputs
    pub fn handle_packet(&mut self, now: Tick, h: &PacketHeader, body_len: u32) -> Disposition { todo!() }
    pub fn handle_timeout(&mut self, now: Tick) { todo!() }
    pub fn handle_session(&mut self, now: Tick, change: SessionChange) { todo!() }
    // ---- commands
    pub fn listen(&mut self, port: u32, kind: Kind) -> Result<(), ListenError> { todo!() }
    pub fn connect(&mut self, now: Tick, peer_port: u32, kind: Kind, lane: Lane) -> Result<StreamId, ConnectError> { todo!() }
    pub fn answer(&mut self, now: Tick, s: StreamId, a: Answer) { todo!() }
    /// The sink holds this many bytes to send (u32::MAX: some, not known how many; 0: none).
    pub fn offer(&mut self, s: StreamId, readable: u32) { todo!() }
    /// The sink took `n` delivered bytes: fwd_cnt, window growth, credit update.
    pub fn consumed(&mut self, now: Tick, s: StreamId, n: u32) { todo!() }
    pub fn shutdown(&mut self, now: Tick, s: StreamId, how: How) { todo!() }
    pub fn reset(&mut self, now: Tick, s: StreamId, why: ResetReason) { todo!() }
    // ---- outputs: poll_event until None, then poll_transmit until None, then poll_timeout
    #[must_use] pub fn poll_event(&mut self) -> Option<Event> { todo!() }
    /// Next packet for a slot that takes `capacity` payload bytes. With a body, nothing is sent until `commit_body`.
    #[must_use] pub fn poll_transmit(&mut self, now: Tick, capacity: u32) -> Option<Transmit> { todo!() }
    /// `n` (1..=len) bytes were put into the slot: accounts for them and returns the final header. With `n == 0`
    /// (the sink had nothing after all) call `offer(s, 0)` instead and give the slot back.
    pub fn commit_body(&mut self, now: Tick, s: StreamId, n: u32) -> PacketHeader { todo!() }
    /// True while `poll_transmit` would return something for a large enough slot.
    #[must_use] pub fn wants_transmit(&self) -> bool { todo!() }
    #[must_use] pub fn poll_timeout(&self) -> Option<Tick> { todo!() }
}
