//! `adit-vmm bare`: a guest without an operating system that runs in user mode from its first instruction.
//!
//! Some machines have a KVM that runs user mode natively and emulates kernel mode, but not well enough for Linux. This guest
//! never enters kernel mode, so it runs at full speed there as on every other KVM: a smoke test of memory, exits, ioeventfd
//! and irqfd, and the guest's side of a ring.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;

use adit_bare::abi::{
    DEVICE, DOORBELLS, LINE, MAIL, MAILBOX, MEMORY, PAGE_TABLES, PORT_DOORBELL, PORT_ECHO,
    PORT_TEXT, PORT_VERDICT, REGION, REGION_UNIT, STACK_TOP, Task, Verdict,
};
use anyhow::{Context, bail, ensure};
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::kvm;
use crate::memory::register;

const USER: u64 = 0b111;
const LARGE_PAGE: u64 = 1 << 7;
const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;
const CR0_PE_MP_NE_PG: u64 = 1 << 31 | 1 << 5 | 1 << 1 | 1;
/// PAE, and the SSE registers that compiled code uses.
const CR4_PAE_SSE: u64 = 1 << 10 | 1 << 9 | 1 << 5;
const EFER_LMA_LME: u64 = 1 << 10 | 1 << 8;
/// The bit that is always set, and I/O ports for user mode.
const RFLAGS_IOPL3: u64 = 3 << 12 | 1 << 1;
const RING_3: u8 = 3;

/// A guest that is ready to run. `vm` is dropped before `memory`.
pub struct Bare {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: GuestMemoryMmap,
    text: Vec<u8>,
    asked: u32,
}

impl Bare {
    /// Loads an image. `region` is a file and its length, a multiple of [`REGION_UNIT`], that the guest sees at [`REGION`].
    ///
    /// # Errors
    /// There is no KVM, it lacks something that is needed, or the file is not an image.
    pub fn new(image: &Path, task: Task, region: Option<(File, u64)>) -> anyhow::Result<Self> {
        let kvm = kvm()?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        let bytes = region.as_ref().map_or(0, |(_, bytes)| *bytes);
        ensure!(
            bytes.is_multiple_of(REGION_UNIT) && bytes <= ENTRIES * REGION_UNIT,
            "a region is a multiple of {REGION_UNIT} bytes, up to 1 GiB"
        );
        let mut ranges = vec![(GuestAddress(0), MEMORY as usize, None)];
        ranges.extend(region.map(|(file, bytes)| {
            let file = FileOffset::new(file, 0);
            (GuestAddress(REGION), bytes as usize, Some(file))
        }));
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges)?;
        register(&vm, &memory)?;
        let mut file = File::open(image)
            .with_context(|| format!("{}: `cargo xtask test` builds it", image.display()))?;
        let loaded = Elf::load(&memory, None, &mut file, None);
        let entry = loaded
            .with_context(|| format!("{} is not an image", image.display()))?
            .kernel_load;
        map(&memory)?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        start(&kvm, &vcpu, entry.0, task, bytes)?;
        Ok(Self {
            vcpu,
            vm,
            memory,
            text: Vec::new(),
            asked: 0,
        })
    }

    /// Runs the guest to its verdict. Returns the verdict and the guest's text.
    ///
    /// # Errors
    /// The guest did something that the image never does.
    pub fn run(&mut self) -> anyhow::Result<(Verdict, String)> {
        loop {
            match self.vcpu.run().context("KVM_RUN")? {
                VcpuExit::IoOut(PORT_TEXT, bytes) => self.text.extend_from_slice(bytes),
                VcpuExit::IoOut(PORT_ECHO, bytes) => self.asked = word(bytes)?,
                VcpuExit::IoIn(PORT_ECHO, bytes) => answer(bytes, self.asked)?,
                VcpuExit::MmioWrite(DEVICE, bytes) => self.asked = word(bytes)?,
                VcpuExit::MmioRead(DEVICE, bytes) => answer(bytes, self.asked)?,
                VcpuExit::IoOut(PORT_VERDICT, bytes) => {
                    let verdict = word(bytes)?;
                    let verdict = Verdict::from_u32(verdict)
                        .with_context(|| format!("the guest's verdict is unknown: {verdict}"))?;
                    return Ok((verdict, String::from_utf8_lossy(&self.text).into_owned()));
                }
                other => bail!("the guest stopped: {other:?}"),
            }
        }
    }
}

fn word(bytes: &[u8]) -> anyhow::Result<u32> {
    let bytes = bytes.try_into().context("not 32 bits")?;
    Ok(u32::from_le_bytes(bytes))
}

