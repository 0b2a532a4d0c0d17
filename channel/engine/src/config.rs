//! Limits and times of one engine. Values out of range are brought into range, never an error: see `sane`.

/// Limits and times of one engine. All of them bound what one VM can take from the host.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Streams at a time, both directions together (default 1,024; at most [`STREAMS_MAX`](crate::STREAMS_MAX)). The last
    /// eighth is for streams that we open: no process behind the peer can keep us from reaching it.
    pub max_streams: u32,
    /// Bytes of receive window that all streams of this VM share (default 8 MiB): the sum of all windows never exceeds
    /// it, so it bounds what the shell may have to hold.
    pub pool_bytes: u64,
    /// Window a stream starts with, bytes (default 8 KiB).
    pub initial_window: u32,
    /// Window it may grow to by use, bytes (default 512 KiB: a sixteenth of the pool).
    pub max_window: u32,
    /// ns until an unanswered request, of either side, ends in `Timeout` (default 2 s).
    pub connect_timeout: u64,
    /// ns until a stream that is shut down both ways is reset (default 8 s, as Linux waits).
    pub shutdown_timeout: u64,
    /// Bytes that a stream may send in its turn while others wait (default 4,096). One packet a turn, whatever its size:
    /// the last of n streams waits for at most n - 1 packets.
    pub quantum: u32,
    /// A newer Linux guest resets a stream that holds more than buf_alloc / this many packets (0 = no limit; default
    /// 576, Linux's `SKB_TRUESIZE(0)`).
    pub packet_overhead: u32,
    /// Both sides put the reason of a reset into its flags ([`PeerReason`](crate::PeerReason)); virtio has none.
    pub tells_reason: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_streams: 1024,
            pool_bytes: 8 << 20,
            initial_window: 8 << 10,
            max_window: 512 << 10,
            connect_timeout: 2_000_000_000,
            shutdown_timeout: 8_000_000_000,
            quantum: 4096,
            packet_overhead: 576,
            tells_reason: false,
        }
    }
}

/// Largest window of either side that is used: half the range of the 32-bit counters less a bit, so that "ahead" and
/// "behind" stay apart.
pub(crate) const WINDOW_MAX: u32 = 1 << 30;

impl EngineConfig {
    /// Brings every value into the range in which the arithmetic of the engine is exact.
    pub(crate) fn sane(mut self) -> Self {
        self.max_streams = self.max_streams.clamp(1, crate::STREAMS_MAX);
        self.initial_window = self.initial_window.clamp(1, WINDOW_MAX);
        self.max_window = self.max_window.clamp(self.initial_window, WINDOW_MAX);
        self.quantum = self.quantum.clamp(1, WINDOW_MAX);
        self
    }
}
