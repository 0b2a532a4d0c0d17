//! Keeps one port process a VM: finds the one that is there, or starts one, and follows it until it ends.
//!
//! ```text
//! connect ctl.sock ── it answers ──────────────► follow ── it ends ─┐
//!        └── nobody there ─► spawn adit-port ─► connect ─► follow   │
//!        ▲                     (with what is kept)                  │
//!        └──── at once; back-off 50 ms … 2 s if it is short-lived ◄─┘
//! ```
//! Who answers is asked of the kernel ([`whose`](crate::whose)); who it is to be, of [`uids`](crate::uids).
//! A port process outlives aditd: it is its own process group, and its sockets are where the next aditd looks. One that
//! is killed has a successor on the same VMM, for which [`Keeper`](crate::keeper::Keeper) keeps what it needs.

use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use adit_passed::Passed;
use adit_port::control::{CONTROL_SOCKET, Incoming, Quit, Status};
use adit_port::control_io::{self, Message, send};
use tokio_util::sync::CancellationToken;

use crate::cgroup::Cgroups;
use crate::link::{Link, Said};
use crate::spawn::{self, Spawner};
use crate::uids::Uids;
use crate::vm::VmEntry;
use crate::whose::PortProcess;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Port processes that ran for less than this, one after the other, ...
const SHORT: Duration = Duration::from_secs(1);
/// ... are so many before the next is started with a back-off: a guest that kills its own must not keep the host busy.
const SHORT_MAX: u32 = 8;
/// Characters of a port process's reason that are shown.
const REASON_MAX: usize = 500;
/// A port process's log, and what it was before.
pub(crate) const LOG: &str = "port.log";
pub(crate) const LOG_PAST: &str = "port.log.1";
/// Bytes of each at most, but for what is written until the next look; without aditd a port process writes four times as
/// much and then nothing more (`adit_port::log`).
const LOG_MAX: u64 = 1 << 20;
/// How often a log's length is looked at while the VM's state changes, and while it does not.
const LOG_LOOK: Duration = Duration::from_secs(5);
const LOG_LOOK_IDLE: Duration = Duration::from_secs(600);
/// How long a new port process may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Bytes at the end of a log that are looked at.
const LOG_TAIL: u64 = 4096;
/// Lines of them that are shown: an error may be followed by a hint.
const LOG_LINES: usize = 3;
/// A port process is looked for so often while it starts.
const START_LOOK: Duration = Duration::from_millis(10);
/// How long one that is told to end may take.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// What a port process is started with.
#[derive(Debug)]
pub struct Launch {
    /// What starts them.
    pub spawner: Arc<Spawner>,
    /// The users that port processes run as; none: aditd's own.
    pub uids: Option<Uids>,
    /// Where their cgroups are; none: they stay in aditd's.
    pub cgroups: Option<Cgroups>,
}

