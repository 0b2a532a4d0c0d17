//! The real `adit-port` with `--hybrid`: the test is `aditd` on its control socket, and the VMM at the path.

mod guest;
mod running;

use std::fs::{self, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Accept, Common, Hello, HostKey, Open};
use adit_port::control::{Cancel, DialError, Incoming, Key, Target, VHOST_SOCKET};
use adit_port::control_io::{Message, receive};
use running::{Aditd, Running};

/// A port process, and the directory of its VMM.
struct World {
    running: Running,
    aditd: Aditd,
    dir: tempfile::TempDir,
}

impl World {
    /// Without a VMM.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut running = started(&dir.path().join("v.sock"));
        let aditd = running.connect();
        Self {
            running,
            aditd,
            dir,
        }
    }

    /// With one.
    fn with_vmm() -> (Self, UnixListener) {
        let world = Self::new();
        let vmm = world.vmm();
        world.aditd.wait_status(|s| s.session);
        (world, vmm)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    fn vmm(&self) -> UnixListener {
        UnixListener::bind(self.path()).unwrap()
    }

    /// The socket for what the guest dials.
    fn host_socket(&self) -> UnixStream {
        let path = self.dir.path().join("v.sock_741");
        until(|| UnixStream::connect(&path).ok())
    }

    /// Waits for the answer to a dial.
    fn answer(&self) -> (Message, Option<OwnedFd>) {
        loop {
            match receive(&self.aditd.0).unwrap().expect("connection") {
                (Message::Status(_) | Message::Features(_) | Message::Handover(_), _) => {}
                other => return other,
            }
        }
    }

    #[track_caller]
    fn failed(&self, id: u64) -> DialError {
        match self.answer().0 {
            Message::DialFailed(failed) if failed.id == id => failed.error,
            other => panic!("{other:?}"),
        }
    }

    /// Opens a tunnel to a plain port.
    fn tunnel(&self, vmm: &UnixListener, id: u64) -> (UnixStream, UnixStream) {
        self.aditd.dial(id, Target::VsockPort(22));
        let mut far = asked(vmm, 22);
        far.write_all(b"OK 5\n").unwrap();
        let (message, _) = self.answer();
        assert!(matches!(message, Message::Dialed(d) if d.id == id));
        let near = self.aditd.attach(id, b"");
        near.set_nonblocking(false).unwrap();
        (near, far)
    }
}

fn started(path: &Path) -> Running {
    Running::start_with(|command| {
        command.arg("--hybrid").arg(path);
    })
}

/// Waits for something.
fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The next dial that the VMM gets, which must be for this port.
#[track_caller]
fn asked(vmm: &UnixListener, port: u32) -> UnixStream {
    let (mut socket, _) = vmm.accept().unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let want = format!("CONNECT {port}\n");
    let mut line = vec![0; want.len()];
    socket.read_exact(&mut line).unwrap();
    assert_eq!(line, want.as_bytes());
    socket
}

