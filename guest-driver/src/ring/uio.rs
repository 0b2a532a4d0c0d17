//! A function through uio_pci_generic: its memory and registers as through sysfs, and its pin's interrupt, which needs no IOMMU.
//!
//! ```text
//! the pin is raised ─► the driver disables it (command, bit 10), counts ─► /dev/uioN is readable
//!        ▲                                                                   │ clear
//!        └── command, bit 10 clear ◄── IntrStatus is read, which clears it ◄─┘
//! ```
//! What rings between the last two raises the pin when it is enabled: no ring is lost.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use adit_ringbuf_io::doorbell::Waiter;

use super::map::{Registers, Word};
use super::pci::Function;
use super::{Device, Ear, How, OpenError, sysfs};

/// The driver.
pub const DRIVER: &str = "uio_pci_generic";
/// In configuration space: the command register, and its bit "the pin is not raised".
const COMMAND: u64 = 4;
const INTX_DISABLE: u16 = 1 << 10;
/// In BAR 0: which vectors raise the pin, and which have.
const INTR_MASK: usize = 0;
const INTR_STATUS: usize = 4;

/// Hears a function's pin.
#[derive(Debug)]
pub struct Line {
    /// Readable when the pin was raised since the last read.
    counter: File,
    config: File,
    /// What enables the pin.
    command: u16,
    status: Word,
}

/// Opens it.
///
/// # Errors
/// It has no pin, the driver is not there or does not take it, or the kernel does not give its memory out.
pub fn open(function: &Function, register: usize) -> Result<Device, OpenError> {
    if !function.has_pin() {
        return Err(OpenError::NoPin);
    }
    function.with_driver(DRIVER, || {
        let (device, registers) = sysfs::take(function, register)?;
        Ok(Device {
            // The pin says both.
            data_ear: Ear::Line(Line::new(function, &registers)?),
            how: How::Uio,
            ..device
        })
    })
}

impl Line {
    fn new(function: &Function, registers: &Registers) -> io::Result<Self> {
        let name = function.uio().ok_or(io::ErrorKind::NotFound)?;
        let counter = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(Path::new("/dev").join(name))?;
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(function.dir.join("config"))?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, COMMAND)?;
        let line = Self {
            counter,
            config,
            command: u16::from_le_bytes(command) & !INTX_DISABLE,
            status: registers.word(INTR_STATUS)?,
        };
        registers.word(INTR_MASK)?.store(u32::MAX);
        // An agent before this one may have left it disabled. Where the kernel has no interrupt for it, this fails.
        line.clear()?;
        Ok(line)
    }
}

impl Waiter for Line {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.counter.as_fd())
    }

    fn clear(&self) -> io::Result<()> {
        match { &self.counter }.read(&mut [0; 4]) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            _ => {}
        }
        self.status.load();
        self.config
            .write_all_at(&self.command.to_le_bytes(), COMMAND)
    }
}
