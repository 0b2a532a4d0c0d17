//! `adit completion SHELL`: what a shell sources, and what it asks this program while somebody types.
//!
//! The shell's script calls `adit` again, with `ADIT_COMPLETE` set, for every word that is completed. So options and values
//! are always those of the `adit` that is installed, and names come from the `aditd` that runs. If there is none, or it
//! does not answer at once, there are no names, and nothing is said of it: somebody is in the middle of a line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use adit_api::{GoalSummary, Task, Vm};
use adit_names::VmId;
use clap::{Args, CommandFactory};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use serde::de::DeserializeOwned;

use crate::error::Failure;
use crate::output;
use crate::server::Which;
use crate::task::short;
use crate::text::{Format, escape};

/// How long a key press waits for aditd at most.
const PATIENCE: Duration = Duration::from_millis(500);
/// Tasks and goals that are offered at most: the newest.
const OFFERED_MAX: usize = 50;
/// How the shell's script asks.
const VARIABLE: &str = "ADIT_COMPLETE";

const EXAMPLE: &str = "\
Examples:
  adit completion bash > /etc/bash_completion.d/adit
  adit completion zsh > /usr/local/share/zsh/site-functions/_adit
  adit completion fish > /etc/fish/completions/adit.fish

Options, commands and the names of VMs, tasks and goals are completed; names only while aditd runs.
Print it again after an upgrade of adit.";

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub struct Completion {
    /// Which shell
    shell: clap_complete::Shell,
}

/// Answers a shell's script, if that is who asks.
pub fn asked() -> Option<ExitCode> {
    let here = std::env::current_dir().ok();
    let env = CompleteEnv::with_factory(crate::Cli::command).var(VARIABLE);
    match env.try_complete(std::env::args_os(), here.as_deref()) {
        Ok(false) => None,
        Ok(true) => Some(ExitCode::SUCCESS),
        Err(e) => {
            adit_print::note!("adit: cannot complete by {VARIABLE}: {e}");
            Some(ExitCode::FAILURE)
        }
    }
}

/// Prints the script of a shell.
pub fn print(completion: &Completion, format: Format) -> Result<(), Failure> {
    let shell = completion.shell.to_string();
    let unknown = || Failure::new("usage", format!("no completions for `{shell}`"));
    let shells = Shells::builtins();
    let completer = shells.completer(&shell).ok_or_else(unknown)?;
    let mut script = Vec::new();
    completer
        .write_registration(VARIABLE, "adit", "adit", &program(), &mut script)
        .map_err(|e| Failure::io("cannot write the completions", &e))?;
    match format {
        Format::Json => output::json(&serde_json::json!({
            "shell": shell, "script": String::from_utf8_lossy(&script),
        })),
        Format::Table => Ok(adit_print::bytes(&script)?),
    }
}

/// What the script calls: `adit` where it was found by its name, else this very file.
fn program() -> String {
    let called: PathBuf = std::env::args_os().next().unwrap_or_default().into();
    match called.components().count() {
        0 | 1 => "adit".to_owned(),
        _ => std::path::absolute(&called)
            .unwrap_or(called)
            .to_string_lossy()
            .into_owned(),
    }
}

/// Offers the names of the VMs.
pub fn vms() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let vms: Vec<Vm> = ask("/v1/vms").unwrap_or_default();
        // What is no name never gets into a shell's line.
        let names = vms
            .into_iter()
            .filter_map(|vm| vm.name.parse::<VmId>().ok());
        names
            .map(|name| CompletionCandidate::new(name.to_string()))
            .collect::<Vec<_>>()
    })
}

/// Offers the newest tasks, with what they are.
pub fn tasks() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let path = format!("/v1/tasks?newest={OFFERED_MAX}");
        let tasks: Vec<Task> = ask(&path).unwrap_or_default();
        let offer = |t: &Task| {
            let what = escape(&format!("{} on {}, {}", t.step, t.vm, t.state.name()));
            CompletionCandidate::new(short(&t.task_id)).help(Some(what.into()))
        };
        let is_id = |t: &&Task| t.task_id.bytes().all(|b| b.is_ascii_hexdigit());
        let tasks = tasks.iter().filter(is_id).rev();
        tasks.take(OFFERED_MAX).map(offer).collect()
    })
}

/// Offers the newest goals, with when they were accepted.
pub fn goals() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let path = format!("/v1/goals?newest={OFFERED_MAX}");
        let goals: Vec<GoalSummary> = ask(&path).unwrap_or_default();
        let offer = |g: GoalSummary| {
            let id: uuid::Uuid = g.goal_id.parse().ok()?;
            let help = Some(escape(&g.accepted_at).into());
            Some(CompletionCandidate::new(id.to_string()).help(help))
        };
        goals.into_iter().rev().filter_map(offer).collect()
    })
}

/// Asks aditd; none: it is not there, or late.
fn ask<T: DeserializeOwned>(path: &str) -> Option<T> {
    let words: Vec<_> = std::env::args_os().collect();
    let client = Which::of_words(&words).client(PATIENCE).ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    runtime.block_on(client.get(path)).ok()
}
