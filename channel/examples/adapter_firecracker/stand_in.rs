//! Stand-ins for what Firecracker's device trait consists of: the shape of `src/vmm/src/devices/virtio/device.rs`,
//! `devices/virtio/transport/mod.rs`, `devices/virtio/queue.rs` and `vstate/memory.rs` in its tree of August 2026 (commit
//! 81b38b9dad60). Names and signatures are theirs. Left out are `AsAny`, `const_device_type`, `mark_queue_memory_dirty`,
//! which is about the host pointers in its queues, and configuration interrupts.
//!
//! [`Vm`] does what its MMIO transport and its virtio-mem device do with the trait.

use std::fs::File;
use std::io;
use std::num::Wrapping;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use adit_channel::device::GuestCid;
use adit_testkit::memory::{self, MEMORY_BYTES, VmMemory};
use adit_testkit::queue::DriverQueue;
use adit_testkit::{Driver, DriverConfig};
use event_manager::MutEventSubscriber;
use vm_memory::bitmap::{AtomicBitmap, BS, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionMmap, MemoryRegionAddress, MmapRegion, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

pub type AnyError = Box<dyn std::error::Error + Send + Sync>;
pub type GuestMemoryMmap = GuestRegionCollection<GuestRegionMmapExt>;
type LoggedRegion = GuestRegionMmap<Option<AtomicBitmap>>;

/// A region of which parts may be plugged.
#[derive(Debug)]
pub struct GuestRegionMmapExt {
    pub inner: LoggedRegion,
    pub slot_size: usize,
    /// A `BitVec` in the original.
    pub plugged: Mutex<Vec<bool>>,
}

pub struct GuestMemorySlot<'a> {
    pub guest_addr: GuestAddress,
    pub slice: VolatileSlice<'a, BS<'a, Option<AtomicBitmap>>>,
}

impl GuestRegionMmapExt {
    pub fn plugged_slots(&self) -> impl Iterator<Item = GuestMemorySlot<'_>> {
        let plugged = self
            .plugged
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let numbered = (0u64..).zip(plugged).filter(|(_, plugged)| *plugged);
        numbered.map(|(index, _)| {
            let at = index * self.slot_size as u64;
            let slice = self
                .inner
                .get_slice(MemoryRegionAddress(at), self.slot_size);
            GuestMemorySlot {
                guest_addr: GuestAddress(self.start_addr().0 + at),
                slice: slice.expect("slots are inside the region"),
            }
        })
    }
}

impl GuestMemoryRegion for GuestRegionMmapExt {
    type B = Option<AtomicBitmap>;

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.inner.start_addr()
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        GuestMemoryRegion::bitmap(&self.inner)
    }
}

impl GuestMemoryRegionBytes for GuestRegionMmapExt {}

pub enum VirtioInterruptType {
    Queue(u16),
}

#[derive(Debug, thiserror::Error)]
#[error("the interrupt's eventfd cannot be written")]
pub struct InterruptError;

pub trait VirtioInterrupt: std::fmt::Debug + Send + Sync {
    fn trigger(&self, interrupt_type: VirtioInterruptType) -> Result<(), InterruptError>;
    fn status(&self) -> Arc<AtomicU32>;
}

#[derive(Debug, PartialEq, Eq)]
pub enum VirtioDeviceType {
    Vsock = 19,
}

/// What the driver has written to the registers of a queue.
#[derive(Clone, Debug)]
pub struct Queue {
    pub max_size: u16,
    pub size: u16,
    pub ready: bool,
    pub desc_table_address: GuestAddress,
    pub avail_ring_address: GuestAddress,
    pub used_ring_address: GuestAddress,
    pub next_avail: Wrapping<u16>,
    pub next_used: Wrapping<u16>,
}

impl Queue {
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            desc_table_address: GuestAddress(0),
            avail_ring_address: GuestAddress(0),
            used_ring_address: GuestAddress(0),
            next_avail: Wrapping(0),
            next_used: Wrapping(0),
        }
    }
}

/// The original has a variant for each kind of device.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    #[error("vsock backend: {0}")]
    VsockBackend(AnyError),
}

