//! A VMM hands a region over, well and badly.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use adit_ringbuf::region::{Features, Spec};
use adit_ringbuf::session::{Event, Guest, Host};
use adit_ringbuf::{Mapped, MemfdError};
use adit_ringbuf_io::attach::{AttachError, Bells, Code, Listener, Offer, Offered, Socket};
use adit_ringbuf_io::doorbell::Doorbell;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

fn offer(bytes: usize) -> Offer {
    Offer {
        vm: "web-1".into(),
        bytes: bytes as u64,
        lanes: 2,
    }
}

/// What the server says to a VMM that does as `vmm` does; the VMM's answer beside it.
fn meet<T: Send>(vmm: impl FnOnce(Socket) -> T + Send) -> (Result<Offered, AttachError>, T) {
    let (near, far) = Socket::pair().unwrap();
    near.answer_within(Duration::from_secs(10)).unwrap();
    far.answer_within(Duration::from_secs(10)).unwrap();
    std::thread::scope(|scope| {
        let vmm = scope.spawn(|| vmm(near));
        let offered = far.offered();
        (offered, vmm.join().unwrap())
    })
}

#[test]
fn a_region_changes_hands_and_both_sides_attach() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("attach.sock");
    let listener = Listener::bind(&path).unwrap();
    let spec = Spec::uniform(2, 64 << 10);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (memory, fd) = Mapped::memfd(spec.bytes()).unwrap();
            let bells = Bells::new().unwrap();
            let socket = Socket::connect(&path).unwrap();
            let epoch = socket
                .offer(&offer(spec.bytes()), 7, fd.as_fd(), &bells)
                .unwrap();
            assert_eq!(epoch, 41);
            let mut guest = Guest::find(memory, 5, Features::NONE).unwrap();
            let _ = guest.attach();
            bells.host_data.ring().unwrap();
            while guest.poll().unwrap().event.is_none() {
                std::thread::yield_now();
            }
            bells.host_data.ring().unwrap();
            let mut ends = guest.ends(1, true).unwrap().unwrap();
            let _ = ends.producer.try_push(b"from the guest").unwrap();
            assert!(matches!(socket.wait(), AttachError::Detached(why) if why == "enough"));
        });
        let offered = listener.accept().unwrap().offered().unwrap();
        assert_eq!((offered.offer.vm.as_str(), offered.epoch), ("web-1", 7));
        let lanes = usize::from(offered.offer.lanes);
        assert_eq!(lanes, 2);
        let mut host = Host::offer(offered.memory.clone(), spec, 41).unwrap();
        let (socket, _, _) = offered.accept(41).unwrap();
        while !matches!(host.poll().event, Some(Event::Attached { epoch: 42, .. })) {
            std::thread::yield_now();
        }
        let mut ends = host.ends(1, true).unwrap();
        let mut buf = [0; 64];
        loop {
            if let Some(len) = ends.consumer.pop(&mut buf).unwrap() {
                assert_eq!(&buf[..len], b"from the guest");
                break;
            }
        }
        socket.detach("enough").unwrap();
    });
}

fn refused_for_memory(fd: impl AsFd + Send + Sync, bytes: usize) -> AttachError {
    let (offered, told) = meet(|socket| {
        let bells = Bells::new().unwrap();
        socket.offer(&offer(bytes), 1, fd.as_fd(), &bells)
    });
    let memory = Code::Memory;
    assert!(matches!(told, Err(AttachError::Refused { code, .. }) if code == memory));
    offered.unwrap_err()
}

#[test]
fn r13_memory_that_could_shrink_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create_new(dir.path().join("file")).unwrap();
    file.set_len(1 << 20).unwrap();
    let not_sealed = |e| matches!(e, AttachError::Memory(MemfdError::NotSealed));
    assert!(not_sealed(refused_for_memory(&file, 1 << 20)));
    let memfd = rustix::fs::memfd_create("loose", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memfd, 1 << 20).unwrap();
    assert!(not_sealed(refused_for_memory(&memfd, 1 << 20)));
    let (_, fd) = Mapped::memfd(4096).unwrap();
    let short = refused_for_memory(&fd, 1 << 20);
    assert!(matches!(
        short,
        AttachError::Memory(MemfdError::Short { .. })
    ));
}

#[test]
fn doorbells_that_are_none_are_refused() {
    let (memory, fd) = Mapped::memfd(1 << 16).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let (offered, told) = meet(|socket| {
        let fds = [
            fd.as_fd(),
            null.as_fd(),
            null.as_fd(),
            null.as_fd(),
            null.as_fd(),
        ];
        converse(&socket, &packet(2, &offer(1 << 16), 5), &fds)
    });
    assert!(matches!(
        offered,
        Err(AttachError::Doorbell { which: 0, .. })
    ));
    assert_eq!(told, Some(4));
    drop(memory);
}

/// A packet by hand.
fn packet(what: u16, body: &impl serde::Serialize, fds: u16) -> Vec<u8> {
    let mut packet = vec![0; 32];
    packet[..8].copy_from_slice(b"ADITATT1");
    packet[8] = 1;
    packet[10..12].copy_from_slice(&what.to_le_bytes());
    packet[12..14].copy_from_slice(&fds.to_le_bytes());
    packet.extend(postcard::to_allocvec(body).unwrap());
    packet
}

