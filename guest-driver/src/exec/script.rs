//! The script executor: one program with an argument vector, never a shell line.
//!
//! - The text is a file that only its user can read: `INTERPRETER FILE ARGS…`.
//! - The child gets exactly: the declared environment plus `PATH`, `HOME`, `USER`, `LANG` and `ADIT_TASK_ID`, /dev/null
//!   as standard input, two pipes, umask 022, default signals, its own session, the declared user and directory (R92, R97).
//!   The pipes belong to that user, so that it can open /dev/stdout and /dev/stderr.
//! - The agent reads both pipes until the child has ended. It never waits for a pipe that a surviving process holds open
//!   (R93, R95).
//! - At the timeout: SIGTERM to the process group, a second later SIGKILL to the whole tree, session or not (R95).
//! - When the script ends by itself, what is left in its session is killed. A daemon that made its own session stays, also
//!   when the agent ends or is restarted (see `cgroup`). If the script still runs then, its daemons end with it.
//! - The child has nothing of what the agent has set for itself (see `protect`).

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_tasks::action::Script;
use adit_tasks::wire::Outcome;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User, getgrouplist};

use super::capture::Capture;
use super::reap::{self, Claim};
use super::tree::{MARKER, Tree, kill_orphans};
use super::{Executed, Executor, Job};
use crate::crash::{self, Point};
use crate::policy::Touches;
use crate::runner::remark;
use crate::{clock, log, protect, sys};

/// Between SIGTERM and SIGKILL at a timeout.
const GRACE: Duration = Duration::from_secs(1);
/// Search path of a child whose step declares none.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most bytes read from a pipe after the child has ended: what a full pipe can hold, and then no more.
const DRAIN_MAX: usize = 1 << 20;

/// Where scripts run.
#[derive(Clone, Debug, Default)]
pub struct Dirs {
    /// Directory in which cgroups can be made, if anywhere.
    pub cgroups: Option<PathBuf>,
    /// Directory of the texts, see [`prepare`].
    pub dir: PathBuf,
}

/// Makes the directory of the texts, and removes texts that an earlier agent left. Everybody may pass through it and
/// nobody may list it; each text can be read only by the user that its script runs as.
///
/// # Errors
/// It cannot be made, or is somebody else's.
pub fn prepare(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(dir)?;
    let meta = fs::symlink_metadata(dir)?;
    if !meta.is_dir() || meta.uid() != Uid::effective().as_raw() || meta.mode() & 0o022 != 0 {
        return Err(io::Error::other(format!(
            "{} is not a directory of our own",
            dir.display()
        )));
    }
    for entry in fs::read_dir(dir)?
        .flatten()
        .filter(|e| e.path().extension().is_some_and(|x| x == "script"))
    {
        fs::remove_file(entry.path())?;
    }
    Ok(())
}

impl Executor for Script {
    fn touches(&self) -> Touches<'_> {
        Touches::script(&self.run_as)
    }

    /// Runs it to its end or its timeout.
    fn execute(&self, job: &Job<'_>) -> Executed {
        let timeout = Duration::from_secs(self.timeout_s.into());
        run_for(self, job.task, job.scripts, timeout)
    }
}

fn run_for(script: &Script, task: &str, place: &Dirs, timeout: Duration) -> Executed {
    if !begin(task, place) {
        return Executed::failed("it had not begun");
    }
    let tree = Tree::new(task, place.cgroups.as_deref());
    let text = place.dir.join(format!("{task}.script"));
    // A start that takes too long has the step's time, too.
    let deadline = Instant::now() + timeout;
    let (pid, executed) = match start(script, task, (&text, timeout), &tree) {
        Ok(child) => {
            // Whoever came before it was there has not found it.
            if running().current.as_ref().is_some_and(|c| c.is_to_end) {
                tree.kill(child.pid);
            }
            (
                child.pid,
                supervise(child, script, (timeout, deadline), &tree),
            )
        }
        Err(why) => (0, Executed::failed(why)),
    };
    let _ = fs::remove_file(&text);
    let daemons = tree.release(pid);
    if daemons > 0 {
        log::event("daemons-left", &[("task", &task), ("count", &daemons)]);
    }
    running().current = None;
    executed
}

/// The script that runs.
struct Current {
    task: String,
    /// Where its cgroup is.
    cgroups: Option<PathBuf>,
    /// It is to be ended as soon as it is there.
    is_to_end: bool,
}

/// What runs, and what is not to.
struct Scripts {
    current: Option<Current>,
    /// The task that was to be ended last: it may have been about to begin.
    ended: String,
}

