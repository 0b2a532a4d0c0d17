//! Keeps one port process a VM: finds the one that is there, or starts one, and follows it until it ends.
//!
//! ```text
//! connect ctl.sock ── it answers ──────────────► follow ── it ends ─┐
//!        └── nobody there ─► spawn adit-port ─► connect ─► follow   │
//!        ▲                                                          │
//!        └────────────────── back-off 50 ms … 2 s ◄─────────────────┘
//! ```
//! A port process outlives aditd: it is its own process group, and its sockets are where the next aditd looks.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use adit_port::control::{CONTROL_SOCKET, Incoming};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use tokio::process::Command;

use crate::ports::Link;
use crate::registry::VmEntry;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long a new port process may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(10);
/// A port process is looked for so often while it starts.
const START_LOOK: Duration = Duration::from_millis(10);

/// Follows a VM's port process until the VM is removed.
pub async fn supervise(vm: Arc<VmEntry>, binary: PathBuf, on_incoming: impl Fn(Incoming, OwnedFd)) {
    let mut wait = BACKOFF_MIN;
    while !vm.removed.is_cancelled() {
        match reach(&vm, &binary).await {
            Ok(socket) => {
                wait = BACKOFF_MIN;
                follow(&vm, socket, &on_incoming).await;
            }
            Err(e) => {
                tracing::warn!(vm = %vm.config.name, error = %e, "no port process");
                wait = (wait * 2).min(BACKOFF_MAX);
            }
        }
        tokio::select! {
            () = vm.removed.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn follow(vm: &Arc<VmEntry>, socket: OwnedFd, on_incoming: &impl Fn(Incoming, OwnedFd)) {
    let (link, driver) = Link::new();
    let on_status = |status: &adit_port::control::Status| {
        if (status.vm.as_str(), status.cid) != (vm.config.name.as_str(), vm.config.cid) {
            tracing::error!(vm = %vm.config.name, found = %status.vm, cid = status.cid, "the port process is another VM's");
        }
    };
    vm.set_link(Some(link.clone()));
    let mut statuses = link.watch();
    let run = driver.run(socket, on_status, on_incoming);
    let ended = async {
        tokio::select! {
            ended = run => ended,
            () = async { while statuses.changed().await.is_ok() { vm.touch(); } std::future::pending().await } => Ok(()),
            () = async { vm.removed.cancelled().await; link.quit().await; std::future::pending().await } => Ok(()),
        }
    }
    .await;
    vm.set_link(None);
    match ended {
        Ok(()) => tracing::info!(vm = %vm.config.name, "port process has gone"),
        Err(e) => tracing::warn!(vm = %vm.config.name, error = %e, "control connection failed"),
    }
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
    let mut child = Command::new(binary)
        .arg("--name")
        .arg(vm.config.name.as_str())
        .arg("--cid")
        .arg(vm.config.cid.to_string())
        .arg("--dir")
        .arg(&vm.dir)
        .stdin(Stdio::null())
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
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("port.log"))
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}
