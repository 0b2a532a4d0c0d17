//! The device behind a vhost-user socket, for QEMU and any other frontend of that protocol.
//!
//! ```text
//! frontend ══ socket ══► thread "vu-NAME": BackendReqHandler ─ Command ─► channel + eventfd ─► shard: VhostUserCarrier
//!    │                   (blocks; maps memory, checks)       ◄─ answer ─                       (owns the device)
//!    └═════ kick eventfds ═════════════════════════════════════════════════════════════════════════►┘
//! ```
//!
//! - Reading the socket blocks, and a frontend may stop in the middle of a message, so each VM has a small thread
//!   for it that shares nothing with the data path. It keeps what the frontend said, checks it, and posts a
//!   `Command` when the device must change; the shard applies it between two bursts.
//! - The session begins when both rings are started (SET_VRING_KICK) and enabled, in whatever order the messages
//!   came; the first burst looks at the rings before it sleeps, so a kick that came too early is not lost.
//! - A ring that is stopped or disabled pauses it: that is how a paused VM looks (QMP `stop`, a backup, an I/O error), and
//!   the streams are held. GET_VRING_BASE is answered by the shard, so nothing is completed after it.
//! - It goes on when the rings start again with the same features, ring addresses and positions. Anything else is another
//!   session: QEMU also stops the rings when the guest's driver resets the device, and that driver begins at position 0.
//!   One that does not lives on, and gets a reset for each stream that it may still have.
//! - It ends when the frontend goes, or says RESET_OWNER.
//! - One frontend at a time; when it goes, the next one is accepted.
//! - A process that is killed can have a successor on the same frontend: `handover` says what it is given, `intake` why
//!   no message is lost or answered twice, [`live`](crate::live) what the guest's streams are told.
//!
//! Source: QEMU docs/interop/vhost-user.rst. Feature by feature: CONFIG (QEMU insists: guest_cid), MQ (tells that
//! there are two queues), REPLY_ACK (crate `vhost` does it). The event queue stays with the frontend.

mod command;
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

/// Guest memory of a device behind a socket. A new table is a new value, which the shard swaps in between bursts.
pub type VmMemoryRef = Arc<VmMemory>;

type Device = VsockDevice<VmMemoryRef>;

/// Waker id of the command channel; those below are the device's.
const WAKER_COMMANDS: u32 = WAKERS;

/// Commands that wait for the shard at most: each asks for an answer, except call and kick changes.
const COMMANDS_MAX: usize = 64;

/// Keeps what a successor of this process needs. Called on the frontend's thread.
pub trait Keeper: Send {
    /// Keeps this in place of the last one; `None`: there is no frontend. Returns once it is kept, or cannot be: the
    /// frontend waits for it.
    fn keep(&mut self, handover: Option<Handover>);
    /// The predecessor's frontend cannot be taken over: its VM has no channel until its VMM connects anew.
    fn stuck(&mut self, why: String);
    /// The frontend was cut off: it said what cannot be taken, and this is why.
    fn refused(&mut self, _why: String) {}
    /// The connection was let go of as [`Releaser::release`] asked.
    fn released(&mut self);
}

/// How a VM's device is reached.
pub struct VhostUserConfig {
    /// Bound socket that the frontend connects to.
    pub listener: UnixListener,
    /// CID of the guest.
    pub guest_cid: GuestCid,
    /// Largest queue to accept: a power of two, at most [`QUEUE_MAX`].
    pub queue_max: u16,
    /// Epoch of the first session; each further one counts up.
    pub first_epoch: u64,
    /// Which memory the frontend may hand over.
    pub memory: MemoryPolicy,
    /// Name of the VM, for the thread's name and for log lines.
    pub name: String,
    /// Where it is noted how far the frontend's last message has got, for a successor.
    pub live: Option<Arc<LiveFile>>,
    /// Who keeps what the frontend said, for a successor.
    pub keeper: Option<Box<dyn Keeper>>,
    /// The frontend of a predecessor, to go on with; `live` must be the predecessor's, too.
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
    /// Kick descriptors that the device no longer uses. They stay open until the next burst begins, so that the
    /// shard can take them out of its epoll set: the frontend holds duplicates, so closing them would not.
    retired: Vec<OwnedFd>,
    // Last: its drop ends the thread, which must find the command channel closed.
    frontend: Frontend,
}

impl VhostUserCarrier {
    /// Starts listening.
    ///
    /// # Errors
    /// `queue_max` is no power of two in 1..=[`QUEUE_MAX`], or there is no thread or descriptor to be had.
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
            retired: Vec::new(),
            frontend: Frontend::spawn(config, sender)?,
        })
    }

    /// Returns the device's counters.
    pub fn counters(&self) -> Counters {
        self.device.counters()
    }

    /// Tells whether a session is on, or paused.
    pub fn is_attached(&self) -> bool {
        self.attached
    }

    /// Returns what lets go of the frontend's connection later.
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
                answer.give(result);
            }
            Command::Pause(answer) => answer.give(self.pause(woken)),
            Command::End(reason, answer) => {
                let _ = self.end(reason, woken);
                answer.give(());
            }
            Command::Memory(mem, answer) => answer.give(self.device.set_memory(mem)),
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
        // Does nothing where no session is paused. What begins now ends the streams, if it begins.
        self.device.reset(ResetReason::Epoch);
        // Offered features only: the thread has checked that.
        if self.device.ack_features(start.features).is_err() {
            return Err(ActivateError::Active);
        }
        match start.driver {
            Driver::New => self.device.activate(start.mem, start.queues, calls),
            Driver::Same | Driver::LivesOn => {
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
        // Whoever tears knows that the session is over.
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
        let mut woken = Woken::default();
        while let Ok(command) = self.commands.try_recv() {
            self.apply(command, &mut woken);
            if woken.session.is_some() {
                // One change a call: the next command may be the next change.
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
/// What SET_MEM_TABLE is refused for.
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
