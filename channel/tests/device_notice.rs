//! When the device and its driver notify each other: kicks, used indices, notifications.

mod common;

use adit_channel::carrier::{Armed, Carrier, Interest, RxPacket};
use adit_channel::device::{FEATURES, RX_QUEUE, TX_QUEUE, VsockDevice};
use adit_engine::ResetReason;
use adit_testkit::{Driver, DriverConfig, memory};
use common::{Rig, cid, rw};

const RX_ONLY: Interest = Interest {
    rx: true,
    tx: false,
};

/// The driver sends `n` packets, which the device takes in one burst.
fn take(rig: &mut Rig, n: u32) {
    for i in 0..n {
        assert!(rig.driver.send(&rw(i), b"x", 1));
    }
    rig.driver.tx.publish();
    rig.receive().expect("no fault");
}

/// The device has nothing more to do. If it asked for a limited sleep, it polls again after that sleep found nothing.
fn sleep(rig: &mut Rig) {
    assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
    if rig.device.rest().is_some() {
        rig.device.begin();
        rig.device.flush();
        assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
    }
    assert_eq!(rig.device.rest(), None, "the sleep is unlimited");
}

#[test]
fn used_index_is_published_once_a_small_burst_and_in_order() {
    let mut rig = Rig::new();
    for i in 0..10 {
        assert!(rig.driver.send(&rw(i), b"x", 1));
    }
    rig.driver.tx.publish();
    rig.device.begin();
    for i in 0..10 {
        let packet = rig.device.rx().expect("no fault").expect("a packet");
        assert_eq!(packet.header().src_port, i);
        drop(packet);
        assert_eq!(rig.driver.tx.used_idx(), 0, "before the flush");
    }
    rig.device.flush();
    assert_eq!(rig.driver.tx.used_idx(), 10);
    assert_eq!(rig.signals.count(TX_QUEUE), 1);
    assert_eq!(rig.driver.reap_tx(), 10);
    rig.device.flush();
    assert_eq!(
        rig.signals.count(TX_QUEUE),
        1,
        "nothing new, no notification"
    );
}

#[test]
fn a_full_queue_is_published_by_quarters() {
    let mut rig = Rig::new();
    let size = rig.driver.tx.size();
    for i in 0..size {
        assert!(rig.driver.send(&rw(u32::from(i)), b"x", 1));
    }
    rig.driver.tx.publish();
    rig.device.begin();
    for i in 0..size {
        let packet = rig.device.rx().expect("no fault").expect("a packet");
        drop(packet);
        let quarter = size / 4;
        assert_eq!(rig.driver.tx.used_idx(), i / quarter * quarter);
    }
    // The driver asked for a notification of the first packet, and not for another.
    assert_eq!(rig.signals.count(TX_QUEUE), 1);
    rig.device.flush();
    assert_eq!(rig.driver.tx.used_idx(), size);
    assert_eq!(rig.signals.count(TX_QUEUE), 1);
    assert_eq!(rig.driver.reap_tx(), usize::from(size));
}

#[test]
fn event_idx_suppresses_notifications_the_driver_did_not_ask_for() {
    let mut rig = Rig::new();
    rig.driver.tx.set_used_event(5);
    for i in 0..8 {
        take(&mut rig, 1);
        // used_event is 5: the driver is notified when the index goes from 5 to 6.
        assert_eq!(rig.signals.count(TX_QUEUE), u64::from(i >= 5), "packet {i}");
    }
    // A burst in which the index passes used_event notifies too.
    rig.driver.tx.set_used_event(10);
    take(&mut rig, 5);
    assert_eq!(rig.signals.count(TX_QUEUE), 2);
}

#[test]
fn notifications_follow_the_flag_without_event_idx() {
    let config = DriverConfig {
        event_idx: false,
        ..DriverConfig::LINUX_6_1
    };
    let features = FEATURES & !(1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX);
    let driver = Driver::new(memory::anonymous(), cid(), config);
    let mut rig = Rig::on(driver, features);
    rig.driver.tx.disable_callback();
    rig.assert_works();
    assert_eq!(rig.signals.count(TX_QUEUE), 0);
    rig.driver.tx.enable_callback();
    rig.assert_works();
    assert_eq!(rig.signals.count(TX_QUEUE), 1);
    // Kicks are off during a burst, and on after `arm`.
    rig.device.begin();
    rig.driver.send(&rw(1), b"x", 1);
    assert!(!rig.driver.tx.publish(), "busy: no kick");
    while rig.device.rx().expect("no fault").is_some() {}
    rig.device.flush();
    assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
    rig.driver.send(&rw(1), b"x", 1);
    assert!(rig.driver.tx.publish(), "asleep: a kick");
}

#[test]
fn arm_checks_again_and_then_asks_for_one_kick() {
    let mut rig = Rig::new();
    rig.driver.send(&rw(1), b"x", 1);
    rig.driver.tx.publish();
    assert_eq!(rig.device.arm(RX_ONLY), Armed::WorkAppeared);
    assert_eq!(rig.receive().expect("no fault").len(), 1);
    assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
    rig.driver.send(&rw(1), b"x", 1);
    assert!(rig.driver.tx.publish(), "the first packet kicks");
    for _ in 0..10 {
        rig.driver.send(&rw(1), b"x", 1);
        assert!(!rig.driver.tx.publish(), "the others need not");
    }
    assert_eq!(rig.receive().expect("no fault").len(), 11);
}

