//! What an agent and aditd say to each other: the host's end of `adit_tasks::wire`, on a stream of the service
//! [`tasks`](crate::services::tasks). Nothing that the agent says about itself changes which VM it is.
//!
//! The agent pulls, and its pull waits until a task is queued: neither side polls. Its frames are read meanwhile, so that the
//! end of the connection is noticed at once. Reading and answering are one future: once dropped, nothing of it goes on.

mod given;
mod offered;

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::frame;
use adit_tasks::wire::{
    self, Clock, Facts, Held, Identity, Lacks, Pull, Report, ReportAck, Started, Trust, TrustHeld,
    WireKind,
};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::given::{Frames, Given};
use self::offered::Offered;
use crate::desk::DeskError;
use crate::enrolment;
use crate::identity;
use crate::passing::Socket;
use crate::services::keyed;
use crate::state::State;
use crate::vm::VmEntry;

/// Most bytes of a frame from an agent: a report with two full outputs.
const FRAME_MAX: u32 = frame::LEN_MAX;
/// Frames read ahead.
const AHEAD_MAX: usize = 4;
/// How long an agent may be silent after it was handed a task.
const OWED_LIMIT: Duration = Duration::from_secs(30);
/// Version of every message of this service.
const VERSION: u16 = 1;

type Frame = (frame::Header, Vec<u8>);

async fn read_frames(mut reader: ReadHalf<Socket>, to: mpsc::Sender<io::Result<Frame>>) {
    loop {
        let next = match frame::read_async(&mut reader, FRAME_MAX).await {
            Ok(Some(next)) => Ok(next),
            Ok(None) => return,
            Err(e) => Err(e),
        };
        let last = next.is_err();
        if to.send(next).await.is_err() || last {
            return;
        }
    }
}

/// Speaks with an agent whose hello was accepted, until its stream ends. `features`: those that both ends know.
///
/// # Errors
/// The stream failed, or the agent said what is no message.
pub async fn converse(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    features: u64,
    stream: Socket,
) -> io::Result<()> {
    let (reader, mut writer) = tokio::io::split(stream);
    if vm.channel.is_foreign() {
        vm.agent.knows_chunks(features & wire::CHUNKS != 0);
        give_key(vm, features, &mut writer).await?;
        if vm.channel.hybrid().is_some_and(|h| h.half_closes) {
            let vm = vm.clone();
            tokio::spawn(async move { keyed::try_half_closes(&vm).await });
        }
    }
    if features & wire::SEED != 0 {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        send(&mut writer, WireKind::Seed, 0, &wire::Seed { bytes }).await?;
    }
    let (to, frames) = mpsc::channel(AHEAD_MAX);
    // Not a task of its own: it would outlive this future, which is dropped when a newer connection replaces this one (R106).
    let reading = read_frames(reader, to);
    let said = Said {
        features,
        given: Given::new(features),
        offered: None,
    };
    let answering = answer(state, vm, said, frames, writer);
    tokio::pin!(answering);
    tokio::select! {
        result = &mut answering => result,
        // Frames that were read before the end are answered first.
        () = reading => answering.await,
    }
}

/// Gives the agent the key of our dials, as its first frame.
async fn give_key(
    vm: &Arc<VmEntry>,
    features: u64,
    writer: &mut WriteHalf<Socket>,
) -> io::Result<()> {
    if features & wire::KEY == 0 {
        tracing::warn!(vm = %vm.name, "the agent knows no keys: whoever on this host may open the VMM's socket, or AF_VSOCK, can dial it; upgrade the agent");
        keyed::no_key(vm).await;
        return Ok(());
    }
    let key = keyed::new_key(vm).await;
    let key = key.ok_or_else(|| io::Error::other("its port process takes no key"))?;
    send(writer, WireKind::HostKey, 0, &wire::HostKey { key }).await
}

/// What was said on the stream so far.
struct Said {
    /// Those that both ends know.
    features: u64,
    given: Given,
    /// Trust documents; none: the agent has not said which it has.
    offered: Option<Offered>,
}

