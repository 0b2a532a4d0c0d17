//! A cgroup v2 for each task, where there is a cgroup2 mount that we may write. No fork, setsid or double fork leaves it,
//! and `cgroup.kill` (Linux 5.14) ends everything in it at once.
//!
//! ```text
//! MOUNT/adit-tasks               controllers are switched on for what is below; no process is in it
//! MOUNT/adit-tasks/adit-task-ID  one task, and what daemons it left; removed when it is empty
//! MOUNT/adit-tasks/adit-task-exec-ID  the same of a session of the service `exec`
//! MOUNT/adit-tasks/adit-task-exec  the processes that have the sessions, without limits
//! ```
//! `adit-tasks` is beside the agent's own cgroup and not below it. So the limits of the agent's service do not hold for a
//! task, and a service manager that ends or restarts the agent ends no daemon with it. The agent's cgroup may also have
//! processes of its own: a cgroup with controllers switched on has processes or children, never both. Where `adit-tasks`
//! cannot be made, tasks are below the agent's cgroup, without limits.
//!
//! No goal declares limits yet, so each task has a share of the guest: three quarters of its memory, a quarter of its process
//! numbers (the kernel gives each user half of them, and refuses more without a reason that could be reported). A task that
//! takes more memory is killed as a whole, before the guest's services and the agent run short. All tasks together have the
//! CPU weight of one process of the guest: a thousand of them must not keep the agent from ending them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::proc;

/// Prefix of our directories, followed by the task id in hex.
const PREFIX: &str = "adit-task-";

/// Where session processes are.
const SESSIONS: &str = "adit-task-exec";

/// The directory in which they are.
const TASKS: &str = "adit-tasks";

/// The directory in which task cgroups are made.
pub fn base() -> Option<PathBuf> {
    let mount = adit_cgroup::mount_point()?;
    let tasks = mount.join(TASKS);
    if tasks.is_dir() || fs::create_dir(&tasks).is_ok() {
        adit_cgroup::switch_on(&mount);
        adit_cgroup::switch_on(&tasks);
        return Some(tasks);
    }
    // An agent that was itself started from within a task must not nest below it.
    let own = own_path()?;
    let own = own.split('/').take_while(|p| !p.starts_with(PREFIX));
    let base = mount.join(own.collect::<PathBuf>());
    base.is_dir().then_some(base)
}

/// This process' cgroup, without the first slash.
fn own_path() -> Option<String> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::/"));
    path.map(str::to_owned)
}

/// Leaves the cgroup of the task that started this agent, if one did, together with whatever supervises the agent: the
/// end of that task must not end them.
pub fn leave_task() {
    if own_path().is_none_or(|own| task_of(&own).is_none()) {
        return;
    }
    if let Some(mount) = adit_cgroup::mount_point() {
        for pid in proc::lineage().into_iter().filter(|&pid| of(pid).is_some()) {
            let _ = fs::write(mount.join("cgroup.procs"), pid.to_string());
        }
    }
}

/// The task in whose cgroup a process is, as hex.
pub fn of(pid: i32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    task_of(text.lines().find_map(|l| l.strip_prefix("0::/"))?)
}

fn task_of(path: &str) -> Option<String> {
    let name = path.split('/').find_map(|p| p.strip_prefix(PREFIX))?;
    Some(name.to_owned())
}

