//! The record header, bit by bit.
//!
//! | bits | field | valid values |
//! |---|---|---|
//! | 0..31 | length of the record in bytes | up to [`record_max`](crate::Geometry::record_max); for a pad: exactly to the end of the ring |
//! | 31 | committed | 1 |
//! | 32..40 | kind | 0 data, 1 pad |
//! | 40..64 | reserved | 0 |
//!
//! An all-zero header means that nothing was written here yet.

/// Page size in bytes. The words of different writers are on different pages.
pub const PAGE: usize = 4096;
/// Size of a header in bytes.
pub const HEADER: usize = 8;
/// Largest ring in bytes: the length field of a header can hold it.
pub const SIZE_MAX: usize = 1 << 30;

/// The header at a position where nothing was written yet.
pub(crate) const EMPTY: u64 = 0;

const LEN_BITS: u32 = 31;
const LEN_MASK: u64 = (1 << LEN_BITS) - 1;
const COMMITTED: u64 = 1 << 31;
const KIND_SHIFT: u32 = 32;
const KIND_MASK: u64 = 0xff;
const RESERVED: u64 = u64::MAX << 40;

const _: () = assert!(SIZE_MAX as u64 <= LEN_MASK);
const _: () = assert!(LEN_MASK & COMMITTED == 0 && COMMITTED.trailing_zeros() == LEN_BITS);
const _: () = assert!(RESERVED & (KIND_MASK << KIND_SHIFT) == 0);

/// A parsed header. Its values were not checked against the ring yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// Nothing was written yet.
    Empty,
    /// A record of this many bytes.
    Data(u64),
    /// A pad of this many bytes.
    Pad(u64),
    /// A header that no correct producer writes.
    Bad,
}

impl Header {
    /// Parses any word.
    pub fn parse(word: u64) -> Self {
        let len = word & LEN_MASK;
        match (word & COMMITTED != 0, word >> KIND_SHIFT & KIND_MASK) {
            _ if word == EMPTY => Self::Empty,
            _ if word & RESERVED != 0 => Self::Bad,
            (true, 0) => Self::Data(len),
            (true, 1) => Self::Pad(len),
            _ => Self::Bad,
        }
    }

    /// The header of a record of `len` bytes.
    #[inline]
    pub(crate) const fn data(len: u64) -> u64 {
        COMMITTED | len & LEN_MASK
    }

    /// The header of a pad of `len` bytes.
    pub(crate) fn pad(len: u64) -> u64 {
        1 << KIND_SHIFT | COMMITTED | len & LEN_MASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        assert_eq!(Header::data(5).to_le_bytes(), [5, 0, 0, 0x80, 0, 0, 0, 0]);
        assert_eq!(
            Header::pad(0x1234).to_le_bytes(),
            [0x34, 0x12, 0, 0x80, 1, 0, 0, 0]
        );
    }

    #[test]
    fn every_bit_of_a_good_header_matters() {
        for good in [Header::data(40), Header::pad(40)] {
            for bit in 0..64 {
                let word = good ^ 1 << bit;
                let (was, is) = (Header::parse(good), Header::parse(word));
                assert!(was != is, "bit {bit} of {good:#x}");
            }
        }
        assert_eq!(Header::parse(0), Header::Empty);
        assert_eq!(Header::parse(7), Header::Bad);
    }
}
