//! Credit (virtio 1.3 §5.10.6.3), both ways, and the pool.
//!
//! The counters on the wire are 32 bits wide and wrap. [`TxCredit`] widens them to 64 bits, so that "ahead of what was
//! sent" and "behind what was said" are told apart exactly (R36, R41); [`RxWindow`] keeps our own side in 32 bits,
//! where every difference is at most a window. [`Marks`] counts packets by group. [`Pool`] lends windows: what is lent
//! never exceeds its size, so a VM's memory is bounded whatever windows the peer announces (R37).

use crate::Violation;
use crate::config::WINDOW_MAX;

/// How far behind its last word a peer's `fwd_cnt` may be: Linux samples it before it queues the packet, so two of its
/// threads may overtake each other. Such a packet's credit is old news and is left out. Farther behind is a lie.
pub(crate) const REORDER_MAX: u32 = 1 << 20;

/// What the peer lets us send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TxCredit {
    sent: u64,
    taken: u64,
    buf_alloc: u32,
    marks: Marks,
}

impl TxCredit {
    /// Starts a stream; the peer's window is unknown, that is 0.
    pub(crate) const fn new() -> Self {
        Self {
            sent: 0,
            taken: 0,
            buf_alloc: 0,
            marks: Marks::new(),
        }
    }

    /// Returns the bytes sent and not yet taken by the peer.
    pub(crate) fn in_flight(&self) -> u64 {
        self.sent - self.taken
    }

    /// Applies the credit fields of a packet; true if the peer took something or its window changed.
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

    /// Checks that `fwd_cnt` can be this stream's at all: a late packet of the pair's former stream may show that it
    /// is late.
    pub(crate) fn plausible(&self, fwd_cnt: u32) -> Result<(), Violation> {
        let mut copy = *self;
        copy.update(self.buf_alloc, fwd_cnt).map(|_| ())
    }

    /// Returns how many bytes may be sent now: 0 while the peer holds as many packets as it can.
    pub(crate) fn budget(&self, packet_overhead: u32) -> u32 {
        if self.marks.packets >= packet_limit(self.buf_alloc, packet_overhead) {
            return 0;
        }
        self.bytes()
    }

    /// Returns the byte credit alone. A window that shrank below what is in flight is 0, not a huge number (R36).
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

/// Packets that the peer holds before it resets the stream: it does so when (packets + 1) x overhead > buf_alloc, looked
/// at before the new one is queued. One is always allowed, or nothing would ever move.
fn packet_limit(buf_alloc: u32, packet_overhead: u32) -> u32 {
    match buf_alloc.checked_div(packet_overhead) {
        None => u32::MAX,
        Some(n) => n.max(1),
    }
}

const MARKS: usize = 8;

/// Packets in flight, as at most [`MARKS`] groups: (where the last one ends, how many). A group counts until its last
/// byte is taken, so the count is never too low, and too high by one group at most in a steady stream.
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
            // At most WINDOW_MAX lie between the two, so the sign tells who is ahead.
            if (taken.wrapping_sub(end) as i32) < 0 {
                return;
            }
            self.packets = self.packets.saturating_sub(packets);
            self.head = (self.head + 1) % MARKS as u8;
            self.len -= 1;
        }
    }
}

/// What we let the peer send. The window only ever grows: a guest that sees it shrink below what it has in flight may
/// compute a huge credit from it (CVE-2026-23069), and would then be reset for our doing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RxWindow {
    received: u32,
    taken: u32,
    window: u32,
    /// `taken` and `window` as last told to the peer.
    told_taken: u32,
    told_window: u32,
    /// Bytes taken since the window last grew.
    since_growth: u32,
    /// The peer filled most of the window since it last grew.
    pressed: bool,
}

impl RxWindow {
    pub(crate) const fn new(window: u32) -> Self {
        Self {
            received: 0,
            taken: 0,
            window,
            told_taken: 0,
            told_window: 0,
            since_growth: 0,
            pressed: false,
        }
    }