type Shares = [(&'static str, Option<u64>); 2];

/// The shares as they were when they were first asked for: of a process that makes many cgroups.
static KNOWN: OnceLock<Shares> = OnceLock::new();

/// Asks for the shares now, so that they need not be asked for later.
pub fn know_shares() {
    KNOWN.get_or_init(shares);
}

/// A task's share of this guest: bytes of memory, number of processes and threads.
fn shares() -> Shares {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = info.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = kib.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    let kernel = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let numbers = kernel("threads-max").min(kernel("pid_max"));
    [
        ("memory.max", kib.map(|kib| kib * 1024 / 4 * 3)),
        ("pids.max", numbers.map(|n| n / 4)),
    ]
}

/// Mounts cgroup2 where an image without an init system has nothing mounted there.
pub fn mount_if_absent() -> io::Result<()> {
    let place = Path::new("/sys/fs/cgroup");
    if base().is_some() || fs::read_dir(place)?.next().is_some() {
        return Ok(());
    }
    use nix::mount::{MsFlags, mount};
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(
        Some("cgroup2"),
        place,
        Some("cgroup2"),
        flags,
        None::<&str>,
    )?)
}

/// The file by which a session process enters the cgroup of all of them; none: the kernel or our rights do not allow it.
pub fn of_sessions(base: &Path) -> Option<OwnedFd> {
    let dir = base.join(SESSIONS);
    let is_there = dir.is_dir() || fs::create_dir(&dir).is_ok();
    is_there.then(|| Cgroup(dir).procs()).flatten()
}

/// One task's cgroup.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the task's cgroup, with its limits where the kernel has them; none if the kernel or our rights do not allow it.
    pub fn create(base: &Path, task: &str) -> Option<Self> {
        let dir = base.join(format!("{PREFIX}{task}"));
        fs::create_dir(&dir).ok()?;
        let known = KNOWN.get().copied();
        for (file, share) in known.unwrap_or_else(shares) {
            if let Some(share) = share {
                let _ = fs::write(dir.join(file), share.to_string());
            }
        }
        // All of a task's processes or none: a task that lost one is not what was ordered.
        let _ = fs::write(dir.join("memory.oom.group"), "1");
        Some(Self(dir))
    }

    /// The cgroup that an earlier agent left for this task, if there is one.
    pub fn find(base: &Path, task: &str) -> Option<Self> {
        let dir = base.join(format!("{PREFIX}{task}"));
        dir.is_dir().then_some(Self(dir))
    }

    /// Its directory, for a child that begins in it.
    pub fn directory(&self) -> Option<OwnedFd> {
        Some(File::open(&self.0).ok()?.into())
    }

    /// The file by which a child enters.
    pub fn procs(&self) -> Option<OwnedFd> {
        Some(
            OpenOptions::new()
                .write(true)
                .open(self.0.join("cgroup.procs"))
                .ok()?
                .into(),
        )
    }

    /// Kills everything in it and waits until it is empty; false if something outlived `until`.
    pub fn kill(&self, until: Instant) -> bool {
        let Ok(events) = File::open(self.0.join("cgroup.events")) else {
            return true;
        };
        loop {
            if fs::write(self.0.join("cgroup.kill"), "1").is_err() {
                self.members()
                    .iter()
                    .filter_map(|&pid| proc::read(pid))
                    .for_each(|p| drop(proc::kill(p.id)));
            }
            if !self.populated() {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // The kernel raises POLLPRI when `populated` changes; the limit is for kernels without cgroup.kill.
            let limit =
                PollTimeout::from(u8::try_from(left.as_millis()).unwrap_or(100).clamp(1, 100));
            let _ = poll(
                &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
                limit,
            );
        }
    }

    /// Whether anything runs in it.
    pub fn populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events")).is_ok_and(|e| e.contains("populated 1"))
    }

    fn members(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }

    /// Which limits it ran into, for people.
    pub fn limits_hit(&self) -> Vec<String> {
        let events = |file: &str, key: &str| {
            let text = fs::read_to_string(self.0.join(file)).unwrap_or_default();
            let count = text
                .lines()
                .find_map(|l| l.strip_prefix(key)?.trim().parse().ok());
            count.is_some_and(|n: u64| n > 0)
        };
        let limit = |file: &str| fs::read_to_string(self.0.join(file)).unwrap_or_default();
        let mut hit = Vec::new();
        if events("memory.events", "oom_kill ") {
            let bytes = limit("memory.max").trim().parse::<u64>();
            let most = bytes.map_or(String::new(), |n| {
                format!(", a task may have {} MiB", n >> 20)
            });
            hit.push(format!("it was killed because memory ran out{most}"));
        }
        if events("pids.events", "max ") {
            let most = limit("pids.max");
            hit.push(format!("it reached its limit of {} processes", most.trim()));
        }
        hit
    }

    /// Releases it, and returns how many processes go on in it: daemons that the script was to start. They stay in it, so
    /// that they are not mistaken for another task's. The next task removes cgroups that have become empty.
    pub fn release(self) -> usize {
        let left = self.members().len();
        let _ = fs::remove_dir(&self.0);
        left
    }
}

/// Removes the cgroups in which nothing runs any more; the kernel keeps the others. One in which nothing has run yet stays: a
/// child may be about to enter it.
pub fn sweep(base: &Path) {
    let used = |dir: &Path| {
        let stat = fs::read_to_string(dir.join("cpu.stat")).unwrap_or_default();
        !stat.lines().any(|l| l == "usage_usec 0")
    };
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    for dir in entries.map(|e| e.path()) {
        let name = dir.file_name().unwrap_or_default().as_encoded_bytes();
        if name.starts_with(PREFIX.as_bytes()) && name != SESSIONS.as_bytes() && used(&dir) {
            let _ = fs::remove_dir(&dir);
        }
    }
}
