//! The whole adapter from Cloud Hypervisor's device traits to the device: what such a tree adds. It works with any
//! version of the rust-vmm crates, because what it gives to the device are numbers, pointers, descriptors and functions.
//! The host's ends are Unix sockets, as that VMM's own device has them.
#![allow(unsafe_code)] // promises to the device where guest memory is; an eventfd changes its owner

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use adit_channel::device::raw::{FnSignal, Kicks, RawMemory, RawMemoryError, RawRegion};
use adit_channel::device::{DeviceState, FEATURES, GuestCid, QueueConfig, VsockDevice};
use adit_channel::hybrid::Host;
use adit_channel::linked::{Held, Linked, Remote, link};
use virtio_queue::QueueT;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion, MmapRegion,
};
use vmm_sys_util::eventfd::EventFd;

use crate::stand_in::*;

/// The device as the VMM has it. The device itself is on a thread of its own, behind `remote`.
pub struct Vsock {
    id: String,
    path: PathBuf,
    cid: GuestCid,
    acked: u64,
    remote: Remote<Arc<RawMemory>>,
    /// Guest memory, once the driver is ready.
    mem: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    /// A snapshot that this device begins with.
    restored: Option<DeviceState>,
    /// The thread waits, and what it had been at when it stopped.
    paused: Option<(DeviceState, Held)>,
}

impl Vsock {
    pub fn new(id: &str, cid: u32, path: &Path, from: Option<&Snapshot>) -> Result<Self, AnyError> {
        let cid = GuestCid::new(cid.into()).ok_or("guest CIDs start at 3")?;
        // The queues' eventfds come later, with the driver.
        let (linked, remote) = link(VsockDevice::new(cid, 1)?, Kicks::new()?.ends()?)?;
        // The seed chooses the first ephemeral port. A VMM draws it at random.
        let host = Host::new(linked, Some(path), 7)?;
        // Inside, before `run`: the VMM's filter for this thread, made of `shard::SYSTEM_CALLS`.
        let thread = std::thread::Builder::new().name("vsock".to_owned());
        thread.spawn(move || eprintln!("vsock ends: {}", host.run()))?;
        Ok(Self {
            id: id.to_owned(),
            path: path.to_owned(),
            cid,
            acked: 0,
            remote,
            mem: None,
            restored: from.map(|s| DeviceState::parse(&s.0)).transpose()?,
            paused: None,
        })
    }

    /// The device gets the memory that the VM has now. The old set's mappings are free when this returns.
    fn renew_memory(&self) -> Result<(), AnyError> {
        let Some(mem) = &self.mem else { return Ok(()) };
        let raw = describe(mem)?;
        Ok(self.remote.ask(move |linked| linked.set_memory(raw))??)
    }

    fn start(&mut self, context: ActivationContext) -> Result<(), AnyError> {
        let raw = describe(&context.mem)?;
        let queues = <[_; 3]>::try_from(context.queues).map_err(|_| "vsock has three queues")?;
        let configs = queues.each_ref().map(|(_, queue, _)| QueueConfig {
            size: queue.size(),
            ready: queue.ready(),
            desc_table: queue.desc_table(),
            avail_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        });
        let kicks = queues.map(|(_, _, kick)| owned(kick));
        let interrupt = context.interrupt_cb;
        let signal = Arc::new(FnSignal::per_queue(move |queue| {
            // An interrupt that cannot be raised is the VMM's to report.
            let _ = interrupt.trigger(VirtioInterruptType::Queue(queue));
        }));
        let (acked, restored) = (self.acked, self.restored.take());
        self.remote.ask(move |linked| {
            linked.set_kicks(kicks);
            match restored.filter(DeviceState::has_session) {
                Some(state) => linked.restore(&state, raw, signal),
                None => linked.activate(acked, raw, configs, signal),
            }
        })??;
        self.mem = Some(context.mem);
        Ok(())
    }
}

/// Describes the VM's memory. What the device writes is dirty in the bitmaps that the VMM migrates by.
fn describe(mem: &GuestMemoryAtomic<GuestMemoryMmap>) -> Result<Arc<RawMemory>, RawMemoryError> {
    let mem = mem.memory().into_inner();
    let describe = |region: &GuestRegionMmap| {
        let (mem, start) = (mem.clone(), region.start_addr());
        let mark = move |offset, len| {
            if let Some(region) = mem.find_region(start) {
                MmapRegion::bitmap(region).mark_dirty(offset, len);
            }
        };
        RawRegion {
            guest_addr: region.start_addr().0,
            len: region.size(),
            host: region.as_ptr(),
            dirty: Some(Arc::new(mark)),
        }
    };
    let regions = mem.iter().map(describe).collect();
    // SAFETY: `mem`, which is the owner, keeps its regions mapped, and the VMM has no reference into guest memory.
    unsafe { RawMemory::new(regions, mem) }
}

fn owned(event: EventFd) -> OwnedFd {
    // SAFETY: `into_raw_fd` gives the descriptor away.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_TYPE_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256; 3]
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn ack_features(&mut self, value: u64) {
        self.acked |= value & FEATURES;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.cid.read_config(offset, data);
    }

    fn activate(&mut self, context: ActivationContext) -> ActivateResult {
        self.start(context).map_err(|e| {
            eprintln!("vsock is not activated: {e}");
            ActivateError::BadActivate
        })
    }

    fn reset(&mut self) {
        (self.acked, self.mem, self.restored) = (0, None, None);
        // An error means that the thread has ended, so nothing uses the queues.
        let _ = self.remote.ask(Linked::reset);
    }

    fn shutdown(&mut self) {
        self.paused = None;
        self.reset();
        let _ = std::fs::remove_file(&self.path);
    }

    fn add_memory_region(&mut self, _: &Arc<GuestRegionMmap>) -> Result<(), Error> {
        if self.paused.is_some() {
            return Ok(()); // it comes with `resume`
        }
        let done = self.renew_memory();
        done.map_err(|e| Error::IoError(std::io::Error::other(e)))
    }
}

impl Pausable for Vsock {
    fn pause(&mut self) -> Result<(), MigratableError> {
        let paused = self.remote.hold();
        self.paused = Some(paused.map_err(|e| MigratableError::Pause(e.into()))?);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MigratableError> {
        self.paused = None;
        self.renew_memory().map_err(MigratableError::Resume)
    }
}

impl Snapshottable for Vsock {
    fn id(&self) -> String {
        self.id.clone()
    }

    fn snapshot(&mut self) -> Result<Snapshot, MigratableError> {
        let not_paused = || MigratableError::Snapshot("the device is not paused".into());
        let (state, _) = self.paused.as_ref().ok_or_else(not_paused)?;
        Ok(Snapshot(state.to_bytes().to_vec()))
    }
}
