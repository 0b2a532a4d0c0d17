//! The real `adit-port` in its sandbox, with a ring beside its vsock: VMMs that offer a ring, well-behaved and not; which carrier
//! a dial uses; what happens to streams when the ring ends.

mod guest;
mod running;
mod vmm;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Hello};
use adit_channel::sink::Sink;
use adit_engine::{Op, PacketHeader};
use adit_port::control::{IVSHMEM_SOCKET, RING_PEER_PORT, RING_SOCKET, Target};
use adit_port::control_io::Message;
use adit_ringbuf::Mapped;
use adit_ringbuf_io::attach::{AttachError, Bells, Code, Offer, Socket};
use adit_ringbuf_io::doorbell::Doorbell;
use guest::Guest;
use running::Running;
use vmm::{BYTES, LONG, Vmm, echoed, offer, wait_dialed, wait_ring};

/// A session returns within a second, unless other tests use the processors.
const SOON: Duration = Duration::from_secs(5);

fn service() -> Target {
    Target::Service("tcp:80".parse().unwrap())
}

/// Waits until the guest is dialled for the service over vsock. Ignores the host's own measurement of round trips.
fn asked_for_service(guest: &mut Guest) {
    loop {
        let (far, theirs) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        guest.accept_at(|port| port == hello::PORT, Sink::Fd(theirs.into()));
        let mut said = Vec::new();
        let asked = guest.until(|_| {
            let mut buf = [0; 256];
            match { &far }.read(&mut buf) {
                Ok(0) => return Some(None),
                Ok(n) => said.extend_from_slice(&buf[..n]),
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
            hello::read(&mut said.as_slice()).ok().map(Some)
        });
        if matches!(&asked, Some(Hello::Open(open)) if Target::Service(open.service.clone()) == service())
        {
            return;
        }
    }
}

#[test]
fn a_service_uses_the_ring_while_it_runs_and_vsock_before_and_after() {
    let mut running = Running::start();
    let aditd = running.connect();
    let none = wait_ring(&aditd, |_| true);
    assert_eq!((none.running, none.memory.as_str()), (false, ""));
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let ring = wait_ring(&aditd, |ring| !ring.memory.is_empty());
    assert_eq!(
        (ring.memory.as_str(), ring.bytes, ring.running),
        ("memfd by attach socket", BYTES as u64, false)
    );
    assert!(ring.line_ns < 1000, "{} ns a line", ring.line_ns);
    // The guest has vsock too, but its agent does not answer there.
    let mut guest = running.boot(&[hello::PORT, 22]);
    aditd.wait_status(|s| s.session);
    let agent = vmm.boot();
    agent.serve();
    wait_ring(&aditd, |ring| ring.running);
    aditd.dial(1, service());
    assert!(
        matches!(wait_dialed(&aditd), Message::Dialed(d) if d.id == 1 && d.boot_nonce == [7; 16])
    );
    let tunnel = aditd.attach(1, b"");
    echoed(&tunnel, &[3; 100_000]);
    // A plain vsock port is reached over vsock, with or without a ring.
    aditd.dial(2, Target::VsockPort(22));
    let (far, theirs) = UnixStream::pair().unwrap();
    guest.accept_at(|port| port == 22, Sink::Fd(theirs.into()));
    // A frame about the ring may come first.
    let dialed = |(message, _): &(Message, _)| matches!(message, Message::Dialed(d) if d.id == 2);
    guest.until(|_| aditd.heard().filter(dialed));
    drop(far);
    // The VMM ends, and with it the ring: the ring's stream ends, and the next dial uses the guest's vsock.
    drop(vmm.talk);
    let gone = wait_ring(&aditd, |ring| !ring.running);
    assert!(gone.why.contains("the ring was removed"), "{}", gone.why);
    let ended = (&tunnel).read(&mut [0; 8]);
    assert!(
        matches!(&ended, Ok(0)) || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
    );
    aditd.dial(3, service());
    asked_for_service(&mut guest);
}

/// The latency that is shown must be that of clients' dials. Their lane may be full of other bytes, while lane control is not.
#[test]
fn round_trips_are_measured_on_the_lane_of_dials() {
    let mut running = Running::start();
    let aditd = running.connect();
    let _guest = running.boot(&[hello::PORT]);
    aditd.wait_status(|s| s.session);
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let memory = vmm.memory.clone();
    let attach = std::thread::spawn(move || adit_bare::ring::attach(memory).unwrap());
    let begin = Instant::now();
    while !attach.is_finished() {
        vmm.bells.host_data.ring().unwrap();
        std::thread::yield_now();
        assert!(begin.elapsed() < LONG);
    }
    let (guest, _) = attach.join().unwrap();
    // The guest may have changed its word after the last of those doorbells, so send one more.
    vmm.bells.host_data.ring().unwrap();
    // The session starts a measurement, which nobody answers here. The second request is the dial's.
    wait_ring(&aditd, |ring| ring.running);
    aditd.dial(1, service());
    let mut lanes = [0, 1].map(|n| guest.ends(n, false).unwrap().unwrap());
    let (mut asked, mut record) = ([0, 0], [0; 4096]);
    while asked.iter().sum::<u32>() < 2 {
        for (lane, asked) in lanes.iter_mut().zip(&mut asked) {
            while lane.consumer.pop(&mut record).unwrap().is_some() {
                let header = PacketHeader::from_ring_bytes(record.first_chunk().unwrap());
                *asked += u32::from(header.op == Op::Request as u16);
            }
        }
        std::thread::yield_now();
        assert!(begin.elapsed() < LONG, "{asked:?}");
    }
    assert_eq!(asked, [0, 2], "on lane control, on lane bulk");
}

/// There is nothing to compare it with, so the measurement would never end, and begin again with every dial.
#[test]
fn a_ring_alone_is_not_measured() {
    let mut running = Running::start();
    let aditd = running.connect();
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let agent = vmm.boot();
    let listener = agent.handle.listen(hello::PORT).unwrap();
    wait_ring(&aditd, |ring| ring.running);
    for id in 1..=3 {
        aditd.dial(id, service());
        let stream = listener.accept().unwrap().accept().unwrap();
        let Ok(Hello::Open(open)) = hello::read(&mut &stream) else {
            panic!("a hello");
        };
        assert_eq!(Target::Service(open.service), service());
    }
}

#[test]
fn a_broken_ring_ends_its_streams_and_is_attached_again_soon() {
    use adit_ringbuf::RingMem;
    let mut running = Running::start();
    let aditd = running.connect();
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let agent = vmm.boot();
    agent.serve();
    wait_ring(&aditd, |ring| ring.running);
    aditd.dial(1, service());
    assert!(matches!(wait_dialed(&aditd), Message::Dialed(d) if d.id == 1));
    let tunnel = aditd.attach(1, b"");
    echoed(&tunnel, b"still whole");
    let begin = Instant::now();
    vmm.memory.store(2 * 4096, u64::MAX);
    vmm.bells.host_data.ring().unwrap();
    let held = wait_ring(&aditd, |ring| !ring.running);
    assert!(held.why.contains("guest's state"), "{}", held.why);
    let ended = (&tunnel).read(&mut [0; 8]);
    assert!(
        matches!(&ended, Ok(0)) || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
    );
    wait_ring(&aditd, |ring| ring.running);
    assert!(begin.elapsed() < SOON);
    aditd.dial(2, service());
    assert!(matches!(wait_dialed(&aditd), Message::Dialed(d) if d.id == 2));
}

#[test]
fn a_dial_uses_vsock_if_the_guest_does_not_serve_its_ring() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[hello::PORT]);
    aditd.wait_status(|s| s.session);
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let _agent = vmm.boot();
    wait_ring(&aditd, |ring| ring.running);
    aditd.dial(1, service());
    asked_for_service(&mut guest);
}