#[test]
fn rx_buffers_kick_only_when_the_device_waits_for_them() {
    let mut rig = Rig::new();
    let mut payload = Vec::new();
    let both = Interest { rx: true, tx: true };
    assert_eq!(
        rig.device.arm(both),
        Armed::WorkAppeared,
        "buffers are there"
    );
    assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
    while rig.send(&rw(1), b"fill").expect("no fault") {}
    assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
    rig.driver.receive(&mut payload).expect("a packet");
    assert!(!rig.driver.rx.publish(), "nobody waits");
    assert!(rig.send(&rw(1), b"fill").expect("no fault"));
    assert_eq!(rig.device.arm(both), Armed::Sleep);
    rig.driver.receive(&mut payload).expect("a packet");
    assert!(rig.driver.rx.publish(), "the device waits");
    assert_eq!(
        rig.signals.count(RX_QUEUE),
        1,
        "used_event 0 was passed once"
    );
}

/// A driver that is interrupted for an answer also takes back the buffers of its own packets, and needs no
/// notification for them.
#[test]
fn one_notification_a_round_trip() {
    for sees in [true, false] {
        let mut rig = Rig::sharing();
        let mut payload = Vec::new();
        for _ in 0..100 {
            take(&mut rig, 1);
            assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
            assert!(rig.send(&rw(1), b"answer").expect("no fault"));
            assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
            rig.driver.receive(&mut payload).expect("a packet");
            rig.driver.rx.publish();
            rig.driver.rx.enable_callback();
            if sees {
                rig.driver.reap_tx();
                rig.driver.tx.enable_callback();
            }
        }
        assert_eq!(rig.signals.count(RX_QUEUE), 100);
        let told = rig.signals.count(TX_QUEUE);
        match sees {
            // 200 sleeps; at every 64th the device notifies, because it cannot see that the driver polls.
            true => assert!(told <= 3, "{told}"),
            // This driver never moves used_event, so it is not notified again.
            false => assert_eq!(told, 1),
        }
    }
}

#[test]
fn a_driver_that_takes_its_buffers_back_gets_one_notification_for_many() {
    let mut rig = Rig::sharing();
    let mut told = 0;
    for _ in 0..320 {
        take(&mut rig, 1);
        assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
        if rig.signals.count(TX_QUEUE) > told {
            told += 1;
            assert_eq!(rig.driver.reap_tx(), 32);
            rig.driver.tx.enable_callback();
        }
    }
    assert_eq!(told, 10, "when half of the descriptors may be free");
}

/// Whatever the shape of its packets, a driver with a full queue is notified before the burst ends.
#[test]
fn half_of_the_descriptors_causes_a_notification_at_once() {
    for pieces in [1, 3, 15] {
        let mut rig = Rig::sharing();
        let (half, buffers) = (rig.driver.tx.size() / 2, pieces as u16 + 1);
        for i in 1..=half.div_ceil(buffers) {
            assert_eq!(rig.signals.count(TX_QUEUE), 0, "{i} packets of {pieces}");
            assert!(rig.driver.send(&rw(1), &vec![7; 16 * pieces], 16));
            rig.driver.tx.publish();
            rig.receive().expect("no fault");
        }
        assert_eq!(rig.signals.count(TX_QUEUE), 1, "{pieces} pieces");
    }
}

/// It is unknown whether an earlier device notified the driver, because that device may have ended before it did.
#[test]
fn a_successor_sends_the_notification_that_may_be_missing() {
    let mut rig = Rig::sharing();
    take(&mut rig, 3);
    assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
    assert_eq!(rig.signals.count(TX_QUEUE), 0);
    let stopped = rig.device.reset(ResetReason::Epoch);
    let mut queues = rig.driver.queues();
    for (queue, base) in [
        (&mut queues.rx, stopped.bases[0]),
        (&mut queues.tx, stopped.bases[1]),
    ] {
        queue.queue.next_avail = base;
        queue.queue.next_used = base;
    }
    let mut next = VsockDevice::new(cid(), 2).expect("a descriptor");
    next.ack_features(FEATURES).expect("offered features");
    let mem = rig.driver.memory().clone();
    next.activate(mem, queues, rig.signals.clone())
        .expect("usable");
    assert!(next.take_session_change().is_some());
    rig.device = next;
    rig.device.begin();
    rig.device.flush();
    sleep(&mut rig);
    assert_eq!(rig.signals.count(TX_QUEUE), 1);
}

/// A torn device does not wake up for an outstanding notification.
#[test]
fn a_torn_device_has_no_notification_pending() {
    let mut rig = Rig::sharing();
    take(&mut rig, 1);
    assert!(rig.device.rest().is_some());
    rig.device.tear();
    assert_eq!(rig.device.rest(), None);
}

#[test]
fn a_driver_is_notified_in_the_end_even_under_other_traffic() {
    let mut rig = Rig::sharing();
    let mut payload = Vec::new();
    take(&mut rig, 1);
    for i in 0..64 {
        assert_eq!(rig.signals.count(TX_QUEUE), 0, "{i} sleeps");
        assert_eq!(rig.device.arm(RX_ONLY), Armed::Sleep);
        assert!(rig.send(&rw(1), b"x").expect("no fault"));
        rig.driver.receive(&mut payload).expect("a packet");
        rig.driver.rx.publish();
    }
    assert_eq!(rig.signals.count(TX_QUEUE), 1);
}
