//! Memory in which a test can watch every load and replace its result.
#![allow(dead_code)] // each test file uses only a part

use std::cell::{Cell, RefCell};

use adit_ringbuf::RingMem;

/// Memory for one thread. `lie` may replace the result of a load.
pub struct Watched<F> {
    pub bytes: RefCell<Vec<u8>>,
    pub loads: RefCell<Vec<usize>>,
    pub lie: Cell<Option<F>>,
}

impl<F: FnMut(usize) -> Option<u64>> Watched<F> {
    pub fn new(len: usize) -> Self {
        Self {
            bytes: RefCell::new(vec![0; len]),
            loads: RefCell::new(Vec::new()),
            lie: Cell::new(None),
        }
    }

    pub fn word(&self, at: usize) -> u64 {
        let bytes = self.bytes.borrow();
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    pub fn set(&self, at: usize, word: u64) {
        self.bytes.borrow_mut()[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
}

impl<F: FnMut(usize) -> Option<u64>> RingMem for Watched<F> {
    fn len(&self) -> usize {
        self.bytes.borrow().len()
    }
    fn load(&self, at: usize) -> u64 {
        self.loads.borrow_mut().push(at);
        let mut lie = self.lie.take();
        let told = lie.as_mut().and_then(|f| f(at));
        self.lie.set(lie);
        told.unwrap_or_else(|| self.word(at))
    }
    fn store(&self, at: usize, word: u64) {
        self.set(at, word);
    }
    fn store_relaxed(&self, at: usize, word: u64) {
        self.set(at, word);
    }
    fn fence(&self) {}
    fn write(&self, at: usize, bytes: &[u8]) {
        self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn zero(&self, at: usize, len: usize) {
        self.bytes.borrow_mut()[at..at + len].fill(0);
    }
    fn read(&self, at: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.bytes.borrow()[at..at + bytes.len()]);
    }
}

/// Repeatable pseudo-random numbers (Knuth's MMIX generator).
pub struct Noise(pub u64);

impl Noise {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 24) % n
    }
}
