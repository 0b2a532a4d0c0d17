//! aditd's end of a VM's control socket: dials, status.
//!
//! A dial has the client's end with it ([`ClientEnd`]), and one answer: two crossings of the socket. While it is under way the
//! port process may be greeting the client at any moment, so aditd says nothing to the client before it knows that the dial has
//! failed. It knows that by `DialFailed`, and by the end of a connection that said nothing of the dial, because a port process
//! gives its dials up before it disconnects, and sends `Dialed` before it greets.
//!
//! A port process of an older build does not have [`FEATURE_CONNECT`]. It is dialled in three steps, and aditd greets the
//! client itself.
//!
//! One task a VM reads and writes the socket; everybody else holds a [`Link`], asks, and awaits the answer. A link ends
//! when its port process or its connection does; what was asked and not answered ends with it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_channel::hello::Extensions;
use adit_passed::{Closer, Passed};
use adit_port::control::{
    Ask, Attach, Cancel, Connect, DIALS_MAX, Dial, DialError, DialFailed, Dialed, FEATURE_CONNECT,
    Handover, Incoming, Kept, Quit, Release, Ring, Status, Target,
};
use adit_port::control_io::{ControlError, Message, receive_passed, send};
use rustix::net::SendFlags;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::passing;

/// How long to wait for a port process's answer after the dial's own deadline.
const ANSWER_GRACE: Duration = Duration::from_secs(5);
/// How long descriptors that the port process passed may take to be closed before it is given up.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// How often that is checked.
const CLOSE_LOOK: Duration = Duration::from_millis(2);
/// How long a client may take for its greeting, where aditd writes it.
const GREET_LIMIT: Duration = Duration::from_secs(10);
/// How long frames of a port process that has gone are read for.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);
/// Most frames that wait to be sent to a port process.
const OUTBOX_MAX: usize = 2 * DIALS_MAX;

type Waiting = HashMap<u64, oneshot::Sender<Result<Dialed, DialFailed>>>;

/// A connected port process.
#[derive(Debug)]
pub struct Link {
    /// Of the descriptors that the port process passes.
    closer: Closer,
    outbox: mpsc::Sender<(Message, Option<OwnedFd>)>,
    waiting: Mutex<Waiting>,
    next_id: AtomicU64,
    /// The port process has [`FEATURE_CONNECT`].
    connects: AtomicBool,
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
    /// The VMM has no channel until it connects anew, and why; empty: it has.
    Stuck(String),
    /// It is the VM's VMM itself.
    Held,
}

/// What is dialled.
#[derive(Clone, Debug)]
pub struct Question {
    /// The destination.
    pub to: Target,
    /// What the hello of a service says beside its name.
    pub extensions: Extensions,
    /// How long the guest may take.
    pub deadline: Duration,
}

/// The host's end of a stream.
#[derive(Debug)]
pub enum ClientEnd {
    /// A client's socket: the port process has it from then on, and nobody is in between.
    Socket(ClientSocket),
    /// One end of a pair: aditd relays between the other one and the client.
    Relayed(OwnedFd),
}

/// A client's socket on its way to a port process.
#[derive(Debug)]
pub struct ClientSocket {
    /// A duplicate.
    pub fd: OwnedFd,
    /// What was read of it, for the guest.
    pub ahead: Vec<u8>,
    /// What the client gets first, once the stream is open.
    pub greeting: Vec<u8>,
    /// When it is to be asked whether the client is still there.
    pub asks: Arc<Asks>,
}

/// A client that has ended its sending may be gone. Only who sends to it finds out, and that is whoever greets it.
#[derive(Debug)]
pub struct Asks {
    wanted: Notify,
    text: &'static [u8],
}

impl Asks {
    /// `text`: what any client that is there skips.
    pub fn new(text: &'static [u8]) -> Arc<Self> {
        Arc::new(Self {
            wanted: Notify::new(),
            text,
        })
    }

    /// Has the client asked.
    pub fn ask(&self) {
        self.wanted.notify_one();
    }
}

/// Why there is no stream.
#[derive(Debug)]
pub enum Unopened {
    /// It failed, and nothing was said to the client.
    Failed(DialFailed),
    /// Nobody knows whether the client was greeted, so nothing can be said to it any more.
    Unknown(DialFailed),
}

impl Unopened {
    /// The reason.
    pub fn into_reason(self) -> DialFailed {
        match self {
            Self::Failed(reason) | Self::Unknown(reason) => reason,
        }
    }
}

