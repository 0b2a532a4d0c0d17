//! Doorbells: how one side wakes the other when it sleeps.
// vmm-sys-util's `EventFd` only lends and takes raw descriptors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use adit_passed::Passed;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Wakes the other side.
pub trait Doorbell {
    /// Signals the doorbell. Several signals before the other side looks count as one.
    ///
    /// # Errors
    /// The other side cannot be reached.
    fn ring(&self) -> io::Result<()>;
}

/// Waits for the other side's doorbell.
pub trait Waiter {
    /// The descriptor that becomes readable when the doorbell was signalled. `None` if there is no such doorbell, and
    /// the owner polls.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Resets the doorbell, so that the next signal is noticed.
    ///
    /// # Errors
    /// The descriptor is broken.
    fn clear(&self) -> io::Result<()>;
}

/// Makes an eventfd that is nonblocking and close-on-exec.
///
/// # Errors
/// This process has no free descriptors.
pub fn event_fd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// Converts a passed descriptor to a doorbell. Anything other than an eventfd is closed as [`adit_passed`] describes.
///
/// # Errors
/// It is not an eventfd, or it cannot be examined.
pub fn from_passed(fd: impl Into<Passed>) -> io::Result<EventFd> {
    Ok(of_eventfd(fd.into().eventfd()?))
}

/// Wraps a descriptor that is known to be an eventfd.
fn of_eventfd(fd: OwnedFd) -> EventFd {
    // SAFETY: the descriptor is open, is an eventfd, and has no other owner from here on.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

/// Borrows the descriptor of an eventfd, with the lifetime of the eventfd.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd keeps its descriptor open while it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Doorbell for EventFd {
    fn ring(&self) -> io::Result<()> {
        match self.write(1) {
            // The counter is at its maximum, so the doorbell is already signalled.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            done => done,
        }
    }
}

impl Waiter for EventFd {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(borrow(self))
    }

    fn clear(&self) -> io::Result<()> {
        match self.read() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            done => done.map(drop),
        }
    }
}

/// No doorbell: both sides poll, and no side sleeps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Polled;

impl Doorbell for Polled {
    fn ring(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Waiter for Polled {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn clear(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Sleeps until the doorbell is signalled or the time limit passes, then resets the doorbell. Does not sleep if there
/// is no doorbell.
///
/// # Errors
/// The descriptor is broken.
pub(crate) fn sleep(waiter: &impl Waiter, limit: Option<Duration>) -> io::Result<()> {
    let Some(fd) = waiter.fd() else {
        std::hint::spin_loop();
        return Ok(());
    };
    let limit = match limit {
        // Rounded up, so that the last fraction of a millisecond is not spent polling.
        Some(limit) => {
            PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        }
        None => PollTimeout::NONE,
    };
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], limit) {
        Ok(_) | Err(Errno::EINTR) => waiter.clear(),
        Err(e) => Err(e.into()),
    }
}

#[cfg(feature = "tokio")]
pub(crate) use watched::Bell;

#[cfg(feature = "tokio")]
mod watched {
    use std::io;
    use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;
    use vmm_sys_util::eventfd::EventFd;

    use super::borrow;

    /// A doorbell in the form that tokio watches.
    #[derive(Debug)]
    pub(crate) struct Bell(pub(crate) EventFd);

    impl AsFd for Bell {
        fn as_fd(&self) -> BorrowedFd<'_> {
            borrow(&self.0)
        }
    }

    impl AsRawFd for Bell {
        fn as_raw_fd(&self) -> RawFd {
            self.0.as_raw_fd()
        }
    }

    impl Bell {
        pub(crate) fn watch(event: EventFd) -> io::Result<AsyncFd<Self>> {
            // SAFETY: the descriptor stays the same, and this value owns it and keeps it open for its whole life.
            let watched =
                unsafe { AsyncFd::register_with_interest(Self(event), Interest::READABLE) };
            Ok(watched?)
        }
    }
}
