//! What is wrong with a VM. Every fault is listed here, and nowhere else: the API's `fault`, the metric `adit_vm_fault` and
//! the log get it from this list.

use std::sync::{Mutex, PoisonError};

/// Characters of a fault's text that are shown.
const TEXT_MAX: usize = 600;

/// Which part of a VM's channel is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// The VM has no channel until it is power-cycled.
    PowerCycle,
    /// No port process serves the VM.
    PortProcess,
    /// The guest or its VMM broke the protocol of the device or the ring.
    Transport,
    /// The guest is to be reached by a carrier that is not there.
    Carrier,
    /// The guest is enrolled as another VM, as a copy of that one's image is, or as none.
    Enrolment,
    /// The guest's disk is a copy of another guest's.
    Clone,
    /// A card is not believed, by the guest or by this host.
    Card,
    /// The guest does not take a trust document.
    Trust,
    /// The guest's agent is not the program that it was to be.
    Agent,
    /// The guest's policy file cannot be used.
    Policy,
    /// The guest's journal takes no task.
    Journal,
}

impl FaultKind {
    /// Label of the metric and field of the log.
    pub fn label(self) -> &'static str {
        match self {
            Self::PowerCycle => "power-cycle",
            Self::PortProcess => "port-process",
            Self::Transport => "transport",
            Self::Carrier => "carrier",
            Self::Enrolment => "enrolment",
            Self::Clone => "clone",
            Self::Card => "card",
            Self::Trust => "trust",
            Self::Agent => "agent",
            Self::Policy => "policy",
            Self::Journal => "journal",
        }
    }
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which part.
    pub kind: FaultKind,
    /// What is wrong, and what to do. It may have words of the guest or of the port process.
    pub text: String,
}

impl Fault {
    /// Makes a fault. The text is cut, and escaped.
    pub fn new(kind: FaultKind, text: &str) -> Self {
        let text = adit_names::escape(text).at_most(TEXT_MAX).to_string();
        Self { kind, text }
    }
}

/// The faults that were logged.
#[derive(Debug, Default)]
pub struct Logged(Mutex<Vec<Fault>>);

impl Logged {
    /// Logs what has changed since the last call: a line for each new fault, and one for each that is over.
    pub fn update(&self, vm: &str, faults: Vec<Fault>) {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for Fault { kind, text } in faults.iter().filter(|f| !logged.contains(f)) {
            tracing::error!(vm, kind = kind.label(), fault = text, "the VM has a fault");
        }
        let still = |kind| faults.iter().any(|f| f.kind == kind);
        for Fault { kind, .. } in logged.iter().filter(|f| !still(f.kind)) {
            tracing::info!(vm, kind = kind.label(), "the fault is over");
        }
        *logged = faults;
    }
}
