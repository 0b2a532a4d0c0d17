//! What the frontend has configured so far, message by message, and when that is enough for a session.
//!
//! ```text
//! Stopped ── both vrings {num, addr, kick, enabled} + memory + features ──► Running
//!    ▲                                                                        │
//!    └── GET_VRING_BASE, ENABLE 0 (paused), RESET_OWNER, frontend gone ───────┘
//! ```
//! A pause keeps the session. It continues if the vrings start again with the same features, addresses and positions.
//!
//! In Stopped the order of messages does not matter. In Running the parts from which the device was built are fixed,
//! but the memory table and the kick and call descriptors may be replaced.
//!
//! [`Handler::handover`] returns the whole state, and [`Handler::resume`] lets another process continue from it. A
//! vring that was running continues at the position that guest memory shows.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use adit_engine::ResetReason;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost::{self, VhostUserMemoryRegionBase};
use virtio_queue::{Queue, QueueState, QueueT};

use super::command::{Command, Driver, Link, Paused, ShardGone, Start};
use super::memory::{MemTable, MemoryPolicy};
use crate::device::{FEATURES, GuestCid, VirtQueue, VirtQueues};

mod resume;

use resume::used_index;

const QUEUES: usize = 2;
const OFFERED: u64 = FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// One vring (virtqueue) as the frontend described it.
#[derive(Debug, Default)]
struct Vring {
    /// 0 until it is set.
    size: u16,
    base: u16,
    /// Guest addresses of descriptor table, available ring and used ring.
    addrs: Option<[u64; 3]>,
    /// How far the position was ahead of the used index when the vring was started. 0 with every known frontend.
    lag: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
}

/// Values that stay the same as long as the driver is the same: features, and for each vring its size, addresses and
/// position. After a reset a driver starts at position 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setup {
    features: u64,
    vrings: [(u16, [u64; 3], u16); QUEUES],
}

/// The state of one frontend's connection.
pub(super) struct Handler {
    guest_cid: GuestCid,
    queue_max: u16,
    policy: MemoryPolicy,
    link: Link,
    features: Option<u64>,
    protocol_features: Option<u64>,
    table: Option<MemTable>,
    vrings: [Vring; QUEUES],
    running: bool,
    /// The setup of the paused session.
    paused: Option<Setup>,
    /// The state that a successor needs has changed.
    changed: bool,
    /// The predecessor may have handled the next message already.
    may_be_repeated: bool,
}

/// Refuses a message with a reason.
fn refused(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, reason))
}

impl From<ShardGone> for Error {
    fn from(e: ShardGone) -> Self {
        Self::ReqHandlerError(io::Error::other(e))
    }
}

impl Handler {
    pub(super) fn new(
        guest_cid: GuestCid,
        queue_max: u16,
        policy: MemoryPolicy,
        link: Link,
    ) -> Self {
        Self {
            guest_cid,
            queue_max,
            policy,
            link,
            features: None,
            protocol_features: None,
            table: None,
            vrings: Default::default(),
            running: false,
            paused: None,
            changed: false,
            may_be_repeated: false,
        }
    }

    /// The connection is over: ends the session and forgets everything.
    pub(super) fn disconnected(&mut self) {
        if let Err(e) = self.end(ResetReason::CarrierFault) {
            tracing::debug!(error = %e, "frontend gone");
        }
        self.features = None;
        self.protocol_features = None;
        self.table = None;
        self.vrings = Default::default();
        self.changed = false;
        self.may_be_repeated = false;
    }

    /// Has the carrier look whether there is a frontend.
    pub(super) fn wake(&self) {
        self.link.wake();
    }

    /// Which descriptors are accepted as guest memory.
    pub(super) fn policy(&self) -> MemoryPolicy {
        self.policy
    }

    /// A message was handled. Returns true if the state that a successor needs has changed.
    pub(super) fn handled(&mut self) -> bool {
        self.may_be_repeated = false;
        std::mem::take(&mut self.changed)
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings
            .get_mut(index as usize)
            .ok_or_else(|| refused(format!("vring {index}: there are {QUEUES}")))
    }

    /// As `vring`, for values that must not change while the device uses them.
    fn stopped_vring(&mut self, index: u32, what: &str) -> Result<&mut Vring> {
        if self.running {
            return Err(refused(format!("vring {index}: {what} while it runs")));
        }
        self.changed = true;
        self.vring(index)
    }

    /// Returns true if this is a repeat of the message that started the vrings, which the predecessor handled.
    fn is_repeated_start(&self) -> bool {
        self.running && self.may_be_repeated
    }

