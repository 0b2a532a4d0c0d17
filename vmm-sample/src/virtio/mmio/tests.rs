//! Registers in every state, against the real devices (R20); no KVM: the eventfds are only eventfds.

use std::sync::Arc;

use adit_channel::device::GuestCid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::seccomp::Filters;
use crate::virtio::block::Block;
use crate::virtio::vsock::{Owner, Vsock};

const ALL: [u32; 5] = [0, 1, 3, 0xb, 0xf];
const MEMORY: usize = 1 << 20;

fn memory() -> Memory {
    let ranges = [(GuestAddress(0), MEMORY)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn vsock(memory: &Memory) -> Transport {
    let cid = GuestCid::new(3).unwrap();
    let device = Vsock::new(cid, &Owner::Sockets(None), &Filters::default()).unwrap();
    window(Box::new(device), memory)
}

fn window(device: Box<dyn Device>, memory: &Memory) -> Transport {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    Transport::new(device, memory.clone(), Arc::new(Interrupt::new(irq))).unwrap()
}

impl Transport {
    fn put(&mut self, register: u32, value: u32) {
        self.write(register.into(), &value.to_le_bytes());
    }

    fn get(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// As Linux does it; queue n has its rings at (n + 1) * 0x1000.
    fn drive(&mut self) -> u32 {
        self.put(VIRTIO_MMIO_STATUS, 0);
        self.put(VIRTIO_MMIO_STATUS, 1);
        self.put(VIRTIO_MMIO_STATUS, 3);
        for half in 0..2 {
            self.put(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            self.put(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let offered = self.get(VIRTIO_MMIO_DEVICE_FEATURES);
            self.put(VIRTIO_MMIO_DRIVER_FEATURES, offered);
        }
        self.put(VIRTIO_MMIO_STATUS, 0xb);
        for queue in 0..self.queues.len() as u32 {
            self.put(VIRTIO_MMIO_QUEUE_SEL, queue);
            self.put(VIRTIO_MMIO_QUEUE_NUM, 16);
            let base = (queue + 1) * 0x1000;
            self.put(VIRTIO_MMIO_QUEUE_DESC_LOW, base);
            self.put(VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400);
            self.put(VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800);
            self.put(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.put(VIRTIO_MMIO_STATUS, 0xf);
        self.get(VIRTIO_MMIO_STATUS)
    }
}

#[test]
fn a_driver_that_keeps_the_rules_is_served_again_and_again() {
    let memory = memory();
    let mut window = vsock(&memory);
    assert_eq!(window.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(window.get(VIRTIO_MMIO_DEVICE_ID), 19);
    for _ in 0..3 {
        assert_eq!(window.drive(), 0xf);
    }
    window.put(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(window.get(VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn r20_every_register_in_every_state_does_no_harm() {
    let memory = memory();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    let block = Block::open(&disk, &Filters::default()).unwrap();
    for mut window in [vsock(&memory), window(Box::new(block), &memory)] {
        for status in ALL {
            for register in (0..0x110).step_by(4) {
                for value in [u32::MAX, 0x8000_0001, 1, 0] {
                    window.put(VIRTIO_MMIO_STATUS, status);
                    window.put(register, value);
                    window.write(u64::from(register) + 1, &[0x7f]);
                    window.write(register.into(), &[0xff; 8]);
                    let _ = window.get(register);
                    window.read(u64::from(register) + 3, &mut [0; 2]);
                }
            }
        }
        assert_eq!(window.drive(), 0xf, "it serves as before");
    }
}

#[test]
fn r20_a_live_queue_stays_where_it_was() {
    let memory = memory();
    let mut window = vsock(&memory);
    assert_eq!(window.drive(), 0xf);
    let before = window.queues[1].state();
    for register in [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_DRIVER_FEATURES,
    ] {
        window.put(VIRTIO_MMIO_QUEUE_SEL, 1);
        window.put(register, 0x1_0000);
    }
    assert_eq!(window.queues[1].state(), before);
    assert_eq!(window.get(VIRTIO_MMIO_STATUS), 0xf);
}

#[test]
fn features_that_are_not_offered_and_queues_outside_memory_are_not_taken() {
    let memory = memory();
    let mut window = vsock(&memory);
    window.put(VIRTIO_MMIO_STATUS, 3);
    window.put(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    window.put(VIRTIO_MMIO_STATUS, 0xb);
    assert_eq!(window.get(VIRTIO_MMIO_STATUS), 3, "no FEATURES_OK");
    assert_eq!(window.drive(), 0xf);
    window.put(VIRTIO_MMIO_STATUS, 0);
    // Ready, but nowhere.
    let lost = |window: &mut Transport| {
        window.put(VIRTIO_MMIO_STATUS, 3);
        window.put(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        window.put(VIRTIO_MMIO_DRIVER_FEATURES, 1);
        window.put(VIRTIO_MMIO_STATUS, 0xb);
        window.put(VIRTIO_MMIO_QUEUE_DESC_LOW, MEMORY as u32);
        window.put(VIRTIO_MMIO_QUEUE_READY, 1);
        window.put(VIRTIO_MMIO_STATUS, 0xf);
        window.get(VIRTIO_MMIO_STATUS)
    };
    assert_eq!(lost(&mut window), 0x4f, "NEEDS_RESET");
    assert_eq!(window.get(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert_eq!(window.drive(), 0xf);
}

#[test]
fn a_saved_window_fits_its_own_kind_only() {
    let memory = memory();
    let mut window = vsock(&memory);
    assert_eq!(window.drive(), 0xf);
    memory.write_obj(7u16, GuestAddress(0x2402)).unwrap();
    let saved = window.pause().unwrap();
    let bytes = postcard::to_stdvec(&saved).unwrap();
    window.resume();
    let mut other = vsock(&memory);
    other.restore(&saved).unwrap();
    assert_eq!(other.get(VIRTIO_MMIO_STATUS), 0xf);
    assert_eq!(other.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    // R35: what was altered is refused, or stays inside guest memory.
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0xff;
        if let Ok(altered) = postcard::from_bytes::<TransportState>(&bytes) {
            let _ = vsock(&memory).restore(&altered);
        }
    }
}
