//! The virtio-mmio transport, version 2 (virtio 1.3 §4.2): one window of registers a device.
//!
//! ```text
//! 0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK        any state ── status 0 ──► 0
//!                    features   queues         activated        a fault adds NEEDS_RESET
//! ```
//! A write at the wrong time is ignored: features are written before FEATURES_OK, queues between it and DRIVER_OK.
//!
//! What the guest reads is in a page that KVM maps read-only. So a read costs no exit, and only writes arrive here. Two kinds of
//! writes do not arrive either, because they are ioeventfds: QueueNotify, and the acknowledgement of a used buffer's interrupt.
//! So an interrupt causes no exit to this process. The device need not know whether it was acknowledged: the line is the
//! device's own and edge-triggered, so InterruptStatus can always say "used buffers".

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Device, Memory};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"adit");
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Bytes of a window.
pub const WINDOW: usize = 0x1000;
/// InterruptStatus: a queue may have used buffers.
pub const USED_BUFFER: u32 = 1 << 0;
/// InterruptStatus: the configuration changed, or the device needs a reset.
const CONFIG_CHANGED: u32 = 1 << 1;

/// The page that the guest reads.
#[derive(Debug)]
pub struct Page(MmapRegion);

impl Page {
    fn put(&self, register: u32, value: u32) {
        let page = self.0.as_volatile_slice();
        page.store(value.to_le(), register as usize, Ordering::SeqCst)
            .expect("an aligned place in the page");
    }

    /// The mapping, for KVM.
    pub fn mapping(&self) -> &MmapRegion {
        &self.0
    }
}

/// A device's interrupt: an irqfd, and the register in which the driver reads the reason.
#[derive(Debug)]
pub struct Interrupt {
    page: Arc<Page>,
    irq: EventFd,
}

impl Interrupt {
    /// A queue has used buffers.
    pub fn used(&self) {
        // Fails only if the counter is full, and then an interrupt is pending.
        let _ = self.irq.write(1);
    }

    /// Says whether the device needs a reset.
    fn needs_reset(&self, yes: bool) {
        // Write the reason first: the driver reads it after the interrupt.
        let why = if yes { CONFIG_CHANGED } else { 0 };
        self.page
            .put(VIRTIO_MMIO_INTERRUPT_STATUS, USED_BUFFER | why);
        if yes {
            self.used();
        }
    }
}

/// The registers of a queue.
#[derive(Clone, Default, Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    /// Descriptors, available ring, used ring.
    addresses: [u64; 3],
}

impl QueueRegisters {
    /// Makes the queue of a device that allows `max` entries.
    fn queue(&self, max: u16, event_idx: bool) -> anyhow::Result<Queue> {
        let mut queue = Queue::new(max)?;
        let [desc, avail, used] = self.addresses.map(GuestAddress);
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(desc)?;
        queue.try_set_avail_ring_address(avail)?;
        queue.try_set_used_ring_address(used)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(self.ready);
        Ok(queue)
    }
}

/// What the driver wrote.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    fn new(sizes: &[u16]) -> Self {
        let fresh = |&size: &u16| QueueRegisters {
            size,
            ..Default::default()
        };
        Self {
            queues: sizes.iter().map(fresh).collect(),
            ..Default::default()
        }
    }

    fn is(&self, bit: u32) -> bool {
        self.status & bit != 0
    }
}

/// The saved state of a window and its device.
#[derive(Serialize, Deserialize)]
pub struct TransportState {
    device_id: u32,
    registers: Registers,
    device: Vec<u8>,
}

/// A window with its device.
pub struct Transport {
    device: Box<dyn Device>,
    memory: Memory,
    interrupt: Arc<Interrupt>,
    page: Arc<Page>,
    registers: Registers,
}

