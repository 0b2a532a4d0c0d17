//! A cgroup for each port process, where aditd may make one (root, cgroup v2).
//!
//! ```text
//! MOUNT/adit-ports       controllers are switched on for what is below; no process is in it
//! MOUNT/adit-ports/VM    the VM's port process, and for a moment its predecessor
//! ```
//! Guest memory is charged to the cgroup of the process that touches a page first. In aditd's own cgroup, a VM's memory
//! would count against aditd's limit, and the processes of a busy VM against the processor share of all others. Each port
//! process has a limit of processes and threads here and an equal share of the processor. Its own memory is limited by
//! `RLIMIT_DATA` (`adit_port::privilege`); memory that it shares with its guest is limited by the guest's size.
//!
//! The place is beside the unit's cgroup, not below it: a unit whose cgroup has children with controllers cannot be started
//! again while they live (systemd 252 gets EBUSY), and port processes live on when aditd ends.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const PORTS: &str = "adit-ports";
/// Processes and threads of one VM: some of its port process, and as many of a predecessor that ends.
const PIDS_MAX: u32 = 64;

/// Where the cgroups of port processes are made.
#[derive(Debug)]
pub struct Cgroups(PathBuf);

impl Cgroups {
    /// Makes the place; `None`, with a line in the log, where the system has no cgroup v2 that aditd may write.
    pub fn new() -> Option<Self> {
        let made = match adit_cgroup::mount_point() {
            Some(mount) => Self::below(&mount),
            None => Err(io::Error::other("no cgroup2 file system is mounted")),
        };
        made.inspect_err(|e| {
            tracing::info!(error = %e, "port processes stay in aditd's cgroup, without limits of their own");
        })
        .ok()
    }

    fn below(mount: &Path) -> io::Result<Self> {
        let ports = mount.join(PORTS);
        match fs::create_dir(&ports) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        adit_cgroup::switch_on(mount);
        adit_cgroup::switch_on(&ports);
        Ok(Self(ports))
    }

    /// Moves a VM's new port process into the VM's cgroup.
    ///
    /// # Errors
    /// The kernel refuses: the process stays where it is.
    pub fn enter(&self, vm: &str, pid: u32) -> io::Result<()> {
        let dir = self.0.join(vm);
        match fs::create_dir(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        // Without the controller there is no such file.
        let _ = fs::write(dir.join("pids.max"), PIDS_MAX.to_string());
        fs::write(dir.join("cgroup.procs"), pid.to_string())
    }

    /// Removes a VM's cgroup. One that has a process, such as a VMM that goes on, stays.
    pub fn leave(&self, vm: &str) {
        let _ = fs::remove_dir(self.0.join(vm));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vms_process_is_written_into_the_vms_directory_with_its_limit() {
        let mount = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::below(mount.path()).unwrap();
        cgroups.enter("web-1", 7).unwrap();
        cgroups.enter("web-1", 8).unwrap();
        let dir = mount.path().join("adit-ports/web-1");
        assert_eq!(fs::read_to_string(dir.join("cgroup.procs")).unwrap(), "8");
        assert_eq!(fs::read_to_string(dir.join("pids.max")).unwrap(), "64");
        let on = mount.path().join("adit-ports/cgroup.subtree_control");
        assert_eq!(fs::read_to_string(on).unwrap(), "+cpu");
    }
}
