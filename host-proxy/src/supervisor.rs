//! Keeps one port process a VM: finds the one that is there, or starts one, and follows it until it ends.
//!
//! ```text
//! connect ctl.sock ── it answers ──────────────► follow ── it ends ─┐
//!        └── nobody there ─► spawn adit-port ─► connect ─► follow   │
//!        ▲                     (with what is kept)                  │
//!        └──── at once; back-off 50 ms … 2 s if it is short-lived ◄─┘
//! ```
//! What takes root is the [`monitor`](crate::monitor)'s: it connects and starts, and says who the kernel says answers
//! ([`whose`](crate::whose)).
//! A port process outlives aditd: it is its own process group, and its sockets are where the next aditd looks. One that
//! is killed has a successor on the same VMM, for which [`Keeper`](crate::keeper::Keeper) keeps what it needs.

use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use adit_passed::Passed;
use adit_port::control::{CONTROL_SOCKET, Ends, HYBRID_SOCKET, Incoming, Status};
use tokio_util::sync::CancellationToken;

use crate::arguments;
use crate::config::{Hybrid, Way};
use crate::link::{Link, Said};
use crate::monitor::client::AskError;
use crate::monitor::wire::{LastWords, Start, StartHybrid};
use crate::monitor::{Connected, Monitor, NotReached, port_log};
use crate::vm::VmEntry;
use crate::whose::Peer;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Port processes that ran for less than this, one after the other, ...
const SHORT: Duration = Duration::from_secs(1);
/// ... are so many before the next is started with a back-off: a guest that kills its own must not keep the host busy.
const SHORT_MAX: u32 = 8;
/// Characters of a port process's reason that are shown.
const REASON_MAX: usize = 500;
/// How often a log's length is looked at while the VM's state changes, and while it does not.
const LOG_LOOK: Duration = Duration::from_secs(5);
const LOG_LOOK_IDLE: Duration = Duration::from_secs(600);
/// Lines of a log's end that are shown: an error may be followed by a hint.
const LOG_LINES: usize = 3;
/// How long one that is told to end may take.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// How long to wait before a process is started again.
#[derive(Debug)]
pub struct Backoff {
    wait: Duration,
    short: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            wait: BACKOFF_MIN,
            short: 0,
        }
    }
}

impl Backoff {
    /// After one that ran for so long.
    pub fn after(&mut self, ran: Duration) -> Duration {
        if ran >= SHORT {
            *self = Self::default();
            return Duration::ZERO;
        }
        if self.short >= SHORT_MAX {
            return self.after_failure();
        }
        self.short += 1;
        self.wait
    }

    /// After one that did not serve.
    pub fn after_failure(&mut self) -> Duration {
        self.wait = (self.wait * 2).min(BACKOFF_MAX);
        self.wait
    }
}

/// Follows a VM's port process until the VM is removed, and ends it then.
///
/// `on_serving` is called once a port process serves it, and whenever that has chosen another way to its guest; `on_ends` is called with what became of
/// tunnels.
pub async fn supervise(
    vm: Arc<VmEntry>,
    monitor: Monitor,
    on_incoming: impl Fn(Incoming, Passed),
    on_serving: impl Fn(),
    on_ends: impl Fn(&Ends),
) {
    let mut backoff = Backoff::default();
    while !vm.removed.is_cancelled() {
        let (ended, ran) = match reach(&vm, &monitor).await {
            Ok(connected) => {
                let begin = tokio::time::Instant::now();
                let is_new = connected.found.is_none();
                let on = (&on_incoming, &on_serving, &on_ends);
                let ended = match follow(&vm, &monitor, connected, on).await {
                    Ok(true) => Ok(()),
                    // What ended it before it served stands in its log only.
                    Ok(false) if !vm.removed.is_cancelled() => {
                        Err(unserved(&vm, &monitor, is_new).await)
                    }
                    Ok(false) => Ok(()),
                    Err(why) => Err(why),
                };
                (ended, begin.elapsed())
            }
            Err(why) => (Err(why), Duration::ZERO),
        };
        monitor.gone(&vm.name).await;
        let wait = match ended {
            // Its VM waits.
            Ok(()) => backoff.after(ran),
            Err(trouble) => {
                vm.channel.set_trouble(trouble);
                backoff.after_failure()
            }
        };
        if monitor.is_absent() {
            vm.channel.set_trouble(AskError::Absent.to_string());
        }
        tokio::select! {
            () = vm.removed.cancelled() => {}
            () = monitor.is_there() , if monitor.is_absent() => {}
            () = tokio::time::sleep(wait), if !monitor.is_absent() => {}
        }
    }
    vm.channel.keeper.remove();
    monitor.leave(&vm.name).await;
    vm.channel.supervisor_ended();
}

