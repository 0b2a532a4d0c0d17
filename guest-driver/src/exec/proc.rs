//! Processes as /proc shows them, and killing one without ever killing another that got its number (R96).

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::sys;

/// One process: the pid alone is not an identity, with the start time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcId {
    /// Its pid.
    pub pid: i32,
    /// Clock ticks from boot to its start.
    pub start: u64,
}

/// A row of the process table.
#[derive(Clone, Copy, Debug)]
pub struct Proc {
    /// Who it is.
    pub id: ProcId,
    /// Its parent.
    pub parent: i32,
    /// Its session.
    pub session: i32,
    /// Whether it has ended and only waits to be reaped.
    pub zombie: bool,
}

/// Reads one process; none if there is none.
pub fn read(pid: i32) -> Option<Proc> {
    parse_stat(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Reads the whole table.
pub fn table() -> HashMap<i32, Proc> {
    let Ok(dir) = fs::read_dir("/proc") else {
        return HashMap::new();
    };
    let pids = dir
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| Some((pid, read(pid)?))).collect()
}

/// This process and its ancestors, without process 1.
pub fn lineage() -> Vec<i32> {
    let mut line = vec![std::process::id() as i32];
    while let Some(parent) = line.last().and_then(|&pid| read(pid)).map(|p| p.parent)
        && parent > 1
        && !line.contains(&parent)
    {
        line.push(parent);
    }
    line
}

/// `pid (comm) state ppid pgrp session …`; comm may contain anything, blanks and parentheses too.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Proc> {
    let close = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(&stat[close + 1..]).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |i: usize| fields.get(i)?.parse::<i32>().ok();
    Some(Proc {
        id: ProcId {
            pid,
            start: fields.get(19)?.parse().ok()?,
        },
        parent: number(1)?,
        session: number(3)?,
        zombie: matches!(*fields.first()?, "Z" | "X"),
    })
}

/// Sends SIGKILL to exactly this process; returns a descriptor that becomes readable when it is dead.
pub fn kill(id: ProcId) -> Option<OwnedFd> {
    let pidfd = sys::pidfd_open(Pid::from_raw(id.pid)).ok()?;
    // The number may have been reused before the open; from the open on it cannot be.
    (read(id.pid)?.id == id).then_some(())?;
    sys::pidfd_kill(pidfd.as_fd(), Signal::SIGKILL).ok()?;
    Some(pidfd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_command_name_does_not_shift_the_fields() {
        let stat = b"42 (a) R 1 (b) S 7 8 9 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 12345 0 0";
        let p = parse_stat(42, stat).unwrap();
        assert_eq!(
            (p.id, p.parent, p.session, p.zombie),
            (
                ProcId {
                    pid: 42,
                    start: 12345
                },
                7,
                9,
                false
            )
        );
        assert!(parse_stat(42, b"42 (x) S 1").is_none());
    }

    #[test]
    fn r96_a_reused_pid_is_not_killed() {
        let me = std::process::id() as i32;
        let mut id = read(me).unwrap().id;
        id.start += 1;
        assert!(kill(id).is_none());
    }
}
