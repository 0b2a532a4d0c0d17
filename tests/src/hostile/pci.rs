//! A virtio PCI function, unbound from its driver, with its registers mapped through sysfs.
//!
//! Source: virtio 1.3 §4.1 (PCI transport); Linux Documentation/PCI/sysfs-pci.rst.

use std::cell::Cell;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use vm_memory::{AtomicAccess, FileOffset, MmapRegion};

use crate::memory::{load, store};
use crate::registers::{Register, Registers};

const VIRTIO: &str = "0x1af4";
/// 0x1040 + 19: a socket device.
const VSOCK: &str = "0x1053";
const CAP_VENDOR: u8 = 9;
/// Memory space, bus master, no INTx.
const COMMAND: u16 = 0x0406;

/// One structure of the function's registers.
#[derive(Clone, Copy)]
struct Part {
    bar: u8,
    at: usize,
}

/// The socket device's registers.
pub struct Function {
    bars: Vec<(u8, MmapRegion)>,
    common: Part,
    notify: Part,
    notify_step: usize,
    device: Part,
    /// The selected queue, and each queue's notification offset.
    selected: Cell<usize>,
    offsets: [Cell<u16>; 3],
}

impl Function {
    /// Takes the socket device from the kernel. `None`: there is no such function.
    pub fn take() -> anyhow::Result<Option<Self>> {
        let Some(dir) = find() else { return Ok(None) };
        let name = dir.file_name().unwrap_or_default().to_os_string();
        if dir.join("driver").exists() {
            fs::write(dir.join("driver/unbind"), name.as_encoded_bytes()).context("unbind")?;
        }
        fs::write(dir.join("enable"), "1").context("enable")?;
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(dir.join("config"))?;
        config.write_all_at(&COMMAND.to_le_bytes(), 4)?;
        let mut space = [0; 256];
        config.read_exact_at(&mut space, 0)?;
        Ok(Some(Self::map(&dir, &space)?))
    }

    fn map(dir: &Path, space: &[u8; 256]) -> anyhow::Result<Self> {
        let word = |at: usize| {
            let bytes = space.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let (mut parts, mut step) = ([None; 6], 0);
        let mut cap = usize::from(space[0x34]);
        while cap != 0 && cap + 20 <= space.len() {
            if space[cap] == CAP_VENDOR {
                let part = Part {
                    bar: space[cap + 4],
                    at: word(cap + 8) as usize,
                };
                let kind = usize::from(space[cap + 3]);
                if kind == 2 {
                    step = word(cap + 16) as usize;
                }
                if let Some(slot) = parts.get_mut(kind) {
                    slot.get_or_insert(part);
                }
            }
            cap = usize::from(space[cap + 1]);
        }
        let [_, Some(common), Some(notify), _, Some(device), _] = parts else {
            bail!("no virtio 1 function");
        };
        let mut bars: Vec<(u8, MmapRegion)> = Vec::new();
        for part in [common, notify, device] {
            if bars.iter().all(|(bar, _)| *bar != part.bar) {
                let path = dir.join(format!("resource{}", part.bar));
                let file = OpenOptions::new().read(true).write(true).open(path)?;
                let len = usize::try_from(file.metadata()?.len())?;
                bars.push((
                    part.bar,
                    MmapRegion::from_file(FileOffset::new(file, 0), len)?,
                ));
            }
        }
        Ok(Self {
            bars,
            common,
            notify,
            notify_step: step,
            device,
            selected: Cell::new(0),
            offsets: Default::default(),
        })
    }

    fn bar(&self, part: Part) -> &MmapRegion {
        let found = self.bars.iter().find(|(bar, _)| *bar == part.bar);
        &found.expect("mapped in `map`").1
    }

    fn set<T: AtomicAccess>(&self, at: usize, value: T) {
        store(self.bar(self.common), self.common.at + at, value);
    }

    fn get<T: AtomicAccess>(&self, at: usize) -> T {
        load(self.bar(self.common), self.common.at + at)
    }
}

impl Registers for Function {
    fn write(&self, register: Register, value: u32) {
        match register {
            Register::FeaturesSelect => self.set(8, value),
            Register::Features => self.set(12, value),
            Register::Status => self.set(20, value as u8),
            Register::QueueSelect => {
                self.selected.set(value as usize);
                self.set(22, value as u16);
            }
            Register::QueueSize => self.set(24, value as u16),
            Register::QueueEnable => {
                // No interrupt vector: this driver polls.
                self.set(26, u16::MAX);
                if let Some(offset) = self.offsets.get(self.selected.get()) {
                    offset.set(self.get(30));
                }
                self.set(28, value as u16);
            }
            Register::QueueAddress(half) => self.set(32 + 4 * half, value),
        }
    }

    fn status(&self) -> u8 {
        self.get(20)
    }

    fn guest_cid(&self) -> u64 {
        let bar = self.bar(self.device);
        let [low, high] = [0, 4].map(|at| u64::from(load::<u32>(bar, self.device.at + at)));
        low | high << 32
    }

    fn kick(&self, queue: u16) {
        let offset = self.offsets.get(usize::from(queue)).map_or(0, Cell::get);
        let at = self.notify.at + usize::from(offset) * self.notify_step;
        store(self.bar(self.notify), at, queue);
    }
}

fn find() -> Option<PathBuf> {
    let devices = fs::read_dir("/sys/bus/pci/devices").ok()?;
    devices.flatten().map(|entry| entry.path()).find(|dir| {
        let is = |file: &str, id: &str| {
            fs::read_to_string(dir.join(file)).is_ok_and(|text| text.trim() == id)
        };
        is("vendor", VIRTIO) && is("device", VSOCK)
    })
}