/// Follows a port process until it goes, if it is this VM's; nothing is dialled and nobody let in before it said so.
/// Returns whether it did.
async fn follow(
    vm: &Arc<VmEntry>,
    monitor: &Monitor,
    connected: Connected,
    (on_incoming, on_serving, on_ends): (&impl Fn(Incoming, Passed), &impl Fn(), &impl Fn(&Ends)),
) -> Result<bool, String> {
    let (link, driver) = Link::new(vm.channel.keeper.closer());
    let Connected {
        socket, pid, ours, ..
    } = connected;
    let process = Peer::new(pid, ours);
    let (known, wrong) = (AtomicBool::new(false), OnceLock::new());
    let is_wrong = CancellationToken::new();
    let mut statuses = link.watch();
    let on_status = |status: &Status| {
        if status.session {
            vm.channel.set_stuck(None);
        }
        if (&status.vm, status.cid) != (&vm.name, vm.cid) {
            wrong.get_or_init(|| wrong_vm(vm, process, status));
            is_wrong.cancel();
        } else if !known.swap(true, Ordering::Relaxed) {
            vm.channel.begin(link.clone(), process);
            on_serving();
        }
    };
    let on = |said: Said<'_>| match said {
        Said::Status(status) => on_status(status),
        _ if !known.load(Ordering::Relaxed) => {}
        Said::Incoming(incoming, fd) => on_incoming(incoming, fd),
        Said::Ring(ring) => vm.channel.set_ring(ring),
        Said::Way(way) => {
            vm.channel.set_reached(way);
            // Perhaps by the host's kernel, whose guests nobody has heard yet.
            on_serving();
        }
        // Its word does not make it what nobody may replace.
        Said::Held if process.is_ours() => {
            tracing::error!(vm = %vm.name, "a port process says that it is a VMM");
        }
        Said::Held => vm.channel.set_held(),
        Said::Handover(handover, fds) => {
            let seq = handover.seq;
            vm.channel.keeper.keep(handover, fds);
            link.kept(seq);
        }
        Said::Ends(ends) => {
            on_ends(&ends);
            link.ends_taken(ends.seq);
        }
        Said::Stuck(reason) => {
            // Its words are the port process's, which may be in its guest's hands.
            let shown = adit_names::escape(&reason).at_most(REASON_MAX);
            let reason = (!reason.is_empty()).then(|| shown.to_string());
            if reason.is_some() {
                vm.channel.keeper.forget();
            }
            vm.channel.set_stuck(reason);
        }
    };
    let run = driver.run(socket, on);
    let ended = tokio::select! {
        ended = run => ended,
        () = is_wrong.cancelled() => Ok(()),
        () = async { while statuses.changed().await.is_ok() { vm.channel.heard(); } std::future::pending().await } => Ok(()),
        () = quit_when_removed(vm, monitor, &link, process) => Ok(()),
        () = keep_log_short(vm, monitor) => Ok(()),
    };
    vm.channel.end();
    if let Some(why) = wrong.into_inner() {
        return Err(why);
    }
    match ended {
        Ok(()) => tracing::info!(vm = %vm.name, "port process has gone"),
        Err(e) => tracing::warn!(vm = %vm.name, error = %e, "control connection failed"),
    }
    Ok(known.into_inner())
}

/// Why a port process went before it said whom it serves.
async fn unserved(vm: &VmEntry, monitor: &Monitor, is_new: bool) -> String {
    if !is_new {
        let at = vm.dir.join(CONTROL_SOCKET);
        return format!(
            "the process at {} closes its connections without a word",
            at.display()
        );
    }
    match monitor.ended(&vm.name).await {
        Some(words) => why_ended(vm, &words),
        None => format!(
            "the port process does not serve; {} may say why",
            vm.dir.join(port_log::LOG).display()
        ),
    }
}

