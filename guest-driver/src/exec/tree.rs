//! Every process that a task started, however it hid: own session, double fork, ignored signals.
//!
//! With a cgroup the kernel knows them all. Without one the agent is their *subreaper*: a process whose parent has died
//! becomes the agent's child, so that every descendant of the task stays a descendant of the agent. Daemons that an
//! earlier task left on purpose are descendants too, and so are workers that they start while a later task runs. The task
//! that a process belongs to is found by, in this order:
//!
//! 1. its cgroup, if it is a task's;
//! 2. what it descends from: a process from before the task, or the script;
//! 3. its session, if that is from before the task (and its leader is the one from then: numbers come again);
//! 4. the marker `ADIT_TASK_ID` in its environment, if a daemon from before the task has the same.
//!
//! What descends from a session of the service `exec` is none of a task's.
//!
//! Without a cgroup a daemon's worker that has changed its parent, its session *and* its environment cannot be told from the
//! running task's processes, and ends with them at a timeout.
//! After a crash of the agent they no longer descend from it; they are then found by the marker, and by the sessions of the
//! processes that have it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::cgroup::{self, Cgroup};
use super::proc::{self, Proc, ProcId};
use super::{reap, sessions};

/// Environment variable that every process of a task inherits.
pub const MARKER: &str = "ADIT_TASK_ID";
/// How long killing may take; a process in an uninterruptible wait does not die.
pub const KILL_LIMIT: Duration = Duration::from_secs(4);

/// Most dying processes that are waited for at a time: each has a descriptor.
const AWAITED_MAX: usize = 16;

/// The processes of one task.
#[derive(Debug)]
pub struct Tree {
    task: String,
    cgroup: Option<Cgroup>,
    before: Baseline,
}

/// What descended from the agent before the task.
#[derive(Debug, Default)]
struct Baseline {
    processes: HashSet<ProcId>,
    /// Sessions, each with its leader's start if that still lived.
    sessions: HashMap<i32, Option<u64>>,
    /// Tasks whose marker they have.
    tasks: HashSet<Vec<u8>>,
}

impl Baseline {
    fn take() -> Self {
        let table = proc::table();
        let mut before = Self::default();
        for p in table.values().filter(|p| descends(&table, p)) {
            let leader = table.get(&p.session).map(|leader| leader.id.start);
            before.processes.insert(p.id);
            before.sessions.insert(p.session, leader);
            // A process in a task's cgroup is known by the cgroup.
            if cgroup::of(p.id.pid).is_none() {
                before.tasks.extend(marker(p.id.pid));
            }
        }
        before
    }

    fn has(&self, table: &HashMap<i32, Proc>, p: &Proc) -> bool {
        let same = |leader: &Option<u64>| match table.get(&p.session) {
            // While anything is in the session, the kernel does not use its number again.
            None => true,
            Some(now) => *leader == Some(now.id.start),
        };
        self.processes.contains(&p.id) || self.sessions.get(&p.session).is_some_and(same)
    }
}

impl Tree {
    /// Prepares for a task whose id is this hex; `base` is where cgroups can be made, if anywhere.
    pub fn new(task: &str, base: Option<&Path>) -> Self {
        Self {
            task: task.to_owned(),
            before: Baseline::take(),
            cgroup: base.and_then(|b| {
                cgroup::sweep(b);
                Cgroup::create(b, task)
            }),
        }
    }

    /// Where the child enters the task's cgroup.
    pub fn procs(&self) -> Option<OwnedFd> {
        self.cgroup.as_ref().and_then(Cgroup::procs)
    }

    /// Which limits the task ran into, for people.
    pub fn limits_hit(&self) -> Vec<String> {
        self.cgroup
            .as_ref()
            .map(Cgroup::limits_hit)
            .unwrap_or_default()
    }

    /// Kills everything; false if something could not be killed. `script` is the pid of the script, dead or not.
    pub fn kill(&self, script: i32) -> bool {
        let until = Instant::now() + KILL_LIMIT;
        let in_cgroup = self.cgroup.as_ref().is_none_or(|c| c.kill(until));
        // Also with a cgroup: a privileged child can move itself out of it.
        in_cgroup & kill_until(until, || self.members(script))
    }

    fn members(&self, script: i32) -> Vec<ProcId> {
        let table = proc::table();
        let live = table.values().filter(|p| !p.zombie);
        live.filter(|p| self.owns(&table, p, script))
            .map(|p| p.id)
            .collect()
    }

