//! Register writes in every state, over the bus, to the real devices: R15, R16, R20, R35.

mod common;

use adit_vmm_sample::virtio::mmio::TransportState;
use common::{DISK, VSOCK, Vm};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

/// The values that a driver writes to the status register, in order.
const STATES: [u32; 5] = [0, 1, 3, 0xb, 0xf];
const NEEDS_RESET: u32 = 0x40;
const VERSION_1: u64 = 1 << 32;
/// An address behind the end of RAM.
const NOWHERE: u64 = 1 << 40;

/// The saved state of the vsock window.
fn saved(vm: &Vm) -> TransportState {
    let mut transport = vm.transport();
    let state = transport.pause().unwrap();
    transport.resume();
    state
}

fn bytes(vm: &Vm) -> Vec<u8> {
    postcard::to_stdvec(&saved(vm)).unwrap()
}

#[test]
fn a_well_behaved_driver_is_served_again_and_again() {
    let mut vm = Vm::new();
    assert_eq!(vm.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(vm.get(VIRTIO_MMIO_DEVICE_ID), 19);
    assert_eq!(vm.get(VIRTIO_MMIO_CONFIG), 3, "the CID");
    for _ in 0..3 {
        vm.honest();
    }
    vm.put(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(vm.status(), 0);
}

#[test]
fn r20_any_register_write_in_any_state_does_no_harm() {
    let mut vm = Vm::new();
    for base in [VSOCK, DISK] {
        for status in STATES {
            for register in (0..0x110).step_by(4) {
                for value in [u32::MAX, 0x8000_0001, 1, 0] {
                    let at = base + u64::from(register);
                    vm.put_at(base, VIRTIO_MMIO_STATUS, status);
                    vm.put_at(base, register, value);
                    vm.bus.mmio_write(at + 1, &[0x7f]);
                    vm.bus.mmio_write(at, &[0xff; 8]);
                    vm.get_at(base, register);
                    vm.bus.mmio_read(at + 3, &mut [0; 2]);
                }
            }
        }
    }
    vm.honest();
    let ring = vm.boot_disk(common::DISK_RING);
    assert_eq!(ring.used(&vm), 0);
}

#[test]
fn r20_registers_written_later_do_not_move_an_active_queue() {
    let mut vm = Vm::new();
    let mut stream = vm.open();
    vm.exchange(&mut stream, 100);
    vm.put(VIRTIO_MMIO_QUEUE_SEL, 1);
    let before = bytes(&vm);
    for register in [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_CONFIG,
    ] {
        vm.put(register, 0x1_0000);
        vm.put(register, 0);
    }
    assert_eq!(bytes(&vm), before);
    vm.exchange(&mut stream, 100);
}

#[test]
fn r15_what_was_negotiated_stays_until_a_reset() {
    let mut vm = Vm::new();
    let mut stream = vm.open();
    let before = bytes(&vm);
    // A second handshake: backwards, forwards, with more features, with none, in halves that do not exist.
    for status in [3, 1, 0xb, 0x8, 0x4, 0xf, 0xff] {
        vm.put(VIRTIO_MMIO_STATUS, status);
        for half in [0, 1, 2, u32::MAX] {
            vm.put(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            vm.put(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
            vm.put(VIRTIO_MMIO_DRIVER_FEATURES, 0);
        }
        assert_eq!(vm.status(), 0xf);
    }
    vm.put(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    assert_eq!(bytes(&vm), before, "the session changed");
    vm.exchange(&mut stream, 1000);
    // A feature that was not offered, or no VERSION_1: FEATURES_OK is refused, and so is everything after it.
    for bit in (0..64).filter(|bit| adit_channel::device::FEATURES & 1 << bit == 0) {
        vm.negotiate(VSOCK, VERSION_1 | 1 << bit);
        vm.put(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(vm.status(), 3, "feature {bit} was not offered");
    }
    vm.negotiate(VSOCK, 0);
    vm.put(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!(vm.status(), 3, "a legacy driver is refused");
    vm.negotiate(VSOCK, VERSION_1);
    vm.put(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    assert_eq!(vm.status(), 0xb);
    vm.honest();
}

#[test]
fn r16_queues_that_overflow_or_end_outside_are_refused() {
    let mut vm = Vm::new();
    let good = vm.driver.tx.addrs();
    let ram = adit_testkit::memory::MEMORY_BYTES as u64;
    let bad = [
        u64::MAX,
        u64::MAX - 15,
        u64::MAX - 4095,
        1 << 63,
        NOWHERE,
        ram,
        ram - 16,
    ];
    let mut refused = 0;
    for (base, queues) in [(VSOCK, 3), (DISK, 1)] {
        for (part, addr) in (0..3).flat_map(|part| bad.map(|addr| (part, addr))) {
            for lost in 0..queues {
                vm.negotiate(base, VERSION_1);
                for queue in 0..queues {
                    let mut addrs = good.map(|a| a + 0x1_0000 * u64::from(queue));
                    if queue == lost {
                        addrs[part] = addr;
                    }
                    vm.queue_at(base, queue, 128, addrs);
                }
                vm.put_at(base, VIRTIO_MMIO_STATUS, 0xf);
                let status = vm.get_at(base, VIRTIO_MMIO_STATUS);
                assert_eq!(status, 0xf | NEEDS_RESET, "{base:#x} {part} {addr:#x}");
                let why = vm.get_at(base, VIRTIO_MMIO_INTERRUPT_STATUS);
                assert_eq!(why, 3, "InterruptStatus says so");
                vm.put_at(base, VIRTIO_MMIO_INTERRUPT_ACK, 2);
                assert_eq!(vm.get_at(base, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 3 * bad.len() * 4);
    vm.honest();
    // A table of a million descriptors; the device must read only the first few.
    let table = adit_testkit::memory::tx_payload(0);
    vm.driver.tx.write_desc(0, table, 16 << 20, 4, 0);
    vm.driver.tx.push(0);
    vm.driver.tx.publish();
    vm.until_tx_is_returned();
    vm.honest();
}

#[test]
fn r35_a_saved_window_fits_only_a_device_of_its_kind() {
    let mut vm = Vm::new();
    let head = GuestAddress(vm.driver.tx.addrs()[1] + 2);
    vm.memory.write_obj(7u16, head).unwrap();
    let saved = saved(&vm);
    let bytes = postcard::to_stdvec(&saved).unwrap();
    let other = Vm::on(vm.memory.clone(), vm.config);
    other.transport().restore(&saved).unwrap();
    assert_eq!(other.status(), 0xf);
    assert!(
        other.irq.read().is_ok(),
        "an interrupt, because one may have been lost"
    );
    // A damaged state is refused, or has no effect outside guest memory.
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0xff;
        if let Ok(altered) = postcard::from_bytes::<TransportState>(&bytes) {
            let other = Vm::on(vm.memory.clone(), vm.config);
            let _ = other.transport().restore(&altered);
        }
    }
    vm.honest();
}
