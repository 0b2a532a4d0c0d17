//! A virtual processor before its first instruction: CPUID, the registers that firmware would have set, the local APIC.
//!
//! The guest must never have to measure its clock: with ACPI's reduced hardware Linux has no timer to measure it against, and
//! sometimes hangs. So the guest gets the frequency in three ways: kvmclock, the hypervisor's frequency leaf, and leaf 0x15.

use anyhow::{Context, bail};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

/// Local APIC registers LVT LINT0 and LINT1, and their delivery modes.
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const MODE_EXTINT: i8 = 7;
const MODE_NMI: i8 = 4;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Enabled, and all memory is write-back: otherwise Linux warns, and runs slowly on Intel.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_HYPERVISOR_FREQUENCIES: u32 = 0x4000_0010;
/// KVM's local APICs count at 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Gives a processor the CPUID, registers and local APIC that it would have after firmware ran.
///
/// # Errors
/// KVM refuses one of them.
pub fn configure(kvm: &Kvm, vcpu: &VcpuFd, id: u8, count: u8) -> anyhow::Result<()> {
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let cpuid = cpuid(kvm, id, count, tsc_khz)?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    let msrs = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let set = vcpu
        .set_msrs(&Msrs::from_entries(&msrs)?)
        .context("KVM_SET_MSRS")?;
    if set != msrs.len() {
        bail!("KVM does not accept MSR {:#x}", msrs[set].index);
    }
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .context("KVM_SET_FPU")?;
    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    delivery_mode(&mut lapic, LINT0, MODE_EXTINT);
    delivery_mode(&mut lapic, LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC")
}

/// Sets bits 8 to 10 of the register.
fn delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: i8) {
    let byte = &mut lapic.regs[register + 1];
    *byte = *byte & !7 | mode;
}

fn cpuid(kvm: &Kvm, id: u8, count: u8, tsc_khz: u32) -> anyhow::Result<CpuId> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("KVM_GET_SUPPORTED_CPUID")?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut frequencies = false;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx &= 0xffff;
                entry.ebx |= u32::from(count) << 16 | u32::from(id) << 24;
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                if deadline {
                    entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
                }
            }
            // Topology: KVM reports the host's. The guest has one thread a core and one package; edx is the x2APIC id.
            0xb | 0x1f => {
                entry.edx = u32::from(id);
                (entry.eax, entry.ebx) = match entry.index {
                    0 => (0, 1),
                    1 => (u32::from(count).next_power_of_two().ilog2(), count.into()),
                    _ => (0, 0),
                };
                let level = entry.index.min(2);
                entry.ecx = entry.index | if level < 2 { (level + 1) << 8 } else { 0 };
            }
            // KVM would report the TSC frequency of the host's crystal.
            0x15 if tsc_khz != 0 => {
                // TSC = ecx * ebx / eax, with ecx in Hz. Linux computes in kHz and 32 bits, so the factors are small.
                (entry.eax, entry.ebx, entry.ecx) = (1000, tsc_khz / 1000, APIC_BUS_KHZ * 1000);
            }
            LEAF_HYPERVISOR => {
                entry.eax = entry.eax.max(LEAF_HYPERVISOR_FREQUENCIES);
                frequencies = tsc_khz != 0;
            }
            _ => {}
        }
    }
    if frequencies {
        cpuid
            .push(kvm_cpuid_entry2 {
                function: LEAF_HYPERVISOR_FREQUENCIES,
                eax: tsc_khz,
                ebx: APIC_BUS_KHZ,
                ..Default::default()
            })
            .context("no room for the frequency leaf")?;
    }
    Ok(cpuid)
}
