//! The function as a state machine without an operating system.
//!
//! - Getters: [`wiring`](Function::wiring), [`config_bytes`](Function::config_bytes).
//! - Accesses by the guest: [`config_read`](Function::config_read), [`config_write`](Function::config_write),
//!   [`read`](Function::read), [`write`](Function::write).
//! - Actions of the host: [`interrupt`](Function::interrupt), [`restore`](Function::restore),
//!   [`save`](Function::save).
//! - Most calls return [`Changes`], which the VMM must carry out before the next call.
//!
//! How the guest is interrupted (`n`: a vector):
//!
//! ```text
//! interrupt(n) ─┬ MSI-X on ──┬ not masked ───────────────────────► send[n]
//!               │            └ masked: pending, until unmasked ──► send[n]
//!               └ MSI-X off: IntrStatus |= 1 << n
//!                   IntrStatus & IntrMask ≠ 0: status bit 3; command bit 10 clear ──► line: true
//!                   a read of IntrStatus clears it ─────────────────────────────────► line: false
//!                   IntrMask bit 31: whatever command bit 10 and IntrStatus are ────► pulse
//! ```
//! IntrMask bit 31 is an extension of this function. It makes the pin as cheap as a message. The handler of
//! `uio_pci_generic` reads status, finds bit 3 set, finds command bit 10 already set from the last time, and writes
//! nothing. The guest's user space has nothing to clear or to enable. So an interrupt costs no exit to the VMM. Bit 0
//! of Features says that the extension is available.

use std::ops::Range;

use adit_ringbuf_io::ivshmem::{GUEST_PEER, HOST_PEER};

use crate::config::{
    BARS, Bar, COMMAND, CONFIG_BYTES, Config, INTX_DISABLE, MASTER, MEMORY, MSIX_CONTROL,
    MSIX_ENABLE, MSIX_MASK_ALL, REGISTERS_BYTES, copy_out,
};
use crate::msix::{Message, Msix};

pub use crate::msix::VECTORS;

/// Registers of BAR 0.
const INTR_MASK: u64 = 0;
const INTR_STATUS: u64 = 4;
const POSITION: u64 = 8;
pub(crate) const DOORBELL: u64 = 12;
/// The last register, which ivshmem does not have: [`PULSES_OFFERED`].
const FEATURES: u64 = 16;
/// Features: IntrMask supports [`PULSES`].
const PULSES_OFFERED: u32 = 1;
/// IntrMask: each interrupt is one pulse.
pub(crate) const PULSES: u32 = 1 << 31;

/// Address ranges that nothing else uses, where a guest may put the BARs. The first is below 4 GiB, for 32-bit BARs.
pub type Windows = [Range<u64>; 2];

/// Where the function is mapped, and what its interrupts are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wiring {
    /// Address at which each BAR is decoded; `None` if it is not decoded.
    pub bars: [Option<u64>; BARS],
    /// The message that each vector sends; `None` if it sends none now.
    pub messages: [Option<Message>; VECTORS],
}

/// What the VMM must do, in the order of the fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Changes {
    /// The [`wiring`](Function::wiring) changed.
    pub rewired: bool,
    /// Send the messages of these vectors.
    pub send: [bool; VECTORS],
    /// Raise or lower the line. Only edges count: when the guest disables and enables the pin, the line is raised
    /// again.
    pub line: Option<bool>,
    /// Raise the line and lower it again.
    pub pulse: bool,
    /// The guest signalled these doorbells of the host.
    pub rung: [bool; VECTORS],
}

/// The state of the function.
#[derive(Clone, Debug)]
pub struct Function {
    pub(crate) config: Config,
    pub(crate) msix: Msix,
    pub(crate) mask: u32,
    pub(crate) status: u32,
    pub(crate) region_bytes: u64,
    windows: Windows,
    /// Wiring and line as last reported to the VMM.
    wiring: Wiring,
    line: bool,
}

impl Function {
    /// A function after a reset: none of its BARs is decoded.
    ///
    /// # Panics
    /// `region_bytes` is not a power of two, or is less than a page. The size of a BAR must be both.
    pub fn new(region_bytes: u64, windows: Windows) -> Self {
        assert!(region_bytes.is_power_of_two() && region_bytes >= REGISTERS_BYTES);
        Self {
            config: Config::new(region_bytes),
            msix: Msix::new(),
            mask: 0,
            status: 0,
            region_bytes,
            windows,
            wiring: Wiring::default(),
            line: false,
        }
    }

    /// Where the function is mapped, and what its interrupts are.
    pub fn wiring(&self) -> &Wiring {
        &self.wiring
    }

    /// The bytes of its configuration space.
    pub fn config_bytes(&self) -> &[u8; CONFIG_BYTES] {
        self.config.bytes()
    }

    /// Reads configuration space; bytes after its end read as zero.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// Writes configuration space.
    pub fn config_write(&mut self, offset: u64, data: &[u8]) -> Changes {
        self.config.write(offset, data);
        self.settle()
    }

    fn bytes(&self, bar: Bar) -> u64 {
        match bar {
            Bar::Region => self.region_bytes,
            Bar::Registers | Bar::Msix => REGISTERS_BYTES,
        }
    }

    /// The BAR that decodes an address, and the offset in it.
    fn decode(&self, address: u64) -> Option<(Bar, u64)> {
        let hit = |bar: Bar| {
            let at = self.wiring.bars[bar as usize]?;
            let offset = address.checked_sub(at)?;
            (offset < self.bytes(bar)).then_some((bar, offset))
        };
        Bar::ALL.into_iter().find_map(hit)
    }

