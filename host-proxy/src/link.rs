//! aditd's end of a VM's control socket: dials, status.
//!
//! One task a VM reads and writes the socket; everybody else holds a [`Link`], asks, and awaits the answer. A link ends
//! when its port process or its connection does; what was asked and not answered ends with it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_passed::{Closer, Passed};
use adit_port::control::{
    Accepted, BegunAnew, DIALS_MAX, DialError, DialFailed, Dialed, EndTunnels, Ends, EndsTaken,
    FEATURE_ACCEPTED, FEATURE_CONNECT, FEATURE_ENDS, FEATURE_KEY, FEATURE_LIMITS, FEATURE_TUNNELS,
    Handover, Incoming, Kept, Key, Limit, ListTunnels, Quit, Release, Ring, SetLimits, Status,
    Tunnels, Way,
};
use adit_port::control_io::{ControlError, Message, receive_passed, send};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::passing;
use dial::{failed, gone};

mod dial;

pub use dial::{Asks, ClientEnd, ClientSocket, Question, Unopened};

/// How long descriptors that the port process passed may take to be closed before it is given up.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// How often that is checked.
const CLOSE_LOOK: Duration = Duration::from_millis(2);
/// How long frames of a port process that has gone are read for.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);
/// How long a port process may take to list its tunnels.
const LIST_LIMIT: Duration = Duration::from_secs(5);
/// Most frames that wait to be sent to a port process.
const OUTBOX_MAX: usize = 2 * DIALS_MAX;

/// A dial under way.
#[derive(Debug)]
struct Waiting {
    tell: oneshot::Sender<Result<Dialed, DialFailed>>,
    /// A frame with the client's end, until it is sent. It is not in the outbox, so that it ends with the dial: a port process
    /// that reads nothing holds no descriptor of a client that is gone.
    passing: Option<(Message, OwnedFd)>,
}

impl Waiting {
    fn new(tell: oneshot::Sender<Result<Dialed, DialFailed>>) -> Self {
        let passing = None;
        Self { tell, passing }
    }
}

/// What is to be sent.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // nearly all of them are the large one, and are moved once
enum Frame {
    Plain(Message),
    /// What this dial has to pass.
    Passing(u64),
    /// What a guest has dialled.
    Accepted(Accepted, OwnedFd),
}

/// A connected port process.
#[derive(Debug)]
pub struct Link {
    /// Of the descriptors that the port process passes.
    closer: Closer,
    outbox: mpsc::Sender<Frame>,
    waiting: Mutex<HashMap<u64, Waiting>>,
    next_id: AtomicU64,
    /// The port process has [`FEATURE_CONNECT`].
    connects: AtomicBool,
    /// The port process has [`FEATURE_TUNNELS`].
    lists: AtomicBool,
    /// The port process has [`FEATURE_ENDS`].
    tells_ends: AtomicBool,
    /// The port process has [`FEATURE_LIMITS`].
    limits: AtomicBool,
    /// The port process has [`FEATURE_KEY`].
    takes_keys: AtomicBool,
    /// The port process has [`FEATURE_ACCEPTED`].
    takes_accepted: AtomicBool,
    /// Who waits for a page of tunnels.
    listing: Mutex<Option<oneshot::Sender<Tunnels>>>,
    status: watch::Sender<Option<Status>>,
}

/// What a port process says without being asked.
#[derive(Debug)]
pub enum Said<'a> {
    /// State of the channel.
    Status(&'a Status),
    /// The guest has dialled.
    Incoming(Incoming, Passed),
    /// What a successor needs; [`Link::kept`] tells that it is kept.
    Handover(Handover, Vec<Passed>),
    /// State of the VM's ring.
    Ring(Ring),
    /// Which way to the guest it has chosen.
    Way(Way),
    /// The VMM has no channel until it connects anew, and why; empty: it has.
    Stuck(String),
    /// Tunnels have ended; [`Link::ends_taken`] has the next ones told.
    Ends(Ends),
    /// It is the VM's VMM itself.
    Held,
}

