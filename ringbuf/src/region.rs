//! A region: several lanes, each with one ring per direction. Host and guest write different pages.
//!
//! | page | writer | offset: field |
//! |---|---|---|
//! | 0 | host | 0 magic `ADITRNG1` · 8 u16 major = 1, u16 minor, u32 bytes of this head · 16 u64 bytes of the region · 24 u64 features offered · 32 u64 epoch · 40 u8 lanes (1 to 4), u8 log2 of the alignment (3 or 6), u16 zero, u32 longest record · 48 16 bytes of identity · 64 + 32 l lane l: offset and size to the guest, offset and size to the host, u64 each · 248 u64 CRC-32C of all bytes before it |
//! | 1 | host | 0 its state word ([`session`](crate::session)) · 128 (1 + 3 l) lane l: `space_wake_at` to the guest; `cons` and `data_wake_at` to the host in the next 128 bytes each |
//! | 2 | guest | 0 its state word · 8 u64 features accepted · 128 (1 + 3 l) lane l: `space_wake_at` to the host; `cons` and `data_wake_at` to the guest likewise |
//! | 3.. | host, then guest | records to the guest, all lanes; then records to the host, all lanes; each direction starts at a page |
//!
//! All fields are little-endian, sizes are in bytes, and bytes that the table does not name are zero. The head is
//! copied once, word by word, and only the copy is used. So what a host writes to the head later has no effect. Each
//! word has 128 bytes to itself, because processors fetch cache lines in pairs.

use core::fmt;
use core::ops::Range;

use crc::{CRC_32_ISCSI, Crc};

use crate::layout::PAGE;
use crate::{Geometry, RingMem};

/// Maximum number of lanes in a region.
pub const LANES_MAX: usize = 4;
/// The first word of every region.
pub const MAGIC: u64 = u64::from_le_bytes(*b"ADITRNG1");
/// Major version of this layout. Another major version is a different, incompatible layout.
pub const MAJOR: u16 = 1;
/// Minor version: it grows with additions that older versions can ignore.
pub const MINOR: u16 = 0;

/// Offset of the host's state word, and of the page that only the host writes.
pub const HOST_WORD: usize = PAGE;
/// Offset of the guest's state word, and of the page that only the guest writes.
pub const GUEST_WORD: usize = 2 * PAGE;
/// Offset of the features that the guest accepted.
pub const ACCEPTED: usize = GUEST_WORD + 8;

const DATA: usize = 3 * PAGE;
const HEAD: usize = 256;
const HEAD_WORDS: usize = HEAD / 8;
const EPOCH: usize = 32;
const LANE_TABLE: usize = 64;
const LANE_ENTRY: usize = 32;
const CRC: usize = HEAD - 8;
const WORD: usize = 128;
/// Number of words that a lane has on each side's page.
const LANE_WORDS: usize = 3;

const _: () = assert!(LANE_TABLE + LANES_MAX * LANE_ENTRY <= CRC);
const _: () = assert!(WORD * (1 + LANES_MAX * LANE_WORDS) <= PAGE);
const _: () = assert!(HEAD <= PAGE && EPOCH.is_multiple_of(8) && CRC.is_multiple_of(8));

const CHECKSUM: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// A side of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The side that made the region.
    Host,
    /// The side that found the region.
    Guest,
}

/// Features of a region, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// No features.
    pub const NONE: Self = Self(0);
    /// Records continue across the end of a ring ([`Geometry::wraps`]): both sides map each ring twice in a row.
    pub const WRAP: Self = Self(1);
    /// All features that this version knows.
    pub const KNOWN: Self = Self::WRAP;

    /// Returns true if it contains every feature of `other`.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The features that are in both sets.
    pub fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// The size of the two rings of one lane, in bytes of records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lane {
    /// Ring from host to guest: a power of two, at least a page.
    pub to_guest: usize,
    /// Ring from guest to host, likewise.
    pub to_host: usize,
}

/// The specification of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    lanes: [Lane; LANES_MAX],
    count: usize,
    /// Alignment of records: 8 or 64.
    pub align: usize,
    /// Longest record in bytes; 0 for the longest that the smallest ring allows.
    pub record_max: usize,
    /// Features that the host offers.
    pub features: Features,
    /// Identity, for logs: both sides log the same value.
    pub id: [u8; 16],
}