/// Follows a VM's port process until the VM is removed, and ends it then.
pub async fn supervise(
    vm: Arc<VmEntry>,
    launch: Arc<Launch>,
    on_incoming: impl Fn(Incoming, Passed),
) {
    let mut wait = BACKOFF_MIN;
    let mut short = 0;
    while !vm.removed.is_cancelled() {
        let (ended, ran) = match reach(&vm, &launch).await {
            Ok((socket, process, started)) => {
                let begin = tokio::time::Instant::now();
                let ended = match follow(&vm, socket, process, &on_incoming).await {
                    Ok(true) => Ok(()),
                    // What ended it before it served stands in its log only.
                    Ok(false) if !vm.removed.is_cancelled() => Err(unserved(&vm, started).await),
                    Ok(false) => Ok(()),
                    Err(why) => Err(why),
                };
                (ended, begin.elapsed())
            }
            Err(e) => (Err(e.to_string()), Duration::ZERO),
        };
        if let Some(cgroups) = &launch.cgroups {
            cgroups.leave(vm.name.as_str());
        }
        match ended {
            // Its VM waits.
            Ok(()) if ran >= SHORT => {
                (wait, short) = (BACKOFF_MIN, 0);
                continue;
            }
            Ok(()) if short < SHORT_MAX => short += 1,
            Ok(()) => wait = (wait * 2).min(BACKOFF_MAX),
            Err(trouble) => {
                vm.channel.set_trouble(trouble);
                wait = (wait * 2).min(BACKOFF_MAX);
            }
        }
        tokio::select! {
            () = vm.removed.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    // One that nobody was connected to, or that was not taken for this VM's, holds its directory.
    if let Ok(socket) = control_io::connect(&vm.dir.join(CONTROL_SOCKET)) {
        // It ends by itself, whatever else it is saying, and passing.
        let socket = Passed::new(socket, vm.channel.keeper.closer());
        let _ = send(&socket, &Message::Quit(Quit {}), None);
    }
    vm.channel.keeper.remove();
    if let Some(uids) = &launch.uids {
        uids.leave(vm.name.as_str());
    }
    vm.channel.supervisor_ended();
}

/// Follows a port process until it goes, if it is this VM's; nothing is dialled and nobody let in before it said so.
/// Returns whether it did.
async fn follow(
    vm: &Arc<VmEntry>,
    socket: OwnedFd,
    process: PortProcess,
    on_incoming: &impl Fn(Incoming, Passed),
) -> Result<bool, String> {
    let (link, driver) = Link::new(vm.channel.keeper.closer());
    let process = Arc::new(process);
    let (known, wrong) = (AtomicBool::new(false), OnceLock::new());
    let is_wrong = CancellationToken::new();
    let mut statuses = link.watch();
    let on_status = |status: &Status| {
        if status.session {
            vm.channel.set_stuck(None);
        }
        if (&status.vm, status.cid) != (&vm.name, vm.cid) {
            wrong.get_or_init(|| wrong_vm(vm, &process, status));
            is_wrong.cancel();
        } else if !known.swap(true, Ordering::Relaxed) {
            vm.channel.begin(link.clone(), process.clone());
        }
    };
    let on = |said: Said<'_>| match said {
        Said::Status(status) => on_status(status),
        _ if !known.load(Ordering::Relaxed) => {}
        Said::Incoming(incoming, fd) => on_incoming(incoming, fd),
        Said::Ring(ring) => vm.channel.set_ring(ring),
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
        () = quit_when_removed(vm, &link, &process) => Ok(()),
        () = keep_log_short(vm) => Ok(()),
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

/// A port process that was started, until it is known to serve.
struct Started {
    /// Its status, once it has ended.
    ended: tokio::task::JoinHandle<io::Result<std::process::ExitStatus>>,
    log: PathBuf,
    /// Where what it says begins in the log.
    from: u64,
}

/// Why a port process went before it said whom it serves.
async fn unserved(vm: &VmEntry, started: Option<Started>) -> String {
    let Some(started) = started else {
        let at = vm.dir.join(CONTROL_SOCKET);
        return format!(
            "the process at {} closes its connections without a word",
            at.display()
        );
    };
    match tokio::time::timeout(START_LIMIT, started.ended).await {
        Ok(Ok(Ok(status))) => why_ended(status, &started.log, started.from),
        _ => format!(
            "the port process does not serve; {} may say why",
            started.log.display()
        ),
    }
}

/// A status and what was said before it, in one line: the log is a file that nobody looks at.
fn why_ended(status: std::process::ExitStatus, log: &Path, from: u64) -> String {
    let said = last_words(log, from).unwrap_or_default();
    match said.is_empty() {
        // Then its log cannot say why.
        true if log.parent().is_some_and(crate::disk::is_full) => {
            format!(
                "the port process ended ({status}), and the disk of {} is full",
                log.display()
            )
        }
        true => format!("the port process ended: {status}"),
        false => format!("the port process ended ({status}): {said}"),
    }
}

/// The last lines that were added to a log since `from`.
fn last_words(log: &Path, from: u64) -> io::Result<String> {
    use std::io::SeekFrom;
    let mut file = open_log(log, std::fs::OpenOptions::new().read(true).append(true))?;
    let len = file.metadata()?.len();
    // A log that is shorter now was begun anew.
    let from = if from > len { 0 } else { from };
    file.seek(SeekFrom::Start(from.max(len.saturating_sub(LOG_TAIL))))?;
    let mut text = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("; ");
    // It may have been in a guest's hands.
    Ok(adit_names::escape(&last).at_most(REASON_MAX).to_string())
}

/// Tells a removed VM's port process to end, and sees to it that it does. A VMM goes when it likes.
async fn quit_when_removed(vm: &VmEntry, link: &Link, process: &PortProcess) {
    vm.removed.cancelled().await;
    // One that does not read cannot be told.
    let _ = tokio::time::timeout(QUIT_LIMIT, link.quit()).await;
    if !process.is_ours() {
        return std::future::pending().await;
    }
    process.end_within(QUIT_LIMIT).await;
}

fn wrong_vm(vm: &VmEntry, process: &PortProcess, status: &Status) -> String {
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
async fn reach(
    vm: &VmEntry,
    launch: &Launch,
) -> io::Result<(OwnedFd, PortProcess, Option<Started>)> {
    if vm.channel.keeper.closer().is_full() {
        return Err(io::Error::other(
            "too many descriptors that its port process passed cannot be closed: their file system does not answer",
        ));
    }
    let path = vm.dir.join(CONTROL_SOCKET);
    let Launch {
        spawner,
        uids,
        cgroups,
    } = launch;
    let own = uids.as_ref().map(|uids| uids.of(vm.name.as_str()));
    let own = own.transpose()?;
    if let Ok(socket) = control_io::connect(&path)
        && let Some(process) = PortProcess::behind(socket.as_fd(), &vm.dir, own, None)?
    {
        tracing::info!(vm = %vm.name, pid = process.pid(), "port process found");
        let has = crate::arguments::settings_of(process.pid(), &vm.spec());
        vm.channel.set_started_with(Arc::new(has));
        return Ok((socket, process, None));
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&vm.dir)?;
    let left = vm.channel.keeper.pass_on().map_err(io::Error::other)?;
    if vm.channel.keeper.has_frontend() {
        tracing::warn!(vm = %vm.name, "a new port process goes on with its VMM");
    }
    let log = vm.dir.join(LOG);
    let stderr = log_file(&vm.dir)?;
    let from = stderr.metadata()?.len();
    let spec = vm.spec();
    vm.channel.set_started_with(spec.clone());
    let mut command = spawner.command();
    command
        .args(left.as_ref().map(|_| "--resume"))
        .arg("--name")
        .arg(vm.name.as_str())
        .arg("--cid")
        .arg(vm.cid.to_string())
        .arg("--dir")
        .arg(&vm.dir)
        .arg("--busy-poll-us")
        .arg(spec.busy_poll_us.to_string())
        .arg("--ivshmem-mib")
        .arg(spec.ivshmem_mib.to_string())
        .args(spec.allow_any_memory.then_some("--allow-any-memory"))
        .args(own.map(|own| format!("--uid={own}")))
        // Nothing of what aditd was told, by systemd or by a person, is its business.
        .env_clear()
        // Not the terminal's group: Ctrl-C ends aditd, and not the VMs' channels.
        .process_group(0);
    // Its log is a file: a pipe that nobody reads any more would stop it.
    let child = spawner.spawn(command, left, stderr.into()).await;
    let mut child = child.map_err(|e| {
        let binary = spawner.binary().display();
        io::Error::new(e.kind(), format!("cannot start {binary}: {e}"))
    })?;
    // Its number is its own until it is waited for.
    if let Some(cgroups) = cgroups
        && let Err(e) = cgroups.enter(vm.name.as_str(), child.id())
    {
        tracing::warn!(vm = %vm.name, error = %e, "the port process stays in aditd's cgroup");
    }
    let (started, pidfd) = match PortProcess::started(child.id()) {
        Ok(started) => started,
        Err(e) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(e);
        }
    };
    // Reaped when it ends, should this aditd still be there.
    let mut ended = tokio::spawn(spawn::reap(child, pidfd));
    let deadline = tokio::time::Instant::now() + START_LIMIT;
    let reached = loop {
        match control_io::connect(&path) {
            Ok(socket) => {
                let behind = PortProcess::behind(socket.as_fd(), &vm.dir, own, Some(&started))?;
                if let Some(process) = behind {
                    break (socket, process);
                }
            }
            Err(e) if tokio::time::Instant::now() >= deadline => return Err(e),
            Err(_) => {}
        }
        if tokio::time::Instant::now() >= deadline {
            let at = path.display();
            let text = format!("who listens at {at} is not the port process that was started");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        if vm.removed.is_cancelled() {
            // It may be hanging, and nobody would ever know it again.
            started.end_within(Duration::ZERO).await;
            return Err(io::Error::other("the VM was removed"));
        }
        if ended.is_finished() {
            let status = (&mut ended).await.map_err(io::Error::other)??;
            return Err(io::Error::other(why_ended(status, &log, from)));
        }
        tokio::time::sleep(START_LOOK).await;
    };
    let (socket, process) = reached;
    Ok((socket, process, Some(Started { ended, log, from })))
}

fn log_file(dir: &Path) -> io::Result<std::fs::File> {
    shorten(dir)?;
    open_log(&dir.join(LOG), std::fs::OpenOptions::new().append(true))
}

/// The directory is the port process's, too: what it puts in a log's place is not followed.
fn open_log(path: &Path, how: &mut std::fs::OpenOptions) -> io::Result<std::fs::File> {
    how.create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Looks after the log of a port process for as long as it is followed.
async fn keep_log_short(vm: &VmEntry) {
    let mut changes = vm.watch();
    loop {
        if let Err(e) = shorten(&vm.dir) {
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

/// Moves the end of a log that is too long into the file of its past, and empties it. Whoever writes it has it open for
/// appending, and goes on at its start.
fn shorten(dir: &Path) -> io::Result<()> {
    let path = dir.join(LOG);
    let long = std::fs::symlink_metadata(&path).is_ok_and(|m| m.is_file() && m.len() > LOG_MAX);
    if !long {
        return Ok(());
    }
    let mut log = open_log(&path, std::fs::OpenOptions::new().read(true).write(true))?;
    let mut end = Vec::new();
    log.seek(io::SeekFrom::End(
        -i64::try_from(LOG_MAX).unwrap_or(i64::MAX),
    ))?;
    (&log).take(LOG_MAX).read_to_end(&mut end)?;
    let past = dir.join(LOG_PAST);
    // Made anew, so that it is a file of ours.
    match std::fs::remove_file(&past) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    open_log(&past, std::fs::OpenOptions::new().write(true))?.write_all(&end)?;
    log.set_len(0)
}
