//! `adit vm …` and `adit wait`.

use std::time::Duration;

use adit_api::{Carrier, CarrierKind, NewVm, Vm, VmState};
use clap::{Args, Subcommand, ValueEnum};

use crate::client::Client;
use crate::error::Failure;
use crate::output::{self, Format, ago, duration};

#[derive(Subcommand)]
pub enum VmCommand {
    /// List the VMs
    #[command(visible_alias = "list")]
    Ls,
    /// Show one VM
    Show {
        /// Its name
        name: String,
    },
    /// Add a VM; it is kept over restarts of aditd
    Add {
        /// Its name: a-z, 0-9 and inner '-'
        name: String,
        /// Its CID, 3 or more, on one VM only
        #[arg(long)]
        cid: u64,
        /// Guest TCP ports that may be reached
        #[arg(long, value_delimiter = ',', value_name = "PORT,…")]
        allow: Vec<u16>,
        /// Plain AF_VSOCK ports that may be reached, as host vsock-PORT.NAME
        #[arg(long, value_delimiter = ',', value_name = "PORT,…")]
        allow_vsock: Vec<u32>,
    },
    /// Start a new port process in place of the VM's, under the running VM: after an upgrade of adit-port
    ///
    /// Open tunnels and the agent's connection end; the VM keeps its channel.
    Reload {
        /// Its name
        name: String,
    },
    /// Remove a VM: its channel and its tunnels end
    ///
    /// Its open tasks end as `expired`, or as `lost_contact` if they were handed out. A VM that its VMM has registered
    /// (`adit-vmm --aditd`) is that VMM's to remove, which it does when the VM ends: until then this is refused.
    Rm {
        /// Its name
        name: String,
        /// Also while its VMM holds it: the VM runs on, and has no channel until it is started again
        #[arg(long)]
        force: bool,
    },
}

/// What to wait for.
#[derive(Clone, Copy, ValueEnum)]
pub enum For {
    /// The agent is connected
    Agent,
}

#[derive(Args)]
pub struct Wait {
    /// Name of the VM
    vm: String,
    /// What to wait for
    #[arg(long = "for", value_enum, default_value = "agent")]
    condition: For,
    /// Give up after this long (exit status 124)
    #[arg(long, value_parser = duration, default_value = "60s")]
    timeout: Duration,
}

pub async fn run(command: &VmCommand, client: &Client, format: Format) -> Result<(), Failure> {
    match command {
        VmCommand::Ls => {
            let vms: Vec<Vm> = client.get("/v1/vms").await?;
            match format {
                Format::Json => output::json(&vms)?,
                Format::Table => list(&vms),
            }
        }
        VmCommand::Show { name } => show(&client.get(&path(name)?).await?, format)?,
        VmCommand::Add {
            name,
            cid,
            allow,
            allow_vsock,
        } => {
            let new = NewVm {
                name: name.clone(),
                cid: *cid,
                allow: allow.clone(),
                allow_vsock: allow_vsock.clone(),
            };
            show(&client.post("/v1/vms", &new).await?, format)?;
        }
        VmCommand::Reload { name } => {
            let url = format!("{}/reload", path(name)?);
            let vm: Vm = client.post(&url, &()).await?;
            match format {
                Format::Json => output::json(&vm)?,
                Format::Table => println!(
                    "{name} is served by process {}",
                    vm.port_pid.map_or_else(|| "-".into(), |p| p.to_string())
                ),
            }
        }
        VmCommand::Rm { name, force } => {
            let query = if *force { "?force=true" } else { "" };
            client.delete(&format!("{}{query}", path(name)?)).await?;
            if format == Format::Table {
                println!("{name} removed");
            }
        }
    }
    Ok(())
}

pub async fn wait(wait: &Wait, client: &Client, format: Format) -> Result<(), Failure> {
    let For::Agent = wait.condition;
    let url = format!(
        "{}/wait?for=agent&timeout_ms={}",
        path(&wait.vm)?,
        wait.timeout.as_millis()
    );
    let vm: Vm = client.patient(wait.timeout).get(&url).await?;
    match format {
        Format::Json => output::json(&vm),
        Format::Table => {
            println!(
                "{} is ready: agent {}",
                vm.name,
                vm.agent.as_deref().unwrap_or("-")
            );
            Ok(())
        }
    }
}

/// A name that is no name never becomes part of a path.
fn path(name: &str) -> Result<String, Failure> {
    let id: adit_tasks::VmId = name.parse().map_err(|e| {
        Failure::new("unknown-vm", format!("`{name}` names no VM: {e}"))
            .help("`adit vm ls` lists the names")
    })?;
    Ok(format!("/v1/vms/{id}"))
}

fn state(vm: &Vm) -> &'static str {
    match vm.state {
        VmState::Down => "down",
        VmState::Waiting => "waiting",
        VmState::Up => "up",
        VmState::Ready => "ready",
        VmState::PowerCycle => "power-cycle",
    }
}

