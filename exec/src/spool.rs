//! What a command has written and nobody is known to have: bounded, and found again by offset.
//!
//! ```text
//! 0 ─ gone ─ base ─ have it, kept as long as there is room ─ floor ─ unread ─ end
//!                                                     sent ┘ (between base and end)
//! ```
//! `floor` is as far as a reader has said to have it (`acked`), or as it is sent to one who asked for it again. Behind it nothing
//! goes: who writes more than [`SPOOL_MAX`] waits for a reader.

use std::collections::VecDeque;

/// Most bytes of one output that are kept.
pub const SPOOL_MAX: usize = 256 << 10;

/// One output.
#[derive(Debug, Default)]
pub struct Spool {
    bytes: VecDeque<u8>,
    /// Offset of the first of them.
    base: u64,
    sent: u64,
    acked: u64,
}

impl Spool {
    /// Offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Offset of the first byte that is still here.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// How far it is sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// How far it is known to have arrived.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    fn floor(&self) -> u64 {
        self.acked.min(self.sent)
    }

    /// How many bytes it takes now.
    pub fn room(&self) -> usize {
        let unread = usize::try_from(self.end() - self.floor()).unwrap_or(SPOOL_MAX);
        SPOOL_MAX.saturating_sub(unread)
    }

    /// Takes the first of these bytes, as many as there is [`room`](Self::room) for, and returns how many.
    #[must_use]
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.room());
        let over = (self.bytes.len() + n).saturating_sub(SPOOL_MAX);
        self.drop_first(over);
        self.bytes.extend(&bytes[..n]);
        n
    }

    fn drop_first(&mut self, n: usize) {
        self.bytes.drain(..n);
        self.base += n as u64;
    }

    /// Bytes that are not sent yet, of which there may be more, with the offset of the first.
    pub fn unsent(&self) -> (u64, &[u8]) {
        // `sent` is never below `base`: what is dropped is below the floor.
        let at = usize::try_from(self.sent - self.base).unwrap_or(usize::MAX);
        let (first, second) = self.bytes.as_slices();
        let rest = match at.checked_sub(first.len()) {
            None => &first[at..],
            Some(at) => second.get(at..).unwrap_or_default(),
        };
        (self.sent, rest)
    }

    /// So many of them are sent.
    pub fn has_sent(&mut self, n: usize) {
        self.sent = (self.sent + n as u64).min(self.end());
    }

    /// What was sent has arrived as far as that. False: so much was not sent.
    #[must_use]
    pub fn ack(&mut self, offset: u64) -> bool {
        let is_sent = offset <= self.sent;
        if is_sent {
            self.acked = self.acked.max(offset);
        }
        is_sent
    }

    /// Somebody says to have it as far as that, whoever it was sent to.
    pub fn has(&mut self, offset: u64) {
        self.acked = self.acked.max(offset.min(self.end()));
    }

    /// Nobody will ask again for what was sent.
    pub fn forget_sent(&mut self) {
        self.acked = self.acked.max(self.sent);
        let n = usize::try_from(self.sent - self.base).unwrap_or(0);
        self.drop_first(n);
        if self.bytes.is_empty() {
            // A burst is not kept in memory for as long as the command runs; what one read brings is, for the next one.
            self.bytes.shrink_to(SPOOL_MAX / 4);
        }
    }

    /// Sends from there on again. False: it is not here.
    #[must_use]
    pub fn rewind(&mut self, offset: u64) -> bool {
        let is_here = (self.base..=self.end()).contains(&offset);
        if is_here {
            self.sent = offset;
        }
        is_here
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Do {
        Push(usize),
        Send(usize),
        Ack(u64),
        Has(u64),
        Forget,
        Rewind(u64),
    }

    fn step() -> impl Strategy<Value = Do> {
        prop_oneof![
            (0..SPOOL_MAX + 9).prop_map(Do::Push),
            (0..SPOOL_MAX).prop_map(Do::Send),
            (0..3 * SPOOL_MAX as u64).prop_map(Do::Ack),
            (0..3 * SPOOL_MAX as u64).prop_map(Do::Has),
            Just(Do::Forget),
            (0..3 * SPOOL_MAX as u64).prop_map(Do::Rewind),
        ]
    }

    fn byte(offset: u64) -> u8 {
        (offset % 251) as u8
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_nobody_has_is_never_dropped_and_memory_is_bounded(steps in prop::collection::vec(step(), 0..40)) {
            let mut spool = Spool::default();
            let mut written = 0_u64;
            for step in steps {
                let before = spool.acked().min(spool.sent());
                match step {
                    Do::Push(n) => {
                        let bytes: Vec<u8> = (written..written + n as u64).map(byte).collect();
                        let taken = spool.push(&bytes);
                        prop_assert_eq!(taken, n.min(SPOOL_MAX - (written - before) as usize));
                        written += taken as u64;
                        prop_assert!(spool.base() <= before);
                    }
                    Do::Send(n) => {
                        let (at, unsent) = spool.unsent();
                        let n = n.min(unsent.len());
                        prop_assert!(unsent[..n].iter().zip(at..).all(|(b, at)| *b == byte(at)));
                        spool.has_sent(n);
                    }
                    Do::Ack(offset) => {
                        let sent = spool.sent();
                        prop_assert_eq!(spool.ack(offset), offset <= sent);
                    }
                    Do::Has(offset) => {
                        spool.has(offset);
                        prop_assert!(spool.acked() <= written);
                    }
                    Do::Forget => spool.forget_sent(),
                    Do::Rewind(offset) => {
                        let is_here = spool.base() <= offset && offset <= spool.end();
                        prop_assert_eq!(spool.rewind(offset), is_here);
                    }
                }
                prop_assert_eq!(spool.end(), written);
                prop_assert!(spool.end() - spool.base() <= SPOOL_MAX as u64);
                prop_assert!(spool.base() <= spool.sent() && spool.sent() <= spool.end());
            }
        }
    }

    #[test]
    fn a_full_spool_takes_nothing_until_somebody_has_read() {
        let mut spool = Spool::default();
        assert_eq!(spool.push(&vec![7; SPOOL_MAX + 1]), SPOOL_MAX);
        assert_eq!((spool.room(), spool.push(b"x")), (0, 0));
        spool.has_sent(10);
        assert_eq!(spool.room(), 0);
        assert!(spool.ack(10) && !spool.ack(11));
        assert_eq!(spool.room(), 10);
        // What was read is still here while there is room for it.
        assert!(spool.rewind(0));
        assert_eq!(spool.room(), 0);
        assert!(spool.rewind(10));
        assert_eq!(spool.push(b"0123456789ab"), 10);
        assert_eq!(spool.base(), 10);
        assert!(!spool.rewind(9));
    }
}
