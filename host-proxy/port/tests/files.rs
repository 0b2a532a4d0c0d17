//! Bad memory and doorbells that a VMM sends to the real `adit-port`: files of a file system that never answers, memory whose
//! pages may run out, memory that cannot be written, descriptors in another order.

mod fuse;
mod guest;
mod running;
mod vmm;

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use adit_port::control::RING_SOCKET;
use adit_ringbuf::Mapped;
use adit_ringbuf_io::attach::{AttachError, Bells, Code, Offer, Socket};
use adit_ringbuf_io::doorbell::Waiter;
use adit_ringbuf_io::passed::PENDING_MAX;
use running::Running;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm::{BYTES, LONG, Vmm, offer, wait_ring};

/// Longer than an answer takes when it does not wait for a file system.
const SOON: Duration = Duration::from_secs(5);

fn connect(running: &Running) -> Socket {
    let socket = Socket::connect(&running.dir.join(RING_SOCKET)).unwrap();
    socket.answer_within(LONG).unwrap();
    socket
}

/// Sends an offer with five descriptors of any kind. Returns why it was refused.
fn offered(running: &Running, offer: &Offer, fds: [&OwnedFd; 5]) -> AttachError {
    let socket = connect(running);
    // Messages of the attach socket, each with its head: the VMM's hello, then the offer.
    for (what, body, fds) in [
        (1u16, postcard::to_allocvec("a VMM").unwrap(), &[][..]),
        (2, postcard::to_allocvec(offer).unwrap(), &fds[..]),
    ] {
        let mut packet = b"ADITATT1\x01\0".to_vec();
        packet.extend(what.to_le_bytes());
        packet.extend((fds.len() as u16).to_le_bytes());
        packet.extend([0; 18]);
        packet.extend(body);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); 256];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [std::io::IoSlice::new(&packet)];
        // Fails if the process has refused already.
        let _ = sendmsg(&socket, &parts, &mut control, SendFlags::NOSIGNAL);
    }
    loop {
        match socket.wait() {
            // The process's hello. After it comes the refusal, or the end of the socket.
            AttachError::Malformed(_) => {}
            AttachError::Io(e) if e.kind() == ErrorKind::ConnectionReset => {}
            refused => return refused,
        }
    }
}

fn code(e: &AttachError) -> Option<Code> {
    match e {
        AttachError::Refused { code, .. } => Some(*code),
        _ => None,
    }
}

fn text(e: &AttachError) -> &str {
    match e {
        AttachError::Refused { text, .. } => text,
        _ => "",
    }
}

/// Checks that the process still serves a well-behaved VMM.
fn serves(running: &mut Running) {
    let aditd = running.connect();
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let _agent = vmm.boot();
    wait_ring(&aditd, |ring| ring.running);
}

fn bell(bells: &Bells) -> OwnedFd {
    bells.host_data.fd().unwrap().try_clone_to_owned().unwrap()
}

/// Not a test by itself: the server of the file system, which runs in a process of its own.
#[test]
fn server() {
    fuse::serve();
}

/// Memory, a doorbell and extra descriptors from a file system whose server answers nothing, not even a close.
#[test]
fn files_of_a_file_system_that_never_answers_delay_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start();
    let aditd = running.connect();
    // Declared first, so that the server ends before these are closed.
    let (file, bells, memory);
    let Some(mute) = fuse::Mute::mount(dir.path(), "server") else {
        return;
    };
    file = OwnedFd::from(mute.open());
    bells = Bells::new().unwrap();
    memory = Mapped::memfd(BYTES).unwrap().1;
    let good = bell(&bells);
    // Wait until the process has opened everything that it opens for any client.
    aditd.wait_status(|_| true);
    let before = running.descriptors().len();
    let offer = offer("web-1", BYTES);
    for round in 0..4 {
        for fds in [
            [&file, &good, &good, &good, &good],
            [&memory, &file, &good, &good, &good],
            [&memory, &good, &good, &good, &file],
            [&file, &file, &file, &file, &file],
        ] {
            let begin = Instant::now();
            let refused = offered(&running, &offer, fds);
            assert_eq!(code(&refused), Some(Code::Memory), "{refused:?}");
            assert!(
                begin.elapsed() < SOON,
                "round {round}: {:?}",
                begin.elapsed()
            );
        }
    }
    let begin = Instant::now();
    serves(&mut running);
    assert!(
        begin.elapsed() < SOON,
        "the next VMM: {:?}",
        begin.elapsed()
    );
    // Some closes may wait. When there are too many of them, a VMM that brings more is refused.
    let refused = loop {
        let refused = offered(&running, &offer, [&file; 5]);
        if code(&refused) != Some(Code::Memory) {
            break refused;
        }
        assert!(running.descriptors().len() < before + PENDING_MAX + 20);
    };
    assert_eq!(code(&refused), Some(Code::Busy), "{refused:?}");
    drop(aditd);
    // The server ends, and with it all waiting closes.
    drop(mute);
    running.shrinks_to([before + 2, usize::MAX]);
    serves(&mut running);
    drop((file, bells, memory));
}

