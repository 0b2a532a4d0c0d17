//! The script executor: one program with an argument vector, never a shell line.
//!
//! - The child gets exactly: the declared environment plus `PATH` and `ADIT_TASK_ID`, standard input from the step or
//!   /dev/null, two pipes, umask 022, default signals, its own session, the declared user and directory (R92, R97).
//! - The agent reads both pipes until the child has ended and never waits for a pipe that a survivor holds open (R93, R95).
//! - At the timeout: SIGTERM to the process group, a second later SIGKILL to the whole tree, session or not (R95).
//! - When the script ends by itself, what is left in its session is killed; a daemon that made its own session stays.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use adit_tasks::wire::Outcome;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Gid, Pid, Uid, User, getgrouplist};

use super::Executed;
use super::capture::Capture;
use super::tree::{MARKER, Tree};
use crate::crash::{self, Point};
use crate::{log, sys};

/// Between SIGTERM and SIGKILL at a timeout.
const GRACE: Duration = Duration::from_secs(1);
/// Search path of a child whose step declares none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most bytes read from a pipe after the child has ended: what a full pipe can hold, and then no more.
const DRAIN_MAX: usize = 1 << 20;

/// What to run.
#[derive(Clone, Debug)]
pub struct Script {
    /// Absolute path of the program.
    pub program: PathBuf,
    /// Its arguments, byte for byte.
    pub args: Vec<String>,
    /// Standard input; none = /dev/null.
    pub stdin: Option<Vec<u8>>,
    /// The declared environment.
    pub env: BTreeMap<String, String>,
    /// Working directory; none = `/`.
    pub cwd: Option<PathBuf>,
    /// Name of the user to run as; none = the agent's own.
    pub user: Option<String>,
    /// How long it may run.
    pub timeout: Duration,
}

/// Runs it to its end or its timeout. `task` is the task's id in hex, `base` where cgroups can be made.
pub fn run(script: &Script, task: &str, base: Option<&Path>) -> Executed {
    let tree = Tree::new(task, base);
    let executed = match start(script, task, &tree) {
        Ok(child) => supervise(child, script.timeout, &tree),
        Err(why) => Executed::failed(why),
    };
    let daemons = tree.release();
    if daemons > 0 {
        log::event("daemons-left", &[("task", &task), ("count", &daemons)]);
    }
    executed
}

/// A running child and the ends of its pipes.
struct Running {
    pid: i32,
    pidfd: OwnedFd,
    out: Pipe,
    err: Pipe,
}

fn start(script: &Script, task: &str, tree: &Tree) -> Result<Running, String> {
    let user = script.user.as_deref().map(credentials).transpose()?;
    let cwd = script.cwd.as_deref().unwrap_or(Path::new("/"));
    let setup = sys::ChildSetup {
        cgroup: tree.procs(),
        user,
        cwd: CString::new(cwd.as_os_str().as_encoded_bytes()).map_err(|_| "cwd has a NUL byte".to_owned())?,
    };
    let mut command = Command::new(&script.program);
    command.args(&script.args).env_clear().env("PATH", DEFAULT_PATH).envs(&script.env).env(MARKER, task);
    command.stdin(stdin(script.stdin.as_deref()).map_err(|e| format!("standard input: {e}"))?);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = sys::spawn(&mut command, setup).map_err(|e| explain(script, &e))?;
    crash::at(Point::Spawned);
    Running::new(child).map_err(|e| format!("cannot watch the child: {e}"))
}

/// Names the likely culprit of a failed start: the error number alone does not say which step it was.
fn explain(script: &Script, e: &io::Error) -> String {
    let program = script.program.display();
    match (e.kind(), &script.cwd) {
        (_, Some(cwd)) if !cwd.is_dir() => format!("cannot start {program}: cwd {} is no directory", cwd.display()),
        (ErrorKind::NotFound, _) if !script.program.exists() => format!("cannot start {program}: no such program"),
        _ => format!("cannot start {program}: {e}"),
    }
}

fn credentials(name: &str) -> Result<(Vec<Gid>, Gid, Uid), String> {
    let user = User::from_name(name).map_err(|e| format!("user {name:?}: {e}"))?;
    let user = user.ok_or_else(|| format!("user {name:?} is not in /etc/passwd"))?;
    let c_name = CString::new(name).map_err(|_| "user has a NUL byte".to_owned())?;
    let groups = getgrouplist(&c_name, user.gid).map_err(|e| format!("groups of {name:?}: {e}"))?;
    Ok((groups, user.gid, user.uid))
}

