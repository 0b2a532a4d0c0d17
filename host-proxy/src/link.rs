//! aditd's end of a VM's control socket: dials, attachments, status.
//!
//! One task a VM reads and writes the socket; everybody else holds a [`Link`], asks, and awaits the answer. A link ends
//! when its port process or its connection does; what was asked and not answered ends with it.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_passed::{Closer, Passed};
use adit_port::control::{
    Attach, Cancel, DIALS_MAX, Dial, DialError, DialFailed, Dialed, Handover, Incoming, Kept, Quit,
    Release, Ring, Status, Target,
};
use adit_port::control_io::{ControlError, Message, receive_passed, send};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};

use crate::passing;

/// How long to wait for a port process's answer after the dial's own deadline.
const ANSWER_GRACE: Duration = Duration::from_secs(5);
/// How long descriptors that the port process passed may take to be closed before it is given up.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// How often that is checked.
const CLOSE_LOOK: Duration = Duration::from_millis(2);
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

/// A dialled stream that has no other end yet. Dropped = given up.
#[derive(Debug)]
pub struct DialedStream {
    link: Arc<Link>,
    id: u64,
    attached: bool,
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

    /// Dials into the VM.
    ///
    /// # Errors
    /// As the port process says; `NoSession` also if it has gone.
    pub async fn dial(
        self: &Arc<Self>,
        to: Target,
        deadline: Duration,
    ) -> Result<DialedStream, DialFailed> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let failed = |error, text: &str| DialFailed {
            id,
            error,
            status: 0,
            errno: 0,
            text: text.into(),
        };
        let (tell, told) = oneshot::channel();
        {
            let mut waiting = self.waiting();
            if waiting.len() >= DIALS_MAX {
                return Err(failed(
                    DialError::Busy,
                    "too many dials to this VM are under way",
                ));
            }
            waiting.insert(id, tell);
        }
        // Cancels if this future is dropped before the answer.
        let stream = DialedStream {
            link: self.clone(),
            id,
            attached: false,
        };
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        let gone = || failed(DialError::NoSession, "the VM's port process has gone");
        let message = Message::Dial(Dial {
            id,
            to,
            deadline_ms,
        });
        let answer = async {
            self.outbox
                .send((message, None))
                .await
                .map_err(|_| gone())?;
            told.await.unwrap_or_else(|_| Err(gone()))
        };
        let limit = deadline.saturating_add(ANSWER_GRACE);
        tokio::time::timeout(limit, answer)
            .await
            .unwrap_or_else(|_| {
                Err(failed(
                    DialError::Timeout,
                    "the VM's port process does not answer",
                ))
            })
            .map(|_| stream)
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

impl DialedStream {
    /// What closes descriptors that come from the stream's other side.
    pub fn closer(&self) -> &Closer {
        &self.link.closer
    }

    /// Makes a stream socket the other end. From then on the stream does not need aditd.
    ///
    /// # Errors
    /// The port process has gone.
    pub async fn attach(mut self, fd: OwnedFd, prefix: Vec<u8>) -> Result<(), DialFailed> {
        let message = Message::Attach(Attach {
            id: self.id,
            prefix,
        });
        let sent = self.link.outbox.send((message, Some(fd))).await;
        self.attached = sent.is_ok();
        sent.map_err(|_| DialFailed {
            id: self.id,
            error: DialError::NoSession,
            status: 0,
            errno: 0,
            text: "the VM's port process has gone".into(),
        })
    }
}

impl Drop for DialedStream {
    fn drop(&mut self) {
        if self.attached {
            return;
        }
        self.link.waiting().remove(&self.id);
        // A full outbox means a port process that does not read: it is about to be given up with all its dials.
        let _ = self
            .link
            .outbox
            .try_send((Message::Cancel(Cancel { id: self.id }), None));
    }
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
                let fd = fd.as_ref().map(AsFd::as_fd);
                // Each packet is sent whole or not at all.
                when_ready(socket, Interest::WRITABLE, |sock| send(sock, &message, fd)).await?;
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
                    Ok(None) => break,
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

impl Link {
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
        // Whoever waits learns that there will be no answer.
        self.link.waiting().clear();
        self.link.status.send_replace(None);
    }
}
