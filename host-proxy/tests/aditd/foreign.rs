//! R105 and R109 in aditd: descriptors that cannot be closed, from a port process that its guest may control. aditd has one
//! thread for everybody.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use adit_channel::hello;
use adit_port::control::{HANDOVER_FDS_MAX, Handover, Incoming, Quit};
use adit_port::control_io::{Message, send_all};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use crate::fuse::Mute;
use crate::host::{Control, Host};
use crate::kinds::{self, Foreign};

/// Not a test by itself: the server of the file system, which runs in a process of its own.
#[test]
fn server() {
    crate::fuse::serve();
}

fn hand_over(control: &Control, seq: u64, fds: &[BorrowedFd<'_>]) {
    let (record, ring) = (vec![7; 9], 0);
    let message = Message::Handover(Handover { seq, record, ring });
    send_all(&control.0, &message, fds).unwrap();
}

/// Sends bytes and descriptors on a Unix socket.
fn pass(socket: &impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    try_pass(socket, bytes, fds).unwrap();
}

/// The same, where the socket may let nobody.
pub fn try_pass(socket: &impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> nix::Result<usize> {
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    let socket = socket.as_fd().as_raw_fd();
    sendmsg::<UnixAddr>(socket, &[IoSlice::new(bytes)], &rights, flags, None)
}

/// Checks that the API answers, and that the proxy serves another VM.
fn answers(host: &Host) {
    assert_eq!(host.get("/v1/vms").as_array().unwrap().len(), 2);
}

#[test]
fn r105_closing_what_a_port_process_passed_delays_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    // Dropped before aditd, which cannot end while one of its closes waits for the server.
    let mute = Mute::mount(dir.path(), "foreign::server");
    let mut control = ports[0].connected();
    let other = ports[1].connected();
    let null = File::open("/dev/null").unwrap();
    let mut fars = Vec::new();
    let mut foreign = || {
        let (mut all, far) = kinds::all();
        fars.push(far);
        all.extend(mute.as_ref().map(|mute| Foreign {
            name: "a file whose server is silent",
            fd: mute.open().into(),
        }));
        all
    };
    // In handovers, each of which replaces the one before.
    for (n, kind) in (1..).zip(foreign()) {
        kinds::stopped(host.worker(), || {
            hand_over(&control, 2 * n, &[kind.fd.as_fd()]);
            hand_over(&control, 2 * n + 1, &[null.as_fd()]);
            kind.close();
        });
        answers(&host);
    }
    // As a stream that the guest dialled.
    for kind in foreign() {
        let (port, peer_port) = (hello::PORT, 700);
        let incoming = Message::Incoming(Incoming { port, peer_port });
        kinds::stopped(host.worker(), || {
            send_all(&control.0, &incoming, &[kind.fd.as_fd()]).unwrap();
            kind.close();
        });
        answers(&host);
    }
    // With a frame that has no descriptors, or one with more than allowed: that ends the connection.
    let (seq, record, ring) = (1000, vec![7; 9], 0);
    let many = Message::Handover(Handover { seq, record, ring });
    let quit = Message::Quit(Quit {});
    let cases = [(&quit, 1), (&many, HANDOVER_FDS_MAX + 1), (&quit, 9)];
    let mut kinds = foreign();
    // Not dropped here, because these closes would wait.
    kinds.drain(cases.len()..).for_each(Foreign::close);
    for (kind, (frame, count)) in kinds.into_iter().zip(cases) {
        let frame = frame.encode().unwrap();
        kinds::stopped(host.worker(), || {
            pass(&control.0, &frame, &vec![kind.fd.as_fd(); count]);
            kind.close();
        });
        answers(&host);
        control = ports[0].connected();
    }
    // While all those closes wait, the agents of both VMs are served.
    other.agent();
    control.agent();
    answers(&host);
    drop(mute);
    drop(fars);
}

/// A program that stands for adit-port, and does this.
fn script(path: &Path, does: &str) -> PathBuf {
    std::fs::write(path, format!("#!/bin/sh\n{does}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.into()
}

#[test]
fn a_port_process_has_its_vms_cgroup_where_aditd_can_make_one() {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    if !nix::unistd::geteuid().is_root() || !mounts.contains(" - cgroup2 ") {
        println!("skipped: making a cgroup takes root and cgroup v2");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("entered");
    let (mut host, _ports) = Host::new(&[], "");
    let does = format!(
        "until grep -q :/adit-ports/in-a-cgroup$ /proc/$$/cgroup; do sleep 0.05; done; echo > {}",
        marker.display()
    );
    host.port_bin = script(&dir.path().join("adit-port"), &does);
    host.start();
    let added = host.api("POST", "/v1/vms", r#"{"name":"in-a-cgroup","cid":4}"#);
    assert!(matches!(added.status, 200 | 201), "{}", added.body);
    host.until("it is there", |_| marker.exists().then_some(()));
}

#[test]
fn r105_a_vms_silent_file_does_not_keep_another_vms_port_process_from_starting() {
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("started");
    let program = dir.path().join("adit-port");
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.port_bin = script(&program, &format!("echo > {}", marker.display()));
    host.start();
    let Some(mute) = Mute::mount(dir.path(), "foreign::server") else {
        return;
    };
    let control = ports[0].connected();
    // One that is kept for a successor, and one that waits to be closed.
    let kept = mute.open();
    let closed = mute.open();
    kinds::stopped(host.worker(), || {
        hand_over(&control, 1, &[closed.as_fd()]);
        hand_over(&control, 2, &[kept.as_fd()]);
        // Closed here, they would be waited for.
        std::mem::forget((closed, kept));
    });
    let added = host.api("POST", "/v1/vms", r#"{"name":"b","cid":4}"#);
    assert!(matches!(added.status, 200 | 201), "{}", added.body);
    host.until("b's port process starts", |_| marker.exists().then_some(()));
    drop(mute);
}

#[test]
fn r105_descriptors_on_a_guests_stream_delay_nobody() {
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let control = ports[0].connected();
    let _other = ports[1].connected();
    let mut fars = Vec::new();
    let mut lingering = || {
        let (lingers, far) = kinds::lingering();
        fars.push(far);
        lingers
    };
    // With the agent's bytes, read or not.
    let agent = control.agent();
    let fd = lingering();
    kinds::stopped(host.worker(), || {
        pass(&agent.stream, &[0], &[fd.as_fd()]);
        drop(fd);
    });
    answers(&host);
    let newer = control.agent();
    let fd = lingering();
    kinds::stopped(host.worker(), || {
        pass(&newer.stream, &[0; 1 << 10], &[fd.as_fd()]);
        drop((fd, newer));
    });
    answers(&host);
    // With a server's answer to a request.
    let mut client = host.proxy();
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let (guest, _) = control.tunnel();
    let fd = lingering();
    kinds::stopped(host.worker(), || {
        pass(&guest, b"HTTP/1.1 200 OK\r\n", &[fd.as_fd()]);
        drop(fd);
    });
    answers(&host);
    drop((client, guest));
    answers(&host);
    drop(fars);
}

#[test]
fn r109_a_handover_for_which_no_descriptor_is_free_leaves_none_behind() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let mut control = ports[0].connected();
    assert_eq!(host.get("/v1/vms").as_array().unwrap().len(), 1);
    let before = kinds::open_in(host.worker()).len();
    let memory: OwnedFd = tempfile::tempfile().unwrap().into();
    for _ in 0..5 {
        kinds::limit(host.worker(), Some(6));
        hand_over(&control, 1, &[memory.as_fd(); HANDOVER_FDS_MAX]);
        // It cannot be kept, so the connection ends and aditd connects again.
        let anew = ports[0].connected();
        host.until("nothing is left", |host| {
            (kinds::open_in(host.worker()).len() <= before).then_some(())
        });
        control = anew;
    }
    kinds::limit(host.worker(), None);
    hand_over(&control, 1, &[memory.as_fd(); HANDOVER_FDS_MAX]);
    loop {
        if let Message::Kept(kept) = control.hear().unwrap().0 {
            assert_eq!(kept.seq, 1);
            break;
        }
    }
}
