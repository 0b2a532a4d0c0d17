//! The backend and a real frontend (crate `vhost`) over a socket, with the test harness's driver on a shared memfd.

mod common;
#[path = "common/vm.rs"]
mod vm;

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use adit_channel::carrier::{Armed, Carrier, Interest, RxPacket, TxSlot};
use adit_channel::device::{Counters, RX_QUEUE, TX_QUEUE};
use adit_channel::vhost_user::{VhostUserCarrier, VhostUserConfig};
use adit_engine::{Lane, PacketHeader, ResetReason, SessionChange};
use adit_testkit::{Driver, DriverConfig, memory};
use common::{cid, rw};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd as StopEvent};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm::{PATIENCE, Vm, event, wait};

/// A carrier on a thread that echoes every packet, and polls as a shard does.
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

/// Waits. Returns the readable wakers, with `None` for the stop event.
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

const EPOCH_1: SessionChange = SessionChange::Attached { epoch: 1 };
const EPOCH_2: SessionChange = SessionChange::Attached { epoch: 2 };
const GONE: SessionChange = SessionChange::Lost(ResetReason::CarrierFault);

#[test]
fn packets_are_echoed_through_memfd_kicks_and_calls() {
    let shard = Shard::new();
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    // More packets than the queue has entries, so that the positions wrap.
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
    // The VM is paused: QEMU disables the vrings, then asks for their bases.
    vm.enable(false);
    let bases: Vec<_> = [0, 1]
        .map(|q| vm.frontend.get_vring_base(q).expect("base"))
        .into();
    assert_eq!(bases, [10, 10]);
    // The guest continues to write to its virtqueues and kicks, but the device must not look.
    assert!(vm.driver.send(&rw(99), b"while stopped", 5));
    vm.driver.tx.publish();
    vm.kicks[1].write(1).expect("kick");
    assert_eq!(vm.frontend.get_vring_base(1).expect("base"), 10);
    assert_eq!(vm.driver.tx.used_idx(), 10);
    // Resumed at the same positions, with the packets that were sent meanwhile.
    for (queue, base) in [(RX_QUEUE, bases[0]), (TX_QUEUE, bases[1])] {
        vm.set_vring(queue, base as u16);
    }
    vm.enable(true);
    vm.await_packet(99, b"while stopped");
    vm.round_trip(100, b"after");
    // It was one session all the time.
    drop(vm);
    assert_eq!(shard.change(), GONE);
    shard.end();
}

#[test]
fn a_restarted_driver_begins_at_position_zero() {
    let shard = Shard::new();
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    vm.round_trip(1, b"first boot");
    for queue in [0, 1] {
        vm.frontend.get_vring_base(queue).expect("base");
    }
    // A reboot: zeroed virtqueues in the same memory.
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
fn r33_a_thousand_frontends_leak_nothing() {
    let shard = Shard::new();
    for i in 1..=1000 {
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
fn a_partial_message_stops_only_its_own_thread() {
    let shard = Shard::new();
    let mut half = UnixStream::connect(&shard.socket).expect("a listener");
    half.write_all(&[1, 0, 0, 0, 1]).expect("room");
    // The next frontend waits. It is served when the first is gone.
    let waiting = UnixStream::connect(&shard.socket).expect("the backlog");
    drop(half);
    drop(waiting);
    let mut vm = Vm::start(&shard.socket);
    assert_eq!(shard.change(), EPOCH_1);
    vm.round_trip(1, b"served");
    drop(vm);
    // A shard ends while its frontend is in the middle of a message. The shard must not hang.
    let mut half = UnixStream::connect(&shard.socket).expect("a listener");
    half.write_all(&[1, 0, 0, 0, 1]).expect("room");
    shard.end();
}

#[test]
fn a_frontend_that_sends_garbage_is_cut_off_and_the_next_is_served() {
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
        // A new call descriptor is signalled once, because a notification may have gone to the old one.
        wait(&vm.calls[queue]);
    }
    for i in 0..200 {
        vm.round_trip(i, b"new descriptors");
    }
    drop(vm);
    assert_eq!(shard.change(), GONE);
    shard.end();
}
