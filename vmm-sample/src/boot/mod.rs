//! From a kernel file to the first instruction: puts the kernel, its initramfs, its command line and the tables of the boot
//! protocol into guest memory.
//!
//! | file | protocol | entry | parameters |
//! |---|---|---|---|
//! | ELF with a Xen note | PVH (`include/xen/interface/hvm/start_info.h`) | 32-bit, no paging | rbx → start info |
//! | bzImage | Linux 64-bit (Documentation/arch/x86/boot.rst) | 64-bit, 1 GiB mapped | rsi → zero page |

mod linux;
mod pvh;
mod registers;

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use anyhow::{Context, bail};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Cmdline, Elf, KernelLoader, load_cmdline};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, ReadVolatile,
};

use crate::layout::{CMDLINE, CMDLINE_MAX, HIGH_START, I8042_COMMAND, LOW_END, RESET_VECTOR};
pub use registers::{Entry, set};

/// Start and length in guest memory.
#[derive(Clone, Copy, Debug)]
struct Initrd {
    start: u64,
    len: u64,
}

/// RAM that the kernel may use.
fn usable(memory: &GuestMemoryMmap) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, LOW_END)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(HIGH_START);
        let end = region.start_addr().0 + region.len();
        usable.push((start, end - start));
    }
    usable
}

/// All the firmware that there is. Linux without EFI and with ACPI's reduced hardware reboots by a jump to the BIOS, so code
/// must be there. `mov al, 0xfe; out 0x64, al; hlt`: the keyboard controller resets the machine.
const FIRMWARE: [u8; 5] = [0xb0, 0xfe, 0xe6, I8042_COMMAND as u8, 0xf4];

/// Loads everything. Returns where the boot processor starts.
///
/// # Errors
/// A file cannot be read, is not a kernel, or does not fit.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
) -> anyhow::Result<Entry> {
    let mut file = open(kernel, "kernel")?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .with_context(|| format!("{} is not a kernel: it is too short", kernel.display()))?;
    file.rewind()?;
    let mut line = Cmdline::new(CMDLINE_MAX)?;
    line.insert_str(cmdline)
        .context("--cmdline is too long, or not ASCII")?;
    load_cmdline(memory, CMDLINE, &line)?;
    memory.write_slice(&FIRMWARE, GuestAddress(RESET_VECTOR))?;
    let no_kernel = || {
        format!(
            "{} does not fit into the guest's memory, or is not an x86-64 kernel (an ELF file with a PVH note, or a bzImage)",
            kernel.display()
        )
    };
    let himem = Some(GuestAddress(HIGH_START));
    if magic == *b"\x7fELF" {
        let loaded = Elf::load(memory, None, &mut file, himem).with_context(no_kernel)?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            bail!(
                "{} has no PVH entry: build it with CONFIG_PVH=y, or boot the bzImage",
                kernel.display()
            );
        };
        let initrd = place(memory, initrd, u64::MAX, loaded.kernel_end)?;
        pvh::configure(memory, initrd)?;
        return Ok(Entry::Pvh(entry.0));
    }
    let loaded = BzImage::load(memory, None, &mut file, himem).with_context(no_kernel)?;
    let header = loaded.setup_header.with_context(no_kernel)?;
    // A compressed kernel unpacks itself to its preferred address and needs init_size bytes there.
    let end = header.pref_address.max(loaded.kernel_load.0) + u64::from(header.init_size);
    let initrd = place(
        memory,
        initrd,
        u64::from(header.initrd_addr_max),
        end.max(loaded.kernel_end),
    )?;
    linux::configure(memory, header, initrd)?;
    Ok(Entry::Linux(loaded.kernel_load.0))
}

fn open(path: &Path, what: &str) -> anyhow::Result<File> {
    File::open(path)
        .with_context(|| format!("cannot open {what} {path:?}: name a file that can be read"))
}

/// Puts the initramfs at the end of low memory, but below `limit` and not below `floor`.
fn place(
    memory: &GuestMemoryMmap,
    initrd: Option<&Path>,
    limit: u64,
    floor: u64,
) -> anyhow::Result<Option<Initrd>> {
    let Some(path) = initrd else { return Ok(None) };
    let mut file = open(path, "initramfs")?;
    let len = file.metadata()?.len();
    let low = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let start = low.min(limit).checked_sub(len).map(|at| at & !0xfff);
    let Some(start) = start.filter(|&at| at >= floor) else {
        bail!(
            "{} ({} MiB) does not fit beside the kernel: give the guest more --memory",
            path.display(),
            len >> 20
        );
    };
    let mut at = memory.get_slice(GuestAddress(start), len as usize)?;
    file.read_exact_volatile(&mut at)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Some(Initrd { start, len }))
}

/// Writes a value to guest memory.
fn write<T: vm_memory::ByteValued>(
    memory: &GuestMemoryMmap,
    value: T,
    at: u64,
) -> anyhow::Result<()> {
    Ok(memory.write_obj(value, GuestAddress(at))?)
}
