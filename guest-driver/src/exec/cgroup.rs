//! A cgroup v2 for each task, where there is a cgroup2 mount that we may write: the one container that no fork,
//! setsid or double fork leaves, with `cgroup.kill` (Linux 5.14) to end it at once.
//!
//! Only the core files are used; no controller has to be enabled, and none of the distribution's own layout is touched.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::proc;

/// Prefix of our directories, followed by the task id in hex.
const PREFIX: &str = "adit-task-";

/// The directory in which task cgroups are made: the agent's own cgroup.
pub fn base() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::/"))?;
    // An agent that was itself started from within a task must not nest below it.
    let path = path
        .split('/')
        .take_while(|p| !p.starts_with(PREFIX))
        .collect::<PathBuf>();
    let base = mount_point(&mounts)?.join(path);
    base.is_dir().then_some(base)
}

/// Mount point of the first cgroup2 file system: `id parent dev root MOUNT options … - cgroup2 …`.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    let of = |l: &str| l.split(' ').nth(4).map(PathBuf::from);
    mountinfo
        .lines()
        .find(|l| {
            l.split_once(" - ")
                .is_some_and(|(_, r)| r.starts_with("cgroup2 "))
        })
        .and_then(of)
}

/// Mounts cgroup2 where an image without an init system of its own left the place empty.
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

/// One task's cgroup.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the task's cgroup; none if the kernel or our rights do not allow it.
    pub fn create(base: &Path, task: &str) -> Option<Self> {
        let dir = base.join(format!("{PREFIX}{task}"));
        fs::create_dir(&dir).ok()?;
        Some(Self(dir))
    }

    /// The cgroup that an earlier agent left for this task, if there is one.
    pub fn find(base: &Path, task: &str) -> Option<Self> {
        let dir = base.join(format!("{PREFIX}{task}"));
        dir.is_dir().then_some(Self(dir))
    }

    /// Where a child writes itself in.
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

    fn populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events")).is_ok_and(|e| e.contains("populated 1"))
    }

    fn members(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }

    /// Removes it; what still runs in it (a daemon that the script was to start) goes to the agent's own cgroup.
    pub fn release(self) -> usize {
        let left = self.members();
        if let (false, Some(parent)) = (left.is_empty(), self.0.parent()) {
            for pid in &left {
                if let Ok(mut f) = OpenOptions::new()
                    .write(true)
                    .open(parent.join("cgroup.procs"))
                {
                    let _ = write!(f, "{pid}");
                }
            }
        }
        let _ = fs::remove_dir(&self.0);
        left.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_in_a_hybrid_layout() {
        let text = "30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                    31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("1 1 0:1 / / rw - ext4 /dev/vda rw\n"), None);
    }
}