fn send(socket: &Socket, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
}

/// What the other side says next, by its number.
fn heard(socket: &Socket) -> Option<u16> {
    let mut buf = [0; 4096];
    let (n, _) = rustix::net::recv(socket, &mut buf[..], rustix::net::RecvFlags::empty()).ok()?;
    (n >= 32).then(|| u16::from_le_bytes([buf[10], buf[11]]))
}

/// Greets, sends that, and returns the answer.
fn converse(socket: &Socket, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Option<u16> {
    send(socket, &packet(1, &"by hand", 0), &[]);
    assert_eq!(heard(socket), Some(1));
    send(socket, bytes, fds);
    heard(socket)
}

#[test]
fn every_packet_that_does_not_belong_is_refused_and_leaks_nothing() {
    let (_, fd) = Mapped::memfd(1 << 16).unwrap();
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let good = packet(2, &offer(1 << 16), 5);
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let name = |vm: &str, lanes: u8, bytes: u64| {
        let vm = vm.to_owned();
        packet(2, &Offer { vm, bytes, lanes }, 5)
    };
    let long = [&good[..], &[0; 4096]].concat();
    let cases: Vec<(&str, Vec<u8>, usize)> = vec![
        ("magic", changed(0, 0), 5),
        ("version", changed(8, 2), 5),
        ("what", changed(10, 9), 5),
        ("accept", packet(3, &(), 0), 0),
        ("hello again", packet(1, &"x", 0), 0),
        ("number of descriptors", changed(12, 4), 5),
        ("reserved", changed(14, 1), 5),
        ("reserved", changed(31, 1), 5),
        ("too few", packet(2, &offer(1 << 16), 4), 4),
        ("too many", packet(2, &offer(1 << 16), 9), 9),
        ("none", packet(2, &offer(1 << 16), 0), 0),
        ("behind its end", [&good[..], &[0]].concat(), 5),
        ("cut", good[..33].to_vec(), 5),
        ("shorter than its head", good[..31].to_vec(), 5),
        ("too long", long, 5),
        ("no name", name("", 1, 4096), 5),
        ("name", name("Web 1", 1, 4096), 5),
        ("name", name(&"a".repeat(65), 1, 4096), 5),
        ("lanes", name("a", 0, 4096), 5),
        ("lanes", name("a", 5, 4096), 5),
        ("bytes", name("a", 1, u64::MAX), 5),
    ];
    let before = fds();
    for (what, bytes, count) in cases {
        let (offered, answer) = meet(|socket| converse(&socket, &bytes, &vec![fd.as_fd(); count]));
        assert!(offered.is_err(), "{what}");
        assert_eq!(answer, Some(4), "{what}: {offered:?}");
        let version = matches!(offered, Err(AttachError::Version { found: 2 }));
        assert_eq!(version, what == "version");
        drop(offered);
    }
    assert!(fds() <= before + 4, "other tests run beside this one");
}

#[test]
fn a_vmm_that_dies_in_the_middle_is_gone() {
    let (offered, ()) = meet(drop);
    assert!(matches!(offered, Err(AttachError::Gone)));
    let (offered, ()) = meet(|socket| send(&socket, &packet(1, &"x", 0), &[]));
    assert!(matches!(
        offered,
        Err(AttachError::Gone | AttachError::Io(_))
    ));
}

#[test]
fn one_that_says_nothing_is_not_waited_for() {
    let (_near, far) = Socket::pair().unwrap();
    far.answer_within(Duration::from_millis(50)).unwrap();
    assert!(matches!(far.offered(), Err(AttachError::Io(_))));
}

#[test]
fn ten_thousand_attachments_come_and_go() {
    let spec = Spec::uniform(1, 4096);
    let counts = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (fds, maps.matches("adit-ring").count())
    };
    let (memory, fd) = Mapped::memfd(spec.bytes()).unwrap();
    let bells = Bells::new().unwrap();
    let fd: OwnedFd = fd;
    let before = counts();
    for n in 0..10_000 {
        let (near, far) = Socket::pair().unwrap();
        // Both in one thread: the socket holds what one says until the other listens.
        send(&near, &packet(1, &"x", 0), &[]);
        let all = [
            &bells.guest_data,
            &bells.guest_space,
            &bells.host_data,
            &bells.host_space,
        ];
        let raw = all.map(|bell| bell.try_clone().unwrap());
        let lent: Vec<_> = raw
            .iter()
            .filter_map(adit_ringbuf_io::doorbell::Waiter::fd)
            .collect();
        let fds: Vec<_> = std::iter::once(fd.as_fd()).chain(lent).collect();
        send(&near, &packet(2, &offer(spec.bytes()), 5), &fds);
        let offered = far.offered().unwrap();
        let mut host = Host::offer(offered.memory.clone(), spec, n).unwrap();
        let (socket, ..) = offered.accept(n).unwrap();
        let mut guest = Guest::find(memory.clone(), n << 16, Features::NONE).unwrap();
        let _ = guest.attach();
        let _ = host.poll();
        let _ = guest.poll().unwrap();
        assert!(matches!(host.poll().event, Some(Event::Attached { .. })));
        socket.detach("next").unwrap();
    }
    let after = counts();
    assert_eq!(after.1, before.1);
    assert!(after.0 <= before.0 + 8, "other tests run beside this one");
}