/// A dial without an answer. Dropped = given up.
struct Waits<'a> {
    link: &'a Link,
    id: u64,
    answered: bool,
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

    /// Opens a stream into the VM for the client at this end. If this future is dropped, the dial is given up.
    ///
    /// # Errors
    /// As the port process says; `NoSession` also if it has gone.
    pub async fn open(&self, question: Question, end: ClientEnd) -> Result<(), Unopened> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        {
            let mut waiting = self.waiting();
            if waiting.len() >= DIALS_MAX {
                let text = "too many dials to this VM are under way";
                return Err(Unopened::Failed(failed(id, DialError::Busy, text)));
            }
            waiting.insert(id, tell);
        }
        let waits = Waits {
            link: self,
            id,
            answered: false,
        };
        match self.connects.load(Ordering::Relaxed) {
            true => waits.connect(question, end, told).await,
            false => waits.by_steps(question, end, told).await,
        }
    }

    /// Ends the port process.
    pub async fn quit(&self) {
        let _ = self.outbox.send((Message::Quit(Quit {}), None)).await;
    }

    /// Ends the port process; its frontend stays for a successor.
    pub async fn release(&self) {
        let _ = self.outbox.send((Message::Release(Release {}), None)).await;
    }

    /// Tells the port process that its handover is kept.
    pub fn kept(&self, seq: u64) {
        // If there is no room it does not read, and its frontend goes on after a while.
        let _ = self.outbox.try_send((Message::Kept(Kept { seq }), None));
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Told = oneshot::Receiver<Result<Dialed, DialFailed>>;

impl Waits<'_> {
    /// With the client's end in the question.
    async fn connect(
        mut self,
        question: Question,
        end: ClientEnd,
        told: Told,
    ) -> Result<(), Unopened> {
        let (fd, ahead, greeting, asks) = match end {
            ClientEnd::Socket(client) => {
                let asks = Some(client.asks);
                (client.fd, client.ahead, client.greeting, asks)
            }
            ClientEnd::Relayed(fd) => (fd, Vec::new(), Vec::new(), None),
        };
        let message = Message::Connect(Connect {
            id: self.id,
            deadline_ms: deadline_ms(&question),
            to: question.to,
            extensions: question.extensions,
            prefix: ahead,
            greeting,
        });
        let answer = async {
            self.say(message, Some(fd))
                .await
                .map_err(Unopened::Failed)?;
            match self.told(told, asks.as_deref(), None).await {
                Ok(answer) => answer.map_err(Unopened::Failed),
                Err(_) => Err(Unopened::Unknown(self.gone())),
            }
        };
        let limit = question.deadline.saturating_add(ANSWER_GRACE);
        let answer = tokio::time::timeout(limit, answer).await;
        self.answered = matches!(answer, Ok(Ok(_) | Err(Unopened::Failed(_))));
        match answer {
            Ok(answer) => answer.map(|_| ()),
            Err(_) => Err(Unopened::Unknown(self.silent())),
        }
    }

    /// As a port process of an older build has it: the client's end comes after the answer, and is greeted before.
    async fn by_steps(
        mut self,
        question: Question,
        end: ClientEnd,
        told: Told,
    ) -> Result<(), Unopened> {
        let id = self.id;
        if !question.extensions.arguments.is_empty() {
            let text = "the VM's port process is of an older build and passes no arguments on: `adit vm reload` replaces it";
            return Err(Unopened::Failed(failed(id, DialError::Busy, text)));
        }
        let message = Message::Dial(Dial {
            id,
            deadline_ms: deadline_ms(&question),
            to: question.to,
        });
        let client = match &end {
            ClientEnd::Socket(client) => Some(client),
            ClientEnd::Relayed(_) => None,
        };
        let answer = async {
            self.say(message, None).await?;
            let asks = client.map(|client| &*client.asks);
            let answer = self.told(told, asks, client.map(|c| &c.fd)).await;
            answer.unwrap_or_else(|_| Err(self.gone()))
        };
        let limit = question.deadline.saturating_add(ANSWER_GRACE);
        let answer = tokio::time::timeout(limit, answer).await;
        let answer = answer.unwrap_or_else(|_| Err(self.silent()));
        // From here on it can be attached to, or given up.
        answer.map_err(Unopened::Failed)?;
        let (fd, prefix) = match end {
            ClientEnd::Socket(client) => {
                let greeted = greet(client.fd, &client.greeting).await;
                let fd = greeted.map_err(|_| Unopened::Unknown(self.gone()))?;
                (fd, client.ahead)
            }
            ClientEnd::Relayed(fd) => (fd, Vec::new()),
        };
        let attach = Message::Attach(Attach { id, prefix });
        let sent = self.say(attach, Some(fd)).await;
        self.answered = sent.is_ok();
        sent.map_err(Unopened::Unknown)
    }

    /// Waits for the answer, and has the client asked meanwhile: here, if this is its socket, or by the port process.
    async fn told(
        &self,
        mut told: Told,
        asks: Option<&Asks>,
        here: Option<&OwnedFd>,
    ) -> Result<Result<Dialed, DialFailed>, oneshot::error::RecvError> {
        let Some(asks) = asks else {
            return told.await;
        };
        loop {
            tokio::select! {
                answer = &mut told => return answer,
                () = asks.wanted.notified() => {}
            }
            if let Some(client) = here {
                // A new connection's buffer takes it whole; an error is seen by whoever looks at the client.
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let _ = rustix::net::send(client, asks.text, flags);
            } else {
                let (id, text) = (self.id, asks.text.to_vec());
                // If it has gone, there will be no answer either.
                let _ = self.say(Message::Ask(Ask { id, text }), None).await;
            }
        }
    }

    async fn say(&self, message: Message, fd: Option<OwnedFd>) -> Result<(), DialFailed> {
        let sent = self.link.outbox.send((message, fd)).await;
        sent.map_err(|_| self.gone())
    }

    fn gone(&self) -> DialFailed {
        gone(self.id)
    }

    fn silent(&self) -> DialFailed {
        let text = "the VM's port process does not answer";
        failed(self.id, DialError::Timeout, text)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.link.waiting().remove(&self.id);
        if self.answered {
            return;
        }
        // A full outbox means a port process that does not read: it is about to be given up with all its dials.
        let cancel = Message::Cancel(Cancel { id: self.id });
        let _ = self.link.outbox.try_send((cancel, None));
    }
}

