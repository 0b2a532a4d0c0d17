//! A machine's state inside KVM: saved and restored.

#![allow(unsafe_code)] // KVM_SET_XSAVE reads as much as the guest has enabled

use anyhow::{Context, ensure};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The size of KVM_GET_XSAVE's answer.
const XSAVE_BYTES: i32 = 4096;

/// A processor.
#[derive(Serialize, Deserialize)]
pub struct CpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

/// Interrupt chips and clock.
#[derive(Serialize, Deserialize)]
pub struct ChipState {
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl CpuState {
    /// Saves a processor. It must not be running.
    ///
    /// # Errors
    /// KVM refuses, or the processor has state that does not fit.
    pub fn save(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> anyhow::Result<Self> {
        ensure!(
            vm.check_extension_int(Cap::Xsave2) <= XSAVE_BYTES,
            "this processor has more vector state (AMX) than a snapshot can hold"
        );
        // KVM prescribes the order: the run state first, because reading it may change the rest; events last.
        let mp = vcpu.get_mp_state().context("KVM_GET_MP_STATE")?;
        Ok(Self {
            mp,
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .context("KVM_GET_CPUID2")?
                .as_slice()
                .to_vec(),
            regs: vcpu.get_regs().context("KVM_GET_REGS")?,
            sregs: vcpu.get_sregs().context("KVM_GET_SREGS")?,
            xsave: vcpu.get_xsave().context("KVM_GET_XSAVE")?,
            xcrs: vcpu.get_xcrs().context("KVM_GET_XCRS")?,
            debug: vcpu.get_debug_regs().context("KVM_GET_DEBUGREGS")?,
            lapic: vcpu.get_lapic().context("KVM_GET_LAPIC")?,
            msrs: msrs(kvm, vcpu)?,
            events: vcpu.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?,
        })
    }

    /// Gives a new processor the saved state.
    ///
    /// # Errors
    /// KVM refuses: the host differs too much, or the state is damaged.
    pub fn restore(&self, vcpu: &VcpuFd) -> anyhow::Result<()> {
        let cpuid = CpuId::from_entries(&self.cpuid)?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        vcpu.set_mp_state(self.mp).context("KVM_SET_MP_STATE")?;
        vcpu.set_regs(&self.regs).context("KVM_SET_REGS")?;
        vcpu.set_sregs(&self.sregs).context("KVM_SET_SREGS")?;
        // SAFETY: no dynamic feature (AMX) is enabled for this process, so KVM reads no more than the 4096 bytes that a
        // kvm_xsave has; `save` refuses processors with more.
        unsafe { vcpu.set_xsave(&self.xsave) }.context("KVM_SET_XSAVE")?;
        vcpu.set_xcrs(&self.xcrs).context("KVM_SET_XCRS")?;
        vcpu.set_debug_regs(&self.debug)
            .context("KVM_SET_DEBUGREGS")?;
        vcpu.set_lapic(&self.lapic).context("KVM_SET_LAPIC")?;
        let mut left = &self.msrs[..];
        while !left.is_empty() {
            let set = vcpu
                .set_msrs(&Msrs::from_entries(left)?)
                .context("KVM_SET_MSRS")?;
            // This MSR can be read but not written on this host. Skip it: the guest finds the host's value.
            left = left.get(set + 1..).unwrap_or_default();
        }
        vcpu.set_vcpu_events(&self.events)
            .context("KVM_SET_VCPU_EVENTS")
    }
}

/// All MSRs that KVM knows and this processor has. The timer's deadline is last: to restore it, the clock must be set.
fn msrs(kvm: &Kvm, vcpu: &VcpuFd) -> anyhow::Result<Vec<kvm_msr_entry>> {
    let list = kvm.get_msr_index_list().context("KVM_GET_MSR_INDEX_LIST")?;
    let mut wanted: Vec<_> = list
        .as_slice()
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    wanted.sort_by_key(|msr| msr.index == MSR_TSC_DEADLINE);
    let (mut all, mut left) = (Vec::new(), &wanted[..]);
    while !left.is_empty() {
        let mut some = Msrs::from_entries(left)?;
        let got = vcpu.get_msrs(&mut some).context("KVM_GET_MSRS")?;
        all.extend_from_slice(&some.as_slice()[..got]);
        left = left.get(got + 1..).unwrap_or_default();
    }
    Ok(all)
}

impl ChipState {
    /// # Errors
    /// KVM refuses.
    pub fn save(vm: &VmFd) -> anyhow::Result<Self> {
        let ids = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        let mut irqchips = Vec::new();
        for chip_id in ids {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip).context("KVM_GET_IRQCHIP")?;
            irqchips.push(chip);
        }
        let mut clock = vm.get_clock().context("KVM_GET_CLOCK")?;
        // The restoring host decides whether its clock is stable.
        clock.flags = 0;
        Ok(Self { irqchips, clock })
    }

    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, vm: &VmFd) -> anyhow::Result<()> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).context("KVM_SET_IRQCHIP")?;
        }
        vm.set_clock(&self.clock).context("KVM_SET_CLOCK")
    }
}
