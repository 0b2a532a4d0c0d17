//! What is closed by a closer, whoever drops it.

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::Closer;

/// A descriptor whose close may take long: an end of a Unix socket in which passed descriptors may wait.
#[derive(Debug)]
pub struct Apart<T: Into<OwnedFd>> {
    // `None` only while it is dropped.
    fd: Option<T>,
    closer: Closer,
}

impl<T: Into<OwnedFd>> Apart<T> {
    /// Lets `closer` close it.
    pub fn new(fd: T, closer: &Closer) -> Self {
        Self {
            fd: Some(fd),
            closer: closer.clone(),
        }
    }

    /// Whose it is.
    pub fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Takes it back: whoever has it now sees to its close.
    ///
    /// # Errors
    /// None: it is always there.
    pub fn into_inner(self) -> std::io::Result<T> {
        self.take_if(|_| true)
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }

    /// Takes it back; `None` if it is not what is wanted, and is left to its closer.
    pub(crate) fn take_if(mut self, is: impl FnOnce(&T) -> bool) -> Option<T> {
        self.fd.take_if(|fd| is(fd))
    }
}

impl<T: Into<OwnedFd>> Deref for Apart<T> {
    type Target = T;

    fn deref(&self) -> &T {
        let Some(fd) = &self.fd else {
            unreachable!("it is taken only together with the whole")
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
