//! The VMM's side of a vhost-user socket: a real frontend (crate `vhost`), and the test harness's driver on a shared
//! memfd.
#![allow(dead_code)] // each test file uses only a part

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use adit_channel::device::{FEATURES, RX_QUEUE, TX_QUEUE};
use adit_testkit::queue::DriverQueue;
use adit_testkit::{Driver, DriverConfig, memory};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::common::{CID, cid, rw};

/// Time limit for steps that take very little time, so that a test that hangs fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The VMM's side: memory, driver, kicks and calls.
pub struct Vm {
    pub frontend: Frontend,
    pub driver: Driver,
    pub kicks: [EventFd; 2],
    pub calls: [EventFd; 2],
    pub file: std::fs::File,
}

pub fn event() -> EventFd {
    EventFd::new(0).expect("eventfd")
}

impl Vm {
    /// Connects and negotiates, as QEMU does when it realizes the device.
    pub fn connect(socket: &Path) -> Self {
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

    /// Passes memory and starts the vrings, as QEMU does when the guest's driver is ready. The vrings are not enabled
    /// yet.
    pub fn prepare(&mut self) {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(FEATURES | protocol).expect("ok");
        self.set_table();
        for (queue, base) in [(RX_QUEUE, 0), (TX_QUEUE, 0)] {
            self.set_vring(queue, base);
        }
    }

    pub fn host_address(&self, addr: u64) -> u64 {
        let host = self.driver.memory().get_host_address(GuestAddress(addr));
        host.expect("inside guest memory") as u64
    }

    pub fn set_table(&self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory::MEMORY_BYTES as u64,
            userspace_addr: self.host_address(0),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).expect("table");
    }

    pub fn queue(&self, queue: u16) -> &DriverQueue {
        match queue {
            RX_QUEUE => &self.driver.rx,
            _ => &self.driver.tx,
        }
    }

    pub fn set_vring(&self, queue: u16, base: u16) {
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

    pub fn enable(&mut self, on: bool) {
        for queue in [0, 1] {
            self.frontend.set_vring_enable(queue, on).expect("enable");
        }
    }

    pub fn start(socket: &Path) -> Self {
        let mut vm = Self::connect(socket);
        vm.prepare();
        vm.enable(true);
        vm
    }

    /// Sends a packet, kicks only if asked, and waits for the call that announces its echo.
    pub fn round_trip(&mut self, port: u32, payload: &[u8]) {
        assert!(self.driver.send(&rw(port), payload, 1000), "room");
        if self.driver.tx.publish() {
            self.kicks[1].write(1).expect("kick");
        }
        self.await_packet(port, payload);
        self.driver.reap_tx();
    }

    pub fn await_packet(&mut self, port: u32, payload: &[u8]) {
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

/// Waits for an eventfd and resets it.
pub fn wait(event: &EventFd) {
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
