//! A descriptor that its owner's [`Closer`] closes, whichever thread drops it.

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::Closer;

/// A descriptor whose `close` may block: one end of a Unix socket, in whose queue passed descriptors may wait.
#[derive(Debug)]
pub struct Apart<T: Into<OwnedFd>> {
    // `None` only inside `drop` and `take_if`.
    fd: Option<T>,
    closer: Closer,
}

impl<T: Into<OwnedFd>> Apart<T> {
    /// Hands the close of `fd` over to `closer`.
    pub fn new(fd: T, closer: &Closer) -> Self {
        Self {
            fd: Some(fd),
            closer: closer.clone(),
        }
    }

    /// The closer of this descriptor.
    pub fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Returns the descriptor. From now on the caller has to close it.
    ///
    /// # Errors
    /// Never: the descriptor is always present.
    pub fn into_inner(self) -> std::io::Result<T> {
        self.take_if(|_| true)
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    /// Returns the descriptor if `is` accepts it. If not, returns `None` and the closer closes the descriptor.
    pub(crate) fn take_if(mut self, is: impl FnOnce(&T) -> bool) -> Option<T> {
        self.fd.take_if(|fd| is(fd))
    }
}

impl<T: Into<OwnedFd>> Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        let Some(fd) = &self.fd else {
            unreachable!("the descriptor leaves only when the whole value does")
        };
        fd
    }
}

impl<T: Into<OwnedFd> + AsFd> AsFd for Apart<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

impl<T: Into<OwnedFd>> Drop for Apart<T> {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.closer.close(fd);
        }
    }
}
