//! Doorbells: how one side wakes the other when it sleeps.
// An `EventFd` of vmm-sys-util lends and takes raw descriptors only.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use adit_passed::Passed;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::passed;

/// Wakes the other side.
pub trait Doorbell {
    /// Rings. Rung twice before anybody looks, it is one ring.
    ///
    /// # Errors
    /// The other side cannot be reached.
    fn ring(&self) -> io::Result<()>;
}

/// Hears the other side's doorbell.
pub trait Waiter {
    /// What becomes readable when it rang; `None`: it never rings, and its owner polls.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Takes the ring, so that the next one is heard.
    ///
    /// # Errors
    /// The descriptor is broken.
    fn clear(&self) -> io::Result<()>;
}

/// A doorbell that does not block and is not inherited.
///
/// # Errors
/// There are no descriptors left.
pub fn event_fd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// A doorbell that somebody passed. What is none is closed as [`adit_passed`] says.
///
/// # Errors
/// It is no eventfd, or cannot be examined.
pub fn from_passed(fd: impl Into<Passed>) -> io::Result<EventFd> {
    passed::doorbell(fd.into())
}

/// The same, of what is known to be one.
pub(crate) fn of_eventfd(fd: OwnedFd) -> EventFd {
    // SAFETY: the descriptor is open, an eventfd, and owned by nobody else from here on.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

/// What vmm-sys-util lends of an eventfd, with its lifetime.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd keeps its descriptor open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Doorbell for EventFd {
    fn ring(&self) -> io::Result<()> {
        match self.write(1) {
            // Full of rings that nobody took: it has rung.
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

/// Nobody sleeps: both sides poll.
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

/// Sleeps until the doorbell rings or the time is over, and takes the ring. One that never rings is not waited for.
///
/// # Errors
/// The descriptor is broken.
pub(crate) fn sleep(waiter: &impl Waiter, limit: Option<Duration>) -> io::Result<()> {
    let Some(fd) = waiter.fd() else {
        std::hint::spin_loop();
        return Ok(());
    };
    let limit = match limit {
        // Rounded up: a rest of a millisecond is not polled away.
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

    /// A doorbell as tokio watches it.
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
            // SAFETY: the descriptor is the same, open and this value's own for as long as it lives.
            let watched =
                unsafe { AsyncFd::register_with_interest(Self(event), Interest::READABLE) };
            Ok(watched?)
        }
    }
}
