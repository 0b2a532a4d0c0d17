//! A machine without processors: the VMM's bus, transport and devices on guest memory, with the harness's driver in place of a
//! guest's kernel. Registers are written over the bus, and kicks go to the eventfds that KVM would signal. Needs no KVM.
#![allow(dead_code)] // each test file uses only a part of it

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use adit_channel::device::{EVENT_QUEUE, GuestCid};
use adit_engine::{Op, PacketHeader};
use adit_testkit::queue::DriverQueue;
use adit_testkit::stream::GuestStream;
use adit_testkit::{Driver, DriverConfig};
use adit_vmm_sample::bus::{Bus, lock};
use adit_vmm_sample::console::{Console, Line, LineState};
use adit_vmm_sample::exit::Exit;
use adit_vmm_sample::seccomp::Filters;
use adit_vmm_sample::virtio::block::Block;
use adit_vmm_sample::virtio::mmio::Transport;
use adit_vmm_sample::virtio::vsock::{Owner, Vsock};
use adit_vmm_sample::virtio::{Device, Memory};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Windows of the vsock device and the disk.
pub const VSOCK: u64 = 0xd000_0000;
pub const DISK: u64 = VSOCK + 0x1000;
/// A host port with a listener.
const SERVED: u32 = 7000;
/// After this time a test has hung.
const PATIENCE: Duration = Duration::from_secs(30);
const DISK_BYTES: u64 = 16 << 20;
/// Address of the disk's queue.
pub const DISK_RING: u64 = 0x8_0000;

/// Waits for a condition; fails after [`PATIENCE`].
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "not reached: {what}");
        std::thread::yield_now();
    }
}

/// Waits until the device has read a kick, without reading the kick here.
#[track_caller]
pub fn until_kick_is_read(kick: &EventFd) {
    until("the device reads the kick", || {
        let epoll = Epoll::new().expect("an epoll set");
        let readable = EpollEvent::new(EventSet::IN, 0);
        let watch = epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), readable);
        watch.expect("watched");
        epoll.wait(0, &mut [EpollEvent::default()]).expect("a wait") == 0
    });
}

/// Pseudo-random numbers from a seed (Knuth's MMIX generator).
pub struct Noise(pub u64);

impl Noise {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// A guest's stream and its host end.
pub struct Stream {
    pub guest: GuestStream,
    pub client: UnixStream,
}

/// See the top of the file.
pub struct Vm {
    pub bus: Bus,
    pub memory: Memory,
    pub driver: Driver,
    pub event: DriverQueue,
    pub config: DriverConfig,
    /// Of the vsock device: RX, TX and events. The disk's is `disk_kick`.
    pub kicks: Vec<EventFd>,
    pub disk_kick: EventFd,
    pub irq: EventFd,
    listener: UnixListener,
    dir: tempfile::TempDir,
    next: u32,
    /// Our ports that got a reset.
    pub resets: BTreeSet<u32>,
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("a descriptor")
}

/// Makes a window for a device: its kicks, its interrupt and its transport.
fn window(device: Box<dyn Device>, memory: &Memory) -> (Vec<EventFd>, EventFd, Transport) {
    let copy = |kick: &EventFd| kick.try_clone().expect("a descriptor");
    let kicks = device.kicks().into_iter().map(copy).collect();
    let irq = event();
    let transport = Transport::new(device, memory.clone(), copy(&irq)).expect("a page");
    (kicks, irq, transport)
}

impl Vm {
    /// A running machine with Linux 6.12's driver.
    pub fn new() -> Self {
        let mut vm = Self::on(adit_testkit::memory::anonymous(), DriverConfig::LINUX_6_12);
        vm.boot();
        vm
    }

    /// A machine on this memory. Its devices are in their first state.
    pub fn on(memory: Memory, config: DriverConfig) -> Self {
        Self::filtered(memory, config, &Filters::default())
    }

    /// The same, with seccomp filters on the devices' threads.
    pub fn filtered(memory: Memory, config: DriverConfig, filters: &Filters) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let uds = dir.path().join("v");
        let listener = UnixListener::bind(dir.path().join(format!("v_{SERVED}"))).expect("free");
        let cid = GuestCid::new(3).expect("a guest's CID");
        let device = Vsock::new(cid, Owner::Sockets(Some(uds)), filters).expect("a device");
        let (kicks, irq, vsock) = window(Box::new(device), &memory);
        let file = dir.path().join("disk");
        std::fs::write(&file, [0xd1; 4096]).expect("a disk");
        let whole = std::fs::OpenOptions::new().write(true).open(&file);
        whole.and_then(|f| f.set_len(DISK_BYTES)).expect("a disk");
        let device = Block::open(&file, filters).expect("a disk");
        let (disk_kicks, _, disk) = window(Box::new(device), &memory);
        let [disk_kick] = <[EventFd; 1]>::try_from(disk_kicks).expect("one queue");
        let line = Line::File("/dev/null".into());
        let console = Console::open(&line, event(), &LineState::default()).expect("a line");
        let exit = Arc::new(Exit::new().expect("a descriptor"));
        let bus = Bus::new(console, vec![(VSOCK, vsock), (DISK, disk)], exit);
        Self {
            bus,
            driver: Driver::empty(memory.clone(), cid, config),
            event: DriverQueue::new(memory.clone(), EVENT_QUEUE, 8, config.event_idx),
            memory,
            config,
            kicks,
            disk_kick,
            irq,
            listener,
            dir,
            next: 1024,
            resets: BTreeSet::new(),
        }
    }

