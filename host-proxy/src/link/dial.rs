//! A dial, from aditd's side: what is dialled, for which client, and what became of it.
//!
//! A dial has the client's end with it ([`ClientEnd`]), and one answer: two crossings of the control socket. While it is under
//! way the port process may be greeting the client at any moment, so aditd says nothing to the client before it knows that the
//! dial has failed. It knows that by `DialFailed`, and by the end of a connection that said nothing of the dial, because a port
//! process gives its dials up before it disconnects, and sends `Dialed` before it greets.
//!
//! A port process of an older build does not have `FEATURE_CONNECT`. It is dialled in three steps, and aditd greets the client
//! itself.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use adit_channel::hello::Extensions;
use adit_port::control::{
    Ask, Attach, Cancel, Connect, ConnectAs, ConnectLimited, ConnectNoted, DIALS_MAX, Dial,
    DialError, DialFailed, Dialed, Limit, Target,
};
use adit_port::control_io::Message;
use rustix::net::SendFlags;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};

use super::{Frame, Link, Waiting};

/// How long to wait for a port process's answer after the dial's own deadline.
const ANSWER_GRACE: Duration = Duration::from_secs(5);
/// How long a client may take for its greeting, where aditd writes it.
const GREET_LIMIT: Duration = Duration::from_secs(10);

/// What is dialled.
#[derive(Clone, Debug)]
pub struct Question {
    /// The destination.
    pub to: Target,
    /// What the hello of a service says beside its name.
    pub extensions: Extensions,
    /// How long the guest may take.
    pub deadline: Duration,
    /// By which the tunnel is found again, if it is to be.
    pub tag: Option<Vec<u8>>,
    /// What the port process says when the tunnel ends, if it is to. Only where it [tells](Link::tells_ends).
    pub note: Option<Vec<u8>>,
    /// How many bytes a second go through. An older build lets any number through.
    pub limits: Vec<Limit>,
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
    pub fn reason(&self) -> &DialFailed {
        match self {
            Self::Failed(reason) | Self::Unknown(reason) => reason,
        }
    }

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
    /// Opens a stream into the VM for the client at this end. If this future is dropped, the dial is given up.
    ///
    /// # Errors
    /// As the port process says; `NoSession` also if it has gone.
    pub async fn open(&self, question: Question, end: ClientEnd) -> Result<(), Unopened> {
        self.opened(question, end).await.map(drop)
    }

    /// The same, and returns the boot nonce that the agent has said.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn opened(&self, question: Question, end: ClientEnd) -> Result<[u8; 16], Unopened> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        {
            let mut waiting = self.waiting();
            if waiting.len() >= DIALS_MAX {
                let text = "too many dials to this VM are under way";
                return Err(Unopened::Failed(failed(id, DialError::Busy, text)));
            }
            waiting.insert(id, Waiting::new(tell));
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
}

type Told = oneshot::Receiver<Result<Dialed, DialFailed>>;

