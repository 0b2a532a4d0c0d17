//! A software guest on the other side of a real vhost-user socket: the harness's driver as a carrier under a port of its own, so
//! that the guest's streams end in ordinary sockets too.
#![allow(unsafe_code)] // the crate's eventfd type lends no `BorrowedFd`
#![allow(dead_code)] // each test file uses only a part of it

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use adit_channel::carrier::{
    Armed, Carrier, CarrierCaps, CarrierFault, Interest, RxPacket, TxSlot, Woken,
};
use adit_channel::device::{FEATURES, GuestCid};
use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::Sink;
use adit_engine::{EngineConfig, Lane, PacketHeader, SessionChange};
use adit_testkit::memory::{MEMORY_BYTES, memfd};
use adit_testkit::{Driver, DriverConfig};
use nix::sys::socket::{MsgFlags, recv, send};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// Address of the guest's memory in the process of an imaginary VMM.
const USER_ADDRESS: u64 = 0x7000_0000_0000;
const PAYLOAD: usize = 4096;

/// The driver's side of the two queues.
pub struct DriverCarrier {
    driver: Driver,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    /// Duplicates of the calls, because the crate's type cannot lend a `BorrowedFd`.
    wakers: [OwnedFd; 2],
    attached: bool,
    frontend: Frontend,
    memory: File,
}

impl DriverCarrier {
    /// Does what QEMU does: passes memory and queues, and starts the queues.
    pub fn connect(socket: &Path, cid: u64) -> Self {
        let (mem, file) = memfd();
        let cid = GuestCid::new(cid).unwrap();
        let driver = Driver::new(mem, cid, DriverConfig::LINUX_6_1);
        let mut frontend = Frontend::connect(socket, 2).unwrap();
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend
            .set_features(offered & (FEATURES | protocol))
            .unwrap();
        let features = frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(
                features
                    & (VhostUserProtocolFeatures::REPLY_ACK
                        | VhostUserProtocolFeatures::CONFIG
                        | VhostUserProtocolFeatures::MQ),
            )
            .unwrap();
        frontend.set_mem_table(&[region(&file)]).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        let (kicks, calls) = ([event(), event()], [event(), event()]);
        for (i, queue) in [&driver.rx, &driver.tx].into_iter().enumerate() {
            let [desc, avail, used] = queue.addrs().map(|a| USER_ADDRESS + a);
            let config = VringConfigData {
                queue_max_size: 1024,
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: desc,
                used_ring_addr: used,
                avail_ring_addr: avail,
                log_addr: None,
            };
            frontend.set_vring_num(i, queue.size()).unwrap();
            frontend.set_vring_addr(i, &config).unwrap();
            frontend.set_vring_base(i, 0).unwrap();
            frontend.set_vring_call(i, &calls[i]).unwrap();
            frontend.set_vring_kick(i, &kicks[i]).unwrap();
            frontend.set_vring_enable(i, true).unwrap();
        }
        // The first wake-up starts the guest's own session.
        calls[0].write(1).unwrap();
        let wakers = calls.each_ref().map(|call| {
            let raw = call.try_clone().unwrap().into_raw_fd();
            // SAFETY: `into_raw_fd` gave up the only ownership of this duplicate.
            unsafe { OwnedFd::from_raw_fd(raw) }
        });
        Self {
            driver,
            kicks,
            calls,
            wakers,
            attached: false,
            frontend,
            memory: file,
        }
    }

    /// The VMM's end of the socket, to send more messages.
    pub fn frontend(&self) -> Frontend {
        self.frontend.clone()
    }

    /// The memory table that was passed, and its descriptor.
    pub fn table(&self) -> (VhostUserMemoryRegionInfo, File) {
        let file = self.memory.try_clone().unwrap();
        (region(&file), file)
    }
}

fn region(file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: USER_ADDRESS,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// A packet from the host, already copied.
pub struct Packet {
    header: PacketHeader,
    body: VecDeque<u8>,
}

impl RxPacket for Packet {
    fn header(&self) -> &PacketHeader {
        &self.header
    }
    fn remaining(&self) -> u32 {
        self.body.len() as u32
    }
    fn read(&mut self, dst: &mut [u8]) -> Result<usize, CarrierFault> {
        Ok(self.body.read(dst).unwrap())
    }
    fn write_to(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let max = (max as usize).min(self.body.len());
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let n = send(fd.as_raw_fd(), &self.body.make_contiguous()[..max], flags)?;
        self.body.drain(..n);
        Ok(n)
    }
}

/// A packet for the host.
pub struct Slot<'a> {
    driver: &'a mut Driver,
    body: Vec<u8>,
}