/// A status and what was said before it, in one line: the log is a file that nobody looks at.
fn why_ended(vm: &VmEntry, words: &LastWords) -> String {
    use std::os::unix::process::ExitStatusExt;
    let status = ExitStatus::from_raw(words.status);
    let said = last_lines(&words.log);
    match said.is_empty() {
        // Then its log cannot say why.
        true if words.disk_full => {
            let log = vm.dir.join(port_log::LOG);
            format!(
                "the port process ended ({status}), and the disk of {} is full",
                log.display()
            )
        }
        true => format!("the port process ended: {status}"),
        false => format!("the port process ended ({status}): {said}"),
    }
}

/// The last lines of a log's end.
fn last_lines(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let lines: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("; ");
    // It may have been in a guest's hands.
    adit_names::escape(&last).at_most(REASON_MAX).to_string()
}

/// Tells a removed VM's port process to end, and sees to it that it does. A VMM goes when it likes.
async fn quit_when_removed(vm: &VmEntry, monitor: &Monitor, link: &Link, process: Peer) {
    vm.removed.cancelled().await;
    // One that does not read cannot be told.
    let _ = tokio::time::timeout(QUIT_LIMIT, link.quit()).await;
    if !process.is_ours() {
        return std::future::pending().await;
    }
    monitor.end(&vm.name, process.pid(), QUIT_LIMIT).await;
}

fn wrong_vm(vm: &VmEntry, process: Peer, status: &Status) -> String {
    format!(
        "process {} in {} serves `{}` with CID {}, and the VM is `{}` with CID {}: end its VMM and that process, or set its \
         old CID again",
        process.pid(),
        vm.dir.display(),
        status.vm,
        status.cid,
        vm.name,
        vm.cid
    )
}

/// Connects to the port process that is there, or to a new one.
async fn reach(vm: &VmEntry, monitor: &Monitor) -> Result<Connected, String> {
    let keeper = &vm.channel.keeper;
    if keeper.closer().is_full() {
        return Err(
            "too many descriptors that its port process passed cannot be closed: their file system does not answer".into(),
        );
    }
    let spec = vm.spec();
    let own = Hybrid {
        hybrid: vm.dir.join(HYBRID_SOCKET),
        half_closes: false,
    };
    let hybrid = match spec.carrier.way() {
        Way::Auto(None) => Some(&own),
        Way::Auto(Some(hybrid)) | Way::Hybrid(hybrid) => Some(hybrid),
        Way::Device | Way::Kernel(_) => None,
    };
    let start = Start {
        cid: vm.cid,
        busy_poll_us: spec.busy_poll_us,
        ivshmem_mib: spec.ivshmem_mib,
        allow_any_memory: spec.allow_any_memory,
        hybrid: hybrid.map(|h| StartHybrid {
            path: h.hybrid.clone(),
            half_closes: h.half_closes,
        }),
        kernel: spec.carrier.may_be_kernel(),
        auto: matches!(spec.carrier.way(), Way::Auto(_)),
    };
    let left = keeper.pass_on().map_err(|e| e.to_string())?;
    let reached = tokio::select! {
        reached = monitor.reach(&vm.name, start, left, keeper.closer()) => reached,
        // One that is being started is ended by `leave`.
        () = vm.removed.cancelled() => return Err("the VM was removed".into()),
    };
    let connected = reached.map_err(|not| match not {
        NotReached::Failed(why) => why,
        NotReached::Ended(words) => why_ended(vm, &words),
    })?;
    let has = match &connected.found {
        Some(line) => Arc::new(arguments::settings_in(line, &spec)),
        None => {
            if keeper.has_frontend() {
                tracing::warn!(vm = %vm.name, "a new port process goes on with its VMM");
            }
            spec
        }
    };
    vm.channel.set_started_with(has);
    Ok(connected)
}

/// Looks after the log of a port process for as long as it is followed.
async fn keep_log_short(vm: &VmEntry, monitor: &Monitor) {
    let mut changes = vm.watch();
    loop {
        if let Err(e) = monitor.shorten(&vm.name).await
            && !monitor.is_absent()
        {
            tracing::warn!(vm = %vm.name, error = %e, "port.log is not cut");
        }
        // Whoever has much to say changes something. While nothing happens nobody is woken.
        let looked = tokio::time::Instant::now();
        while looked.elapsed() < LOG_LOOK {
            match tokio::time::timeout(LOG_LOOK_IDLE, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return std::future::pending().await,
                Err(_) => break,
            }
        }
    }
}