    /// Starts the session if its configuration is complete.
    fn settle(&mut self) -> Result<()> {
        let complete =
            |v: &Vring| v.size != 0 && v.addrs.is_some() && v.kick.is_some() && v.enabled;
        let (Some(features), Some(table)) = (self.features, &self.table) else {
            return Ok(());
        };
        if self.running || !self.vrings.iter().all(complete) {
            return Ok(());
        }
        if self.may_be_repeated {
            // The predecessor has run these vrings, or had just started them. It has returned every buffer that it
            // took, so the used index is the position.
            for vring in &mut self.vrings {
                if let Some([.., used_ring]) = vring.addrs {
                    vring.base = used_index(used_ring, table)?.wrapping_add(vring.lag);
                }
            }
        }
        let [rx, tx] = &self.vrings;
        let (rx_call, tx_call) = (clone_fd(&rx.call)?, clone_fd(&tx.call)?);
        let queues = VirtQueues {
            rx: build(rx, self.queue_max, table)?,
            tx: build(tx, self.queue_max, table)?,
            event: None,
        };
        let lags =
            [&queues.rx.queue, &queues.tx.queue].map(|q| q.next_avail.wrapping_sub(q.next_used));
        let start = Start {
            mem: table.memory().clone(),
            features: features & FEATURES,
            queues,
            calls: [rx_call, tx_call],
            driver: self.driver(),
        };
        // Whether this succeeds or not, the paused session cannot be used a second time.
        self.paused = None;
        self.link
            .ask(|answer| Command::Start(Box::new(start), answer))?
            .map_err(refused)?;
        self.running = true;
        self.changed = true;
        for (vring, lag) in self.vrings.iter_mut().zip(lags) {
            vring.lag = lag;
        }
        Ok(())
    }

    /// The present configuration of both vrings; `None` if it is not complete.
    fn setup(&self) -> Option<Setup> {
        let mut vrings = [(0, [0; 3], 0); QUEUES];
        for (setup, vring) in vrings.iter_mut().zip(&self.vrings) {
            *setup = (vring.size, vring.addrs?, vring.base);
        }
        Some(Setup {
            features: self.features?,
            vrings,
        })
    }

    /// The driver behind the vrings that are about to start.
    fn driver(&self) -> Driver {
        if self.paused.is_some() && self.paused == self.setup() {
            Driver::Same
        } else if self.vrings.iter().all(|vring| vring.base == 0) {
            Driver::New
        } else {
            Driver::Continued
        }
    }

    /// Stops the vrings if they run, and stores their positions. The session's streams are kept.
    fn pause(&mut self) -> Result<()> {
        if !self.running {
            return Ok(());
        }
        self.running = false;
        self.changed = true;
        let Paused { bases, held } = self.link.ask(Command::Pause)?;
        for (vring, base) in self.vrings.iter_mut().zip(bases) {
            vring.base = base;
        }
        self.paused = self.setup().filter(|_| held);
        Ok(())
    }

    /// Ends the session if there is one, paused or not.
    fn end(&mut self, reason: ResetReason) -> Result<()> {
        if !std::mem::take(&mut self.running) & self.paused.take().is_none() {
            return Ok(());
        }
        self.changed = true;
        Ok(self.link.ask(|answer| Command::End(reason, answer))?)
    }
}

fn clone_fd(fd: &Option<OwnedFd>) -> Result<Option<OwnedFd>> {
    fd.as_ref()
        .map(OwnedFd::try_clone)
        .transpose()
        .map_err(Error::ReqHandlerError)
}

/// Makes the queue of a complete vring. The used index comes from guest memory. The device holds no descriptor beyond
/// a burst, so every buffer that was taken has been returned.
fn build(vring: &Vring, queue_max: u16, table: &MemTable) -> Result<VirtQueue> {
    let [desc_table, avail_ring, used_ring] = vring
        .addrs
        .ok_or_else(|| refused("vring has no addresses"))?;
    let state = QueueState {
        max_size: queue_max,
        next_avail: vring.base,
        next_used: 0,
        event_idx_enabled: false, // the device's own `Virtqueue` handles it
        size: vring.size,
        ready: true,
        desc_table,
        avail_ring,
        used_ring,
    };
    let mut queue = Queue::try_from(state).map_err(|e| refused(e.to_string()))?;
    let used = queue
        .used_idx(&**table.memory(), Ordering::Acquire)
        .map_err(|e| refused(e.to_string()))?;
    queue.set_next_used(used.0);
    Ok(VirtQueue {
        queue: queue.into(),
        kick: clone_fd(&vring.kick)?,
    })
}