fn answer(bytes: &mut [u8], asked: u32) -> anyhow::Result<()> {
    ensure!(bytes.len() == 4, "not 32 bits");
    bytes.copy_from_slice(&(!asked).to_le_bytes());
    Ok(())
}

/// Identity page tables for the first two GiB, all of it accessible to user mode. What is not memory there is a device.
fn map(memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    let page = |n: u64| PAGE_TABLES + n * PAGE;
    let write = |entry: u64, at: u64| memory.write_obj(entry | USER, GuestAddress(at));
    write(page(1), page(0))?;
    for directory in 0..2 {
        write(page(2 + directory), page(1) + directory * 8)?;
        for n in 0..ENTRIES {
            let address = (directory * ENTRIES + n) * REGION_UNIT;
            write(address | LARGE_PAGE, page(2 + directory) + n * 8)?;
        }
    }
    Ok(())
}

/// Sets the registers as if a kernel had just returned to user mode.
fn start(kvm: &Kvm, vcpu: &VcpuFd, entry: u64, task: Task, bytes: u64) -> anyhow::Result<()> {
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    vcpu.set_cpuid2(&cpuid.context("KVM_GET_SUPPORTED_CPUID")?)
        .context("KVM_SET_CPUID2")?;
    let segment = |selector: u16, type_, long: bool| kvm_segment {
        limit: u32::MAX,
        selector: selector | u16::from(RING_3),
        type_,
        present: 1,
        dpl: RING_3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    let mut s = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    s.cs = segment(0x10, 0b1011, true);
    let data = segment(0x18, 0b0011, false);
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    (s.cr0, s.cr3, s.cr4) = (CR0_PE_MP_NE_PG, PAGE_TABLES, CR4_PAE_SSE);
    s.efer = EFER_LMA_LME;
    vcpu.set_sregs(&s).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsp: STACK_TOP - 8,
        rdi: task as u64,
        rsi: bytes,
        rdx: vcpu.get_tsc_khz().unwrap_or(0).into(),
        rflags: RFLAGS_IOPL3,
        ..Default::default()
    })
    .context("KVM_SET_REGS")
}

/// Runs the guest's side of ring and engine. Returns a line with the figures, or with the reason why nothing ran.
///
/// # Errors
/// The guest failed.
pub fn ring(image: &Path) -> anyhow::Result<String> {
    if let Err(e) = kvm() {
        return Ok(format!("skipped: {e:#}"));
    }
    let figures = adit_bare::figures::measure(|region, bytes| {
        let mut guest = Bare::new(image, Task::Streams, Some((region, bytes)))?;
        Ok(Box::new(move || guest.run()))
    });
    figures.map(|figures| figures.to_string())
}

/// Tries memory, exits, an ioeventfd and an irqfd. Returns a line with the result.
///
/// # Errors
/// One of them does not work.
pub fn smoke(image: &Path) -> anyhow::Result<String> {
    let mut guest = Bare::new(image, Task::Smoke, None)?;
    // A counter: all writes before a read count, so it does not matter whether the guest or the thread below is faster.
    let doorbell = EventFd::new(libc::EFD_CLOEXEC)?;
    let line = EventFd::new(libc::EFD_CLOEXEC)?;
    let address = IoEventAddress::Pio(PORT_DOORBELL.into());
    let vm = &guest.vm;
    vm.register_ioevent(&doorbell, &address, NoDatamatch)
        .context("KVM_IOEVENTFD")?;
    vm.register_irqfd(&line, LINE).context("KVM_IRQFD")?;
    let (verdict, said) = thread::scope(|scope| {
        scope.spawn(|| {
            let mut writes = 0;
            while writes < DOORBELLS {
                // Without the line, the guest's verdict is `Interrupt`.
                let Ok(n) = doorbell.read() else { return };
                writes += n;
            }
            let _ = line.write(1);
        });
        let done = guest.run();
        // Wakes the thread if it still waits for a write that the guest never made.
        let _ = doorbell.write(DOORBELLS);
        done
    })?;
    let _ = std::io::stderr().write_all(said.as_bytes());
    ensure!(verdict == Verdict::Done, "the guest's verdict: {verdict:?}");
    let mail: u64 = guest.memory.read_obj(GuestAddress(MAILBOX))?;
    ensure!(
        mail == MAIL,
        "the guest's memory is not this process's: {mail:#x}"
    );
    Ok(format!(
        "bare guest: memory, ports, device memory, {DOORBELLS} writes to an ioeventfd and an irqfd's line: all as they should be"
    ))
}
