//! A function through uio_pci_generic: its memory and registers as through sysfs, and its pin's interrupt, which needs no IOMMU.
//!
//! ```text
//! the pin is raised ─► the driver disables it (command, bit 10), counts ─► /dev/uioN is readable
//!        ▲                                                                   │ clear
//!        └── command, bit 10 clear ◄── IntrStatus is read, which clears it ◄─┘
//! ```
//! A doorbell between the last two raises the pin once it is enabled: none is lost. A function that offers pulses
//! (`adit-ring-pci`) needs neither of the two: the pin stays disabled after the first, and is pulsed all the same.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use adit_ringbuf_io::doorbell::Waiter;

use super::map::{Registers, Word};
use super::pci::Function;
use super::{Access, Device, Interrupt, OpenError, sysfs};

/// The driver.
pub const DRIVER: &str = "uio_pci_generic";
/// In configuration space: the command register, and its bit "the pin is not raised".
const COMMAND: u64 = 4;
const INTX_DISABLE: u16 = 1 << 10;
/// In BAR 0: which vectors raise the pin, and which have.
const INTR_MASK: usize = 0;
const INTR_STATUS: usize = 4;
/// Zero where it is not known.
const FEATURES: usize = 16;
/// Features: IntrMask has the bit that makes each interrupt a pulse.
const PULSES_OFFERED: u32 = 1;
const PULSES: u32 = 1 << 31;

/// The interrupts of a function's pin.
#[derive(Debug)]
pub struct Line {
    /// Readable when the pin was raised since the last read.
    counter: File,
    /// How the next interrupt is enabled; none: it needs nothing.
    enable: Option<Enable>,
}

/// Clears the function's status and enables the pin.
#[derive(Debug)]
struct Enable {
    status: Word,
    config: File,
    command: u16,
}

/// Opens it.
///
/// # Errors
/// It has no pin, the driver is missing or does not accept it, or the kernel does not let its memory be mapped.
pub fn open(function: &Function, register: usize) -> Result<Device, OpenError> {
    if !function.has_pin() {
        return Err(OpenError::NoPin);
    }
    function.with_driver(DRIVER, || {
        let (device, registers) = sysfs::take(function, register)?;
        Ok(Device {
            // The pin is for both.
            data_interrupt: Interrupt::Line(Line::new(function, &registers)?),
            access: Access::Uio,
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
        // Where the kernel has no interrupt for it, this fails.
        take_count(&counter)?;
        let mask = registers.word(INTR_MASK)?;
        let features = registers
            .word(FEATURES)
            .map_or(0, |features| features.load());
        if features & PULSES_OFFERED != 0 {
            mask.store(u32::MAX);
            let enable = None;
            return Ok(Self { counter, enable });
        }
        mask.store(!PULSES);
        let enable = Enable::new(function, registers)?;
        // An earlier agent may have left it disabled.
        enable.again()?;
        let enable = Some(enable);
        Ok(Self { counter, enable })
    }
}

impl Enable {
    fn new(function: &Function, registers: &Registers) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let config = options.read(true).write(true);
        let config = config.open(function.dir.join("config"))?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, COMMAND)?;
        Ok(Self {
            status: registers.word(INTR_STATUS)?,
            config,
            command: u16::from_le_bytes(command) & !INTX_DISABLE,
        })
    }

    fn again(&self) -> io::Result<()> {
        self.status.load();
        let command = self.command.to_le_bytes();
        self.config.write_all_at(&command, COMMAND)
    }
}

fn take_count(mut counter: &File) -> io::Result<()> {
    match counter.read(&mut [0; 4]) {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
        _ => Ok(()),
    }
}

impl Waiter for Line {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.counter.as_fd())
    }

    fn clear(&self) -> io::Result<()> {
        take_count(&self.counter)?;
        self.enable.as_ref().map_or(Ok(()), Enable::again)
    }
}