/// Makes an eventfd nonblocking, because its users must never block on it.
fn nonblocking(file: File) -> Result<OwnedFd> {
    let fd = OwnedFd::from(file);
    let set = || -> nix::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(())
    };
    set().map_err(|e| Error::ReqHandlerError(e.into()))?;
    Ok(fd)
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.end(ResetReason::Epoch)?;
        self.changed = true;
        self.features = None;
        self.vrings = Default::default();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_owner()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(OFFERED)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !OFFERED != 0 {
            return Err(refused(format!(
                "features {features:#x} contain {:#x}, which was not offered",
                features & !OFFERED
            )));
        }
        if self.running {
            if self.features == Some(features) {
                return Ok(());
            }
            return Err(refused("features change while the vrings run"));
        }
        self.features = Some(features);
        self.changed = true;
        // Without protocol features there is no SET_VRING_ENABLE: vrings are enabled from the start.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for vring in &mut self.vrings {
                vring.enabled = true;
            }
        }
        self.settle()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let table = MemTable::map(regions, files, self.policy).map_err(|e| {
            tracing::warn!(error = %e, "memory table refused");
            refused(e)
        })?;
        if self.running {
            let mem = table.memory().clone();
            self.link
                .ask(|answer| Command::Memory(mem, answer))?
                .map_err(refused)?;
        }
        self.table = Some(table);
        self.changed = true;
        self.settle()?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        if self.is_repeated_start() {
            return self.vring(index).map(|_| ());
        }
        let max = self.queue_max;
        let vring = self.stopped_vring(index, "size changes")?;
        vring.size = u16::try_from(num)
            .ok()
            .filter(|n| n.is_power_of_two() && *n <= max)
            .ok_or_else(|| {
                refused(format!(
                    "vring {index}: size {num} is not a power of two in 1..={max}"
                ))
            })?;
        self.settle()
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let table = self.table.as_ref();
        let translate = |what: &str, user: u64| {
            table.and_then(|t| t.translate(user)).ok_or_else(|| {
                refused(format!(
                    "vring {index}: {what} at user address {user:#x} is not in the memory table"
                ))
            })
        };
        let addrs = [
            translate("descriptor table", descriptor)?,
            translate("available ring", available)?,
            translate("used ring", used)?,
        ];
        if self.running && self.vring(index)?.addrs == Some(addrs) {
            return Ok(());
        }
        self.stopped_vring(index, "addresses change")?.addrs = Some(addrs);
        self.settle()
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        if self.is_repeated_start() {
            return self.vring(index).map(|_| ());
        }
        let vring = self.stopped_vring(index, "base changes")?;
        vring.base = u16::try_from(base)
            .map_err(|_| refused(format!("vring {index}: base {base} has more than 16 bits")))?;
        self.settle()
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.pause()?;
        let vring = self.vring(index)?;
        // A stopped vring starts again with the next SET_VRING_KICK.
        vring.kick = None;
        let base = u32::from(vring.base);
        self.changed = true;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file =
            file.ok_or_else(|| refused("a vring without a kick descriptor is not supported"))?;
        let running = self.running;
        let vring = self.vring(u32::from(index))?;
        let kick = vring.kick.insert(nonblocking(file)?);
        if running {
            let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
            self.link.post(Command::Kick(u16::from(index), kick))?;
        }
        self.changed = true;
        self.settle()
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = file.map(nonblocking).transpose()?;
        let clone = clone_fd(&call)?;
        self.vring(u32::from(index))?.call = call;
        if self.running {
            self.link.post(Command::Call(u16::from(index), clone))?;
        }
        self.changed = true;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        // The VM's state reports a broken queue. The frontend's error descriptor is not used.
        self.vring(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.protocol_features = Some(features);
        self.changed = true;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        self.changed = true;
        if enable { self.settle() } else { self.pause() }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let config = self.guest_cid.get().to_le_bytes();
        let (start, len) = (offset as usize, size as usize);
        start
            .checked_add(len)
            .and_then(|end| config.get(start..end))
            .map(<[u8]>::to_vec)
            .ok_or_else(|| refused(format!("configuration {offset}+{size} of 8 bytes")))
    }

    fn set_config(
        &mut self,
        _offset: u32,
        _buf: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        Ok(()) // read-only, but the driver may try to write
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported("no GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("no shared objects")
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported("no descriptor is in flight between bursts")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported("no descriptor is in flight between bursts")
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unsupported("memory must come as one table")
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        unsupported("memory must come as one table")
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported("memory must come as one table")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported("no migration")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("no migration")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("no shared memory regions")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("no dirty log")
    }
}
