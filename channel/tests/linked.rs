//! A device on its own thread, with the host's side on Unix sockets: as a VMM links it, but without a VMM.

mod common;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_channel::device::{EVENT_QUEUE, FEATURES, VsockDevice};
use adit_channel::hybrid::Host;
use adit_channel::linked::{Remote, link};
use adit_channel::socket_path::connect_now;
use adit_engine::{Op, PacketHeader};
use adit_testkit::queue::{Buffer, DriverQueue};
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};
use common::{Signals, cid};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::{Bytes, GuestAddress};

const PATIENCE: Duration = Duration::from_secs(30);

struct Rig {
    remote: Remote<Arc<VmMemory>>,
    driver: Driver,
    event: DriverQueue,
    kicks: [EventFd; 3],
    uds: PathBuf,
    _dir: tempfile::TempDir,
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

fn duplicate(kick: &EventFd) -> OwnedFd {
    std::os::fd::AsFd::as_fd(kick).try_clone_to_owned().unwrap()
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "not reached: {what}");
        std::thread::yield_now();
    }
}

impl Rig {
    /// A linked device, its thread, and a driver that has not started it yet.
    fn linked(mem: Arc<VmMemory>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("v");
        let kicks = [eventfd(), eventfd(), eventfd()];
        let device = VsockDevice::new(cid(), 1).unwrap();
        let (linked, remote) = link(device, kicks.each_ref().map(duplicate)).unwrap();
        let host = Host::new(linked, Some(&uds), 7).unwrap();
        // This thread ends with the process.
        std::thread::spawn(move || host.run());
        let event = DriverQueue::new(mem.clone(), EVENT_QUEUE, 8, true);
        let driver = Driver::empty(mem, cid(), DriverConfig::LINUX_6_12);
        Self {
            remote,
            driver,
            event,
            kicks,
            uds,
            _dir: dir,
        }
    }

    fn new() -> Self {
        let mut rig = Self::linked(memory::anonymous());
        rig.driver.fill_rx();
        let queues = [
            rig.driver.rx.queue(),
            rig.driver.tx.queue(),
            rig.event.queue(),
        ];
        let (mem, signal) = (rig.driver.memory().clone(), Arc::new(Signals::default()));
        let activated = rig
            .remote
            .ask(move |linked| linked.activate(FEATURES, mem, queues, signal));
        activated.unwrap().unwrap();
        rig
    }

    fn send(&mut self, h: &PacketHeader, payload: &[u8]) {
        assert!(self.driver.send(h, payload, 4096));
        self.driver.tx.publish();
        self.kicks[1].write(1).unwrap();
    }

    /// Waits for the next packet.
    #[track_caller]
    fn receive(&mut self) -> (PacketHeader, Vec<u8>) {
        let (mut got, mut payload) = (None, Vec::new());
        until("a packet", || {
            got = self.driver.receive(&mut payload);
            got.is_some()
        });
        if self.driver.rx.publish() {
            self.kicks[0].write(1).unwrap();
        }
        self.driver.reap_tx();
        (got.expect("just seen").header(), payload)
    }
}

#[test]
fn both_sides_connect_through_sockets() {
    let mut rig = Rig::new();
    // The host's client sends first. Bytes after its line belong to the guest.
    let mut client = UnixStream::connect(&rig.uds).unwrap();
    client.write_all(b"CONNECT 5000\nearly").unwrap();
    let (request, _) = rig.receive();
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 5000));
    let mut guest = GuestStream::new(5000, request.src_port);
    guest.handle(&request, 0);
    let answer = guest.header(Op::Response);
    rig.send(&answer, &[]);
    let (early, payload) = rig.receive();
    assert_eq!((early.op, &payload[..]), (Op::Rw as u16, &b"early"[..]));
    let back = guest.payload(4);
    rig.send(&back, b"back");
    let mut said = Vec::new();
    until("the guest's answer", || {
        let mut some = [0; 64];
        let n = client.read(&mut some).unwrap();
        said.extend_from_slice(&some[..n]);
        said.ends_with(b"\nback")
    });
    assert!(said.starts_with(b"OK "));
    // The guest dials a port with a listener, and one without.
    let served = UnixListener::bind(format!("{}_7000", rig.uds.display())).unwrap();
    for (port, op) in [(7000, Op::Response), (7001, Op::Rst)] {
        let request = GuestStream::new(1024, port).header(Op::Request);
        rig.send(&request, &[]);
        assert_eq!(rig.receive().0.op, op as u16);
    }
    served.accept().unwrap();
    // Any other line of a client ends that client.
    for line in [
        "CONNECT\n",
        "CONNECT 99999999999\n",
        "GET / HTTP/1.1\n",
        "\n",
    ] {
        let mut client = UnixStream::connect(&rig.uds).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0, "{line:?}");
    }
}

