//! Takes the frontend's messages from its socket so that a successor of this process can go on with the next one,
//! whenever this process is killed. Crate `vhost` reads a message in two calls and answers in a third; so it is given a
//! socket pair, and the frontend's own socket is read here.
//!
//! ```text
//! frontend ═► peek whole message ─► handle ─► hand state over ─► step Taking ─► take it ─► step Replying ─► reply ─► Idle
//! killed      ◄──────── it is read and handled again ────────────────────────► │ ◄───── the successor replies ─────► │
//! ```
//! - Handling a message twice is the same as once: all but GET_VRING_BASE only set something, and that one finds the
//!   rings stopped.
//! - *Was it taken?* A frontend waits for a reply that it has asked for, so a message with a reply was taken if nothing
//!   is left to read. Without a reply it does not matter.
//! - *Was the reply sent?* It is sent with `sendfile` from the live file, whose offset is shared with the successor's
//!   duplicate and moves in the same system call.
//! - What is left: a message whose pieces came one by one (no frontend in use does that) is taken piece by piece; one
//!   that changed something while nobody kept it (`aditd` was down). Then the successor says so and lets go.

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

use super::handler::Handler;
use super::handover::{Handover, HandoverError, Parts, REGIONS_MAX};
use super::memory;
use super::{Keeper, thread::Control};
use crate::live::{LiveFile, Reply, Step};

const HEADER_BYTES: usize = 12;
/// Bytes of a message's body at most, as crate `vhost` takes.
const BODY_MAX: usize = 4096;

/// Why no more messages are taken.
pub(super) enum Ended {
    /// The carrier asked for it.
    Stop,
    /// The frontend is gone, or not understood.
    Gone(Error),
}

impl From<Errno> for Ended {
    fn from(e: Errno) -> Self {
        Self::Gone(Error::SocketError(e.into()))
    }
}

/// A frontend cannot be taken over from a predecessor.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResumeError {
    #[error("{0}")]
    Handover(#[from] HandoverError),
    #[error(
        "it was killed while it took a message of the frontend that came in pieces: the rest cannot be told from the next"
    )]
    Pieces,
    #[error("the frontend changed {by} thing(s) that nobody kept")]
    Behind { by: u64 },
    #[error("the table it left makes no sense")]
    Table,
    #[error("the frontend's socket cannot be examined")]
    Socket(#[from] Errno),
    #[error("what the frontend had said is refused: {0}")]
    Refused(Error),
}

/// What outlives a process: the live file, and whoever keeps the rest.
pub(super) struct Estate {
    pub(super) live: Option<Arc<LiveFile>>,
    pub(super) keeper: Option<Box<dyn Keeper>>,
    pub(super) changes: u64,
}

impl Estate {
    fn step(&self, step: Step) {
        if let Some(live) = &self.live {
            live.set_step(step);
        }
    }

    /// Hands everything over; returns once it is kept.
    fn keep(&mut self, handler: &Handler, frontend: BorrowedFd<'_>) {
        let Some(keeper) = &mut self.keeper else {
            return;
        };
        match handler.handover(self.changes, frontend) {
            Ok(handover) => keeper.keep(Some(handover)),
            Err(e) => tracing::warn!(error = %e, "state not handed over"),
        }
    }

    /// The frontend is gone: there is nothing to go on with.
    pub(super) fn forget(&mut self) {
        self.step(Step::Idle);
        if let Some(keeper) = &mut self.keeper {
            keeper.keep(None);
        }
    }

    /// The frontend said what cannot be taken: whoever asks for the VM is told why.
    pub(super) fn refuse(&mut self, why: String) {
        if let Some(keeper) = &mut self.keeper {
            keeper.refused(why);
        }
    }

    /// The predecessor's frontend is of no use.
    pub(super) fn give_up(&mut self, why: String) {
        self.step(Step::Idle);
        if let Some(keeper) = &mut self.keeper {
            keeper.stuck(why);
        }
    }
}