#[test]
fn r13_memory_without_write_permission_is_refused_and_huge_pages_are_accepted() {
    let mut running = Running::start();
    let aditd = running.connect();
    let refused = |memory: &OwnedFd, seals| {
        fcntl_add_seals(memory, seals).unwrap();
        let bells = Bells::new().unwrap();
        let offered = connect(&running).offer(&offer("web-1", BYTES), 1, memory.as_fd(), &bells);
        let refused = offered.expect_err("no memory for a ring");
        assert_eq!(code(&refused), Some(Code::Memory), "{refused:?}");
        refused
    };
    let fixed = SealFlags::SHRINK | SealFlags::GROW;
    let plain = memfd_create("plain", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&plain, BYTES as u64).unwrap();
    refused(&plain, fixed | SealFlags::WRITE);
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    match memfd_create("huge", flags) {
        Ok(huge) => {
            ftruncate(&huge, BYTES as u64).unwrap();
            fcntl_add_seals(&huge, fixed).unwrap();
            let bells = Bells::new().unwrap();
            // The length of a region must be a multiple of the page size.
            let part = offer("web-1", BYTES - 4096);
            let refused = connect(&running).offer(&part, 1, huge.as_fd(), &bells);
            let refused = refused.expect_err("a part of a page");
            assert_eq!(code(&refused), Some(Code::Memory), "{refused:?}");
            assert!(text(&refused).contains("huge pages"), "{refused:?}");
            let socket = connect(&running);
            match socket.offer(&offer("web-1", BYTES), 1, huge.as_fd(), &bells) {
                Ok(_) => drop(wait_ring(&aditd, |ring| !ring.memory.is_empty())),
                // No huge page is free. The process must find that out before it touches the memory.
                Err(e) => {
                    println!("memory of huge pages: {e}");
                    assert_eq!(code(&e), Some(Code::Memory), "{e:?}");
                }
            };
        }
        Err(e) => println!("skipped: this machine has no huge pages: {e}"),
    }
    serves(&mut running);
}

#[test]
fn descriptors_are_used_by_their_order_and_survive_the_vmms_own_close() {
    let mut running = Running::start();
    let aditd = running.connect();
    let memory = Mapped::memfd(BYTES).unwrap().1;
    let bells = Bells::new().unwrap();
    let good = bell(&bells);
    let offer = offer("web-1", BYTES);
    for fds in [
        [&good, &memory, &good, &good, &good],
        [&good, &good, &good, &good, &memory],
        [&memory, &memory, &memory, &memory, &memory],
        [&good, &good, &good, &good, &good],
    ] {
        let refused = offered(&running, &offer, fds);
        assert_eq!(code(&refused), Some(Code::Memory), "{refused:?}");
    }
    // The VMM closes everything except the socket. The process must have its own copies.
    let (region, fd) = Mapped::memfd(BYTES).unwrap();
    let socket = connect(&running);
    let epoch = socket.offer(&offer, 1, fd.as_fd(), &bells).unwrap();
    drop((region, fd, bells, good));
    wait_ring(&aditd, |ring| !ring.memory.is_empty());
    assert!(epoch > 0);
    drop(socket);
    wait_ring(&aditd, |ring| ring.memory.is_empty());
    serves(&mut running);
}
