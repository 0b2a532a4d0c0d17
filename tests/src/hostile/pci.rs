//! A virtio PCI function without its driver: unbound, its registers mapped by sysfs, one huge page for its rings.
//!
//! Source: virtio 1.3 §4.1 (PCI transport); Linux Documentation/PCI/sysfs-pci.rst, Documentation/admin-guide/mm/pagemap.rst.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context, bail, ensure};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Size of a huge page, bytes.
pub const PAGE: usize = 2 << 20;
const VIRTIO: &str = "0x1af4";
/// 0x1040 + 19: a socket device.
const VSOCK: &str = "0x1053";
const CAP_VENDOR: u8 = 9;
/// Memory space, bus master, no INTx.
const COMMAND: u16 = 0x0406;

/// Memory with a known physical address.
pub struct Dma {
    region: MmapRegion,
    phys: u64,
}

impl Dma {
    /// One huge page: contiguous, and never moved.
    pub fn new() -> anyhow::Result<Self> {
        fs::write("/proc/sys/vm/nr_hugepages", "4").context("no huge pages")?;
        let flags =
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
        let region = MmapRegionBuilder::new(PAGE)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .build()?;
        let page = region.as_ptr() as u64 / 4096;
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        ensure!(frame != 0, "page frame numbers are hidden");
        Ok(Self {
            region,
            phys: frame * 4096,
        })
    }

    /// The guest physical address of an offset.
    pub fn addr(&self, at: usize) -> u64 {
        self.phys + at as u64
    }

    /// Stores one aligned number.
    pub fn put<T: AtomicAccess>(&self, at: usize, value: T) {
        put(&self.region, at, value);
    }

    /// Loads one aligned number.
    pub fn get<T: AtomicAccess>(&self, at: usize) -> T {
        get(&self.region, at)
    }

    /// Copies bytes in.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let done = self.region.as_volatile_slice().write_slice(bytes, at);
        done.expect("inside of the page");
    }

    /// Copies bytes out.
    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let done = self.region.as_volatile_slice().read_slice(&mut bytes, at);
        done.expect("inside of the page");
        bytes
    }
}

fn put<T: AtomicAccess>(region: &MmapRegion, at: usize, value: T) {
    let done = region
        .as_volatile_slice()
        .store(value, at, Ordering::SeqCst);
    done.expect("aligned, and inside");
}

fn get<T: AtomicAccess>(region: &MmapRegion, at: usize) -> T {
    let value = region.as_volatile_slice().load(at, Ordering::SeqCst);
    value.expect("aligned, and inside")
}

/// One structure of the function's registers.
#[derive(Clone, Copy)]
struct Part {
    bar: u8,
    at: usize,
}

/// The socket device's registers.
pub struct Registers {
    bars: Vec<(u8, MmapRegion)>,
    common: Part,
    notify: Part,
    notify_step: usize,
    device: Part,
}

impl Registers {
    /// Takes the socket device away from the kernel.
    pub fn take() -> anyhow::Result<Self> {
        let dir = find()?;
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
        Self::map(&dir, &space)
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
        })
    }

    fn bar(&self, part: Part) -> &MmapRegion {
        let found = self.bars.iter().find(|(bar, _)| *bar == part.bar);
        &found.expect("mapped in `map`").1
    }

    /// Writes a register of the common configuration.
    pub fn set<T: AtomicAccess>(&self, at: usize, value: T) {
        put(self.bar(self.common), self.common.at + at, value);
    }

    /// Writes a 64-bit register, as §4.1.3.1 wants it: two halves.
    pub fn set_wide(&self, at: usize, value: u64) {
        self.set(at, value as u32);
        self.set(at + 4, (value >> 32) as u32);
    }

    /// Reads a register of the common configuration.
    pub fn get<T: AtomicAccess>(&self, at: usize) -> T {
        get(self.bar(self.common), self.common.at + at)
    }

    /// The CID that the device tells.
    pub fn guest_cid(&self) -> u64 {
        let bar = self.bar(self.device);
        let [low, high] = [0, 4].map(|at| u64::from(get::<u32>(bar, self.device.at + at)));
        low | high << 32
    }

    /// Kicks a queue, whose notify offset is known.
    pub fn kick(&self, queue: u16, offset: u16) {
        let at = self.notify.at + usize::from(offset) * self.notify_step;
        put(self.bar(self.notify), at, queue);
    }
}

fn find() -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let dir = entry?.path();
        let is = |file: &str, id: &str| {
            fs::read_to_string(dir.join(file)).is_ok_and(|text| text.trim() == id)
        };
        if is("vendor", VIRTIO) && is("device", VSOCK) {
            return Ok(dir);
        }
    }
    bail!("no virtio socket device on the PCI bus")
}
