//! I/O ports and MMIO windows: finds the device that answers an access of the guest.
//!
//! An address without a device reads as all ones and ignores writes, as on a real machine.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::acpi::SLEEP_TYPE_OFF;
use crate::console::Console;
use crate::exit::{Exit, Reason};
use crate::layout::{I8042_COMMAND, I8042_DATA, MMIO_LEN, SERIAL_PORT, SLEEP_CONTROL};
use crate::pci::Pci;
use crate::virtio::mmio::Transport;
use vm_superio::{I8042Device, Trigger};

/// SLP_EN of the sleep control register (ACPI 6.5 §4.8.3.7). The sleep type is in the three bits from bit 2 on.
const SLEEP_ENABLE: u8 = 1 << 5;

/// A reset by the keyboard controller ends the VM.
pub struct ResetLine(Arc<Exit>);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;
    fn trigger(&self) -> Result<(), Self::E> {
        self.0.end(Reason::Reset);
        Ok(())
    }
}

/// Everything that a guest reaches by port or MMIO access. All vCPU threads share it.
pub struct Bus {
    /// The serial line.
    pub console: Arc<Console>,
    keyboard: Mutex<I8042Device<ResetLine>>,
    /// Each with the start of its window.
    pub virtio: Vec<(u64, Mutex<Transport>)>,
    /// The PCI bus, if there is one.
    pub pci: Option<Pci>,
    exit: Arc<Exit>,
}

/// Locks even after a panic of another thread: one device's panic must not stop the others, and the guarded values are valid
/// at every step.
pub fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// A bus with these devices. A reset or a power-off by the guest ends the VM through `exit`.
    pub fn new(console: Arc<Console>, virtio: Vec<(u64, Transport)>, exit: Arc<Exit>) -> Self {
        let virtio = virtio.into_iter();
        Self {
            console,
            keyboard: Mutex::new(I8042Device::new(ResetLine(exit.clone()))),
            virtio: virtio.map(|(base, t)| (base, Mutex::new(t))).collect(),
            pci: None,
            exit,
        }
    }

    /// Answers a read of an I/O port.
    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        // All devices on I/O ports have registers of one byte.
        let [byte] = data else { return };
        match port {
            SERIAL_PORT..=0x3ff => *byte = self.console.read((port - SERIAL_PORT) as u8),
            I8042_DATA | I8042_COMMAND => {
                *byte = lock(&self.keyboard).read((port - I8042_DATA) as u8)
            }
            _ => {}
        }
    }

    /// Handles a write to an I/O port.
    pub fn port_out(&self, port: u16, data: &[u8]) {
        let &[byte] = data else { return };
        match port {
            SERIAL_PORT..=0x3ff => self.console.write((port - SERIAL_PORT) as u8, byte),
            I8042_DATA | I8042_COMMAND => {
                let Ok(()) = lock(&self.keyboard).write((port - I8042_DATA) as u8, byte);
            }
            SLEEP_CONTROL if byte & SLEEP_ENABLE != 0 && byte >> 2 & 7 == SLEEP_TYPE_OFF => {
                self.exit.end(Reason::PowerOff);
            }
            _ => {}
        }
    }

    fn window(&self, address: u64) -> Option<(MutexGuard<'_, Transport>, u64)> {
        self.virtio.iter().find_map(|(base, transport)| {
            let offset = address.checked_sub(*base).filter(|&o| o < MMIO_LEN)?;
            Some((lock(transport), offset))
        })
    }

    /// Answers a read of an address that is not RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None => {
                data.fill(0xff);
                let _ = self.pci.as_ref().map(|p| p.function.read(address, data));
            }
        }
    }

    /// Handles a write to an address that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((mut transport, offset)) = self.window(address) {
            transport.write(offset, data);
        } else if let Some(Err(e)) = self.pci.as_ref().map(|p| p.function.write(address, data)) {
            adit_print::note!("adit-vmm: the ring's PCI function: {e}");
        }
    }
}
