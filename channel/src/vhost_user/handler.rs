//! What the frontend said so far, message by message, and when that makes a session.
//!
//! ```text
//! Stopped ── both rings {num, addr, kick, enabled} + memory + features ──► Running
//!    ▲                                                                       │
//!    └── GET_VRING_BASE, ENABLE 0 (paused), RESET_OWNER, frontend gone ──────┘
//! ```
//! A pause keeps the session: it goes on where the rings start with the features, addresses and positions that they had.
//!
//! The order of messages within Stopped does not matter. While Running, what the device was built from is fixed;
//! the memory table and the kick and call descriptors may be replaced.
//!
//! [`Handler::handover`] is all of it, and [`Handler::resume`] is how another process goes on from there: a ring that
//! ran continues where guest memory says that it stands.

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

/// One ring as the frontend described it.
#[derive(Debug, Default)]
struct Vring {
    /// 0 = not told yet.
    size: u16,
    base: u16,
    /// Descriptor table, available ring, used ring: guest addresses.
    addrs: Option<[u64; 3]>,
    /// How far the position was ahead of the used index when the ring was started: 0, with every frontend that there is.
    lag: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
}

/// What is the same for as long as it is the same driver: features, and of each ring size, addresses and position. A driver
/// that was reset begins at position 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setup {
    features: u64,
    rings: [(u16, [u64; 3], u16); QUEUES],
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
    /// The session that is paused, as it was.
    paused: Option<Setup>,
    /// Something changed that a successor must know.
    changed: bool,
    /// The next message may be one that the predecessor has handled already.
    perhaps_again: bool,
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
            perhaps_again: false,
        }
    }

    /// The connection is over: ends the session and forgets everything.
    pub(super) fn gone(&mut self) {
        if let Err(e) = self.end(ResetReason::CarrierFault) {
            tracing::debug!(error = %e, "frontend gone");
        }
        self.features = None;
        self.protocol_features = None;
        self.table = None;
        self.vrings = Default::default();
        self.changed = false;
        self.perhaps_again = false;
    }

    /// What may be guest memory.
    pub(super) fn policy(&self) -> MemoryPolicy {
        self.policy
    }

    /// A message was handled. Returns whether it changed what a successor must know.
    pub(super) fn handled(&mut self) -> bool {
        self.perhaps_again = false;
        std::mem::take(&mut self.changed)
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings
            .get_mut(index as usize)
            .ok_or_else(|| refused(format!("ring {index}: there are {QUEUES}")))
    }

    /// As `vring`, for what must not change while the device runs on it.
    fn stopped_vring(&mut self, index: u32, what: &str) -> Result<&mut Vring> {
        if self.running {
            return Err(refused(format!("ring {index}: {what} while the ring runs")));
        }
        self.changed = true;
        self.vring(index)
    }

    /// The predecessor has handled this message: it was the one that started the rings.
    fn said_already(&self) -> bool {
        self.running && self.perhaps_again
    }

    /// Starts the session if everything is there.
    fn settle(&mut self) -> Result<()> {
        let complete =
            |v: &Vring| v.size != 0 && v.addrs.is_some() && v.kick.is_some() && v.enabled;
        let (Some(features), Some(table)) = (self.features, &self.table) else {
            return Ok(());
        };
        if self.running || !self.vrings.iter().all(complete) {
            return Ok(());
        }
        if self.perhaps_again {
            // The predecessor has run these rings, or had just begun to: what it took it gave back.
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
        let lags = [&queues.rx.queue, &queues.tx.queue]
            .map(|q| q.next_avail().wrapping_sub(q.next_used()));
        let start = Start {
            mem: table.memory().clone(),
            features: features & FEATURES,
            queues,
            calls: [rx_call, tx_call],
            driver: self.driver(),
        };
        // Whatever comes of it, the session that was paused is no more.
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

    /// The rings as they are described now; `None`: something is missing.
    fn setup(&self) -> Option<Setup> {
        let mut rings = [(0, [0; 3], 0); QUEUES];
        for (ring, vring) in rings.iter_mut().zip(&self.vrings) {
            *ring = (vring.size, vring.addrs?, vring.base);
        }
        Some(Setup {
            features: self.features?,
            rings,
        })
    }

    /// Who is behind the rings that are about to start.
    fn driver(&self) -> Driver {
        if self.paused.is_some() && self.paused == self.setup() {
            Driver::Same
        } else if self.vrings.iter().all(|vring| vring.base == 0) {
            Driver::New
        } else {
            Driver::LivesOn
        }
    }

    /// Stops the rings if they run, and learns where they stand. The session's streams are held.
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

/// Makes the queue of a complete ring. The used index continues where guest memory says: the device holds no
/// descriptor over a burst, so what was taken has been given back.
fn build(vring: &Vring, queue_max: u16, table: &MemTable) -> Result<VirtQueue> {
    let [desc_table, avail_ring, used_ring] = vring
        .addrs
        .ok_or_else(|| refused("ring has no addresses"))?;
    let state = QueueState {
        max_size: queue_max,
        next_avail: vring.base,
        next_used: 0,
        event_idx_enabled: false, // the device's own rings know
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
        queue,
        kick: clone_fd(&vring.kick)?,
    })
}

/// Takes an eventfd over. Whoever reads or writes it must never block on it.
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
            return Err(refused("features change while the rings run"));
        }
        self.features = Some(features);
        self.changed = true;
        // Without protocol features there is no SET_VRING_ENABLE: rings are enabled from the start.
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
        if self.said_already() {
            return self.vring(index).map(|_| ());
        }
        let max = self.queue_max;
        let vring = self.stopped_vring(index, "size changes")?;
        vring.size = u16::try_from(num)
            .ok()
            .filter(|n| n.is_power_of_two() && *n <= max)
            .ok_or_else(|| {
                refused(format!(
                    "ring {index}: size {num} is not a power of two in 1..={max}"
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
                    "ring {index}: {what} at user address {user:#x} is not in the memory table"
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
        if self.said_already() {
            return self.vring(index).map(|_| ());
        }
        let vring = self.stopped_vring(index, "base changes")?;
        vring.base = u16::try_from(base)
            .map_err(|_| refused(format!("ring {index}: base {base} is more than 16 bits")))?;
        self.settle()
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.pause()?;
        let vring = self.vring(index)?;
        // A stopped ring starts with the next SET_VRING_KICK.
        vring.kick = None;
        let base = u32::from(vring.base);
        self.changed = true;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let file = file.ok_or_else(|| refused("a ring without a kick descriptor is not served"))?;
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
        // A broken ring is shown by the VM's state; the frontend's log would be the wrong place.
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
        Ok(()) // read-only; the driver is allowed to try
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
        unsupported("memory comes as one table")
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        unsupported("memory comes as one table")
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported("memory comes as one table")
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
