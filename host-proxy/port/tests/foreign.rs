//! R105 and R109 against the real `adit-port`: descriptors that are neither doorbells nor memory, over every socket that a VMM
//! can use; and descriptors that arrive while the process has none free.

mod fuse;
mod guest;
mod kinds;
mod running;
mod vmm;

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_port::control::{Attach, DialFailed, IVSHMEM_SOCKET, RING_SOCKET, Target, VHOST_SOCKET};
use adit_port::control_io::{Message, receive};
use adit_ringbuf::Mapped;
use adit_ringbuf_io::attach::{AttachError, Bells, Code, Socket};
use adit_ringbuf_io::doorbell::Waiter;
use kinds::Foreign;
use running::{Aditd, Running};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm::{BYTES, LONG, Vmm, message, offer, wait_ring};

const SET_MEM_TABLE: u32 = 5;
const KICK: u32 = 12;
const CALL: u32 = 13;
const ERR: u32 = 14;

/// Not a test by itself: the server of the file system, which runs in a process of its own.
#[test]
fn server() {
    fuse::serve();
}

fn pass(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = vec![MaybeUninit::uninit(); 1024];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
}

/// A message of vhost-user, version 1.
fn vhost(request: u32, body: &[u8]) -> Vec<u8> {
    let head = [request, 1, body.len() as u32];
    let head = head.iter().flat_map(|word| word.to_ne_bytes());
    head.chain(body.iter().copied()).collect()
}

/// A message that carries so many descriptors.
fn bringing(request: u32, regions: u32) -> Vec<u8> {
    if request != SET_MEM_TABLE {
        return vhost(request, &0u64.to_ne_bytes());
    }
    let mut body = [regions.to_ne_bytes(), [0; 4]].concat();
    for n in 0..u64::from(regions) {
        for word in [n << 20, 1 << 20, (7 << 40) + (n << 20), 0] {
            body.extend(word.to_ne_bytes());
        }
    }
    vhost(request, &body)
}

/// Checks that the loop answers while closes are waiting.
fn answers(aditd: &Aditd, id: &mut u64) {
    *id += 1;
    aditd.dial(*id, Target::VsockPort(9));
    loop {
        match receive(&aditd.0).unwrap().expect("connection").0 {
            Message::DialFailed(DialFailed { id: of, .. }) if of == *id => return,
            Message::Dialed(_) => panic!("nobody listens"),
            _ => {}
        }
    }
}

/// Descriptors of every kind, with a file whose server answers nothing if the machine allows one.
fn foreign(mute: Option<&fuse::Mute>) -> (Vec<Foreign>, kinds::Far) {
    let (mut all, far) = kinds::all();
    all.extend(mute.map(|mute| Foreign {
        name: "a file whose server is silent",
        fd: mute.open().into(),
    }));
    (all, far)
}

#[test]
fn r105_only_eventfds_are_doorbells_and_only_sealed_memory_is_guest_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start();
    let aditd = running.connect();
    // Dropped before the process, which cannot end while one of its closes waits for the server.
    let mute = fuse::Mute::mount(dir.path(), "server");
    let mut dials = 0;
    let mut fars = Vec::new();
    for (request, said) in [
        (KICK, "kick descriptor: not an eventfd"),
        (CALL, "call descriptor: not an eventfd"),
        (ERR, "error descriptor: not an eventfd"),
        (SET_MEM_TABLE, "not a memfd sealed against shrinking"),
    ] {
        let (all, far) = foreign(mute.as_ref());
        fars.push(far);
        for (n, kind) in all.into_iter().enumerate() {
            let name = kind.name;
            let mut frontend = UnixStream::connect(running.dir.join(VHOST_SOCKET)).unwrap();
            frontend.set_read_timeout(Some(LONG)).unwrap();
            kinds::stopped(running.child.id(), || {
                pass(&frontend, &bringing(request, 1), &[kind.fd.as_fd()]);
                kind.close();
            });
            let end = frontend.read(&mut [0]).map_err(|e| e.kind());
            assert!(
                matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)),
                "{said}, {name}: {end:?}"
            );
            if n == 0 {
                aditd.wait_status(|s| s.last_fault.contains(said));
            }
            answers(&aditd, &mut dials);
        }
    }
    // A message without descriptors of its own, with some attached.
    let (lingers, far) = kinds::lingering();
    fars.push(far);
    let mut frontend = UnixStream::connect(running.dir.join(VHOST_SOCKET)).unwrap();
    frontend.set_read_timeout(Some(LONG)).unwrap();
    kinds::stopped(running.child.id(), || {
        pass(&frontend, &vhost(1, &[]), &[lingers.as_fd()]);
        drop(lingers);
    });
    frontend.read_exact(&mut [0; 20]).unwrap();
    answers(&aditd, &mut dials);
    drop(frontend);
    // The next VMM is served while all those closes still wait.
    let _guest = running.boot(&[]);
    aditd.wait_status(|s| s.session && s.last_fault.is_empty());
    drop(mute);
    drop(fars);
}

