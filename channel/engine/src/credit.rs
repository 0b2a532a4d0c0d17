//! Credit (virtio 1.3 §5.10.6.3) in both directions, and the pool.
//!
//! The counters on the wire have 32 bits and wrap. [`TxCredit`] extends them to 64 bits, so that it can exactly tell
//! "more than was sent" from "less than was announced" (R36, R41). [`RxWindow`] keeps our own side in 32 bits, where
//! every difference is at most a window. [`Marks`] counts packets in groups. [`Pool`] lends windows. The lent sum
//! never exceeds its size, so a VM's memory is bounded whatever windows the peer announces (R37).

use crate::Violation;
use crate::config::WINDOW_MAX;

/// How far a peer's `fwd_cnt` may be behind its highest value so far. Linux reads it before it queues the packet, so
/// packets of two threads may arrive out of order. The credit of such a packet is outdated and is ignored. A larger
/// difference breaks the protocol.
pub(crate) const REORDER_MAX: u32 = 1 << 20;

/// The credit that the peer gives us for sending.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TxCredit {
    sent: u64,
    taken: u64,
    buf_alloc: u32,
    marks: Marks,
}

impl TxCredit {
    /// Starts a stream. The peer's window is unknown, so it is 0.
    pub(crate) const fn new() -> Self {
        Self {
            sent: 0,
            taken: 0,
            buf_alloc: 0,
            marks: Marks::new(),
        }
    }

    /// Returns the size of the peer's buffer for this stream, as it announced it last.
    pub(crate) fn peer_buffer(&self) -> u32 {
        self.buf_alloc
    }

    /// Returns the bytes that were sent and that the peer's application has not taken yet.
    pub(crate) fn in_flight(&self) -> u64 {
        self.sent - self.taken
    }

    /// Applies the credit fields of a packet. Returns true if the peer took bytes or its window changed.
    pub(crate) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<bool, Violation> {
        let ahead = fwd_cnt.wrapping_sub(self.taken as u32);
        if u64::from(ahead) <= self.in_flight() {
            let news = ahead > 0 || buf_alloc != self.buf_alloc;
            self.taken += u64::from(ahead);
            self.buf_alloc = buf_alloc;
            self.marks.retire(self.taken as u32);
            return Ok(news);
        }
        let behind = (self.taken as u32).wrapping_sub(fwd_cnt);
        if behind <= REORDER_MAX && u64::from(behind) <= self.taken {
            return Ok(false);
        }
        Err(Violation::FwdCntAhead {
            fwd_cnt,
            tx_cnt: self.sent as u32,
        })
    }

    /// Checks whether `fwd_cnt` is possible for this stream. A late packet from an earlier stream of the same port
    /// pair may carry an impossible one.
    pub(crate) fn plausible(&self, fwd_cnt: u32) -> Result<(), Violation> {
        let mut copy = *self;
        copy.update(self.buf_alloc, fwd_cnt).map(|_| ())
    }

    /// Returns how many bytes may be sent now; 0 while the peer holds as many packets as it can.
    pub(crate) fn budget(&self, packet_overhead: u32) -> u32 {
        if self.marks.packets >= packet_limit(self.buf_alloc, packet_overhead) {
            return 0;
        }
        self.bytes()
    }

    /// Returns the byte credit alone. If the window is smaller than the bytes in flight the credit is 0, not a huge
    /// number (R36).
    pub(crate) fn bytes(&self) -> u32 {
        let window = u64::from(self.buf_alloc.min(WINDOW_MAX));
        window.saturating_sub(self.in_flight()) as u32
    }

    /// Accounts for a packet of `n` bytes.
    pub(crate) fn send(&mut self, n: u32, packet_overhead: u32) {
        self.sent += u64::from(n);
        if packet_overhead > 0 {
            let limit = packet_limit(self.buf_alloc, packet_overhead);
            self.marks
                .push(self.sent as u32, (limit / MARKS as u32).max(1));
        }
    }
}

