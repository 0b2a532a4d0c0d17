//! The real `adit-port` with `--auto`: a VMM that has a socket for each stream, and one that connects by vhost-user. What the host's kernel
//! has is another test's, because no test makes a socket of AF_VSOCK on the machine itself.

mod guest;
mod running;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use adit_port::control::{HYBRID_HOST_SOCKET, HYBRID_SOCKET, Target, VHOST_SOCKET};
use adit_port::control_io::{Message, receive};
use running::{Aditd, Running};

/// Of the driver that the kernel of a host with such VMs has.
const DRIVER: &str = "/sys/class/misc/vhost-vsock";

fn started() -> Running {
    Running::start_with(|command| {
        let dir = command.get_args().last().unwrap().to_owned();
        command.arg("--auto");
        command
            .arg("--hybrid")
            .arg(Path::new(&dir).join(HYBRID_SOCKET));
        // Without it the doorkeeper of the CID makes no socket.
        if !Path::new(DRIVER).exists() {
            command.arg("--vsock");
        }
    })
}

/// Waits until this way is said, and its reason has this text.
fn wait_way(aditd: &Aditd, number: u8, text: &str) {
    loop {
        if let (Message::Way(way), _) = receive(&aditd.0).unwrap().expect("connection")
            && way.way == number
            && way.why.contains(text)
        {
            return;
        }
    }
}

fn answered(aditd: &Aditd, id: u64) {
    loop {
        match receive(&aditd.0).unwrap().expect("connection").0 {
            Message::Dialed(dialed) => return assert_eq!(dialed.id, id),
            Message::DialFailed(failed) => panic!("{failed:?}"),
            _ => {}
        }
    }
}

fn tunnel(aditd: &Aditd, vmm: &UnixListener, id: u64) -> (UnixStream, UnixStream) {
    aditd.dial(id, Target::VsockPort(22));
    let (mut far, _) = vmm.accept().unwrap();
    far.read_exact(&mut [0; 11]).unwrap();
    far.write_all(b"OK 5\n").unwrap();
    answered(aditd, id);
    let near = aditd.attach(id, b"");
    near.set_nonblocking(false).unwrap();
    (near, far)
}

#[test]
fn each_vmm_that_comes_is_met_and_a_way_with_streams_is_kept() {
    let mut running = started();
    let aditd = running.connect();
    wait_way(&aditd, 0, "has not made");
    // Both are listened at from the start, and only the VMM's own comes and goes.
    assert!(running.dir.join(VHOST_SOCKET).exists());
    let vmm = UnixListener::bind(running.dir.join(HYBRID_SOCKET)).unwrap();
    wait_way(&aditd, 3, "the VMM's socket is there");
    aditd.wait_status(|s| s.session);
    let (mut near, mut far) = tunnel(&aditd, &vmm, 1);
    // Another VMM, by vhost-user.
    let guest = running.boot(&[22]);
    wait_way(&aditd, 3, "it is kept while it has streams");
    near.write_all(b"question").unwrap();
    far.read_exact(&mut [0; 8]).unwrap();
    // Also for the next aditd.
    let aditd = running.connect();
    wait_way(&aditd, 3, "it is kept while it has streams");
    far.write_all(b"answer").unwrap();
    near.read_exact(&mut [0; 6]).unwrap();
    drop((near, far));
    wait_way(&aditd, 1, "a VMM is connected");
    aditd.wait_status(|s| s.session);
    // It goes, and the other one is still there.
    drop(guest);
    wait_way(&aditd, 3, "no VMM is connected to vhost.sock");
    aditd.wait_status(|s| s.session);
    tunnel(&aditd, &vmm, 2);
}

#[test]
fn a_killed_port_process_has_a_successor_that_meets_the_vmm_by_its_socket() {
    let mut running = started();
    let aditd = running.connect();
    let vmm = UnixListener::bind(running.dir.join(HYBRID_SOCKET)).unwrap();
    wait_way(&aditd, 3, "");
    let path = running.dir.join(HYBRID_HOST_SOCKET);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while UnixStream::connect(&path).is_err() {
        assert!(
            std::time::Instant::now() < end,
            "nobody listens for the guest"
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    let mut command = running::command(&running.dir);
    command.arg("--auto");
    command.arg("--hybrid").arg(running.dir.join(HYBRID_SOCKET));
    running.child = command.spawn().unwrap();
    let aditd = running.connect();
    wait_way(&aditd, 3, "");
    tunnel(&aditd, &vmm, 1);
}

#[test]
fn two_ways_without_a_choice_are_refused_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = running::command(&dir.path().join("web-1"));
    command.arg("--hybrid").arg(dir.path().join("v.sock"));
    let output = command.arg("--vsock").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--auto"));
}
