//! The device behind a vhost-user socket, for QEMU and any other frontend of that protocol.
//!
//! ```text
//! frontend ══ socket ══► thread "vu-NAME": BackendReqHandler ─ Command ─► channel + eventfd ─► shard: VhostUserCarrier
//!    │                   (blocks; maps memory, checks)       ◄─ answer ─                       (owns the device)
//!    └═════ kick eventfds ═════════════════════════════════════════════════════════════════════════►┘
//! ```
//!
//! - Reading the socket blocks, and a frontend may stop in the middle of a message. So each VM has a small thread for
//!   it, which shares nothing with the data path. The thread stores and checks the frontend's configuration, and sends
//!   a `Command` when the device must change. The shard applies it between two bursts.
//! - The session begins when both vrings are started (SET_VRING_KICK) and enabled, whatever the order of the messages.
//!   The first burst checks the virtqueues before it sleeps, so an earlier kick is not lost.
//! - A stopped or disabled vring pauses the session. That is what a paused VM looks like (QMP `stop`, a backup, an I/O
//!   error), so the streams are kept. The shard answers GET_VRING_BASE, so no buffer is completed after the answer.
//! - The session continues if the vrings start again with the same features, addresses and positions. Otherwise a new
//!   session begins. QEMU also stops the vrings when the guest's driver resets the device, and that driver starts at
//!   position 0. A driver at another position has not restarted; it gets a reset for each stream that it may still
//!   have.
//! - The session ends when the frontend disconnects or sends RESET_OWNER.
//! - There is one frontend at a time. When it disconnects, the next one is accepted.
//! - A successor of a killed process can continue with the same frontend. `handover` describes the state that it gets,
//!   `intake` why no message is lost or answered twice, and [`live`](crate::live) how the guest's streams are ended.
//!
//! Source: QEMU docs/interop/vhost-user.rst. Protocol features: CONFIG (QEMU requires it: guest_cid), MQ (announces
//! two queues), REPLY_ACK (implemented by crate `vhost`). The frontend keeps the event queue to itself.

mod command;
mod control;
mod handler;
mod handover;
mod intake;
mod memory;
mod thread;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use adit_engine::ResetReason;

use crate::carrier::{Carrier, Woken};
use crate::device::{
    ActivateError, Counters, GuestCid, QUEUE_MAX, RX_QUEUE, Stopped, TX_QUEUE, VsockDevice, WAKERS,
    drain,
};
use crate::live::LiveFile;
use command::{Calls, Command, Driver, Paused, Start};
pub use handover::{DESCRIPTORS_MAX, Handover, RECORD_MAX, VERSION as HANDOVER_VERSION};
pub use memory::{MemoryPolicy, VmMemory};
use thread::Frontend;
pub use thread::Releaser;

/// Guest memory of a device behind a socket. A new table is a new value; the shard replaces it between bursts.
pub type VmMemoryRef = Arc<VmMemory>;

type Device = VsockDevice<VmMemoryRef>;

/// Waker id of the command channel. Lower ids belong to the device.
const WAKER_COMMANDS: u32 = WAKERS;

/// Maximum number of commands that wait for the shard. Each expects an answer, except changes of call and kick
/// descriptors.
const COMMANDS_MAX: usize = 64;

/// Stores the state that a successor of this process needs. Its methods are called on the frontend's thread.
pub trait Keeper: Send {
    /// Stores this handover, which replaces the last one; `None` means that there is no frontend. Returns when it is
    /// stored, or cannot be stored. The frontend waits for it.
    fn keep(&mut self, handover: Option<Handover>);
    /// The predecessor's frontend cannot be taken over. The VM has no channel until its VMM connects again.
    fn stuck(&mut self, why: String);
    /// The frontend was cut off because it sent something invalid; `why` is the reason.
    fn refused(&mut self, _why: String) {}
    /// The connection was released, as [`Releaser::release`] requested.
    fn released(&mut self);
}

