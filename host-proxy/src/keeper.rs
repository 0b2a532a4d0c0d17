//! What aditd keeps of a port process, so that another one can go on with the VMM when that one is killed: the last
//! handover, with duplicates of every descriptor of the frontend. aditd passes it on and understands none of it.
//!
//! Where the VM has a place in the descriptor store, what is kept here is there, too ([`fdstore`](crate::fdstore)).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::fdstore::{Ends, Slot};
use adit_passed::{Closer, Passed};
use adit_port::control::Handover;
use adit_port::control_io::{ControlError, Message, send_all};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::listen::closing_max;

/// One VM's last handover.
#[derive(Debug)]
pub struct Keeper {
    state: Mutex<State>,
    closer: Closer,
}

#[derive(Debug, Default)]
struct State {
    kept: Option<(Handover, Vec<Passed>)>,
    slot: Option<Slot>,
}

impl Default for Keeper {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            closer: Closer::lingering(closing_max()),
        }
    }
}

impl Keeper {
    /// What closes the descriptors that come from this VM's port process: they may be anything, also what cannot be closed, and
    /// no other VM, and nothing else here, may wait for that (R105).
    pub fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Takes up what an earlier aditd kept for this VM in this place, and keeps it there from now on.
    ///
    /// # Errors
    /// What was there cannot be put back.
    pub fn open(&self, ends: Ends) -> Result<(), ControlError> {
        let (mut slot, left) = Slot::open(ends, &self.closer)?;
        let mut state = self.lock();
        match (&state.kept, left) {
            // There was no place until now.
            (Some((handover, fds)), _) => slot.put(handover, fds)?,
            (None, left) => state.kept = left,
        }
        state.slot = Some(slot);
        Ok(())
    }

    /// Calls `use_them` with both ends of the VM's place, if it has one.
    pub fn place<T>(&self, use_them: impl FnOnce([BorrowedFd<'_>; 2]) -> T) -> Option<T> {
        self.lock().slot.as_ref().map(|slot| use_them(slot.ends()))
    }

    /// Keeps this in place of the last one.
    pub fn keep(&self, handover: Handover, fds: Vec<Passed>) {
        let mut state = self.lock();
        if let Some(slot) = &mut state.slot
            && let Err(e) = slot.put(&handover, &fds)
        {
            tracing::warn!(error = %e, "not kept over the end of this aditd");
        }
        state.kept = Some((handover, fds));
    }

    /// Lets go of what is kept: with it the VMM's connection, if no port process has it.
    pub fn forget(&self) {
        let mut state = self.lock();
        state.kept = None;
        if let Some(slot) = &mut state.slot {
            slot.clear();
        }
    }

    /// The VM is no more.
    pub fn remove(&self) {
        let mut state = self.lock();
        state.kept = None;
        state.slot = None;
    }

    /// Whether a VMM is connected, and a successor could go on with it.
    pub fn has_frontend(&self) -> bool {
        let state = self.lock();
        let kept = state.kept.as_ref();
        kept.is_some_and(|(handover, _)| !handover.record.is_empty())
    }

    /// Returns a socket in which a new port process finds the handover; `None`: nothing is kept.
    ///
    /// # Errors
    /// There is no socket to be had.
    pub fn pass_on(&self) -> Result<Option<OwnedFd>, ControlError> {
        let state = self.lock();
        let Some((handover, fds)) = &state.kept else {
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

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