/// Number of packets that the peer holds before it resets the stream. It resets when (packets + 1) x overhead >
/// buf_alloc, and checks this before it queues the new packet. One packet is always allowed; with none the stream
/// would stall.
fn packet_limit(buf_alloc: u32, packet_overhead: u32) -> u32 {
    match buf_alloc.checked_div(packet_overhead) {
        None => u32::MAX,
        Some(n) => n.max(1),
    }
}

const MARKS: usize = 8;

/// Packets in flight, in at most [`MARKS`] groups: (end position of the last packet, number of packets). A group
/// counts until its last byte is taken. So the count is never too low, and in a steady stream too high by at most one
/// group.
#[derive(Clone, Copy, Debug)]
struct Marks {
    groups: [(u32, u32); MARKS],
    head: u8,
    len: u8,
    packets: u32,
}

impl Marks {
    const fn new() -> Self {
        Self {
            groups: [(0, 0); MARKS],
            head: 0,
            len: 0,
            packets: 0,
        }
    }

    fn push(&mut self, end: u32, group: u32) {
        self.packets = self.packets.saturating_add(1);
        if self.len > 0 {
            let last =
                &mut self.groups[(usize::from(self.head) + usize::from(self.len) - 1) % MARKS];
            if last.1 < group || usize::from(self.len) == MARKS {
                *last = (end, last.1.saturating_add(1));
                return;
            }
        }
        self.groups[(usize::from(self.head) + usize::from(self.len)) % MARKS] = (end, 1);
        self.len += 1;
    }

    fn retire(&mut self, taken: u32) {
        while self.len > 0 {
            let (end, packets) = self.groups[usize::from(self.head)];
            // The two are at most WINDOW_MAX apart, so the sign of the difference tells which is ahead.
            if (taken.wrapping_sub(end) as i32) < 0 {
                return;
            }
            self.packets = self.packets.saturating_sub(packets);
            self.head = (self.head + 1) % MARKS as u8;
            self.len -= 1;
        }
    }
}

/// The window that we give the peer. It only ever grows. A guest whose window shrinks below its bytes in flight may
/// compute a huge credit (CVE-2026-23069). We would then reset its stream, although we caused the fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RxWindow {
    received: u32,
    taken: u32,
    window: u32,
    /// `taken` and `window` as last announced to the peer.
    announced_taken: u32,
    announced_window: u32,
    /// Bytes taken since the window grew last.
    since_growth: u32,
    /// The peer has filled most of the window since it grew last.
    pressed: bool,
}

impl RxWindow {
    pub(crate) const fn new(window: u32) -> Self {
        Self {
            received: 0,
            taken: 0,
            window,
            announced_taken: 0,
            announced_window: 0,
            since_growth: 0,
            pressed: false,
        }
    }

    pub(crate) fn window(&self) -> u32 {
        self.window
    }

    /// Returns the bytes that were delivered and not yet consumed: never more than the window.
    pub(crate) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.taken)
    }

    /// Accounts for `len` received bytes.
    pub(crate) fn receive(&mut self, len: u32) -> Result<(), Violation> {
        let room = self.window - self.held();
        if len > room {
            return Err(Violation::CreditExceeded { len, window: room });
        }
        self.received = self.received.wrapping_add(len);
        let used = self.received.wrapping_sub(self.announced_taken);
        self.pressed |= used >= self.window - self.window / 4;
        Ok(())
    }

    /// Marks up to `n` of the held bytes as taken.
    pub(crate) fn take(&mut self, n: u32) {
        let n = n.min(self.held());
        self.taken = self.taken.wrapping_add(n);
        self.since_growth = self.since_growth.saturating_add(n);
    }

    /// Returns by how much the window should grow. It doubles after a whole window has passed through, if the peer
    /// filled the window and the sink keeps up.
    pub(crate) fn growth(&self, max: u32) -> Option<u32> {
        let worth = self.pressed
            && self.window < max
            && self.since_growth >= self.window
            && self.held() <= self.window / 2;
        worth.then(|| self.window.min(max - self.window))
    }

    pub(crate) fn grow(&mut self, by: u32) {
        self.window += by;
        self.since_growth = 0;
        self.pressed = false;
    }

    /// Delays growth until another window has passed through, because the pool had nothing left.
    pub(crate) fn postpone_growth(&mut self) {
        self.since_growth = 0;
        self.pressed = false;
    }

    /// Returns true if the peer should get a credit update: it sees at most half of the window free, and the update
    /// would free another quarter. Of a longer window the peer uses only `usable` bytes.
    ///
    /// No stream stalls without more updates. If the peer sees no free window, it has sent a whole window of bytes.
    /// When the sink has taken all of them, the update frees that whole window.
    pub(crate) fn update_due(&self, usable: u32) -> bool {
        let (window, announced) = (self.window.min(usable), self.announced_window.min(usable));
        let used = self.received.wrapping_sub(self.announced_taken);
        let free = announced.saturating_sub(used);
        let gain = self
            .taken
            .wrapping_sub(self.announced_taken)
            .saturating_add(window - announced);
        free <= window / 2 && gain >= (window / 4).max(1)
    }

    /// Returns (buf_alloc, fwd_cnt) for a packet that is sent now, and records them as announced.
    pub(crate) fn announce(&mut self) -> (u32, u32) {
        self.announced_taken = self.taken;
        self.announced_window = self.window;
        (self.window, self.taken)
    }

    /// As `announce`, for a packet that may not be sent after all. Records nothing.
    pub(crate) fn peek(&self) -> (u32, u32) {
        (self.window, self.taken)
    }
}

