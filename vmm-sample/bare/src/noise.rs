//! Numbers that look random, the same ones for the same seed.

use crate::rude::COMMITTED;

/// Repeatable noise (xorshift).
#[derive(Debug)]
pub struct Noise(u64);

impl Noise {
    /// Any seed but zero; of zero, one.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One that is less than `n`, which is one at least.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() >> 16) as usize % n.max(1)
    }

    /// One of these.
    pub fn one_of(&mut self, words: &[u64]) -> u64 {
        words[self.below(words.len())]
    }

    /// Any number, and often one that is near to a limit of a ring's.
    pub fn word(&mut self) -> u64 {
        let n = self.number();
        match n % 4 {
            0 => n >> 8,
            1 => 1 << (n >> 8 & 63),
            2 => (n >> 8 & 0xffff) | COMMITTED,
            _ => u64::MAX - (n >> 8 & 0xff),
        }
    }
}
