//! A device on the VMM's raw regions and the harness's driver, in one thread, so that it is known what the device does
//! and when.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use adit_channel::carrier::{Carrier, Interest, RxPacket, TxSlot};
use adit_channel::device::raw::{FnSignal, RawMemory};
use adit_channel::device::{
    FEATURES, GuestCid, HOST_CID, QueueConfig, VirtQueues, VsockDevice, WireHeader,
};
use adit_engine::{Kind, Lane, Op, PacketHeader, SessionChange};
use adit_testkit::memory::{self, MEMORY_BYTES};
use adit_testkit::queue::Buffer;
use adit_testkit::{Driver, DriverConfig};

use super::vmm::Vmm;
use super::{PLUG, PLUG_BYTES};

pub const CID: u64 = 3;

pub fn cid() -> GuestCid {
    GuestCid::new(CID).expect("a guest's CID")
}

pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8)
        .collect()
}

/// The queue of the harness's driver, from numbers only.
pub fn queue(queue: &adit_testkit::queue::DriverQueue) -> QueueConfig {
    let [desc_table, avail_ring, used_ring] = queue.addrs();
    QueueConfig {
        size: queue.size(),
        ready: true,
        desc_table,
        avail_ring,
        used_ring,
        ..QueueConfig::default()
    }
}

fn header() -> PacketHeader {
    PacketHeader {
        src_port: 1024,
        dst_port: 741,
        kind: Kind::Stream as u16,
        op: Op::Rw as u16,
        ..PacketHeader::default()
    }
}

pub struct Rig {
    pub file: File,
    pub vmm: Vmm,
    pub device: VsockDevice<Arc<RawMemory>>,
    driver: Driver,
    interrupts: Arc<AtomicU64>,
}

impl Rig {
    /// A device whose driver has posted nothing yet.
    pub fn new() -> Self {
        let (mem, file) = memory::memfd_of(&[(0, MEMORY_BYTES), (PLUG, PLUG_BYTES)]);
        let driver = Driver::empty(mem, cid(), DriverConfig::LINUX_6_1);
        let vmm = Vmm::new(&file, 0, 0, MEMORY_BYTES);
        let mut device = VsockDevice::new(cid(), 1).expect("a descriptor");
        let interrupts = Arc::new(AtomicU64::new(0));
        let count = interrupts.clone();
        let signal = FnSignal::per_queue(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        device.ack_features(FEATURES).expect("offered");
        let queues = VirtQueues {
            rx: queue(&driver.rx).into(),
            tx: queue(&driver.tx).into(),
            event: None,
        };
        device
            .activate(vmm.raw(), queues, Arc::new(signal))
            .expect("usable");
        let begun = device.take_session_change();
        assert_eq!(begun, Some(SessionChange::Attached { epoch: 1 }));
        Self {
            file,
            vmm,
            device,
            driver,
            interrupts,
        }
    }

    /// The guest sends a packet from the harness's own buffers.
    pub fn send(&mut self, payload: &[u8]) {
        self.driver.reap_tx();
        assert!(self.driver.send(&header(), payload, 4096));
        self.driver.tx.publish();
    }

    /// The guest sends a packet from one buffer at this address.
    pub fn send_from(&mut self, addr: u64, payload: &[u8]) {
        let len = payload.len() as u32;
        let h = PacketHeader { len, ..header() };
        let mut bytes = WireHeader::new(CID, HOST_CID, &h).to_bytes().to_vec();
        bytes.extend_from_slice(payload);
        self.driver.write(addr, &bytes);
        let len = bytes.len() as u32;
        self.post_raw(&[Buffer { addr, len }], false);
    }

    /// The guest posts a chain of these buffers, on RX if the device is to write them.
    pub fn post_raw(&mut self, buffers: &[Buffer], write: bool) {
        self.driver.reap_tx();
        let queue = match write {
            true => &mut self.driver.rx,
            false => &mut self.driver.tx,
        };
        assert!(queue.add(buffers, write).is_some());
        queue.publish();
    }

    /// The guest posts buffers for packets to it: a header and a page each.
    pub fn post_buffers(&mut self, count: usize) {
        for _ in 0..count {
            assert!(self.driver.post_rx());
        }
        self.driver.rx.publish();
    }

    /// The contents of the harness's memory.
    pub fn image(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY_BYTES];
        self.driver.read(0, &mut bytes);
        bytes
    }

    pub fn read(&self, addr: u64, bytes: &mut [u8]) {
        self.driver.read(addr, bytes);
    }

    /// One burst that takes two packets and gives two, each time once by a copy and once through a socket.
    pub fn burst(&mut self, payload: &[u8]) -> Vec<Vec<u8>> {
        let (mut near, far) = UnixStream::pair().expect("a pair");
        near.write_all(payload).expect("room");
        let mut taken = Vec::new();
        let device = &mut self.device;
        device.begin();
        let mut packet = device.rx().expect("no fault").expect("a packet");
        let mut bytes = vec![0; packet.remaining() as usize];
        packet.read(&mut bytes).expect("readable");
        taken.push(bytes);
        drop(packet);
        let mut packet = device.rx().expect("no fault").expect("a packet");
        let mut bytes = vec![0; packet.remaining() as usize];
        packet.write_to(far.as_fd(), u32::MAX).expect("room");
        drop(packet);
        near.read_exact(&mut bytes).expect("the payload");
        taken.push(bytes);
        for by_copy in [true, false] {
            let want = payload.len() as u32;
            let mut slot = device
                .tx(Lane::Bulk, want)
                .expect("no fault")
                .expect("room");
            match by_copy {
                true => assert_eq!(slot.write(payload).expect("writable"), payload.len()),
                false => {
                    slot.read_from(far.as_fd(), want).expect("writable");
                }
            }
            slot.commit(&header());
        }
        self.end();
        taken
    }

    /// One burst that takes all packets.
    pub fn idle_burst(&mut self) -> Vec<Vec<u8>> {
        self.device.begin();
        let mut taken = Vec::new();
        while let Some(mut packet) = self.device.rx().expect("no fault") {
            let mut bytes = vec![0; packet.remaining() as usize];
            packet.read(&mut bytes).expect("readable");
            taken.push(bytes);
        }
        self.end();
        taken
    }

    /// One burst that gives a packet. Returns false if there is no buffer for it.
    pub fn give(&mut self, payload: &[u8]) -> bool {
        self.device.begin();
        let slot = self.device.tx(Lane::Bulk, payload.len() as u32);
        let given = match slot.expect("no fault") {
            None => false,
            Some(mut slot) => {
                assert_eq!(slot.write(payload).expect("writable"), payload.len());
                slot.commit(&header());
                true
            }
        };
        self.end();
        given
    }

    /// Publishes, and asks for kicks, as before a sleep.
    fn end(&mut self) {
        let before = self.interrupts.load(Ordering::Relaxed);
        let signals = self.device.counters().signals;
        self.device.flush();
        let _ = self.device.arm(Interest { rx: true, tx: true });
        let raised = self.interrupts.load(Ordering::Relaxed) - before;
        assert_eq!(raised, self.device.counters().signals - signals);
    }

    /// The packets that the guest got in the harness's own buffers.
    pub fn received(&mut self) -> Vec<Vec<u8>> {
        let (mut all, mut payload) = (Vec::new(), Vec::new());
        while self.driver.receive(&mut payload).is_some() {
            all.push(payload.clone());
        }
        all
    }
}
