//! `adit task ls`: the newest tasks, as a table.

use adit_api::{AllTasks, Task, TaskState};
use clap::Args;
use clap::builder::PossibleValuesParser;
use jiff::Timestamp;

use super::{said, short};
use crate::client::Client;
use crate::error::Failure;
use crate::output::{self, age};
use crate::text;
use crate::text::Format;
use crate::{completion, goal, resolve};

/// Tasks and goals that are listed if nobody asks for more.
pub const LISTED: usize = 100;

pub const EXAMPLE: &str = "\
Examples:
  adit task ls --vm web-1 --limit 20
  adit task ls --state failed --all
  adit task ls --state failed --all-hosts
  adit task ls -o json | jq -r '.[] | select(.exit != 0) | .task_id'

AGE is the time since a task was queued; TRY counts the attempts of its step. With --all-hosts the exit status is 1 if a host does
not say what it has: it is named, and the others' tasks are listed.";

#[derive(Args)]
pub struct Ls {
    /// Only those of this VM, on whichever host it is; the tasks of a removed VM are kept for a while
    #[arg(long, add = completion::vms())]
    vm: Option<String>,
    /// Only those of this goal: its id, or the last digits of it
    #[arg(long, add = completion::goals())]
    goal: Option<String>,
    /// Only those in this state
    #[arg(long, value_parser = PossibleValuesParser::new(TaskState::ALL.map(TaskState::name)))]
    state: Option<String>,
    /// List the newest so many; standard error says if there are more
    #[arg(long, value_name = "N", default_value_t = LISTED, value_parser = at_least_one)]
    limit: usize,
    /// List all of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Those of all hosts of aditd.toml, with their hosts; with --limit at most 500
    #[arg(long, conflicts_with_all = ["vm", "all"])]
    all_hosts: bool,
}

/// Most rows of all hosts.
const ALL_HOSTS_MAX: usize = 500;

/// How many of all hosts are asked for.
pub fn of_all_hosts(limit: usize) -> Result<usize, Failure> {
    match limit {
        ..=ALL_HOSTS_MAX => Ok(limit),
        _ => {
            let message = format!("--all-hosts lists at most {ALL_HOSTS_MAX}");
            Err(Failure::new("usage", message)
                .help("write a --limit up to that, or ask each host: `adit --server https://…`"))
        }
    }
}

/// Reads a number from 1.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|&n: &usize| n > 0);
    number.ok_or_else(|| "write a number from 1; --all lists all".into())
}

pub async fn run(ls: &Ls, client: &Client, format: Format) -> Result<(), Failure> {
    if ls.all_hosts {
        return all_hosts(ls, client, format).await;
    }
    let limit = (!ls.all).then_some(ls.limit);
    let (tasks, more) = client.newest(&path(ls, client).await?, limit).await?;
    match format {
        Format::Json => output::json(&tasks)?,
        Format::Table => list(&tasks)?,
    }
    say_more("tasks", tasks.len(), more);
    Ok(())
}

async fn all_hosts(ls: &Ls, client: &Client, format: Format) -> Result<(), Failure> {
    let limit = of_all_hosts(ls.limit)?;
    let mut path = format!("/v1/all-hosts/tasks?newest={limit}");
    for part in query(ls, client).await? {
        path += &format!("&{part}");
    }
    let all: AllTasks = client.get(&path).await?;
    match format {
        Format::Json => output::json(&all)?,
        Format::Table => list(&all.tasks)?,
    }
    say_more_of_hosts("tasks", all.tasks.len(), all.earlier);
    resolve::all_spoke(&all.silent)
}

/// The same of all hosts.
pub fn say_more_of_hosts(what: &str, listed: usize, more: bool) {
    if more {
        adit_print::note(format_args!(
            "these are the newest {listed} {what} of all hosts, and there are older ones: --limit N lists more, up to {ALL_HOSTS_MAX}"
        ));
    }
}

/// A list that is not whole must not look as if it were.
pub fn say_more(what: &str, listed: usize, more: bool) {
    if more {
        adit_print::note(format_args!(
            "these are the newest {listed} {what}, and there are older ones: --limit N lists more, --all lists all"
        ));
    }
}

async fn path(ls: &Ls, client: &Client) -> Result<String, Failure> {
    let query = query(ls, client).await?;
    Ok(format!("/v1/tasks?{}", query.join("&")))
}

async fn query(ls: &Ls, client: &Client) -> Result<Vec<String>, Failure> {
    let mut query = Vec::new();
    if let Some(vm) = &ls.vm {
        for label in vm.split('.') {
            label.parse::<adit_names::VmId>().map_err(|e| {
                let message = format!("`{}` names no VM: {e}", text::escape(vm));
                Failure::new("unknown-vm", message).help("`adit vm ls` lists the names")
            })?;
        }
        query.push(format!("vm={vm}"));
    }
    if let Some(id) = &ls.goal {
        query.push(format!("goal={}", goal::resolve(client, id).await?));
    }
    query.extend(ls.state.iter().map(|state| format!("state={state}")));
    Ok(query)
}

pub fn list(tasks: &[Task]) -> Result<(), Failure> {
    if tasks.is_empty() {
        return output::line("no tasks");
    }
    let now = Timestamp::now();
    // Of several hosts.
    let has_hosts = tasks.iter().any(|t| t.host.is_some());
    let rows: Vec<_> = tasks
        .iter()
        .map(|t| {
            let vm = match &t.host {
                Some(host) => format!("{}.{host}", t.vm),
                None => t.vm.clone(),
            };
            [
                short(&t.task_id).to_owned(),
                goal::short(&t.goal_id).to_owned(),
                vm,
                t.step.clone(),
                t.attempt.to_string(),
                t.state.name().into(),
                t.exit.map_or_else(|| "-".into(), |e| e.to_string()),
                age(&t.queued_at, now),
                said(t),
            ]
        })
        .collect();
    let vm = if has_hosts { "VM.HOST" } else { "VM" };
    output::table(
        [
            "TASK", "GOAL", vm, "STEP", "TRY", "STATE", "EXIT", "AGE", "SAID",
        ],
        &rows,
    )
}
