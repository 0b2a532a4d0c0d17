//! What the worker can still reach when a stranger controls it. A child confines itself as the worker does, makes one attempt, and
//! the test sees how it ended.
#![allow(missing_docs)]

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

use adit_host_proxy::proxy::cut_off::cut_off;
use adit_host_proxy::worker::sandbox;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use rustix::thread::{CapabilitySet, capabilities};

const ATTEMPT: &str = "ADIT_CONFINED_ATTEMPT";
const DIR: &str = "ADIT_CONFINED_DIR";
const OTHER: &str = "ADIT_CONFINED_OTHER";
const INSIDE: &str = "ADIT_CONFINED_INSIDE";
const TEST: &str = "nothing_leaves_the_workers_sandbox";
const GOT_THROUGH: i32 = 42;
const REFUSED: i32 = 43;
/// No machine that runs this test uses it.
const WORKER: u32 = 78_000;

type Attempt = fn(Pid) -> io::Result<()>;

fn other_error<T>(done: Result<T, impl Into<io::Error>>) -> io::Result<()> {
    done.map(drop).map_err(Into::into)
}

/// By name: what is tried, with another process to try it on.
const ATTEMPTS: [(&str, Attempt); 11] = [
    ("to read /etc/shadow", |_| {
        File::open("/etc/shadow").map(drop)
    }),
    ("to read a program", |_| File::open("/bin/sh").map(drop)),
    ("to look at another process", |other| {
        File::open(format!("/proc/{other}/environ")).map(drop)
    }),
    ("to make a directory", |_| std::fs::create_dir("/confined")),
    ("to start a program", |_| {
        Command::new("/bin/true").status().map(drop)
    }),
    ("to become a program", |_| {
        Err(Command::new("/bin/true").exec())
    }),
    ("to trace another process", |other| {
        other_error(ptrace::attach(other))
    }),
    ("to end another process", |other| {
        other_error(kill(other, Signal::SIGTERM))
    }),
    ("to make a connection", |_| {
        // Refused at the other end is a connection that was made.
        match TcpStream::connect("127.0.0.1:9") {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            done => done.map(drop),
        }
    }),
    ("to be root again", |_| {
        other_error(nix::unistd::setresuid(
            Uid::from_raw(0),
            Uid::from_raw(0),
            Uid::from_raw(0),
        ))
    }),
    ("to have a capability", |_| {
        match capabilities(None)?.effective {
            none if none == CapabilitySet::empty() => Err(io::ErrorKind::PermissionDenied.into()),
            _ => Ok(()),
        }
    }),
];

fn attempt(name: &str, other: Pid, inside: bool) -> ExitStatus {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(WORKER), Some(WORKER)).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([TEST, "--exact", "--nocapture"])
        .env(ATTEMPT, name)
        .env(DIR, dir.path())
        .env(OTHER, other.to_string());
    if inside {
        command.env(INSIDE, "1");
    }
    command.output().unwrap().status
}

/// The child.
fn try_it(name: &str) -> ! {
    let (_, attempt) = ATTEMPTS.iter().find(|(known, _)| *known == name).unwrap();
    let other = Pid::from_raw(std::env::var(OTHER).unwrap().parse().unwrap());
    let dir = File::open(std::env::var(DIR).unwrap()).unwrap();
    if std::env::var_os(INSIDE).is_some() {
        sandbox::enter(&dir, WORKER, WORKER).unwrap();
        drop(dir);
        sandbox::lock_calls().unwrap();
        // What it is there for, it can do.
        std::fs::write("/aditd.db", "whole").unwrap();
        assert_eq!(std::fs::read("/aditd.db").unwrap(), b"whole");
        std::fs::remove_file("/aditd.db").unwrap();
        keep_a_blob();
        std::thread::spawn(|| ()).join().unwrap();
    }
    let code = match attempt(other) {
        Ok(()) => GOT_THROUGH,
        Err(_) => REFUSED,
    };
    std::process::exit(code)
}

fn keep_a_blob() {
    let limits = adit_blob::Limits {
        blob: 10,
        all: 10,
        spare: 0,
    };
    let store = adit_blob::Store::new("/".as_ref(), "aditd.blob-", limits);
    for content in [b"first", b"later"] {
        let digest = adit_blob::Digest::of(content);
        let Ok(adit_blob::Begun::Writing(mut writing)) = store.begin(digest, 5) else {
            panic!("it is not taken")
        };
        writing.write(content).unwrap();
        writing.finish().unwrap();
        drop(store.open(digest).unwrap());
        store.remove(&digest).unwrap();
    }
}

#[test]
fn nothing_leaves_the_workers_sandbox() {
    if let Ok(name) = std::env::var(ATTEMPT) {
        try_it(&name);
    }
    if !Uid::effective().is_root() {
        println!("skipped: only root confines a worker");
        return;
    }
    for (name, _) in ATTEMPTS {
        let start = || {
            let mut sleep = Command::new("sleep");
            sleep.arg("1000").spawn().unwrap()
        };
        let mut other = start();
        let pid = Pid::from_raw(other.id().cast_signed());
        let status = attempt(name, pid, true);
        let is_stopped =
            status.code() == Some(REFUSED) || status.signal() == Some(Signal::SIGSYS as i32);
        assert!(is_stopped, "{name}: {status}");
        assert!(other.try_wait().unwrap().is_none(), "{name}: it was ended");
        // Without the sandbox it goes through: the attempt is a real one.
        let status = attempt(name, pid, false);
        let is_through = status.code() == Some(GOT_THROUGH) || name.contains("become");
        assert!(is_through, "{name}: {status} without a sandbox");
        let _ = other.kill();
        other.wait().unwrap();
        let _ = std::fs::remove_dir("/confined");
    }
}

/// Confines itself while it has a client's connection, and cuts it off, or tries an address that has room for a host.
fn end_a_connection(name: &str) -> ! {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let dir = File::open(std::env::var(DIR).unwrap()).unwrap();
    sandbox::enter(&dir, WORKER, WORKER).unwrap();
    sandbox::lock_calls().unwrap();
    let done = match name {
        "long" => rustix::net::connect_unspec(&socket).map_err(Into::into),
        _ => cut_off(&socket),
    };
    std::process::exit(if done.is_ok() { GOT_THROUGH } else { REFUSED })
}

/// Landlock has rules for TCP since Linux 6.7; older kernels have the length of the address.
#[test]
fn a_clients_socket_is_cut_off_and_never_connected_to_another_host() {
    if let Ok(name) = std::env::var(ATTEMPT) {
        end_a_connection(&name);
    }
    if !Uid::effective().is_root() {
        println!("skipped: only root confines a worker");
        return;
    }
    let ended = |name: &str| {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(WORKER), Some(WORKER)).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        let test = "a_clients_socket_is_cut_off_and_never_connected_to_another_host";
        command.args([test, "--exact", "--nocapture"]);
        command.env(ATTEMPT, name).env(DIR, dir.path());
        command.output().unwrap().status
    };
    assert_eq!(ended("short").code(), Some(GOT_THROUGH));
    assert_eq!(ended("long").signal(), Some(Signal::SIGSYS as i32));
}
