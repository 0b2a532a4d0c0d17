//! A device and the test harness's driver, on the same guest memory.
#![allow(dead_code)] // each test file uses only a part

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use adit_channel::carrier::{Carrier, CarrierFault, RxPacket, TxSlot};
use adit_channel::device::{FEATURES, GuestCid, HOST_CID, Signal, VsockDevice, WireHeader};
use adit_engine::{Kind, Lane, Op, PacketHeader, SessionChange};
use adit_testkit::queue::Buffer;
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};

pub const CID: u64 = 3;

pub fn cid() -> GuestCid {
    GuestCid::new(CID).expect("a guest's CID")
}

/// Counts notifications of each queue.
#[derive(Default)]
pub struct Signals {
    counts: [AtomicU64; 3],
    /// Reports that one interrupt serves all queues.
    shared: bool,
}

impl Signals {
    pub fn count(&self, queue: u16) -> u64 {
        self.counts[usize::from(queue)].load(Ordering::SeqCst)
    }
}

impl Signal for Signals {
    fn signal(&self, queue: u16) {
        self.counts[usize::from(queue)].fetch_add(1, Ordering::SeqCst);
    }

    fn is_shared(&self) -> bool {
        self.shared
    }
}

pub type Device = VsockDevice<Arc<VmMemory>>;

pub struct Rig {
    pub device: Device,
    pub driver: Driver,
    pub signals: Arc<Signals>,
}

impl Rig {
    /// An active device with Linux 6.1's driver.
    pub fn new() -> Self {
        Self::with(DriverConfig::LINUX_6_1)
    }

    pub fn with(config: DriverConfig) -> Self {
        Self::on(Driver::new(memory::anonymous(), cid(), config), FEATURES)
    }

    pub fn on(driver: Driver, features: u64) -> Self {
        Self::signalled(driver, features, false)
    }

    /// A device whose queues share one interrupt.
    pub fn sharing() -> Self {
        let driver = Driver::new(memory::anonymous(), cid(), DriverConfig::LINUX_6_1);
        Self::signalled(driver, FEATURES, true)
    }

    fn signalled(driver: Driver, features: u64, shared: bool) -> Self {
        let counts = Default::default();
        let signals = Arc::new(Signals { counts, shared });
        let mut device = Device::new(cid(), 1).expect("a descriptor");
        device.ack_features(features).expect("offered features");
        device
            .activate(driver.memory().clone(), driver.queues(), signals.clone())
            .expect("a usable device");
        assert_eq!(
            device.take_session_change(),
            Some(SessionChange::Attached { epoch: 1 })
        );
        Self {
            device,
            driver,
            signals,
        }
    }

    /// Runs one burst that takes everything the guest sent.
    pub fn receive(&mut self) -> Result<Vec<(PacketHeader, Vec<u8>)>, CarrierFault> {
        self.device.begin();
        let mut packets = Vec::new();
        while let Some(mut packet) = self.device.rx()? {
            let mut payload = vec![0; packet.remaining() as usize + 16];
            let n = packet.read(&mut payload)?;
            payload.truncate(n);
            assert_eq!(packet.remaining(), 0);
            packets.push((*packet.header(), payload));
        }
        self.device.flush();
        Ok(packets)
    }

    /// Runs one burst that sends one packet. Returns false if the guest has posted no buffer.
    pub fn send(&mut self, h: &PacketHeader, payload: &[u8]) -> Result<bool, CarrierFault> {
        self.device.begin();
        let sent = match self.device.tx(Lane::Bulk, payload.len() as u32)? {
            None => false,
            Some(mut slot) => {
                assert_eq!(slot.write(payload)?, payload.len());
                slot.commit(h);
                true
            }
        };
        self.device.flush();
        Ok(sent)
    }

    /// Sends a valid packet and checks that the device passes it on: the channel still works.
    pub fn assert_works(&mut self) {
        let sent = self.driver.send(&rw(7), b"still alive", 4);
        assert!(sent, "no descriptor was returned");
        self.driver.tx.publish();
        let packets = self.receive().expect("the channel works");
        let payload = b"still alive".to_vec();
        assert_eq!(packets.last().map(|(_, p)| p), Some(&payload));
        self.driver.reap_tx();
    }

    /// Posts a chain of raw descriptors from index 0 on, and publishes it.
    pub fn post_raw(&mut self, descriptors: &[(u64, u32, u16, u16)]) {
        for (i, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
            self.driver.tx.write_desc(i as u16, addr, len, flags, next);
        }
        self.driver.tx.push(0);
        self.driver.tx.publish();
    }
}

pub fn rw(src_port: u32) -> PacketHeader {
    PacketHeader {
        src_port,
        dst_port: 741,
        len: 0,
        kind: Kind::Stream as u16,
        op: Op::Rw as u16,
        flags: 0,
        buf_alloc: 65536,
        fwd_cnt: 0,
    }
}

/// Header and payload in the layout of guest memory.
pub fn wire_bytes(h: &PacketHeader, payload: &[u8]) -> Vec<u8> {
    let mut bytes = WireHeader::new(CID, HOST_CID, h).to_bytes().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// Divides `total` bytes from `base` on into buffers of the given lengths, with gaps. The last buffer takes the rest.
pub fn scatter(base: u64, total: usize, lengths: &[usize]) -> Vec<Buffer> {
    let (mut buffers, mut left, mut addr) = (Vec::new(), total, base);
    let mut lengths = lengths.iter().copied();
    while left > 0 {
        let len = lengths.next().unwrap_or(left).clamp(1, left);
        buffers.push(Buffer {
            addr,
            len: len as u32,
        });
        addr += len as u64 + 3;
        left -= len;
    }
    buffers
}

pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8)
        .collect()
}
