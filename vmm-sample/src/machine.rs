//! A VM put together: memory, interrupt chips, processors, devices; started, held, ended.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, bail, ensure};
use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::acpi::{self, Window};
use crate::bus::{Bus, lock};
use crate::console::{Console, Line, LineState};
use crate::cpu_state::{ChipState, CpuState};
use crate::exit::{Exit, Reason};
use crate::gate::Gate;
use crate::seccomp::{Filters, Thread};
use crate::snapshot::State;
use crate::virtio::mmio::{self, Transport, TransportState};
use crate::virtio::{Device, Interrupt, Memory};
use crate::{boot, cpu, layout, memory, snapshot};

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
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    vm: VmFd,
    kvm: Kvm,
    windows: Vec<Window>,
    /// The interrupt that says that the generation changed.
    generation: EventFd,
    /// What the devices were when they were held; none while the machine runs.
    held: Option<Vec<TransportState>>,
    pub bus: Arc<Bus>,
    pub exit: Arc<Exit>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    pub memory: Memory,
}

/// Opens KVM and looks whether it can do what is needed.
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
    /// Makes a machine whose processors are blank: it is [booted](Self::boot) or [restored](Self::restore).
    ///
    /// # Errors
    /// KVM is not there or refuses, or there is too little memory.
    pub fn new(
        shape: &Shape,
        memory: Memory,
        devices: Vec<Box<dyn Device>>,
        line: &LineState,
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
        let console = Console::open(&shape.serial, serial, line)?;
        let generation = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&generation, layout::EVENT_GSI)?;

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

        let mut vcpus = Vec::new();
        for id in 0..shape.cpus {
            let vcpu = vm.create_vcpu(id.into()).context("KVM_CREATE_VCPU")?;
            vcpus.push(Arc::new(Mutex::new(vcpu)));
        }
        Ok(Self {
            vcpus,
            vm,
            kvm,
            windows,
            generation,
            held: None,
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
        // At most CPUS_MAX.
        let count = self.vcpus.len() as u8;
        acpi::write(&self.memory, count, &self.windows)?;
        for (id, vcpu) in (0..).zip(&self.vcpus) {
            cpu::configure(&self.kvm, &lock(vcpu), id, count)?;
        }
        self.new_generation()?;
        let (initrd, cmdline) = (boot.initrd.as_deref(), &boot.cmdline);
        let entry = boot::load(&self.memory, &boot.kernel, initrd, cmdline)?;
        boot::set(&lock(&self.vcpus[0]), &self.memory, entry)
    }

    /// Goes on where a machine was held; its memory is this one's already.
    ///
    /// # Errors
    /// The state does not fit this machine.
    pub fn restore(&self, state: &State) -> anyhow::Result<()> {
        ensure!(
            state.devices.len() == self.bus.virtio.len(),
            "the snapshot has {} virtio devices, and this machine {}: give it the same",
            state.devices.len(),
            self.bus.virtio.len()
        );
        for (vcpu, saved) in self.vcpus.iter().zip(&state.cpus) {
            saved.restore(&lock(vcpu))?;
        }
        state.chips.restore(&self.vm)?;
        for ((_, transport), saved) in self.bus.virtio.iter().zip(&state.devices) {
            lock(transport).restore(saved)?;
        }
        self.new_generation()?;
        Ok(self.generation.write(1)?)
    }

    /// This is another life of the machine: a clone's kernel must not draw the random numbers of its origin.
    fn new_generation(&self) -> anyhow::Result<()> {
        let mut id = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut id)?;
        Ok(self.memory.write_slice(&id, layout::GENERATION)?)
    }

    /// Starts the threads, which wait until the machine [`goes on`](Self::resume).
    ///
    /// # Errors
    /// There is no thread to be had.
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

    /// Tells whether the machine is held.
    pub fn is_paused(&self) -> bool {
        self.held.is_some()
    }

    /// Holds everything that moves in the VM: processors first, for devices answer them.
    ///
    /// # Errors
    /// A device cannot be held; everything goes on.
    pub fn pause(&mut self) -> anyhow::Result<()> {
        if self.is_paused() {
            return Ok(());
        }
        self.gate.close(&self.threads);
        let transports = self.bus.virtio.iter();
        let held: anyhow::Result<_> = transports.map(|(_, t)| lock(t).pause()).collect();
        match held {
            Ok(held) => self.held = Some(held),
            Err(e) => {
                self.resume()?;
                return Err(e);
            }
        }
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// None that leaves the machine held.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        self.held = None;
        for (_, transport) in &self.bus.virtio {
            lock(transport).resume();
        }
        if !self.threads.is_empty() {
            for vcpu in &self.vcpus {
                // The guest's watchdog forgives the pause; EINVAL: it has no kvmclock.
                let _ = lock(vcpu).kvmclock_ctrl();
            }
        }
        self.gate.open();
        Ok(())
    }

    /// Writes the held machine to a directory.
    ///
    /// # Errors
    /// It is not held, or cannot be written.
    pub fn snapshot(&mut self, dir: &Path) -> anyhow::Result<()> {
        let save = |vcpu: &Arc<Mutex<VcpuFd>>| CpuState::save(&self.kvm, &self.vm, &lock(vcpu));
        let cpus = self.vcpus.iter().map(save).collect::<Result<_, _>>()?;
        let chips = ChipState::save(&self.vm)?;
        let state = State {
            memory: self.memory.iter().map(GuestMemoryRegion::len).sum(),
            cpus,
            chips,
            line: self.bus.console.save(),
            devices: self.held.take().context("the machine runs")?,
        };
        let written = snapshot::write(dir, &state, &self.memory);
        self.held = Some(state.devices);
        written
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
