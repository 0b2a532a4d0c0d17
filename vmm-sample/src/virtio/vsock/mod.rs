//! adit's virtio-vsock device in this process.
//!
//! ```text
//!  vCPU threads                             "vsock" thread                         host
//!  status, queues ─► Vsock ── Command ──► Linked ◄─► VsockDevice ◄─► engine ◄─► sinks ── sockets
//!                       ◄── reply ──────────┘            ▲
//!  kicks: ioeventfd ─────────────────────────────────────┤ epoll
//!  interrupt: irqfd ◄────────────────────────────────────┘
//! ```
//! The device belongs to the thread that moves its packets; a register written on a vCPU's thread is a command that this
//! thread carries out between two bursts, so the data path has no lock. What is above the engine is the owner's choice:
//! `hybrid` sockets, or [`handed`] over to aditd.

pub mod handed;
mod hybrid;
mod linked;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};

use adit_channel::device::{DeviceState, FEATURES, GuestCid, QUEUE_MAX};
use anyhow::Context;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, Device};
use crate::seccomp::{Filters, Thread};
use handed::{Handed, Registration};
use linked::{Linked, Task};

/// Entries of each queue at most.
const QUEUE: u16 = 256;
const _: () = assert!(QUEUE <= QUEUE_MAX);

const GONE: &str = "the vsock device has ended";

/// Who has the host's ends of the streams.
#[derive(Debug)]
pub enum Owner {
    /// Whoever connects to this socket; nobody, without one.
    Sockets(Option<PathBuf>),
    /// aditd.
    Aditd(Registration),
}

/// The device's face towards the transport.
pub struct Vsock {
    cid: GuestCid,
    /// RX, TX, events.
    kicks: [EventFd; 3],
    tasks: Sender<Task>,
    /// Wakes the thread for a task.
    bell: EventFd,
    /// While it is there, the thread stands still.
    held: Option<Sender<()>>,
}

/// Binds a socket; one that a killed process left is taken away.
///
/// # Errors
/// Somebody listens there, or it cannot be made.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    let refused = std::io::ErrorKind::ConnectionRefused;
    if UnixStream::connect(path).is_err_and(|e| e.kind() == refused) {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
        .with_context(|| format!("cannot listen on {}: is it another VM's?", path.display()))
}

impl Vsock {
    /// Makes the device of the guest `cid`, and its thread.
    ///
    /// # Errors
    /// The owner's sockets cannot be made, or there are no descriptors to be had.
    pub fn new(cid: GuestCid, owner: &Owner, filters: &Filters) -> anyhow::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK);
        let (kicks, bell) = ([event()?, event()?, event()?], event()?);
        let (tasks, inbox) = mpsc::channel();
        let carrier = Linked::new(cid, 1, inbox, &bell, &kicks)?;
        let run: Box<dyn FnOnce() + Send> = match owner {
            Owner::Sockets(uds) => {
                let host = hybrid::Host::new(carrier, uds.as_deref())?;
                Box::new(|| host.run())
            }
            Owner::Aditd(registration) => {
                let handed = Handed::new(carrier, registration)?;
                Box::new(|| handed.run())
            }
        };
        let filters = filters.clone();
        std::thread::Builder::new()
            .name("vsock".to_owned())
            .spawn(move || match filters.apply(Thread::Vsock) {
                Ok(()) => run(),
                Err(e) => eprintln!("adit-vmm: no vsock: {e:#}"),
            })?;
        Ok(Self {
            cid,
            kicks,
            tasks,
            bell,
            held: None,
        })
    }

    fn give(&self, task: Task) -> anyhow::Result<()> {
        self.tasks.send(task).ok().context(GONE)?;
        // It fails only when the thread is woken already.
        let _ = self.bell.write(1);
        Ok(())
    }

    /// Has the thread do something with the device, and waits for the outcome.
    fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Linked) -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        let task: Task = Box::new(move |linked: &mut Linked| {
            // Who asked is waiting below.
            let _ = reply.send(what(linked));
        });
        self.give(task)?;
        answer.recv().context(GONE)
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE; 3]
    }

    fn kicks(&self) -> Vec<&EventFd> {
        self.kicks.iter().collect()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_vsock_config: guest_cid, which never changes.
        let cid = self.cid.get().to_le_bytes().into_iter();
        let skip = usize::try_from(offset).unwrap_or(usize::MAX).min(8);
        let config = cid.chain(std::iter::repeat(0)).skip(skip);
        for (byte, value) in data.iter_mut().zip(config) {
            *byte = value;
        }
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, with: Activation) -> anyhow::Result<()> {
        self.ask(|linked| linked.activate(with))?
    }

    fn pause(&mut self) -> anyhow::Result<Vec<u8>> {
        let (reply, answer) = mpsc::sync_channel(1);
        let (hold, go_on) = mpsc::channel::<()>();
        self.give(Box::new(move |linked: &mut Linked| {
            let _ = reply.send(linked.save());
            // Until the other end is dropped.
            let _ = go_on.recv();
        }))?;
        let state = answer.recv().context(GONE)?;
        self.held = Some(hold);
        Ok(state)
    }

    fn resume(&mut self) {
        self.held = None;
    }

    fn restore(&mut self, state: &[u8], with: Option<Activation>) -> anyhow::Result<()> {
        let state = DeviceState::parse(state)?;
        anyhow::ensure!(
            state.has_session() == with.is_some(),
            "the saved vsock device and its driver disagree: the guest had broken it, and must reset it first"
        );
        match with {
            Some(with) => self.ask(move |linked| linked.restore(&state, with))?,
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        // No thread any more: it touches nothing.
        let _ = self.ask(Linked::reset);
    }
}
