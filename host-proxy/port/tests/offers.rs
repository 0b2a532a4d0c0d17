//! Streams of a guest that `aditd` has accepted of the host's kernel and passes to a port process. Sockets of pairs stand for AF_VSOCK.

mod guest;
mod running;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use adit_channel::foreign::{self, Door, DoorNews, Foreign};
use adit_channel::live::LiveFile;
use adit_passed::Closer;
use adit_port::control::{Accepted, BegunAnew, FEATURE_ACCEPTED, Features, Incoming, Quit};
use adit_port::control_io::{Message, receive, send};
use adit_port::door::WithOffers;
use adit_port::keep::{Keeping, Note};
use adit_port::place::{Place, connect_control};
use adit_port::process::{Options, Process};
use nix::sys::eventfd::{EfdFlags, EventFd};
use running::Running;

/// A door behind which there is a VM that nobody dials.
struct Quiet(EventFd, bool);

impl Door for Quiet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn dial(&mut self, _: u32, _: u32) -> io::Result<()> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn receive(&mut self) -> Option<DoorNews> {
        let _ = self.0.read();
        (!std::mem::replace(&mut self.1, true)).then_some(DoorNews::State(Ok(())))
    }
}

/// A port process in a thread, and `aditd`'s end of its control socket.
struct World {
    aditd: OwnedFd,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let run = tempfile::tempdir().unwrap();
        let dir = run.path().join("web-1");
        let serving = dir.clone();
        let place = Place::take(&dir).unwrap();
        let thread = std::thread::spawn(move || serve(place, serving));
        let sock = UnixStream::from(connect_control(&dir).unwrap());
        sock.set_nonblocking(false).unwrap();
        sock.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Self {
            aditd: sock.into(),
            thread: Some(thread),
            _dir: run,
        }
    }

    /// The guest dials from this port. Returns its end.
    fn dials(&self, guest_port: u32) -> UnixStream {
        let (socket, guest) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        guest
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let accepted = Message::Accepted(Accepted {
            port: 741,
            guest_port,
        });
        send(&self.aditd, &accepted, Some(socket.as_fd())).unwrap();
        guest
    }

    /// The next stream that `aditd` gets, and the guest's port.
    fn incoming(&self) -> (u32, UnixStream) {
        loop {
            match receive(&self.aditd).unwrap().expect("connection") {
                (Message::Incoming(Incoming { peer_port, .. }), Some(fd)) => {
                    let stream = UnixStream::from(fd);
                    stream.set_nonblocking(false).unwrap();
                    return (peer_port, stream);
                }
                (Message::Features(Features { bits }), _) => {
                    assert_ne!(bits & FEATURE_ACCEPTED, 0);
                }
                _ => {}
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let quit = Message::Quit(Quit {});
        let told = send(&self.aditd, &quit, None);
        if told.is_ok() && !std::thread::panicking() {
            self.thread.take().unwrap().join().unwrap();
        }
    }
}

fn serve(place: Place, dir: PathBuf) {
    let event = |value| {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        EventFd::from_value_and_flags(value, flags).unwrap()
    };
    let live = Arc::new(LiveFile::create().unwrap());
    let note = Note::open(&dir).unwrap();
    let (keeping, _keeper) = Keeping::new(live.clone(), note, None).unwrap();
    Closer::shared().prepare();
    let (door, offers) = WithOffers::new(Quiet(event(1), false)).unwrap();
    let options = foreign::Options { half_closes: true };
    let carrier = Foreign::new(door, options, 1).unwrap();
    let options = Options {
        vm: "web-1".parse().unwrap(),
        cid: 42,
        serve_ports: vec![741],
        busy_poll: Duration::ZERO,
        seed: 1,
        boot_nonce: [1; 16],
        vmm: false,
    };
    let (control, stop) = (place.control, event(0).into());
    let process = Process::new(options, carrier, live, keeping, control, stop).unwrap();
    process.with_offers(offers).run().unwrap();
}

#[test]
fn r117_a_stream_of_the_guest_comes_back_with_its_port_and_keeps_half_closes() {
    let world = World::new();
    for guest_port in [742, 1024, u32::MAX - 1] {
        let mut guest = world.dials(guest_port);
        let (port, mut host) = world.incoming();
        assert_eq!(port, guest_port);
        guest.write_all(b"hello").unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        host.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"hello");
        host.write_all(b"answer").unwrap();
        drop(host);
        got.clear();
        guest.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"answer");
    }
}

#[test]
fn r128_older_streams_end_when_the_guest_has_begun_anew() {
    let world = World::new();
    let mut old = world.dials(742);
    let (_, mut old_host) = world.incoming();
    let mut new = world.dials(743);
    let (_, mut new_host) = world.incoming();
    let anew = Message::BegunAnew(BegunAnew {
        port: 741,
        guest_port: 743,
    });
    send(&world.aditd, &anew, None).unwrap();
    assert!(!old_host.read(&mut [0]).is_ok_and(|n| n > 0));
    assert!(!old.read(&mut [0]).is_ok_and(|n| n > 0));
    new.write_all(b"new").unwrap();
    let mut got = [0; 3];
    new_host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"new");
}

#[test]
fn a_port_process_of_another_carrier_refuses_such_streams() {
    let mut running = Running::start();
    let aditd = running.connect();
    let (socket, _guest) = UnixStream::pair().unwrap();
    let accepted = Accepted {
        port: 741,
        guest_port: 742,
    };
    aditd.say(Message::Accepted(accepted), Some(&socket));
    // It says what it knows, and closes the connection.
    loop {
        match receive(&aditd.0) {
            Ok(Some((Message::Features(Features { bits }), _))) => {
                assert_eq!(bits & FEATURE_ACCEPTED, 0);
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(e) => panic!("{e}"),
        }
    }
    // The VM is served all the same.
    running.connect().wait_status(|s| !s.session);
}
