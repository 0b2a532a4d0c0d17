//! The backend and a real frontend (crate `vhost`) over a socket, with the harness' driver on a shared memfd.

mod common;

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use adit_benches::queue::DriverQueue;
use adit_benches::{Driver, DriverConfig, memory};
use adit_channel::carrier::{Armed, Carrier, Interest, RxPacket, TxSlot};
use adit_channel::device::{Counters, FEATURES, RX_QUEUE, TX_QUEUE};
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{Lane, PacketHeader, ResetReason, SessionChange};
use common::{CID, cid, rw};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd as StopEvent};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Nothing here takes long; a test that hangs should say so.
const PATIENCE: Duration = Duration::from_secs(30);

/// A carrier on a thread that sends every packet back, as a shard would poll it.
struct Shard {
    changes: Receiver<SessionChange>,
    stop: StopEvent,
    thread: Option<JoinHandle<Counters>>,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Shard {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("vhost.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let config = VhostUserConfig::new(listener, cid(), "test");
        let carrier = VhostUserCarrier::new(config).expect("a carrier");
        let (sender, changes) = mpsc::channel();
        let stop = StopEvent::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
        let stopped = stop.as_fd().try_clone_to_owned().expect("descriptor");
        let thread = std::thread::spawn(move || echo(carrier, &stopped, &sender));
        Self {
            changes,
            stop,
            thread: Some(thread),
            socket,
            _dir: dir,
        }
    }

    fn change(&self) -> SessionChange {
        self.changes.recv_timeout(PATIENCE).expect("a change")
    }

    fn end(mut self) -> Counters {
        self.stop.write(1).expect("room");
        let thread = self.thread.take().expect("not ended before");
        thread.join().expect("the shard ends")
    }
}

fn echo(
    mut carrier: VhostUserCarrier,
    stop: &OwnedFd,
    changes: &Sender<SessionChange>,
) -> Counters {
    let mut waiting: VecDeque<(PacketHeader, Vec<u8>)> = VecDeque::new();
    loop {
        carrier.begin();
        while let Some(mut packet) = carrier.rx().expect("no fault") {
            let mut payload = vec![0; packet.remaining() as usize];
            packet.read(&mut payload).expect("readable");
            waiting.push_back((*packet.header(), payload));
        }
        while let Some((header, payload)) = waiting.front() {
            let Some(mut slot) = carrier.tx(Lane::Bulk, 0).expect("no fault") else {
                break;
            };
            slot.write(payload).expect("fits");
            slot.commit(header);
            waiting.pop_front();
        }
        carrier.flush();
        let interest = Interest {
            rx: true,
            tx: !waiting.is_empty(),
        };
        if carrier.arm(interest) == Armed::WorkAppeared {
            continue;
        }
        for id in ready(&carrier, stop) {
            match id {
                None => return carrier.counters(),
                Some(id) => {
                    if let Some(change) = carrier.woken(id).session {
                        waiting.clear();
                        let _ = changes.send(change);
                    }
                }
            }
        }
    }
}

/// Waits; returns the wakers that are readable, `None` for the stop event.
fn ready(carrier: &VhostUserCarrier, stop: &OwnedFd) -> Vec<Option<u32>> {
    let mut fds: Vec<(OwnedFd, Option<u32>)> = Vec::new();
    let clone = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().expect("descriptor");
    fds.push((clone(stop.as_fd()), None));
    carrier.wakers(&mut |fd, id| fds.push((clone(fd), Some(id))));
    let mut polled: Vec<_> = fds
        .iter()
        .map(|(fd, _)| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
        .collect();
    poll(&mut polled, PollTimeout::NONE).expect("poll");
    polled
        .iter()
        .zip(&fds)
        .filter(|(p, _)| p.any().unwrap_or(true))
        .map(|(_, (_, id))| *id)
        .collect()
}

/// A VMM's side: memory, driver, kicks and calls.
struct Vm {
    frontend: Frontend,
    driver: Driver,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    file: std::fs::File,
}

fn event() -> EventFd {
    EventFd::new(0).expect("eventfd")
}

impl Vm {
    /// Connects and negotiates, as QEMU does when it realizes the device.
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("a listener");
        let mut frontend = Frontend::from_stream(stream, 2);
        frontend.set_owner().expect("owner");
        let offered = frontend.get_features().expect("features");
        assert_eq!(offered & FEATURES, FEATURES);
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_ne!(offered & protocol, 0);
        let offered = frontend.get_protocol_features().expect("features");
        let chosen = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(offered.contains(chosen));
        frontend.set_protocol_features(chosen).expect("chosen");
        assert_eq!(frontend.get_queue_num().expect("MQ"), 2);
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = frontend.get_config(0, 8, flags, &[0; 8]).expect("config");
        assert_eq!(config, CID.to_le_bytes());
        let (mem, file) = memory::memfd();
        Self {
            frontend,
            driver: Driver::new(mem, cid(), DriverConfig::LINUX_6_12),
            kicks: [event(), event()],
            calls: [event(), event()],
            file,
        }
    }

    /// Hands memory over and starts the rings, as QEMU does when the guest's driver is ready; not yet enabled.
    fn prepare(&mut self) {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(FEATURES | protocol).expect("ok");
        self.set_table();
        for (queue, base) in [(RX_QUEUE, 0), (TX_QUEUE, 0)] {
            self.set_ring(queue, base);
        }
    }

    fn host_address(&self, addr: u64) -> u64 {
        let host = self.driver.memory().get_host_address(GuestAddress(addr));
        host.expect("inside guest memory") as u64
    }

    fn set_table(&self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory::MEMORY_BYTES as u64,
            userspace_addr: self.host_address(0),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).expect("table");
    }