#[test]
fn what_the_guest_dials_over_its_ring_reaches_aditd() {
    let mut running = Running::start();
    let aditd = running.connect();
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let agent = vmm.boot();
    wait_ring(&aditd, |ring| ring.running);
    let target = adit_channel::stream::Target {
        port: hello::PORT,
        hello: None,
    };
    let mut stream = agent.handle.dialer().dial(&target, LONG).unwrap();
    let until = Instant::now() + LONG;
    let (incoming, fd) = loop {
        if let Some((Message::Incoming(incoming), fd)) = aditd.heard() {
            break (incoming, fd.unwrap());
        }
        assert!(Instant::now() < until, "aditd did not get the stream");
    };
    assert_eq!(
        (incoming.port, incoming.peer_port),
        (hello::PORT, RING_PEER_PORT)
    );
    UnixStream::from(fd).write_all(b"welcome").unwrap();
    let mut got = [0; 7];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"welcome");
}

// ---- hostile VMMs on the attach socket

/// Checks that the process still serves a well-behaved VMM.
fn serves(running: &mut Running) {
    let aditd = running.connect();
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let _agent = vmm.boot();
    wait_ring(&aditd, |ring| ring.running);
}

fn refused(running: &Running, memory: &OwnedFd, offer: &Offer) -> AttachError {
    let socket = Socket::connect(&running.dir.join(RING_SOCKET)).unwrap();
    let bells = Bells::new().unwrap();
    socket.offer(offer, 1, memory.as_fd(), &bells).unwrap_err()
}

