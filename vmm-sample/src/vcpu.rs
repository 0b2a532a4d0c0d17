//! A processor's thread: run the guest until it does something that KVM does not do by itself, do that, go on.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::{Bus, lock};
use crate::exit::{Exit, Reason};
use crate::gate::Gate;

/// What a processor's thread needs.
pub struct Vcpu {
    pub id: u8,
    /// Locked while it runs: whoever else wants it closes the gate first.
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
                // Nothing more of this guest runs here; the gate still counts on this thread.
                while self.gate.pass(|| ()) {
                    std::thread::park_timeout(std::time::Duration::from_millis(10));
                }
                return;
            }
        }
    }

    /// KVM finishes an access that was answered with the next entry only: registers are not to be read before.
    fn settle(&self) {
        lock(&self.fd).set_kvm_immediate_exit(1);
        // An access in pieces exits for each; the last entry ends with EINTR, and whatever else it is ends the VM later.
        while let Ok(true) = self.once() {}
        lock(&self.fd).set_kvm_immediate_exit(0);
    }

    /// Runs the guest until it needs something, and does that. False: it was only interrupted.
    fn once(&self) -> Result<bool, Reason> {
        let stop = |why| Err(Reason::Fault(format!("processor {}: {why}", self.id)));
        let mut fd = lock(&self.fd);
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => self.bus.port_in(port, data),
            Ok(VcpuExit::IoOut(port, data)) => self.bus.port_out(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => self.bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.bus.mmio_write(address, data),
            // A triple fault: what a kernel does that has no other way to reset.
            Ok(VcpuExit::Shutdown) => return Err(Reason::Reset),
            Ok(VcpuExit::Intr) => return Ok(false),
            Ok(VcpuExit::FailEntry(why, _)) => return stop(format!("cannot be entered: {why:#x}")),
            Ok(other) => return stop(format!("stopped: {other:?}")),
            // A signal, to make us look at the gate; EAGAIN: this processor was not started yet.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Ok(false),
            Err(e) => return stop(format!("KVM_RUN: {e}")),
        }
        Ok(true)
    }
}
