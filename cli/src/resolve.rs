//! `adit resolve`: which host has a VM.

use adit_api::{AllVms, Resolution, Silent, VmAt};
use clap::Args;

use crate::client::Client;
use crate::error::Failure;
use crate::output;
use crate::text::{Format, escape};

const EXAMPLE: &str = "\
Examples:
  adit resolve web-9
  adit resolve web-9.beta

Exit status: 0 one host has it; 1 several have it, and nothing says which is meant: name the host, as VM.HOST; 3 none
that answers has it, and one that may have it does not answer; 4 none has it.";

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub struct Resolve {
    /// Name of the VM, also with its host: VM.HOST
    name: String,
}

pub async fn resolve(resolve: &Resolve, client: &Client, format: Format) -> Result<(), Failure> {
    let labels = resolve.name.strip_suffix(".adit").unwrap_or(&resolve.name);
    let is_name = labels
        .split('.')
        .all(|label| label.parse::<adit_names::VmId>().is_ok());
    if !is_name {
        let message = format!("`{}` names no VM", resolve.name);
        return Err(
            Failure::new("unknown-vm", message).help("`adit vm ls --all-hosts` lists the names")
        );
    }
    let found: Resolution = client.get(&format!("/v1/resolve/{labels}")).await?;
    match (format, &found.host) {
        (Format::Json, _) => output::json(&found)?,
        (Format::Table, Some(host)) => {
            let here = if found.here { ", this one" } else { "" };
            let (vm, host) = (escape(&found.vm), escape(host));
            output::line(format_args!("{vm} is on host {host}{here}"))?;
        }
        (Format::Table, None) if found.here => {
            output::line(format_args!("{} is on this host", escape(&found.vm)))?
        }
        (Format::Table, None) => table(&found.claims)?,
    }
    if found.host.is_none() && !found.here {
        let hosts: Vec<_> = found
            .claims
            .iter()
            .map(|claim| claim.host.as_str())
            .collect();
        let message = format!(
            "VM `{}` is on several hosts: {}",
            found.vm,
            hosts.join(", ")
        );
        return Err(Failure::new("ambiguous", message).help("name the host too, as VM.HOST"));
    }
    Ok(())
}

/// `adit vm ls --all-hosts`.
pub async fn all(client: &Client, format: Format) -> Result<(), Failure> {
    let all: AllVms = client.get("/v1/resolve").await?;
    match format {
        Format::Json => output::json(&all)?,
        Format::Table => table(&all.vms)?,
    }
    all_spoke(&all.silent)
}

/// A list is whole only where every host has said what it has.
pub fn all_spoke(silent: &[Silent]) -> Result<(), Failure> {
    let Some(first) = silent.first() else {
        return Ok(());
    };
    let mut message = format!(
        "host `{}` does not say what it has: {}",
        first.host, first.why
    );
    let others: Vec<_> = silent[1..]
        .iter()
        .map(|s| format!("`{}`", s.host))
        .collect();
    if !others.is_empty() {
        message += &format!("; nor do {}", others.join(", "));
    }
    Err(Failure::new("silent-host", message)
        .help("`adit config`, and the log of that host, say more"))
}

fn table(vms: &[VmAt]) -> Result<(), Failure> {
    let rows = vms.iter().map(|vm| {
        let generation = vm.generation.map_or_else(|| "-".into(), |n| n.to_string());
        let (state, by) = match &vm.by_map_of {
            // Nobody has looked.
            Some(of) => ("-", format!("the map of {of}")),
            None if vm.locked && vm.live => ("live, locked", vm.host.clone()),
            None if vm.locked => ("down, locked", vm.host.clone()),
            None if vm.live => ("live", vm.host.clone()),
            None => ("down", vm.host.clone()),
        };
        [
            vm.name.clone(),
            vm.host.clone(),
            state.into(),
            generation,
            by,
        ]
    });
    let head = ["VM", "HOST", "STATE", "CARD", "SAID-BY"];
    output::table(head, &rows.collect::<Vec<_>>())
}
