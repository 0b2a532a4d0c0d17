//! Addresses, ports and values: the image's side of the VMM.
//!
//! | guest-physical | what |
//! |---|---|
//! | 0x1000 | page tables, 4 pages |
//! | 0x20_0000 | the image |
//! | up to 0x40_0000 | its stack |
//! | 0x3000_0000 | nothing: an access leaves the guest |
//! | 0x4000_0000 | the ring's region, if there is one |
//!
//! It begins at the ELF entry with [`Task`] in `rdi`, the region's bytes in `rsi` and the clock's kHz in `rdx`, as a C
//! function would.

/// Bytes of memory from 0 on.
pub const MEMORY: u64 = 4 << 20;
/// First of the page tables: the top, one below it, and the directories of the first two GiB.
pub const PAGE_TABLES: u64 = 0x1000;
/// Above its stack.
pub const STACK_TOP: u64 = MEMORY;
/// No memory, but mapped for the guest: a device.
pub const DEVICE: u64 = 0x3000_0000;
/// The ring's region.
pub const REGION: u64 = 0x4000_0000;
/// A region is a whole number of these bytes, and not more than a directory maps.
pub const REGION_UNIT: u64 = 2 << 20;
/// Where the image leaves a word for the VMM to find.
pub const MAILBOX: u64 = MEMORY / 2 - 4096;

/// Characters for whoever reads, one at a time.
pub const PORT_TEXT: u16 = 0x3f8;
/// A 32-bit question: the answer is its complement.
pub const PORT_ECHO: u16 = 0x510;
/// An ioeventfd: no store to it leaves the guest.
pub const PORT_BELL: u16 = 0x514;
/// A 32-bit [`Verdict`], the last that it does.
pub const PORT_VERDICT: u16 = 0x518;

/// Line of the interrupt controller that the VMM's irqfd pulls when the bell has rung.
pub const LINE: u32 = 5;
/// Rings of the bell in the smoke test.
pub const RINGS: u64 = 3;
/// What the image leaves in the mailbox.
pub const MAIL: u64 = 0x6164_6974_2062_6172;

/// What the image is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Task {
    /// Try memory, exits, ioeventfd and irqfd.
    Smoke = 0,
    /// Echo records until the host closes the session.
    Echo = 1,
    /// Serve streams until the host closes the session.
    Streams = 2,
    /// Break every rule of the ring, one after the other, and say what came of it.
    Rude = 3,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// All of it held.
    Done = 1,
    /// A store to memory was not there any more.
    Memory = 2,
    /// A port or a device gave another answer.
    Exit = 3,
    /// The irqfd's line was never seen.
    Interrupt = 4,
    /// The ring's region or its host broke a rule.
    Ring = 5,
    /// A panic; what it said came over the text port.
    Panic = 6,
}

impl Verdict {
    /// What a number stands for.
    pub fn from_u32(n: u32) -> Option<Self> {
        [
            Self::Done,
            Self::Memory,
            Self::Exit,
            Self::Interrupt,
            Self::Ring,
            Self::Panic,
        ]
        .into_iter()
        .find(|v| *v as u32 == n)
    }
}
