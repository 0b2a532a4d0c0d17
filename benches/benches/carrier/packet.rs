//! A packet of 64 bytes from the guest, in the device alone: its guest memory given as raw regions, and as a type of our
//! `vm-memory`. Both in one process and by turns, so that both have the same noise.
#![allow(unsafe_code)] // promises to the device where guest memory is

use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_benches::report::median;
use adit_channel::carrier::{Carrier, RxPacket};
use adit_channel::device::raw::{FnSignal, RawMemory, RawRegion};
use adit_channel::device::{FEATURES, GuestCid, VsockDevice};
use adit_engine::{Kind, Op, PacketHeader};
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};
use vm_memory::GuestAddressSpace;

use crate::SMALL;

const TURNS: usize = 41;
/// Packets in one measured burst. They fill most of a queue of 128; each has two descriptors, in an indirect table.
const BURST: usize = 100;
const BURSTS: usize = 50;

/// Median of the time that the device takes for a packet, ns: through raw regions, and through `GuestAddressSpace`.
pub fn both() -> [f64; 2] {
    let (mut raw, mut own) = (Bench::new(described), Bench::new(|mem| mem));
    let (mut through_raw, mut through_own) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        let mut measure_own = || through_own.push(own.packet());
        if turn % 2 == 0 {
            measure_own();
            through_raw.push(raw.packet());
        } else {
            through_raw.push(raw.packet());
            measure_own();
        }
    }
    [median(&through_raw), median(&through_own)]
}

/// The harness's memory as a VMM would describe it.
fn described(mem: Arc<VmMemory>) -> Arc<RawMemory> {
    let whole = memory::first(&mem);
    let region = RawRegion {
        guest_addr: 0,
        len: whole.len(),
        host: whole.ptr_guard_mut().as_ptr(),
        dirty: None,
    };
    // SAFETY: `mem`, which is the owner, keeps the region mapped. The harness has no reference into it.
    unsafe { RawMemory::new(vec![region], mem) }.expect("a good region")
}

struct Bench<M: GuestAddressSpace> {
    driver: Driver,
    device: VsockDevice<M>,
}

impl<M: GuestAddressSpace> Bench<M> {
    fn new(given: impl Fn(Arc<VmMemory>) -> M) -> Self {
        let cid = GuestCid::new(3).expect("a guest's CID");
        let driver = Driver::new(memory::anonymous(), cid, DriverConfig::LINUX_6_1);
        let mut device = VsockDevice::new(cid, 1).expect("a descriptor");
        device.ack_features(FEATURES).expect("offered features");
        let quiet = Arc::new(FnSignal::per_queue(|_| {}));
        device
            .activate(given(driver.memory().clone()), driver.queues(), quiet)
            .expect("a usable device");
        // No port handles the session here.
        let _ = device.take_session_change();
        Self { driver, device }
    }

    /// Time for a packet, ns.
    fn packet(&mut self) -> f64 {
        let header = PacketHeader {
            src_port: 9,
            dst_port: 741,
            kind: Kind::Stream as u16,
            op: Op::Rw as u16,
            ..PacketHeader::default()
        };
        let mut took = Duration::ZERO;
        for _ in 0..BURSTS {
            for _ in 0..BURST {
                let sent = self.driver.send(&header, &[7; SMALL], SMALL);
                assert!(sent, "the queue has room");
            }
            self.driver.tx.publish();
            let begin = Instant::now();
            let taken = self.take();
            took += begin.elapsed();
            assert_eq!((taken, self.driver.reap_tx()), (BURST, BURST));
        }
        took.as_nanos() as f64 / (BURST * BURSTS) as f64
    }

    fn take(&mut self) -> usize {
        let (mut taken, mut payload) = (0, [0; SMALL]);
        self.device.begin();
        while let Some(mut packet) = self.device.rx().expect("no fault") {
            assert_eq!(packet.read(&mut payload).expect("readable"), SMALL);
            taken += 1;
        }
        self.device.flush();
        taken
    }
}
