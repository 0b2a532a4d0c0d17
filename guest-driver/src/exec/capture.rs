//! Output of a child: the first and the last bytes, in bounded memory however much it writes.

use adit_tasks::wire::Captured;

/// One stream being captured.
#[derive(Debug)]
pub struct Capture {
    /// Most bytes of the head, and of the tail.
    half: usize,
    head: Vec<u8>,
    /// The last bytes behind the head: trimmed whenever it has twice as many as it may.
    tail: Vec<u8>,
    total: u64,
}

impl Capture {
    /// Keeps at most `cap` bytes: the first half and the last half.
    pub fn new(cap: usize) -> Self {
        Self {
            half: cap / 2,
            head: Vec::new(),
            tail: Vec::new(),
            total: 0,
        }
    }

    /// Takes what the child wrote.
    pub fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let (head, rest) = bytes.split_at(bytes.len().min(self.half - self.head.len()));
        self.head.extend_from_slice(head);
        self.tail
            .extend_from_slice(&rest[rest.len().saturating_sub(self.half)..]);
        if self.tail.len() > 2 * self.half {
            self.trim();
        }
    }

    fn trim(&mut self) {
        self.tail.drain(..self.tail.len().saturating_sub(self.half));
    }

    /// What is reported: all of it, or head and tail of it.
    pub fn finish(mut self) -> Captured {
        self.trim();
        if self.total == (self.head.len() + self.tail.len()) as u64 {
            self.head.append(&mut self.tail);
        }
        Captured {
            head: self.head,
            tail: self.tail,
            total: self.total,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD_MAX: usize = 32 * 1024;
    const TAIL_MAX: usize = HEAD_MAX;

    fn captured(len: usize, split: usize) -> (Vec<u8>, Captured) {
        let all: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let mut c = Capture::new(HEAD_MAX + TAIL_MAX);
        all.chunks(split).for_each(|p| c.push(p));
        assert!(c.head.capacity() + c.tail.capacity() <= 8 * (HEAD_MAX + TAIL_MAX));
        (all, c.finish())
    }

    #[test]
    fn output_up_to_both_caps_is_whole() {
        for len in [0, 1, HEAD_MAX, HEAD_MAX + 1, HEAD_MAX + TAIL_MAX] {
            let (all, got) = captured(len, 4097);
            assert_eq!((got.head, got.tail.len(), got.total), (all, 0, len as u64));
        }
    }

    #[test]
    fn r93_longer_output_keeps_head_and_tail_and_says_how_much_there_was() {
        for split in [1000, 65_536, 10_000_000] {
            let (all, got) = captured(3_000_000, split);
            assert_eq!(got.total, 3_000_000);
            assert!(
                got.head == all[..HEAD_MAX] && got.tail == all[all.len() - TAIL_MAX..],
                "{split}"
            );
        }
    }
}
