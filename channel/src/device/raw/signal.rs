//! Interrupts and kicks as descriptors or as calls.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::Signal;

/// Interrupts the guest through eventfds (with KVM: irqfds).
#[derive(Debug)]
pub struct EventFdSignal {
    fds: Fds,
}

#[derive(Debug)]
enum Fds {
    Shared(OwnedFd),
    PerQueue([OwnedFd; 3]),
}

impl EventFdSignal {
    /// One interrupt for all queues, as virtio-mmio has it.
    pub fn shared(fd: OwnedFd) -> Self {
        let fds = Fds::Shared(fd);
        Self { fds }
    }

    /// An interrupt for each queue: RX, TX, events.
    pub fn per_queue(fds: [OwnedFd; 3]) -> Self {
        let fds = Fds::PerQueue(fds);
        Self { fds }
    }
}

impl Signal for EventFdSignal {
    fn signal(&self, queue: u16) {
        let fd = match &self.fds {
            Fds::Shared(fd) => Some(fd),
            Fds::PerQueue(fds) => fds.get(usize::from(queue)),
        };
        if let Some(fd) = fd {
            // The write fails only when the counter is full, and then an interrupt is pending.
            let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
        }
    }

    fn is_shared(&self) -> bool {
        matches!(self.fds, Fds::Shared(_))
    }
}

/// Interrupts the guest by a call. It is made on the device's thread, so it must not wait, and must not call the device.
pub struct FnSignal<F> {
    call: F,
    shared: bool,
}

impl<F: Fn(u16) + Send + Sync> FnSignal<F> {
    /// All queues share one interrupt, as virtio-mmio has it. `call` gets the index of the queue that has something.
    pub fn shared(call: F) -> Self {
        let shared = true;
        Self { call, shared }
    }

    /// Each queue has an interrupt of its own. `call` gets the index of the queue.
    pub fn per_queue(call: F) -> Self {
        let shared = false;
        Self { call, shared }
    }
}

impl<F: Fn(u16) + Send + Sync> Signal for FnSignal<F> {
    fn signal(&self, queue: u16) {
        (self.call)(queue);
    }

    fn is_shared(&self) -> bool {
        self.shared
    }
}

impl<F> fmt::Debug for FnSignal<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = self.shared;
        f.debug_struct("FnSignal").field("shared", &shared).finish()
    }
}

/// The driver's kicks, for a VMM that has no ioeventfds: its vCPU thread exits at QueueNotify, and calls
/// [`kick`](Self::kick).
#[derive(Debug)]
pub struct Kicks([EventFd; 3]);

impl Kicks {
    /// Makes the kicks of the RX, TX and event queue.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new() -> io::Result<Self> {
        let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        Ok(Self([event()?, event()?, event()?]))
    }

    /// The ends that the device sleeps on, as [`link`](crate::linked::link) takes them.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn ends(&self) -> io::Result<[OwnedFd; 3]> {
        let [rx, tx, event] = &self.0;
        let end = |kick: &EventFd| kick.as_fd().try_clone_to_owned();
        Ok([end(rx)?, end(tx)?, end(event)?])
    }

    /// Tells the device that the driver has posted buffers on `queue`. Other indices than 0, 1 and 2 are ignored: the
    /// guest chooses them.
    pub fn kick(&self, queue: u16) {
        if let Some(kick) = self.0.get(usize::from(queue)) {
            // The write fails only when the counter is full, and then the device wakes anyway.
            let _ = kick.write(1);
        }
    }
}
