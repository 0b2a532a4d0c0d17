//! Pseudo-random numbers: the same seed gives the same numbers.

use crate::attacks::COMMITTED;

/// A xorshift generator.
#[derive(Debug)]
pub struct Noise(u64);

impl Noise {
    /// Starts from a seed. The generator would stay at zero, so zero becomes one.
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

    /// A number less than `n`. `n` is at least one.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() >> 16) as usize % n.max(1)
    }

    /// One of `words`.
    pub fn one_of(&mut self, words: &[u64]) -> u64 {
        words[self.below(words.len())]
    }

    /// A random number. Often it is near one of a ring's limits.
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
