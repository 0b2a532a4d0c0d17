//! Takes the frontend's messages from its socket in such a way that a successor process can continue with the next
//! message, whenever this process is killed. Crate `vhost` reads a message in two calls and answers in a third. So
//! `vhost` gets a socket pair, and this module reads the frontend's own socket.
//!
//! ```text
//! frontend ═► peek whole message ─► handle ─► hand state over ─► step Taking ─► take it ─► step Replying ─► reply ─► Idle
//! killed      ◄──────── it is read and handled again ────────────────────────► │ ◄───── the successor replies ─────► │
//! ```
//! - Handling a message twice has the same result as once. All messages except GET_VRING_BASE only set a value, and at
//!   the second GET_VRING_BASE the vrings are already stopped.
//! - *Was it taken?* A frontend waits for a reply that it has asked for. So a message with a reply was taken if the
//!   socket is empty. Without a reply it does not matter.
//! - *Was the reply sent?* It is sent with `sendfile` from the live file. The file offset is shared with the
//!   successor's duplicate, and it moves in the same system call.
//! - Two cases remain. A message whose pieces arrive separately (no known frontend does that) is taken piece by piece.
//!   And a change may have been made while nothing could store it (`aditd` was down). In both cases the successor
//!   reports the error and closes the connection.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adit_passed::{Apart, Closer, Passed, Received};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::unistd::{Whence, lseek};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::Keeper;
use super::control::Control;
use super::handler::Handler;
use super::handover::{Handover, HandoverError, Parts, REGIONS_MAX};
use super::memory;
use crate::live::{LiveFile, Reply, Step};

const HEADER_BYTES: usize = 12;
/// Maximum length of a message's body in bytes: the limit of crate `vhost`.
const BODY_MAX: usize = 4096;

/// Why no more messages are taken.
pub(super) enum Ended {
    /// The carrier asked the thread to stop.
    Stop,
    /// The frontend closed the connection, or sent something invalid.
    Gone(Error),
}

impl From<Errno> for Ended {
    fn from(e: Errno) -> Self {
        Self::Gone(Error::SocketError(e.into()))
    }
}

/// Why the frontend of a predecessor cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResumeError {
    #[error("{0}")]
    Handover(#[from] HandoverError),
    #[error(
        "the predecessor was killed while it took a message of the frontend in pieces: the rest cannot be distinguished from the next message"
    )]
    Pieces,
    #[error("the frontend made {by} change(s) that nobody kept for a successor")]
    Behind { by: u64 },
    #[error("the live file of the predecessor is invalid")]
    Table,
    #[error("cannot examine the frontend's socket")]
    Socket(#[from] Errno),
    #[error("the stored state of the frontend is refused: {0}")]
    Refused(Error),
}

/// The state that survives this process: the live file, and the keeper of the handover.
pub(super) struct Continuity {
    pub(super) live: Option<Arc<LiveFile>>,
    pub(super) keeper: Option<Box<dyn Keeper>>,
    pub(super) changes: u64,
}

impl Continuity {
    fn step(&self, step: Step) {
        if let Some(live) = &self.live {
            live.set_step(step);
        }
    }

    /// Passes the whole state to the keeper. Returns when it is stored.
    fn keep(&mut self, handler: &Handler, frontend: BorrowedFd<'_>) {
        let Some(keeper) = &mut self.keeper else {
            return;
        };
        match handler.handover(self.changes, frontend) {
            Ok(handover) => keeper.keep(Some(handover)),
            Err(e) => tracing::warn!(error = %e, "cannot hand the state over"),
        }
    }

    /// The frontend is gone, so a successor has nothing to continue with.
    pub(super) fn forget(&mut self) {
        self.step(Step::Idle);
        if let Some(keeper) = &mut self.keeper {
            keeper.keep(None);
        }
    }

    /// The frontend sent something invalid. Reports the reason to the keeper, which shows it to users of the VM.
    pub(super) fn refuse(&mut self, why: String) {
        if let Some(keeper) = &mut self.keeper {
            keeper.refused(why);
        }
    }

    /// The predecessor's frontend cannot be used.
    pub(super) fn give_up(&mut self, why: String) {
        self.step(Step::Idle);
        if let Some(keeper) = &mut self.keeper {
            keeper.stuck(why);
        }
    }
}

struct Message {
    bytes: Vec<u8>,
    /// The message's own descriptors, of the kind that it may have.
    fds: Vec<OwnedFd>,
    /// Descriptors that arrived with it but do not belong to it. They are kept until the message is taken, so that
    /// taking it does not close them.
    _others: Vec<Passed>,
    /// The message is no longer in the socket.
    taken: bool,
}