#[test]
fn lines_that_other_vmms_accept_reach_the_guest() {
    let mut rig = Rig::new();
    for line in ["connect 5000\n", "CONNECT  5000\n", " Connect\t5000 \r\n"] {
        let mut client = UnixStream::connect(&rig.uds).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        let (request, _) = rig.receive();
        let asked = (request.op, request.dst_port);
        assert_eq!(asked, (Op::Request as u16, 5000), "{line:?}");
        let refused = GuestStream::new(5000, request.src_port).header(Op::Rst);
        rig.send(&refused, &[]);
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0, "{line:?}");
    }
}

#[test]
fn silent_clients_do_not_lock_others_out() {
    let mut rig = Rig::new();
    let connect = || UnixStream::connect(&rig.uds).unwrap();
    let _silent: Vec<_> = (0..100).map(|_| connect()).collect();
    let mut client = connect();
    client.write_all(b"CONNECT 5000\n").unwrap();
    let (request, _) = rig.receive();
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 5000));
}

#[test]
fn r119_a_listener_that_accepts_nothing_delays_only_its_own_streams() {
    let mut rig = Rig::new();
    let at = |port: u32| PathBuf::from(format!("{}_{port}", rig.uds.display()));
    let busy = UnixListener::bind(at(7000)).unwrap();
    let served = UnixListener::bind(at(7001)).unwrap();
    let mut backlog = 0;
    while connect_now(&at(7000)).is_ok() {
        backlog += 1;
    }
    let mut dial = |from, to| {
        let request = GuestStream::new(from, to).header(Op::Request);
        rig.send(&request, &[]);
    };
    dial(1024, 7000);
    dial(1025, 7000);
    dial(1026, 7001);
    // The stream after them is not delayed.
    let (answer, _) = rig.receive();
    assert_eq!((answer.op, answer.dst_port), (Op::Response as u16, 1026));
    let _kept = served.accept().unwrap();
    // With room for one of the two, the first gets it. The other gets a reset when its time is over.
    busy.accept().unwrap();
    let (answer, _) = rig.receive();
    assert_eq!((answer.op, answer.dst_port), (Op::Response as u16, 1024));
    let (answer, _) = rig.receive();
    assert_eq!((answer.op, answer.dst_port), (Op::Rst as u16, 1025));
    // No connection is attempted for it any more.
    busy.set_nonblocking(true).unwrap();
    let taken = std::iter::from_fn(|| busy.accept().ok()).count();
    assert_eq!(taken, backlog);
}

#[test]
fn a_held_device_stops_and_another_continues_from_its_state() {
    let mut rig = Rig::new();
    let (state, held) = rig.remote.hold().unwrap();
    // The snapshot ends this stream. The guest learns that from an event, and gets no reset: after a reset its reader
    // would treat the stream as complete.
    let cut = GuestStream::new(1023, 7000).payload(4);
    rig.send(&cut, b"more");
    let request = GuestStream::new(1024, 7001).header(Op::Request);
    rig.send(&request, &[]);
    std::thread::yield_now();
    assert_eq!(
        rig.driver.tx.used_idx(),
        0,
        "a held device must not use buffers"
    );
    assert!(state.has_session());
    // Another device continues with its memory. This one stays stopped.
    let mut other = Rig::linked(rig.driver.memory().clone());
    let mem = rig.driver.memory().clone();
    let signal = Arc::new(Signals::default());
    let restored = other
        .remote
        .ask(move |linked| linked.restore(&state, mem, signal));
    restored.unwrap().unwrap();
    std::mem::swap(&mut other.driver, &mut rig.driver);
    std::mem::swap(&mut other.event, &mut rig.event);
    let (refused, _) = other.receive();
    let (op, of) = (refused.op, refused.dst_port);
    assert_eq!((op, of), (Op::Rst as u16, 1024), "nothing listens on 7001");
    // The guest has requested a stream, so packets of unknown streams now get a reset.
    let stray = GuestStream::new(1022, 7000).payload(4);
    other.send(&stray, b"what");
    assert_eq!(other.receive().0.dst_port, 1022);
    // Only now the guest posts a buffer for the event.
    let (addr, mem) = (memory::rx_page(0), other.driver.memory().clone());
    other.event.add(&[Buffer { addr, len: 4 }], true).unwrap();
    assert!(other.event.publish());
    other.kicks[2].write(1).unwrap();
    until("the event", || other.event.used_idx() == 1);
    let told: u32 = mem.read_obj(GuestAddress(addr)).unwrap();
    assert_eq!(told, 0, "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    drop(held);
}
