//! A VM: memory, interrupt chips, processors, devices. Made, booted, started and ended here; paused in `pause`.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, bail};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::acpi::{self, Window};
use crate::bus::{Bus, lock};
use crate::console::{Console, Line, LineState};
use crate::exit::{Exit, Reason};
use crate::gate::Gate;
use crate::options::Boot;
use crate::pci::Pci;
use crate::seccomp::{Filters, Thread};
use crate::virtio::mmio::TransportState;
use crate::virtio::{Device, Memory, plug};
use crate::{boot, cpu, layout, memory};

/// Processors at most. Ids of local APICs are a byte, and one of them is the IOAPIC's.
pub const CPUS_MAX: u8 = 32;

/// A VM. Fields are dropped in this order: KVM must be closed before the guest's memory is unmapped.
pub struct Machine {
    pub(crate) vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) kvm: Kvm,
    windows: Vec<Window>,
    /// The interrupt that announces a new generation id.
    pub(crate) generation: EventFd,
    /// The states of the devices while the machine is paused; `None` while it runs.
    pub(crate) held: Option<Vec<TransportState>>,
    pub bus: Arc<Bus>,
    pub exit: Arc<Exit>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub memory: Memory,
}

/// Opens KVM and checks that it can do what is needed.
///
/// # Errors
/// It cannot; the message says what to do.
pub fn kvm() -> anyhow::Result<Kvm> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT => anyhow::anyhow!(
            "there is no /dev/kvm: load kvm_intel or kvm_amd, or switch virtualization on in the firmware (in a VM: nested virtualization)"
        ),
        libc::EACCES | libc::EPERM => anyhow::anyhow!(
            "/dev/kvm may not be opened: add this user to the group kvm, or run as root"
        ),
        _ => anyhow::anyhow!("/dev/kvm: {e}"),
    })?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        bail!("/dev/kvm has another version of its API than {KVM_API_VERSION}");
    }
    let needed = [
        Cap::Irqchip,
        Cap::Ioeventfd,
        Cap::Irqfd,
        Cap::UserMemory,
        Cap::ReadonlyMem,
        Cap::ExtCpuid,
        Cap::ImmediateExit,
    ];
    match needed.iter().find(|&&cap| !kvm.check_extension(cap)) {
        None => Ok(kvm),
        Some(cap) => bail!("this host's KVM lacks {cap:?}: a newer kernel has it"),
    }
}

impl Machine {
    /// Makes a machine with blank processors; next it is [booted](Self::boot) or [restored](Self::restore). `ring` is the
    /// length in bytes of the VM's ring, if it has one.
    ///
    /// # Errors
    /// KVM is missing or refuses, or there is too little memory.
    pub fn new(
        cpus: u8,
        serial: &Line,
        memory: Memory,
        devices: Vec<Box<dyn Device>>,
        line: &LineState,
        ring: Option<usize>,
    ) -> anyhow::Result<Self> {
        let kvm = kvm()?;
        let vm = Arc::new(kvm.create_vm().context("KVM_CREATE_VM")?);
        memory::register(&vm, &memory)?;
        vm.set_tss_address(layout::KVM_TSS)
            .context("KVM_SET_TSS_ADDR")?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        let exit = Arc::new(Exit::new()?);

        let irq = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&irq, layout::SERIAL_GSI)?;
        let console = Console::open(serial, irq, line)?;
        let generation = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&generation, layout::EVENT_GSI)?;

        let mut windows = Vec::new();
        let mut transports = Vec::new();
        let mut gsis = IdAllocator::new(layout::FIRST_GSI, layout::LAST_GSI)?;
        let room = layout::MMIO_LEN * u64::from(layout::LAST_GSI);
        let mut space = AddressAllocator::new(layout::MMIO_BASE, room)?;
        for (n, device) in (0..).zip(devices) {
            let at = space.allocate(layout::MMIO_LEN, layout::MMIO_LEN, AllocPolicy::FirstMatch)?;
            let window = Window {
                base: at.start(),
                gsi: gsis.allocate_id()?,
            };
            let transport = plug(&vm, (n, window), device, memory.clone())?;
            transports.push((window.base, transport));
            windows.push(window);
        }

        let mut vcpus = Vec::new();
        for id in 0..cpus {
            let vcpu = vm.create_vcpu(id.into()).context("KVM_CREATE_VCPU")?;
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        let mut bus = Bus::new(console, transports, exit.clone());
        bus.pci = ring.map(|b| Pci::new(&vm, &memory, b)).transpose()?;
        Ok(Self {
            vcpus,
            vm,
            kvm,
            windows,
            generation,
            held: None,
            bus: Arc::new(bus),
            exit,
            gate: Arc::new(Gate::closed()?),
            threads: Vec::new(),
            memory,
        })
    }

    /// Loads a kernel. The first processor starts there; the others wait until the guest starts them.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn boot(&self, boot: &Boot) -> anyhow::Result<()> {
        // Fits: CPUS_MAX is a u8.
        let count = self.vcpus.len() as u8;
        let place = self.bus.pci.as_ref().map(|pci| &pci.place);
        acpi::write(&self.memory, count, &self.windows, place)?;
        for (id, vcpu) in (0..).zip(&self.vcpus) {
            cpu::configure(&self.kvm, &lock(vcpu), id, count)?;
        }
        self.new_generation()?;
        let (initrd, cmdline) = (boot.initrd.as_deref(), &boot.cmdline);
        let entry = boot::load(&self.memory, &boot.kernel, initrd, cmdline)?;
        boot::set(&lock(&self.vcpus[0]), &self.memory, entry)
    }

    /// Starts the threads. They wait until the machine [continues](Self::resume).
    ///
    /// # Errors
    /// A thread cannot be created.
    pub fn start(&mut self, filters: &Filters) -> anyhow::Result<()> {
        for (id, fd) in (0..).zip(&self.vcpus) {
            let vcpu = crate::vcpu::Vcpu {
                id,
                fd: fd.clone(),
                bus: self.bus.clone(),
                exit: self.exit.clone(),
                gate: self.gate.clone(),
            };
            let filters = filters.clone();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || match filters.apply(Thread::Vcpu) {
                    Ok(()) => vcpu.run(),
                    Err(e) => vcpu.exit.end(Reason::Fault(format!("{e:#}"))),
                })?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Ends all threads.
    pub fn end(&mut self) {
        self.gate.end(std::mem::take(&mut self.threads));
    }
}
