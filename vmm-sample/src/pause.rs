//! Pauses a machine, saves it, and continues it here or in another process.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, bail, ensure};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use crate::bus::lock;
use crate::cpu_state::{ChipState, CpuState};
use crate::layout;
use crate::machine::Machine;
use crate::snapshot::{self, State};

impl Machine {
    /// Tells whether the machine is paused.
    pub fn is_paused(&self) -> bool {
        self.held.is_some()
    }

    /// Pauses everything in the VM: processors first, because devices must answer them.
    ///
    /// # Errors
    /// A device cannot be paused. The machine continues.
    pub fn pause(&mut self) -> anyhow::Result<()> {
        if self.is_paused() {
            return Ok(());
        }
        self.gate.close(&self.threads);
        let transports = self.bus.virtio.iter();
        let held: anyhow::Result<_> = transports.map(|(_, t)| lock(t).pause()).collect();
        match held {
            Ok(held) => self.held = Some(held),
            Err(e) => {
                self.resume()?;
                return Err(e);
            }
        }
        Ok(())
    }

    /// Continues.
    ///
    /// # Errors
    /// None today; none may leave the machine paused.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        self.held = None;
        for (_, transport) in &self.bus.virtio {
            lock(transport).resume();
        }
        if !self.threads.is_empty() {
            for vcpu in &self.vcpus {
                // The guest's watchdog must not count the pause. EINVAL: the guest has no kvmclock.
                let _ = lock(vcpu).kvmclock_ctrl();
            }
        }
        self.gate.open();
        Ok(())
    }

    /// Writes the paused machine to a directory.
    ///
    /// # Errors
    /// The machine is not paused, or the directory cannot be written.
    pub fn snapshot(&mut self, dir: &Path) -> anyhow::Result<()> {
        let save = |vcpu: &Arc<Mutex<VcpuFd>>| CpuState::save(&self.kvm, &self.vm, &lock(vcpu));
        let cpus = self.vcpus.iter().map(save).collect::<Result<_, _>>()?;
        let chips = ChipState::save(&self.vm)?;
        let state = State {
            memory: self.memory.iter().map(GuestMemoryRegion::len).sum(),
            cpus,
            chips,
            line: self.bus.console.save(),
            ring: self.bus.pci.as_ref().map(|pci| pci.function.save().into()),
            devices: self.held.take().context("the machine runs")?,
        };
        let written = snapshot::write(dir, &state, &self.memory);
        self.held = Some(state.devices);
        written
    }

    /// Loads a saved state. The memory of this machine must be the snapshot's already.
    ///
    /// # Errors
    /// The state does not fit this machine.
    pub fn restore(&self, state: &State) -> anyhow::Result<()> {
        ensure!(
            state.devices.len() == self.bus.virtio.len(),
            "the snapshot has {} virtio devices, and this machine {}: give it the same devices",
            state.devices.len(),
            self.bus.virtio.len()
        );
        for (vcpu, saved) in self.vcpus.iter().zip(&state.cpus) {
            saved.restore(&lock(vcpu))?;
        }
        state.chips.restore(&self.vm)?;
        match (&self.bus.pci, &state.ring) {
            (Some(pci), Some(saved)) => pci.function.restore(saved)?,
            (None, None) => {}
            _ => {
                bail!("only one of snapshot and machine has a ring: start it with the same --ring")
            }
        }
        for ((_, transport), saved) in self.bus.virtio.iter().zip(&state.devices) {
            lock(transport).restore(saved)?;
        }
        self.new_generation()?;
        Ok(self.generation.write(1)?)
    }

    /// Sets a new generation id: the kernel of a clone must not draw the random numbers of its origin.
    pub(crate) fn new_generation(&self) -> anyhow::Result<()> {
        let mut id = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut id)?;
        Ok(self.memory.write_slice(&id, layout::GENERATION)?)
    }
}
