//! The whole adapter from Firecracker's device trait to the device: what such a tree adds. It works with any version of
//! the rust-vmm crates, because what it gives to the device are numbers, pointers, descriptors and functions. The host's
//! ends are Unix sockets, as that VMM's own device has them.
#![allow(unsafe_code)] // promises to the device where guest memory is; an eventfd changes its owner

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use adit_channel::device::raw::{FnSignal, RawMemory, RawMemoryError, RawRegion};
use adit_channel::device::{DeviceState, FEATURES, GuestCid, QueueConfig, VsockDevice};
use adit_channel::hybrid::Host;
use adit_channel::linked::{Held, Linked, Remote, link};
use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::stand_in::*;

type Irq = Arc<dyn VirtioInterrupt>;

/// The device as the VMM has it. The device itself is on a thread of its own, behind `remote`.
pub struct Vsock {
    config: [u8; 8],
    acked: u64,
    queues: [Queue; 3],
    queue_events: [EventFd; 3],
    remote: Remote<Arc<RawMemory>>,
    interrupt: Option<Irq>,
    restored: Option<DeviceState>,
    /// After `prepare_save`: what a snapshot holds of the device, whose thread waits meanwhile.
    pub saved: Option<(DeviceState, Held)>,
}

impl Vsock {
    pub fn new(cid: u64, uds_path: &Path, from: Option<&[u8]>) -> Result<Self, AnyError> {
        let cid = GuestCid::new(cid).ok_or("guest CIDs start at 3")?;
        let event = || EventFd::new(EFD_NONBLOCK);
        let queue_events = [event()?, event()?, event()?];
        let [rx, tx, events] = &queue_events;
        let kicks = [owned(rx)?, owned(tx)?, owned(events)?];
        let (linked, remote) = link(VsockDevice::new(cid, 1)?, kicks)?;
        // The seed chooses the first ephemeral port. A VMM draws it at random.
        let host = Host::new(linked, Some(uds_path), 7)?;
        // Inside, before `run`: the VMM's filter for this thread, made of `shard::SYSTEM_CALLS`.
        let thread = std::thread::Builder::new().name("vsock".to_owned());
        thread.spawn(move || eprintln!("vsock ends: {}", host.run()))?;
        Ok(Self {
            config: cid.get().to_le_bytes(),
            acked: 0,
            queues: [0; 3].map(|_| Queue::new(256)),
            queue_events,
            remote,
            interrupt: None,
            restored: from.map(DeviceState::parse).transpose()?,
            saved: None,
        })
    }

    /// Slots were plugged, or will be unplugged: call it after the first, and before the second. The VM is not paused.
    pub fn memory_changed(&self, mem: &GuestMemoryMmap) -> Result<(), AnyError> {
        let raw = describe(mem)?;
        Ok(self.remote.ask(move |linked| linked.set_memory(raw))??)
    }

    fn start(&mut self, mem: &GuestMemoryMmap, interrupt: Irq) -> Result<(), AnyError> {
        let raw = describe(mem)?;
        let configs = self.queues.each_ref().map(|queue| QueueConfig {
            size: queue.size,
            ready: queue.ready,
            desc_table: queue.desc_table_address.0,
            avail_ring: queue.avail_ring_address.0,
            used_ring: queue.used_ring_address.0,
            next_avail: queue.next_avail.0,
            next_used: queue.next_used.0,
        });
        // One interrupt for all queues, as the MMIO transport has it. With MSI-X: `per_queue`.
        let irq = interrupt.clone();
        let signal = Arc::new(FnSignal::shared(move |queue| {
            // An interrupt that cannot be raised is the VMM's to report.
            let _ = irq.trigger(VirtioInterruptType::Queue(queue));
        }));
        let (acked, restored) = (self.acked, self.restored.take());
        self.remote.ask(move |linked| match restored {
            Some(state) if state.has_session() => linked.restore(&state, raw, signal),
            _ => linked.activate(acked, raw, configs, signal),
        })??;
        self.interrupt = Some(interrupt);
        Ok(())
    }
}

/// Describes the slots that are plugged; the others are mapped without access. What the device writes is dirty in the
/// bitmaps of which the VMM makes its diff snapshots.
fn describe(mem: &GuestMemoryMmap) -> Result<Arc<RawMemory>, RawMemoryError> {
    let describe = |slot: GuestMemorySlot<'_>| {
        let (mem, start) = (mem.clone(), slot.guest_addr);
        let mark = move |offset, len| {
            if let Some((region, at)) = mem.to_region_addr(start) {
                region.bitmap().mark_dirty(at.0 as usize + offset, len);
            }
        };
        RawRegion {
            guest_addr: start.0,
            len: slot.slice.len(),
            host: slot.slice.ptr_guard_mut().as_ptr(),
            dirty: Some(Arc::new(mark)),
        }
    };
    let slots = mem.iter().flat_map(GuestRegionMmapExt::plugged_slots);
    let regions = slots.map(describe).collect();
    // SAFETY: the owner keeps the regions mapped, plugged slots can be read and written until `memory_changed`, and the
    // VMM has no reference into guest memory.
    unsafe { RawMemory::new(regions, mem.clone()) }
}

fn owned(event: &EventFd) -> std::io::Result<OwnedFd> {
    let copy = event.try_clone()?;
    // SAFETY: `into_raw_fd` gives the descriptor away.
    Ok(unsafe { OwnedFd::from_raw_fd(copy.into_raw_fd()) })
}

impl VirtioDevice for Vsock {
    fn avail_features(&self) -> u64 {
        FEATURES
    }

    fn acked_features(&self) -> u64 {
        self.acked
    }

    fn set_acked_features(&mut self, acked_features: u64) {
        self.acked = acked_features;
    }

    fn device_type(&self) -> VirtioDeviceType {
        VirtioDeviceType::Vsock
    }

    fn id(&self) -> &str {
        "vsock"
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    fn interrupt_trigger(&self) -> &dyn VirtioInterrupt {
        &**self.interrupt.as_ref().expect("the device is activated")
    }

    fn config_as_bytes(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, mem: GuestMemoryMmap, interrupt: Irq) -> Result<(), ActivateError> {
        let done = self.start(&mem, interrupt);
        done.map_err(ActivateError::VsockBackend)
    }

    fn is_activated(&self) -> bool {
        self.interrupt.is_some()
    }

    fn deactivate(&mut self) {
        self.interrupt = None;
    }

    fn _reset(&mut self) -> bool {
        self.restored = None;
        self.remote.ask(Linked::reset).is_ok()
    }

    fn prepare_save(&mut self) {
        self.saved = self.remote.hold().ok();
    }

    fn kick(&mut self) {
        self.saved = None;
        if self.is_activated() {
            self.notify_queue_events();
        }
    }
}

/// The device has a thread and an epoll set of its own, so the VMM's loop has nothing to wait for.
impl MutEventSubscriber for Vsock {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
    fn init(&mut self, _: &mut EventOps<'_>) {}
}
