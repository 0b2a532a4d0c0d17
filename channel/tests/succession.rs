//! A device is dropped at any point of a burst, and another continues at the used index of each virtqueue. Packets
//! that were published never arrive twice, those that were not published arrive again, and no packet is lost or out of
//! order. This works because no descriptor is held beyond a burst, and because chains are returned in their order.

mod common;

use std::sync::Arc;

use adit_channel::carrier::{Carrier, RxPacket, TxSlot};
use adit_channel::device::{FEATURES, VirtQueues};
use adit_engine::Lane;
use adit_testkit::{Driver, DriverConfig, memory};
use common::{Device, Signals, cid, rw};

/// VIRTIO_F_RING_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;

/// xorshift random numbers: one seed repeats a run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A device that continues at the positions in guest memory.
fn successor(driver: &Driver, features: u64) -> Device {
    let mut device = Device::new(cid(), 1).expect("a descriptor");
    device.ack_features(features).expect("offered features");
    let VirtQueues {
        mut rx,
        mut tx,
        event,
    } = driver.queues();
    for (queue, used) in [
        (&mut rx, driver.rx.used_idx()),
        (&mut tx, driver.tx.used_idx()),
    ] {
        queue.queue.next_avail = used;
        queue.queue.next_used = used;
    }
    let queues = VirtQueues { rx, tx, event };
    let signals = Arc::new(Signals::default());
    device
        .activate(driver.memory().clone(), queues, signals)
        .expect("a usable device");
    assert!(device.take_session_change().is_some());
    device
}

/// The packets of guest and host, with numbers.
struct Run {
    driver: Driver,
    device: Device,
    features: u64,
    seeded: Seeded,
    /// Next numbers: the guest sends, the host expects, the host sends, the guest expects.
    guest_sends: u64,
    host_expects: u64,
    host_sends: u64,
    guest_expects: u64,
    seen_again: u64,
}

impl Run {
    fn new(seed: u64, config: DriverConfig, features: u64) -> Self {
        let driver = Driver::new(memory::anonymous(), cid(), config);
        let device = successor(&driver, features);
        Self {
            driver,
            device,
            features,
            seeded: Seeded(seed),
            guest_sends: 0,
            host_expects: 0,
            host_sends: 0,
            guest_expects: 0,
            seen_again: 0,
        }
    }

    fn guest(&mut self) {
        self.driver.reap_tx();
        for _ in 0..self.seeded.below(12) {
            let payload = self.guest_sends.to_le_bytes();
            let piece = 1 + self.seeded.below(8) as usize;
            if !self.driver.send(&rw(7), &payload, piece) {
                break;
            }
            self.guest_sends += 1;
            if self.seeded.below(5) == 0 {
                // Too short for a header: it is returned unused, in its order.
                let head = self.driver.tx.next_head().map(memory::tx_payload);
                if let Some(addr) = head {
                    let len = 7;
                    let buffer = adit_testkit::queue::Buffer { addr, len };
                    self.driver.send_buffers(&[buffer]);
                }
            }
        }
        self.driver.tx.publish();
        let mut payload = Vec::new();
        for _ in 0..self.seeded.below(20) {
            if self.driver.receive(&mut payload).is_none() {
                break;
            }
            assert_eq!(payload, self.guest_expects.to_le_bytes());
            self.guest_expects += 1;
            payload.clear();
        }
        self.driver.rx.publish();
    }

    /// Runs one burst. Returns false if the device must be dropped in the middle of it.
    fn burst(&mut self) -> bool {
        let (mut expects, mut sends) = (self.host_expects, self.host_sends);
        self.device.begin();
        for _ in 0..self.seeded.below(10) {
            let Some(mut packet) = self.device.rx().expect("no fault") else {
                break;
            };
            let mut payload = [0; 8];
            // A packet is consumed even if nothing of it is read.
            if self.seeded.below(4) > 0 {
                assert_eq!(packet.read(&mut payload).expect("readable"), 8);
                assert_eq!(u64::from_le_bytes(payload), expects);
            }
            expects += 1;
        }
        for _ in 0..self.seeded.below(10) {
            let give_back = self.seeded.below(4) == 0;
            let Some(mut slot) = self.device.tx(Lane::Bulk, 8).expect("no fault") else {
                break;
            };
            slot.write(&sends.to_le_bytes()).expect("writable");
            if give_back {
                continue;
            }
            slot.commit(&rw(7));
            sends += 1;
        }
        if self.seeded.below(3) == 0 {
            self.seen_again += expects - self.host_expects + sends - self.host_sends;
            return false;
        }
        self.device.flush();
        (self.host_expects, self.host_sends) = (expects, sends);
        true
    }

    fn go(&mut self, rounds: u64) {
        for _ in 0..rounds {
            self.guest();
            if !self.burst() || self.seeded.below(4) == 0 {
                self.device = successor(&self.driver, self.features);
            }
        }
    }
}

#[test]
fn a_successor_loses_nothing_and_repeats_no_published_packet() {
    for seed in 1..=12 {
        let features = match seed % 2 {
            0 => FEATURES,
            _ => FEATURES & !EVENT_IDX,
        };
        let config = DriverConfig {
            event_idx: features & EVENT_IDX != 0,
            ..DriverConfig::LINUX_6_1
        };
        let mut run = Run::new(seed * 0x9e37_79b9, config, features);
        run.go(2000);
        assert!(run.seen_again > 500, "seed {seed}");
        assert!(
            run.host_expects > 500 && run.guest_expects > 500,
            "seed {seed}"
        );
        assert!(run.host_expects <= run.guest_sends);
        assert!(run.guest_expects <= run.host_sends);
    }
}
