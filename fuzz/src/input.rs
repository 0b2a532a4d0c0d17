//! A cursor over an input. Behind the end it reads zeroes, so every prefix of an input is an input too.

/// The part of an input that is not read yet.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Tells whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let n = N.min(self.0.len());
        let mut bytes = [0; N];
        bytes[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        bytes
    }

    /// Takes a byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Takes two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Takes four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Takes eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Takes a byte, less than `n` (1..=256).
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.u8()) % n
    }

    /// Takes a byte and chooses one of `from`.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Takes a byte and returns one bit of it.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// Takes up to `n` bytes.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Takes a number: near a limit of arithmetic, or any, or a small one.
    pub fn edge32(&mut self) -> u32 {
        match self.u8() {
            0x00..=0x7f => u32::from(self.u16()),
            0x80..=0xbf => {
                let edge = self.pick(&[0, 1 << 16, 1 << 20, 1 << 30, 1 << 31, u32::MAX]);
                edge.wrapping_add(u32::from(self.u8())).wrapping_sub(128)
            }
            _ => self.u32(),
        }
    }
}
