//! `adit-vmm`: a small VMM on rust-vmm crates that boots stock Linux and has adit's virtio-vsock device in its own process.
//!
//! Written to be read: `run` follows a command from start to end, `machine` puts a VM together, `boot` and `acpi` tell the
//! kernel where everything is, `vcpu` and [`bus`] answer the guest, [`virtio`] holds transport and devices. This is a program:
//! what is public here is public for tests that run without KVM.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod acpi;
mod api;
pub mod bare;
mod boot;
pub mod bus;
pub mod console;
mod cpu;
mod cpu_state;
mod events;
pub mod exit;
mod gate;
mod layout;
mod machine;
pub mod memory;
mod options;
mod pause;
mod pci;
mod run;
pub mod seccomp;
mod snapshot;
mod vcpu;
pub mod virtio;

pub use run::main;