    pub fn put_at(&self, base: u64, register: u32, value: u32) {
        self.bus
            .mmio_write(base + u64::from(register), &value.to_le_bytes());
    }

    pub fn get_at(&self, base: u64, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.bus.mmio_read(base + u64::from(register), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn put(&self, register: u32, value: u32) {
        self.put_at(VSOCK, register, value);
    }

    pub fn get(&self, register: u32) -> u32 {
        self.get_at(VSOCK, register)
    }

    pub fn status(&self) -> u32 {
        self.get(VIRTIO_MMIO_STATUS)
    }

    pub fn transport(&self) -> MutexGuard<'_, Transport> {
        lock(&self.bus.virtio[0].1)
    }

    /// Negotiates these features, up to FEATURES_OK.
    pub fn negotiate(&self, base: u64, features: u64) {
        for status in [0, 1, 3] {
            self.put_at(base, VIRTIO_MMIO_STATUS, status);
        }
        for half in 0..2 {
            self.put_at(base, VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let features = (features >> (32 * half)) as u32;
            self.put_at(base, VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.put_at(base, VIRTIO_MMIO_STATUS, 0xb);
    }

    /// Writes a queue's registers: size, and the addresses of descriptors, available ring and used ring.
    pub fn queue_at(&self, base: u64, queue: u32, size: u32, addrs: [u64; 3]) {
        self.put_at(base, VIRTIO_MMIO_QUEUE_SEL, queue);
        self.put_at(base, VIRTIO_MMIO_QUEUE_NUM, size);
        let registers = [
            VIRTIO_MMIO_QUEUE_DESC_LOW,
            VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            VIRTIO_MMIO_QUEUE_USED_LOW,
        ];
        for (register, addr) in registers.into_iter().zip(addrs) {
            self.put_at(base, register, addr as u32);
            self.put_at(base, register + 4, (addr >> 32) as u32);
        }
        self.put_at(base, VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub fn features(&self) -> u64 {
        let event_idx = u64::from(self.config.event_idx) << 29;
        1 << 32 | 1 << 28 | event_idx
    }

    /// Starts the vsock device as a kernel would. Resets it first if it was started before.
    pub fn boot(&mut self) {
        self.negotiate(VSOCK, self.features());
        self.driver = Driver::empty(
            self.memory.clone(),
            GuestCid::new(3).expect("a guest's CID"),
            self.config,
        );
        self.event = DriverQueue::new(self.memory.clone(), EVENT_QUEUE, 8, self.config.event_idx);
        for (n, queue) in (0..).zip([&self.driver.rx, &self.driver.tx, &self.event]) {
            let [desc, avail, used] = queue.addrs();
            for part in [desc, avail, used] {
                let zeroes = [0; 0x1000];
                self.memory
                    .write_slice(&zeroes, GuestAddress(part))
                    .expect("rings");
            }
            self.queue_at(VSOCK, n, queue.size().into(), [desc, avail, used]);
        }
        self.driver.fill_rx();
        self.put(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(self.status(), 0xf);
        self.kick(0);
    }

    /// Starts the disk with its queue at `ring`.
    pub fn boot_disk(&self, ring: u64) -> DiskRing {
        self.negotiate(DISK, 1 << 32);
        let addrs = [ring, ring + 0x1000, ring + 0x2000];
        let zeroes = [0; 0x3000];
        self.memory
            .write_slice(&zeroes, GuestAddress(ring))
            .expect("a ring");
        self.queue_at(DISK, 0, 64, addrs);
        self.put_at(DISK, VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(self.get_at(DISK, VIRTIO_MMIO_STATUS), 0xf);
        DiskRing { ring, avail: 0 }
    }

    /// Writes the eventfd that KVM would signal for QueueNotify.
    pub fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).expect("a kick");
    }

    /// Lets the device see what was posted, and collects what it sent.
    pub fn turn(&mut self, streams: &mut [&mut Stream], got: &mut Vec<(PacketHeader, Vec<u8>)>) {
        if self.driver.tx.publish() {
            self.kick(1);
        }
        let mut payload = Vec::new();
        while let Some(wire) = self.driver.receive(&mut payload) {
            let h = wire.header();
            let own = streams.iter_mut().find(|s| s.guest.port == h.dst_port);
            if let Some(s) = own {
                s.guest.handle(&h, payload.len());
                if s.guest.owes_credit() {
                    let update = s.guest.header(Op::CreditUpdate);
                    self.driver.send(&update, &[], 1);
                }
            }
            if h.op == Op::Rst as u16 {
                self.resets.insert(h.dst_port);
            }
            got.push((h, std::mem::take(&mut payload)));
        }
        if self.driver.rx.publish() {
            self.kick(0);
        }
        self.driver.reap_tx();
    }

    /// Connects from the guest to the host.
    #[track_caller]
    pub fn open(&mut self) -> Stream {
        self.next += 1;
        let mut guest = GuestStream::new(self.next, SERVED);
        let request = guest.header(Op::Request);
        assert!(self.driver.send(&request, &[], 1), "room to send");
        let mut got = Vec::new();
        until("an answer", || {
            self.turn(&mut [], &mut got);
            got.iter().any(|(h, _)| h.dst_port == guest.port)
        });
        let answer = got.iter().find(|(h, _)| h.dst_port == guest.port);
        let (h, _) = answer.expect("just seen");
        assert_eq!(h.op, Op::Response as u16);
        guest.handle(h, 0);
        let (client, _) = self.listener.accept().expect("a client");
        client.set_nonblocking(true).expect("a socket");
        Stream { guest, client }
    }

    /// Sends `len` bytes in each direction and compares them.
    #[track_caller]
    pub fn exchange(&mut self, stream: &mut Stream, len: usize) {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
        let (mut sent, mut back, mut there, mut here) = (0, 0, Vec::new(), Vec::new());
        until("bytes both ways", || {
            let n = (len - sent).min(stream.guest.credit() as usize).min(4000);
            if n > 0 && self.driver.tx.free_descriptors() > 1 {
                let header = stream.guest.payload(n as u32);
                assert!(self.driver.send(&header, &bytes[sent..sent + n], 4096));
                sent += n;
            }
            let mut got = Vec::new();
            self.turn(&mut [&mut *stream], &mut got);
            for (h, payload) in got {
                assert!(
                    h.dst_port != stream.guest.port || h.op != Op::Rst as u16,
                    "the stream was reset"
                );
                if h.dst_port == stream.guest.port {
                    here.extend_from_slice(&payload);
                }
            }
            match stream.client.write(&bytes[back..]) {
                Ok(n) => back += n,
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
            let mut some = [0; 4096];
            match stream.client.read(&mut some) {
                Ok(n) => {
                    assert_ne!(n, 0, "the client's end");
                    there.extend_from_slice(&some[..n]);
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
            there.len() == len && here.len() == len
        });
        assert!(there == bytes && here == bytes, "bytes changed");
    }

    /// Checks that a well-behaved driver is served. Every attack ends with this.
    #[track_caller]
    pub fn honest(&mut self) {
        self.boot();
        let mut stream = self.open();
        self.exchange(&mut stream, 10_000);
    }

    /// Waits until the device has returned all buffers of the TX queue.
    #[track_caller]
    pub fn until_tx_is_returned(&mut self) {
        self.kick(1);
        let want = self.driver.tx.avail_idx();
        until("all is given back", || self.driver.tx.used_idx() == want);
    }

    /// Waits until the vsock thread has finished what it was doing when this was called.
    pub fn settle(&self) {
        let mut transport = self.transport();
        transport.pause().expect("it can be held");
        transport.resume();
    }
}

/// The driver's side of the disk's queue.
pub struct DiskRing {
    ring: u64,
    avail: u16,
}

impl DiskRing {
    /// Posts a request: a header at `header`, its data, and a status byte behind the header.
    pub fn request(&mut self, vm: &Vm, kind: u32, header: u64, data: (u64, u32)) {
        let mem = &vm.memory;
        let put = |at: u64, value: u64| mem.write_obj(value, GuestAddress(at)).expect("memory");
        put(header, kind.into());
        put(header + 8, 0);
        put(header + 16, 0xff);
        let read = u64::from(kind == 0) * 2;
        let chain = [
            (header, 16, 1 | 1 << 16),
            (data.0, data.1, 1 | read | 2 << 16),
            (header + 16, 1, 2),
        ];
        for (n, (addr, len, flags)) in (0..).zip(chain) {
            put(self.ring + 16 * n, addr);
            put(self.ring + 16 * n + 8, u64::from(len) | flags << 32);
        }
        let slot = self.ring + 0x1000 + 4 + 2 * u64::from(self.avail % 64);
        mem.write_obj(0u16, GuestAddress(slot)).expect("a ring");
        self.avail = self.avail.wrapping_add(1);
        let index = GuestAddress(self.ring + 0x1002);
        mem.write_obj(self.avail, index).expect("a ring");
        vm.disk_kick.write(1).expect("a kick");
    }

    /// Waits for the answer; returns its status.
    #[track_caller]
    pub fn answer(&self, vm: &Vm, header: u64) -> u8 {
        until("the disk answers", || self.used(vm) == self.avail);
        vm.memory
            .read_obj(GuestAddress(header + 16))
            .expect("memory")
    }

    pub fn used(&self, vm: &Vm) -> u16 {
        let index = GuestAddress(self.ring + 0x2002);
        vm.memory.read_obj(index).expect("a ring")
    }
}
