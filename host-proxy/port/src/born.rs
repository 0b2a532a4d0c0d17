//! Identifies a process: by its pid, which the kernel may give to another process later, and by its start time, which differs
//! then.
//!
//! A process that locks a VM's directory writes a note with both there. It does so before its first listener exists and before
//! it gives up the right to write there. So no guest could have had control of the process when it wrote the note.

use std::fs;
use std::io;
use std::path::Path;

/// Name of the note in the VM's directory.
pub const NOTE: &str = "port.pid";
/// Name of a note that is not whole yet.
pub const NEW_NOTE: &str = "port.pid.new";

/// One process of this machine since the last boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Born {
    /// Its pid.
    pub pid: i32,
    /// Its start time, in the kernel's ticks since boot.
    pub ticks: u64,
}

impl Born {
    /// Returns the process that has this pid now. `None`: there is none, or /proc does not say.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Field 22. Count from behind the process's name, which may contain anything.
        let ticks = stat.rsplit_once(") ")?.1.split(' ').nth(19)?;
        Some(Self {
            pid,
            ticks: ticks.parse().ok()?,
        })
    }

    /// Notes that the calling process has locked this directory.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn note(dir: &Path) -> io::Result<()> {
        // A pid always fits. Without /proc the start time is 0, but then nobody can compare it either.
        let pid = std::process::id().cast_signed();
        let ticks = Self::of(pid).map_or(0, |born| born.ticks);
        let (path, new) = (dir.join(NOTE), dir.join(NEW_NOTE));
        fs::write(&new, format!("{pid} {ticks}\n"))?;
        fs::rename(&new, &path)
    }

    /// Returns the process that locked this directory last. `None`: there is no note.
    pub fn noted(dir: &Path) -> Option<Self> {
        let text = fs::read_to_string(dir.join(NOTE)).ok()?;
        let (pid, ticks) = text.trim_end().split_once(' ')?;
        Some(Self {
            pid: pid.parse().ok()?,
            ticks: ticks.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_tells_this_process_from_any_other_of_its_number() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Born::noted(dir.path()), None);
        Born::note(dir.path()).unwrap();
        let noted = Born::noted(dir.path()).unwrap();
        let us = Born::of(std::process::id().cast_signed()).unwrap();
        assert_eq!(noted, us);
        assert!(us.ticks > 0);
        let parent = Born::of(nix::unistd::getppid().as_raw()).unwrap();
        assert!(parent != us && parent.ticks <= us.ticks);
    }
}