/// The configuration of a VM's device.
pub struct VhostUserConfig {
    /// A bound socket to which the frontend connects.
    pub listener: UnixListener,
    /// CID of the guest.
    pub guest_cid: GuestCid,
    /// Largest queue to accept: a power of two, at most [`QUEUE_MAX`].
    pub queue_max: u16,
    /// Epoch of the first session. It increases by one for each further session.
    pub first_epoch: u64,
    /// Which memory the frontend may pass.
    pub memory: MemoryPolicy,
    /// Name of the VM, for the thread's name and for log lines.
    pub name: String,
    /// The file that records the progress of the frontend's last message, for a successor.
    pub live: Option<Arc<LiveFile>>,
    /// Stores the frontend's configuration, for a successor.
    pub keeper: Option<Box<dyn Keeper>>,
    /// The frontend of a predecessor, to continue with. `live` must also be the predecessor's.
    pub resume: Option<Handover>,
}

impl VhostUserConfig {
    /// Makes a configuration with the usual limits.
    pub fn new(listener: UnixListener, guest_cid: GuestCid, name: impl Into<String>) -> Self {
        Self {
            listener,
            guest_cid,
            queue_max: QUEUE_MAX,
            first_epoch: 1,
            memory: MemoryPolicy::SealedMemfd,
            name: name.into(),
            live: None,
            keeper: None,
            resume: None,
        }
    }
}

/// A virtio-vsock device behind a vhost-user socket, as a carrier.
pub struct VhostUserCarrier {
    device: Device,
    calls: Arc<Calls>,
    commands: Receiver<Command>,
    attached: bool,
    /// There was a frontend when it was looked last.
    had_frontend: bool,
    /// Kick descriptors that the device no longer uses. They stay open until the next burst begins, so that the shard
    /// can remove them from its epoll set. The frontend has duplicates, so a close alone would not remove them.
    retired: Vec<OwnedFd>,
    // This field must be last: its drop ends the thread, and the thread ends only after the command channel is closed.
    frontend: Frontend,
}

