//! The monitor's end of the socket to its worker. It does what the worker asks, each request by itself, and gives a worker up that
//! says what is no request, or too much: then a client of the proxy, a guest or a bug has taken it over.

use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_passed::Passed;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::packets::Packets;
use super::people;
use super::privileged::{NotDone, Privileged};
use super::wire::{
    self, Done, HasEnded, HasGuests, HasPeer, HasSlot, Is, Kind, Message, NotReached, Reached,
    Refused, Serving, WireError,
};
use crate::config::VMS_MAX;

/// Requests that may be under way at the same time: a few for each VM.
pub const REQUESTS_MAX: usize = 3 * VMS_MAX;
/// Packets of a worker at once, and then in a second: more than as many VMs as there may be need, if the port process of each
/// cannot even start.
pub const BURST_MAX: u32 = 16_384;
const A_SECOND: u32 = 5_120;
/// How long a port process may take to end that the worker asks to be ended: a request goes on without its worker, so those that
/// one worker after the other left must not add up.
const END_MAX: Duration = Duration::from_secs(10);
/// How long descriptors that the worker passed may take to be closed before it is given up.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
const CLOSE_LOOK: Duration = Duration::from_millis(2);
/// Questions to the user database at the same time.
static LOOKING: Semaphore = Semaphore::const_new(32);

/// What a worker says without asking anything.
#[derive(Debug)]
pub enum Event {
    /// It serves.
    Serving(Serving),
    /// How things are.
    Status(String),
    /// aditd is to stop.
    StopAll,
    /// The configuration is to be read again.
    Reread,
    /// The listeners of a worker that was found.
    Listeners(Vec<Passed>),
}

/// Why a worker is given up.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Its socket failed, or it said what is no packet.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It asks for more than all VMs together need.
    #[error("it asks too much")]
    Flood,
    /// It says what only a monitor says.
    #[error("it sent a packet of kind {0:?}")]
    Kind(Kind),
    /// What it passed cannot be closed.
    #[error("it passed too many descriptors that cannot be closed")]
    Overfull,
}

/// Packets that it may still send.
struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    fn take(&mut self, now: Instant) -> Result<(), Fault> {
        let ms = u64::try_from(now.duration_since(self.since).as_millis()).unwrap_or(u64::MAX);
        let more = ms.saturating_mul(A_SECOND.into()) / 1000;
        if more > 0 {
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(more).min(BURST_MAX);
            self.since = now;
        }
        self.left = self.left.checked_sub(1).ok_or(Fault::Flood)?;
        Ok(())
    }
}

/// Serves a worker until its connection ends. Requests that are under way go on: the next worker finds what they did.
///
/// # Errors
/// The worker must be ended.
pub async fn serve(
    packets: Arc<Packets>,
    privileged: Arc<Privileged>,
    mut on: impl FnMut(Event),
) -> Result<(), Fault> {
    let requests = Arc::new(Semaphore::new(REQUESTS_MAX));
    let mut budget = Budget {
        left: BURST_MAX,
        since: Instant::now(),
    };
    loop {
        room(&packets).await?;
        let Some((id, message, fds)) = packets.receive().await? else {
            return Ok(());
        };
        budget.take(Instant::now())?;
        match message {
            Message::Serving(serving) => on(Event::Serving(serving)),
            Message::Status(status) => on(Event::Status(status.text)),
            Message::StopAll(_) => on(Event::StopAll),
            Message::Reread(_) => on(Event::Reread),
            Message::Listeners(_) => on(Event::Listeners(fds)),
            Message::SlotOf(of) => {
                if let Err(e) = privileged.keep(&of.vm, fds) {
                    tracing::warn!(vm = %of.vm, error = %e, "nothing is kept over the end of this aditd");
                }
            }
            message => {
                let under_way = requests.clone().try_acquire_owned();
                let under_way = under_way.map_err(|_| Fault::Flood)?;
                let doing = doing(privileged.clone(), message, fds)?;
                tokio::spawn(answer(packets.clone(), id, doing, under_way));
            }
        }
    }
}

/// Waits until what the worker passed earlier is closed.
async fn room(packets: &Packets) -> Result<(), Fault> {
    let begin = Instant::now();
    while packets.closer().is_full() {
        if begin.elapsed() > CLOSE_LIMIT {
            return Err(Fault::Overfull);
        }
        tokio::time::sleep(CLOSE_LOOK).await;
    }
    Ok(())
}

