//! Listens on a host port for streams of the guest.

use std::io;
use std::sync::Arc;

use super::Stream;
use crate::backlog::{Backlog, ListenError, Offered};
use crate::inbox::{Command, Handle};

/// Accepts streams that the guest opens to one host port. After it is dropped, the guest is refused.
#[derive(Debug)]
pub struct Listener {
    handle: Handle,
    backlog: Arc<Backlog>,
}

impl Handle {
    /// Listens on a host port for streams of the guest. A port has one listener at a time.
    ///
    /// # Errors
    /// The port has a listener, there are too many ports, or the shard has ended.
    pub fn listen(&self, port: u32) -> Result<Listener, ListenError> {
        let backlog = Arc::new(Backlog::default());
        let command = Command::Listen(self.port, port, backlog.clone());
        if !self.inbox.send(command) {
            return Err(ListenError::Gone);
        }
        backlog.listened()?;
        Ok(Listener {
            handle: self.clone(),
            backlog,
        })
    }
}

impl Listener {
    /// Waits for the next stream.
    ///
    /// # Errors
    /// The shard has ended.
    pub fn accept(&self) -> io::Result<Incoming> {
        let offered = self.backlog.next();
        let offered = offered.ok_or(io::ErrorKind::NotConnected)?;
        Ok(Incoming {
            handle: Some(self.handle.clone()),
            offered,
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        for offered in self.backlog.close() {
            refuse(&self.handle, offered);
        }
    }
}

fn refuse(handle: &Handle, offered: Offered) {
    handle
        .inbox
        .send(Command::Refuse(handle.port, offered.stream));
}

/// A stream that the guest opens. Dropping it refuses the stream.
#[derive(Debug)]
pub struct Incoming {
    /// `None` after it was answered.
    handle: Option<Handle>,
    offered: Offered,
}

impl Incoming {
    /// The host's port and the guest's own port.
    pub fn ports(&self) -> (u32, u32) {
        (self.offered.local_port, self.offered.peer_port)
    }

    /// Accepts the stream. If the guest gave up meanwhile, the first read returns that error.
    ///
    /// # Errors
    /// The shard has ended.
    pub fn accept(mut self) -> io::Result<Stream> {
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let handle = self.handle.take().ok_or_else(gone)?;
        let stream = Stream::new(handle);
        stream.local().lock().stream = Some(self.offered.stream);
        let command = Command::Accept(stream.handle.port, self.offered.stream, stream.end.clone());
        match stream.handle.inbox.send(command) {
            true => Ok(stream),
            false => Err(gone()),
        }
    }

    /// Refuses the stream.
    pub fn refuse(self) {}
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            refuse(&handle, self.offered);
        }
    }
}
