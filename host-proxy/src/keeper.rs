//! What aditd keeps of a port process, so that another one can go on with the VMM when that one is killed: the last
//! handover, with duplicates of every descriptor of the frontend. aditd passes it on and understands none of it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use adit_port::control::Handover;
use adit_port::control_io::{ControlError, Message, send_all};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// One VM's last handover.
#[derive(Debug, Default)]
pub struct Keeper {
    kept: Mutex<Option<Kept>>,
}

#[derive(Debug)]
struct Kept {
    handover: Handover,
    fds: Vec<OwnedFd>,
}

impl Keeper {
    /// Keeps this in place of the last one.
    pub fn keep(&self, handover: Handover, fds: Vec<OwnedFd>) {
        *self.lock() = Some(Kept { handover, fds });
    }

    /// Lets go of what is kept: with it the VMM's connection, if no port process has it.
    pub fn forget(&self) {
        *self.lock() = None;
    }

    /// Whether a VMM is connected, and a successor could go on with it.
    pub fn has_frontend(&self) -> bool {
        let kept = self.lock();
        kept.as_ref().is_some_and(|k| !k.handover.record.is_empty())
    }

    /// Returns a socket in which a new port process finds the handover; `None`: nothing is kept.
    ///
    /// # Errors
    /// There is no socket to be had.
    pub fn pass_on(&self) -> Result<Option<OwnedFd>, ControlError> {
        let kept = self.lock();
        let Some(Kept { handover, fds }) = &*kept else {
            return Ok(None);
        };
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(std::io::Error::from)?;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_all(&ours, &Message::Handover(handover.clone()), &fds)?;
        Ok(Some(theirs))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
