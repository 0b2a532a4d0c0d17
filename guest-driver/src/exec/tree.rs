//! Every process that a task started, however it hid: own session, double fork, ignored signals.
//!
//! With a cgroup the kernel knows them all. Without one the agent is their *subreaper*: a process whose parent has died
//! becomes the agent's child, so that every descendant of the task stays a descendant of the agent. Daemons that an
//! earlier task left on purpose are descendants too, so those that exist when a task starts are remembered and spared.
//! After a crash of the agent that link is cut; then the environment marker `ADIT_TASK_ID` and the sessions of the
//! processes that bear it are what is left to find them by.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::proc::{self, Proc, ProcId};

/// Environment variable that every process of a task inherits.
pub const MARKER: &str = "ADIT_TASK_ID";
/// How long killing may take before it is given up as impossible (a process in an uninterruptible wait).
const KILL_LIMIT: Duration = Duration::from_secs(4);

/// The processes of one task.
#[derive(Debug)]
pub struct Tree {
    cgroup: Option<Cgroup>,
    /// Descendants of the agent that are not of this task.
    spared: HashSet<ProcId>,
}

impl Tree {
    /// Prepares for a task whose id is this hex; `base` is where cgroups can be made, if anywhere.
    pub fn new(task: &str, base: Option<&Path>) -> Self {
        let table = proc::table();
        let spared = descendants(&table, &HashSet::new()).map(|p| p.id).collect();
        Self {
            cgroup: base.and_then(|b| Cgroup::create(b, task)),
            spared,
        }
    }

    /// Where the child enters the task's cgroup.
    pub fn procs(&self) -> Option<OwnedFd> {
        self.cgroup.as_ref().and_then(Cgroup::procs)
    }

    /// Kills everything; false if something could not be killed.
    pub fn kill(&self) -> bool {
        let until = Instant::now() + KILL_LIMIT;
        let in_cgroup = self.cgroup.as_ref().is_none_or(|c| c.kill(until));
        // Also with a cgroup: a privileged child can move itself out of it.
        in_cgroup
            & kill_until(until, || {
                descendants(&proc::table(), &self.spared)
                    .map(|p| p.id)
                    .collect()
            })
    }

    /// Kills what is left in the script's own session after the script ended by itself: background jobs. A daemon,
    /// which has a session of its own, is left running.
    pub fn end_session(&self, session: i32) -> bool {
        let members = || {
            proc::table()
                .values()
                .filter(|p| p.session == session && !p.zombie)
                .map(|p| p.id)
                .collect()
        };
        kill_until(Instant::now() + KILL_LIMIT, members)
    }

    /// Reaps what became our child and ended, and removes the cgroup; returns how many daemons go on.
    pub fn release(self) -> usize {
        let me = std::process::id() as i32;
        let table = proc::table();
        for p in table
            .values()
            .filter(|p| p.zombie && p.parent == me && !self.spared.contains(&p.id))
        {
            let _ = waitpid(Pid::from_raw(p.id.pid), Some(WaitPidFlag::WNOHANG));
        }
        let ours = descendants(&table, &self.spared).count();
        self.cgroup.map_or(0, Cgroup::release).max(ours)
    }
}

/// Kills what an earlier agent left of a task; false if something could not be killed.
pub fn kill_orphans(task: &str, base: Option<&Path>) -> bool {
    let until = Instant::now() + KILL_LIMIT;
    let cgroup = base.and_then(|b| Cgroup::find(b, task));
    let in_cgroup = cgroup.as_ref().is_none_or(|c| c.kill(until));
    let dead = in_cgroup & kill_until(until, || marked(task));
    cgroup.map(Cgroup::release);
    dead
}

/// Processes that bear the marker of a task, and everything in their sessions.
fn marked(task: &str) -> Vec<ProcId> {
    let want = format!("{MARKER}={task}");
    let bears = |pid: i32| {
        let env = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        env.split(|&b| b == 0).any(|v| v == want.as_bytes())
    };
    let table = proc::table();
    let live = || table.values().filter(|p| !p.zombie);
    let found: HashSet<i32> = live()
        .filter(|p| bears(p.id.pid))
        .map(|p| p.id.pid)
        .collect();
    // Only sessions that the task made itself: their leader bears the marker or is gone.
    let led = |s: i32| found.contains(&s) || !table.contains_key(&s);
    let sessions: HashSet<i32> = found
        .iter()
        .map(|pid| table[pid].session)
        .filter(|&s| s > 0 && led(s))
        .collect();
    live()
        .filter(|p| found.contains(&p.id.pid) || sessions.contains(&p.session))
        .map(|p| p.id)
        .collect()
}

/// Live descendants of this process that neither are spared nor descend from a spared one.
fn descendants<'t>(
    table: &'t HashMap<i32, Proc>,
    spared: &HashSet<ProcId>,
) -> impl Iterator<Item = &'t Proc> {
    let me = std::process::id() as i32;
    let mut ours = Vec::new();
    for p in table.values().filter(|p| !p.zombie && p.id.pid != me) {
        let (mut at, mut steps) = (p, 0);
        // The table is not one instant: a parent may be gone or a number reused, so the walk is bounded.
        let of_ours = loop {
            steps += 1;
            if spared.contains(&at.id) || steps > table.len() {
                break false;
            }
            if at.parent == me {
                break true;
            }
            match table.get(&at.parent) {
                Some(parent) if at.parent > 1 => at = parent,
                _ => break false,
            }
        };
        if of_ours {
            ours.push(p);
        }
    }
    ours.into_iter()
}

/// Kills until nothing is left: a fork between look and kill is found on the next turn.
fn kill_until(until: Instant, members: impl Fn() -> Vec<ProcId>) -> bool {
    loop {
        let found = members();
        if found.is_empty() {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let dying: Vec<OwnedFd> = found.into_iter().filter_map(proc::kill).collect();
        let mut fds: Vec<PollFd> = dying
            .iter()
            .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
            .collect();
        let limit = PollTimeout::from(u8::try_from(left.as_millis()).unwrap_or(50).clamp(1, 50));
        let _ = poll(&mut fds, limit);
    }
}