struct Message {
    bytes: Vec<u8>,
    /// What the message may bring, and is.
    fds: Vec<OwnedFd>,
    /// What came with it, and does not belong to it: until it is taken, so that the socket does not close it.
    _others: Vec<Passed>,
    /// Not in the socket any more.
    taken: bool,
}

/// One frontend's connection. What its VMM passed may wait in it: it is closed apart.
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

    /// Goes on where a predecessor was killed.
    pub(super) fn resume(
        handover: Handover,
        handler: Arc<Mutex<Handler>>,
        estate: &mut Estate,
    ) -> Result<Self, ResumeError> {
        let parts = handover.parse()?;
        let frontend = parts.frontend.try_clone().map_err(HandoverError::Io)?;
        let frontend = frontend.unix_stream().map_err(HandoverError::Io)?;
        let live = estate.live.clone().ok_or(ResumeError::Table)?;
        let unsent = examine(&live, &parts)?;
        estate.changes = parts.record.changes;
        live.set_changes(estate.changes);
        let mut intake = Self::new(frontend, handler).map_err(HandoverError::Io)?;
        // What the crate itself remembers of the negotiation.
        let said = [
            (FrontendReq::GET_FEATURES, None),
            (
                FrontendReq::SET_PROTOCOL_FEATURES,
                parts.record.protocol_features,
            ),
            (FrontendReq::SET_FEATURES, parts.record.features),
        ];
        for (code, value) in said {
            if code == FrontendReq::GET_FEATURES || value.is_some() {
                intake
                    .say_again(code, value)
                    .map_err(ResumeError::Refused)?;
            }
        }
        let resumed = intake.handler().resume(parts);
        resumed.map_err(ResumeError::Refused)?;
        if let Some(reply) = unsent {
            // A frontend that has gone meanwhile is noticed at once.
            let _ = send_from(&live, &intake.frontend, reply);
        }
        live.set_step(Step::Idle);
        estate.keep(&intake.handler(), intake.frontend.as_fd());
        Ok(intake)
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.frontend
    }

    fn handler(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes and handles one message.
    pub(super) fn step(&mut self, control: &Control, estate: &mut Estate) -> Result<(), Ended> {
        let message = self.next(control, estate)?;
        forward(&self.inner, &message)?;
        let handled = self.requests.handle_request();
        let reply = self.reply()?;
        let changed = self.handler().handled();
        if let Err(e) = handled {
            let _ = send(self.frontend.as_raw_fd(), &reply, MsgFlags::MSG_NOSIGNAL);
            return Err(Ended::Gone(e));
        }
        if changed {
            estate.changes += 1;
            estate.keep(&self.handler(), self.frontend.as_fd());
        }
        let Some(live) = estate.live.clone() else {
            self.take(&message)?;
            return send_all(&self.frontend, &reply);
        };
        let io = |e: std::io::Error| Ended::Gone(Error::SocketError(e));
        let written = live.write_reply(&reply).map_err(io)?;
        if let Some(reply) = written {
            lseek(live.as_fd(), reply.at as i64, Whence::SeekSet)?;
        }
        live.set_changes(estate.changes);
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

    /// Waits for a message and returns it, still in the socket if it came in one piece.
    fn next(&self, control: &Control, estate: &Estate) -> Result<Message, Ended> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        loop {
            self.wait(control)?;
            let mut head = [0; HEADER_BYTES];
            match recv(self.frontend.as_raw_fd(), &mut head, flags) {
                Ok(0) => return Err(Ended::Gone(Error::Disconnected)),
                Ok(HEADER_BYTES) => {}
                Ok(_) => return self.pieces(control, estate),
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
                // Nothing is lost: it is still there when a tunnel has ended.
                tracing::warn!("no descriptors left for what the VMM passes: it waits");
                control.pause()?;
                continue;
            }
            if got.bytes == bytes.len() {
                return self.admit(bytes, got.fds, false);
            }
            return self.pieces(control, estate);
        }
    }

    /// Takes a message that is not there in one piece, as it comes.
    fn pieces(&self, control: &Control, estate: &Estate) -> Result<Message, Ended> {
        estate.step(Step::Pieces);
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

    /// Takes of what came with a message what it may bring, if it is that. Crate `vhost` closes descriptors wherever it is,
    /// and nobody may wait for a file's server there.
    fn admit(&self, bytes: Vec<u8>, mut fds: Vec<Passed>, taken: bool) -> Result<Message, Ended> {
        let (what, count) = descriptors_of(&bytes);
        // A peek at a message without descriptors looks on and shows those of the next one (Linux up to 6.18).
        let others = fds.split_off(fds.len().min(count));
        let refused = |e: Box<dyn std::error::Error + Send + Sync>| {
            let e = std::io::Error::new(std::io::ErrorKind::InvalidInput, e);
            Ended::Gone(Error::ReqHandlerError(e))
        };
        let fds = match what {
            Some(Brings::Memory) => {
                let policy = self.handler().policy();
                let files = memory::take(fds, policy).map_err(|e| refused(e.into()))?;
                files.into_iter().map(OwnedFd::from).collect()
            }
            Some(Brings::Doorbell(what)) => {
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
            tracing::warn!("what the VMM passed cannot be closed: no more is taken from it");
            return Err(Errno::EMFILE);
        }
        let got = adit_passed::receive(&self.frontend, bytes, flags, &closer);
        got.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }

    /// Takes the message that was peeked at out of the socket, in one call.
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

    /// What the crate answered, if anything.
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

    /// Lets the crate handle a message that the predecessor had handled; the answer was given then.
    fn say_again(&mut self, code: FrontendReq, value: Option<u64>) -> Result<(), Error> {
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

/// Judges what a predecessor left; returns the reply that it owed the frontend, or the rest of it.
fn examine(live: &LiveFile, parts: &Parts) -> Result<Option<Reply>, ResumeError> {
    let step = live.step().ok_or(ResumeError::Table)?;
    let unread = rustix::io::ioctl_fionread(&parts.frontend)
        .map_err(|e| Errno::from_raw(e.raw_os_error()))?;
    let not_taken =
        step == Step::Idle || (step == Step::Taking && live.reply().is_some() && unread > 0);
    let by = live.changes().saturating_sub(parts.record.changes);
    match step {
        Step::Pieces => return Err(ResumeError::Pieces),
        // The last change is in a message that is read again.
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

/// What a message may bring.
enum Brings {
    Memory,
    Doorbell(&'static str),
}

/// Which descriptors come with a message, and how many, as it says itself.
fn descriptors_of(message: &[u8]) -> (Option<Brings>, usize) {
    let word = |at: usize| {
        let bytes = message.get(at..at + 4).and_then(|b| b.first_chunk());
        bytes.map_or(0, |b| u32::from_ne_bytes(*b))
    };
    // VHOST_USER_VRING_NOFD_MASK
    const NO_FD: u32 = 1 << 8;
    let what = match FrontendReq::try_from(word(0)) {
        Ok(FrontendReq::SET_MEM_TABLE) => {
            return (Some(Brings::Memory), word(HEADER_BYTES) as usize);
        }
        Ok(FrontendReq::SET_VRING_KICK) => "kick",
        Ok(FrontendReq::SET_VRING_CALL) => "call",
        Ok(FrontendReq::SET_VRING_ERR) => "error",
        // What else may come with one is not supported.
        _ => return (None, 0),
    };
    let count = usize::from(word(HEADER_BYTES) & NO_FD == 0);
    (Some(Brings::Doorbell(what)), count)
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
    // Far below what the socket takes, which is empty.
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

/// Sends a reply from where the file's offset stands.
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
