//! A VM put together: memory, interrupt chips, processors, devices; started, held, ended.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, bail};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::acpi::{self, Window};
use crate::bus::{Bus, lock};
use crate::console::{Console, Line};
use crate::exit::Exit;
use crate::gate::Gate;
use crate::virtio::mmio::{self, Transport};
use crate::virtio::{Device, Interrupt, Memory};
use crate::{boot, cpu, layout, memory};

/// QueueNotify of a virtio-mmio window.
const QUEUE_NOTIFY: u64 = 0x50;
/// Processors at most: the ids of local APICs are a byte, and one is the IOAPIC's.
pub const CPUS_MAX: u8 = 32;

/// What is booted.
#[derive(Clone, Debug)]
pub struct Boot {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
}

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Shape {
    pub cpus: u8,
    pub memory: u64,
    pub serial: Line,
}

/// A VM. Fields are dropped in this order: KVM lets go of the memory before it is unmapped.
pub struct Machine {
    pub vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    /// Owns the descriptors of the VM for as long as it lives.
    _vm: VmFd,
    pub bus: Arc<Bus>,
    pub exit: Arc<Exit>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    pub memory: Memory,
}

/// Opens KVM and looks whether it can do what is needed.
fn kvm() -> anyhow::Result<Kvm> {
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
        bail!("/dev/kvm speaks another version than {KVM_API_VERSION}");
    }
    let needed = [
        Cap::Irqchip,
        Cap::Ioeventfd,
        Cap::Irqfd,
        Cap::UserMemory,
        Cap::ExtCpuid,
        Cap::ImmediateExit,
    ];
    match needed.iter().find(|&&cap| !kvm.check_extension(cap)) {
        None => Ok(kvm),
        Some(cap) => bail!("this host's KVM lacks {cap:?}: a newer kernel has it"),
    }
}

impl Machine {
    /// Makes a machine whose processors have not been told where to begin.
    ///
    /// # Errors
    /// KVM is not there or refuses, or there is too little memory.
    pub fn new(
        shape: &Shape,
        memory: Memory,
        devices: Vec<Box<dyn Device>>,
    ) -> anyhow::Result<Self> {
        let kvm = kvm()?;
        let vm = kvm.create_vm().context("KVM makes no VM")?;
        memory::register(&vm, &memory)?;
        vm.set_tss_address(layout::KVM_TSS)
            .context("KVM_SET_TSS_ADDR")?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        let exit = Arc::new(Exit::new()?);

        let serial = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&serial, layout::SERIAL_GSI)?;
        let console = Console::open(&shape.serial, serial)?;

        let mut windows = Vec::new();
        let mut transports = Vec::new();
        let mut gsis = IdAllocator::new(layout::FIRST_GSI, layout::LAST_GSI)?;
        let room = layout::MMIO_LEN * u64::from(layout::LAST_GSI);
        let mut space = AddressAllocator::new(layout::MMIO_BASE, room)?;
        for device in devices {
            let at = space.allocate(layout::MMIO_LEN, layout::MMIO_LEN, AllocPolicy::FirstMatch)?;
            let window = Window {
                base: at.start(),
                gsi: gsis.allocate_id()?,
            };
            transports.push((window.base, transport(&vm, window, device, memory.clone())?));
            windows.push(window);
        }
        acpi::write(&memory, shape.cpus, &windows)?;

        let mut vcpus = Vec::new();
        for id in 0..shape.cpus {
            let vcpu = vm.create_vcpu(id.into()).context("KVM_CREATE_VCPU")?;
            cpu::configure(&kvm, &vcpu, id, shape.cpus)?;
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        Ok(Self {
            vcpus,
            _vm: vm,
            bus: Arc::new(Bus::new(console, transports, exit.clone())),
            exit,
            gate: Arc::new(Gate::closed()?),
            threads: Vec::new(),
            memory,
        })
    }

    /// Loads a kernel; the first processor begins there, the others wait until they are called.
    ///
    /// # Errors
    /// A file cannot be used.
    pub fn boot(&self, boot: &Boot) -> anyhow::Result<()> {
        let entry = boot::load(
            &self.memory,
            &boot.kernel,
            boot.initrd.as_deref(),
            &boot.cmdline,
        )?;
        boot::set(&lock(&self.vcpus[0]), &self.memory, entry)
    }

    /// Starts the threads, which wait until the machine [`goes on`](Self::resume).
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(&mut self) -> anyhow::Result<()> {
        for (id, fd) in (0..).zip(&self.vcpus) {
            let vcpu = crate::vcpu::Vcpu {
                id,
                fd: fd.clone(),
                bus: self.bus.clone(),
                exit: self.exit.clone(),
                gate: self.gate.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || vcpu.run())?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Ends all threads.
    pub fn end(&mut self) {
        self.gate.end(std::mem::take(&mut self.threads));
    }
}

fn transport(
    vm: &VmFd,
    window: Window,
    device: Box<dyn Device>,
    memory: Memory,
) -> anyhow::Result<Transport> {
    for (queue, kick) in (0u32..).zip(device.kicks()) {
        let notify = IoEventAddress::Mmio(window.base + QUEUE_NOTIFY);
        vm.register_ioevent(kick, &notify, queue)?;
    }
    let irq = EventFd::new(EFD_NONBLOCK)?;
    vm.register_irqfd(&irq, window.gsi)?;
    mmio::Transport::new(device, memory, Arc::new(Interrupt::new(irq)))
}
