//! The doorkeeper in a thread, with scripted streams in place of AF_VSOCK, and its real messages.

use std::collections::VecDeque;
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use adit_channel::foreign::{Door, DoorNews};
use adit_passed::Closer;
use nix::sys::socket::{SockFlag, socketpair};

use super::*;
use crate::door::DoorLink;
use crate::door::again::AGAIN_FIRST;

const LONG: Duration = Duration::from_secs(30);

/// What the kernel does with a stream that is begun.
enum Does {
    Fails(Errno),
    Opens(OwnedFd),
}

#[derive(Default)]
struct Said {
    /// A VM has the CID.
    vm: bool,
    missing: Option<String>,
    does: VecDeque<Does>,
    begun: Vec<u32>,
}

struct Scripted {
    said: Arc<Mutex<Said>>,
    device: PathBuf,
}

impl Streams for Scripted {
    fn missing(&self) -> Option<String> {
        self.said.lock().unwrap().missing.clone()
    }

    fn device(&self) -> &Path {
        &self.device
    }

    fn begin(&mut self, port: u32) -> Result<OwnedFd, Errno> {
        let mut said = self.said.lock().unwrap();
        if port != NOBODYS_PORT {
            said.begun.push(port);
            match said.does.pop_front() {
                Some(Does::Fails(e)) => return Err(e),
                Some(Does::Opens(fd)) => return Ok(fd),
                None => {}
            }
        }
        match said.vm {
            true => Ok(UnixStream::pair().unwrap().0.into()),
            false => Err(Errno::ENODEV),
        }
    }
}

