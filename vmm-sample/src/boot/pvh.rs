//! What the PVH entry gets: `hvm_start_info`.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestMemoryMmap;

use super::{Initrd, usable};
use crate::layout::{CMDLINE, PVH_INFO, PVH_MEMORY_MAP, PVH_MODULES, RSDP};

/// XEN_HVM_START_MAGIC_VALUE.
const MAGIC: u32 = 0x336e_c578;
/// XEN_HVM_MEMMAP_TYPE_RAM.
const RAM: u32 = 1;

pub fn configure(memory: &GuestMemoryMmap, initrd: Option<Initrd>) -> anyhow::Result<()> {
    let map: Vec<_> = usable(memory)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: RAM,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|i| hvm_modlist_entry {
            paddr: i.start,
            size: i.len,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: PVH_MODULES.0,
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: RSDP.0,
        memmap_paddr: PVH_MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, PVH_INFO);
    params.set_sections(&map, PVH_MEMORY_MAP);
    params.set_modules(&modules, PVH_MODULES);
    Ok(PvhBootConfigurator::write_bootparams(&params, memory)?)
}
