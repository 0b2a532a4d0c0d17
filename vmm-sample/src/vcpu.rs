//! A processor's thread: runs the guest until an exit that KVM does not handle, handles it, and repeats.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::{Bus, lock};
use crate::exit::{Exit, Reason};
use crate::gate::Gate;

/// What a processor's thread needs.
pub struct Vcpu {
    pub id: u8,
    /// Locked while the processor runs. Whoever else needs it must close the gate first.
    pub fd: Arc<Mutex<VcpuFd>>,
    pub bus: Arc<Bus>,
    pub exit: Arc<Exit>,
    pub gate: Arc<Gate>,
}

impl Vcpu {
    /// Runs until the VM ends.
    pub fn run(self) {
        while self.gate.pass(|| self.settle()) {
            if let Err(reason) = self.once() {
                self.exit.end(reason);
                // The guest runs no more on this processor, but `Gate::close` still waits for this thread.
                while self.gate.pass(|| ()) {
                    std::thread::park_timeout(std::time::Duration::from_millis(10));
                }
                return;
            }
        }
    }

    /// Lets KVM finish an access that was answered: it does so at the next entry only, and registers are wrong until then.
    fn settle(&self) {
        lock(&self.fd).set_kvm_immediate_exit(1);
        // An access in several pieces exits for each. The last entry ends with EINTR; any other result ends the VM later.
        while let Ok(true) = self.once() {}
        lock(&self.fd).set_kvm_immediate_exit(0);
    }

    /// Runs the guest until an exit, and handles it. Returns false if the run was only interrupted.
    fn once(&self) -> Result<bool, Reason> {
        let stop = |why| Err(Reason::Fault(format!("processor {}: {why}", self.id)));
        let mut fd = lock(&self.fd);
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => self.bus.port_in(port, data),
            Ok(VcpuExit::IoOut(port, data)) => self.bus.port_out(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => self.bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.bus.mmio_write(address, data),
            // A triple fault: a kernel's last way to reset.
            Ok(VcpuExit::Shutdown) => return Err(Reason::Reset),
            Ok(VcpuExit::Intr) => return Ok(false),
            Ok(VcpuExit::FailEntry(why, _)) => return stop(format!("cannot be entered: {why:#x}")),
            Ok(other) => return stop(format!("stopped: {other:?}")),
            // EINTR: a signal, so that this thread reaches the gate. EAGAIN: the guest has not started this processor yet.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(false),
            Err(e) => return stop(format!("KVM_RUN: {e}")),
        }
        Ok(true)
    }
}