/// Notes that a task's script begins; false if it is not to.
fn begin(task: &str, place: &Dirs) -> bool {
    let mut running = running();
    let may = running.ended != task;
    running.current = may.then(|| Current {
        task: task.to_owned(),
        cgroups: place.cgroups.clone(),
        is_to_end: false,
    });
    may
}

fn running() -> MutexGuard<'static, Scripts> {
    static RUNNING: Mutex<Scripts> = Mutex::new(Scripts {
        current: None,
        ended: String::new(),
    });
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends this process, and before it the script that runs: no agent would watch its timeout. The lock stays locked, so that
/// the script's end does not become a result: the next agent reports it as interrupted. No script starts from here on: one
/// that started after the search would outlive the agent.
pub fn stop() -> ! {
    let running = running();
    let _closed = reap::close();
    if let Some(Current { task, cgroups, .. }) = &running.current {
        let dead = kill_orphans(task, cgroups.as_deref());
        log::event("stopped", &[("task", task), ("killed", &dead)]);
    }
    std::process::exit(0)
}

/// Ends the script of a task with all its processes. Its result says how it ended. One that has not begun does not begin.
pub fn end(task: &str) {
    let mut running = running();
    running.ended = task.to_owned();
    if let Some(current) = running.current.as_mut().filter(|c| c.task == task) {
        current.is_to_end = true;
        let dead = kill_orphans(task, current.cgroups.as_deref());
        log::event("ended-early", &[("task", &task), ("killed", &dead)]);
    }
}

/// A running child and the reading ends of its pipes.
struct Running {
    child: Child,
    /// Dropped after the child's status was taken.
    _claim: Claim,
    pid: i32,
    pidfd: OwnedFd,
    out: Pipe,
    err: Pipe,
}

fn start(
    script: &Script,
    task: &str,
    (text, limit): (&Path, Duration),
    tree: &Tree,
) -> Result<Running, String> {
    let user =
        User::from_name(&script.run_as).map_err(|e| format!("user {:?}: {e}", script.run_as))?;
    let user = user.ok_or_else(|| format!("user {:?} is not in /etc/passwd", script.run_as))?;
    hand_over(text, &script.script, &user).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            format!(
                "no-space: guest disk full: cannot write the script to {}: {e}",
                text.display()
            )
        }
        _ => format!("cannot write the script to {}: {e}", text.display()),
    })?;
    let setup = sys::ChildSetup {
        cgroup: tree.procs(),
        user: credentials(&user)?,
        cwd: CString::new(script.cwd.as_str()).map_err(|_| "cwd has a NUL byte".to_owned())?,
        inherited: protect::inherited(),
        tty: false,
        dies_with: None,
    };
    let mut command = Command::new(&script.interpreter);
    command.arg(text).args(&script.args).env_clear();
    command
        .env("PATH", DEFAULT_PATH)
        .env("HOME", &user.dir)
        .env("USER", &user.name)
        .env("LANG", "C.UTF-8");
    command.envs(&script.env).env(MARKER, task);
    let pipe = || output_pipe(&user).map_err(|e| format!("cannot make a pipe: {e}"));
    let ([out, to_out], [err, to_err]) = (pipe()?, pipe()?);
    command.stdin(Stdio::null()).stdout(to_out).stderr(to_err);
    let child = reap::spawn_within(limit, || sys::spawn(&mut command, setup));
    let child = child.map_err(|e| explain(script, &e))?;
    crash::at(Point::Spawned);
    Running::new(child, [out, err], script.output_cap as usize)
        .map_err(|e| format!("cannot watch the child: {e}"))
}

/// The reading and the writing end. Only a pipe's owner may open it again by the name /dev/stdout, so the script's user
/// becomes its owner.
pub(crate) fn output_pipe(user: &User) -> io::Result<[OwnedFd; 2]> {
    let (reader, writer) = io::pipe()?;
    if user.uid != Uid::effective() {
        nix::unistd::fchown(&writer, Some(user.uid), Some(user.gid))?;
    }
    Ok([reader.into(), writer.into()])
}

/// Writes the text; makes its directory again if it is gone: somebody who cleans /run must not make every later task fail.
fn hand_over(path: &Path, text: &str, user: &User) -> io::Result<()> {
    match (write_text(path, text, user), path.parent()) {
        (Err(e), Some(dir)) if e.kind() == ErrorKind::NotFound => {
            prepare(dir)?;
            write_text(path, text, user)
        }
        (done, _) => done,
    }
}

/// The text as a new file that only the script's user can read.
fn write_text(path: &Path, text: &str, user: &User) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    if user.uid != Uid::effective() {
        nix::unistd::fchown(&file, Some(user.uid), Some(user.gid))?;
    }
    Ok(())
}

