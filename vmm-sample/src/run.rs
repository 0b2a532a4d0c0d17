//! The commands, from start to end.

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use crate::bus::lock;
use crate::console::LineState;
use crate::exit::Reason;
use crate::machine::{CPUS_MAX, Machine};
use crate::options::{Command, Host, Options, Restore, Run};
use crate::seccomp::Filters;
use crate::virtio::Device;
use crate::virtio::block::Block;
use crate::virtio::vsock::{Owner, Vsock};
use crate::{bare, events, memory, snapshot};
use adit_port::rings::{self, RingSender};
use adit_port::vmm::Registered;
use nix::sys::signalfd::SignalFd;

/// The program's entry.
pub fn main() -> ExitCode {
    let options: Options = match adit_print::parse("adit-vmm") {
        Ok(options) => options,
        Err(done) => return done,
    };
    let done = match options.command {
        Command::Run(options) => run(&options).map(ended),
        Command::Restore(options) => restore(&options).map(ended),
        Command::Bare { image, ring } => {
            let tried = if ring { bare::ring } else { bare::smoke }(&image);
            tried.and_then(|said| {
                adit_print::line(&said)?;
                Ok(ExitCode::SUCCESS)
            })
        }
    };
    done.unwrap_or_else(|e| adit_print::failed("adit-vmm", e.as_ref()))
}

fn ended(reason: Reason) -> ExitCode {
    adit_print::note!("adit-vmm: {reason}");
    ExitCode::from(reason.status())
}

type Devices = Vec<Box<dyn Device>>;

/// The VM's entry in aditd, and where its ring is sent.
type Served = Option<(Registered, Option<RingSender>)>;

/// The devices in the order of their windows.
fn devices(host: &Host, filters: &Filters) -> anyhow::Result<(Devices, Served)> {
    let mut devices = Devices::new();
    let mut served = None;
    if let Some(disk) = &host.disk {
        devices.push(Box::new(Block::open(disk, filters)?));
    }
    if let Some(vsock) = &host.vsock {
        let registration = host.registration(vsock)?;
        let (sender, inbox) = host.ring.map(|_| rings::channel()).transpose()?.unzip();
        let owner = match &registration {
            Some(registration) => Owner::Aditd(registration.clone(), inbox),
            None => Owner::Sockets(vsock.uds.clone()),
        };
        devices.push(Box::new(Vsock::new(vsock.cid, owner, filters)?));
        if let Some(registration) = registration {
            // Register only now: the thread that answers aditd must exist first.
            served = Some((registration.register()?, sender));
        }
    }
    Ok((devices, served))
}

fn run(options: &Run) -> anyhow::Result<Reason> {
    let signals = events::signals()?;
    let filters = options.host.filters()?;
    let memory = Arc::new(memory::allocate(options.memory)?);
    let (devices, served) = devices(&options.host, &filters)?;
    let (cpus, host, line) = (options.cpus, &options.host, LineState::default());
    let machine = Machine::new(cpus, &host.serial, memory, devices, &line, host.ring)?;
    machine.boot(&options.boot)?;
    go(machine, signals, host, &filters, served)
}

fn restore(options: &Restore) -> anyhow::Result<Reason> {
    let signals = events::signals()?;
    let filters = options.host.filters()?;
    let state = snapshot::read(&options.from)?;
    let memory = Arc::new(snapshot::map(&options.from, &state)?);
    let cpus = u8::try_from(state.cpus.len()).unwrap_or(u8::MAX);
    anyhow::ensure!(
        (1..=CPUS_MAX).contains(&cpus),
        "the snapshot has {cpus} processors"
    );
    let host = &options.host;
    let (devices, served) = devices(host, &filters)?;
    let machine = Machine::new(cpus, &host.serial, memory, devices, &state.line, host.ring)?;
    machine.restore(&state)?;
    go(machine, signals, host, &filters, served)
}

/// Runs the machine from its first instruction to its end.
fn go(
    mut machine: Machine,
    signals: SignalFd,
    host: &Host,
    filters: &Filters,
    served: Served,
) -> anyhow::Result<Reason> {
    if let (Some(pci), Some((_, Some(rings)))) = (&machine.bus.pci, &served) {
        pci.attach(rings)?;
    }
    machine.start(filters)?;
    machine.resume()?;
    let machine = Arc::new(Mutex::new(machine));
    let reason = events::until_end(&machine, signals, host.api.as_deref());
    lock(&machine).end();
    if let Some((mut registered, _)) = served {
        if let Ok(Reason::Reset) = reason {
            // Keep the entry: a supervisor starts this process again.
            registered.keep();
        } else if let Err(e) = registered.leave() {
            adit_print::note!("adit-vmm: {e:#}");
        }
    }
    reason
}
