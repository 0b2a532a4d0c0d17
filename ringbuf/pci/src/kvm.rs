//! The function in a KVM virtual machine.
//!
//! ```text
//! vCPU threads ── read, write ──────────────────► Plugged ── Wiring ──► "ring-pci": slots, ioeventfds, routes
//! the host's Interrupt ── irqfd, no KVM system call ────────┘             (the caller waits for it)
//! the guest's doorbell ── ioeventfd ──► the host's eventfds: no exit to the VMM
//! the guest's reads of configuration space: a page that KVM maps read-only
//! ```
//! While a guest runs, only a separate thread makes KVM system calls. So the seccomp filter of the vCPU threads may
//! allow KVM_RUN alone. The thread learns the wanted wiring, and nothing else.
//!
//! | slots | what |
//! |---|---|
//! | 1 | configuration space, read-only |
//! | [`PIECES`] | the region: pages that only the host writes are read-only, the others writable |
// KVM gets raw addresses of mappings. Those mappings are kept as long as KVM has the addresses.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use adit_ringbuf::region::Spec;
use adit_ringbuf::{Mapped, MemfdError, RingMem};
use adit_ringbuf_io::doorbell::{Doorbell, event_fd};
use adit_ringbuf_io::ivshmem::HOST_PEER;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{CONFIG_BYTES, REGISTERS_BYTES};
use crate::function::{Changes, DOORBELL, Function, VECTORS, Windows, Wiring};
use crate::msix::Message;
use crate::state::{STATE_BYTES, StateError};

/// Pieces of a region, by writer: head, guest's words, records to the guest, the rest.
pub const PIECES: u32 = 4;
/// Number of memory slots that a function uses.
pub const SLOTS: u32 = 1 + PIECES;
/// Bytes of a function's configuration space in ECAM (PCI Express 5.0 §7.2.2).
pub const CONFIG_PAGE: u64 = 4096;
/// Number of inputs of the IOAPIC, and of both PICs.
const IOAPIC_INPUTS: u32 = 24;
const PIC_INPUTS: u32 = 16;

/// Where a function is placed in the VM.
#[derive(Clone, Debug)]
pub struct Place {
    /// Guest-physical address of its configuration space: one page.
    pub config_at: u64,
    /// Where the guest may put its BARs.
    pub windows: Windows,
    /// The first of [`SLOTS`] KVM memory slots that nothing else uses.
    pub slot: u32,
    /// IOAPIC input of the pin. The guest sees it as edge-triggered, because each rise is one pulse.
    pub line: u32,
    /// The first of [`VECTORS`] interrupt numbers (GSIs) above those of the interrupt chips, for messages.
    pub messages: u32,
}

