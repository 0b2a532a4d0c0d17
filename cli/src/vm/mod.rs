//! `adit vm …` and `adit wait`.

mod add;
mod freeze;
mod lock;
mod show;
mod wait;

use std::str::FromStr;

use adit_api::{Vm, VmChange};
use clap::{ArgGroup, Args, Subcommand};

use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output;
use crate::text::Format;

pub use wait::{Wait, wait};

const SET_EXAMPLE: &str = "\
Examples:
  adit vm set web-1 --allow 80,443
  adit vm set web-1 --allow-vsock none
  adit vm set web-1 --busy-poll-us 50 && adit vm reload web-1

Open streams go on. A VM of aditd.toml is changed there, and `systemctl reload aditd` applies it. Its name, its CID and the
memory of its ring cannot be changed: remove the VM and add it again.";

#[derive(Subcommand)]
pub enum VmCommand {
    /// List the VMs
    #[command(alias = "list")]
    Ls {
        /// Those of all hosts of aditd.toml, with their hosts
        #[arg(long)]
        all_hosts: bool,
    },
    /// Show one VM
    Show {
        /// Name of the VM
        #[arg(add = completion::vms())]
        name: String,
    },
    Add(add::Add),
    /// Change what may be reached in a VM, and how it is polled, while it runs
    #[command(after_help = SET_EXAMPLE)]
    Set(Set),
    /// Start a new port process in place of the VM's, under the running VM: after an upgrade of adit-port
    ///
    /// Open tunnels and the agent's connection end; the VM keeps its channel.
    Reload {
        /// Name of the VM
        #[arg(add = completion::vms())]
        name: String,
    },
    Lock(lock::Lock),
    /// Let new tunnels and tasks into a VM again
    Unlock {
        /// Name of the VM
        #[arg(add = completion::vms())]
        name: String,
    },
    Freeze(freeze::Freeze),
    /// Have a VM's file systems go on that stand still
    Thaw {
        /// Name of the VM
        #[arg(add = completion::vms())]
        name: String,
    },
    /// Remove a VM: its channel and its tunnels end
    ///
    /// Its open tasks end as `expired`, or as `lost_contact` if they were handed out. A VM that its VMM has registered
    /// (`adit-vmm --aditd`) is removed by that VMM when the VM ends; until then this command is refused.
    Rm {
        /// Name of the VM
        #[arg(add = completion::vms())]
        name: String,
        /// Remove it even while its VMM holds it: the VM runs on, without a channel until it is started again
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        drain: lock::Drain,
    },
}

#[derive(Args)]
#[command(group = ArgGroup::new("change").required(true).multiple(true))]
#[command(
    override_usage = "adit vm set <NAME> [--allow PORT,…] [--allow-vsock PORT,…] [--allow-service NAME,…] [--busy-poll-us MICROSECONDS]"
)]
pub struct Set {
    /// Name of the VM
    #[arg(add = completion::vms())]
    name: String,
    /// Guest TCP ports that may be reached from now on, in place of those before; `none` for none
    #[arg(long, value_name = "PORT,…", group = "change")]
    allow: Option<Ports<u16>>,
    /// Plain AF_VSOCK ports that may be reached from now on, in place of those before; `none` for none
    #[arg(long, value_name = "PORT,…", group = "change")]
    allow_vsock: Option<Ports<u32>>,
    /// Services that may be reached from now on, in place of those before; `none` for none
    #[arg(long, value_name = "NAME,…", group = "change")]
    allow_service: Option<Ports<adit_names::VmId>>,
    /// How long its port process polls before it sleeps, in microseconds: faster answers for a busy core; 0 = not at all.
    /// In force after `adit vm reload`
    #[arg(long, value_name = "MICROSECONDS", group = "change")]
    busy_poll_us: Option<u32>,
}

/// `80,22`, or `none`.
#[derive(Clone)]
struct Ports<T>(Vec<T>);

impl<T: FromStr> FromStr for Ports<T> {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let port = |p: &str| {
            p.parse().map_err(|_| {
                format!("`{p}` is none: write 80,22 (of services docker,ssh), or none")
            })
        };
        text.split(',')
            .map(port)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

pub async fn run(command: &VmCommand, client: &Client, format: Format) -> Result<(), Failure> {
    match command {
        VmCommand::Ls { all_hosts: true } => crate::resolve::all(client, format).await,
        VmCommand::Ls { .. } => show::list(&client.get::<Vec<Vm>>("/v1/vms").await?, format),
        VmCommand::Show { name } => show::show(&client.get(&path(name)?).await?, format),
        VmCommand::Add(add) => add::run(add, client, format).await,
        VmCommand::Freeze(freeze) => freeze::freeze(freeze, client, format).await,
        VmCommand::Thaw { name } => freeze::thaw(name, client, format).await,
        VmCommand::Lock(lock) => lock::lock(lock, client, format).await,
        VmCommand::Unlock { name } => lock::unlock(name, client, format).await,
        VmCommand::Set(set) => {
            let change = VmChange {
                allow: set.allow.clone().map(|Ports(ports)| ports),
                allow_vsock: set.allow_vsock.clone().map(|Ports(ports)| ports),
                allow_services: set
                    .allow_service
                    .as_ref()
                    .map(|Ports(names)| names.iter().map(ToString::to_string).collect()),
                busy_poll_us: set.busy_poll_us,
            };
            show::show(&client.patch(&path(&set.name)?, &change).await?, format)
        }
        VmCommand::Reload { name } => {
            let url = format!("{}/reload", path(name)?);
            let vm: Vm = client.post(&url, &()).await?;
            match format {
                Format::Json => output::json(&vm),
                Format::Table => {
                    let pid = vm
                        .port_pid
                        .map_or_else(|| "-".into(), |pid| pid.to_string());
                    output::line(format_args!("{name} is served by process {pid}"))
                }
            }
        }
        VmCommand::Rm { name, force, drain } => {
            drain.run(name, *force, client, format).await?;
            let query = if *force { "?force=true" } else { "" };
            client.delete(&format!("{}{query}", path(name)?)).await?;
            match format {
                Format::Json => output::json(&serde_json::json!({ "removed": name })),
                Format::Table => output::line(format_args!("{name} removed")),
            }
        }
    }
}

/// The path of a VM. A name that is no name never becomes part of a path.
pub fn path(name: &str) -> Result<String, Failure> {
    let id: adit_names::VmId = name.parse().map_err(|e| {
        Failure::new("unknown-vm", format!("`{name}` names no VM: {e}"))
            .help("`adit vm ls` lists the names")
    })?;
    Ok(format!("/v1/vms/{id}"))
}