fn list(vms: &[Vm]) {
    if vms.is_empty() {
        println!("no VMs: add one with `adit vm add NAME --cid N --allow 80`, or in aditd.toml");
        return;
    }
    let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let rows: Vec<_> = vms
        .iter()
        .map(|vm| {
            [
                vm.name.clone(),
                vm.cid.to_string(),
                state(vm).into(),
                dash(&vm.agent),
                dash(&vm.kernel),
                ago(vm.last_seen_ms),
                vm.queued.to_string(),
                vm.streams.to_string(),
            ]
        })
        .collect();
    output::table(
        [
            "VM",
            "CID",
            "STATE",
            "AGENT",
            "KERNEL",
            "LAST-SEEN",
            "QUEUE",
            "STREAMS",
        ],
        &rows,
    );
}

fn show(vm: &Vm, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(vm);
    }
    let ports = |list: String| {
        if list.is_empty() {
            "none".to_owned()
        } else {
            list
        }
    };
    let mut rows = vec![
        ["name", &vm.name].map(str::to_owned),
        ["state", state(vm)].map(str::to_owned),
        ["cid".into(), vm.cid.to_string()],
        [
            "agent".into(),
            vm.agent.clone().unwrap_or_else(|| "has not spoken".into()),
        ],
        ["last seen".into(), ago(vm.last_seen_ms)],
        ["session".into(), vm.epoch.to_string()],
        ["streams".into(), vm.streams.to_string()],
        ["tasks queued".into(), vm.queued.to_string()],
        ["allowed ports".into(), ports(join(&vm.allow))],
        ["allowed vsock".into(), ports(join(&vm.allow_vsock))],
        ["vhost-user".into(), vm.vhost_socket.clone()],
        ["ring".into(), vm.ring_socket.clone()],
        ["ivshmem".into(), vm.ivshmem_socket.clone()],
        ["carrier".into(), carrier(&vm.carrier)],
    ];
    rows.extend(vm.clock_ahead_ms.map(|ms| ["clock".into(), clock(ms)]));
    rows.extend(vm.holding.iter().map(|held| {
        let said = format!(
            "task {}: its goal is valid from {}, and the guest's clock said {}",
            held.task_id, held.valid_from, held.guest_time
        );
        ["holds".into(), said]
    }));
    rows.extend(vm.kernel.iter().map(|k| ["kernel".into(), k.clone()]));
    rows.extend(vm.port_pid.iter().map(|pid| match vm.held_by {
        Some(_) => ["held by".into(), format!("its VMM, process {pid}")],
        None => ["port process".into(), pid.to_string()],
    }));
    rows.extend(vm.fault.iter().map(|f| ["fault".into(), f.clone()]));
    rows.extend(vm.enrolled_as.iter().map(|id| {
        [
            "fault".into(),
            format!("the image is enrolled as `{id}`: rebuild it"),
        ]
    }));
    if let Some(memory) = &vm.carrier.memory {
        let Carrier {
            bytes,
            line_ns,
            streams,
            ..
        } = vm.carrier;
        let kib = bytes / 1024;
        rows.push([
            "ring memory".into(),
            format!("{memory}, {kib} KiB, {line_ns} ns a line, {streams} streams"),
        ]);
        let doorbell = vm.carrier.doorbell.iter();
        rows.extend(doorbell.map(|bell| ["ring doorbell".into(), bell.clone()]));
    }
    if let (Some(ring), Some(vsock)) = (vm.carrier.rtt_ns, vm.carrier.vsock_rtt_ns) {
        let us = |ns: u64| ns as f64 / 1000.0;
        let (ring, vsock) = (us(ring), us(vsock));
        let said = format!("64 B there and back: ring {ring:.0} us, vsock {vsock:.0} us");
        rows.push(["latency".into(), said]);
    }
    for [key, value] in rows {
        println!("{key:<14} {}", output::escape(&value));
    }
    Ok(())
}

/// `300.0 s behind this host's`: a message's way is part of it, so that less than a second means nothing.
fn clock(ahead_ms: i64) -> String {
    let tenths = ahead_ms.unsigned_abs() / 100;
    let side = match ahead_ms {
        ms if ms.unsigned_abs() < 1000 => return "as this host's".into(),
        ms if ms < 0 => "behind",
        _ => "ahead of",
    };
    format!("{}.{} s {side} this host's", tenths / 10, tenths % 10)
}

/// `ring: both sides use the ring`, `vsock: no VMM has handed a ring over`.
fn carrier(carrier: &Carrier) -> String {
    let kind = match carrier.kind {
        CarrierKind::Vsock => "vsock",
        CarrierKind::Ring => "ring",
    };
    match carrier.why.as_str() {
        "" => kind.to_owned(),
        why => format!("{kind}: {why}"),
    }
}

fn join(ports: &[impl ToString]) -> String {
    ports
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_says_which_side_of_the_hosts_it_is_on() {
        for (ms, want) in [
            (0, "as this host's"),
            (-999, "as this host's"),
            (-300_050, "300.0 s behind this host's"),
            (86_400_100, "86400.1 s ahead of this host's"),
            (i64::MIN, "9223372036854775.8 s behind this host's"),
        ] {
            assert_eq!(clock(ms), want);
        }
    }
}
