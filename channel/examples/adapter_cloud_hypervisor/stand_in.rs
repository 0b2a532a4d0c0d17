//! Stand-ins for what Cloud Hypervisor's device trait consists of: the shape of `virtio-devices/src/device.rs`,
//! `virtio-devices/src/lib.rs` and `vm-migration/src/lib.rs` in its tree of August 2026 (commit ae44c2971c83). Names and
//! signatures are theirs. Left out is what a vsock device does not have: shared memory, mappings of user space,
//! counters, an IOMMU, the device's status byte, and methods that are about other crates of that tree.
//!
//! [`Vm`] does what its transport and its device manager do with the trait.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use adit_channel::device::GuestCid;
use adit_testkit::memory::{self, MEMORY_BYTES, VmMemory};
use adit_testkit::queue::DriverQueue;
use adit_testkit::{Driver, DriverConfig};
use virtio_queue::Queue;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, MmapRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<AtomicBitmap>;
pub type GuestRegionMmap = vm_memory::GuestRegionMmap<AtomicBitmap>;

/// `VirtioDeviceType::Vsock`.
pub const VIRTIO_TYPE_VSOCK: u32 = 19;

pub enum VirtioInterruptType {
    Queue(u16),
}

pub trait VirtioInterrupt: Send + Sync {
    fn trigger(&self, int_type: VirtioInterruptType) -> io::Result<()>;
}

pub struct ActivationContext {
    pub mem: GuestMemoryAtomic<GuestMemoryMmap>,
    pub interrupt_cb: Arc<dyn VirtioInterrupt>,
    pub queues: Vec<(u16, Queue, EventFd)>,
}

#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    #[error("failed to activate virtio device")]
    BadActivate,
}

pub type ActivateResult = Result<(), ActivateError>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("I/O error")]
    IoError(#[source] io::Error),
}

pub trait VirtioDevice: Send {
    fn device_type(&self) -> u32;
    fn queue_max_sizes(&self) -> &[u16];
    fn features(&self) -> u64;
    fn ack_features(&mut self, value: u64);
    fn read_config(&self, offset: u64, data: &mut [u8]);
    fn activate(&mut self, context: ActivationContext) -> ActivateResult;
    fn reset(&mut self);
    fn shutdown(&mut self);
    fn add_memory_region(&mut self, region: &Arc<GuestRegionMmap>) -> Result<(), Error>;
}

pub type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Its variants hold an `anyhow::Error` in the original.
#[derive(Debug, thiserror::Error)]
pub enum MigratableError {
    #[error("failed to pause migratable component: {0}")]
    Pause(AnyError),
    #[error("failed to resume migratable component: {0}")]
    Resume(AnyError),
    #[error("failed to snapshot migratable component: {0}")]
    Snapshot(AnyError),
}

pub trait Pausable {
    fn pause(&mut self) -> Result<(), MigratableError>;
    fn resume(&mut self) -> Result<(), MigratableError>;
}

/// The original serialises a state with serde.
pub struct Snapshot(pub Vec<u8>);

pub trait Snapshottable: Pausable {
    fn id(&self) -> String;
    fn snapshot(&mut self) -> Result<Snapshot, MigratableError>;
}

/// MSI-X vectors.
#[derive(Default)]
pub struct Vectors([AtomicU64; 3]);

