//! A device is saved with its VM and continues in another process: exactly where it stopped, or not at all (R35).

mod common;

use std::sync::Arc;

use adit_channel::device::{
    ActivateError, DeviceState, EVENT_QUEUE, FEATURES, RestoreError, STATE_BYTES, StateError,
};
use adit_engine::{Op, SessionChange};
use adit_testkit::queue::{Buffer, DriverQueue};
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};
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
    queues.event = Some(event.queue().into());
    device.activate(mem, queues, signals.clone()).unwrap();
    device.take_session_change();
    let rig = Rig {
        device,
        driver,
        signals,
    };
    (rig, event)
}

/// Simulates that the process ended and another process continues with the memory.
fn another(rig: &mut Rig, state: &DeviceState) -> Result<(), RestoreError> {
    rig.device = Device::new(cid(), 1).unwrap();
    rig.signals = Arc::new(Signals::default());
    let (mem, signals) = (rig.driver.memory().clone(), rig.signals.clone());
    rig.device.restore(state, mem, [None, None], signals)
}

fn send(rig: &mut Rig, payload: &[u8]) {
    let mut stream = adit_testkit::stream::GuestStream::new(1024, 7);
    let header = stream.payload(payload.len() as u32);
    assert!(rig.driver.send(&header, payload, 4096));
    rig.driver.tx.publish();
}

#[test]
fn a_restored_device_continues_at_its_position_in_a_new_session() {
    let (mut rig, _event) = rig();
    send(&mut rig, b"before");
    assert_eq!(rig.receive().unwrap().len(), 1);
    let saved = rig.device.save();
    let state = DeviceState::parse(&saved.to_bytes()).unwrap();
    assert_eq!(state, saved);
    // Packets after the snapshot are not lost, and those before it do not arrive twice.
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
fn the_guest_gets_the_reset_event_as_soon_as_it_posts_a_buffer() {
    let (mut rig, mut event) = rig();
    let state = rig.device.save();
    another(&mut rig, &state).unwrap();
    assert!(!rig.device.tell_transport_reset().unwrap(), "no buffer");
    // A buffer that is too small and one outside memory are returned unused.
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
    assert!(event.publish(), "the device asks for a kick");
    assert!(rig.device.tell_transport_reset().unwrap());
    let id: u32 = mem.read_obj(vm_memory::GuestAddress(addr)).unwrap();
    assert_eq!(id, 0, "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    assert_eq!(event.pop_used(), Some((0, 0)));
    assert_eq!(event.pop_used(), Some((1, 0)));
    assert_eq!(event.pop_used(), Some((head, 4)));
}

#[test]
fn memory_without_the_event_queue_is_refused() {
    let (mut rig, _event) = rig();
    let [event, ..] = memory::queue_addrs(EVENT_QUEUE);
    let ranges = [(vm_memory::GuestAddress(0), event as usize)];
    let smaller = Arc::new(VmMemory::from_ranges(&ranges).unwrap());
    let refused = rig.device.set_memory(smaller).unwrap_err();
    let expected = matches!(
        refused,
        ActivateError::QueueAddress {
            queue: EVENT_QUEUE,
            ..
        }
    );
    assert!(expected, "{refused}");
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
    assert!(
        rig.device.tell_transport_reset().unwrap(),
        "there is no driver to inform"
    );
}

#[test]
fn r35_an_altered_state_is_refused_or_harmless() {
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
        // Some bits are addresses or positions. Whatever they are, nothing outside guest memory is accessed.
        let _ = rig.receive();
        let _ = rig.device.tell_transport_reset();
    }
    assert!(refused > STATE_BYTES * 8 / 2, "{refused}");
}