/// One frontend's connection. Descriptors from its VMM may wait in the socket, so a closer closes it.
pub(super) struct Intake {
    frontend: Apart<UnixStream>,
    /// The other end of the socket that `requests` reads.
    inner: UnixStream,
    requests: BackendReqHandler<Mutex<Handler>>,
    handler: Arc<Mutex<Handler>>,
}

impl Intake {
    pub(super) fn new(
        frontend: Apart<UnixStream>,
        handler: Arc<Mutex<Handler>>,
    ) -> std::io::Result<Self> {
        let (inner, theirs) = UnixStream::pair()?;
        Ok(Self {
            frontend,
            inner,
            requests: BackendReqHandler::from_stream(theirs, handler.clone()),
            handler,
        })
    }

    /// Continues where a predecessor was killed.
    pub(super) fn resume(
        handover: Handover,
        handler: Arc<Mutex<Handler>>,
        continuity: &mut Continuity,
    ) -> Result<Self, ResumeError> {
        let parts = handover.parse()?;
        let frontend = parts.frontend.try_clone().map_err(HandoverError::Io)?;
        let frontend = frontend.unix_stream().map_err(HandoverError::Io)?;
        let live = continuity.live.clone().ok_or(ResumeError::Table)?;
        let unsent = examine(&live, &parts)?;
        continuity.changes = parts.record.changes;
        live.set_changes(continuity.changes);
        let mut intake = Self::new(frontend, handler).map_err(HandoverError::Io)?;
        // Crate `vhost` stores these parts of the negotiation itself.
        let replayed = [
            (FrontendReq::GET_FEATURES, None),
            (
                FrontendReq::SET_PROTOCOL_FEATURES,
                parts.record.protocol_features,
            ),
            (FrontendReq::SET_FEATURES, parts.record.features),
        ];
        for (code, value) in replayed {
            if code == FrontendReq::GET_FEATURES || value.is_some() {
                intake.replay(code, value).map_err(ResumeError::Refused)?;
            }
        }
        let resumed = intake.handler().resume(parts);
        resumed.map_err(ResumeError::Refused)?;
        if let Some(reply) = unsent {
            // If the frontend has gone meanwhile, the next read will show it.
            let _ = send_from(&live, &intake.frontend, reply);
        }
        live.set_step(Step::Idle);
        continuity.keep(&intake.handler(), intake.frontend.as_fd());
        Ok(intake)
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.frontend
    }

    fn handler(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes and handles one message.
    pub(super) fn step(
        &mut self,
        control: &Control,
        continuity: &mut Continuity,
    ) -> Result<(), Ended> {
        let message = self.next(control, continuity)?;
        forward(&self.inner, &message)?;
        let handled = self.requests.handle_request();
        let reply = self.reply()?;
        let changed = self.handler().handled();
        if let Err(e) = handled {
            let _ = send(self.frontend.as_raw_fd(), &reply, MsgFlags::MSG_NOSIGNAL);
            return Err(Ended::Gone(e));
        }
        if changed {
            continuity.changes += 1;
            continuity.keep(&self.handler(), self.frontend.as_fd());
        }
        let Some(live) = continuity.live.clone() else {
            self.take(&message)?;
            return send_all(&self.frontend, &reply);
        };
        let io = |e: std::io::Error| Ended::Gone(Error::SocketError(e));
        let written = live.write_reply(&reply).map_err(io)?;
        if let Some(reply) = written {
            lseek(live.as_fd(), reply.at as i64, Whence::SeekSet)?;
        }
        live.set_changes(continuity.changes);
        live.set_step(Step::Taking);
        self.take(&message)?;
        live.set_step(Step::Replying);
        match written {
            Some(reply) => send_from(&live, &self.frontend, reply)?,
            None => send_all(&self.frontend, &reply)?,
        }
        live.set_step(Step::Idle);
        Ok(())
    }

    /// Waits for a message and returns it. A message that arrived in one piece is still in the socket.
    fn next(&self, control: &Control, continuity: &Continuity) -> Result<Message, Ended> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        loop {
            self.wait(control)?;
            let mut head = [0; HEADER_BYTES];
            match recv(self.frontend.as_raw_fd(), &mut head, flags) {
                Ok(0) => return Err(Ended::Gone(Error::Disconnected)),
                Ok(HEADER_BYTES) => {}
                Ok(_) => return self.pieces(control, continuity),
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            }
            let mut bytes = vec![0; HEADER_BYTES + body_len(&head)?];
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let got = match self.receive(&mut bytes, peek) {
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                received => received?,
            };
            if got.table_full {
                // Nothing is lost. The message stays in the socket until descriptors are free, for example when a
                // tunnel ends.
                tracing::warn!(
                    "no free descriptors for those that the VMM passes: its message waits"
                );
                if !control.pause() {
                    return Err(Ended::Stop);
                }
                continue;
            }
            if got.bytes == bytes.len() {
                return self.admit(bytes, got.fds, false);
            }
            return self.pieces(control, continuity);
        }
    }