/// Writes a client's greeting.
async fn greet(fd: OwnedFd, greeting: &[u8]) -> io::Result<OwnedFd> {
    let mut client = TcpStream::from_std(fd.into())?;
    tokio::time::timeout(GREET_LIMIT, client.write_all(greeting)).await??;
    Ok(client.into_std()?.into())
}

fn deadline_ms(question: &Question) -> u32 {
    u32::try_from(question.deadline.as_millis()).unwrap_or(u32::MAX)
}

fn failed(id: u64, error: DialError, text: &str) -> DialFailed {
    DialFailed {
        id,
        error,
        status: 0,
        errno: 0,
        text: text.into(),
    }
}

fn gone(id: u64) -> DialFailed {
    let text = "the VM's port process has gone";
    failed(id, DialError::NoSession, text)
}

/// The loop of a link.
pub struct Driver {
    link: Arc<Link>,
    inbox: mpsc::Receiver<(Message, Option<OwnedFd>)>,
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
            while let Some((message, fd)) = inbox.recv().await {
                if link.is_given_up(&message) {
                    continue;
                }
                let fd = fd.as_ref().map(AsFd::as_fd);
                // Each packet is sent whole or not at all.
                let send = |sock: BorrowedFd<'_>| send(sock, &message, fd);
                match when_ready(socket, Interest::WRITABLE, send).await {
                    Ok(()) => {}
                    Err(ControlError::Io(e)) if in_flight_full(&e) => link.not_passed(&message),
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
                    (Message::Stuck(stuck), _) => on(Said::Stuck(stuck.reason)),
                    (Message::Held(_), _) => on(Said::Held),
                    (Message::Features(features), _) => {
                        let connects = features.bits & FEATURE_CONNECT != 0;
                        link.connects.store(connects, Ordering::Relaxed);
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
    /// Nobody waits for this dial any more. Its client is not passed on: it may be closed already, and then the duplicate here
    /// would be closed after the port process has had it, on this thread.
    fn is_given_up(&self, message: &Message) -> bool {
        matches!(message, Message::Connect(connect) if !self.waiting().contains_key(&connect.id))
    }

    /// A frame's descriptor cannot be passed now: its dial fails.
    fn not_passed(&self, message: &Message) {
        tracing::warn!("too many descriptors are on their way to port processes");
        if let Message::Connect(connect) = message {
            let text = "too many descriptors are on their way to port processes";
            self.answer(Message::DialFailed(failed(
                connect.id,
                DialError::Busy,
                text,
            )));
        }
    }

    /// The port process has disconnected, and everything that it said is read.
    fn all_failed(&self) {
        for (id, tell) in self.waiting().drain() {
            let _ = tell.send(Err(gone(id)));
        }
    }

    fn answer(&self, message: Message) {
        let (id, result) = match message {
            Message::Dialed(d) => (d.id, Ok(d)),
            Message::DialFailed(f) => (f.id, Err(f)),
            other => return tracing::warn!(kind = ?other.kind(), "unexpected control frame"),
        };
        if let Some(tell) = self.waiting().remove(&id) {
            let _ = tell.send(result);
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Whoever waits learns that nobody knows the answer.
        self.link.waiting().clear();
        self.link.status.send_replace(None);
    }
}