/// Text in a memory file: unlike a pipe it needs nobody to feed it.
fn stdin(text: Option<&[u8]>) -> io::Result<Stdio> {
    let Some(text) = text else { return Ok(Stdio::null()) };
    let mut file = File::from(memfd_create(c"stdin", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text)?;
    io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

impl Running {
    fn new(mut child: Child) -> io::Result<Self> {
        let pid = child.id() as i32;
        // Not reaped before `waitid` below, so the number cannot be another process's.
        let pidfd = sys::pidfd_open(Pid::from_raw(pid)).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(Self { pid, pidfd, out: Pipe::new(child.stdout.take())?, err: Pipe::new(child.stderr.take())? })
    }

    /// Reads output until the child has ended (true) or the time is up (false).
    fn until_end(&mut self, deadline: Instant, buf: &mut [u8]) -> bool {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let [ended, out, err] = self.poll(left);
            if out {
                self.out.read_some(buf);
            }
            if err {
                self.err.read_some(buf);
            }
            if ended {
                return true;
            }
        }
    }

    fn poll(&self, limit: Duration) -> [bool; 3] {
        // Rounded up: a sleep that ends a little early would be followed by a busy one.
        let limit = i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX);
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let pipes = [&self.out, &self.err];
        fds.extend(pipes.iter().filter_map(|p| p.file.as_ref()).map(|f| PollFd::new(f.as_fd(), PollFlags::POLLIN)));
        if poll(&mut fds, limit).is_err() {
            return [false; 3];
        }
        let mut ready = fds.iter().map(|f| f.any().unwrap_or(true));
        let ended = ready.next().unwrap_or(false);
        let [out, err] = pipes.map(|p| p.file.is_some() && ready.next().unwrap_or(false));
        [ended, out, err]
    }
}

/// The reading end of a pipe, never waited for.
struct Pipe {
    file: Option<File>,
    capture: Capture,
}

impl Pipe {
    fn new(end: Option<impl Into<OwnedFd>>) -> io::Result<Self> {
        let file = end.map(|e| File::from(e.into()));
        if let Some(f) = &file {
            fcntl(f, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(Self { file, capture: Capture::default() })
    }

    /// Reads once; zero if there is nothing now or for ever.
    fn read_some(&mut self, buf: &mut [u8]) -> usize {
        let Some(file) = &mut self.file else { return 0 };
        match file.read(buf) {
            Ok(0) => self.file = None,
            Ok(n) => {
                self.capture.push(&buf[..n]);
                return n;
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.file = None,
        }
        0
    }

    fn drain(&mut self, buf: &mut [u8]) {
        let mut total = 0;
        while total < DRAIN_MAX {
            match self.read_some(buf) {
                0 => return,
                n => total += n,
            }
        }
    }
}

fn supervise(mut child: Running, timeout: Duration, tree: &Tree) -> Executed {
    let mut buf = vec![0; 64 * 1024];
    let in_time = child.until_end(Instant::now() + timeout, &mut buf);
    let clean = if in_time {
        tree.end_session(child.pid)
    } else {
        let _ = kill(Pid::from_raw(-child.pid), Signal::SIGTERM);
        child.until_end(Instant::now() + GRACE, &mut buf);
        tree.kill()
    };
    child.out.drain(&mut buf);
    child.err.drain(&mut buf);
    let status = exit_status(&child.pidfd);
    crash::at(Point::ChildDone);
    let (outcome, mut reason) = match (in_time, status) {
        (false, _) => (Outcome::TimedOut, format!("killed after {} ms, the step's timeout", timeout.as_millis())),
        (true, Some(0)) => (Outcome::Done, String::new()),
        (true, Some(code)) if code > 128 => (Outcome::Failed, format!("exit status {code} (signal {})", code - 128)),
        (true, Some(code)) => (Outcome::Failed, format!("exit status {code}")),
        (true, None) => (Outcome::Failed, "the child's status is lost".into()),
    };
    if !clean {
        reason.push_str("; some of its processes could not be killed");
    }
    let (stdout, stderr) = (child.out.capture.finish(), child.err.capture.finish());
    Executed { outcome, exit: status, reason, stdout, stderr }
}

/// Reaps the child: its code, or 128 + the signal. None if it is not dead (an uninterruptible wait).
fn exit_status(pidfd: &OwnedFd) -> Option<i32> {
    loop {
        match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Exited(_, code)) => return Some(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Some(128 + signal as i32),
            Err(nix::errno::Errno::EINTR) => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests;