impl TxSlot for Slot<'_> {
    fn capacity(&self) -> u32 {
        PAYLOAD as u32
    }
    fn write(&mut self, src: &[u8]) -> Result<usize, CarrierFault> {
        let n = src.len().min(PAYLOAD - self.body.len());
        self.body.extend_from_slice(&src[..n]);
        Ok(n)
    }
    fn read_from(&mut self, fd: BorrowedFd<'_>, max: u32) -> io::Result<usize> {
        let mut buf = vec![0; (max as usize).min(PAYLOAD - self.body.len())];
        let n = recv(fd.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT)?;
        self.body.extend_from_slice(&buf[..n]);
        Ok(n)
    }
    fn commit(self, h: &PacketHeader) {
        assert!(self.driver.send(h, &self.body, 1000));
    }
}

impl Carrier for DriverCarrier {
    type Rx<'a> = Packet;
    type Tx<'a> = Slot<'a>;

    fn caps(&self) -> CarrierCaps {
        CarrierCaps {
            max_payload: PAYLOAD as u32,
            packet_overhead: 0,
            lanes: false,
            tells_reason: false,
            run_bytes: 64 << 10,
        }
    }
    fn begin(&mut self) {}
    fn rx(&mut self) -> Result<Option<Packet>, CarrierFault> {
        if !self.attached {
            return Ok(None);
        }
        let mut body = Vec::new();
        let wire = self.driver.receive(&mut body);
        Ok(wire.map(|wire| Packet {
            header: wire.header(),
            body: body.into(),
        }))
    }
    fn tx(&mut self, _: Lane, _: u32) -> Result<Option<Slot<'_>>, CarrierFault> {
        self.driver.reap_tx();
        let free = self.driver.tx.free_descriptors() > 8;
        let driver = &mut self.driver;
        Ok(free.then(|| Slot {
            driver,
            body: Vec::new(),
        }))
    }
    fn flush(&mut self) {
        if self.driver.rx.publish() {
            self.kicks[0].write(1).unwrap();
        }
        if self.driver.tx.publish() {
            self.kicks[1].write(1).unwrap();
        }
    }
    fn arm(&mut self, interest: Interest) -> Armed {
        let rx = self.driver.rx.enable_callback() && self.attached;
        let tx = interest.tx && self.driver.tx.enable_callback();
        match rx || tx {
            true => Armed::WorkAppeared,
            false => Armed::Sleep,
        }
    }
    fn tear(&mut self) {}
    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        for (i, waker) in self.wakers.iter().enumerate() {
            visit(waker.as_fd(), i as u32);
        }
    }
    fn woken(&mut self, id: u32) -> Woken {
        let _ = self.calls[id as usize].read();
        let begins = !std::mem::replace(&mut self.attached, true);
        Woken {
            session: begins.then_some(SessionChange::Attached { epoch: 1 }),
            wakers_changed: false,
            ..Woken::default()
        }
    }
}

/// The guest: its port, and the notices that it got.
pub struct Guest {
    pub shard: Shard<DriverCarrier>,
    pub port: PortIndex,
    pub heard: Vec<Notice>,
}

impl Guest {
    pub fn boot(socket: &Path, cid: u64, listen: &[u32]) -> Self {
        Self::boot_with(socket, cid, listen, EngineConfig::default())
    }

    /// The same with other limits.
    pub fn boot_with(socket: &Path, cid: u64, listen: &[u32], config: EngineConfig) -> Self {
        let mut shard = Shard::new().unwrap();
        let carrier = DriverCarrier::connect(socket, cid);
        let port = shard.add(carrier, config, 7).unwrap();
        for &at in listen {
            shard.port_mut(port).listen(at).unwrap();
        }
        Self {
            shard,
            port,
            heard: Vec::new(),
        }
    }

    /// Lets the guest run until `done` returns something.
    #[track_caller]
    pub fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(30);
        while Instant::now() < end {
            if let Some(value) = done(self) {
                return value;
            }
            self.shard.turn(Some(Duration::from_millis(1))).unwrap();
            while let Some(news) = self.shard.poll_news() {
                if let News::Notice(_, notice) = news {
                    self.heard.push(notice);
                }
            }
        }
        panic!("not reached in 30 s; heard {:?}", self.heard);
    }

    /// Accepts the next stream that the host dials, with this sink.
    pub fn accept(&mut self, sink: Sink) {
        self.accept_at(|_| true, sink);
    }

    /// The same, but only streams to certain ports: if the VM has a ring, the host also measures round trips over vsock.
    pub fn accept_at(&mut self, wanted: impl Fn(u32) -> bool, sink: Sink) {
        let stream = self.until(|g| {
            let at = g.heard.iter().position(
                |n| matches!(n, Notice::Incoming { local_port, .. } if wanted(*local_port)),
            )?;
            match g.heard.remove(at) {
                Notice::Incoming { stream, .. } => Some(stream),
                _ => None,
            }
        });
        let now = self.shard.now();
        let port = self.shard.port_mut(self.port);
        port.accept(now, stream, Some(sink));
    }
}
