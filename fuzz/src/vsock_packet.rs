//! Target `vsock_packet`: a driver whose virtqueues are valid and whose packets are not. Every packet goes through guest memory,
//! virtqueues, device and engine. The results are compared with what was sent, in both directions.

use std::collections::VecDeque;
use std::sync::Arc;

use adit_channel::carrier::{Armed, Carrier, Interest, RxPacket};
use adit_channel::device::{FEATURES, GuestCid, HOST_CID, RX_QUEUE, Signal, TX_QUEUE, WireHeader};
use adit_engine::{Lane, Op, ResetReason};
use adit_testkit::session::Device;
use adit_testkit::{Driver, DriverConfig, RxShape, VmMemory, memory};

use crate::engine_ops::packet;
use crate::input::Input;
use crate::pattern::{Sent, body, fill};
use crate::shell::Shell;

const CID: u64 = 3;
const QUEUE: u16 = 16;

struct Quiet;
impl Signal for Quiet {
    fn signal(&self, _queue: u16) {}
}

/// Reused from one input to the next.
struct Fixture {
    mem: Arc<VmMemory>,
    device: Device,
}

thread_local! {
    static FIXTURE: std::cell::RefCell<Option<Fixture>> = const { std::cell::RefCell::new(None) };
}

fn cid() -> GuestCid {
    GuestCid::new(CID).expect("a guest's CID")
}

/// Runs one input.
pub fn run(data: &[u8]) {
    FIXTURE.with_borrow_mut(|kept| {
        let mut fixture = kept.take().unwrap_or_else(|| Fixture {
            mem: memory::anonymous(),
            device: Device::new(cid(), 1).expect("a descriptor"),
        });
        World::new(&mut fixture, &mut Input(data)).run(&mut Input(data.get(24..).unwrap_or(&[])));
        *kept = Some(fixture);
    });
}

struct World<'f> {
    device: &'f mut Device,
    driver: Driver,
    shell: Shell,
    /// Packets that the device must return.
    to_host: VecDeque<Sent>,
    /// Packets that the guest must receive.
    to_guest: VecDeque<Sent>,
    foreign: u64,
    serial: u8,
}

impl<'f> World<'f> {
    fn new(fixture: &'f mut Fixture, input: &mut Input<'_>) -> Self {
        let shape = input.u8();
        let config = DriverConfig {
            queue_size: QUEUE,
            rx: if shape & 1 == 0 {
                RxShape::OnePage
            } else {
                RxShape::HeaderAndPage
            },
            event_idx: shape & 2 == 0,
            indirect: shape & 4 == 0,
        };
        let driver = Driver::empty(fixture.mem.clone(), cid(), config);
        for queue in [RX_QUEUE, TX_QUEUE] {
            for ring in &memory::queue_addrs(queue)[1..] {
                driver.write(*ring, &[0; 4 + 8 * QUEUE as usize + 2]);
            }
        }
        let device = &mut fixture.device;
        device.reset(ResetReason::Epoch);
        let bit = |on: bool, bit: u32| if on { 1 << bit } else { 0 };
        let off = bit(shape & 2 != 0, 29) | bit(shape & 4 != 0, 28);
        device.ack_features(FEATURES & !off).expect("offered");
        let queues = driver.queues();
        device
            .activate(fixture.mem.clone(), queues, Arc::new(Quiet))
            .expect("usable queues");
        let _ = device.take_session_change();
        let foreign = device.counters().dropped_cid;
        Self {
            device,
            driver,
            shell: Shell::new(input),
            to_host: VecDeque::new(),
            to_guest: VecDeque::new(),
            foreign,
            serial: 0,
        }
    }

    fn run(mut self, input: &mut Input<'_>) {
        while !input.is_empty() {
            match input.u8() % 16 {
                0..=7 => self.send(input),
                8..=10 => self.burst(input),
                11 => {
                    // The guest posts some or all of its buffers.
                    for _ in 0..=input.u8() % QUEUE as u8 {
                        self.driver.post_rx();
                    }
                    self.driver.rx.publish();
                }
                12 => self.receive(),
                13 | 14 => self.shell.command(input),
                _ => self.shell.wait(input),
            }
            self.shell.events(input);
        }
        // The input has ended, so no packet may be missing any more.
        self.burst(input);
        self.receive();
        self.driver.reap_tx();
        assert_eq!(
            self.driver.tx.free_descriptors(),
            usize::from(QUEUE),
            "descriptors were lost"
        );
        assert!(self.to_host.is_empty(), "packets were lost");
        assert_eq!(self.device.counters().dropped_cid, self.foreign);
        self.shell.session(None);
    }