    fn queue(&self, queue: u16) -> &DriverQueue {
        match queue {
            RX_QUEUE => &self.driver.rx,
            _ => &self.driver.tx,
        }
    }

    fn set_ring(&self, queue: u16, base: u16) {
        let index = usize::from(queue);
        let size = self.queue(queue).size();
        let [desc, avail, used] = self.queue(queue).addrs().map(|a| self.host_address(a));
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        };
        let f = &self.frontend;
        f.set_vring_num(index, size).expect("num");
        f.set_vring_base(index, base).expect("base");
        f.set_vring_addr(index, &config).expect("addr");
        f.set_vring_kick(index, &self.kicks[index]).expect("kick");
        f.set_vring_call(index, &self.calls[index]).expect("call");
    }

    fn enable(&mut self, on: bool) {
        for queue in [0, 1] {
            self.frontend.set_vring_enable(queue, on).expect("enable");
        }
    }

    fn start(socket: &Path) -> Self {
        let mut vm = Self::connect(socket);
        vm.prepare();
        vm.enable(true);
        vm
    }

    /// Sends a packet, kicks only if asked, and waits for the call that brings it back.
    fn round_trip(&mut self, port: u32, payload: &[u8]) {
        assert!(self.driver.send(&rw(port), payload, 1000), "room");
        if self.driver.tx.publish() {
            self.kicks[1].write(1).expect("kick");
        }
        self.await_packet(port, payload);
        self.driver.reap_tx();
    }

    fn await_packet(&mut self, port: u32, payload: &[u8]) {
        let mut got = Vec::new();
        let wire = loop {
            if let Some(wire) = self.driver.receive(&mut got) {
                break wire;
            }
            if !self.driver.rx.enable_callback() {
                wait(&self.calls[0]);
            }
        };
        if self.driver.rx.publish() {
            self.kicks[0].write(1).expect("kick");
        }
        assert_eq!((wire.header().src_port, &got[..]), (port, payload));
    }
}

/// Waits for an eventfd and clears it.
fn wait(event: &EventFd) {
    let epoll = Epoll::new().expect("an epoll set");
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), readable)
        .expect("watched");
    let mut events = [EpollEvent::default()];
    let patience = PATIENCE.as_millis() as i32;
    assert_eq!(epoll.wait(patience, &mut events).ok(), Some(1), "no call");
    event.read().expect("readable");
}

const EPOCH_1: SessionChange = SessionChange::Attached { epoch: 1 };
const EPOCH_2: SessionChange = SessionChange::Attached { epoch: 2 };
const STOPPED: SessionChange = SessionChange::Lost(ResetReason::Epoch);
const GONE: SessionChange = SessionChange::Lost(ResetReason::CarrierFault);

#[test]
fn packets_go_round_through_memfd_kicks_and_calls() {
    let shard = Shard::new();
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    // More than the queue holds, so that positions go round.
    for i in 0..500u32 {
        let payload = common::pattern(i as usize * 7 % 4000, i as u8);
        vm.round_trip(i, &payload);
    }
    drop(vm);
    assert_eq!(shard.change(), GONE);
    let counters = shard.end();
    assert_eq!(counters.packets_from_guest, 500);
    assert_eq!(counters.packets_to_guest, 500);
}

#[test]
fn r31_a_kick_before_enable_is_not_lost() {
    let shard = Shard::new();
    let mut vm = Vm::connect(&shard.socket);
    assert!(vm.driver.send(&rw(1), b"early", 5));
    assert!(vm.driver.tx.publish());
    vm.kicks[1].write(1).expect("kick");
    vm.prepare();
    vm.enable(true);
    vm.await_packet(1, b"early");
    assert_eq!(shard.change(), EPOCH_1);
    shard.end();
}