    /// Takes a message that did not arrive in one piece, piece by piece.
    fn pieces(&self, control: &Control, continuity: &Continuity) -> Result<Message, Ended> {
        continuity.step(Step::Pieces);
        let (mut bytes, mut fds) = (vec![0; HEADER_BYTES], Vec::new());
        let mut len = 0;
        loop {
            if len == bytes.len() {
                let body = match bytes.first_chunk() {
                    Some(head) if len == HEADER_BYTES => body_len(head)?,
                    _ => 0,
                };
                if body == 0 {
                    break;
                }
                bytes.resize(HEADER_BYTES + body, 0);
            }
            self.wait(control)?;
            let got = match self.receive(&mut bytes[len..], RecvFlags::DONTWAIT) {
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                received => received?,
            };
            if got.table_full {
                return Err(Errno::EMFILE.into());
            }
            if got.bytes == 0 {
                return Err(Ended::Gone(Error::Disconnected));
            }
            len += got.bytes;
            fds.extend(got.fds);
            if fds.len() > REGIONS_MAX {
                return Err(Ended::Gone(Error::IncorrectFds));
            }
        }
        self.admit(bytes, fds, true)
    }

    /// Checks the descriptors of a message, and converts those that it may have. Crate `vhost` would close the others
    /// on this thread, where a close must not block on a file server.
    fn admit(&self, bytes: Vec<u8>, mut fds: Vec<Passed>, taken: bool) -> Result<Message, Ended> {
        let (what, count) = descriptors_of(&bytes);
        // A peek at a message without descriptors also returns the descriptors of the next message (Linux up to 6.18).
        let others = fds.split_off(fds.len().min(count));
        let refused = |e: Box<dyn std::error::Error + Send + Sync>| {
            let e = std::io::Error::new(std::io::ErrorKind::InvalidInput, e);
            Ended::Gone(Error::ReqHandlerError(e))
        };
        let fds = match what {
            Some(FdKind::Memory) => {
                let policy = self.handler().policy();
                let files = memory::take(fds, policy).map_err(|e| refused(e.into()))?;
                files.into_iter().map(OwnedFd::from).collect()
            }
            Some(FdKind::Doorbell(what)) => {
                let bells = fds.into_iter().map(Passed::eventfd);
                let bells = bells.collect::<std::io::Result<_>>();
                bells.map_err(|e| refused(format!("{what} descriptor: {e}").into()))?
            }
            None => vec![],
        };
        Ok(Message {
            bytes,
            fds,
            _others: others,
            taken,
        })
    }