    /// Whether a process is this task's, see the top of this file.
    fn owns(&self, table: &HashMap<i32, Proc>, p: &Proc, script: i32) -> bool {
        if !descends(table, p) || sessions::has_any(ancestry(table, p).map(|at| at.id)) {
            return false;
        }
        if let Some(task) = cgroup::of(p.id.pid) {
            return task == self.task;
        }
        let (mut by_script, mut by_before) = (p.session == script, false);
        for at in ancestry(table, p) {
            by_before |= self.before.has(table, at);
            by_script |= at.id.pid == script;
        }
        let theirs = || marker(p.id.pid).is_some_and(|task| self.before.tasks.contains(&task));
        !by_before && (by_script || !theirs())
    }

    /// Kills what is left in the script's own session after the script ended by itself: background jobs. A daemon,
    /// which has a session of its own, is left running.
    pub fn end_session(&self, session: i32) -> bool {
        kill_session(session)
    }

    /// Reaps our children that have ended, and releases the cgroup; returns how many daemons go on.
    pub fn release(self, script: i32) -> usize {
        reap::orphans();
        let ours = self.members(script).len();
        self.cgroup.map_or(0, Cgroup::release).max(ours)
    }
}

/// Kills all processes of a session; false if something could not be killed.
pub fn kill_session(session: i32) -> bool {
    let members = || {
        proc::table()
            .values()
            .filter(|p| p.session == session && !p.zombie)
            .map(|p| p.id)
            .collect()
    };
    kill_until(Instant::now() + KILL_LIMIT, members)
}

/// Kills all that descends from this process; false if something could not be killed.
pub fn kill_descendants() -> bool {
    let members = || {
        let table = proc::table();
        let live = table.values().filter(|p| !p.zombie);
        live.filter(|p| descends(&table, p)).map(|p| p.id).collect()
    };
    kill_until(Instant::now() + KILL_LIMIT, members)
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

/// Processes that have the marker of a task, and everything in their sessions.
fn marked(task: &str) -> Vec<ProcId> {
    let table = proc::table();
    // An agent that the task itself restarted has its marker, and so has whatever supervises the agent.
    let us = proc::lineage();
    let live = || {
        let others = table.values().filter(|p| !us.contains(&p.id.pid));
        others.filter(|p| !p.zombie)
    };
    let found: HashSet<i32> = live()
        .filter(|p| marker(p.id.pid).is_some_and(|of| of == task.as_bytes()))
        .map(|p| p.id.pid)
        .collect();
    // Only sessions that the task made itself: their leader has the marker or is gone.
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

/// The task whose marker a process has, as hex.
fn marker(pid: i32) -> Option<Vec<u8>> {
    let env = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let key = [MARKER.as_bytes(), b"="].concat();
    let value = env
        .split(|&b| b == 0)
        .find_map(|v| v.strip_prefix(&key[..]));
    value.map(<[u8]>::to_vec)
}

/// Whether a process descends from this one.
fn descends(table: &HashMap<i32, Proc>, p: &Proc) -> bool {
    let me = std::process::id() as i32;
    p.id.pid != me
        && ancestry(table, p)
            .last()
            .is_some_and(|top| top.parent == me)
}

/// A process and its ancestors, up to the child of this process or of process 1.
fn ancestry<'t>(table: &'t HashMap<i32, Proc>, p: &'t Proc) -> impl Iterator<Item = &'t Proc> {
    let me = std::process::id() as i32;
    let up = move |at: &&'t Proc| match at.parent {
        parent if parent == me || parent <= 1 => None,
        parent => table.get(&parent),
    };
    // The table is not one instant: a parent may be gone or a number reused, so the walk is bounded.
    std::iter::successors(Some(p), up).take(table.len())
}

/// Kills until nothing is left: a process forked between look and kill is found by the next look.
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
        let mut dying: Vec<OwnedFd> = Vec::new();
        for fd in found.into_iter().filter_map(proc::kill) {
            if dying.len() < AWAITED_MAX {
                dying.push(fd);
            }
        }
        let mut fds: Vec<PollFd> = dying
            .iter()
            .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
            .collect();
        let limit = PollTimeout::from(u8::try_from(left.as_millis()).unwrap_or(50).clamp(1, 50));
        let _ = poll(&mut fds, limit);
    }
}