impl Link {
    /// Makes the link and the loop that drives it; `incoming` gets what the guest dials.
    pub fn new(closer: &Closer) -> (Arc<Self>, Driver) {
        let (outbox, inbox) = mpsc::channel(OUTBOX_MAX);
        let link = Arc::new(Self {
            closer: closer.clone(),
            outbox,
            waiting: Mutex::default(),
            next_id: AtomicU64::new(1),
            connects: AtomicBool::new(false),
            lists: AtomicBool::new(false),
            tells_ends: AtomicBool::new(false),
            limits: AtomicBool::new(false),
            takes_keys: AtomicBool::new(false),
            takes_accepted: AtomicBool::new(false),
            listing: Mutex::default(),
            status: watch::Sender::new(None),
        });
        (link.clone(), Driver { link, inbox })
    }

    /// What the port process said last.
    pub fn status(&self) -> Option<Status> {
        self.status.borrow().clone()
    }

    /// Wakes up when the port process says something new.
    pub fn watch(&self) -> watch::Receiver<Option<Status>> {
        self.status.subscribe()
    }

    /// What closes descriptors that the port process has, or has had.
    pub fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Ends the port process.
    pub async fn quit(&self) {
        let _ = self.outbox.send(Frame::Plain(Message::Quit(Quit {}))).await;
    }

    /// Ends the port process; its frontend stays for a successor.
    pub async fn release(&self) {
        let release = Message::Release(Release {});
        let _ = self.outbox.send(Frame::Plain(release)).await;
    }

    /// Whether the port process lists its tunnels: an older build does not.
    pub fn lists_tunnels(&self) -> bool {
        self.lists.load(Ordering::Relaxed)
    }

    /// The tunnels with a tag behind a number; one asks at a time. None: the port process has gone, or does not answer.
    pub async fn tunnels(&self, after: u64) -> Option<Tunnels> {
        let (tell, told) = oneshot::channel();
        *self.listing() = Some(tell);
        let ask = Message::ListTunnels(ListTunnels { after });
        self.outbox.send(Frame::Plain(ask)).await.ok()?;
        let told = tokio::time::timeout(LIST_LIMIT, told).await;
        told.ok()?.ok().filter(|page| page.after == after)
    }

    /// Breaks tunnels off.
    pub async fn end_tunnels(&self, numbers: Vec<u64>) {
        let end = Message::EndTunnels(EndTunnels { numbers });
        let _ = self.outbox.send(Frame::Plain(end)).await;
    }

    /// Whether the port process limits the bytes of tunnels: an older build does not.
    pub fn limits(&self) -> bool {
        self.limits.load(Ordering::Relaxed)
    }

    /// Replaces the limits of tunnels, at most [`LIMITED_MAX`](adit_port::control::LIMITED_MAX) of them.
    pub async fn set_limits(&self, tunnels: Vec<(u64, Vec<Limit>)>) {
        let set = Message::SetLimits(SetLimits { tunnels });
        let _ = self.outbox.send(Frame::Plain(set)).await;
    }

    /// Has every hello from now on carry the MAC of a key, or of none. Returns false if the port process is of an older build, or
    /// has gone.
    pub async fn set_key(&self, key: Option<[u8; 32]>) -> bool {
        let key = Frame::Plain(Message::Key(Key { key }));
        self.takes_keys.load(Ordering::Relaxed) && self.outbox.send(key).await.is_ok()
    }

    /// Passes a stream that the guest has dialled. Returns false if the port process is of an older build or serves the VM by another
    /// way, has gone, or reads nothing: then the stream is closed.
    pub fn accepted(&self, accepted: Accepted, socket: OwnedFd) -> bool {
        let frame = Frame::Accepted(accepted, socket);
        self.takes_accepted.load(Ordering::Relaxed) && self.outbox.try_send(frame).is_ok()
    }

    /// Has all streams end that are older than this one, which the guest has dialled.
    pub fn begun_anew(&self, port: u32, guest_port: u32) {
        let anew = Message::BegunAnew(BegunAnew { port, guest_port });
        // If there is no room it does not read, and nothing of its streams gets anywhere.
        if self.takes_accepted.load(Ordering::Relaxed) {
            let _ = self.outbox.try_send(Frame::Plain(anew));
        }
    }

