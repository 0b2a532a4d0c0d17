//! The boot processor's registers, its descriptor table and its page tables.

use anyhow::Context;
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryMmap;

use super::write;
use crate::layout::{GDT, PAGE_DIRECTORY, PDPT, PML4, PVH_INFO, STACK_TOP, ZERO_PAGE};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The one bit of RFLAGS that is always set.
const RFLAGS: u64 = 1 << 1;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
/// The 64-bit entry is so many bytes behind the 32-bit one.
const ENTRY_64: u64 = 0x200;

/// How the boot processor starts.
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    /// 32 bits, no paging, at this address.
    Pvh(u64),
    /// 64 bits, in the image that was loaded at this address.
    Linux(u64),
}

/// A flat segment; `type_` as in a descriptor's access byte.
fn segment(index: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// A segment as a descriptor of the guest's GDT.
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(s.limit >> (12 * u32::from(s.g)));
    let access = u64::from(s.type_ | s.s << 4 | s.dpl << 5 | s.present << 7);
    let flags = u64::from(s.avl | s.l << 1 | s.db << 2 | s.g << 3);
    (limit & 0xffff)
        | (s.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (s.base >> 24 & 0xff) << 56
}

/// Sets the boot processor's registers.
///
/// # Errors
/// KVM refuses them.
pub fn set(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: Entry) -> anyhow::Result<()> {
    let long = matches!(entry, Entry::Linux(_));
    let code = segment(2, 0b1011, long);
    let data = segment(3, 0b0011, false);
    let task = kvm_segment {
        s: 0,
        g: 0,
        db: 0,
        limit: 0x67,
        ..segment(4, 0b1011, false)
    };
    let table = [
        0,
        0,
        descriptor(&code),
        descriptor(&data),
        descriptor(&task),
    ];
    for (at, entry) in (GDT..).step_by(8).zip(table) {
        write(memory, entry, at)?;
    }

    let mut s = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    (s.gdt.base, s.gdt.limit) = (GDT, (table.len() * 8 - 1) as u16);
    s.idt.limit = 0;
    s.cs = code;
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    s.tr = task;
    s.cr0 = CR0_PE | CR0_ET;
    let mut r = kvm_regs {
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry {
        Entry::Pvh(at) => {
            (s.cr4, s.efer) = (0, 0);
            (r.rip, r.rbx) = (at, PVH_INFO.0);
        }
        Entry::Linux(at) => {
            map_first_gib(memory)?;
            (s.cr3, s.cr4, s.efer) = (PML4, CR4_PAE, EFER_LME | EFER_LMA);
            s.cr0 |= CR0_PG;
            (r.rip, r.rsi) = (at + ENTRY_64, ZERO_PAGE.0);
            (r.rsp, r.rbp) = (STACK_TOP, STACK_TOP);
        }
    }
    vcpu.set_sregs(&s).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&r).context("KVM_SET_REGS")
}

fn map_first_gib(memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    write(memory, PDPT | PRESENT_WRITABLE, PML4)?;
    write(memory, PAGE_DIRECTORY | PRESENT_WRITABLE, PDPT)?;
    for n in 0..512u64 {
        let page = n << 21 | LARGE_PAGE | PRESENT_WRITABLE;
        write(memory, page, PAGE_DIRECTORY + n * 8)?;
    }
    Ok(())
}
