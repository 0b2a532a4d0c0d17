//! `adit goal apply`: signs a goal and hands it over, in one or in two runs.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use adit_api::{Goal, NewGoal};
use adit_names::VmId;
use adit_tasks::draft::{Draft, Inputs};
use adit_tasks::dsse;
use clap::Args;
use jiff::Timestamp;

use super::show;
use crate::client::Client;
use crate::error::Failure;
use crate::output::{self, duration, span};
use crate::text;
use crate::text::Format;
use crate::{completion, key, task};

pub const EXAMPLE: &str = "\
A goal, in YAML:
  valid_for: 24h
  steps:
    - id: hello
      script: {interpreter: /bin/sh, script: \"uname -a\\n\", timeout_s: 30}
    - id: motd
      idempotent: true
      file: {path: /etc/motd, content: \"managed by adit\\n\", mode: \"0644\"}

  adit goal apply hello.yaml --sign fleet.key --to web-1,web-2
  adit goal apply hello.yaml --sign fleet.key --to web-1 --watch --timeout 10m
  adit goal apply hello.yaml --sign fleet.key --to web-1 --save signed.json --dry-run
  adit goal apply signed.json

A VM of another host is named like any other, or as VM.HOST: the host that is asked hands the goal over, and the one that has the VM decides
whether it is allowed. The same signed goal may be given again: nothing is queued twice.

A goal is valid from its signing for as long as `valid_for` says (24h if it says nothing). One whose time is over is refused.

Exit status: 0 it is queued, and with --watch every step has succeeded; 1 it is refused; 4 there is no such VM; 5 with --watch:
a step did not succeed; 124 --timeout is over.";

#[derive(Args)]
pub struct Apply {
    /// A goal in YAML or JSON (with --sign), or one that is signed already; `-` = standard input
    file: PathBuf,
    /// Private key to sign with
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
    /// VMs that it is for, also with their hosts (VM.HOST); of a goal that is signed already: those of its audience for which it is
    /// queued
    #[arg(long, value_delimiter = ',', value_name = "VM,…", add = completion::vms())]
    to: Vec<String>,
    /// Queue it even for VMs that its audience does not name: they will refuse it
    #[arg(long)]
    relay_unchecked: bool,
    /// Write the signed goal to this file
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Print what would be signed, and hand nothing over
    #[arg(long)]
    dry_run: bool,
    /// Watch its tasks afterwards until all have ended, as `adit task watch --goal` does
    #[arg(long, conflicts_with = "dry_run")]
    watch: bool,
    /// With --watch: give up after this long, for example 30s or 5m (exit status 124)
    #[arg(
        long,
        requires = "watch",
        value_parser = duration,
        value_name = "DURATION"
    )]
    timeout: Option<Duration>,
}

pub async fn run(apply: &Apply, client: &Client, format: Format) -> Result<ExitCode, Failure> {
    let text = read(&apply.file)?;
    let envelope = match &apply.sign {
        Some(key_file) => {
            let payload = payload(apply, &text)?;
            if apply.dry_run {
                output::line(String::from_utf8_lossy(&payload))?;
            }
            dsse::sign(&payload, &key::read(key_file)?)
        }
        None => text,
    };
    check(&envelope, apply)?;
    if let Some(file) = &apply.save {
        fs::write(file, &envelope)
            .map_err(|e| Failure::io(&format!("cannot write {}", file.display()), &e))?;
    }
    if apply.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    let new = NewGoal {
        envelope,
        to: apply.to.clone(),
        relay_unchecked: apply.relay_unchecked,
    };
    let goal: Goal = client.post("/v1/goals", &new).await?;
    show(&goal, format)?;
    match apply.watch {
        true => task::watch(client, Some(goal.goal_id), apply.timeout, format).await,
        false => Ok(ExitCode::SUCCESS),
    }
}

/// Checks what is handed over: that it is a signed goal, and that its time is not over.
fn check(envelope: &str, apply: &Apply) -> Result<(), Failure> {
    let file = apply.file.display();
    let envelope = dsse::Envelope::parse(envelope.as_bytes()).map_err(|e| {
        Failure::new("bad-goal", format!("{file} is not a signed goal: {e}"))
            .help("a goal that is not signed yet needs --sign KEY and --to VM,…")
    })?;
    let goal = adit_tasks::Goal::parse_unverified(envelope.unverified_payload()).map_err(|e| {
        Failure::new(
            "bad-goal",
            format!("{file}: what is signed is no goal: {e}"),
        )
    })?;
    let past = Duration::try_from(Timestamp::now().duration_since(goal.not_after));
    match past {
        Ok(past) if !past.is_zero() => {
            let message = format!(
                "{file}: the goal was valid until {}, which was {} ago",
                goal.not_after,
                span(past)
            );
            Err(Failure::new("expired", message)
                .help("sign it again: its time begins when it is signed"))
        }
        _ => Ok(()),
    }
}

fn read(file: &PathBuf) -> Result<String, Failure> {
    let mut text = String::new();
    let done = match file.to_str() {
        Some("-") => std::io::stdin().read_to_string(&mut text).map(drop),
        _ => fs::read_to_string(file).map(|t| text = t),
    };
    done.map_err(|e| {
        Failure::io(&format!("cannot read {}", file.display()), &e)
            .help("name the file with the goal's steps (YAML), or a signed goal (`--save`); `-` is standard input")
    })?;
    Ok(text)
}

/// The bytes to sign.
fn payload(apply: &Apply, text: &str) -> Result<Vec<u8>, Failure> {
    if apply.to.is_empty() {
        return Err(Failure::new("usage", "no VM is named that the goal is for")
            .help("name VMs with --to web-1,web-2"));
    }
    let vms = apply.to.iter().map(|name| {
        // The goal is for the VM, on whichever host it is: of VM.HOST, which aditd has to find it by, only VM is signed.
        let vm = name.split_once('.').map_or(&**name, |(vm, _)| vm);
        vm.parse::<VmId>().map_err(|e| {
            Failure::new(
                "unknown-vm",
                format!("`{}` names no VM: {e}", text::escape(name)),
            )
        })
    });
    let draft = Draft::parse(text, &apply.file.display().to_string()).map_err(|e| {
        let help = match dsse::Envelope::parse(text.as_bytes()) {
            Ok(_) => "this goal is signed already: leave --sign out",
            Err(_) => "`adit goal apply --help` shows a goal",
        };
        Failure::new("bad-goal", e.to_string()).help(help)
    })?;
    let now = Timestamp::now();
    let inputs = Inputs {
        goal_id: uuid::Uuid::now_v7(),
        // Microseconds since 1970: grows from goal to goal without a counter that could be lost.
        key_seq: u64::try_from(now.as_microsecond()).unwrap_or(0),
        vms: vms.collect::<Result<_, _>>()?,
        now,
    };
    draft
        .into_payload(inputs)
        .map_err(|e| Failure::new("bad-goal", format!("{}: {e}", apply.file.display())))
}