/// Why a region cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionError {
    /// The memory contains no region.
    Magic {
        /// The first word of the memory.
        found: u64,
    },
    /// The region has another layout.
    Version {
        /// Its major version.
        found: u16,
    },
    /// The head is damaged, or is being written now.
    Checksum,
    /// A field is out of its range.
    Field {
        /// Name of the field.
        what: &'static str,
        /// Value of the field.
        value: u64,
        /// Limit of the field.
        limit: u64,
    },
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic { found } => write!(f, "not a ring region: it starts with {found:#018x}"),
            Self::Version { found } => {
                write!(
                    f,
                    "the ring region has layout version {found}, but this side knows only version {MAJOR}"
                )
            }
            Self::Checksum => {
                f.write_str("the head of the ring region does not match its checksum")
            }
            Self::Field { what, value, limit } => {
                write!(f, "ring region: {what} is {value:#x} (limit {limit:#x})")
            }
        }
    }
}

impl core::error::Error for RegionError {}

fn field<T>(what: &'static str, value: usize, limit: usize) -> Result<T, RegionError> {
    let (value, limit) = (value as u64, limit as u64);
    Err(RegionError::Field { what, value, limit })
}

impl Spec {
    /// Makes lanes of one size in both directions, with records aligned to 8 bytes.
    ///
    /// # Panics
    /// `lanes` is 0 or more than [`LANES_MAX`].
    pub fn uniform(lanes: usize, size: usize) -> Self {
        Self::new(
            &[Lane {
                to_guest: size,
                to_host: size,
            }; LANES_MAX][..lanes],
        )
    }

    /// Makes lanes of any sizes, with records aligned to 8 bytes.
    ///
    /// # Panics
    /// There are no lanes, or more than [`LANES_MAX`].
    pub fn new(lanes: &[Lane]) -> Self {
        assert!((1..=LANES_MAX).contains(&lanes.len()));
        let mut all = [Lane::default(); LANES_MAX];
        all[..lanes.len()].copy_from_slice(lanes);
        Self {
            lanes: all,
            count: lanes.len(),
            align: 8,
            record_max: 0,
            features: Features::NONE,
            id: [0; 16],
        }
    }

    /// The lanes, in order.
    pub fn lanes(&self) -> &[Lane] {
        &self.lanes[..self.count]
    }

    /// Size of the region in bytes.
    pub fn bytes(&self) -> usize {
        let rings = self.lanes().iter();
        DATA + rings
            .map(|lane| lane.to_guest + lane.to_host)
            .sum::<usize>()
    }

    /// Byte ranges that only the host writes, in whole pages: the head with the host's words, and the records to the
    /// guest. A VMM can map them read-only for its guest.
    pub fn written_by_host(&self) -> [Range<usize>; 2] {
        let records: usize = self.lanes().iter().map(|lane| lane.to_guest).sum();
        [0..GUEST_WORD, DATA..DATA + records]
    }

    fn limit(&self) -> usize {
        let sizes = self.lanes().iter().flat_map(|l| [l.to_guest, l.to_host]);
        let smallest = sizes.min().unwrap_or(0);
        Geometry::record_limit(smallest, self.align)
    }
}

/// A region whose head was written by this side, or read once and checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    spec: Spec,
    epoch: u64,
}

impl Region {
    /// Checks the specification of a new region.
    ///
    /// # Errors
    /// A field is out of its range.
    pub fn new(mut spec: Spec, epoch: u64) -> Result<Self, RegionError> {
        if spec.align != 8 && spec.align != 64 {
            return field("alignment", spec.align, 64);
        }
        for lane in spec.lanes() {
            for size in [lane.to_guest, lane.to_host] {
                let sizes = PAGE..=crate::layout::SIZE_MAX / LANES_MAX;
                if !size.is_power_of_two() || !sizes.contains(&size) {
                    return field("size of a ring", size, *sizes.end());
                }
            }
        }
        let limit = spec.limit();
        if spec.record_max == 0 {
            spec.record_max = limit;
        }
        if spec.record_max > limit {
            return field("longest record", spec.record_max, limit);
        }
        if !Features::KNOWN.contains(spec.features) {
            let limit = Features::KNOWN.0 as usize;
            return field("features", spec.features.0 as usize, limit);
        }
        Ok(Self { spec, epoch })
    }

    /// The specification.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Number of this attachment. It never repeats.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn next_epoch(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// The geometry of one direction of a lane. `twice` is true if the memory maps each ring twice in a row. `wraps`
    /// is true if records use that.
    ///
    /// # Panics
    /// There is no such lane.
    pub fn geometry(&self, lane: usize, towards: Side, twice: bool, wraps: bool) -> Geometry {
        let mapped = if twice { 2 } else { 1 };
        let count = self.spec.count;
        assert!(lane < count, "lane {lane} of {count}");
        let ring = match towards {
            Side::Guest => lane,
            Side::Host => count + lane,
        };
        let (at, size) = self.rings().nth(ring).unwrap_or_default();
        let word = |page: usize, n: usize| page + WORD * (1 + LANE_WORDS * lane + n);
        let (producer, consumer) = match towards {
            Side::Guest => (HOST_WORD, GUEST_WORD),
            Side::Host => (GUEST_WORD, HOST_WORD),
        };
        Geometry {
            data: DATA + (at - DATA) * mapped,
            size,
            align: self.spec.align,
            space_wake_at: word(producer, 0),
            cons: word(consumer, 1),
            data_wake_at: word(consumer, 2),
            record_max: self.spec.record_max,
            wraps,
        }
    }

