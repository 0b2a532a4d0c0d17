//! `adit doctor`: what is wrong with aditd and its VMs, and what to do. What is looked at, and what is said of it, is in
//! [`adit_api::doctor`].

use std::process::ExitCode;

use adit_api::doctor::{Finding, Health, access, of_host, of_silent_host, of_vm};
use adit_api::{ConfigStatus, GrantShown, Vm};
use clap::Args;
use serde::Serialize;

use crate::client::Client;
use crate::completion;
use crate::error::{self, Failure};
use crate::output;
use crate::text::{Format, escape};
use crate::vm;

const EXAMPLE: &str = "\
Examples:
  adit doctor web-1
  adit doctor --json | jq '.vms[].findings[] | select(.health == \"failed\")'

Checks, in the order in which a stream comes into a guest: host, configuration, users (where the kernel does not say who
local clients are), port process, VMM, device, session, agent,
version, agent program, identity, trust, policy, journal, card, clock, services, last dial; of one VM also who has access. Each is ok, failed, or unknown because an
earlier one failed. A dial that failed more than ten minutes ago is no failure any more.

Exit status: 0 nothing has failed; 6 something has; 3 aditd does not answer, so nothing of a VM is known.";

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub struct Doctor {
    /// Name of the VM; without it, the host and all its VMs
    #[arg(add = completion::vms())]
    vm: Option<String>,
    /// The same as -o json
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
}

/// What was found.
#[derive(Serialize)]
struct Report {
    /// Nothing has failed.
    ok: bool,
    host: Vec<Finding>,
    vms: Vec<OfVm>,
}

#[derive(Serialize)]
struct OfVm {
    vm: String,
    ok: bool,
    findings: Vec<Finding>,
}

pub async fn run(doctor: &Doctor, client: &Client, format: Format) -> Result<ExitCode, Failure> {
    let (config, vms, grants) = match asked(doctor, client).await {
        Ok(said) => said,
        Err(failure) if failure.is_about_aditd() => {
            if format == Format::Json {
                let host = vec![failure.finding()];
                let vms = Vec::new();
                output::json(&Report {
                    ok: false,
                    host,
                    vms,
                })?;
            }
            return Err(failure);
        }
        Err(failure) => return Err(failure),
    };
    let host = config.as_ref().map_or_else(of_silent_host, of_host);
    let vms: Vec<OfVm> = vms
        .iter()
        .map(|vm| {
            let mut findings = of_vm(vm);
            findings.extend(grants.as_deref().map(access));
            OfVm {
                vm: vm.name.clone(),
                ok: is_well(&findings),
                findings,
            }
        })
        .collect();
    let report = Report {
        ok: is_well(&host) && vms.iter().all(|vm| vm.ok),
        host,
        vms,
    };
    match format {
        Format::Json => output::json(&report)?,
        Format::Table => print(&report, doctor.vm.is_some())?,
    }
    Ok(match report.ok {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(error::UNWELL),
    })
}

/// What aditd says of its configuration, of VMs, and of the grants about the one that is named: to some callers not all of it.
type Said = (Option<ConfigStatus>, Vec<Vm>, Option<Vec<GrantShown>>);

async fn asked(doctor: &Doctor, client: &Client) -> Result<Said, Failure> {
    let config = match client.get("/v1/config").await.map_err(Failure::from) {
        Ok(config) => Some(config),
        Err(denied) if denied.code == "denied" => None,
        Err(failure) => return Err(failure),
    };
    let Some(name) = &doctor.vm else {
        return Ok((config, client.get("/v1/vms").await?, None));
    };
    let vm: Vm = client.get(&vm::path(name)?).await?;
    // They are the owner's to see, and one of a version before has none.
    let grants = client.get(&format!("/v1/grants?vm={name}")).await;
    Ok((config, vec![vm], grants.ok()))
}

fn is_well(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.health != Health::Failed)
}

/// All of one VM; of many, what has failed.
fn print(report: &Report, is_one: bool) -> Result<(), Failure> {
    report.host.iter().try_for_each(|f| line("", f))?;
    for vm in &report.vms {
        let name = match is_one {
            true => String::new(),
            false => format!("{}: ", vm.vm),
        };
        let shown = |f: &&Finding| is_one || f.health == Health::Failed;
        let mut findings = vm.findings.iter().filter(shown);
        findings.try_for_each(|f| line(&name, f))?;
    }
    if !is_one {
        let (all, well) = (
            report.vms.len(),
            report.vms.iter().filter(|vm| vm.ok).count(),
        );
        output::line(format_args!("{well} of {all} VMs are well"))?;
    }
    Ok(())
}

fn line(vm: &str, finding: &Finding) -> Result<(), Failure> {
    let Finding {
        check,
        health,
        says,
        remedy,
    } = finding;
    let (vm, check, says) = (escape(vm), escape(check), escape(says));
    output::line(format_args!("{:<8} {vm}{check}: {says}", health.name()))?;
    match remedy.as_str() {
        "" => Ok(()),
        remedy => output::line(format_args!("{:<8} do: {}", "", escape(remedy))),
    }
}
