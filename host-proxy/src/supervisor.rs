//! Keeps one port process a VM: finds the one that is there, or starts one, and follows it until it ends.
//!
//! ```text
//! connect ctl.sock ── it answers ──────────────► follow ── it ends ─┐
//!        └── nobody there ─► spawn adit-port ─► connect ─► follow   │
//!        ▲                     (with what is kept)                  │
//!        └──── at once; back-off 50 ms … 2 s if it is short-lived ◄─┘
//! ```
//! A port process outlives aditd: it is its own process group, and its sockets are where the next aditd looks. One that
//! is killed has a successor on the same VMM, for which [`Keeper`](crate::keeper::Keeper) keeps what it needs.

use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use adit_port::control::{CONTROL_SOCKET, Incoming, Quit, Status};
use adit_port::control_io::{Message, send};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::ports::{Link, Said};
use crate::registry::VmEntry;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Port processes that ran for less than this, one after the other, ...
const SHORT: Duration = Duration::from_secs(1);
/// ... are so many before the next is started with a back-off: a guest that kills its own must not keep the host busy.
const SHORT_MAX: u32 = 8;
/// Characters of a port process's reason that are shown.
const REASON_MAX: usize = 500;
/// A port process's log, and what it was before.
const LOG: &str = "port.log";
const LOG_PAST: &str = "port.log.1";
/// Bytes of each at most, but for what is written until the next look; without aditd a port process writes four times as
/// much and then nothing more (`adit_port::log`).
const LOG_MAX: u64 = 1 << 20;
/// How often a log's length is looked at.
const LOG_LOOK: Duration = Duration::from_secs(5);
/// How long a new port process may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(10);
/// A port process is looked for so often while it starts.
const START_LOOK: Duration = Duration::from_millis(10);

