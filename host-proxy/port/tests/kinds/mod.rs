//! Descriptors that are neither a doorbell nor memory, one of every kind that a VMM can pass.
#![allow(dead_code)] // each test file uses only a part of it

use std::fs::File;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

/// Longer than any test takes.
const LINGER_S: i32 = 3600;

/// The descriptor limit with which a process that has these open can open so many more.
pub fn with_room_for(open: &[usize], more: usize) -> usize {
    let mut limit = 0;
    let mut free = 0;
    while free < more || open.contains(&limit) {
        free += usize::from(!open.contains(&limit));
        limit += 1;
    }
    limit
}

/// The numbers of a process's open descriptors.
pub fn open_in(pid: u32) -> Vec<usize> {
    let dir = format!("/proc/{pid}/fd");
    let mut open = Vec::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let number: Option<usize> = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        // Not the descriptor by which the directory is being read.
        if std::fs::read_link(&path).is_ok_and(|to| to != std::path::Path::new(&dir)) {
            open.extend(number);
        }
    }
    open
}

/// Limits a process to so many more descriptors than it has open. `None`: the most that are allowed.
pub fn limit(pid: u32, room: Option<usize>) {
    let limit = room.map_or(4096, |more| with_room_for(&open_in(pid), more));
    let mut command = std::process::Command::new("prlimit");
    command.args([format!("--pid={pid}"), format!("--nofile={limit}:")]);
    // As its user: root may lack the capability that it takes otherwise.
    let ids = |name: &str| -> Option<u32> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    if nix::unistd::geteuid().is_root() {
        use std::os::unix::process::CommandExt;
        command.uid(ids("Uid:").unwrap()).gid(ids("Gid:").unwrap());
    }
    let done = command.status().unwrap();
    assert!(done.success());
}

pub struct Foreign {
    pub name: &'static str,
    pub fd: OwnedFd,
}

impl Foreign {
    /// Closes our copy while the receiver is [`stopped`], so that the receiver's close is the last one. A file whose close
    /// waits for its server is never closed here: our close would wait too.
    pub fn close(self) {
        match self.name.contains("silent") {
            true => std::mem::forget(self.fd),
            false => drop(self.fd),
        }
    }
}

/// Runs `pass` while the receiving process is stopped, so that it closes last.
pub fn stopped(pid: u32, pass: impl FnOnce()) {
    let signal = |signal| kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    signal(Signal::SIGSTOP);
    let stops = |task: std::io::Result<std::fs::DirEntry>| {
        // A thread that has ended meanwhile need not be stopped.
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        state.is_none_or(|state| "TDZX".contains(state))
    };
    while !std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .all(stops)
    {
        std::thread::yield_now();
    }
    pass();
    signal(Signal::SIGCONT);
}

/// The other end of a connection that lingers. Drop lets a waiting close return.
pub struct Far(TcpStream);

/// A TCP socket whose last close waits, because the other end does not read its data.
pub fn lingering() -> (OwnedFd, Far) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    near.set_nonblocking(true).unwrap();
    while { &near }.write(&[7; 1 << 16]).is_ok() {}
    near.set_nonblocking(false).unwrap();
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: LINGER_S,
    };
    setsockopt(&near, sockopt::Linger, &linger).unwrap();
    (near.into(), Far(far))
}

/// One descriptor of each kind, and what lets the waiting closes return.
pub fn all() -> (Vec<Foreign>, Far) {
    let (lingers, far) = lingering();
    let (_, pipe) = std::io::pipe().unwrap();
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(1 << 20).unwrap();
    let path = open("/etc/passwd", OFlags::PATH, Mode::empty()).unwrap();
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let kinds = [
        ("a socket that lingers", lingers),
        ("a pidfd", pidfd),
        ("a directory", File::open("/").unwrap().into()),
        ("an O_PATH descriptor", path),
        ("a file", plain.into()),
        ("a device", File::open("/dev/null").unwrap().into()),
        ("a pipe", pipe.into()),
        ("a timer", timer.as_fd().try_clone_to_owned().unwrap()),
        ("an epoll set", epoll.0),
    ];
    let kinds = kinds.map(|(name, fd)| Foreign { name, fd });
    (kinds.into(), far)
}
