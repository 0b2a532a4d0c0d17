//! The function in a real VM. The guest is a few real-mode instructions, so everything is below 1 MiB.
#![cfg(feature = "kvm")]
#![allow(unsafe_code)] // KVM gets the address of the guest's memory

use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_ring_pci::kvm::{Place, Plugged};
use adit_ringbuf::region::{Region, Spec};
use adit_ringbuf::session::Host;
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::doorbell::Doorbell;
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

const CODE: u64 = 0x1000;
const RAM: usize = 0x1_0000;
const CONFIG: u64 = 0xd_0000;
const REGISTERS: u64 = 0xd_1000;
const MSIX: u64 = 0xd_2000;
const REGION: u64 = 0xe_0000;
const REGION_BYTES: usize = 0x1_0000;
const PAGE: u16 = 0x1000;
/// Interrupt vectors of the guest.
const OF_MESSAGE: u8 = 0x41;
const OF_LINE: u8 = 0x42;
const LINE: u32 = 23;
/// Time limit for an interrupt, which takes microseconds.
const LIMIT: Duration = Duration::from_secs(5);

/// One step of the guest program.
enum Do {
    /// Reads 32 bits and outputs them.
    Output(u64, u16),
    Store32(u64, u16, u32),
    Store16(u64, u16, u16),
}

/// Assembles 16-bit machine code: `mov ax, SEGMENT; mov ds, ax; ...`, and at the end `out 0xff, al`.
fn assemble(program: &[Do]) -> Vec<u8> {
    let mut code = Vec::new();
    for step in program {
        let (Do::Output(base, at) | Do::Store32(base, at, _) | Do::Store16(base, at, _)) = step;
        code.push(0xb8);
        code.extend(((base >> 4) as u16).to_le_bytes());
        code.extend([0x8e, 0xd8]);
        match step {
            Do::Output(..) => {
                code.extend([0x66, 0xa1]);
                code.extend(at.to_le_bytes());
                code.extend([0x66, 0xe7, 0x10]); // out 0x10, eax
            }
            Do::Store32(_, _, value) => {
                code.extend([0x66, 0xc7, 0x06]);
                code.extend(at.to_le_bytes());
                code.extend(value.to_le_bytes());
            }
            Do::Store16(_, _, value) => {
                code.extend([0xc7, 0x06]);
                code.extend(at.to_le_bytes());
                code.extend(value.to_le_bytes());
            }
        }
    }
    code.extend([0xe6, 0xff]);
    code
}

struct Vm {
    // Fields drop in this order: the vCPU and the function before the memory that KVM has the addresses of.
    vcpu: VcpuFd,
    function: Plugged,
    vm: Arc<VmFd>,
    ram: Mapped,
    region: Mapped,
    interrupts: [adit_ring_pci::kvm::Interrupt; 2],
    host_doorbells: [EventFd; 2],
    /// Number of accesses that exited to the VMM.
    exits: usize,
}

fn spec() -> Spec {
    Spec::uniform(1, 8192)
}

/// Makes a VM. Prints why and returns `None` if there is no KVM here, or it has no interrupt chips.
fn vm() -> Option<Vm> {
    let made = || -> Result<Vm, Box<dyn std::error::Error>> {
        let vm = Arc::new(Kvm::new()?.create_vm()?);
        vm.create_irq_chip()?;
        let ram = Mapped::anonymous(RAM)?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: ram.address() as u64,
            flags: 0,
        };
        // SAFETY: the mapping is kept next to the VM and dropped after it. Nobody makes references to it.
        unsafe { vm.set_user_memory_region(slot)? };
        let vcpu = vm.create_vcpu(0)?;
        let region = Mapped::anonymous(REGION_BYTES)?;
        let place = Place {
            config_at: CONFIG,
            windows: [
                CONFIG + 0x1000..REGION,
                REGION..REGION + REGION_BYTES as u64,
            ],
            slot: 1,
            line: LINE,
            messages: LINE + 1,
        };
        let function = Plugged::new(vm.clone(), region.clone(), &spec(), place)?;
        let (interrupts, host_doorbells) = function.bells()?;
        Ok(Vm {
            vcpu,
            function,
            vm,
            ram,
            region,
            interrupts,
            host_doorbells,
            exits: 0,
        })
    };
    let made = made();
    if let Err(e) = &made {
        println!("skipped: no KVM with interrupt chips here: {e}");
    }
    made.ok()
}