/// Says which step of a start most likely failed: the error number alone does not.
fn explain(script: &Script, e: &io::Error) -> String {
    let program = &script.interpreter;
    if !Path::new(&script.cwd).is_dir() {
        return format!("cannot start {program}: cwd {} is no directory", script.cwd);
    }
    match e.kind() {
        ErrorKind::NotFound if !Path::new(program).exists() => {
            format!("cannot start {program}: no such program")
        }
        _ => format!("cannot start {program}: {e}"),
    }
}

/// Groups, gid and uid to become; none if the agent is that user already and has no right to change its groups.
pub(crate) fn credentials(user: &User) -> Result<Option<(Vec<Gid>, Gid, Uid)>, String> {
    if user.uid == Uid::effective() && !user.uid.is_root() {
        return Ok(None);
    }
    let name = CString::new(user.name.as_str()).map_err(|_| "user has a NUL byte".to_owned())?;
    let groups =
        getgrouplist(&name, user.gid).map_err(|e| format!("groups of {:?}: {e}", user.name))?;
    Ok(Some((groups, user.gid, user.uid)))
}

impl Running {
    fn new(
        (mut child, claim): (Child, Claim),
        [out, err]: [OwnedFd; 2],
        cap: usize,
    ) -> io::Result<Self> {
        let pid = child.id() as i32;
        // Nobody reaps it before `status` below, so the number cannot be another process's.
        let pidfd = sys::pidfd_open(Pid::from_raw(pid)).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let (out, err) = (Pipe::new(out, cap)?, Pipe::new(err, cap)?);
        Ok(Self {
            child,
            _claim: claim,
            pid,
            pidfd,
            out,
            err,
        })
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

    /// Reaps the child. None if it is not dead (an uninterruptible wait).
    fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    fn poll(&self, limit: Duration) -> [bool; 3] {
        let limit = clock::poll_limit(limit);
        let mut fds = vec![PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let pipes = [&self.out, &self.err];
        fds.extend(
            pipes
                .iter()
                .filter_map(|p| p.file.as_ref())
                .map(|f| PollFd::new(f.as_fd(), PollFlags::POLLIN)),
        );
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
    fn new(end: OwnedFd, cap: usize) -> io::Result<Self> {
        fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self {
            file: Some(end.into()),
            capture: Capture::new(cap),
        })
    }

    /// Reads once; zero if there is nothing now, or nothing will come.
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

fn supervise(
    mut child: Running,
    script: &Script,
    (timeout, deadline): (Duration, Instant),
    tree: &Tree,
) -> Executed {
    let mut buf = vec![0; 64 * 1024];
    let in_time = child.until_end(deadline, &mut buf);
    let clean = if in_time {
        tree.end_session(child.pid)
    } else {
        let _ = kill(Pid::from_raw(-child.pid), Signal::SIGTERM);
        child.until_end(Instant::now() + GRACE, &mut buf);
        tree.kill(child.pid)
    };
    child.out.drain(&mut buf);
    child.err.drain(&mut buf);
    let status = child.status();
    crash::at(Point::ChildDone);
    let exit = status.and_then(exit_code);
    let (outcome, mut reason) = match (in_time, status) {
        (false, _) => (
            Outcome::TimedOut,
            format!(
                "killed after {} ms, the step's timeout",
                timeout.as_millis()
            ),
        ),
        (true, None) => (Outcome::Failed, "the child's status is lost".into()),
        (true, Some(_)) if exit.is_some_and(|code| script.success_codes.contains(&code)) => {
            (Outcome::Done, String::new())
        }
        (true, Some(status)) => (Outcome::Failed, how_ended(status)),
    };
    if outcome != Outcome::Done {
        for limit in tree.limits_hit() {
            remark(&mut reason, &limit);
        }
    }
    if !clean {
        remark(&mut reason, "some of its processes could not be killed");
    }
    let (stdout, stderr) = (child.out.capture.finish(), child.err.capture.finish());
    Executed {
        outcome,
        exit,
        reason,
        stdout,
        stderr,
    }
}

/// The exit status in the report: the child's code, or 128 + the signal that ended it, as shells do.
fn exit_code(status: ExitStatus) -> Option<i32> {
    status.code().or(status.signal().map(|signal| 128 + signal))
}

/// A code above 128 may be a plain code: only the kernel knows whether there was a signal.
fn how_ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (_, Some(signal)) => format!("killed by signal {signal}"),
        (Some(code), None) => format!("exit status {code}"),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests;