/// Why a function cannot be put into a VM.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The memory cannot be a BAR: its size is not a power of two, or the region does not fit. The caller's fault.
    #[error(
        "{bytes} bytes cannot be a BAR: the size must be a power of two, and the whole region must fit"
    )]
    Size {
        /// Size of the memory.
        bytes: usize,
    },
    /// There is no memory for configuration space.
    #[error("no memory for configuration space")]
    Memory(#[from] MemfdError),
    /// This process has no free descriptors or threads.
    #[error("no free descriptor or thread for the ring's PCI function")]
    Io(#[from] io::Error),
    /// KVM refuses.
    #[error("KVM refuses the ring's PCI function")]
    Kvm(#[from] kvm_ioctls::Error),
}

/// A function in a VM. Every method may be called from any thread.
pub struct Plugged(Arc<Mutex<Inner>>);

struct Inner {
    function: Function,
    config_at: u64,
    /// The copy of configuration space that the guest reads.
    page: Mapped,
    messages: [EventFd; VECTORS],
    line: EventFd,
    /// The host's doorbells.
    host: [EventFd; VECTORS],
    wires: Sender<(Wiring, SyncSender<Result<(), kvm_ioctls::Error>>)>,
}

/// Signals one of the guest's doorbells, by the kind of interrupt that the guest has configured.
pub struct Interrupt(Arc<Mutex<Inner>>, usize);

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plugged {
    /// Puts a function with this memory into a VM. The VM must already have its interrupt chips. `spec` is the
    /// specification of the future region.
    ///
    /// # Errors
    /// The memory cannot be a BAR, KVM refuses, or this process has no free descriptors or threads.
    pub fn new(
        vm: Arc<VmFd>,
        memory: Mapped,
        spec: &Spec,
        place: Place,
    ) -> Result<Self, PlugError> {
        let bytes = memory.len();
        if !bytes.is_power_of_two() || bytes < spec.bytes() {
            return Err(PlugError::Size { bytes });
        }
        let page = Mapped::anonymous(CONFIG_PAGE as usize)?;
        let (messages, host) = ([event_fd()?, event_fd()?], [event_fd()?, event_fd()?]);
        let line = event_fd()?;
        vm.register_irqfd(&line, place.line)?;
        for (event, gsi) in messages.iter().zip(place.messages..) {
            vm.register_irqfd(event, gsi)?;
        }
        let mut wires = KvmWiring {
            host: [host[0].try_clone()?, host[1].try_clone()?],
            pieces: pieces(bytes, spec),
            now: Wiring::default(),
            page: page.clone(),
            place: place.clone(),
            memory,
            vm,
        };
        wires.map_slot(0, place.config_at, 0..CONFIG_PAGE as usize, true)?;
        let (sender, wanted) = channel::<(Wiring, SyncSender<_>)>();
        let thread = thread::Builder::new().name("ring-pci".into());
        thread.spawn(move || {
            while let Ok((wiring, done)) = wanted.recv() {
                // The requesting thread waits for this answer.
                let _ = done.send(wires.apply(&wiring));
            }
        })?;
        let inner = Inner {
            function: Function::new(bytes as u64, place.windows),
            config_at: place.config_at,
            page,
            messages,
            line,
            host,
            wires: sender,
        };
        inner.show();
        Ok(Self(Arc::new(Mutex::new(inner))))
    }

    /// The host's ends of the doorbells: two that interrupt the guest, and two that the guest signals. Data first,
    /// then space.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn bells(&self) -> io::Result<([Interrupt; VECTORS], [EventFd; VECTORS])> {
        let [data, space] = &lock(&self.0).host;
        let interrupt = |vector| Interrupt(self.0.clone(), vector);
        let host = [data.try_clone()?, space.try_clone()?];
        Ok(([0, 1].map(interrupt), host))
    }

    /// Handles a read of configuration space or a BAR that exited to the VMM. Returns false if the address does not
    /// belong to this function.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let mut inner = lock(&self.0);
        if let Some(offset) = inner.config_offset(address) {
            inner.function.config_read(offset, data);
            return true;
        }
        let Some(changes) = inner.function.read(address, data) else {
            return false;
        };
        // A read never changes the wiring, so this makes no KVM call.
        inner.carry_out(changes).is_ok()
    }

    /// Handles a write to configuration space or a BAR. Returns false if the address does not belong to this function.
    ///
    /// # Errors
    /// KVM refuses the new wiring: the BAR is not decoded, or the vector has no message.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<bool, kvm_ioctls::Error> {
        let mut inner = lock(&self.0);
        let changes = match inner.config_offset(address) {
            Some(offset) => Some(inner.function.config_write(offset, data)),
            None => inner.function.write(address, data),
        };
        changes.map_or(Ok(false), |c| inner.carry_out(c).map(|()| true))
    }

    /// The state of the function, for a snapshot. The vCPUs must be stopped.
    pub fn save(&self) -> [u8; STATE_BYTES] {
        lock(&self.0).function.save()
    }

    /// Takes the state that [`save`](Self::save) returned, with a new region. When the host attaches to it, it signals
    /// the guest.
    ///
    /// # Errors
    /// The state does not belong to such a function, or KVM refuses it.
    pub fn restore(&self, state: &[u8]) -> Result<(), RestoreError> {
        let mut inner = lock(&self.0);
        let changes = inner.function.restore(state)?;
        Ok(inner.carry_out(changes)?)
    }
}

/// Why a function cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are not a state, or belong to another function.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM refuses.
    #[error("KVM refuses the saved state of the ring's PCI function")]
    Kvm(#[from] kvm_ioctls::Error),
}

impl Doorbell for Interrupt {
    fn ring(&self) -> io::Result<()> {
        let mut inner = lock(&self.0);
        let changes = inner.function.interrupt(self.1);
        inner.carry_out(changes).map_err(io::Error::from)
    }
}

impl Inner {
    fn config_offset(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.config_at)?;
        (offset < CONFIG_PAGE).then_some(offset)
    }

    fn carry_out(&self, changes: Changes) -> Result<(), kvm_ioctls::Error> {
        let Changes {
            rewired,
            send,
            line,
            pulse,
            rung,
        } = changes;
        self.show();
        let mut done = Ok(());
        if rewired {
            let (sender, answer) = sync_channel(1);
            // The thread lives as long as this value.
            let _ = self.wires.send((*self.function.wiring(), sender));
            done = answer.recv().unwrap_or(Ok(()));
        }
        let messages = self.messages.iter().zip(send);
        let host = self.host.iter().zip(rung);
        let line = std::iter::once((&self.line, pulse || line == Some(true)));
        for (event, due) in messages.chain(line).chain(host) {
            if due {
                // An error means that the counter is at its maximum, so the eventfd is already signalled.
                let _ = event.ring();
            }
        }
        done
    }

    /// Copies configuration space to the page that the guest reads, one changed word at a time.
    fn show(&self) {
        let bytes = self.function.config_bytes().as_chunks::<8>().0;
        for (n, word) in bytes.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            if self.page.load(8 * n) != word {
                self.page.store(8 * n, word);
            }
        }
    }
}