    /// Offset and size of every ring, in the order of their offsets.
    pub fn rings(&self) -> impl Iterator<Item = (usize, usize)> {
        let lanes = self.spec.lanes();
        let to_guest = lanes.iter().map(|lane| lane.to_guest);
        let to_host = lanes.iter().map(|lane| lane.to_host);
        to_guest.chain(to_host).scan(DATA, |at, size| {
            let here = *at;
            *at += size;
            Some((here, size))
        })
    }

    /// The words of the head.
    pub(crate) fn words(&self) -> [u64; HEAD_WORDS] {
        let spec = &self.spec;
        let mut words = [0; HEAD_WORDS];
        words[0] = MAGIC;
        words[1] = u64::from(MAJOR) | u64::from(MINOR) << 16 | (HEAD as u64) << 32;
        words[2] = spec.bytes() as u64;
        words[3] = spec.features.0;
        words[EPOCH / 8] = self.epoch;
        let align = u64::from(spec.align.trailing_zeros());
        words[5] = spec.count as u64 | align << 8 | (spec.record_max as u64) << 32;
        let [low, high] = [0, 8].map(|at| {
            let bytes: [u8; 8] = core::array::from_fn(|i| spec.id[at + i]);
            u64::from_le_bytes(bytes)
        });
        (words[6], words[7]) = (low, high);
        for (n, (at, size)) in self.rings().enumerate() {
            let (lane, direction) = (n % spec.count, n / spec.count);
            let entry = (LANE_TABLE + LANE_ENTRY * lane) / 8 + 2 * direction;
            (words[entry], words[entry + 1]) = (at as u64, size as u64);
        }
        words[CRC / 8] = checksum(&words);
        words
    }

    /// Writes the head, with the magic last.
    pub(crate) fn write<M: RingMem>(&self, mem: &M) -> Result<(), RegionError> {
        if mem.len() < self.spec.bytes() {
            return field("bytes of the region", self.spec.bytes(), mem.len());
        }
        let words = self.words();
        for (n, &word) in words.iter().enumerate().rev() {
            mem.store(8 * n, word);
        }
        Ok(())
    }

    /// Copies the head, each word once, and checks the copy.
    ///
    /// # Errors
    /// It is not a region that this side can use.
    pub fn read<M: RingMem>(mem: &M) -> Result<Self, RegionError> {
        if mem.len() < DATA {
            return field("bytes of the memory", mem.len(), DATA);
        }
        let words: [u64; HEAD_WORDS] = core::array::from_fn(|n| mem.load(8 * n));
        Self::parse(&words, mem.len())
    }

    fn parse(words: &[u64; HEAD_WORDS], memory: usize) -> Result<Self, RegionError> {
        if words[0] != MAGIC {
            return Err(RegionError::Magic { found: words[0] });
        }
        let major = words[1] as u16;
        if major != MAJOR {
            return Err(RegionError::Version { found: major });
        }
        if words[CRC / 8] != checksum(words) {
            return Err(RegionError::Checksum);
        }
        let (bytes, lanes) = (words[2], words[5] & 0xff);
        if bytes > memory as u64 {
            return Err(RegionError::Field {
                what: "bytes of the region",
                value: bytes,
                limit: memory as u64,
            });
        }
        let lanes = lanes as usize;
        if !(1..=LANES_MAX).contains(&lanes) {
            return field("lanes", lanes, LANES_MAX);
        }
        let sizes: [Lane; LANES_MAX] = core::array::from_fn(|lane| {
            let entry = (LANE_TABLE + LANE_ENTRY * lane) / 8;
            Lane {
                to_guest: words[entry + 1] as usize,
                to_host: words[entry + 3] as usize,
            }
        });
        let mut spec = Spec::new(&sizes[..lanes]);
        // The comparison below, word for word with the words that this specification gives, finds the bits that are
        // cut off here.
        spec.align = 1 << (words[5] >> 8 & 0x3f);
        spec.record_max = (words[5] >> 32) as usize;
        // Features that this side does not know are not accepted, so they have no effect.
        spec.features = Features(words[3]).both(Features::KNOWN);
        for (n, byte) in spec.id.iter_mut().enumerate() {
            *byte = words[6 + n / 8].to_le_bytes()[n % 8];
        }
        let region = Self::new(spec, words[EPOCH / 8])?;
        if spec.record_max == 0 {
            return field("longest record", 0, region.spec.record_max);
        }
        let mut again = region.words();
        for n in [1, 3, CRC / 8] {
            again[n] = words[n]; // the words that may differ: minor version, features, and the checksum over them
        }
        match words.iter().zip(&again).position(|(was, is)| was != is) {
            Some(n) => Err(RegionError::Field {
                what: "word of the head",
                value: words[n],
                limit: again[n],
            }),
            None => Ok(region),
        }
    }
}