    fn wait(&self, control: &Control) -> Result<(), Ended> {
        let mut fds = [
            PollFd::new(control.stop_event(), PollFlags::POLLIN),
            PollFd::new(self.frontend.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            _ if control.stopping() => Err(Ended::Stop),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn receive(&self, bytes: &mut [u8], flags: RecvFlags) -> Result<Received, Errno> {
        let closer = Closer::shared();
        if closer.stays_full() {
            tracing::warn!("descriptors that the VMM passed cannot be closed: the VMM is cut off");
            return Err(Errno::EMFILE);
        }
        let got = adit_passed::receive(&self.frontend, bytes, flags, &closer);
        got.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }

    /// Takes the message that was peeked at out of the socket, with one call.
    fn take(&self, message: &Message) -> Result<(), Ended> {
        if message.taken {
            return Ok(());
        }
        let mut scratch = vec![0; message.bytes.len()];
        let mut len = 0;
        while len < scratch.len() {
            match recv(
                self.frontend.as_raw_fd(),
                &mut scratch[len..],
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(0) => return Err(Ended::Gone(Error::Disconnected)),
                Ok(n) => len += n,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// The answer of crate `vhost`, if there is one.
    fn reply(&self) -> Result<Vec<u8>, Ended> {
        let (mut reply, mut buf) = (Vec::new(), [0; HEADER_BYTES + BODY_MAX]);
        loop {
            match recv(self.inner.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(reply),
                Ok(n) => reply.extend_from_slice(&buf[..n]),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Replays a message that the predecessor handled, so that crate `vhost` knows it. Its answer was sent then, and
    /// is dropped.
    fn replay(&mut self, code: FrontendReq, value: Option<u64>) -> Result<(), Error> {
        let body = value.map_or(vec![], |v| v.to_le_bytes().to_vec());
        let words = [code as u32, 1, body.len() as u32]; // flags: version 1
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend(body);
        let message = Message {
            bytes,
            fds: vec![],
            _others: vec![],
            taken: true,
        };
        let ended = |e| match e {
            Ended::Gone(e) => e,
            Ended::Stop => Error::Disconnected,
        };
        forward(&self.inner, &message).map_err(ended)?;
        self.requests.handle_request()?;
        self.reply().map_err(ended).map(drop)
    }
}

/// Checks the state that a predecessor left. Returns the reply that it still owed the frontend, or the rest of it.
fn examine(live: &LiveFile, parts: &Parts) -> Result<Option<Reply>, ResumeError> {
    let step = live.step().ok_or(ResumeError::Table)?;
    let unread = rustix::io::ioctl_fionread(&parts.frontend)
        .map_err(|e| Errno::from_raw(e.raw_os_error()))?;
    let not_taken =
        step == Step::Idle || (step == Step::Taking && live.reply().is_some() && unread > 0);
    let by = live.changes().saturating_sub(parts.record.changes);
    match step {
        Step::Pieces => return Err(ResumeError::Pieces),
        // The last change comes from a message that will be read again.
        _ if by == 0 || (by == 1 && step == Step::Taking && not_taken) => {}
        _ => return Err(ResumeError::Behind { by }),
    }
    let Some(reply) = live.reply().filter(|_| !not_taken) else {
        return Ok(None);
    };
    let at = lseek(live.as_fd(), 0, Whence::SeekCur)?;
    let at = u64::try_from(at).unwrap_or(0);
    let end = reply.at + reply.len;
    Ok((reply.at..end)
        .contains(&at)
        .then(|| Reply { at, len: end - at }))
}

fn body_len(head: &[u8; HEADER_BYTES]) -> Result<usize, Ended> {
    let [.., a, b, c, d] = *head;
    match u32::from_ne_bytes([a, b, c, d]) as usize {
        len if len <= BODY_MAX => Ok(len),
        _ => Err(Ended::Gone(Error::InvalidMessage)),
    }
}

/// The kind of descriptors that a message may have.
enum FdKind {
    Memory,
    Doorbell(&'static str),
}

/// The kind and number of descriptors that a message has, according to its own bytes.
fn descriptors_of(message: &[u8]) -> (Option<FdKind>, usize) {
    let word = |at: usize| {
        let bytes = message.get(at..at + 4).and_then(|b| b.first_chunk());
        bytes.map_or(0, |b| u32::from_ne_bytes(*b))
    };
    // VHOST_USER_VRING_NOFD_MASK
    const NO_FD: u32 = 1 << 8;
    let what = match FrontendReq::try_from(word(0)) {
        Ok(FrontendReq::SET_MEM_TABLE) => {
            return (Some(FdKind::Memory), word(HEADER_BYTES) as usize);
        }
        Ok(FrontendReq::SET_VRING_KICK) => "kick",
        Ok(FrontendReq::SET_VRING_CALL) => "call",
        Ok(FrontendReq::SET_VRING_ERR) => "error",
        // Other messages with descriptors are not supported.
        _ => return (None, 0),
    };
    let count = usize::from(word(HEADER_BYTES) & NO_FD == 0);
    (Some(FdKind::Doorbell(what)), count)
}

fn forward(inner: &UnixStream, message: &Message) -> Result<(), Ended> {
    if message.fds.len() > REGIONS_MAX {
        return Err(Ended::Gone(Error::IncorrectFds));
    }
    let fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    // The message is much smaller than the buffer of this socket, which is empty.
    let iov = [IoSlice::new(&message.bytes)];
    let sent = sendmsg(inner, &iov, &mut control, SendFlags::NOSIGNAL)
        .map_err(|e| Errno::from_raw(e.raw_os_error()))?;
    match sent == message.bytes.len() {
        true => Ok(()),
        false => Err(Ended::Gone(Error::PartialMessage)),
    }
}

fn send_all(socket: &UnixStream, mut bytes: &[u8]) -> Result<(), Ended> {
    while !bytes.is_empty() {
        match send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Sends a reply, starting at the present file offset.
fn send_from(live: &LiveFile, socket: &UnixStream, reply: Reply) -> Result<(), Ended> {
    let mut left = reply.len as usize;
    while left > 0 {
        match rustix::fs::sendfile(socket, live, None, left) {
            Ok(0) => return Err(Ended::Gone(Error::PartialMessage)),
            Ok(n) => left = left.saturating_sub(n),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Errno::from_raw(e.raw_os_error()).into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