/// Replaces one half of a 64-bit register.
fn set_half(register: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *register = *register & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

impl Transport {
    /// Makes a window for this device. `irq` is its interrupt.
    ///
    /// # Errors
    /// There is no memory for the window's page.
    pub fn new(device: Box<dyn Device>, memory: Memory, irq: EventFd) -> anyhow::Result<Self> {
        let page = Arc::new(Page(MmapRegion::new(WINDOW)?));
        let fixed = [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, VERSION),
            (VIRTIO_MMIO_DEVICE_ID, device.id()),
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (VIRTIO_MMIO_INTERRUPT_STATUS, USED_BUFFER),
            // No shared memory region (§4.2.2): a length of -1.
            (VIRTIO_MMIO_SHM_LEN_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_LEN_HIGH, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_HIGH, u32::MAX),
        ];
        for (register, value) in fixed {
            page.put(register, value);
        }
        // The configuration never changes, so its generation stays 0, and writes to it are ignored.
        let config = VIRTIO_MMIO_CONFIG as usize;
        page.0
            .as_volatile_slice()
            .write_slice(&device.config(), config)?;
        let transport = Self {
            registers: Registers::new(device.queue_sizes()),
            device,
            memory,
            interrupt: Arc::new(Interrupt {
                page: page.clone(),
                irq,
            }),
            page,
        };
        transport.show();
        Ok(transport)
    }

    /// The page that the guest reads.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Reads from the window, as the guest would.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let page = self.page.0.as_volatile_slice();
        data.fill(0);
        // Behind the end of the page, `data` stays zero.
        let _ = page.read(data, usize::try_from(offset).unwrap_or(WINDOW));
    }

    /// Updates the page's registers that depend on others.
    fn show(&self) {
        let registers = &self.registers;
        let features = match registers.device_features_sel {
            0 => self.device.features() as u32,
            1 => (self.device.features() >> 32) as u32,
            _ => 0,
        };
        let selected = registers.queue_sel as usize;
        let max = self.device.queue_sizes().get(selected).copied();
        let ready = registers.queues.get(selected).is_some_and(|q| q.ready);
        self.page.put(VIRTIO_MMIO_DEVICE_FEATURES, features);
        self.page
            .put(VIRTIO_MMIO_QUEUE_NUM_MAX, max.unwrap_or(0).into());
        self.page.put(VIRTIO_MMIO_QUEUE_READY, ready.into());
        self.page.put(VIRTIO_MMIO_STATUS, registers.status);
    }

    /// Handles the guest's write to the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // Registers are 32 bits wide and are written whole (§4.2.2.2).
        let (Ok(offset), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        let registers = &mut self.registers;
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                let early = registers.is(VIRTIO_CONFIG_S_DRIVER)
                    && !registers.is(VIRTIO_CONFIG_S_FEATURES_OK);
                let half = registers.driver_features_sel;
                if early && half < 2 {
                    set_half(&mut registers.driver_features, half == 1, value);
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            VIRTIO_MMIO_INTERRUPT_ACK if value & CONFIG_CHANGED != 0 => {
                self.interrupt.needs_reset(false);
            }
            VIRTIO_MMIO_STATUS => self.set_status(value),
            offset => self.write_queue(offset, value),
        }
        self.show();
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        let registers = &mut self.registers;
        let selected = registers.queue_sel as usize;
        let turn =
            registers.is(VIRTIO_CONFIG_S_FEATURES_OK) && !registers.is(VIRTIO_CONFIG_S_DRIVER_OK);
        let max = self.device.queue_sizes().get(selected);
        let (true, Some(queue), Some(&max)) = (turn, registers.queues.get_mut(selected), max)
        else {
            return;
        };
        match offset {
            // A size that is too large or no power of two is ignored.
            VIRTIO_MMIO_QUEUE_NUM if value <= max.into() && value.is_power_of_two() => {
                queue.size = value as u16;
            }
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            VIRTIO_MMIO_QUEUE_DESC_LOW | VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                let high = offset == VIRTIO_MMIO_QUEUE_DESC_HIGH;
                set_half(&mut queue.addresses[0], high, value);
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW | VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                let high = offset == VIRTIO_MMIO_QUEUE_AVAIL_HIGH;
                set_half(&mut queue.addresses[1], high, value);
            }
            VIRTIO_MMIO_QUEUE_USED_LOW | VIRTIO_MMIO_QUEUE_USED_HIGH => {
                let high = offset == VIRTIO_MMIO_QUEUE_USED_HIGH;
                set_half(&mut queue.addresses[2], high, value);
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // Bits can only be added, and each only after those before it.
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
            if self.registers.is(step) {
                continue;
            }
            if step == VIRTIO_CONFIG_S_FEATURES_OK && !self.features_fit() {
                return;
            }
            self.registers.status |= step;
            if step == VIRTIO_CONFIG_S_DRIVER_OK {
                self.activate();
            }
        }
    }

    fn features_fit(&self) -> bool {
        let wanted = self.registers.driver_features;
        wanted & !self.device.features() == 0 && wanted & VERSION_1 != 0
    }

    /// Copies what the device gets, so that later register writes change nothing.
    fn activation(&self) -> anyhow::Result<Activation> {
        let features = self.registers.driver_features;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let sizes = self.device.queue_sizes().iter();
        let queues = self.registers.queues.iter().zip(sizes);
        let queues = queues.map(|(q, &max)| q.queue(max, event_idx));
        Ok(Activation {
            memory: self.memory.clone(),
            features,
            queues: queues.collect::<Result<_, _>>()?,
            interrupt: self.interrupt.clone(),
        })
    }

    fn activate(&mut self) {
        let activation = self.activation();
        let activated = activation.and_then(|with| self.device.activate(with));
        if let Err(e) = activated {
            adit_print::note!("adit-vmm: virtio device {}: {e:#}", self.device.id());
            self.registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            self.show();
            self.interrupt.needs_reset(true);
        }
    }

    /// Pauses the device. Returns the state of window and device.
    ///
    /// # Errors
    /// The device cannot be paused.
    pub fn pause(&mut self) -> anyhow::Result<TransportState> {
        Ok(TransportState {
            device_id: self.device.id(),
            registers: self.registers.clone(),
            device: self.device.pause()?,
        })
    }

    /// Lets the device continue.
    pub fn resume(&mut self) {
        self.device.resume();
    }

    /// Loads a saved state into a new window.
    ///
    /// # Errors
    /// The state is another device's, or its queues cannot be used.
    pub fn restore(&mut self, state: &TransportState) -> anyhow::Result<()> {
        let id = self.device.id();
        anyhow::ensure!(
            state.device_id == id && state.registers.queues.len() == self.registers.queues.len(),
            "the snapshot has virtio device {} where this machine has {id}: give it the same devices",
            state.device_id
        );
        self.registers = state.registers.clone();
        let broken = self.registers.is(VIRTIO_CONFIG_S_NEEDS_RESET);
        let active = self.registers.is(VIRTIO_CONFIG_S_DRIVER_OK) && !broken;
        anyhow::ensure!(
            !active || self.features_fit(),
            "the snapshot's driver uses features that this device does not offer"
        );
        let with = active.then(|| self.activation()).transpose()?;
        self.device.restore(&state.device, with)?;
        self.show();
        // An interrupt may have been lost when the machine was paused. One too many does no harm.
        match broken {
            true => self.interrupt.needs_reset(true),
            false => self.interrupt.used(),
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.device.reset();
        self.registers = Registers::new(self.device.queue_sizes());
        self.interrupt.needs_reset(false);
        for kick in self.device.kicks() {
            // An old notification must not wake the new queues. An error means that there was none.
            let _ = kick.read();
        }
    }
}
