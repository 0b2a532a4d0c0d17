//! The function as a machine without a system.
//!
//! - Getters: [`wiring`](Function::wiring), [`config_bytes`](Function::config_bytes).
//! - What the guest does: [`config_read`](Function::config_read), [`config_write`](Function::config_write),
//!   [`read`](Function::read), [`write`](Function::write).
//! - What the host does: [`interrupt`](Function::interrupt), [`restore`](Function::restore), [`save`](Function::save).
//! - Each returns [`Changes`], which the VMM carries out before the next call.
//!
//! How the guest is interrupted (`n`: a vector):
//!
//! ```text
//! interrupt(n) ─┬ MSI-X on ──┬ not masked ──────────────────────► send[n]
//!               │            └ masked: pending, until it is not ─► send[n]
//!               └ MSI-X off: IntrStatus |= 1 << n
//!                   IntrStatus & IntrMask ≠ 0: status bit 3; command bit 10 clear ──► line: true
//!                   a read of IntrStatus clears it ─────────────────────────────────► line: false
//!                   IntrMask bit 31: whatever command bit 10 and IntrStatus say ────► pulse
//! ```
//! The last is this function's own, and what makes the pin as cheap as a message. A handler as that of `uio_pci_generic` reads
//! status, finds bit 3 as it was, and command bit 10 set as it left it: it writes nothing. Whoever waits has nothing to clear
//! or enable, and so an interrupt costs the guest no way out to the VMM at all. Bit 0 of Features says that it can be had.

use std::ops::Range;

use adit_ringbuf_io::ivshmem::{self, GUEST_PEER, HOST_PEER};

use crate::config::{
    BARS, Bar, COMMAND, CONFIG_BYTES, Config, INTX_DISABLE, MASTER, MEMORY, MSIX_CONTROL,
    MSIX_ENABLE, MSIX_MASK_ALL, REGISTERS_BYTES, copy_out,
};
use crate::msix::{Message, Msix};

/// Vectors, and doorbells of the host: one says data, one says space.
pub const VECTORS: usize = ivshmem::VECTORS as usize;

/// Registers of BAR 0.
const INTR_MASK: u64 = 0;
const INTR_STATUS: u64 = 4;
const POSITION: u64 = 8;
pub(crate) const DOORBELL: u64 = 12;
/// The last of them, which ivshmem does not have: [`PULSES_OFFERED`].
const FEATURES: u64 = 16;
/// Features: IntrMask has [`PULSES`].
const PULSES_OFFERED: u32 = 1;
/// IntrMask: each interrupt is one pulse.
pub(crate) const PULSES: u32 = 1 << 31;

/// Where a guest may put BARs: addresses that are nobody else's. The first lies below 4 GiB, for what has 32 bits.
pub type Windows = [Range<u64>; 2];

/// Where the function is, and what its interrupts are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wiring {
    /// Where each BAR is decoded; `None`: nowhere.
    pub bars: [Option<u64>; BARS],
    /// What each vector sends; `None`: nothing now.
    pub messages: [Option<Message>; VECTORS],
}

/// What the VMM is to do, from top to bottom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Changes {
    /// The [`wiring`](Function::wiring) is another one.
    pub rewired: bool,
    /// Send the message of these vectors.
    pub send: [bool; VECTORS],
    /// Raise the line, or lower it. Edges are enough: who disables the pin and enables it again finds it raised anew.
    pub line: Option<bool>,
    /// Raise the line and lower it.
    pub pulse: bool,
    /// The guest rang these doorbells of the host.
    pub rung: [bool; VECTORS],
}

/// The function.
#[derive(Clone, Debug)]
pub struct Function {
    pub(crate) config: Config,
    pub(crate) msix: Msix,
    pub(crate) mask: u32,
    pub(crate) status: u32,
    pub(crate) region_bytes: u64,
    windows: Windows,
    /// As the VMM was told.
    wiring: Wiring,
    line: bool,
}

impl Function {
    /// A function after a reset: its BARs are nowhere.
    ///
    /// # Panics
    /// `region_bytes` is no power of two, or less than a page: the size of a BAR is.
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

    /// Where it is, and what its interrupts are.
    pub fn wiring(&self) -> &Wiring {
        &self.wiring
    }

    /// Its configuration space, as it is read.
    pub fn config_bytes(&self) -> &[u8; CONFIG_BYTES] {
        self.config.bytes()
    }

    /// Reads configuration space; what is behind its end is zero.
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

    /// Reads memory, if it is this function's.
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
            // It is memory: who comes here came before it was there.
            (Bar::Region, _) => data.fill(0xff),
        }
        Some(self.settle())
    }

    /// Writes memory, if it is this function's.
    pub fn write(&mut self, address: u64, data: &[u8]) -> Option<Changes> {
        let (mut rung, mut pulse) = ([false; VECTORS], false);
        match self.decode(address)? {
            (Bar::Registers, offset) => {
                // Registers are written whole.
                let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
                match (offset, value) {
                    (INTR_MASK, Ok(value)) => {
                        self.mask = value & MASK_BITS;
                        // What rang before is not lost.
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
            // Of a page that only the host writes.
            (Bar::Region, _) => {}
        }
        Some(Changes {
            rung,
            pulse,
            ..self.settle()
        })
    }

    /// The host rings one of the guest's doorbells.
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

    /// Whether one of these vectors is a pulse now.
    fn pulses(&self, vectors: u32) -> bool {
        !self.has_msix() && self.mask & PULSES != 0 && self.mask & vectors != 0
    }

    fn has_msix(&self) -> bool {
        self.config.u16(MSIX_CONTROL) & MSIX_ENABLE != 0
    }

    /// Where a BAR is decoded: inside of a window, or nowhere.
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

    /// Draws the conclusions from what was written; returns what is another than the VMM was told.
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

    /// Becomes `other`, whose VMM was told nothing. A line that is raised is raised again: an edge may have been lost.
    pub(crate) fn become_this(&mut self, other: Self) -> Changes {
        let told = std::mem::replace(self, other);
        (self.wiring, self.windows) = (told.wiring, told.windows);
        self.line = false;
        let changes = self.settle();
        Changes {
            line: told.line.then_some(self.line).or(changes.line),
            pulse: self.pulses(self.status),
            ..changes
        }
    }

    /// An empty one of its kind.
    pub(crate) fn blank(&self) -> Self {
        Self::new(self.region_bytes, self.windows.clone())
    }
}

/// Bits of IntrMask and IntrStatus: one a vector.
pub(crate) const INTERRUPTS: u32 = (1 << VECTORS) - 1;
/// Bits of IntrMask.
pub(crate) const MASK_BITS: u32 = INTERRUPTS | PULSES;

#[cfg(test)]
mod tests;