const _: () = assert!(CONFIG_BYTES.is_multiple_of(8) && CONFIG_BYTES as u64 <= CONFIG_PAGE);
const _: () = assert!(REGISTERS_BYTES >= DOORBELL + 4);

/// The pieces of the region in order: offsets, and whether the guest may only read them.
fn pieces(bytes: usize, spec: &Spec) -> [(Range<usize>, bool); PIECES as usize] {
    let [head, records] = spec.written_by_host();
    [
        (head.clone(), true),
        (head.end..records.start, false),
        (records.clone(), true),
        (records.end..bytes, false),
    ]
}

/// What KVM has been configured with.
struct KvmWiring {
    vm: Arc<VmFd>,
    page: Mapped,
    memory: Mapped,
    pieces: [(Range<usize>, bool); PIECES as usize],
    host: [EventFd; VECTORS],
    place: Place,
    now: Wiring,
}

impl KvmWiring {
    /// Gives KVM the differences to `wanted`. Carries out all of them, and returns the first refusal.
    fn apply(&mut self, wanted: &Wiring) -> Result<(), kvm_ioctls::Error> {
        let was = std::mem::replace(&mut self.now, *wanted);
        let mut done = Ok(());
        let [registers, _, region] = wanted.bars;
        if registers != was.bars[0] {
            let doorbell = |at: u64| IoEventAddress::Mmio(at + DOORBELL);
            for (event, vector) in self.host.iter().zip(0u32..) {
                let value = u32::from(HOST_PEER) << 16 | vector;
                if let Some(at) = was.bars[0] {
                    // KVM may have refused this one earlier, so an error is expected.
                    let _ = self.vm.unregister_ioevent(event, &doorbell(at), value);
                }
                if let Some(at) = registers {
                    done = done.and(self.vm.register_ioevent(event, &doorbell(at), value));
                }
            }
        }
        if region != was.bars[2] {
            for (slot, (piece, for_reading)) in (1..).zip(self.pieces.clone()) {
                // KVM cannot change the bytes of an existing slot. Delete it first.
                if was.bars[2].is_some() {
                    let _ = self.map_slot(slot, 0, 0..0, for_reading);
                }
                if let Some(at) = region {
                    let at = at + piece.start as u64;
                    done = done.and(self.map_slot(slot, at, piece, for_reading));
                }
            }
        }
        if wanted.messages != was.messages {
            done = done.and(self.route(&wanted.messages));
        }
        done
    }

    /// Maps bytes into the guest. Slot 0 is configuration space, the others are the region. An empty range deletes the
    /// slot.
    fn map_slot(
        &self,
        slot: u32,
        at: u64,
        bytes: Range<usize>,
        for_reading: bool,
    ) -> Result<(), kvm_ioctls::Error> {
        let mapping = if slot == 0 { &self.page } else { &self.memory };
        let region = kvm_userspace_memory_region {
            slot: self.place.slot + slot,
            guest_phys_addr: at,
            userspace_addr: mapping.address() as u64 + bytes.start as u64,
            memory_size: bytes.len() as u64,
            flags: if for_reading { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: the bytes are a part of a mapping that this value keeps. This value deletes the slots when it is
        // dropped. Nobody makes references to the bytes, as `Mapped` requires.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    /// Sets all interrupt routes: the default routes of the chips, and the messages.
    fn route(&self, messages: &[Option<Message>]) -> Result<(), kvm_ioctls::Error> {
        let mut entries = Vec::new();
        for gsi in 0..IOAPIC_INPUTS {
            if gsi < PIC_INPUTS {
                let chip = match gsi < PIC_INPUTS / 2 {
                    true => KVM_IRQCHIP_PIC_MASTER,
                    false => KVM_IRQCHIP_PIC_SLAVE,
                };
                entries.push(chip_route(gsi, chip, gsi % (PIC_INPUTS / 2)));
            }
            entries.push(chip_route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        }
        for (gsi, message) in (self.place.messages..).zip(messages) {
            let Some(Message { address, data }) = *message else {
                continue;
            };
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = address as u32;
            entry.u.msi.address_hi = (address >> 32) as u32;
            entry.u.msi.data = data;
            entries.push(entry);
        }
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
        self.vm.set_gsi_routing(&routing)
    }
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

impl Drop for KvmWiring {
    fn drop(&mut self) {
        // KVM must forget the mappings before they are unmapped.
        let _ = self.apply(&Wiring::default());
        let _ = self.map_slot(0, 0, 0..0, true);
    }
}