impl Waits<'_> {
    /// With the client's end in the question.
    async fn connect(
        mut self,
        question: Question,
        end: ClientEnd,
        told: Told,
    ) -> Result<[u8; 16], Unopened> {
        let (fd, ahead, greeting, asks) = match end {
            ClientEnd::Socket(client) => {
                let asks = Some(client.asks);
                (client.fd, client.ahead, client.greeting, asks)
            }
            ClientEnd::Relayed(fd) => (fd, Vec::new(), Vec::new(), None),
        };
        let connect = Connect {
            id: self.id,
            deadline_ms: deadline_ms(&question),
            to: question.to,
            extensions: question.extensions,
            prefix: ahead,
            greeting,
        };
        let limits = question.limits;
        if !limits.is_empty() && !self.link.limits() {
            tracing::warn!(
                "a port process of an older build limits no bytes: `adit vm reload` replaces it"
            );
        }
        let message = match (question.tag, question.note) {
            (tag, note) if !limits.is_empty() && self.link.limits() => {
                Message::ConnectLimited(ConnectLimited {
                    connect,
                    tag,
                    note,
                    limits,
                })
            }
            (tag, Some(note)) => Message::ConnectNoted(ConnectNoted { connect, tag, note }),
            (Some(tag), None) if self.link.lists.load(Ordering::Relaxed) => {
                Message::ConnectAs(ConnectAs { connect, tag })
            }
            _ => Message::Connect(connect),
        };
        let answer = async {
            self.pass(message, fd).await.map_err(Unopened::Failed)?;
            match self.told(told, asks.as_deref(), None).await {
                Ok(answer) => answer.map_err(Unopened::Failed),
                Err(_) => Err(Unopened::Unknown(self.gone())),
            }
        };
        let limit = question.deadline.saturating_add(ANSWER_GRACE);
        let answer = tokio::time::timeout(limit, answer).await;
        self.answered = matches!(answer, Ok(Ok(_) | Err(Unopened::Failed(_))));
        match answer {
            Ok(answer) => answer.map(|dialed| dialed.boot_nonce),
            Err(_) => Err(Unopened::Unknown(self.silent())),
        }
    }

    /// As a port process of an older build has it: the client's end comes after the answer, and is greeted before.
    async fn by_steps(
        mut self,
        question: Question,
        end: ClientEnd,
        told: Told,
    ) -> Result<[u8; 16], Unopened> {
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
            self.say(message).await?;
            let asks = client.map(|client| &*client.asks);
            let answer = self.told(told, asks, client.map(|c| &c.fd)).await;
            answer.unwrap_or_else(|_| Err(self.gone()))
        };
        let limit = question.deadline.saturating_add(ANSWER_GRACE);
        let answer = tokio::time::timeout(limit, answer).await;
        let answer = answer.unwrap_or_else(|_| Err(self.silent()));
        // From here on it can be attached to, or given up.
        let dialed = answer.map_err(Unopened::Failed)?;
        let (fd, prefix) = match end {
            ClientEnd::Socket(client) => {
                let greeted = greet(client.fd, &client.greeting).await;
                let fd = greeted.map_err(|_| Unopened::Unknown(self.gone()))?;
                (fd, client.ahead)
            }
            ClientEnd::Relayed(fd) => (fd, Vec::new()),
        };
        let (tell, sent) = oneshot::channel();
        self.link.waiting().insert(id, Waiting::new(tell));
        let attach = Message::Attach(Attach { id, prefix });
        let sent = async {
            self.pass(attach, fd).await?;
            sent.await.unwrap_or_else(|_| Err(self.gone()))
        };
        let sent = tokio::time::timeout(ANSWER_GRACE, sent).await;
        let sent = sent.unwrap_or_else(|_| Err(self.silent()));
        self.answered = sent.is_ok();
        let sent = sent.map(|_| dialed.boot_nonce);
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
                let _ = self.say(Message::Ask(Ask { id, text })).await;
            }
        }
    }

    async fn say(&self, message: Message) -> Result<(), DialFailed> {
        self.queue(Frame::Plain(message)).await
    }

    /// Has a frame sent with the client's end, unless the dial is given up before.
    async fn pass(&self, message: Message, fd: OwnedFd) -> Result<(), DialFailed> {
        match self.link.waiting().get_mut(&self.id) {
            Some(dial) => dial.passing = Some((message, fd)),
            None => return Err(self.gone()),
        }
        self.queue(Frame::Passing(self.id)).await
    }

    async fn queue(&self, frame: Frame) -> Result<(), DialFailed> {
        let queued = self.link.outbox.send(frame).await;
        queued.map_err(|_| self.gone())
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
        let dial = self.link.waiting().remove(&self.id);
        let passing = dial.and_then(|dial| dial.passing);
        let is_unheard = matches!(
            passing,
            Some((
                Message::Connect(_)
                    | Message::ConnectAs(_)
                    | Message::ConnectNoted(_)
                    | Message::ConnectLimited(_),
                _
            ))
        );
        if self.answered || is_unheard {
            return;
        }
        // A full outbox means a port process that does not read; the dial ends there by its own deadline.
        let cancel = Message::Cancel(Cancel { id: self.id });
        let _ = self.link.outbox.try_send(Frame::Plain(cancel));
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

pub(super) fn failed(id: u64, error: DialError, text: &str) -> DialFailed {
    DialFailed {
        id,
        error,
        status: 0,
        errno: 0,
        text: text.into(),
    }
}

pub(super) fn gone(id: u64) -> DialFailed {
    let text = "the VM's port process has gone";
    failed(id, DialError::NoSession, text)
}