/// Answers an agent's frames until there are no more, and hands tasks out.
async fn answer(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    mut said: Said,
    mut frames: mpsc::Receiver<io::Result<Frame>>,
    mut writer: WriteHalf<Socket>,
) -> io::Result<()> {
    // The id of the pull that waits.
    let mut pulling: Option<u32> = None;
    // Until when something must be heard of the task that was handed out.
    let mut owed: Option<Instant> = None;
    // Whether there may be a task since the queue was looked at: the database is everybody's, and a frame that changes
    // nothing about the queue costs no query.
    let mut look = false;
    // Registered before the queue is looked at, and while a frame is handled, so that a task queued meanwhile is not missed.
    let queued = vm.queued.notified();
    tokio::pin!(queued);
    queued.as_mut().enable();
    let trusted = vm.trusted.notified();
    tokio::pin!(trusted);
    trusted.as_mut().enable();
    loop {
        if let Some(id) = pulling
            && mem::take(&mut look)
            && hand_out(state, vm, &mut said.given, id, &mut writer).await?
        {
            pulling = None;
            owed = Some(Instant::now() + OWED_LIMIT);
        }
        tokio::select! {
            next = frames.recv() => match next {
                None => return Ok(()),
                Some(next) => {
                    owed = None;
                    let (header, body) = next?;
                    let news = handle(state, vm, &mut said, &header, &body, &mut writer).await?;
                    look |= !matches!(news, News::None);
                    if let News::Pull(id) = news {
                        pulling = Some(id);
                    }
                }
            },
            () = &mut queued, if pulling.is_some() => {
                queued.set(vm.queued.notified());
                queued.as_mut().enable();
                look = true;
            }
            () = &mut trusted => {
                trusted.set(vm.trusted.notified());
                trusted.as_mut().enable();
                if let Some(offered) = &mut said.offered {
                    offer(state, vm, offered, &mut writer).await?;
                }
            }
            () = tokio::time::sleep_until(owed.unwrap_or_else(Instant::now)), if owed.is_some() => {
                if vm.channel.session() {
                    // It may have lost the stream. When it dials again, it gets the task again.
                    let text = format!("the agent was silent for {OWED_LIMIT:?} after it was handed a task");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                // A VM that is paused says nothing either.
                owed = Some(Instant::now() + OWED_LIMIT);
            }
        }
    }
}

/// Sends the VM's next task, if there is one. It is leased on disk before it is sent.
async fn hand_out(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    given: &mut Given,
    pull: u32,
    writer: &mut WriteHalf<Socket>,
) -> io::Result<bool> {
    let leased = state.desk.hand_out(&vm.name, given.wanted()).await;
    let Some(handout) = leased.map_err(io::Error::other)? else {
        return Ok(false);
    };
    match given.frames(handout) {
        Frames::Whole(task) => send(writer, WireKind::Task, pull, &task).await?,
        Frames::ByDigest(goal, task) => {
            if let Some(goal) = goal {
                send(writer, WireKind::Goal, pull, &goal).await?;
            }
            send(writer, WireKind::TaskOf, pull, &task).await?;
        }
    }
    Ok(true)
}

/// Sends the trust documents that the guest has not been sent.
async fn offer(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    offered: &mut Offered,
    writer: &mut WriteHalf<Socket>,
) -> io::Result<()> {
    let kept = state.desk.trust_of(&vm.name).await;
    for document in kept.map_err(io::Error::other)? {
        if offered.is_news(&document) {
            let envelope = document.envelope;
            send(writer, WireKind::Trust, 0, &Trust { envelope }).await?;
        }
    }
    Ok(())
}

/// What a frame has to do with the queue.
enum News {
    /// Nothing.
    None,
    /// There may be a task now.
    Look,
    /// A task is asked for, by a message of this id.
    Pull(u32),
}

/// Handles one frame.
async fn handle(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    said: &mut Said,
    header: &frame::Header,
    body: &[u8],
    writer: &mut WriteHalf<Socket>,
) -> io::Result<News> {
    let bad = |e: frame::FrameError| io::Error::new(io::ErrorKind::InvalidData, e);
    let is = |kind: WireKind| header.kind == kind as u16 && header.version == VERSION;
    vm.agent.seen(None);
    let Said {
        features,
        given,
        offered,
    } = said;
    let knows = |bit: u64| *features & bit != 0;
    if !is(WireKind::Clock) && !is(WireKind::Held) {
        vm.agent.holds(given.next_held());
    }
    if is(WireKind::Facts) {
        let facts: Facts = header.decode(body).map_err(bad)?;
        let facts = bounded(facts);
        tracing::info!(vm = %vm.name, agent = facts.agent_version, anchors = facts.anchors, "agent ready");
        vm.agent.seen(Some(facts));
    } else if is(WireKind::Enrolment) {
        let said: wire::Enrolment = header.decode(body).map_err(bad)?;
        vm.agent.enrolment_turn().await;
        let heard = enrolment::hear(state, vm, said).await;
        heard.map_err(io::Error::other)?;
    } else if is(WireKind::Identity) && knows(wire::IDENTITY) {
        let identity: Identity = header.decode(body).map_err(bad)?;
        vm.agent.enrolment_turn().await;
        let answer = identity::hear(state, vm, identity).await?;
        send(writer, WireKind::Identified, header.id, &answer).await?;
    } else if is(WireKind::TrustHeld) && knows(wire::TRUST) {
        let held: TrustHeld = header.decode(body).map_err(bad)?;
        let is_first = offered.is_none();
        let offered = offered.get_or_insert_default();
        vm.agent.trusts(offered.heard(&held));
        // Not again for what the guest says later: that costs a query.
        if is_first {
            offer(state, vm, offered, writer).await?;
        }
    } else if is(WireKind::Program) {
        let said: wire::Program = header.decode(body).map_err(bad)?;
        vm.agent.runs(program(said));
    } else if is(WireKind::Clock) {
        let guest: Clock = header.decode(body).map_err(bad)?;
        let now = state.now_ms();
        vm.agent.clock(guest.unix_ms, now);
        let released = given.clock(guest.unix_ms);
        let unix_ms = u64::try_from(now).unwrap_or(0);
        send(writer, WireKind::HostClock, header.id, &Clock { unix_ms }).await?;
        if released {
            return Ok(News::Look);
        }
    } else if is(WireKind::Stood) {
        let stood: wire::Stood = header.decode(body).map_err(bad)?;
        tracing::info!(vm = %vm.name, ms = stood.ms, clock_set_ms = stood.clock_set_ms, seeded = stood.seeded, "the guest's time stood still");
        vm.agent.stood(stood, state.now_ms());
    } else if is(WireKind::Held) {
        let held: Held = header.decode(body).map_err(bad)?;
        vm.agent.holds(Some(held));
        given.gave_back(held);
    } else if is(WireKind::Pull) {
        let _: Pull = header.decode(body).map_err(bad)?;
        return Ok(News::Pull(header.id));
    } else if is(WireKind::Lacks) {
        // The task is leased: it is handed out again, with its goal.
        let lacks: Lacks = header.decode(body).map_err(bad)?;
        given.lacks(&lacks.digest);
        return Ok(News::Pull(header.id));
    } else if is(WireKind::Started) {
        let started: Started = header.decode(body).map_err(bad)?;
        let begun = state.desk.begun(&vm.name, started.task_id).await;
        begun.map_err(io::Error::other)?;
    } else if is(WireKind::Report) {
        let report: Report = header.decode(body).map_err(bad)?;
        let task_id = report.task_id;
        take_report(state, vm, report).await?;
        send(
            writer,
            WireKind::ReportAck,
            header.id,
            &ReportAck { task_id },
        )
        .await?;
        return Ok(News::Look);
    } else if header.flags & frame::IGNORABLE == 0 {
        return Err(bad(frame::FrameError::Unknown {
            kind: header.kind,
            version: header.version,
        }));
    }
    Ok(News::None)
}

/// Hands a report to the desk. If this succeeds it is to be acknowledged: it is on disk, or no task here can use it.
async fn take_report(state: &Arc<State>, vm: &Arc<VmEntry>, report: Report) -> io::Result<()> {
    let id = adit_tasks::hex(&report.task_id);
    match state.desk.report(&vm.name, report).await {
        Ok(()) => Ok(()),
        Err(DeskError::Unknown) => {
            tracing::warn!(vm = %vm.name, task = id, "report for a task that is not this VM's");
            Ok(())
        }
        Err(DeskError::NotLeased) => {
            // The database may have been restored from an older copy. The guest sends nothing else until its report is
            // answered; when the task is handed out, its journal answers again.
            tracing::warn!(vm = %vm.name, task = id, "report for a task that was not handed out");
            Ok(())
        }
        Err(e) => Err(io::Error::other(e)),
    }
}

/// Cuts what the guest says of its program: it is shown.
fn program(said: wire::Program) -> wire::Program {
    let cut = |text: &str, most| adit_names::escape(text).at_most(most).to_string();
    let faults = said.faults.iter().take(wire::FAULTS_MAX);
    wire::Program {
        floor: cut(&said.floor, 64),
        faults: faults.map(|fault| cut(fault, 500)).collect(),
        ..said
    }
}

/// Cuts the guest's texts and escapes them: they are shown.
fn bounded(facts: Facts) -> Facts {
    let cut = |text: String| adit_names::escape(&text).at_most(128).to_string();
    Facts {
        agent_version: cut(facts.agent_version),
        kernel: cut(facts.kernel),
        os: cut(facts.os),
        vm_id: cut(facts.vm_id),
        ..facts
    }
}

async fn send(
    writer: &mut WriteHalf<Socket>,
    kind: WireKind,
    id: u32,
    body: &impl serde::Serialize,
) -> io::Result<()> {
    let bytes = frame::encode(kind as u16, VERSION, id, 0, body).map_err(io::Error::other)?;
    writer.write_all(&bytes).await
}
