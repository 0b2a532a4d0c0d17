//! `adit task …`: what became of the tasks.

mod ls;
mod output;
mod watch;

use std::process::ExitCode;
use std::time::Duration;

use adit_api::Task;
use clap::Subcommand;

use crate::client::Client;
use crate::error::Failure;
use crate::output::{self as print, duration};
use crate::text::{Format, escape};
use crate::{completion, goal};

pub use ls::{LISTED, at_least_one, list, of_all_hosts, say_more, say_more_of_hosts};
pub use watch::watch;

const WATCH_EXAMPLE: &str = "\
Example:
  adit task watch --goal 01937b5e-0000-7000-8000-000000000001 --timeout 10m || adit task ls --state failed

Without --goal it watches the tasks that are open now, and those that are queued meanwhile. An aditd that is restarted
meanwhile is asked again.

Exit status: 0 every step has succeeded, in its last attempt; 5 a step has not; 4 there is no such goal, or, without --goal,
no task is open; 3 aditd ended the stream and did not come back within --request-timeout; 124 --timeout is over.";

#[derive(Subcommand)]
pub enum TaskCommand {
    /// List tasks, the newest last
    #[command(alias = "list", after_help = ls::EXAMPLE)]
    Ls(ls::Ls),
    /// Show one task
    Show {
        /// Id of the task, or the first digits of it
        #[arg(add = completion::tasks())]
        id: String,
    },
    /// Print every change until all tasks have ended; exit status 5 if a step did not succeed
    #[command(after_help = WATCH_EXAMPLE)]
    Watch {
        /// Only the tasks of this goal: its id, or the last digits of it
        #[arg(long, add = completion::goals())]
        goal: Option<String>,
        /// Give up after this long, for example 30s or 5m (exit status 124)
        #[arg(long, value_parser = duration, value_name = "DURATION")]
        timeout: Option<Duration>,
    },
    /// Print what a task wrote
    #[command(after_help = output::EXAMPLE)]
    Output(output::Output),
}

pub async fn run(
    command: &TaskCommand,
    client: &Client,
    format: Format,
) -> Result<ExitCode, Failure> {
    match command {
        TaskCommand::Ls(ls) => ls::run(ls, client, format).await?,
        TaskCommand::Show { id } => show(&resolve(client, id).await?, format)?,
        TaskCommand::Watch { goal, timeout } => {
            let goal = match goal {
                Some(id) => Some(goal::resolve(client, id).await?),
                None => None,
            };
            return watch(client, goal, *timeout, format).await;
        }
        TaskCommand::Output(output) => output::run(output, client, format).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Finds a task by its id or by the first digits of it.
async fn resolve(client: &Client, id: &str) -> Result<Task, Failure> {
    let unknown = || {
        let message = format!("no task begins with `{}`", escape(id));
        Failure::new("unknown-task", message).help("`adit task ls` lists them")
    };
    // It goes into a path.
    if id.is_empty() || id.len() > 32 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(unknown());
    }
    let id = id.to_ascii_lowercase();
    if id.len() == 32 {
        return Ok(client.get(&format!("/v1/tasks/{id}")).await?);
    }
    let mut found: Vec<Task> = client.get(&format!("/v1/tasks?id={id}&limit=500")).await?;
    // An aditd of before does not know `id`, and lists all of them.
    found.retain(|t| t.task_id.starts_with(&id));
    match found.len() {
        1 => Ok(found.swap_remove(0)),
        0 => Err(unknown()),
        n => Err(
            Failure::new("ambiguous", format!("{n} tasks begin with `{id}`"))
                .help("give more digits"),
        ),
    }
}

/// First digits of an id: enough to name it in a list.
pub fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

/// Why it ended so, or what it printed first.
fn said(t: &Task) -> String {
    if !t.reason.is_empty() {
        return t.reason.clone();
    }
    t.output_preview
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn show(t: &Task, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return print::json(t);
    }
    let or_dash = |v: &Option<String>| v.clone().unwrap_or_else(|| "-".into());
    let (out, err) = t.output_bytes;
    let vm = match &t.host {
        Some(host) => format!("{}.{host}", t.vm),
        None => t.vm.clone(),
    };
    let rows = [
        ("task", t.task_id.clone()),
        ("goal", t.goal_id.clone()),
        ("vm", vm),
        ("step", t.step.clone()),
        ("attempt", t.attempt.to_string()),
        ("state", t.state.name().into()),
        ("exit", t.exit.map_or_else(|| "-".into(), |e| e.to_string())),
        ("refusal", or_dash(&t.refusal)),
        ("reason", t.reason.clone()),
        ("queued", t.queued_at.clone()),
        ("started", or_dash(&t.started_at)),
        ("ended", or_dash(&t.ended_at)),
        ("output", format!("{out} B stdout, {err} B stderr")),
    ];
    print::pairs(8, &rows.map(|(key, value)| [key.to_owned(), value]))
}