fn code(e: &AttachError) -> Option<Code> {
    match e {
        AttachError::Refused { code, .. } => Some(*code),
        _ => None,
    }
}

#[test]
fn r13_unsealed_short_and_foreign_memory_is_refused_and_the_next_vmm_is_served() {
    let mut running = Running::start();
    running.connect();
    let loose = rustix::fs::memfd_create("loose", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&loose, BYTES as u64).unwrap();
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    rustix::fs::ftruncate(&file, BYTES as u64).unwrap();
    let (_, short) = Mapped::memfd(8192).unwrap();
    let (_, tiny) = Mapped::memfd(4096).unwrap();
    for (memory, bytes) in [
        (&loose, BYTES),
        (&file, BYTES),
        (&short, BYTES),
        (&tiny, 4096),
    ] {
        let e = refused(&running, memory, &offer("web-1", bytes));
        assert_eq!(code(&e), Some(Code::Memory), "{e}");
    }
    serves(&mut running);
}

#[test]
fn a_vmm_of_another_vm_is_refused() {
    let mut running = Running::start();
    running.connect();
    let (_, memory) = Mapped::memfd(BYTES).unwrap();
    let e = refused(&running, &memory, &offer("web-2", BYTES));
    assert_eq!(code(&e), Some(Code::UnknownVm), "{e}");
    serves(&mut running);
}

#[test]
fn a_second_vmm_is_refused_and_the_first_one_keeps_its_ring() {
    let mut running = Running::start();
    let aditd = running.connect();
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let agent = vmm.boot();
    agent.serve();
    wait_ring(&aditd, |ring| ring.running);
    let Err(e) = Vmm::attach(&running.dir) else {
        panic!("two VMMs have the ring")
    };
    assert_eq!(code(&e), Some(Code::Busy), "{e}");
    aditd.dial(1, service());
    assert!(matches!(wait_dialed(&aditd), Message::Dialed(d) if d.id == 1));
    drop(vmm.fd);
}

#[test]
fn vmms_that_send_nothing_or_nonsense_or_die_delay_the_next_one_only_briefly() {
    let mut running = Running::start();
    // Wait until the process has opened everything that it opens for any client.
    running.connect().wait_status(|_| true);
    let path = running.dir.join(RING_SOCKET);
    // A VMM that sends nothing and stays.
    let _mute = Socket::connect(&path).unwrap();
    // VMMs that end before they send anything, that send bytes which are no message, and that send too many descriptors.
    drop(Socket::connect(&path).unwrap());
    for (bytes, fds) in [
        (&b"GET / HTTP/1.1"[..], 0),
        (&[0; 5000][..], 0),
        (&[0; 64][..], 100),
    ] {
        let socket = Socket::connect(&path).unwrap();
        let file = tempfile::tempfile().unwrap();
        let fds: Vec<_> = (0..fds).map(|_| file.as_fd()).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); 8192];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        }
        let parts = [std::io::IoSlice::new(bytes)];
        let flags = rustix::net::SendFlags::NOSIGNAL;
        rustix::net::sendmsg(&socket, &parts, &mut control, flags).unwrap();
    }
    let before = running.descriptors().len();
    let begin = Instant::now();
    serves(&mut running);
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    running.shrinks_to([before + 40, usize::MAX]);
}

/// VMMs connect and leave in every way: afterwards the process has as many descriptors and mappings as before.
#[test]
fn r12_vmms_that_come_and_go_leave_nothing_behind() {
    let mut running = Running::start();
    let aditd = running.connect();
    let round = |boot: bool| {
        let vmm = Vmm::attach(&running.dir).expect("taken");
        wait_ring(&aditd, |ring| !ring.memory.is_empty());
        if boot {
            let _agent = vmm.boot();
            wait_ring(&aditd, |ring| ring.running);
        }
        drop(vmm);
        wait_ring(&aditd, |ring| ring.memory.is_empty());
    };
    (0..10).for_each(|n| round(n % 2 == 0));
    let before = running.counts();
    (0..100).for_each(|n| round(n % 2 == 0));
    running.shrinks_to(before);
}

#[test]
fn an_ivshmem_client_gets_a_ring_of_its_own() {
    let mut running = Running::start();
    let aditd = running.connect();
    let client = UnixStream::connect(running.dir.join(IVSHMEM_SOCKET)).unwrap();
    let ring = wait_ring(&aditd, |ring| !ring.memory.is_empty());
    assert_eq!(ring.memory, "memfd by ivshmem");
    drop(client);
    wait_ring(&aditd, |ring| ring.memory.is_empty());
    serves(&mut running);
}