    pub(crate) fn window(&self) -> u32 {
        self.window
    }

    /// Returns the bytes delivered and not yet consumed: never more than the window.
    pub(crate) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.taken)
    }

    /// Receives `len` bytes.
    pub(crate) fn receive(&mut self, len: u32) -> Result<(), Violation> {
        let room = self.window - self.held();
        if len > room {
            return Err(Violation::CreditExceeded { len, window: room });
        }
        self.received = self.received.wrapping_add(len);
        let used = self.received.wrapping_sub(self.told_taken);
        self.pressed |= used >= self.window - self.window / 4;
        Ok(())
    }

    /// Takes up to `n` of the bytes that are held.
    pub(crate) fn take(&mut self, n: u32) {
        let n = n.min(self.held());
        self.taken = self.taken.wrapping_add(n);
        self.since_growth = self.since_growth.saturating_add(n);
    }

    /// Returns by how much the window should grow: it doubles once a whole window went through, the peer pressed
    /// against it and the sink keeps pace.
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

    /// Puts growth off until another window went through: the pool had nothing.
    pub(crate) fn postpone_growth(&mut self) {
        self.since_growth = 0;
        self.pressed = false;
    }

    /// Returns true if the peer should hear of what was taken: it sees at most half a window free, and would see a
    /// quarter more.
    ///
    /// No stream hangs on it: a peer that sees nothing free has a window's bytes here untold, and when the sink has
    /// taken them all the gain is that whole window.
    pub(crate) fn update_due(&self) -> bool {
        let used = self.received.wrapping_sub(self.told_taken);
        let free = self.told_window.saturating_sub(used);
        let gain = self
            .taken
            .wrapping_sub(self.told_taken)
            .saturating_add(self.window - self.told_window);
        free <= self.window / 2 && gain >= (self.window / 4).max(1)
    }

    /// Returns (buf_alloc, fwd_cnt) for a packet that is sent now.
    pub(crate) fn tell(&mut self) -> (u32, u32) {
        self.told_taken = self.taken;
        self.told_window = self.window;
        (self.window, self.taken)
    }

    /// As `tell`, for a packet that may not be sent after all.
    pub(crate) fn peek(&self) -> (u32, u32) {
        (self.window, self.taken)
    }
}

/// Smallest window that a stream is given when the pool is nearly used up, bytes (or the initial window, if less).
pub(crate) const WINDOW_FLOOR: u32 = 1 << 10;

/// Lends windows.
///
/// A new stream gets the initial window, or at exhaustion the floor; a floor for each slot not in use is set aside from
/// the start, so with a pool of at least `max_streams` floors none is ever refused for credit. Windows grow only out of
/// the upper three quarters: the last quarter is for newcomers. What was lent comes back when the stream ends.
pub(crate) struct Pool {
    total: u64,
    lent: u64,
    initial: u32,
    floor: u32,
}

impl Pool {
    pub(crate) fn new(total: u64, initial: u32) -> Self {
        Self {
            total,
            lent: 0,
            initial,
            floor: initial.min(WINDOW_FLOOR),
        }
    }

    /// Lends a first window; `slots_left` more streams may come after this one.
    pub(crate) fn open(&mut self, slots_left: u32) -> Option<u32> {
        let free = self.total - self.lent;
        let window = if self.spare(slots_left) >= u64::from(self.initial) {
            self.initial
        } else if free >= u64::from(self.floor) {
            self.floor
        } else {
            return None;
        };
        self.lent += u64::from(window);
        Some(window)
    }

    /// Lends `by` more.
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

    /// Returns the bytes lent.
    pub(crate) fn lent(&self) -> u64 {
        self.lent
    }

    fn spare(&self, slots_left: u32) -> u64 {
        (self.total - self.lent).saturating_sub(u64::from(self.floor) * u64::from(slots_left))
    }
}