impl VirtioInterrupt for Vectors {
    fn trigger(&self, int_type: VirtioInterruptType) -> io::Result<()> {
        let VirtioInterruptType::Queue(queue) = int_type;
        self.0[usize::from(queue)].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A VM without processors: its memory, its transport, and a guest's driver.
pub struct Vm {
    pub mem: GuestMemoryAtomic<GuestMemoryMmap>,
    pub vectors: Arc<Vectors>,
    file: File,
    /// The ioeventfds.
    kicks: [EventFd; 3],
    guest: Arc<VmMemory>,
}

/// Where [`Vm::plug`] puts memory, and how many bytes.
pub const PLUG: (u64, usize) = (0x1_0000_0000, 0x10_0000);

impl Vm {
    pub fn new() -> io::Result<Self> {
        let (guest, file) = memory::memfd_of(&[(0, MEMORY_BYTES), PLUG]);
        let region = region(&file, 0, (0, MEMORY_BYTES))?;
        let mem = GuestMemoryMmap::from_arc_regions(vec![region]).map_err(io::Error::other)?;
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Self {
            mem: GuestMemoryAtomic::new(mem),
            vectors: Arc::default(),
            file,
            kicks: [event()?, event()?, event()?],
            guest,
        })
    }

    /// The guest's kernel loads its driver. The second value is the event queue.
    pub fn driver(&self, device: &mut dyn VirtioDevice) -> (Driver, DriverQueue) {
        let mut cid = [0; 8];
        device.read_config(0, &mut cid);
        let cid = GuestCid::new(u64::from_le_bytes(cid)).expect("a guest's CID");
        // As the transport does: a page of feature bits at a time.
        for page in [0, 32] {
            let bits = device.features() >> page & 0xffff_ffff;
            device.ack_features(bits << page);
        }
        let driver = Driver::new(self.guest.clone(), cid, DriverConfig::LINUX_6_12);
        (driver, DriverQueue::new(self.guest.clone(), 2, 8, true))
    }

    /// The driver is ready. A restored queue begins at its used index, as in `transport/pci_device.rs`.
    pub fn activate(
        &self,
        device: &mut dyn VirtioDevice,
        queues: [&DriverQueue; 3],
    ) -> ActivateResult {
        let queues = (0..).zip(queues).zip(&self.kicks);
        let queues = queues.map(|((index, queue), kick)| {
            let (kick, used) = (kick.try_clone().expect("a descriptor"), queue.used_idx());
            let mut queue = queue.queue();
            virtio_queue::QueueT::set_next_avail(&mut queue, used);
            virtio_queue::QueueT::set_next_used(&mut queue, used);
            (index, queue, kick)
        });
        device.activate(ActivationContext {
            mem: self.mem.clone(),
            interrupt_cb: self.vectors.clone(),
            queues: queues.collect(),
        })
    }

    /// The guest writes QueueNotify.
    pub fn kick(&self, queue: u16) {
        self.kicks[usize::from(queue)].write(1).expect("room");
    }

    /// A DIMM is plugged, as in `memory_manager.rs`: first the memory, then the devices.
    pub fn plug(&self, device: &mut dyn VirtioDevice) -> Result<(), Error> {
        let region = region(&self.file, MEMORY_BYTES as u64, PLUG).map_err(Error::IoError)?;
        let more = self.mem.memory().insert_region(region.clone());
        let more = more.map_err(|e| Error::IoError(io::Error::other(e)))?;
        self.mem.lock().expect("no panic").replace(more);
        device.add_memory_region(&region)
    }

    /// Number of pages that are dirty in the bitmaps.
    pub fn dirty_pages(&self) -> usize {
        let mem = self.mem.memory();
        let dirty = |region: &GuestRegionMmap| {
            let offsets = (0..region.size()).step_by(4096);
            let bitmap = MmapRegion::bitmap(region);
            offsets.filter(|&at| bitmap.is_addr_set(at)).count()
        };
        mem.iter().map(dirty).sum()
    }

    /// Number of interrupts for a queue.
    pub fn interrupts(&self, queue: u16) -> u64 {
        self.vectors.0[usize::from(queue)].load(Ordering::SeqCst)
    }
}

fn region(file: &File, offset: u64, at: (u64, usize)) -> io::Result<Arc<GuestRegionMmap>> {
    let offset = Some(FileOffset::new(file.try_clone()?, offset));
    let region = GuestRegionMmap::from_range(GuestAddress(at.0), at.1, offset);
    Ok(Arc::new(region.map_err(io::Error::other)?))
}