    /// Whether the port process tells how tunnels end: an older build does not.
    pub fn tells_ends(&self) -> bool {
        self.tells_ends.load(Ordering::Relaxed)
    }

    /// Tells the port process that the ends of tunnels with this number are noted.
    pub fn ends_taken(&self, seq: u64) {
        // If there is no room it does not read, and tells them to the next aditd.
        let taken = Message::EndsTaken(EndsTaken { seq });
        let _ = self.outbox.try_send(Frame::Plain(taken));
    }

    fn listing(&self) -> MutexGuard<'_, Option<oneshot::Sender<Tunnels>>> {
        self.listing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the port process that its handover is kept.
    pub fn kept(&self, seq: u64) {
        // If there is no room it does not read, and its frontend goes on after a while.
        let kept = Message::Kept(Kept { seq });
        let _ = self.outbox.try_send(Frame::Plain(kept));
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The loop of a link.
pub struct Driver {
    link: Arc<Link>,
    inbox: mpsc::Receiver<Frame>,
}

impl Driver {
    /// Runs on a connected socket, until the port process closes the connection or breaks the protocol.
    ///
    /// # Errors
    /// The socket failed, or a frame is invalid.
    pub async fn run(
        mut self,
        socket: OwnedFd,
        mut on: impl FnMut(Said<'_>),
    ) -> Result<(), ControlError> {
        // Only its readiness is tokio's: packets go through `control_io`, whatever the type of the socket.
        let closer = &self.link.closer;
        let socket = passing::Socket::new(socket.into(), closer)?;
        let socket = socket.stream();
        let inbox = &mut self.inbox;
        let link = &self.link;
        let write = async {
            while let Some(frame) = inbox.recv().await {
                // Each packet is sent whole or not at all.
                let send = |sock: BorrowedFd<'_>| link.send(sock, &frame);
                match when_ready(socket, Interest::WRITABLE, send).await {
                    Ok(()) => {}
                    Err(ControlError::Io(e)) if in_flight_full(&e) => link.not_passed(&frame),
                    Err(ControlError::Io(e)) => {
                        // It has gone, and what it said before is still read.
                        inbox.close();
                        tokio::time::sleep(LAST_WORDS_LIMIT).await;
                        return Err(e.into());
                    }
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        };
        let read = async {
            loop {
                // Many descriptors at once take a while to be closed: no more are received meanwhile.
                let begin = Instant::now();
                while closer.is_full() && begin.elapsed() < CLOSE_LIMIT {
                    tokio::time::sleep(CLOSE_LOOK).await;
                }
                let receive = |sock: BorrowedFd<'_>| receive_passed(sock, closer);
                let (message, mut fds) = match when_ready(socket, Interest::READABLE, receive).await
                {
                    Ok(Some(received)) => received,
                    Ok(None) => {
                        link.all_failed();
                        break;
                    }
                    // It closed with frames of ours unread. The kernel says so once, ahead of the frames that it sent.
                    Err(ControlError::Io(e)) if e.kind() == io::ErrorKind::ConnectionReset => {
                        continue;
                    }
                    // That stream of the guest is lost, and nothing else.
                    Err(ControlError::NoDescriptors { message })
                        if matches!(*message, Message::Incoming(_)) =>
                    {
                        tracing::warn!("no descriptor left for a stream that a guest dialled");
                        continue;
                    }
                    Err(e) => return Err(e),
                };
                match (message, fds.len()) {
                    (Message::Status(status), _) => {
                        on(Said::Status(&status));
                        link.status.send_replace(Some(status));
                    }
                    (Message::Incoming(incoming), 1) => {
                        on(Said::Incoming(incoming, fds.remove(0)));
                    }
                    (Message::Handover(handover), _) => on(Said::Handover(handover, fds)),
                    (Message::Ring(ring), _) => on(Said::Ring(ring)),
                    (Message::Way(way), _) => on(Said::Way(way)),
                    (Message::Ends(ends), _) => on(Said::Ends(ends)),
                    (Message::Stuck(stuck), _) => on(Said::Stuck(stuck.reason)),
                    (Message::Held(_), _) => on(Said::Held),
                    (Message::Features(features), _) => {
                        let connects = features.bits & FEATURE_CONNECT != 0;
                        link.connects.store(connects, Ordering::Relaxed);
                        let lists = features.bits & FEATURE_TUNNELS != 0;
                        link.lists.store(lists, Ordering::Relaxed);
                        let tells = features.bits & FEATURE_ENDS != 0;
                        link.tells_ends.store(tells && lists, Ordering::Relaxed);
                        let limits = features.bits & FEATURE_LIMITS != 0;
                        link.limits
                            .store(limits && tells && lists, Ordering::Relaxed);
                        let takes_keys = features.bits & FEATURE_KEY != 0;
                        link.takes_keys.store(takes_keys, Ordering::Relaxed);
                        let accepted = features.bits & FEATURE_ACCEPTED != 0;
                        link.takes_accepted.store(accepted, Ordering::Relaxed);
                    }
                    (Message::Tunnels(page), _) => {
                        if let Some(tell) = link.listing().take() {
                            // Whoever asked may have given up.
                            let _ = tell.send(page);
                        }
                    }
                    (message, _) => link.answer(message),
                }
            }
            Ok(())
        };
        tokio::select! {
            done = write => done,
            done = read => done,
        }
    }
}

/// Repeats a call on a nonblocking socket until it does not block.
async fn when_ready<T>(
    socket: &UnixStream,
    interest: Interest,
    mut call: impl FnMut(BorrowedFd<'_>) -> Result<T, ControlError>,
) -> Result<T, ControlError> {
    loop {
        socket.ready(interest).await?;
        let tried = socket.try_io(interest, || match call(socket.as_fd()) {
            Err(e) if e.would_block() => Err(io::ErrorKind::WouldBlock.into()),
            result => Ok(result),
        });
        match tried {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            result => return result?,
        }
    }
}

/// Too many descriptors are on their way between processes of this user. Others can still be sent, and this one later.
fn in_flight_full(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::ETOOMANYREFS)
}

impl Link {
    /// Sends a frame, or nothing if its dial is given up. Its client may be closed then, and a duplicate here would be closed
    /// after the port process has had it, on this thread.
    fn send(&self, sock: BorrowedFd<'_>, frame: &Frame) -> Result<(), ControlError> {
        let id = match frame {
            Frame::Plain(message) => return send(sock, message, None),
            Frame::Accepted(accepted, socket) => {
                return send(sock, &Message::Accepted(*accepted), Some(socket.as_fd()));
            }
            Frame::Passing(id) => *id,
        };
        let mut waiting = self.waiting();
        let Some(dial) = waiting.get_mut(&id) else {
            return Ok(());
        };
        let Some((message, fd)) = &dial.passing else {
            return Ok(());
        };
        send(sock, message, Some(fd.as_fd()))?;
        let is_last = matches!(message, Message::Attach(_));
        dial.passing = None;
        drop(waiting);
        if is_last {
            // Nobody answers it.
            let boot_nonce = [0; 16];
            self.answer(Message::Dialed(Dialed { id, boot_nonce }));
        }
        Ok(())
    }

    /// A frame's descriptor cannot be passed now: its dial fails.
    fn not_passed(&self, frame: &Frame) {
        tracing::warn!("too many descriptors are on their way to port processes");
        if let Frame::Passing(id) = frame {
            let text = "too many descriptors are on their way to port processes";
            self.answer(Message::DialFailed(failed(*id, DialError::Busy, text)));
        }
    }

    /// The port process has disconnected, and everything that it said is read.
    fn all_failed(&self) {
        for (id, dial) in self.waiting().drain() {
            let _ = dial.tell.send(Err(gone(id)));
        }
    }

    fn answer(&self, message: Message) {
        let (id, result) = match message {
            Message::Dialed(d) => (d.id, Ok(d)),
            Message::DialFailed(f) => (f.id, Err(f)),
            other => return tracing::warn!(kind = ?other.kind(), "unexpected control frame"),
        };
        let dial = self.waiting().remove(&id);
        if let Some(dial) = dial {
            let _ = dial.tell.send(result);
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Whoever waits learns that nobody knows the answer.
        self.link.waiting().clear();
        *self.link.listing() = None;
        self.link.status.send_replace(None);
    }
}