struct World {
    said: Arc<Mutex<Said>>,
    link: DoorLink,
    dir: tempfile::TempDir,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl World {
    fn new(said: Said, has_device: bool) -> Self {
        Self::with(said, has_device, false)
    }

    fn with(said: Said, has_device: bool, only_seen: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("vhost-vsock");
        if has_device {
            File::create(&device).unwrap();
        }
        let said = Arc::new(Mutex::new(said));
        let streams = Scripted {
            said: said.clone(),
            device,
        };
        let kind = SockType::SeqPacket;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let thread = std::thread::spawn(move || serve(streams, (42, only_seen), theirs, inotify));
        Self {
            said,
            link: DoorLink::over(ours, Closer::shared()),
            dir,
            thread: Some(thread),
        }
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Said> {
        self.said.lock().unwrap()
    }

    /// A VMM opens the device. Dropped, it closes it.
    fn vmm(&self) -> File {
        File::create(self.dir.path().join("vhost-vsock")).unwrap()
    }

    fn news(&mut self) -> DoorNews {
        let end = Instant::now() + LONG;
        loop {
            if let Some(news) = self.link.receive() {
                return news;
            }
            assert!(Instant::now() < end, "it says nothing");
            std::thread::yield_now();
        }
    }

    #[track_caller]
    fn state(&mut self) -> Result<(), String> {
        match self.news() {
            DoorNews::State(state) => state,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let (_, other) = UnixStream::pair().unwrap();
        // Ends the doorkeeper.
        drop(std::mem::replace(
            &mut self.link,
            DoorLink::over(other.into(), Closer::shared()),
        ));
        let thread = self.thread.take().unwrap();
        if !std::thread::panicking() {
            match thread.join().unwrap() {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
                ended => ended.unwrap(),
            }
        }
    }
}

fn with_vm() -> World {
    let said = Said {
        vm: true,
        ..Said::default()
    };
    let mut world = World::new(said, true);
    assert_eq!(world.state(), Ok(()));
    world
}

#[test]
fn a_vm_is_met_when_its_vmm_opens_the_device_and_missed_when_it_closes_it() {
    let mut world = World::new(Said::default(), true);
    let none = world.state().unwrap_err();
    assert!(none.contains("CID 42") && none.contains("guest-cid=42"));
    for _ in 0..3 {
        // The CID comes a moment after the device is opened: it is looked for again.
        let vmm = world.vmm();
        std::thread::sleep(AGAIN_FIRST);
        world.said().vm = true;
        assert_eq!(world.state(), Ok(()));
        // The kernel says that the device is closed before it forgets the CID.
        drop(vmm);
        std::thread::sleep(AGAIN_FIRST);
        world.said().vm = false;
        assert_eq!(world.state(), Err(none.clone()));
    }
}

#[test]
fn a_stream_is_passed_once_it_is_connected_and_each_failure_is_told_apart() {
    let mut world = with_vm();
    let (near, _far) = UnixStream::pair().unwrap();
    world.said().does.push_back(Does::Opens(near.into()));
    world.link.dial(7, 22).unwrap();
    match world.news() {
        DoorNews::Opened { ticket: 7, .. } => {}
        other => panic!("{other:?}"),
    }
    // Nothing listens: the kernel says so when the socket is writable.
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let refused = connecting(port);
    world.said().does.push_back(Does::Opens(refused));
    world.link.dial(8, 23).unwrap();
    assert!(matches!(world.news(), DoorNews::Failed { ticket: 8 }));
    // This process is short of something: the VM is there.
    world.said().does.push_back(Does::Fails(Errno::EMFILE));
    world.link.dial(9, 24).unwrap();
    assert!(matches!(world.news(), DoorNews::Failed { ticket: 9 }));
    world.said().vm = false;
    world.link.dial(10, 25).unwrap();
    assert!(world.state().unwrap_err().contains("CID 42"));
    assert!(matches!(world.news(), DoorNews::Gone { ticket: 10 }));
    assert_eq!(world.said().begun, [22, 23, 24, 25]);
}

/// A socket that connects to where nobody listens.
fn connecting(at: std::net::SocketAddr) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
    let (family, flags) = (AddressFamily::INET, SocketFlags::NONBLOCK);
    let socket = socket_with(family, SocketType::STREAM, flags, None).unwrap();
    // On loopback the answer may be there at once.
    let _ = connect(&socket, &at);
    socket
}

#[test]
fn r119_a_guest_that_does_not_answer_holds_up_nobody() {
    let mut world = with_vm();
    // A socket that is never writable: a stream whose buffer is full.
    let (near, _far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut (&near), &[0; 4096]).is_ok() {}
    world.said().does.push_back(Does::Opens(near.into()));
    world.link.dial(1, 22).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for ticket in 2..50 {
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        world.said().does.push_back(Does::Opens(socket.into()));
        world.link.dial(ticket, 23).unwrap();
        match world.news() {
            DoorNews::Opened { ticket: got, .. } => assert_eq!(got, ticket),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn without_the_driver_it_is_said_what_to_do_and_the_device_is_met() {
    let said = Said {
        missing: Some("modprobe vhost_vsock".into()),
        ..Said::default()
    };
    let mut world = World::new(said, false);
    assert_eq!(world.state(), Err("modprobe vhost_vsock".into()));
    {
        let mut said = world.said();
        (said.missing, said.vm) = (None, true);
    }
    let _vmm = world.vmm();
    assert_eq!(world.state(), Ok(()));
}

#[test]
fn where_the_device_cannot_be_seen_each_dial_says_what_it_finds() {
    let mut world = World::new(Said::default(), false);
    assert_eq!(world.state(), Ok(()));
    for (ticket, vm) in [(1, false), (2, true), (3, false)] {
        world.said().vm = vm;
        world.link.dial(ticket, 22).unwrap();
        match (world.news(), vm) {
            (DoorNews::Failed { ticket: got }, false)
            | (DoorNews::Opened { ticket: got, .. }, true) => assert_eq!(got, ticket),
            (other, _) => panic!("{other:?}"),
        }
    }
}

#[test]
fn beside_other_ways_a_vm_that_nobody_can_see_counts_as_not_there() {
    let said = Said {
        vm: true,
        ..Said::default()
    };
    let mut world = World::with(said, false, true);
    assert!(world.state().unwrap_err().contains("does not see"));
    let _vmm = world.vmm();
    assert_eq!(world.state(), Ok(()));
}
