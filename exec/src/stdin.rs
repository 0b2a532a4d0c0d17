//! A command's input on its way: what the client has sent and the command has not read.

use std::collections::VecDeque;

/// How far a client may be ahead of the command.
pub const STDIN_WINDOW: usize = 256 << 10;
/// The client hears that more may come when so much of the window is free again.
const STEP: u64 = (STDIN_WINDOW / 4) as u64;

#[derive(Debug, Default)]
pub(crate) struct Stdin {
    bytes: VecDeque<u8>,
    received: u64,
    /// The client has said that there is no more.
    ended: bool,
    /// The command reads no more; what comes is dropped.
    closed: bool,
    /// How far the client knows that it may go on.
    told: u64,
    told_closed: bool,
}

impl Stdin {
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    fn taken(&self) -> u64 {
        self.received - self.bytes.len() as u64
    }

    /// False: it does not continue what came before, or there is no room for it.
    #[must_use]
    pub(crate) fn receive(&mut self, offset: u64, bytes: &[u8]) -> bool {
        // By what the client knows, which is never more than there is room for.
        let may = (self.told + STDIN_WINDOW as u64).saturating_sub(self.received);
        if self.ended || offset != self.received || bytes.len() as u64 > may {
            return false;
        }
        self.received += bytes.len() as u64;
        if !self.closed {
            self.bytes.extend(bytes);
        }
        true
    }

    #[must_use]
    pub(crate) fn end(&mut self, offset: u64) -> bool {
        let fits = !self.ended && offset == self.received;
        self.ended |= fits;
        fits
    }

    pub(crate) fn unwritten(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    pub(crate) fn wrote(&mut self, n: usize) {
        self.bytes.drain(..n.min(self.bytes.len()));
        if self.bytes.is_empty() {
            self.bytes.shrink_to(STDIN_WINDOW / 16);
        }
    }

    /// Nobody reads it any more.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        self.bytes = VecDeque::new();
    }

    /// All of it is written: the command is to see the end.
    pub(crate) fn is_done(&self) -> bool {
        self.ended && self.bytes.is_empty()
    }

    /// How far the client may count on, if that is worth a word.
    pub(crate) fn poll_taken(&mut self) -> Option<u64> {
        let taken = self.taken();
        let is_worth = taken >= self.told + STEP && !self.ended && !self.closed;
        is_worth.then(|| {
            self.told = taken;
            taken
        })
    }

    pub(crate) fn poll_closed(&mut self) -> bool {
        self.closed && !self.ended && !std::mem::replace(&mut self.told_closed, true)
    }

    /// Another client goes on with it.
    pub(crate) fn anew(&mut self) {
        self.told = self.taken();
        self.told_closed = false;
    }

    /// What the client knows to be taken.
    pub(crate) fn told(&self) -> u64 {
        self.told
    }

    /// Whether a client may send any.
    pub(crate) fn is_open(&self) -> bool {
        !self.ended && !self.closed
    }
}