impl Vm {
    /// Runs the program in the guest. Returns what it output.
    fn run(&mut self, program: &[Do]) -> Vec<u32> {
        self.ram.write(CODE as usize, &assemble(program));
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE, 2);
        self.vcpu.set_regs(&regs).unwrap();
        let mut said = Vec::new();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(0x10, data) => {
                    said.push(u32::from_le_bytes(data.try_into().unwrap()));
                }
                VcpuExit::IoOut(0xff, _) => return said,
                VcpuExit::MmioRead(at, data) => {
                    self.exits += 1;
                    data.fill(0xff);
                    self.function.read(at, data);
                }
                VcpuExit::MmioWrite(at, data) => {
                    self.exits += 1;
                    self.function.write(at, data).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Gives the BARs their addresses and turns memory decoding on.
    fn place(&mut self) {
        self.run(&[
            Do::Store32(CONFIG, 0x10, REGISTERS as u32),
            Do::Store32(CONFIG, 0x14, MSIX as u32),
            Do::Store32(CONFIG, 0x18, REGION as u32),
            Do::Store16(CONFIG, 4, 6),
        ]);
    }

    /// Waits until an interrupt arrives at the guest's local APIC. KVM delivers some interrupts on a thread of its
    /// own.
    fn gets(&self, vector: u8) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            if self.waits(vector) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Returns whether an interrupt is pending in the local APIC, and clears it.
    fn waits(&self, vector: u8) -> bool {
        let mut lapic = self.vcpu.get_lapic().unwrap();
        // IRR: 32 bits in every 16 bytes from 0x200 on.
        let at = 0x200 + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
        let waits = lapic.regs[at] >> (vector % 8) & 1 == 1;
        if !waits {
            return false;
        }
        lapic.regs[at] &= !(1 << (vector % 8));
        self.vcpu.set_lapic(&lapic).unwrap();
        true
    }

    /// Turns the local APIC on, and makes the IOAPIC send a vector for the line, edge-triggered.
    fn chips(&self) {
        let mut lapic = self.vcpu.get_lapic().unwrap();
        lapic.regs[0xf1] |= 1;
        self.vcpu.set_lapic(&lapic).unwrap();
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        self.vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: this is the IOAPIC's state, as requested from KVM.
        unsafe { chip.chip.ioapic.redirtbl[LINE as usize].bits = u64::from(OF_LINE) };
        self.vm.set_irqchip(&chip).unwrap();
    }
}

#[test]
fn a_guest_uses_region_and_doorbells_without_an_exit() {
    let Some(mut vm) = vm() else { return };
    let host = Host::offer(vm.region.clone(), spec(), 1).unwrap();
    // Reads of configuration space do not exit.
    let ids = vm.run(&[Do::Output(CONFIG, 0), Do::Output(CONFIG, 0x3c)]);
    assert_eq!((&ids[..], vm.exits), (&[0x1110_1af4, 0x100][..], 0));
    // A BAR is not decoded before it has an address. Its size is what remains after writing all ones.
    let size = vm.run(&[
        Do::Output(REGION, 0),
        Do::Store32(CONFIG, 0x18, u32::MAX),
        Do::Output(CONFIG, 0x18),
    ]);
    assert_eq!(size, [u32::MAX, !(REGION_BYTES as u32 - 1) | 0xc]);
    vm.place();
    vm.exits = 0;
    // Accesses to the region do not exit.
    let said = vm.run(&[
        Do::Output(REGION, 0),
        Do::Output(REGION, 4),
        Do::Store32(REGION, 2 * PAGE + 64, 0x1234_5678),
        Do::Output(REGION, 2 * PAGE + 64),
    ]);
    assert_eq!(said[..2], [0x5449_4441, 0x3147_4e52]);
    assert_eq!(said[2], 0x1234_5678);
    assert_eq!(vm.region.load(2 * usize::from(PAGE) + 64), 0x1234_5678);
    // Writes to the doorbells do not exit either: they are ioeventfds.
    vm.run(&[Do::Store32(REGISTERS, 12, 1)]);
    assert_eq!(vm.exits, 0);
    assert!(vm.host_doorbells[0].read().is_err());
    assert_eq!(vm.host_doorbells[1].read().unwrap(), 1);
    vm.run(&[
        Do::Store32(REGISTERS, 12, 0),
        Do::Store32(REGISTERS, 12, 1 << 16),
    ]);
    assert_eq!(vm.host_doorbells[0].read().unwrap(), 1);
    assert!(vm.host_doorbells[1].read().is_err());
    drop(host);
}

/// Root in the guest cannot write pages that only the host writes, although the guest has them mapped.
#[test]
fn a_guest_cannot_write_pages_that_only_the_host_writes() {
    let Some(mut vm) = vm() else { return };
    vm.place();
    let [head, records] = spec().written_by_host();
    let region = Region::new(spec(), 1).unwrap();
    assert_eq!(region.spec().bytes(), 28_672);
    let bytes = region.spec().bytes();
    for at in (0..REGION_BYTES).step_by(PAGE.into()) {
        let host = head.contains(&at) || records.contains(&at);
        let at16 = at as u16 + 8;
        let said = vm.run(&[Do::Store32(REGION, at16, 7), Do::Output(REGION, at16)]);
        let there = vm.region.load(at + 8);
        let wanted = if host { 0 } else { 7 };
        assert_eq!(
            (said[0], there),
            (wanted, wanted.into()),
            "{at:#x} of {bytes:#x}"
        );
    }
}

#[test]
fn a_guest_can_move_and_disable_its_bars() {
    let Some(mut vm) = vm() else { return };
    vm.place();
    vm.region.store(8, 5);
    // Memory decoding is off: reads find nothing.
    let said = vm.run(&[
        Do::Output(REGION, 8),
        Do::Store16(CONFIG, 4, 0),
        Do::Output(REGION, 8),
        Do::Store32(REGISTERS, 12, 0),
        Do::Store16(CONFIG, 4, 2),
        Do::Output(REGION, 8),
    ]);
    assert_eq!(said, [5, u32::MAX, 5]);
    assert!(vm.host_doorbells[0].read().is_err());
    // Two BARs overlap and are separated again. The doorbell follows its BAR.
    vm.run(&[
        Do::Store32(CONFIG, 0x10, MSIX as u32),
        Do::Store32(CONFIG, 0x14, REGISTERS as u32),
        Do::Store32(MSIX, 12, 0),
        Do::Store32(REGISTERS, 12, 1),
    ]);
    assert_eq!(vm.host_doorbells[0].read().unwrap(), 1);
    assert!(vm.host_doorbells[1].read().is_err());
}

#[test]
fn the_host_interrupts_by_the_pin_or_by_a_message() {
    let Some(mut vm) = vm() else { return };
    vm.chips();
    vm.place();
    // The guest has not enabled any interrupt yet.
    vm.interrupts[0].ring().unwrap();
    assert!(!vm.waits(OF_LINE));
    vm.run(&[Do::Store32(REGISTERS, 0, 3)]);
    assert!(vm.gets(OF_LINE));
    // The sequence of uio_pci_generic and the agent: disable, clear, enable. An interrupt in between is not lost.
    vm.exits = 0;
    let said = vm.run(&[
        Do::Output(CONFIG, 4),
        Do::Store16(CONFIG, 4, 0x406),
        Do::Output(REGISTERS, 4),
    ]);
    assert_eq!((said[0] >> 19 & 1, said[1], vm.exits), (1, 1, 2));
    vm.interrupts[1].ring().unwrap();
    assert!(!vm.waits(OF_LINE));
    vm.run(&[Do::Store16(CONFIG, 4, 6)]);
    assert!(vm.gets(OF_LINE));
    // Messages, first masked and then unmasked.
    vm.run(&[
        Do::Store32(MSIX, 0, 0xfee0_0000),
        Do::Store32(MSIX, 8, OF_MESSAGE.into()),
        Do::Store16(CONFIG, 0x42, 0x8000),
    ]);
    vm.interrupts[0].ring().unwrap();
    assert!(!vm.waits(OF_MESSAGE));
    vm.run(&[Do::Store32(MSIX, 12, 0)]);
    assert!(vm.gets(OF_MESSAGE));
    vm.interrupts[0].ring().unwrap();
    assert!(vm.gets(OF_MESSAGE));
    assert!(!vm.waits(OF_LINE));
    // The default routes of the interrupt chips still exist.
    vm.run(&[Do::Store16(CONFIG, 0x42, 0), Do::Output(REGISTERS, 4)]);
    vm.interrupts[0].ring().unwrap();
    assert!(vm.gets(OF_LINE));
}

/// What the agent uses of uio: the handler's read does not exit, and it writes nothing.
#[test]
fn an_interrupt_by_pulses_costs_the_guest_no_exit() {
    let Some(mut vm) = vm() else { return };
    vm.chips();
    vm.place();
    vm.run(&[
        Do::Store32(REGISTERS, 0, 1 << 31 | 3),
        Do::Store16(CONFIG, 4, 0x406),
    ]);
    vm.exits = 0;
    for _ in 0..3 {
        vm.interrupts[0].ring().unwrap();
        assert!(vm.gets(OF_LINE));
        let said = vm.run(&[Do::Output(CONFIG, 4)]);
        assert_eq!((said[0] >> 19 & 1, said[0] >> 10 & 1), (1, 1));
    }
    assert_eq!(vm.exits, 0);
}

#[test]
fn a_restored_function_has_the_same_addresses_and_a_new_region() {
    let Some(mut held) = vm() else { return };
    held.place();
    held.run(&[Do::Store32(REGISTERS, 0, 3)]);
    let state = held.function.save();
    drop(held);
    let mut vm = vm().unwrap();
    vm.chips();
    vm.region.store(8, 9);
    vm.function.restore(&state).unwrap();
    vm.interrupts[0].ring().unwrap();
    assert!(vm.gets(OF_LINE));
    let said = vm.run(&[Do::Output(CONFIG, 0x18), Do::Output(REGION, 8)]);
    assert_eq!(said, [REGION as u32 | 0xc, 9]);
    vm.run(&[Do::Store32(REGISTERS, 12, 0)]);
    assert_eq!(vm.host_doorbells[0].read().unwrap(), 1);
    assert!(vm.function.restore(&state[1..]).is_err());
}