fn exact(mut from: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn tunnels_of_a_vmm_that_has_a_socket_for_each_outlive_aditd() {
    let (mut world, vmm) = World::with_vmm();
    assert!(!world.running.dir.join(VHOST_SOCKET).exists());
    let (mut near, mut far) = world.tunnel(&vmm, 1);
    near.write_all(b"question").unwrap();
    assert_eq!(exact(&far, 8), b"question");
    world.aditd = world.running.connect();
    world.aditd.wait_status(|s| s.session && s.streams == 1);
    far.write_all(b"answer").unwrap();
    assert_eq!(exact(&near, 6), b"answer");
    // The VMM ends, and with it the tunnel. Its socket is still there.
    drop((far, vmm));
    assert_eq!(near.read(&mut [0]).unwrap(), 0);
    world.aditd.dial(2, Target::VsockPort(22));
    assert_eq!(world.failed(2), DialError::Refused);
    world
        .aditd
        .wait_status(|s| !s.session && s.last_fault.contains("nothing listens"));
    world.aditd.dial(3, Target::VsockPort(22));
    assert_eq!(world.failed(3), DialError::NoSession);
    // The next one is met when its socket is back.
    fs::remove_file(world.path()).unwrap();
    let vmm = world.vmm();
    world.aditd.wait_status(|s| s.session);
    world.tunnel(&vmm, 4);
}

#[test]
fn a_killed_port_process_is_replaced_and_meets_the_vmm_again() {
    let (mut world, vmm) = World::with_vmm();
    let (mut near, mut far) = world.tunnel(&vmm, 1);
    world.running.child.kill().unwrap();
    world.running.child.wait().unwrap();
    // Both ends see it.
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
    assert!(near.read(&mut [0]).is_ok_and(|n| n == 0) || near.write(b"x").is_err());
    let mut command = running::command(&world.running.dir);
    command.arg("--hybrid").arg(world.path());
    world.running.child = command.spawn().unwrap();
    world.aditd = world.running.connect();
    world.aditd.wait_status(|s| s.session);
    world.tunnel(&vmm, 2);
    // Also for what the guest dials: the old doorkeeper has ended.
    let mut guest = world.host_socket();
    guest.write_all(b"hello").unwrap();
    let (message, fd) = world.answer();
    assert!(matches!(
        message,
        Message::Incoming(Incoming { port: 741, .. })
    ));
    assert_eq!(exact(&fd.unwrap().into(), 5), b"hello");
}

#[test]
fn what_the_guest_dials_reaches_aditd_and_only_the_vmms_user_may() {
    let (world, _vmm) = World::with_vmm();
    let guest = world.host_socket();
    let mode = fs::metadata(world.dir.path().join("v.sock_741")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    let (message, fd) = world.answer();
    let Message::Incoming(incoming) = message else {
        panic!("{message:?}");
    };
    // Its own port is not known, so it is no privileged one.
    assert!(incoming.port == 741 && incoming.peer_port >= 1024);
    let mut aditd = UnixStream::from(fd.unwrap());
    aditd.write_all(b"hello").unwrap();
    assert_eq!(exact(&guest, 5), b"hello");
    drop(aditd);
    assert_eq!((&guest).read(&mut [0]).unwrap(), 0);
}

#[test]
fn hellos_carry_the_mac_of_the_key_that_aditd_gave() {
    let (world, vmm) = World::with_vmm();
    let key = HostKey::new([9; 32]);
    for given in [None, Some(*key.as_bytes()), None] {
        world.aditd.say(Message::Key(Key { key: given }), None);
        world
            .aditd
            .dial(1, Target::Service("tcp:80".parse().unwrap()));
        let mut far = asked(&vmm, hello::PORT);
        // The answer to the line comes with that to the hello behind it: first things first.
        far.write_all(b"OK 1\n").unwrap();
        let open: Open = match hello::read(&mut far).unwrap() {
            Hello::Open(open) => open,
            other => panic!("{other:?}"),
        };
        assert_eq!(open.mac.is_some(), given.is_some());
        assert_eq!(key.made(&open), given.is_some());
        let accept = Accept {
            common: Common {
                boot_nonce: [3; 16],
                ..Common::default()
            },
            version: 1,
        };
        far.write_all(&Hello::Accept(accept).encode()).unwrap();
        match world.answer().0 {
            Message::Dialed(dialed) => assert_eq!(dialed.boot_nonce, [3; 16]),
            other => panic!("{other:?}"),
        }
        drop(world.aditd.attach(1, b""));
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn r53_a_vmm_that_answers_wrongly_or_late_costs_that_dial_only() {
    let (world, vmm) = World::with_vmm();
    let (mut near, far) = world.tunnel(&vmm, 1);
    for (id, answer) in (2..).zip(["", "OK 1", "SSH-2.0\r\n", "OK \0\n"]) {
        world.aditd.dial(id, Target::VsockPort(22));
        let mut end = asked(&vmm, 22);
        end.write_all(answer.as_bytes()).unwrap();
        drop(end);
        assert_eq!(world.failed(id), DialError::Refused, "{answer:?}");
    }
    // Slow, in pieces, with bytes of the tunnel right behind.
    world.aditd.dial(9, Target::VsockPort(22));
    let mut slow = asked(&vmm, 22);
    for piece in ["O", "K ", "77", "7\nSSH-"] {
        slow.write_all(piece.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(matches!(world.answer().0, Message::Dialed(d) if d.id == 9));
    let tunnel = world.aditd.attach(9, b"");
    tunnel.set_nonblocking(false).unwrap();
    assert_eq!(exact(&tunnel, 4), b"SSH-");
    near.write_all(b"on").unwrap();
    assert_eq!(exact(&far, 2), b"on");
}

/// Cloud Hypervisor ends with its VM when a client ends before the end of its line (its reports 6621 and 6798). So nothing looks
/// whether somebody listens by connecting, and a dial that is given up has sent its line.
#[test]
fn r53_every_connection_to_the_vmm_has_its_whole_line() {
    let (mut world, vmm) = World::with_vmm();
    for id in 1..20 {
        world.aditd.dial(id, Target::VsockPort(22));
        match id % 3 {
            0 => world.aditd.say(Message::Cancel(Cancel { id }), None),
            // Given up, too: aditd connects anew.
            1 => world.aditd = world.running.connect(),
            _ => {}
        }
    }
    world.running.child.kill().unwrap();
    world.running.child.wait().unwrap();
    vmm.set_nonblocking(true).unwrap();
    let mut dials = 0;
    while let Ok((mut socket, _)) = vmm.accept() {
        socket.set_nonblocking(false).unwrap();
        let mut said = String::new();
        socket.read_to_string(&mut said).unwrap();
        assert_eq!(said, "CONNECT 22\n");
        dials += 1;
    }
    println!("{dials} of the dials had reached the VMM");
}

#[test]
fn r119_a_vmm_that_accepts_nothing_costs_the_dials_that_do_not_fit() {
    let (world, vmm) = World::with_vmm();
    let (mut near, far) = world.tunnel(&vmm, 1);
    // The standard library's listeners have a backlog of 128 and more: fill it.
    let mut waiting = Vec::new();
    loop {
        match adit_channel::socket_path::connect_now(&world.path()) {
            Ok(socket) => waiting.push(socket),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    world.aditd.dial(2, Target::VsockPort(22));
    assert_eq!(world.failed(2), DialError::Refused);
    // The VMM is there, and its other streams are.
    near.write_all(b"on").unwrap();
    assert_eq!(exact(&far, 2), b"on");
    drop(waiting);
    while world.aditd.ready() {
        if let (Message::Status(status), _) = receive(&world.aditd.0).unwrap().unwrap() {
            assert!(status.session);
        }
    }
}

#[test]
fn r127_what_somebody_else_could_have_put_there_is_not_used() {
    let world = World::new();
    let dir = world.dir.path();
    let refused = |why: &str| {
        world
            .aditd
            .wait_status(|s| !s.session && s.last_fault.contains(why));
    };
    refused("has not made");
    // Links and files.
    let elsewhere = tempfile::tempdir().unwrap();
    let real = elsewhere.path().join("real.sock");
    let _vmm = UnixListener::bind(&real).unwrap();
    symlink(&real, world.path()).unwrap();
    refused("is not a socket");
    fs::remove_file(world.path()).unwrap();
    refused("has not made");
    fs::write(world.path(), "").unwrap();
    refused("is not a socket");
    fs::remove_file(world.path()).unwrap();
    // A socket of somebody else, who has got it there in whatever way.
    if nix::unistd::geteuid().is_root() {
        let _theirs = world.vmm();
        std::os::unix::fs::lchown(world.path(), Some(1000), None).unwrap();
        refused("belongs to user 1000");
        fs::remove_file(world.path()).unwrap();
        refused("has not made");
    } else {
        println!("skipped: a socket of somebody else: only root can make one");
    }
    // A directory in which everybody may put things.
    fs::set_permissions(dir, Permissions::from_mode(0o777)).unwrap();
    refused("may be written by everybody");
    let _own = world.vmm();
    fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    world.aditd.wait_status(|s| s.session);
}

#[test]
fn r127_the_socket_for_the_guest_is_never_taken_from_somebody() {
    let dir = tempfile::tempdir().unwrap();
    let other = UnixListener::bind(dir.path().join("v.sock_741")).unwrap();
    let _vmm = UnixListener::bind(dir.path().join("v.sock")).unwrap();
    let mut running = started(&dir.path().join("v.sock"));
    let aditd = running.connect();
    aditd.wait_status(|s| !s.session && s.last_fault.contains("listens on"));
    drop(other);
    fs::remove_file(dir.path().join("v.sock_741")).unwrap();
    aditd.wait_status(|s| s.session);
    // One that is removed under it comes back.
    let path = dir.path().join("v.sock_741");
    until(|| fs::remove_file(&path).ok());
    until(|| UnixStream::connect(&path).ok());
}

#[test]
fn a_directory_that_comes_and_goes_with_its_vmm_is_found_again() {
    let above = tempfile::tempdir().unwrap();
    let dir = above.path().join("vms/web-1");
    let mut running = started(&dir.join("v.sock"));
    let aditd = running.connect();
    // The doorkeeper is confined to what was there before: of these directories, the one above all of them.
    aditd.wait_status(|s| s.last_fault.contains("cannot look at"));
    for _ in 0..2 {
        fs::create_dir_all(&dir).unwrap();
        let vmm = UnixListener::bind(dir.join("v.sock")).unwrap();
        aditd.wait_status(|s| s.session);
        let path = dir.join("v.sock_741");
        until(|| UnixStream::connect(&path).ok());
        drop(vmm);
        fs::remove_dir_all(above.path().join("vms")).unwrap();
        aditd.wait_status(|s| !s.session);
    }
}

#[test]
fn a_path_that_cannot_be_a_vmms_is_refused_at_the_start() {
    for path in ["v.sock", "/", "/a/../b", &format!("/{}", "x".repeat(97))] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = running::command(&dir.path().join("web-1"));
        let output = command.arg("--hybrid").arg(path).output().unwrap();
        assert!(!output.status.success(), "{path}");
    }
}