    fn send(&mut self, input: &mut Input<'_>) {
        if self.driver.tx.next_head().is_none() {
            self.burst(input);
            self.driver.reap_tx();
        }
        self.send_now(input);
    }

    fn send_now(&mut self, input: &mut Input<'_>) {
        let mut h = packet(input, &self.shell);
        let shape = input.u8();
        let len = match shape & 3 {
            0 => h.len as usize % 64,
            1 => h.len as usize % 8192,
            _ => 0,
        };
        // The length in the header may be wrong.
        if shape & 0x0c != 0 && (h.op == Op::Rw as u16) {
            h.len = len as u32;
        }
        let piece = if shape & 0x10 != 0 {
            1 + len / 4
        } else {
            len.max(1)
        };
        let (mut src, mut dst) = (CID, HOST_CID);
        if shape & 0xe0 == 0xe0 {
            let claim = input.pick(&[0, 1, 2, 3, 4, u64::from(u32::MAX), 3 | 1 << 32, u64::MAX]);
            *(if input.flag() { &mut src } else { &mut dst }) = claim;
        }
        let Some(head) = self.driver.tx.next_head() else {
            return;
        };
        self.serial = self.serial.wrapping_add(1);
        self.driver
            .write(memory::tx_payload(head), body(self.serial, len));
        if !self
            .driver
            .send_wire(&WireHeader::new(src, dst, &h), len, piece)
        {
            return; // not enough descriptors are left
        }
        self.driver.tx.publish();
        if (src, dst) == (CID, HOST_CID) {
            self.to_host.push_back((h, len, self.serial));
        } else {
            self.foreign += 1;
        }
    }

    /// One burst of the host, as a port does it.
    fn burst(&mut self, input: &mut Input<'_>) {
        self.device.begin();
        while let Some(mut packet) = self.device.rx().expect("the rings are in order") {
            let (h, len, seed) = self.to_host.pop_front().expect("a packet that nobody sent");
            assert_eq!((*packet.header(), packet.remaining() as usize), (h, len));
            let quiet = !self.shell.engine.wants_transmit();
            let delivered = self.shell.packet(&h, len as u32) as usize;
            let mut got = vec![0; delivered];
            assert_eq!(packet.read(&mut got).expect("readable"), delivered);
            assert!(got == body(seed, len)[..delivered], "payload differs");
            drop(packet);
            self.shell.events(input);
            let answered = quiet && self.shell.engine.wants_transmit();
            assert!(!answered || h.op != Op::Rst as u16, "a reset was answered");
        }
        self.transmit();
        self.device.flush();
        // The guest may send just when the host goes to sleep.
        let late = input.u8() & 3 == 3;
        if late {
            let before = self.sent();
            self.send_now(input);
            if self.sent() == before {
                return self.sleep(Armed::Sleep);
            }
        }
        self.sleep(if late {
            Armed::WorkAppeared
        } else {
            Armed::Sleep
        });
    }

    /// Packets that the device has not returned or dropped yet.
    fn sent(&self) -> u64 {
        self.to_host.len() as u64 + self.foreign
    }

    fn sleep(&mut self, expected: Armed) {
        let interest = Interest {
            rx: true,
            tx: false,
        };
        assert_eq!(self.device.arm(interest), expected);
        self.driver.reap_tx();
    }

    fn transmit(&mut self) {
        for _ in 0..4 * QUEUE {
            let Some(slot) = self
                .device
                .tx(Lane::Bulk, 4096)
                .expect("the rings are in order")
            else {
                return;
            };
            let serial = self.serial.wrapping_add(1);
            let Some(sent) = fill(&mut self.shell, slot, serial) else {
                return;
            };
            self.serial = serial;
            self.to_guest.push_back(sent);
        }
    }

    /// The guest receives all packets, and posts the buffers again.
    fn receive(&mut self) {
        let mut payload = Vec::new();
        while let Some(wire) = self.driver.receive(&mut payload) {
            let (h, len, seed) = self
                .to_guest
                .pop_front()
                .expect("a packet that nobody sent");
            assert_eq!((wire.src_cid(), wire.dst_cid()), (HOST_CID, CID));
            assert_eq!(wire.header(), h);
            assert!(payload == body(seed, len), "payload differs");
        }
        assert!(self.to_guest.is_empty(), "packets were lost");
        self.driver.rx.publish();
    }
}