#[test]
fn r105_a_ring_accepts_only_doorbells_and_sealed_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start();
    let aditd = running.connect();
    // Dropped before the process, which cannot end while one of its closes waits for the server.
    let mute = fuse::Mute::mount(dir.path(), "server");
    let mut dials = 0;
    let (_, memory) = Mapped::memfd(BYTES).unwrap();
    let bells = Bells::new().unwrap();
    let bell = bells.host_data.fd().unwrap().try_clone_to_owned().unwrap();
    let mut fars = Vec::new();
    for at in [0, 1, 4] {
        let (all, far) = foreign(mute.as_ref());
        fars.push(far);
        for kind in all {
            let name = kind.name;
            let socket = Socket::connect(&running.dir.join(RING_SOCKET)).unwrap();
            socket.answer_within(LONG).unwrap();
            pass(
                &socket,
                &attach(1, &postcard::to_allocvec("a VMM").unwrap(), 0),
                &[],
            );
            let body = postcard::to_allocvec(&offer("web-1", BYTES)).unwrap();
            kinds::stopped(running.child.id(), || {
                let mut fds = [&memory, &bell, &bell, &bell, &bell].map(OwnedFd::as_fd);
                fds[at] = kind.fd.as_fd();
                pass(&socket, &attach(2, &body, 5), &fds);
                kind.close();
            });
            let refused = loop {
                match socket.wait() {
                    // The process's hello.
                    AttachError::Malformed(_) => {}
                    refused => break refused,
                }
            };
            let AttachError::Refused { code, .. } = refused else {
                panic!("{at}, {name}: {refused:?}")
            };
            assert_eq!(code, Code::Memory, "{at}, {name}");
            answers(&aditd, &mut dials);
        }
    }
    // A client of the ivshmem socket never sends anything. If it does, with or without descriptors, the connection ends.
    let client = UnixStream::connect(running.dir.join(IVSHMEM_SOCKET)).unwrap();
    (0..7).for_each(|_| drop(message(&client)));
    wait_ring(&aditd, |ring| !ring.memory.is_empty());
    let (lingers, far) = kinds::lingering();
    fars.push(far);
    kinds::stopped(running.child.id(), || {
        pass(&client, &[0; 8], &[lingers.as_fd()]);
        drop(lingers);
    });
    wait_ring(&aditd, |ring| ring.memory.is_empty());
    answers(&aditd, &mut dials);
    // Well-behaved VMMs are served on both sockets.
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let agent = vmm.boot();
    wait_ring(&aditd, |ring| ring.running);
    drop((agent, vmm));
    wait_ring(&aditd, |ring| ring.memory.is_empty());
    let vmm = Vmm::ivshmem(&running.dir, BYTES);
    wait_ring(&aditd, |ring| !ring.memory.is_empty());
    let _agent = vmm.boot();
    wait_ring(&aditd, |ring| ring.running);
    drop(mute);
    drop(fars);
}

