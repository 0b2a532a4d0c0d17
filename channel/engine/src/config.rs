//! Limits and times of one engine. A value out of range is clamped and is never an error: see `sane`.

/// Limits and times of one engine. Each of them bounds what one VM can use of the host's resources.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Maximum number of streams at a time, opened by either side (default 1,024; at most
    /// [`STREAMS_MAX`](crate::STREAMS_MAX)). Only our side may open the last eighth, so that no process behind the
    /// peer can make the peer unreachable for us.
    pub max_streams: u32,
    /// Bytes of receive window that all streams of this VM share (default 8 MiB). The sum of all windows never exceeds
    /// it, so it bounds the bytes that the shell may have to hold.
    pub pool_bytes: u64,
    /// Window at the start of a stream, in bytes (default 8 KiB). While less than an eighth of the pool is lent it is eight
    /// times as long, but `max_window` at most.
    pub initial_window: u32,
    /// Largest window that a stream can grow to by use, in bytes (default 512 KiB: a sixteenth of the pool).
    pub max_window: u32,
    /// Time in ns after which an unanswered request, of either side, ends with `Timeout` (default 2 s).
    pub connect_timeout: u64,
    /// Time in ns after which a stream that we shut down both ways is reset (default 8 s, the same as in Linux).
    pub shutdown_timeout: u64,
    /// Bytes that a stream may send per turn while others wait (default 4,096). A turn is one packet of any size, so
    /// the last of n streams waits for at most n - 1 packets.
    pub quantum: u32,
    /// A newer Linux guest resets a stream when it holds more than buf_alloc / this many packets of it (0 = no limit;
    /// default 576, Linux's `SKB_TRUESIZE(0)`).
    pub packet_overhead: u32,
    /// The peer is an engine like this one, and not Linux. Both sides put the reason of a reset into its flags
    /// ([`PeerReason`](crate::PeerReason)); virtio has no such field. And the peer uses our whole window, whatever its own is.
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

/// Largest window of either side that is used. It is well below half the range of the 32-bit counters, so that "ahead"
/// and "behind" can be told apart.
pub(crate) const WINDOW_MAX: u32 = 1 << 30;

impl EngineConfig {
    /// Clamps every value to the range in which the arithmetic of the engine is exact.
    pub(crate) fn sane(mut self) -> Self {
        self.max_streams = self.max_streams.clamp(1, crate::STREAMS_MAX);
        self.initial_window = self.initial_window.clamp(1, WINDOW_MAX);
        self.max_window = self.max_window.clamp(self.initial_window, WINDOW_MAX);
        self.quantum = self.quantum.clamp(1, WINDOW_MAX);
        self
    }
}