impl VhostUserCarrier {
    /// Starts listening.
    ///
    /// # Errors
    /// `queue_max` is not a power of two in 1..=[`QUEUE_MAX`], or there is no free thread or descriptor.
    pub fn new(config: VhostUserConfig) -> io::Result<Self> {
        if !config.queue_max.is_power_of_two() || config.queue_max > QUEUE_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "queue_max {} is not a power of two in 1..={QUEUE_MAX}",
                    config.queue_max
                ),
            ));
        }
        let (sender, commands) = mpsc::sync_channel(COMMANDS_MAX);
        let (guest_cid, epoch) = (config.guest_cid, config.first_epoch);
        Ok(Self {
            device: VsockDevice::new(guest_cid, epoch)?,
            calls: Arc::default(),
            commands,
            attached: false,
            had_frontend: false,
            retired: Vec::new(),
            frontend: Frontend::spawn(config, sender)?,
        })
    }

    /// Returns the device's counters.
    pub fn counters(&self) -> Counters {
        self.device.counters()
    }

    /// Returns true if a session is running or paused.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Returns true if a frontend is connected, whether its guest's driver runs or not.
    pub fn has_frontend(&self) -> bool {
        self.frontend.is_connected()
    }

    /// Returns a value with which the frontend's connection can be released later.
    pub fn releaser(&self) -> Releaser {
        Releaser(self.frontend.control())
    }

    fn apply(&mut self, command: Command, woken: &mut Woken) {
        match command {
            Command::Start(start, answer) => {
                let result = self.start(*start);
                self.attached = result.is_ok();
                woken.session = self.device.take_session_change();
                woken.wakers_changed = true;
                answer.send(result);
            }
            Command::Pause(answer) => answer.send(self.pause(woken)),
            Command::End(reason, answer) => {
                let _ = self.end(reason, woken);
                answer.send(());
            }
            Command::Memory(mem, answer) => answer.send(self.device.set_memory(mem)),
            Command::Call(queue, call) => self.calls.replace(queue, call),
            Command::Kick(queue, kick) => {
                self.retired.extend(self.device.set_kick(queue, Some(kick)));
                woken.wakers_changed = true;
            }
        }
    }

    fn start(&mut self, start: Start) -> Result<(), ActivateError> {
        let [rx, tx] = start.calls;
        self.calls.replace(RX_QUEUE, rx);
        self.calls.replace(TX_QUEUE, tx);
        let calls = self.calls.clone();
        if start.driver == Driver::Same && self.device.is_paused() {
            let gone_on = self.device.go_on(start.mem, start.queues, calls);
            if gone_on.is_err() {
                self.device.reset(ResetReason::CarrierFault);
            }
            return gone_on;
        }
        // This has no effect if no session is paused. The new session, if it starts, ends the streams.
        self.device.reset(ResetReason::Epoch);
        // The thread has checked that these are only offered features.
        if self.device.ack_features(start.features).is_err() {
            return Err(ActivateError::Active);
        }
        match start.driver {
            Driver::New => self.device.activate(start.mem, start.queues, calls),
            Driver::Same | Driver::Continued => {
                self.device
                    .activate_continued(start.mem, start.queues, calls)
            }
        }
    }

    fn pause(&mut self, woken: &mut Woken) -> Paused {
        let halted = self.device.halt();
        let held = halted.is_some();
        let bases = match halted {
            Some(stopped) => self.stopped(stopped, woken),
            None => self.end(ResetReason::Epoch, woken),
        };
        Paused { bases, held }
    }

    fn end(&mut self, reason: ResetReason, woken: &mut Woken) -> [u16; 2] {
        let stopped = self.device.reset(reason);
        self.attached = false;
        woken.session = self.device.take_session_change();
        self.stopped(stopped, woken)
    }

    fn stopped(&mut self, stopped: Stopped, woken: &mut Woken) -> [u16; 2] {
        self.retired.extend(stopped.kicks.into_iter().flatten());
        self.calls.clear();
        woken.wakers_changed = true;
        stopped.bases
    }
}

impl Carrier for VhostUserCarrier {
    crate::carrier::carried_by!(device: Device);

    fn begin(&mut self) {
        self.retired.clear();
        self.device.begin();
    }

    fn tear(&mut self) {
        // The caller of `tear` already knows that the session is over.
        self.attached = false;
        self.device.tear();
    }

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.frontend.waker().as_fd(), WAKER_COMMANDS);
        self.device.wakers(visit);
    }

    fn woken(&mut self, id: u32) -> Woken {
        if id != WAKER_COMMANDS {
            return self.device.woken(id);
        }
        drain(self.frontend.waker().as_fd());
        let has_frontend = self.has_frontend();
        let mut woken = Woken {
            obstacle_changed: std::mem::replace(&mut self.had_frontend, has_frontend)
                != has_frontend,
            ..Woken::default()
        };
        while let Ok(command) = self.commands.try_recv() {
            self.apply(command, &mut woken);
            if woken.session.is_some() {
                // Apply only one session change per call. The next command may be another one.
                self.frontend.wake();
                break;
            }
        }
        woken
    }
}

/// Checks and maps a memory table of (guest address, size, user address, offset), as SET_MEM_TABLE does.
///
/// # Errors
/// The same as those of SET_MEM_TABLE.
#[cfg(feature = "test-util")]
pub fn map_table(
    regions: &[[u64; 4]],
    files: Vec<std::fs::File>,
    policy: MemoryPolicy,
) -> Result<VmMemoryRef, Box<dyn std::error::Error>> {
    let regions: Vec<_> = regions
        .iter()
        .map(|&[gpa, size, user, offset]| {
            handover::Region {
                gpa,
                size,
                user,
                offset,
            }
            .as_message()
        })
        .collect();
    let table = memory::MemTable::map(&regions, files, policy)?;
    Ok(table.memory().clone())
}

#[cfg(test)]
mod tests;