type Answer = (Message, Vec<Passed>);

/// What a request has done, or an error for what is none.
fn doing(
    privileged: Arc<Privileged>,
    message: Message,
    mut fds: Vec<Passed>,
) -> Result<impl Future<Output = Answer> + Send, Fault> {
    let is_request = matches!(
        message,
        Message::Slot(_)
            | Message::ForgetOthers(_)
            | Message::Reach(_)
            | Message::Ended(_)
            | Message::End(_)
            | Message::Shorten(_)
            | Message::Gone(_)
            | Message::Leave(_)
            | Message::RemoveDir(_)
            | Message::WhoIs(_)
            | Message::Peer(_)
            | Message::Discover(_)
            | Message::Guests(_)
    );
    if !is_request {
        return Err(Fault::Kind(message.kind()));
    }
    Ok(async move {
        let done = match message {
            Message::Slot(ask) => {
                return match privileged.slot(&ask.vm) {
                    Ok(Some(ends)) => (Message::HasSlot(HasSlot {}), ends.map(Passed::from).into()),
                    done => (plain(done.map(drop)), vec![]),
                };
            }
            Message::Peer(ask) => match privileged.outward.connect(&ask.host).await {
                Ok(socket) => return (Message::HasPeer(HasPeer {}), vec![socket.into()]),
                Err(e) => Err(e),
            },
            Message::Discover(ask) => match privileged.discover.next(ask.key, ask.seen).await {
                Ok(found) => return (Message::HasFound(found), vec![]),
                Err(e) => Err(e),
            },
            Message::Guests(_) => match privileged.guests() {
                Ok(socket) => return (Message::HasGuests(HasGuests {}), vec![socket.into()]),
                Err(e) => Err(e),
            },
            Message::Reach(ask) => return reach(privileged, ask, fds.pop()).await,
            Message::Ended(ask) => match privileged.ended(&ask.vm).await {
                Ok(words) => return (Message::HasEnded(HasEnded { words }), vec![]),
                Err(e) => Err(e),
            },
            Message::End(ask) => {
                let within = Duration::from_millis(ask.within_ms.into()).min(END_MAX);
                privileged.end(&ask.vm, ask.pid, within).await
            }
            Message::Shorten(ask) => privileged.shorten(&ask.vm),
            Message::Gone(ask) => {
                privileged.gone(&ask.vm);
                Ok(())
            }
            Message::Leave(ask) => privileged.leave(&ask.vm).await,
            Message::RemoveDir(ask) => privileged.remove_dir(&ask.vm).await,
            Message::WhoIs(ask) => {
                // A user database that hangs has not all threads.
                let _looking = LOOKING.acquire().await;
                let looked = tokio::task::spawn_blocking(move || people::look(&ask)).await;
                return (Message::Is(looked.unwrap_or(Is { user: None })), vec![]);
            }
            // `ForgetOthers`: nothing else is a request.
            _ => {
                privileged.forget_others();
                Ok(())
            }
        };
        (plain(done), vec![])
    })
}

async fn reach(privileged: Arc<Privileged>, ask: wire::Reach, left: Option<Passed>) -> Answer {
    let left = match left.map(Passed::unix_packets).transpose() {
        Ok(left) => left,
        Err(e) => {
            let (text, ended) = (e.to_string(), None);
            return (Message::NotReached(NotReached { text, ended }), vec![]);
        }
    };
    match privileged.reach(ask.vm, ask.start, left).await {
        Ok(connected) => {
            let reached = Reached {
                pid: connected.pid,
                ours: connected.ours,
                found: connected.found,
            };
            (Message::Reached(reached), vec![connected.socket])
        }
        Err(not) => (Message::NotReached(not), vec![]),
    }
}

fn plain(done: Result<(), NotDone>) -> Message {
    match done {
        Ok(()) => Message::Done(Done {}),
        Err(e) => Message::Refused(Refused {
            text: e.to_string(),
        }),
    }
}

async fn answer(
    packets: Arc<Packets>,
    id: u32,
    doing: impl Future<Output = Answer>,
    _under_way: OwnedSemaphorePermit,
) {
    let (message, fds) = doing.await;
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if let Err(e) = packets.send(id, &message, &fds).await {
        tracing::debug!(error = %e, "a worker that has gone gets no answer");
    }
}

#[cfg(test)]
mod tests;
