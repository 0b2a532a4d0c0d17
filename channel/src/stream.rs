//! The types for an application in the shard's process: `Dialer`, `Stream`, `Listener`.
//!
//! - Calls block by default. With the `tokio` feature the same `Stream` is `AsyncRead + AsyncWrite`.
//! - A stream that is dropped before both directions ended is reset. After [`Stream::shutdown`] of the sending
//!   direction the bytes that were written still arrive.
//! - A stream that was reset returns an error after all earlier bytes were read. So truncated data is never silent.

#[cfg(feature = "tokio")]
mod asynchronous;
mod dialer;
mod listener;

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use adit_engine::{How, ResetReason};

use crate::hello::Accept;
use crate::inbox::{Command, Handle};
use crate::sink::{LOCAL_MAX, Local, LocalEnd, LocalState, Sink};

pub use crate::backlog::{BACKLOG_MAX, ListenError};
pub use dialer::{Dialer, Target};
pub use listener::{Incoming, Listener};

impl LocalState {
    /// Returns true if the dial has succeeded or failed.
    fn settled(&self) -> bool {
        self.open || self.closed || self.failure.is_some()
    }

    fn reset_error(&self) -> io::Error {
        let why = match self.reason {
            Some(reason) => reason.to_string(),
            None => "closed".into(),
        };
        io::Error::new(io::ErrorKind::ConnectionReset, why)
    }

    /// Takes bytes for the application: `None` = none yet, 0 = the end.
    fn take(&mut self, dst: &mut [u8]) -> Option<io::Result<usize>> {
        if !self.to_app.is_empty() {
            let n = dst.len().min(self.to_app.len());
            for (to, from) in dst.iter_mut().zip(self.to_app.drain(..n)) {
                *to = from;
            }
            if self.to_app.is_empty() {
                self.to_app.shrink_to(LOCAL_MAX / 16);
            }
            return Some(Ok(n));
        }
        if self.peer_done || self.recv_done {
            return Some(Ok(0));
        }
        self.closed.then(|| Err(self.reset_error()))
    }

    /// Adds bytes for the guest; `None` = no room.
    fn put(&mut self, src: &[u8]) -> Option<io::Result<usize>> {
        if self.send_done || self.peer_recv_done || self.closed {
            let broken = || Err(io::ErrorKind::BrokenPipe.into());
            return Some(match self.reason {
                Some(_) => Err(self.reset_error()),
                None => broken(),
            });
        }
        let n = src.len().min(LOCAL_MAX.saturating_sub(self.to_guest.len()));
        if n == 0 && !src.is_empty() {
            return None;
        }
        self.to_guest.extend(&src[..n]);
        Some(Ok(n))
    }
}

/// The host's end of a stream to or from the guest.
pub struct Stream {
    handle: Handle,
    end: LocalEnd,
    deadline: Mutex<Option<Instant>>,
    finished: bool,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Stream {
    fn new(handle: Handle) -> Self {
        Self {
            handle,
            end: LocalEnd::default(),
            deadline: Mutex::default(),
            finished: false,
        }
    }

    fn local(&self) -> &Arc<Local> {
        &self.end.0
    }

    /// The agent's answer to the hello, if there was one.
    pub fn accepted(&self) -> Option<Accept> {
        self.local().lock().accept
    }

    /// Why the stream ended early. `None` while it is open, and after it ended in order.
    pub fn reason(&self) -> Option<ResetReason> {
        self.local().lock().reason
    }

    /// Sets a deadline: after it blocking reads and writes fail with `TimedOut`.
    pub fn set_deadline(&self, deadline: Option<Instant>) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }

    /// Ends one direction or both. Bytes that were written before are still sent.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn shutdown(&self, how: How) -> io::Result<()> {
        let mut state = self.local().lock();
        if state.closed && state.reason.is_some() {
            return Err(state.reset_error());
        }
        state.send_done |= matches!(how, How::Send | How::Both);
        if matches!(how, How::Receive | How::Both) {
            state.recv_done = true;
            state.to_app.clear();
        }
        self.changed(state);
        Ok(())
    }

    /// Ends the stream at once; the guest sees a reset.
    pub fn reset(mut self, why: ResetReason) {
        self.finished = true;
        self.send_reset(why);
    }

    /// Connects the stream to a socket. From now on the shard moves bytes between the two, without the threads of this
    /// process. No byte in transit is lost.
    pub fn splice(mut self, fd: OwnedFd) {
        let stream = self.local().lock().stream;
        if let Some(stream) = stream {
            self.finished = true;
            let (port, sink) = (self.handle.port, Sink::Fd(fd));
            self.handle.inbox.send(Command::Attach(port, stream, sink));
        }
    }

    /// Informs the shard of a change, unless an earlier message to it is still unhandled.
    fn changed(&self, mut state: MutexGuard<'_, LocalState>) {
        let Some(stream) = state.stream.filter(|_| !state.kicked && !state.closed) else {
            return;
        };
        state.kicked = true;
        drop(state);
        self.handle
            .inbox
            .send(Command::Changed(self.handle.port, stream));
    }

    fn send_reset(&self, why: ResetReason) {
        let mut state = self.local().lock();
        // A dial without a stream yet is given up as soon as it gets one.
        state.abandoned = true;
        if let Some(stream) = state.stream.filter(|_| !state.closed) {
            drop(state);
            self.handle
                .inbox
                .send(Command::Reset(self.handle.port, stream, why));
        }
    }

    fn read_now(&self, dst: &mut [u8]) -> Result<io::Result<usize>, MutexGuard<'_, LocalState>> {
        let mut state = self.local().lock();
        match state.take(dst) {
            Some(taken) => {
                if std::mem::take(&mut state.starved) {
                    self.changed(state);
                }
                Ok(taken)
            }
            None => Err(state),
        }
    }

    fn write_now(&self, src: &[u8]) -> Result<io::Result<usize>, MutexGuard<'_, LocalState>> {
        let mut state = self.local().lock();
        match state.put(src) {
            Some(put) => {
                if put.is_ok() {
                    self.changed(state);
                }
                Ok(put)
            }
            None => Err(state),
        }
    }

    fn wait(&self, state: MutexGuard<'_, LocalState>) -> io::Result<()> {
        let deadline = *self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        match self.local().wait(state, deadline) {
            (_, true) => Ok(()),
            (_, false) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        if dst.is_empty() {
            return Ok(0);
        }
        loop {
            match self.read_now(dst) {
                Ok(done) => return done,
                Err(state) => self.wait(state)?,
            }
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, src: &[u8]) -> io::Result<usize> {
        loop {
            match self.write_now(src) {
                Ok(done) => return done,
                Err(state) => self.wait(state)?,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, dst: &mut [u8]) -> io::Result<usize> {
        (&*self).read(dst)
    }
}

impl Write for Stream {
    fn write(&mut self, src: &[u8]) -> io::Result<usize> {
        (&*self).write(src)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut state = self.local().lock();
        if state.send_done && state.open {
            // The stream ends in order: bytes that were written arrive, and bytes that come later are dropped.
            state.recv_done = true;
            state.to_app.clear();
            return self.changed(state);
        }
        drop(state);
        self.send_reset(ResetReason::Local);
    }
}
