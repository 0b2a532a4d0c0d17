//! No descriptor and no mapping is left over at the end. The tests count those of the whole process, so they are in a
//! file of their own.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use adit_ringbuf::Mapped;
use adit_ringbuf::region::{Features, Spec};
use adit_ringbuf::session::{Event, Guest, Host};
use adit_ringbuf_io::attach::{AttachError, Bells, Offer, Socket};
use adit_ringbuf_io::ivshmem::{Alive, Server};
use common::{hello_and_send, offer, packet, run_server_against, send};

fn counts() -> (usize, usize) {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (fds, maps.matches("adit-ring").count())
}

/// Waits for the counts, because passed descriptors are closed on another thread.
#[track_caller]
fn returns_to(before: (usize, usize)) {
    let end = Instant::now() + Duration::from_secs(30);
    while counts() != before {
        assert!(Instant::now() < end, "{:?}, {before:?} before", counts());
        std::thread::yield_now();
    }
}

#[test]
fn valid_and_invalid_attachments_leak_nothing() {
    let before = counts();
    every_malformed_packet_is_refused();
    returns_to(before);
    ten_thousand_attachments_leak_nothing();
    returns_to(before);
    a_thousand_ivshmem_clients_leak_nothing();
    returns_to(before);
}

fn a_thousand_ivshmem_clients_leak_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ivshmem.sock");
    let mut server = Server::new(UnixListener::bind(&path).unwrap(), 64 << 10).unwrap();
    for _ in 0..1000 {
        let client = UnixStream::connect(&path).unwrap();
        let given = server.accept().unwrap().unwrap();
        let second = UnixStream::connect(&path).unwrap();
        assert!(server.accept().is_err());
        drop((client, second, given));
        assert_eq!(server.look().unwrap(), Alive::No);
    }
}

fn every_malformed_packet_is_refused() {
    let (_, fd) = Mapped::memfd(1 << 16).unwrap();
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
        ("after the end of the body", [&good[..], &[0]].concat(), 5),
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
    for (what, bytes, count) in cases {
        let (offered, answer) =
            run_server_against(|socket| hello_and_send(&socket, &bytes, &vec![fd.as_fd(); count]));
        assert!(offered.is_err(), "{what}");
        assert_eq!(answer, Some(4), "{what}: {offered:?}");
        let version = matches!(offered, Err(AttachError::Version { found: 2 }));
        assert_eq!(version, what == "version");
        drop(offered);
    }
}

fn ten_thousand_attachments_leak_nothing() {
    let spec = Spec::uniform(1, 4096);
    let (memory, fd) = Mapped::memfd(spec.bytes()).unwrap();
    let bells = Bells::new().unwrap();
    let fd: OwnedFd = fd;
    for n in 0..10_000 {
        let (near, far) = Socket::pair().unwrap();
        // One thread plays both sides, because the socket buffers the messages of one side until the other reads.
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
}
