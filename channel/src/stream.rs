//! The types for an application in the shard's process: `Dialer`, `Stream`, `Listener`.
//!
//! - Calls block by default. With the `tokio` feature the same `Stream` is `AsyncRead + AsyncWrite`.
//! - A stream that is dropped before both directions ended is reset. After [`Stream::shutdown`] of the sending
//!   direction the bytes that were written still arrive.
//! - A stream that was reset returns an error after all earlier bytes were read. So truncated data is never silent.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_engine::{How, Lane, ResetReason, StreamId};

use crate::dial::{DialError, DialRequest};
use crate::hello::{Accept, Open};
use crate::shard::{Command, Handle};
use crate::sink::{LOCAL_MAX, Local, LocalEnd, LocalState, Sink};

/// Maximum number of streams that wait in a listener. Further ones are refused.
pub const BACKLOG_MAX: usize = 128;

/// The target of a dial.
#[derive(Clone, Debug)]
pub struct Target {
    /// vsock port inside the guest.
    pub port: u32,
    /// The hello to send first; `None` for a listener without hellos.
    pub hello: Option<Open>,
}

/// Dials a guest from any thread.
#[derive(Clone, Debug)]
pub struct Dialer {
    handle: Handle,
}

impl Handle {
    /// Returns a dialler for this `Port`.
    pub fn dialer(&self) -> Dialer {
        Dialer {
            handle: self.clone(),
        }
    }
}

impl Dialer {
    /// Dials, and waits for the answer of the guest (and with a hello, of its agent).
    ///
    /// # Errors
    /// See [`DialError`].
    pub fn dial(&self, target: &Target, timeout: Duration) -> Result<Stream, DialError> {
        let stream = self.start(target, timeout);
        let mut state = stream.local().lock();
        // The shard checks the deadline.
        while !state.settled() {
            state = stream.local().wait(state, None).0;
        }
        let failure = state.failure.clone();
        drop(state);
        failure.map_or(Ok(stream), Err)
    }

    /// As [`dial`](Self::dial), for an async task. Dropping the future gives the dial up.
    ///
    /// # Errors
    /// See [`DialError`].
    #[cfg(feature = "tokio")]
    pub async fn dial_async(
        &self,
        target: &Target,
        timeout: Duration,
    ) -> Result<Stream, DialError> {
        let stream = self.start(target, timeout);
        let failure = std::future::poll_fn(|cx| {
            let mut state = stream.local().lock();
            if state.settled() {
                return std::task::Poll::Ready(state.failure.clone());
            }
            state.read_waker = Some(cx.waker().clone());
            std::task::Poll::Pending
        })
        .await;
        failure.map_or(Ok(stream), Err)
    }

    fn start(&self, target: &Target, timeout: Duration) -> Stream {
        let inbox = &self.handle.inbox;
        let stream = Stream::new(self.handle.clone());
        let request = DialRequest {
            port: target.port,
            hello: target.hello.clone(),
            deadline: Some(inbox.tick(Instant::now() + timeout)),
            lane: Lane::Bulk,
        };
        let command = Command::Dial(self.handle.port, request, stream.end.clone());
        if !inbox.send(command) {
            stream.end.fail(DialError::Cancelled);
        }
        stream
    }
}

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

#[cfg(feature = "tokio")]
mod for_tokio {
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use adit_engine::How;
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::Stream;