pub trait VirtioDevice: MutEventSubscriber + Send {
    fn avail_features(&self) -> u64;
    fn acked_features(&self) -> u64;
    fn set_acked_features(&mut self, acked_features: u64);
    fn device_type(&self) -> VirtioDeviceType;
    fn id(&self) -> &str;
    fn queues(&self) -> &[Queue];
    fn queues_mut(&mut self) -> &mut [Queue];
    fn queue_events(&self) -> &[EventFd];
    fn interrupt_trigger(&self) -> &dyn VirtioInterrupt;
    fn config_as_bytes(&self) -> &[u8];
    fn write_config(&mut self, offset: u64, data: &[u8]);
    fn activate(
        &mut self,
        mem: GuestMemoryMmap,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Result<(), ActivateError>;
    fn is_activated(&self) -> bool;
    fn deactivate(&mut self);
    fn _reset(&mut self) -> bool;
    fn prepare_save(&mut self);
    fn kick(&mut self);

    fn interrupt_status(&self) -> Arc<AtomicU32> {
        self.interrupt_trigger().status()
    }

    /// The original takes a page of 32 bits at a time.
    fn ack_features(&mut self, value: u64) {
        let offered = value & self.avail_features();
        self.set_acked_features(self.acked_features() | offered);
    }

    fn reset(&mut self) -> bool {
        if !self._reset() {
            return false;
        }
        self.deactivate();
        self.set_acked_features(0);
        for queue in self.queues_mut() {
            *queue = Queue::new(queue.max_size);
        }
        true
    }

    fn notify_queue_events(&mut self) {
        for event in self.queue_events() {
            let _ = event.write(1);
        }
    }
}

/// The MMIO transport's interrupt.
#[derive(Debug, Default)]
pub struct IrqTrigger {
    status: Arc<AtomicU32>,
    counts: [AtomicU64; 3],
}

impl VirtioInterrupt for IrqTrigger {
    fn trigger(&self, interrupt_type: VirtioInterruptType) -> Result<(), InterruptError> {
        let VirtioInterruptType::Queue(queue) = interrupt_type;
        self.status.fetch_or(1, Ordering::SeqCst);
        self.counts[usize::from(queue)].fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn status(&self) -> Arc<AtomicU32> {
        self.status.clone()
    }
}

/// Where memory can be plugged, and the bytes of a slot.
pub const HOTPLUG: u64 = 0x1_0000_0000;
const SLOT_BYTES: usize = 0x4_0000;
const SLOTS: usize = 4;

/// A VM without processors: its memory, its transport, and a guest's driver.
pub struct Vm {
    pub mem: GuestMemoryMmap,
    pub irq: Arc<IrqTrigger>,
    guest: Arc<VmMemory>,
}

impl Vm {
    pub fn new() -> io::Result<Self> {
        let hotplug = (HOTPLUG, SLOTS * SLOT_BYTES);
        let (guest, file) = memory::memfd_of(&[(0, MEMORY_BYTES), hotplug]);
        let dram = region(&file, 0, (0, MEMORY_BYTES), vec![true])?;
        let hotplug = region(&file, MEMORY_BYTES as u64, hotplug, vec![false; SLOTS])?;
        let mem = GuestMemoryMmap::from_regions(vec![dram, hotplug]).map_err(io::Error::other)?;
        let irq = Arc::default();
        Ok(Self { mem, irq, guest })
    }

    /// The guest's kernel loads its driver. The second value is the event queue.
    pub fn driver(&self, device: &mut dyn VirtioDevice) -> (Driver, DriverQueue) {
        let mut cid = [0; 8];
        cid.copy_from_slice(device.config_as_bytes());
        let cid = GuestCid::new(u64::from_le_bytes(cid)).expect("a guest's CID");
        device.ack_features(device.avail_features());
        // The CID is read-only.
        device.write_config(0, &[0; 8]);
        assert_eq!(device.queues().len(), 3);
        let driver = Driver::new(self.guest.clone(), cid, DriverConfig::LINUX_6_12);
        (driver, DriverQueue::new(self.guest.clone(), 2, 8, true))
    }

    /// The driver writes the queues' registers and is ready. A restored queue has its position.
    pub fn activate(
        &self,
        device: &mut dyn VirtioDevice,
        queues: [&DriverQueue; 3],
    ) -> Result<(), ActivateError> {
        for (register, queue) in device.queues_mut().iter_mut().zip(queues) {
            let [desc, avail, used] = queue.addrs().map(GuestAddress);
            register.size = queue.size();
            register.desc_table_address = desc;
            register.avail_ring_address = avail;
            register.used_ring_address = used;
            register.next_avail = Wrapping(queue.used_idx());
            register.next_used = Wrapping(queue.used_idx());
            register.ready = true;
        }
        device.activate(self.mem.clone(), self.irq.clone())
    }

    /// The virtio-mem device plugs or unplugs the first slot that can be.
    pub fn plug(&self, plugged: bool) {
        let region = self.mem.find_region(GuestAddress(HOTPLUG));
        let slots = &region.expect("a region").plugged;
        slots.lock().unwrap_or_else(PoisonError::into_inner)[0] = plugged;
    }

    /// Number of pages that are dirty in the bitmaps.
    pub fn dirty_pages(&self) -> usize {
        let dirty = |region: &GuestRegionMmapExt| {
            let bitmap = MmapRegion::bitmap(&region.inner)
                .as_ref()
                .expect("a bitmap");
            let offsets = (0..region.inner.size()).step_by(4096);
            offsets.filter(|&at| bitmap.is_addr_set(at)).count()
        };
        self.mem.iter().map(dirty).sum()
    }

    /// Number of interrupts for a queue.
    pub fn interrupts(&self, queue: u16) -> u64 {
        self.irq.counts[usize::from(queue)].load(Ordering::SeqCst)
    }
}

fn region(
    file: &File,
    offset: u64,
    (addr, len): (u64, usize),
    plugged: Vec<bool>,
) -> io::Result<GuestRegionMmapExt> {
    let inner = MmapRegionBuilder::new_with_bitmap(len, Some(AtomicBitmap::with_len(len)))
        .with_file_offset(FileOffset::new(file.try_clone()?, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .map_err(io::Error::other)?;
    Ok(GuestRegionMmapExt {
        inner: LoggedRegion::new(inner, GuestAddress(addr)).expect("an address below the top"),
        slot_size: len / plugged.len(),
        plugged: Mutex::new(plugged),
    })
}