#[test]
fn stop_answers_with_the_base_and_completes_nothing_afterwards() {
    let shard = Shard::new();
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    for i in 0..10 {
        vm.round_trip(i, b"before");
    }
    // The guest's driver resets the device: QEMU disables, then asks for the bases.
    vm.enable(false);
    assert_eq!(shard.change(), STOPPED);
    let bases: Vec<_> = [0, 1]
        .map(|q| vm.frontend.get_vring_base(q).expect("base"))
        .into();
    assert_eq!(bases, [10, 10]);
    // The guest goes on to write its rings, kick and all; nobody looks.
    assert!(vm.driver.send(&rw(99), b"while stopped", 5));
    vm.driver.tx.publish();
    vm.kicks[1].write(1).expect("kick");
    assert_eq!(vm.frontend.get_vring_base(1).expect("base"), 10);
    assert_eq!(vm.driver.tx.used_idx(), 10);
    // Resumed where it stood, with what came meanwhile.
    for (queue, base) in [(RX_QUEUE, bases[0]), (TX_QUEUE, bases[1])] {
        vm.set_ring(queue, base as u16);
    }
    vm.enable(true);
    assert_eq!(shard.change(), EPOCH_2);
    vm.await_packet(99, b"while stopped");
    vm.round_trip(100, b"after");
    shard.end();
}

#[test]
fn a_driver_that_starts_over_begins_at_zero() {
    let shard = Shard::new();
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    vm.round_trip(1, b"first boot");
    for queue in [0, 1] {
        vm.frontend.get_vring_base(queue).expect("base");
    }
    assert_eq!(shard.change(), STOPPED);
    // A reboot: rings zeroed, the same memory.
    for queue in [RX_QUEUE, TX_QUEUE] {
        for addr in memory::queue_addrs(queue) {
            vm.driver.write(addr, &[0; 0x2000]);
        }
    }
    let mem = vm.driver.memory().clone();
    vm.driver = Driver::new(mem, cid(), DriverConfig::LINUX_6_1);
    vm.prepare();
    vm.enable(true);
    assert_eq!(shard.change(), EPOCH_2);
    vm.round_trip(2, b"second boot");
    shard.end();
}

#[test]
fn r33_frontends_come_and_go() {
    let shard = Shard::new();
    for i in 1..=50 {
        let mut vm = Vm::start(&shard.socket);
        assert_eq!(shard.change(), SessionChange::Attached { epoch: i });
        vm.round_trip(i as u32, b"hello again");
        // In the middle of a transfer.
        vm.driver.send(&rw(0), &[7; 3000], 1000);
        vm.driver.tx.publish();
        vm.kicks[1].write(1).expect("kick");
        drop(vm);
        assert_eq!(shard.change(), GONE);
    }
    shard.end();
}

#[test]
fn a_half_message_stops_only_its_own_thread() {
    let shard = Shard::new();
    let mut half = UnixStream::connect(&shard.socket).expect("a listener");
    half.write_all(&[1, 0, 0, 0, 1]).expect("room");
    // The next frontend waits its turn; when the first is gone, it is served.
    let waiting = UnixStream::connect(&shard.socket).expect("the backlog");
    drop(half);
    drop(waiting);
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    vm.round_trip(1, b"served");
    drop(vm);
    // A shard that ends while its frontend hangs in a message does not hang itself.
    let mut half = UnixStream::connect(&shard.socket).expect("a listener");
    half.write_all(&[1, 0, 0, 0, 1]).expect("room");
    shard.end();
}

#[test]
fn garbage_is_cut_off_and_the_next_frontend_served() {
    let shard = Shard::new();
    for garbage in [
        &[0xff; 12][..],
        &[0; 64],
        b"GET / HTTP/1.1\r\n\r\n",
        // SET_VRING_NUM with a size that is too long for a message.
        &[8, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
    ] {
        let mut stream = UnixStream::connect(&shard.socket).expect("a listener");
        stream.write_all(garbage).expect("room");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut byte = [0];
        let n = std::io::Read::read(&mut stream, &mut byte).unwrap_or(0);
        assert_eq!(n, 0, "cut off");
    }
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    vm.round_trip(1, b"served");
    shard.end();
}

#[test]
fn r32_a_refused_table_is_a_nack_and_the_end_of_the_connection() {
    let shard = Shard::new();
    let vm = Vm::connect(&shard.socket);
    vm.frontend
        .set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: memory::MEMORY_BYTES as u64 + 0x1000,
        userspace_addr: vm.host_address(0),
        mmap_offset: 0,
        mmap_handle: vm.file.as_raw_fd(),
    };
    assert!(vm.frontend.set_mem_table(&[region]).is_err());
    assert!(vm.frontend.get_vring_base(0).is_err());
    drop(vm);
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    vm.round_trip(1, b"served");
    shard.end();
}

#[test]
fn call_kick_and_memory_are_replaced_while_running() {
    let shard = Shard::new();
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    vm.round_trip(1, b"old");
    vm.set_table();
    vm.round_trip(2, b"new memory");
    for queue in 0..2 {
        vm.kicks[queue] = event();
        vm.calls[queue] = event();
        let f = &vm.frontend;
        f.set_vring_kick(queue, &vm.kicks[queue]).expect("kick");
        f.set_vring_call(queue, &vm.calls[queue]).expect("call");
        // A new call descriptor is rung once: the notification may have gone to the old one.
        wait(&vm.calls[queue]);
    }
    for i in 0..200 {
        vm.round_trip(i, b"new descriptors");
    }
    drop(vm);
    assert_eq!(shard.change(), GONE);
    shard.end();
}
