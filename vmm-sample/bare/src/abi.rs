//! Addresses, ports and values that the image and its VMM agree on.
//!
//! | guest-physical | what |
//! |---|---|
//! | 0x1000 | page tables, 4 pages |
//! | 0x20_0000 | the image |
//! | up to 0x40_0000 | its stack |
//! | 0x3000_0000 | no memory: an access exits to the VMM |
//! | 0x4000_0000 | the ring's region, if there is one |
//!
//! The guest starts at the ELF entry as if that were a C function: [`Task`] is in `rdi`, the length of the region in bytes in
//! `rsi`, and the clock's kHz in `rdx`.

/// Bytes of memory from address 0 on.
pub const MEMORY: u64 = 4 << 20;
/// The first page table: the top level. The next level and the directories of the first two GiB follow it.
pub const PAGE_TABLES: u64 = 0x1000;
/// The stack grows down from here.
pub const STACK_TOP: u64 = MEMORY;
/// Mapped for the guest, but not memory: a device.
pub const DEVICE: u64 = 0x3000_0000;
/// The ring's region.
pub const REGION: u64 = 0x4000_0000;
/// The length of a region is a multiple of these bytes, and at most what one page directory maps.
pub const REGION_UNIT: u64 = 2 << 20;
/// The image writes [`MAIL`] here, and the VMM checks it.
pub const MAILBOX: u64 = MEMORY / 2 - 4096;

/// Text for the person who runs the VMM, one byte at a time.
pub const PORT_TEXT: u16 = 0x3f8;
/// The guest writes 32 bits and reads back their complement.
pub const PORT_ECHO: u16 = 0x510;
/// An ioeventfd: a write to it does not exit to the VMM.
pub const PORT_DOORBELL: u16 = 0x514;
/// A 32-bit [`Verdict`]. The guest does nothing after it.
pub const PORT_VERDICT: u16 = 0x518;

/// Line of the interrupt controller. The VMM raises it with an irqfd after it received the doorbell.
pub const LINE: u32 = 5;
/// Writes to the doorbell in the smoke test.
pub const DOORBELLS: u64 = 3;
/// The value that the image leaves in the mailbox.
pub const MAIL: u64 = 0x6164_6974_2062_6172;

/// What the image does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Task {
    /// Try memory, exits, ioeventfd and irqfd.
    Smoke = 0,
    /// Echo records until the host closes the session.
    Echo = 1,
    /// Serve streams until the host closes the session.
    Streams = 2,
    /// Break every rule of the ring, one after the other, and report how the host reacted.
    Attacks = 3,
}

/// The result of the image's run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// Everything worked.
    Done = 1,
    /// A load from memory did not return what was stored there.
    Memory = 2,
    /// A port or a device returned a wrong answer.
    Exit = 3,
    /// The interrupt of the irqfd never arrived.
    Interrupt = 4,
    /// The ring's region is invalid, or its host broke a rule.
    Ring = 5,
    /// The image panicked; its message went to the text port.
    Panic = 6,
}

impl Verdict {
    /// The verdict with this number.
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
