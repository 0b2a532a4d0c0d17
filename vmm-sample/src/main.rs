//! `adit-vmm`: a small VMM on rust-vmm crates that boots stock Linux and has adit's virtio-vsock device in its own process.
//!
//! Written to be read: `machine` puts a VM together, `boot` and `acpi` tell the kernel where it is, `vcpu` and `bus` answer
//! the guest, `virtio` holds transport and devices.

mod acpi;
mod boot;
mod bus;
mod console;
mod cpu;
mod eventfd;
mod events;
mod exit;
mod gate;
mod layout;
mod machine;
mod memory;
mod options;
mod vcpu;
mod virtio;

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;

use machine::Machine;
use options::{Command, Host, Options, Run};
use virtio::Device;
use virtio::block::Block;
use virtio::vsock::handed::Registered;
use virtio::vsock::{Owner, Vsock};

fn main() -> ExitCode {
    let done = match Options::parse().command {
        Command::Run(options) => run(&options),
    };
    match done {
        Ok(reason) => {
            eprintln!("adit-vmm: {reason}");
            ExitCode::from(reason.status())
        }
        Err(e) => {
            eprintln!("adit-vmm: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The devices in the order of their windows, and the VM's entry in aditd's map.
fn devices(host: &Host) -> anyhow::Result<(Vec<Box<dyn Device>>, Option<Registered>)> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    let mut registered = None;
    if let Some(disk) = &host.disk {
        devices.push(Box::new(Block::open(disk)?));
    }
    if let Some(vsock) = &host.vsock {
        let owner = host.owner(vsock)?;
        devices.push(Box::new(Vsock::new(vsock.cid, &owner)?));
        if let Owner::Aditd(registration) = owner {
            // Not before the thread is there that answers aditd.
            registered = Some(registration.register()?);
        }
    }
    Ok((devices, registered))
}

fn run(options: &Run) -> anyhow::Result<exit::Reason> {
    let signals = events::signals()?;
    let shape = options.host.shape();
    let memory = Arc::new(memory::allocate(shape.memory)?);
    let (devices, _registered) = devices(&options.host)?;
    let mut machine = Machine::new(&shape, memory, devices)?;
    machine.boot(&options.boot())?;
    machine.start()?;
    machine.resume();
    let reason = events::until_end(&machine, signals);
    machine.end();
    reason
}
