//! The host's side, with a guest that never starts its driver.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::device::{GuestCid, VsockDevice};
use crate::linked::{Linked, link};
use crate::socket_path::SocketPathError;

const CHILD: &str = "ADIT_TEST_FEW_DESCRIPTORS";

type Silent = Host<Linked<Arc<GuestMemoryMmap>>>;

fn kicks() -> [OwnedFd; 3] {
    [(); 3].map(|()| EventFd::new().unwrap().into())
}

fn host(uds: &Path) -> Silent {
    let device = VsockDevice::new(GuestCid::new(3).unwrap(), 1).unwrap();
    let (linked, _) = link(device, kicks()).unwrap();
    Host::new(linked, Some(uds), 7).unwrap()
}

/// `connect` to a regular file is refused, as for a stale socket. The file must not be deleted.
#[test]
fn a_file_at_the_path_of_the_socket_is_not_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let uds = dir.path().join("v");
    std::fs::write(&uds, "precious").unwrap();
    let device = VsockDevice::new(GuestCid::new(3).unwrap(), 1).unwrap();
    let (linked, _) = link(device, kicks()).unwrap();
    let linked: Linked<Arc<GuestMemoryMmap>> = linked;
    let refused = Host::new(linked, Some(&uds), 7).map(drop).unwrap_err();
    let why = refused.get_ref().and_then(|e| e.downcast_ref());
    assert!(matches!(
        why,
        Some(SocketPathError::NotASocket {
            what: "a regular file",
            ..
        })
    ));
    assert_eq!(std::fs::read(&uds).unwrap(), b"precious");
}

/// Runs in a separate process, whose descriptors run out.
#[test]
fn without_descriptors_a_client_waits_and_nothing_spins() {
    if std::env::var_os(CHILD).is_none() {
        let name = "hybrid::tests::without_descriptors_a_client_waits_and_nothing_spins";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = child.args([name, "--exact", "--nocapture"]).env(CHILD, "1");
        let done = child.output().unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uds = dir.path().join("v");
    let mut host = host(&uds);
    let mut client = UnixStream::connect(&uds).unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
    let zero = Some(Duration::ZERO);
    while host.paused_until.is_none() {
        host.turn(zero).unwrap();
    }
    // During the pause the loop does not even wake for the waiting client.
    let (paused_until, wakeups) = (host.paused_until, host.shard.wakeups());
    host.turn(None).unwrap();
    assert!(host.shard.wakeups() <= wakeups + 2 && host.paused_until != paused_until);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    client.write_all(b"CONNECT 5000\n").unwrap();
    client.set_nonblocking(true).unwrap();
    // The client is accepted, and then disconnected because there is no driver.
    while client.read(&mut [0]).is_err() {
        host.turn(zero).unwrap();
    }
    assert_eq!(host.paused_until, None);
}

/// A disconnected client sees the end of its connection.
#[test]
fn the_oldest_of_too_many_silent_clients_is_disconnected() {
    let dir = tempfile::tempdir().unwrap();
    let uds = dir.path().join("v");
    let mut host = host(&uds);
    let mut clients = Vec::new();
    for _ in 0..clients::CLIENTS_MAX + 3 {
        clients.push(UnixStream::connect(&uds).unwrap());
        host.turn(Some(Duration::ZERO)).unwrap();
    }
    let (gone, mut clients) = {
        let rest = clients.split_off(3);
        (clients, rest)
    };
    // The end comes late where another test's child has the descriptors for a moment, between its fork and its exec.
    for mut client in gone {
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
    for client in &mut clients {
        client.set_nonblocking(true).unwrap();
        assert!(client.read(&mut [0]).is_err());
        client.set_nonblocking(false).unwrap();
    }
    // The remaining clients have a deadline.
    let deadline = host.deadline().unwrap();
    host.pass_time(Tick(deadline.0 + clients::LINE_LIMIT_NS));
    for client in &mut clients {
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
    assert_eq!(host.deadline(), None);
}

/// Sends this as a client, which then waits or leaves. Returns true if the host has closed it.
fn is_closed_after(host: &mut Silent, uds: &Path, bytes: &[u8], leaves: bool) -> bool {
    let mut client = UnixStream::connect(uds).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut closed = false;
    for _ in 0..20 {
        match client.write(&bytes[sent..]) {
            Ok(n) => sent += n,
            Err(e) => closed |= e.kind() == io::ErrorKind::BrokenPipe,
        }
        if leaves && sent == bytes.len() {
            client.shutdown(std::net::Shutdown::Both).unwrap();
        }
        host.turn(Some(Duration::ZERO)).unwrap();
        closed |= !matches!(client.read(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock);
    }
    closed
}

#[test]
fn r53_a_client_that_dies_in_its_line_or_sends_none_is_closed_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let uds = dir.path().join("v");
    let mut host = host(&uds);
    // It has begun its line, and waits through all of this.
    let mut other = UnixStream::connect(&uds).unwrap();
    other.write_all(b"CONN").unwrap();
    other.set_nonblocking(true).unwrap();
    host.turn(Some(Duration::ZERO)).unwrap();
    let line = b"CONNECT 5000\n";
    for cut in 0..line.len() {
        assert!(
            is_closed_after(&mut host, &uds, &line[..cut], true),
            "{cut}"
        );
        // One that waits is only slow.
        assert!(
            !is_closed_after(&mut host, &uds, &line[..cut], false),
            "{cut}"
        );
    }
    let long = vec![b'C'; 1 << 20];
    let blanks = [&b"CONNECT"[..], &vec![b' '; 1 << 20]].concat();
    for bytes in [
        &long[..],
        &blanks,
        b"\0",
        b"CONNECT 5000\0\n",
        b"CONNECT\0 5000\n",
        b"\n",
        b"CONNECT\n",
        b"CONNECT 4294967296\n",
        b"\xff\xfe 5000\n",
    ] {
        let shown = bytes[..bytes.len().min(20)].escape_ascii();
        // A NUL has no end of its line yet.
        let ends = bytes.len() > 1 || bytes == b"\n";
        assert_eq!(
            is_closed_after(&mut host, &uds, bytes, false),
            ends,
            "{shown}"
        );
        assert!(is_closed_after(&mut host, &uds, bytes, true), "{shown}");
    }
    assert_eq!(
        other.read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    other.write_all(b"ECT 5000\n").unwrap();
    // It is read, and there is no driver that could be dialled.
    while other.read(&mut [0]).is_err() {
        host.turn(Some(Duration::ZERO)).unwrap();
    }
}