/// A message of the attach socket.
fn attach(what: u16, body: &[u8], fds: u16) -> Vec<u8> {
    let mut packet = b"ADITATT1\x01\0".to_vec();
    packet.extend(what.to_le_bytes());
    packet.extend(fds.to_le_bytes());
    packet.extend([0; 18]);
    packet.extend(body);
    packet
}

/// Waits until the process has at most so many descriptors.
#[track_caller]
fn returns_to(running: &Running, before: usize) {
    let end = Instant::now() + LONG;
    while running.descriptors().len() > before {
        assert!(Instant::now() < end, "{:#?}", running.descriptors());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn r109_descriptors_of_a_vmm_wait_while_none_is_free() {
    let mut running = Running::start();
    running.connect().wait_status(|_| true);
    let mut frontend = UnixStream::connect(running.dir.join(VHOST_SOCKET)).unwrap();
    frontend.set_read_timeout(Some(LONG)).unwrap();
    pass(&frontend, &vhost(1, &[]), &[]);
    frontend.read_exact(&mut [0; 20]).unwrap();
    let (pid, before) = (running.child.id(), running.descriptors().len());
    // Seven regions, but only three free descriptors.
    kinds::limit(pid, Some(3));
    let memory: Vec<_> = (0..7).map(|_| Mapped::memfd(1 << 20).unwrap().1).collect();
    let fds: Vec<_> = memory.iter().map(AsFd::as_fd).collect();
    pass(&frontend, &bringing(SET_MEM_TABLE, 7), &fds);
    pass(&frontend, &vhost(1, &[]), &[]);
    for _ in 0..3 {
        returns_to(&running, before);
    }
    kinds::limit(pid, None);
    // The message is handled now, and so is the one behind it.
    frontend.read_exact(&mut [0; 20]).unwrap();
    drop(frontend);
    returns_to(&running, before);
}

#[test]
fn r109_a_ring_for_which_no_descriptor_is_free_is_refused() {
    let mut running = Running::start();
    let aditd = running.connect();
    aditd.wait_status(|_| true);
    let socket = Socket::connect(&running.dir.join(RING_SOCKET)).unwrap();
    socket.answer_within(LONG).unwrap();
    pass(
        &socket,
        &attach(1, &postcard::to_allocvec("a VMM").unwrap(), 0),
        &[],
    );
    // The process's hello: the connection was accepted.
    assert!(matches!(socket.wait(), AttachError::Malformed(_)));
    let (pid, before) = (running.child.id(), running.descriptors().len());
    kinds::limit(pid, Some(2));
    let (_, memory) = Mapped::memfd(BYTES).unwrap();
    let body = postcard::to_allocvec(&offer("web-1", BYTES)).unwrap();
    pass(&socket, &attach(2, &body, 5), &[memory.as_fd(); 5]);
    let refused = socket.wait();
    let AttachError::Refused { code, text } = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(code, Code::Busy, "{text}");
    returns_to(&running, before - 1);
    kinds::limit(pid, None);
    let vmm = Vmm::attach(&running.dir).expect("taken");
    let _agent = vmm.boot();
    wait_ring(&aditd, |ring| ring.running);
}

#[test]
fn r109_a_tunnel_for_which_no_descriptor_is_free_does_not_end_the_connection() {
    let mut running = Running::start();
    let aditd = running.connect();
    aditd.wait_status(|_| true);
    let (pid, before) = (running.child.id(), running.descriptors().len());
    let mut dials = 100;
    for _ in 0..3 {
        kinds::limit(pid, Some(0));
        let (_near, far) = UnixStream::pair().unwrap();
        let (id, prefix) = (1, vec![]);
        aditd.say(Message::Attach(Attach { id, prefix }), Some(&far));
        answers(&aditd, &mut dials);
        returns_to(&running, before);
    }
    kinds::limit(pid, None);
    let _guest = running.boot(&[]);
    aditd.wait_status(|s| s.session);
}
