//! What the server sends to an unmodified QEMU on the ivshmem socket, and how it treats clients that break the
//! protocol.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use adit_ringbuf::region::{Features, Spec};
use adit_ringbuf::session::{Event, Guest, Host};
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::doorbell::{Doorbell, Waiter, from_passed};
use adit_ringbuf_io::ivshmem::{Alive, IvshmemError, Server};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_sys_util::eventfd::EventFd;

const BYTES: usize = 256 << 10;

struct Rig {
    dir: tempfile::TempDir,
    server: Server,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("ivshmem.sock")).unwrap();
        let server = Server::new(listener, BYTES).unwrap();
        Self { dir, server }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("ivshmem.sock")
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path()).unwrap()
    }
}

/// Receives one message as QEMU does: eight bytes, with at most one descriptor.
fn message(from: &UnixStream) -> (i64, Option<OwnedFd>) {
    let mut bytes = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(from, parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    assert_eq!(got.bytes, 8);
    let mut fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|m| match m {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => vec![],
        })
        .collect();
    assert!(fds.len() <= 1);
    (i64::from_le_bytes(bytes), fds.pop())
}

/// What QEMU has after the server's seven messages.
struct Vm {
    memory: Mapped,
    /// First the vectors of peer 0, then its own.
    bells: [EventFd; 4],
}

fn receive_setup(socket: &UnixStream) -> Vm {
    assert!(matches!(message(socket), (0, None)), "version");
    assert!(matches!(message(socket), (1, None)), "its id");
    let (what, fd) = message(socket);
    assert_eq!(what, -1);
    let memory = Mapped::from_memfd(fd.unwrap(), BYTES).unwrap();
    let bells = [0, 0, 1, 1].map(|peer| {
        let (who, fd) = message(socket);
        assert_eq!(who, peer);
        from_passed(fd.unwrap()).unwrap()
    });
    Vm { memory, bells }
}

fn was_signalled(bell: &EventFd) -> bool {
    let fd = bell.fd().unwrap();
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 1 && bell.clear().is_ok()
}

#[test]
fn a_client_gets_the_region_and_four_doorbells_in_their_order() {
    let mut rig = Rig::new();
    assert!(rig.server.accept().unwrap().is_none());
    let qemu = rig.connect();
    let given = rig.server.accept().unwrap().unwrap();
    let vm = receive_setup(&qemu);
    let ours = &given.bells;
    // Each doorbell signals its counterpart on the other side, and no other.
    let [host_data, host_space, guest_data, guest_space] = &vm.bells;
    let pairs = [
        (host_data, &ours.host_data),
        (host_space, &ours.host_space),
        (&ours.guest_data, guest_data),
        (&ours.guest_space, guest_space),
    ];
    for (n, (from, _)) in pairs.iter().enumerate() {
        from.ring().unwrap();
        let signalled: Vec<bool> = pairs.iter().map(|(_, to)| was_signalled(to)).collect();
        let expected: Vec<bool> = (0..4).map(|i| i == n).collect();
        assert_eq!(signalled, expected, "doorbell {n}");
    }
    // Both sides have the same region: a session starts and a record passes.
    let mut host = Host::offer(given.memory, Spec::uniform(2, BYTES / 8), 1).unwrap();
    let mut guest = Guest::find(vm.memory, 77, Features::NONE).unwrap();
    let _ = guest.attach();
    let _ = host.poll();
    assert!(matches!(
        guest.poll().unwrap().event,
        Some(Event::Attached { epoch: 2, .. })
    ));
    assert!(matches!(host.poll().event, Some(Event::Attached { .. })));
    let mut to = guest.ends(1, true).unwrap().unwrap().producer;
    let _ = to.try_push(b"over BAR2").unwrap();
    let mut buf = [0; 16];
    let len = host.ends(1, true).unwrap().consumer.pop(&mut buf).unwrap();
    assert_eq!(&buf[..len.unwrap()], b"over BAR2");
}

#[test]
fn a_second_client_is_disconnected_and_the_first_is_not_affected() {
    let mut rig = Rig::new();
    let first = rig.connect();
    let given = rig.server.accept().unwrap().unwrap();
    let mut second = rig.connect();
    assert!(matches!(rig.server.accept(), Err(IvshmemError::Busy)));
    assert_eq!(
        second.read(&mut [0; 8]).unwrap(),
        0,
        "the second client gets no byte"
    );
    assert_eq!(rig.server.look().unwrap(), Alive::Yes);
    let vm = receive_setup(&first);
    vm.bells[0].ring().unwrap();
    assert!(was_signalled(&given.bells.host_data));
}

#[test]
fn the_next_client_shares_nothing_with_the_one_before() {
    let mut rig = Rig::new();
    let first = rig.connect();
    let given = rig.server.accept().unwrap().unwrap();
    let old = receive_setup(&first);
    given.memory.store(4096, 0x5ec7e7);
    drop(first);
    // The server has not noticed that the first client is gone when the next one connects.
    let second = rig.connect();
    let next = rig.server.accept().unwrap().unwrap();
    let new = receive_setup(&second);
    assert_eq!(new.memory.load(4096), 0);
    old.memory.store(8192, 0xbad);
    for bell in &old.bells {
        bell.ring().unwrap();
    }
    assert_eq!(next.memory.load(8192), 0);
    assert!(!was_signalled(&next.bells.host_data) && !was_signalled(&next.bells.host_space));
    assert!(new.bells.iter().all(|bell| !was_signalled(bell)));
}

#[test]
fn a_client_that_dies_early_or_sends_data_does_not_affect_the_next() {
    let mut rig = Rig::new();
    for _ in 0..20 {
        // The client is gone before it is accepted.
        drop(rig.connect());
        match rig.server.accept() {
            Ok(Some(_)) => assert_eq!(rig.server.look().unwrap(), Alive::No),
            other => assert!(matches!(other, Err(IvshmemError::Io(_))), "{other:?}"),
        }
        // The client is gone after three of seven messages.
        let half = rig.connect();
        let given = rig.server.accept().unwrap().unwrap();
        for _ in 0..3 {
            let _ = message(&half);
        }
        drop((half, given));
        assert_eq!(rig.server.look().unwrap(), Alive::No);
        // The client sends data.
        let mut loud = rig.connect();
        let given = rig.server.accept().unwrap().unwrap();
        loud.write_all(&[0x5a; 100_000]).unwrap();
        assert!(matches!(rig.server.look(), Err(IvshmemError::Spoke)));
        assert!(rig.server.client().is_none());
        drop((loud, given));
    }
    let qemu = rig.connect();
    let _given = rig.server.accept().unwrap().unwrap();
    receive_setup(&qemu);
}

#[test]
fn a_size_that_is_not_a_bar_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for bytes in [0, 4096, 3 << 20, (1 << 20) + 4096, 2 << 30] {
        let listener = UnixListener::bind(dir.path().join(bytes.to_string())).unwrap();
        assert!(
            matches!(Server::new(listener, bytes), Err(IvshmemError::Size { bytes: b }) if b == bytes)
        );
    }
    for bytes in [64 << 10, 8 << 20, 1 << 30] {
        let listener = UnixListener::bind(dir.path().join(bytes.to_string())).unwrap();
        assert!(Server::new(listener, bytes).is_ok(), "{bytes} bytes");
    }
}