    impl AsyncRead for Stream {
        fn poll_read(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let dst = buf.initialize_unfilled();
            if dst.is_empty() {
                return Poll::Ready(Ok(()));
            }
            match self.read_now(dst) {
                Ok(done) => Poll::Ready(done.map(|n| buf.advance(n))),
                Err(mut state) => {
                    state.read_waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        }
    }

    impl AsyncWrite for Stream {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            src: &[u8],
        ) -> Poll<io::Result<usize>> {
            match self.write_now(src) {
                Ok(done) => Poll::Ready(done),
                Err(mut state) => {
                    state.write_waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Stream::shutdown(&self, How::Send))
        }
    }
}

/// Why this process cannot listen on a host port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// Another listener of this process has the port. The caller's fault.
    #[error("port {port} already has a listener: drop that one first, or choose another port")]
    Taken {
        /// The port.
        port: u32,
    },
    /// Too many ports have listeners. The caller's fault.
    #[error("{0}: drop another listener's shard, or serve more than one service on a port")]
    TableFull(adit_engine::ListenError),
    /// The shard has ended.
    #[error("the shard has ended")]
    Gone,
}

impl From<adit_engine::ListenError> for ListenError {
    fn from(e: adit_engine::ListenError) -> Self {
        Self::TableFull(e)
    }
}

impl From<ListenError> for io::Error {
    fn from(e: ListenError) -> Self {
        let kind = match e {
            ListenError::Taken { .. } => io::ErrorKind::AddrInUse,
            ListenError::TableFull(_) => io::ErrorKind::Other,
            ListenError::Gone => io::ErrorKind::NotConnected,
        };
        Self::new(kind, e)
    }
}

/// A listener's queue of incoming streams, shared with the shard.
#[derive(Debug, Default)]
pub(crate) struct Accepting {
    state: Mutex<AcceptState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct AcceptState {
    listening: Option<Result<(), ListenError>>,
    waiting: VecDeque<Incoming>,
    closed: bool,
}

impl Accepting {
    fn lock(&self) -> MutexGuard<'_, AcceptState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, AcceptState>) -> MutexGuard<'a, AcceptState> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn listening(&self, result: Result<(), ListenError>) {
        self.lock().listening = Some(result);
        self.changed.notify_all();
    }

    /// Returns true if the listener still exists.
    pub(crate) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// Adds a stream to the queue. Returns false if no one will accept it.
    pub(crate) fn offer(&self, incoming: Incoming) -> bool {
        let mut state = self.lock();
        if state.closed || state.waiting.len() >= BACKLOG_MAX {
            drop(state);
            incoming.forget();
            return false;
        }
        state.waiting.push_back(incoming);
        self.changed.notify_one();
        true
    }

    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.changed.notify_all();
        drop(waiting);
    }
}

/// Accepts streams that the guest opens to one host port. After it is dropped, the guest is refused.
#[derive(Debug)]
pub struct Listener(Arc<Accepting>);

impl Handle {
    /// Listens on a host port for streams of the guest. A port has one listener at a time.
    ///
    /// # Errors
    /// The port has a listener, there are too many ports, or the shard has ended.
    pub fn listen(&self, port: u32) -> Result<Listener, ListenError> {
        let accepting = Arc::new(Accepting::default());
        let command = Command::Listen(self.port, port, accepting.clone());
        if !self.inbox.send(command) {
            return Err(ListenError::Gone);
        }
        let mut state = accepting.lock();
        while state.listening.is_none() && !state.closed {
            state = accepting.wait(state);
        }
        let listening = state.listening;
        drop(state);
        listening.ok_or(ListenError::Gone)??;
        Ok(Listener(accepting))
    }
}

impl Listener {
    /// Waits for the next stream.
    ///
    /// # Errors
    /// The shard has ended.
    pub fn accept(&self) -> io::Result<Incoming> {
        let mut state = self.0.lock();
        loop {
            if let Some(incoming) = state.waiting.pop_front() {
                return Ok(incoming);
            }
            if state.closed {
                return Err(io::ErrorKind::NotConnected.into());
            }
            state = self.0.wait(state);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A stream that the guest opens. Dropping it refuses the stream.
#[derive(Debug)]
pub struct Incoming {
    /// `None` after it was answered.
    handle: Option<Handle>,
    stream: StreamId,
    local_port: u32,
    peer_port: u32,
}

impl Incoming {
    pub(crate) fn new(handle: Handle, stream: StreamId, local_port: u32, peer_port: u32) -> Self {
        Self {
            handle: Some(handle),
            stream,
            local_port,
            peer_port,
        }
    }

    fn forget(mut self) {
        self.handle = None;
    }

    /// The host's port and the guest's own port.
    pub fn ports(&self) -> (u32, u32) {
        (self.local_port, self.peer_port)
    }

    /// Accepts the stream. If the guest gave up meanwhile, the first read returns that error.
    ///
    /// # Errors
    /// The shard has ended.
    pub fn accept(mut self) -> io::Result<Stream> {
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let handle = self.handle.take().ok_or_else(gone)?;
        let stream = Stream::new(handle);
        stream.local().lock().stream = Some(self.stream);
        let command = Command::Accept(stream.handle.port, self.stream, stream.end.clone());
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
            handle.inbox.send(Command::Refuse(handle.port, self.stream));
        }
    }
}