/// Follows a VM's port process until the VM is removed, and ends it then.
pub async fn supervise(vm: Arc<VmEntry>, binary: PathBuf, on_incoming: impl Fn(Incoming, OwnedFd)) {
    let mut wait = BACKOFF_MIN;
    let mut short = 0;
    while !vm.removed.is_cancelled() {
        let (ended, ran) = match reach(&vm, &binary).await {
            Ok(socket) => {
                let begin = tokio::time::Instant::now();
                (follow(&vm, socket, &on_incoming).await, begin.elapsed())
            }
            Err(e) => (Err(e.to_string()), Duration::ZERO),
        };
        match ended {
            // Its VM waits.
            Ok(()) if ran >= SHORT => {
                (wait, short) = (BACKOFF_MIN, 0);
                continue;
            }
            Ok(()) if short < SHORT_MAX => short += 1,
            Ok(()) => wait = (wait * 2).min(BACKOFF_MAX),
            Err(trouble) => {
                if vm.set_trouble(Some(trouble.clone())) {
                    tracing::error!(vm = %vm.config.name, error = trouble, "no port process");
                }
                wait = (wait * 2).min(BACKOFF_MAX);
            }
        }
        tokio::select! {
            () = vm.removed.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    // One that nobody was connected to, or that was not taken for this VM's, holds its directory.
    if let Ok(socket) = dial(&vm.dir.join(CONTROL_SOCKET)) {
        // It ends by itself, whatever else it is saying.
        let _ = send(&socket, &Message::Quit(Quit {}), None);
    }
    vm.keeper.remove();
    vm.supervisor_ended();
}

/// Follows a port process until it goes, if it is this VM's; nothing is dialled and nobody let in before it said so.
async fn follow(
    vm: &Arc<VmEntry>,
    socket: OwnedFd,
    on_incoming: &impl Fn(Incoming, OwnedFd),
) -> Result<(), String> {
    let (link, driver) = Link::new();
    let (known, wrong) = (AtomicBool::new(false), OnceLock::new());
    let is_wrong = CancellationToken::new();
    let mut statuses = link.watch();
    let on_status = |status: &Status| {
        if status.session {
            vm.set_stuck(None);
        }
        if (status.vm.as_str(), status.cid) != (vm.config.name.as_str(), vm.config.cid) {
            wrong.get_or_init(|| wrong_vm(vm, status));
            is_wrong.cancel();
        } else if !known.swap(true, Ordering::Relaxed) {
            vm.set_trouble(None);
            vm.set_link(Some(link.clone()));
        }
    };
    let on = |said: Said<'_>| match said {
        Said::Status(status) => on_status(status),
        _ if !known.load(Ordering::Relaxed) => {}
        Said::Incoming(incoming, fd) => on_incoming(incoming, fd),
        Said::Ring(ring) => vm.set_ring(Some(ring)),
        Said::Held => vm.set_held(true),
        Said::Handover(handover, fds) => {
            let seq = handover.seq;
            vm.keeper.keep(handover, fds);
            link.kept(seq);
        }
        Said::Stuck(reason) => {
            // Its words are the port process's, which may be in its guest's hands.
            let reason: String = reason.chars().take(REASON_MAX).collect();
            let reason = (!reason.is_empty()).then(|| reason.escape_debug().to_string());
            if let Some(reason) = &reason {
                tracing::error!(vm = %vm.config.name, reason, "the VM needs a power cycle");
                vm.keeper.forget();
            }
            vm.set_stuck(reason);
        }
    };
    let run = driver.run(socket, on);
    let ended = tokio::select! {
        ended = run => ended,
        () = is_wrong.cancelled() => Ok(()),
        () = async { while statuses.changed().await.is_ok() { vm.touch(); } std::future::pending().await } => Ok(()),
        () = async { vm.removed.cancelled().await; link.quit().await; std::future::pending().await } => Ok(()),
        () = keep_log_short(vm) => Ok(()),
    };
    vm.set_link(None);
    vm.set_ring(None);
    vm.set_held(false);
    if let Some(why) = wrong.into_inner() {
        return Err(why);
    }
    match ended {
        Ok(()) => tracing::info!(vm = %vm.config.name, "port process has gone"),
        Err(e) => tracing::warn!(vm = %vm.config.name, error = %e, "control connection failed"),
    }
    Ok(())
}

fn wrong_vm(vm: &VmEntry, status: &Status) -> String {
    format!(
        "process {} in {} serves `{}` with CID {}, and the VM is `{}` with CID {}: end its VMM and that process, or set its \
         old CID again",
        status.pid,
        vm.dir.display(),
        status.vm.escape_debug(),
        status.cid,
        vm.config.name,
        vm.config.cid
    )
}

/// Connects to the port process that is there, or to a new one.
async fn reach(vm: &VmEntry, binary: &Path) -> io::Result<OwnedFd> {
    let path = vm.dir.join(CONTROL_SOCKET);
    if let Ok(socket) = dial(&path) {
        tracing::info!(vm = %vm.config.name, "port process found");
        return Ok(socket);
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&vm.dir)?;
    let left = vm.keeper.pass_on().map_err(io::Error::other)?;
    if vm.keeper.has_frontend() {
        tracing::warn!(vm = %vm.config.name, "a new port process goes on with its VMM");
    }
    let (resume, stdin) = match left {
        Some(socket) => (Some("--resume"), Stdio::from(socket)),
        None => (None, Stdio::null()),
    };
    let mut child = Command::new(binary)
        .args(resume)
        .arg("--name")
        .arg(vm.config.name.as_str())
        .arg("--cid")
        .arg(vm.config.cid.to_string())
        .arg("--dir")
        .arg(&vm.dir)
        .arg("--busy-poll-us")
        .arg(vm.config.busy_poll_us.to_string())
        .arg("--ivshmem-mib")
        .arg(vm.config.ivshmem_mib.to_string())
        .stdin(stdin)
        .stdout(Stdio::null())
        // A file: a pipe that nobody reads any more would stop it.
        .stderr(log_file(&vm.dir)?)
        // Not the terminal's group: Ctrl-C ends aditd, and not the VMs' channels.
        .process_group(0)
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("cannot start {}: {e}", binary.display())))?;
    let deadline = tokio::time::Instant::now() + START_LIMIT;
    let socket = loop {
        match dial(&path) {
            Ok(socket) => break socket,
            Err(e) if tokio::time::Instant::now() >= deadline => return Err(e),
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!(
                "{} ended: {status}",
                binary.display()
            )));
        }
        tokio::time::sleep(START_LOOK).await;
    };
    // Reaped when it ends, should this aditd still be there.
    tokio::spawn(async move { child.wait().await });
    Ok(socket)
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
    let mut look = tokio::time::interval(LOG_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        if let Err(e) = shorten(&vm.dir) {
            tracing::warn!(vm = %vm.config.name, error = %e, "port.log is not cut");
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

fn dial(path: &Path) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}
