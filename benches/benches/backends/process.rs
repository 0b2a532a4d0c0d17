//! A backend as a process: starts it, asks for its counters, ends it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use adit_channel::device::GuestCid;
use adit_testkit::DriverConfig;
use anyhow::Context;

use crate::frontend::Attached;
use crate::guest::Guest;
use crate::hybrid::{SOCKETS, Totals};

/// The polling time for a VM whose vCPUs do not need the backend's core, microseconds.
pub const BUSY_POLL_US: u32 = 50;

/// Which backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// This program, as in `hybrid`. It polls for [`BUSY_POLL_US`] before it sleeps.
    Ours,
    /// The same without `busy_poll_us`, which is the default.
    OursSleeping,
    /// `vhost-device-vsock`.
    Peer,
}

/// A running backend with a guest.
pub struct Backend {
    /// The guest.
    pub guest: Guest,
    child: Child,
    questions: Option<(ChildStdin, BufReader<ChildStdout>)>,
    dir: tempfile::TempDir,
    /// Where the guest's streams to [`SOCKETS`] arrive.
    pub listeners: Vec<UnixListener>,
}

/// What a process has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time of all threads, ns.
    pub cpu_ns: u64,
    /// How often a thread slept or was preempted.
    pub switches: u64,
    /// Anonymous memory, bytes.
    pub anon: u64,
}

impl Backend {
    /// Starts a backend and attaches a guest.
    pub fn start(kind: Kind, peer: Option<&Path>, config: DriverConfig) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let listeners = SOCKETS
            .map(|port| {
                let listener = UnixListener::bind(dir.path().join(format!("uds_{port}")))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })
            .collect::<std::io::Result<_>>()?;
        let socket = dir.path().join("vhost.sock");
        let (program, args) = match (kind, peer) {
            (Kind::Peer, Some(peer)) => {
                let uds = dir.path().join("uds");
                let (socket, uds) = (socket.display(), uds.display());
                let vm = format!("guest-cid=3,socket={socket},uds-path={uds}");
                (peer.to_owned(), vec!["--vm".into(), vm.into()])
            }
            _ => {
                let us = if kind == Kind::Ours { BUSY_POLL_US } else { 0 };
                let args = vec![
                    "--serve".into(),
                    dir.path().as_os_str().to_owned(),
                    us.to_string().into(),
                ];
                (std::env::current_exe()?, args)
            }
        };
        let mut command = Command::new(&program);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // The peer logs thousands of broken connections.
        command.env("RUST_LOG", "off").stderr(Stdio::null());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let questions = child
            .stdin
            .take()
            .zip(child.stdout.take().map(BufReader::new));
        let cid = GuestCid::new(3).context("a guest's CID")?;
        let attached = Attached::new(&socket, cid, config)?;
        Ok(Self {
            guest: Guest::new(attached),
            child,
            questions,
            dir,
            listeners,
        })
    }

    /// The socket that host programs connect to.
    pub fn uds(&self) -> PathBuf {
        self.dir.path().join("uds")
    }

    /// Asks our backend for its counters.
    pub fn totals(&mut self) -> anyhow::Result<Totals> {
        let (ask, answer) = self.questions.as_mut().context("no pipe to the backend")?;
        ask.write_all(b"?")?;
        let mut line = String::new();
        answer.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Reads what the process has used.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let mut usage = Usage::default();
        for task in std::fs::read_dir(proc.join("task"))? {
            let task = task?.path();
            let sched = std::fs::read_to_string(task.join("schedstat"))?;
            let ns = sched.split_whitespace().next().and_then(|n| n.parse().ok());
            usage.cpu_ns += ns.unwrap_or(0u64);
            let status = std::fs::read_to_string(task.join("status"))?;
            usage.switches += field(&status, "voluntary_ctxt_switches:");
            usage.switches += field(&status, "nonvoluntary_ctxt_switches:");
        }
        let status = std::fs::read_to_string(proc.join("status"))?;
        usage.anon = field(&status, "RssAnon:") << 10;
        Ok(usage)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // An error means that the process has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