/// Smallest window for a stream when the pool is nearly used up, in bytes (or the initial window, if that is smaller).
pub(crate) const WINDOW_FLOOR: u32 = 1 << 10;

/// First windows are longer while less than this part of the pool is lent: 1 / `HARDLY`.
const HARDLY: u64 = 8;
/// A longer first window is so many initial windows.
const GENEROUS: u32 = 8;

/// Lends windows to streams.
///
/// A new stream gets the initial window, or the floor if the pool is nearly used up. While the pool is hardly lent it gets
/// several initial windows, so that its first bytes fit without waiting for credit. A floor is reserved for every
/// free slot from the start. So with a pool of at least `max_streams` floors, no stream is ever refused for lack of
/// credit. Windows grow only from the first three quarters of the pool; the last quarter is reserved for new streams.
/// A window is returned when its stream ends.
pub(crate) struct Pool {
    total: u64,
    lent: u64,
    initial: u32,
    generous: u32,
    floor: u32,
}

impl Pool {
    pub(crate) fn new(total: u64, initial: u32, max: u32) -> Self {
        Self {
            total,
            lent: 0,
            initial,
            generous: match initial {
                // Windows this short are for tests of short windows.
                ..WINDOW_FLOOR => initial,
                _ => initial.saturating_mul(GENEROUS).min(max),
            },
            floor: initial.min(WINDOW_FLOOR),
        }
    }

    /// Lends the first window of a stream. After it, `slots_left` more streams are possible.
    pub(crate) fn open(&mut self, slots_left: u32) -> Option<u32> {
        let free = self.total - self.lent;
        let is_hardly_lent = self.lent + u64::from(self.generous) <= self.total / HARDLY;
        let window = if is_hardly_lent && self.spare(slots_left) >= u64::from(self.generous) {
            self.generous
        } else if self.spare(slots_left) >= u64::from(self.initial) {
            self.initial
        } else if free >= u64::from(self.floor) {
            self.floor
        } else {
            return None;
        };
        self.lent += u64::from(window);
        Some(window)
    }

    /// Lends `by` more bytes.
    pub(crate) fn grow(&mut self, by: u32, slots_left: u32) -> bool {
        let fits = self.spare(slots_left).saturating_sub(self.total / 4) >= u64::from(by);
        if fits {
            self.lent += u64::from(by);
        }
        fits
    }

    /// Takes a window back.
    pub(crate) fn close(&mut self, window: u32) {
        self.lent = self.lent.saturating_sub(u64::from(window));
    }

    /// Returns the number of lent bytes.
    pub(crate) fn lent(&self) -> u64 {
        self.lent
    }

    fn spare(&self, slots_left: u32) -> u64 {
        (self.total - self.lent).saturating_sub(u64::from(self.floor) * u64::from(slots_left))
    }
}
