//! The end of a VM: the first reason counts, and the main thread is woken.

use std::sync::Mutex;

use crate::bus::lock;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The guest switched itself off.
    #[error("the guest switched itself off")]
    PowerOff,
    /// The guest asked for a reset: i8042, ACPI, or a triple fault.
    #[error("the guest asked for a reset")]
    Reset,
    /// The operator asked for it.
    #[error("stopped")]
    Stopped,
    /// KVM, or the VMM itself, cannot continue.
    #[error("{0}")]
    Fault(String),
}

impl Reason {
    /// The process's exit status: a supervisor that wants reboots starts the VM again after status 3.
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Stopped => 0,
            Self::Reset => 3,
            Self::Fault(_) => 1,
        }
    }
}

/// Where all threads announce the end.
#[derive(Debug)]
pub struct Exit {
    reason: Mutex<Option<Reason>>,
    event: EventFd,
}

impl Exit {
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> std::io::Result<Self> {
        let (reason, event) = (Mutex::new(None), EventFd::new(EFD_NONBLOCK)?);
        Ok(Self { reason, event })
    }

    /// Ends the VM, unless it is ending already.
    pub fn end(&self, reason: Reason) {
        lock(&self.reason).get_or_insert(reason);
        // Fails only if the counter is full, and then it is readable.
        let _ = self.event.write(1);
    }

    /// Readable once the VM is ending.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The reason, once the VM is ending.
    pub fn reason(&self) -> Option<Reason> {
        lock(&self.reason).clone()
    }
}
