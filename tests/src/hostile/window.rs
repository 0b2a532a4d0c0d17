//! A virtio-mmio window, unbound from its driver, with its registers mapped from physical memory.
//!
//! Source: virtio 1.3 §4.2.2. The kernel lets root map what is not RAM and has no driver.

use std::fs::{self, OpenOptions};

use anyhow::{Context, bail};
use vm_memory::{FileOffset, MmapRegion};

use crate::memory::{load, store};
use crate::registers::{Register, Registers};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Linux's name for a window that ACPI announced.
const HID: &str = "LNRO0005";
const DEVICE_ID: usize = 8;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
const CONFIG: usize = 0x100;
const SOCKET: u32 = 19;
const WINDOW: usize = 0x1000;

/// The socket device's registers.
pub struct Window(MmapRegion);

impl Window {
    /// Takes the socket device from the kernel.
    pub fn take() -> anyhow::Result<Self> {
        let windows = fs::read_to_string("/proc/iomem")?;
        for line in windows.lines().filter(|l| l.contains(HID)) {
            let (range, name) = line.split_once(" : ").context("a line of iomem")?;
            let start = range.trim().split('-').next().unwrap_or_default();
            let start = u64::from_str_radix(start, 16)?;
            // Only a window without a driver can be mapped. An error means that it has none.
            let _ = fs::write(format!("{DRIVER}/unbind"), name.trim());
            let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
            let window = MmapRegion::from_file(FileOffset::new(memory, start), WINDOW)
                .with_context(|| format!("cannot map {}", line.trim()))?;
            if load::<u32>(&window, DEVICE_ID) == SOCKET {
                return Ok(Self(window));
            }
        }
        bail!("no virtio socket device, on PCI or in a window")
    }
}

impl Registers for Window {
    fn write(&self, register: Register, value: u32) {
        let at = match register {
            Register::FeaturesSelect => 0x24,
            Register::Features => 0x20,
            Register::Status => STATUS,
            Register::QueueSelect => 0x30,
            Register::QueueSize => 0x38,
            Register::QueueEnable => 0x44,
            Register::QueueAddress(half) => 0x80 + half / 2 * 0x10 + half % 2 * 4,
        };
        store(&self.0, at, value);
    }

    fn status(&self) -> u8 {
        load::<u32>(&self.0, STATUS) as u8
    }

    fn guest_cid(&self) -> u64 {
        let [low, high] = [0, 4].map(|at| u64::from(load::<u32>(&self.0, CONFIG + at)));
        low | high << 32
    }

    fn kick(&self, queue: u16) {
        store(&self.0, QUEUE_NOTIFY, u32::from(queue));
    }
}
