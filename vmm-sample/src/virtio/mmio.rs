//! The virtio-mmio transport, version 2 (virtio 1.3 §4.2): one window of registers a device.
//!
//! ```text
//! 0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK        any state ── status 0 ──► 0
//!                    features   queues         activated        a fault adds NEEDS_RESET
//! ```
//! A register written out of turn is ignored: features before FEATURES_OK only, queues between it and DRIVER_OK.
//! QueueNotify never comes here: it is an ioeventfd.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

use super::{Activation, Device, Interrupt, Memory};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"adit");
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// What a queue's registers say.
#[derive(Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    /// Descriptors, available ring, used ring.
    addresses: [u64; 3],
}

/// A saved window with its device.
#[derive(Serialize, Deserialize)]
pub struct TransportState {
    device_id: u32,
    status: u32,
    selectors: [u32; 3],
    driver_features: u64,
    interrupt: u32,
    queues: Vec<QueueRegisters>,
    device: Vec<u8>,
}

/// A window's registers.
pub struct Transport {
    device: Box<dyn Device>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    queues: Vec<Queue>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

impl Transport {
    /// # Errors
    /// A queue size of the device is no power of two.
    pub fn new(
        device: Box<dyn Device>,
        memory: Memory,
        interrupt: Arc<Interrupt>,
    ) -> anyhow::Result<Self> {
        let sizes = device.queue_sizes().iter();
        let queues = sizes
            .map(|&size| Queue::new(size))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            memory,
            interrupt,
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        })
    }

    /// Reads the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            return self
                .device
                .read_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
        }
        // Registers are 32 bits wide and are read whole (§4.2.2.2).
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.register(offset as u32).to_le_bytes();
        }
    }

    fn register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |q| q.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |q| q.ready().into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory region (§4.2.2): a length of -1.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // ConfigGeneration: no configuration ever changes. All else is write-only or not there.
            _ => 0,
        }
    }

    /// Writes the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= u64::from(VIRTIO_MMIO_CONFIG) {
            return self
                .device
                .write_config(offset - u64::from(VIRTIO_MMIO_CONFIG), data);
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match offset as u32 {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.is(VIRTIO_CONFIG_S_DRIVER) => {
                if self.is(VIRTIO_CONFIG_S_FEATURES_OK) {
                    return;
                }
                let (keep, set) = match self.driver_features_sel {
                    0 => (!0xffff_ffff, u64::from(value)),
                    1 => (0xffff_ffff, u64::from(value) << 32),
                    _ => return,
                };
                self.driver_features = self.driver_features & keep | set;
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            offset => self.write_queue(offset, value),
        }
    }

    fn is(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        if !self.is(VIRTIO_CONFIG_S_FEATURES_OK) || self.is(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        match offset {
            // Too large or no power of two: the queue keeps what it has.
            VIRTIO_MMIO_QUEUE_NUM => {
                if let Ok(size) = u16::try_from(value) {
                    queue.set_size(size);
                }
            }
            VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // Bits are only ever added, each after those before it.
        let steps = [
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
        ];
        for step in steps {
            if value & step == 0 {
                return;
            }
            if self.is(step) {
                continue;
            }
            match step {
                VIRTIO_CONFIG_S_FEATURES_OK if !self.features_fit() => return,
                VIRTIO_CONFIG_S_DRIVER_OK => {
                    // Also when it fails: the driver reads both bits.
                    self.status |= step;
                    return self.activate();
                }
                _ => self.status |= step,
            }
        }
    }

    fn features_fit(&self) -> bool {
        self.driver_features & !self.device.features() == 0 && self.driver_features & VERSION_1 != 0
    }

    /// What the device gets: copies, so that registers written later change nothing.
    fn activation(&mut self) -> anyhow::Result<Activation> {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
        }
        let copy = |q: &Queue| Queue::try_from(q.state()).map_err(anyhow::Error::from);
        let queues = self.queues.iter().map(copy).collect::<Result<Vec<_>, _>>();
        Ok(Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues: queues?,
            interrupt: self.interrupt.clone(),
        })
    }

    fn activate(&mut self) {
        let activation = self.activation();
        let activated = activation.and_then(|with| self.device.activate(with));
        if let Err(e) = activated {
            eprintln!("adit-vmm: virtio device {}: {e:#}", self.device.id());
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            self.interrupt.config();
        }
    }

    /// Holds the device; returns the window.
    ///
    /// # Errors
    /// The device cannot be held.
    pub fn pause(&mut self) -> anyhow::Result<TransportState> {
        let registers = |q: &Queue| QueueRegisters {
            size: q.size(),
            ready: q.ready(),
            addresses: [q.desc_table(), q.avail_ring(), q.used_ring()],
        };
        Ok(TransportState {
            device_id: self.device.id(),
            status: self.status,
            selectors: [
                self.device_features_sel,
                self.driver_features_sel,
                self.queue_sel,
            ],
            driver_features: self.driver_features,
            interrupt: self.interrupt.status(),
            queues: self.queues.iter().map(registers).collect(),
            device: self.device.pause()?,
        })
    }

    /// Lets the device go on.
    pub fn resume(&mut self) {
        self.device.resume();
    }

    /// Makes a new window what the saved one was.
    ///
    /// # Errors
    /// It is another device's, or its queues cannot be used.
    pub fn restore(&mut self, state: &TransportState) -> anyhow::Result<()> {
        let id = self.device.id();
        anyhow::ensure!(
            state.device_id == id && state.queues.len() == self.queues.len(),
            "the snapshot has virtio device {} where this machine has {id}: give it the same devices",
            state.device_id
        );
        [
            self.device_features_sel,
            self.driver_features_sel,
            self.queue_sel,
        ] = state.selectors;
        self.driver_features = state.driver_features;
        self.status = state.status;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            queue.set_size(saved.size);
            let [desc, avail, used] = saved
                .addresses
                .map(|a| (Some(a as u32), Some((a >> 32) as u32)));
            queue.set_desc_table_address(desc.0, desc.1);
            queue.set_avail_ring_address(avail.0, avail.1);
            queue.set_used_ring_address(used.0, used.1);
            queue.set_ready(saved.ready);
        }
        let active = self.is(VIRTIO_CONFIG_S_DRIVER_OK) && !self.is(VIRTIO_CONFIG_S_NEEDS_RESET);
        anyhow::ensure!(
            !active || self.features_fit(),
            "saved features are not on offer"
        );
        let with = match active {
            true => Some(self.activation()?),
            false => None,
        };
        self.device.restore(&state.device, with)?;
        self.interrupt.restore(state.interrupt);
        if active {
            // One that was on its way when the machine was held may be lost; one too many does no harm.
            self.interrupt.used();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.status = 0;
        (self.device_features_sel, self.driver_features_sel) = (0, 0);
        (self.driver_features, self.queue_sel) = (0, 0);
        self.interrupt.clear();
        for kick in self.device.kicks() {
            // Empty already: nobody kicked. What is left of the old queues must not wake the new ones.
            let _ = kick.read();
        }
    }
}