    /// Reads memory. Returns `None` if the address does not belong to this function.
    pub fn read(&mut self, address: u64, data: &mut [u8]) -> Option<Changes> {
        match self.decode(address)? {
            (Bar::Registers, offset) => {
                let mut bytes = [0; FEATURES as usize + 4];
                for (at, word) in [
                    (INTR_MASK, self.mask),
                    (INTR_STATUS, self.status),
                    (POSITION, GUEST_PEER.into()),
                    (FEATURES, PULSES_OFFERED),
                ] {
                    bytes[at as usize..][..4].copy_from_slice(&word.to_le_bytes());
                }
                copy_out(&bytes, offset, data);
                let end = offset.saturating_add(data.len() as u64);
                if offset < INTR_STATUS + 4 && end > INTR_STATUS {
                    self.status = 0;
                }
            }
            (Bar::Msix, offset) => self.msix.read(offset, data),
            // The region is mapped as memory. An access that arrives here started before it was mapped.
            (Bar::Region, _) => data.fill(0xff),
        }
        Some(self.settle())
    }

    /// Writes memory. Returns `None` if the address does not belong to this function.
    pub fn write(&mut self, address: u64, data: &[u8]) -> Option<Changes> {
        let (mut rung, mut pulse) = ([false; VECTORS], false);
        match self.decode(address)? {
            (Bar::Registers, offset) => {
                // A register accepts only a whole, aligned write.
                let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
                match (offset, value) {
                    (INTR_MASK, Ok(value)) => {
                        self.mask = value & MASK_BITS;
                        // An interrupt that was pending before the mask was written must not be lost.
                        pulse = self.pulses(self.status);
                    }
                    (DOORBELL, Ok(value)) if value >> 16 == u32::from(HOST_PEER) => {
                        let vector = (value & 0xffff) as usize;
                        if let Some(bell) = rung.get_mut(vector) {
                            *bell = true;
                        }
                    }
                    _ => {}
                }
            }
            (Bar::Msix, offset) => self.msix.write(offset, data),
            // A write to a page that only the host writes has no effect.
            (Bar::Region, _) => {}
        }
        Some(Changes {
            rung,
            pulse,
            ..self.settle()
        })
    }

    /// Interrupts the guest with a vector.
    ///
    /// # Panics
    /// There is no such vector.
    pub fn interrupt(&mut self, vector: usize) -> Changes {
        assert!(vector < VECTORS, "vector {vector} of {VECTORS}");
        match self.has_msix() {
            true => self.msix.pending |= 1 << vector,
            false => self.status |= 1 << vector,
        }
        Changes {
            pulse: self.pulses(1 << vector),
            ..self.settle()
        }
    }

    /// Returns true if an interrupt of one of these vectors is a pulse now.
    fn pulses(&self, vectors: u32) -> bool {
        !self.has_msix() && self.mask & PULSES != 0 && self.mask & vectors != 0
    }

    fn has_msix(&self) -> bool {
        self.config.u16(MSIX_CONTROL) & MSIX_ENABLE != 0
    }

    /// Address at which a BAR is decoded: inside a window, or `None`.
    fn place(&self, bar: Bar) -> Option<u64> {
        let at = self.config.address(bar);
        let end = at.checked_add(self.bytes(bar))?;
        let on = self.config.u16(COMMAND) & MEMORY != 0;
        let inside = |window: &Range<u64>| window.start <= at && end <= window.end;
        (on && self.windows.iter().any(inside)).then_some(at)
    }

    fn message(&self, vector: usize) -> Option<Message> {
        let control = self.config.u16(MSIX_CONTROL);
        let on = self.has_msix()
            && control & MSIX_MASK_ALL == 0
            && self.config.u16(COMMAND) & MASTER != 0;
        on.then(|| self.msix.message(vector)).flatten()
    }

    /// Updates everything that depends on the registers. Returns the changes since the last report to the VMM.
    pub(crate) fn settle(&mut self) -> Changes {
        let wiring = Wiring {
            bars: Bar::ALL.map(|bar| self.place(bar)),
            messages: std::array::from_fn(|vector| self.message(vector)),
        };
        let raised = !self.has_msix() && self.status & self.mask & INTERRUPTS != 0;
        self.config.set_pending(raised);
        let level = self.mask & PULSES == 0 && self.config.u16(COMMAND) & INTX_DISABLE == 0;
        let line = raised && level;
        let mut send = [false; VECTORS];
        for (vector, send) in send.iter_mut().enumerate() {
            let bit = 1 << vector;
            *send = self.msix.pending & bit != 0 && wiring.messages[vector].is_some();
            if *send {
                self.msix.pending &= !bit;
            }
        }
        let changes = Changes {
            rewired: wiring != self.wiring,
            send,
            line: (line != self.line).then_some(line),
            pulse: false,
            rung: [false; VECTORS],
        };
        (self.wiring, self.line) = (wiring, line);
        changes
    }

    /// Replaces the state with `other`, whose changes were never reported to the VMM. If the line is up it is raised
    /// again, because an edge may have been lost.
    pub(crate) fn replace_with(&mut self, other: Self) -> Changes {
        let reported = std::mem::replace(self, other);
        (self.wiring, self.windows) = (reported.wiring, reported.windows);
        self.line = false;
        let changes = self.settle();
        Changes {
            line: reported.line.then_some(self.line).or(changes.line),
            pulse: self.pulses(self.status),
            ..changes
        }
    }

    /// A function of the same size and windows, after a reset.
    pub(crate) fn blank(&self) -> Self {
        Self::new(self.region_bytes, self.windows.clone())
    }
}

/// Interrupt bits of IntrMask and IntrStatus: one for each vector.
pub(crate) const INTERRUPTS: u32 = (1 << VECTORS) - 1;
/// Valid bits of IntrMask.
pub(crate) const MASK_BITS: u32 = INTERRUPTS | PULSES;

#[cfg(test)]
mod tests;
