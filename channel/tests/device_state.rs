//! A device that is saved with its VM and goes on in another process: from where it stood, or not at all (R35).

mod common;

use std::sync::Arc;

use adit_benches::queue::{Buffer, DriverQueue};
use adit_benches::{Driver, DriverConfig, memory};
use adit_channel::device::{
    DeviceState, EVENT_QUEUE, FEATURES, RestoreError, STATE_BYTES, StateError,
};
use adit_engine::{Op, SessionChange};
use common::{Device, Rig, Signals, cid};
use vm_memory::Bytes;

/// A device with all three queues, and the driver's end of the third.
fn rig() -> (Rig, DriverQueue) {
    let mem = memory::anonymous();
    let event = DriverQueue::new(mem.clone(), EVENT_QUEUE, 8, true);
    let driver = Driver::new(mem.clone(), cid(), DriverConfig::LINUX_6_12);
    let signals = Arc::new(Signals::default());
    let mut device = Device::new(cid(), 1).unwrap();
    device.ack_features(FEATURES).unwrap();
    let mut queues = driver.queues();
    queues.event = Some(event.queue());
    device.activate(mem, queues, signals.clone()).unwrap();
    device.take_session_change();
    let rig = Rig {
        device,
        driver,
        signals,
    };
    (rig, event)
}

/// As if the process ended and another went on with the memory.
fn another(rig: &mut Rig, state: &DeviceState) -> Result<(), RestoreError> {
    rig.device = Device::new(cid(), 1).unwrap();
    rig.signals = Arc::new(Signals::default());
    let (mem, signals) = (rig.driver.memory().clone(), rig.signals.clone());
    rig.device.restore(state, mem, [None, None], signals)
}

fn send(rig: &mut Rig, payload: &[u8]) {
    let mut stream = adit_benches::stream::GuestStream::new(1024, 7);
    let header = stream.payload(payload.len() as u32);
    assert!(rig.driver.send(&header, payload, 4096));
    rig.driver.tx.publish();
}

#[test]
fn a_restored_device_goes_on_where_it_stood_in_a_new_session() {
    let (mut rig, _event) = rig();
    send(&mut rig, b"before");
    assert_eq!(rig.receive().unwrap().len(), 1);
    let saved = rig.device.save();
    let state = DeviceState::parse(&saved.to_bytes()).unwrap();
    assert_eq!(state, saved);
    // What the guest sent after the snapshot was taken is not lost, what came before is not seen twice.
    send(&mut rig, b"after");
    another(&mut rig, &state).unwrap();
    let begun = SessionChange::Restored { epoch: 2 };
    assert_eq!(rig.device.take_session_change(), Some(begun));
    let packets = rig.receive().unwrap();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].1, b"after");
    assert_eq!(packets[0].0.op, Op::Rw as u16);
}

#[test]
fn the_guest_is_told_as_soon_as_it_has_a_buffer_for_it() {
    let (mut rig, mut event) = rig();
    let state = rig.device.save();
    another(&mut rig, &state).unwrap();
    assert!(!rig.device.tell_transport_reset().unwrap(), "no buffer");
    // Too small, and not in memory: given back unused.
    let bad = [(0x1000, 2), (u64::MAX - 7, 4)];
    for (addr, len) in bad {
        event.add(&[Buffer { addr, len }], true).unwrap();
    }
    event.publish();
    assert!(!rig.device.tell_transport_reset().unwrap());
    let addr = memory::rx_page(0);
    let mem = rig.driver.memory().clone();
    mem.write_obj(u32::MAX, vm_memory::GuestAddress(addr))
        .unwrap();
    let head = event.add(&[Buffer { addr, len: 4 }], true).unwrap();
    assert!(event.publish(), "the device wants to be kicked for it");
    assert!(rig.device.tell_transport_reset().unwrap());
    let id: u32 = mem.read_obj(vm_memory::GuestAddress(addr)).unwrap();
    assert_eq!(id, 0, "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    assert_eq!(event.pop_used(), Some((0, 0)));
    assert_eq!(event.pop_used(), Some((1, 0)));
    assert_eq!(event.pop_used(), Some((head, 4)));
}

#[test]
fn a_device_without_a_session_is_saved_without_one() {
    let device = Device::new(cid(), 9).unwrap();
    let state = DeviceState::parse(&device.save().to_bytes()).unwrap();
    assert!(!state.has_session());
    assert_eq!(state.next_epoch(), 9);
    let (mut rig, _event) = rig();
    another(&mut rig, &state).unwrap();
    assert!(!rig.device.is_active());
    assert!(rig.device.tell_transport_reset().unwrap(), "nobody to tell");
}

#[test]
fn r35_no_altered_state_is_believed() {
    let (mut rig, _event) = rig();
    let good = rig.device.save().to_bytes();
    for len in 0..STATE_BYTES {
        let cut = DeviceState::parse(&good[..len]);
        assert_eq!(cut, Err(StateError::Length { len }));
    }
    let mut refused = 0;
    for bit in 0..STATE_BYTES * 8 {
        let mut bytes = good;
        bytes[bit / 8] ^= 1 << (bit % 8);
        let Ok(state) = DeviceState::parse(&bytes) else {
            refused += 1;
            continue;
        };
        if another(&mut rig, &state).is_err() {
            assert!(!rig.device.is_active());
            refused += 1;
            continue;
        }
        // Some bits say where in memory, or how far; whatever they say, nothing is touched outside it.
        let _ = rig.receive();
        let _ = rig.device.tell_transport_reset();
    }
    assert!(refused > STATE_BYTES * 8 / 2, "{refused}");
}
