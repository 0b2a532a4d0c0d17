//! What the 64-bit entry of a bzImage gets: Linux's `boot_params`.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_params, setup_header};
use vm_memory::GuestMemoryMmap;

use super::{Initrd, usable};
use crate::layout::{CMDLINE, CMDLINE_MAX, RSDP, ZERO_PAGE};

/// E820 type of RAM.
const RAM: u32 = 1;
/// `type_of_loader`: a boot loader without a number of its own.
const LOADER_OTHER: u8 = 0xff;

pub fn configure(
    memory: &GuestMemoryMmap,
    header: setup_header,
    initrd: Option<Initrd>,
) -> anyhow::Result<()> {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: RSDP.0,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    params.hdr.cmdline_size = CMDLINE_MAX as u32;
    if let Some(Initrd { start, len }) = initrd {
        // Below `initrd_addr_max`, which is 32 bits wide.
        params.hdr.ramdisk_image = u32::try_from(start)?;
        params.hdr.ramdisk_size = u32::try_from(len)?;
    }
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(usable(memory)) {
        (entry.addr, entry.size, entry.r#type) = (addr, size, RAM);
        params.e820_entries += 1;
    }
    let params = BootParams::new(&params, ZERO_PAGE);
    Ok(LinuxBootConfigurator::write_bootparams(&params, memory)?)
}
