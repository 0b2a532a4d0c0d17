//! How a frontend's thread is ended from outside.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use adit_passed::{Apart, Closer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Pause in ms after a failed accept (no free descriptors).
pub(super) const ACCEPT_RETRY_MS: u16 = 100;

/// Shared by the carrier and the thread, to end the thread.
pub(super) struct Control {
    pub(super) stop: AtomicBool,
    /// Stop between two messages, and leave the connection to a successor.
    pub(super) release: AtomicBool,
    pub(super) stop_event: EventFd,
    /// The connection, so that it can be cut off from outside.
    pub(super) current: Mutex<Option<Apart<UnixStream>>>,
    /// There is one.
    pub(super) connected: AtomicBool,
}

impl Control {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self {
            stop: AtomicBool::new(false),
            release: AtomicBool::new(false),
            stop_event: EventFd::from_flags(flags)?,
            current: Mutex::new(None),
            connected: AtomicBool::new(false),
        })
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    pub(super) fn stop_event(&self) -> BorrowedFd<'_> {
        self.stop_event.as_fd()
    }

    /// Waits a moment, for a resource that is missing now. Returns false if the thread is to end.
    pub(super) fn pause(&self) -> bool {
        let mut stop = [PollFd::new(self.stop_event(), PollFlags::POLLIN)];
        // After EINTR the pause is only shorter.
        let _ = poll(&mut stop, PollTimeout::from(ACCEPT_RETRY_MS));
        !self.stopping()
    }

    pub(super) fn set_current(&self, connection: Option<UnixStream>) {
        // Descriptors from its VMM may wait in this socket.
        let connection = connection.map(|fd| Apart::new(fd, &Closer::shared()));
        self.connected.store(connection.is_some(), Ordering::SeqCst);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }
}