fn checksum(words: &[u64; HEAD_WORDS]) -> u64 {
    let mut digest = CHECKSUM.digest();
    for word in &words[..CRC / 8] {
        digest.update(&word.to_le_bytes());
    }
    u64::from(digest.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> Region {
        let mut spec = Spec::uniform(2, 8192);
        spec.id = *b"0123456789abcdef";
        spec.features = Features::WRAP;
        Region::new(spec, 7).unwrap()
    }

    #[test]
    fn golden_words() {
        let mut golden = [0u64; HEAD_WORDS];
        golden[0] = 0x3147_4e52_5449_4441;
        golden[1] = 0x100_0000_0001;
        golden[2] = 3 * 4096 + 4 * 8192;
        golden[3] = 1;
        golden[4] = 7;
        golden[5] = 0xff0_0000_0302;
        golden[6] = 0x3736_3534_3332_3130;
        golden[7] = 0x6665_6463_6261_3938;
        golden[8..16].copy_from_slice(&[12288, 8192, 28672, 8192, 20480, 8192, 36864, 8192]);
        // The expected checksum comes from another implementation.
        golden[31] = 2_925_289_399;
        assert_eq!(region().words(), golden);
    }

    #[test]
    fn every_flipped_bit_is_detected() {
        let good = region().words();
        assert_eq!(Region::parse(&good, 1 << 20), Ok(region()));
        for bit in 0..64 * HEAD_WORDS {
            let mut words = good;
            words[bit / 64] ^= 1 << (bit % 64);
            assert!(Region::parse(&words, 1 << 20).is_err(), "bit {bit}");
        }
    }

    /// A hostile host also computes a matching checksum.
    #[test]
    fn every_flipped_bit_with_a_matching_checksum_is_detected_or_harmless() {
        let good = region().words();
        for bit in 0..64 * (CRC / 8) {
            let mut words = good;
            words[bit / 64] ^= 1 << (bit % 64);
            words[CRC / 8] = checksum(&words);
            if let Ok(other) = Region::parse(&words, 1 << 20) {
                let (word, low) = (bit / 64, bit % 64 < 32);
                let free = matches!(word, 3 | 4 | 6 | 7) || word == 1 || word == 5 && !low;
                assert!(free, "bit {bit}: {other:?}");
            }
        }
    }

    #[test]
    fn pages_of_the_host_and_of_the_guest_are_separate() {
        let region = region();
        let host = region.spec().written_by_host();
        let is_host = |at: usize| host.iter().any(|range| range.contains(&at));
        let ends = host.iter().flat_map(|range| [range.start, range.end]);
        assert!(ends.into_iter().all(|end| end.is_multiple_of(PAGE)));
        assert!(is_host(0) && is_host(HOST_WORD) && !is_host(GUEST_WORD) && !is_host(ACCEPTED));
        for lane in 0..2 {
            for side in [Side::Guest, Side::Host] {
                let g = region.geometry(lane, side, false, false);
                let to_guest = side == Side::Guest;
                for at in [g.data, g.data + g.size - 1, g.space_wake_at] {
                    assert_eq!(is_host(at), to_guest, "{at}");
                }
                for at in [g.cons, g.data_wake_at] {
                    assert_eq!(is_host(at), !to_guest, "{at}");
                }
            }
        }
    }

    #[test]
    fn rings_do_not_overlap() {
        let region = region();
        let mut used = std::collections::BTreeSet::new();
        let mut words = std::collections::BTreeSet::from([HOST_WORD, GUEST_WORD]);
        for lane in 0..2 {
            for side in [Side::Guest, Side::Host] {
                let g = region.geometry(lane, side, false, false);
                for page in (g.data..g.data + g.size).step_by(PAGE) {
                    assert!(used.insert(page));
                }
                for word in [g.cons, g.data_wake_at, g.space_wake_at] {
                    assert!(words.insert(word) && word.is_multiple_of(WORD), "{word}");
                }
            }
        }
        assert_eq!(used.len() * PAGE + DATA, region.spec().bytes());
    }
}
