//! A VMM hands a region over, in correct and in wrong ways.

mod common;

use std::os::fd::AsFd;
use std::time::Duration;

use adit_ringbuf::region::{Features, Spec};
use adit_ringbuf::session::{Event, Guest, Host};
use adit_ringbuf::{Mapped, MemfdError};
use adit_ringbuf_io::attach::{AttachError, Bells, Code, Listener, Socket};
use adit_ringbuf_io::doorbell::{Doorbell, Waiter};
use common::{hello_and_send, offer, packet, run_server_against, send};

#[test]
fn a_region_is_handed_over_and_both_sides_attach() {
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
    let (offered, told) = run_server_against(|socket| {
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
fn doorbells_that_are_not_eventfds_are_refused() {
    let (memory, fd) = Mapped::memfd(1 << 16).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let (offered, told) = run_server_against(|socket| {
        let fds = [
            fd.as_fd(),
            null.as_fd(),
            null.as_fd(),
            null.as_fd(),
            null.as_fd(),
        ];
        hello_and_send(&socket, &packet(2, &offer(1 << 16), 5), &fds)
    });
    assert!(matches!(
        offered,
        Err(AttachError::Doorbell { which: 0, .. })
    ));
    assert_eq!(told, Some(4));
    drop(memory);
}

/// Descriptors that have no file type either, but are not eventfds.
#[test]
fn descriptors_of_other_kinds_are_refused_as_doorbells() {
    use adit_ringbuf_io::doorbell::from_passed;
    use nix::sys::{epoll, signalfd, timerfd};
    let bell = adit_ringbuf_io::doorbell::event_fd().unwrap();
    let fd = bell.fd().unwrap().try_clone_to_owned().unwrap();
    from_passed(fd).unwrap().ring().unwrap();
    assert_eq!(bell.read().unwrap(), 1, "the check changes nothing");
    let epoll = epoll::Epoll::new(epoll::EpollCreateFlags::empty())
        .unwrap()
        .0;
    let clock = timerfd::ClockId::CLOCK_MONOTONIC;
    let timer = timerfd::TimerFd::new(clock, timerfd::TimerFlags::empty()).unwrap();
    let signals = signalfd::SignalFd::new(&signalfd::SigSet::empty()).unwrap();
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    let (socket, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    for fd in [
        epoll,
        timer.as_fd().try_clone_to_owned().unwrap(),
        signals.as_fd().try_clone_to_owned().unwrap(),
        pipe,
        socket.into(),
        file.into(),
    ] {
        let refused = from_passed(fd).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_vmm_that_dies_during_the_handshake_is_reported_as_gone() {
    let (offered, ()) = run_server_against(drop);
    assert!(matches!(offered, Err(AttachError::Gone)));
    let (offered, ()) = run_server_against(|socket| send(&socket, &packet(1, &"x", 0), &[]));
    assert!(matches!(
        offered,
        Err(AttachError::Gone | AttachError::Io(_))
    ));
}

#[test]
fn a_silent_vmm_times_out() {
    let (_near, far) = Socket::pair().unwrap();
    far.answer_within(Duration::from_millis(50)).unwrap();
    assert!(matches!(far.offered(), Err(AttachError::Io(_))));
}
