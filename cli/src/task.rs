//! `adit task …`: what became of the tasks.

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Duration;

use adit_api::{Task, TaskEvent, TaskState};
use clap::{Subcommand, ValueEnum};

use crate::client::Client;
use crate::error::{Failure, TASK_FAILED};
use crate::output::{self, Format, duration, escape};

#[derive(Subcommand)]
pub enum TaskCommand {
    /// List tasks, the newest last
    #[command(visible_alias = "list")]
    Ls {
        /// Only this VM's
        #[arg(long)]
        vm: Option<String>,
        /// Only this goal's
        #[arg(long)]
        goal: Option<String>,
        /// Only those in this state, for example queued or interrupted
        #[arg(long)]
        state: Option<String>,
    },
    /// Show one task
    Show {
        /// Its id, or the first digits of it
        id: String,
    },
    /// Print every change until all tasks have ended; exit status 5 if one did not succeed
    Watch {
        /// Only this goal's tasks
        #[arg(long)]
        goal: Option<String>,
        /// Give up after this long (exit status 124)
        #[arg(long, value_parser = duration)]
        timeout: Option<Duration>,
    },
    /// Print what a task wrote
    Output {
        /// Its id, or the first digits of it
        id: String,
        /// Which stream
        #[arg(long, value_enum, default_value = "stdout")]
        stream: Stream,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Stream {
    /// Standard output
    Stdout,
    /// Standard error
    Stderr,
}

pub async fn run(
    command: &TaskCommand,
    client: &Client,
    format: Format,
) -> Result<ExitCode, Failure> {
    match command {
        TaskCommand::Ls { vm, goal, state } => {
            let tasks: Vec<Task> = client.get_all(&list_path(vm, goal, state)?).await?;
            match format {
                Format::Json => output::json(&tasks)?,
                Format::Table => list(&tasks),
            }
        }
        TaskCommand::Show { id } => show(&resolve(client, id).await?, format)?,
        TaskCommand::Watch { goal, timeout } => {
            return watch(client, goal.as_deref(), *timeout, format).await;
        }
        TaskCommand::Output { id, stream } => {
            let task = resolve(client, id).await?;
            let name = match stream {
                Stream::Stdout => "stdout",
                Stream::Stderr => "stderr",
            };
            let bytes = client
                .get_bytes(&format!("/v1/tasks/{}/output?stream={name}", task.task_id))
                .await?;
            output::foreign_bytes(&bytes).map_err(|e| Failure::io("cannot print", &e))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses what would not be one query value.
fn word<'a>(what: &str, text: &'a str) -> Result<&'a str, Failure> {
    let ok = !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    ok.then_some(text)
        .ok_or_else(|| Failure::new("usage", format!("`{}` is no {what}", escape(text))))
}

fn list_path(
    vm: &Option<String>,
    goal: &Option<String>,
    state: &Option<String>,
) -> Result<String, Failure> {
    let mut query = Vec::new();
    for (key, value) in [("vm", vm), ("goal", goal), ("state", state)] {
        if let Some(value) = value {
            query.push(format!("{key}={}", word(key, value)?));
        }
    }
    Ok(format!("/v1/tasks?{}", query.join("&")))
}

/// Finds a task by its id or by the first digits of it.
async fn resolve(client: &Client, id: &str) -> Result<Task, Failure> {
    let id = word("task id", id)?;
    if id.len() == 32 {
        return client.get(&format!("/v1/tasks/{id}")).await;
    }
    let mut found: Vec<Task> = client.get(&format!("/v1/tasks?id={id}&limit=500")).await?;
    // An aditd of before does not know `id`, and lists all of them.
    found.retain(|t| t.task_id.starts_with(id));
    match found.len() {
        1 => Ok(found.swap_remove(0)),
        0 => Err(
            Failure::new("unknown-task", format!("no task begins with `{id}`"))
                .help("`adit task ls` lists them"),
        ),
        n => Err(
            Failure::new("ambiguous", format!("{n} tasks begin with `{id}`"))
                .help("give more digits"),
        ),
    }
}

/// As aditd spells it in JSON.
pub fn state_name(state: TaskState) -> &'static str {
    match state {
        TaskState::Queued => "queued",
        TaskState::Leased => "leased",
        TaskState::Started => "started",
        TaskState::Done => "done",
        TaskState::Failed => "failed",
        TaskState::TimedOut => "timed_out",
        TaskState::Interrupted => "interrupted",
        TaskState::Refused => "refused",
        TaskState::Skipped => "skipped",
        TaskState::Expired => "expired",
        TaskState::LostContact => "lost_contact",
    }
}

/// First digits of an id: enough to name it in a list.
pub fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

pub fn list(tasks: &[Task]) {
    if tasks.is_empty() {
        println!("no tasks");
        return;
    }
    let rows: Vec<_> = tasks
        .iter()
        .map(|t| {
            [
                short(&t.task_id).to_owned(),
                t.vm.clone(),
                t.step.clone(),
                t.attempt.to_string(),
                state_name(t.state).into(),
                t.exit.map_or_else(|| "-".into(), |e| e.to_string()),
                said(t),
            ]
        })
        .collect();
    output::table(
        ["TASK", "VM", "STEP", "TRY", "STATE", "EXIT", "SAID"],
        &rows,
    );
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
        return output::json(t);
    }
    let or_dash = |v: &Option<String>| v.clone().unwrap_or_else(|| "-".into());
    for (key, value) in [
        ("task", t.task_id.clone()),
        ("goal", t.goal_id.clone()),
        ("vm", t.vm.clone()),
        ("step", t.step.clone()),
        ("attempt", t.attempt.to_string()),
        ("state", state_name(t.state).into()),
        ("exit", t.exit.map_or_else(|| "-".into(), |e| e.to_string())),
        ("reason", t.reason.clone()),
        ("queued", t.queued_at.clone()),
        ("started", or_dash(&t.started_at)),
        ("ended", or_dash(&t.ended_at)),
        (
            "output",
            format!(
                "{} B stdout, {} B stderr",
                t.output_bytes.0, t.output_bytes.1
            ),
        ),
    ] {
        println!("{key:<8} {}", escape(&value));
    }
    Ok(())
}

async fn watch(
    client: &Client,
    goal: Option<&str>,
    timeout: Option<Duration>,
    format: Format,
) -> Result<ExitCode, Failure> {
    let path = match goal {
        Some(goal) => format!("/v1/events?goal={}", word("goal id", goal)?),
        None => "/v1/events".to_owned(),
    };
    let mut seen = HashMap::new();
    let all = follow(client, &path, format, &mut seen);
    match timeout {
        None => all.await?,
        Some(limit) => tokio::time::timeout(limit, all).await.map_err(|_| {
            Failure::timeout(format!("tasks have not all ended within {limit:?}"))
        })??,
    }
    let failed = seen.values().any(|&s| s != TaskState::Done);
    Ok(if failed {
        ExitCode::from(TASK_FAILED)
    } else {
        ExitCode::SUCCESS
    })
}

/// Prints changes until the stream ends, or (without a goal) until no task is left that may change.
async fn follow(
    client: &Client,
    path: &str,
    format: Format,
    seen: &mut HashMap<String, TaskState>,
) -> Result<(), Failure> {
    let mut lines = client.stream(path).await?;
    while let Some(event) = lines.next::<TaskEvent>().await? {
        let task = &event.task;
        match format {
            Format::Json => output::json(&event)?,
            Format::Table => {
                let exit = task.exit.map_or(String::new(), |e| format!(" exit {e}"));
                println!(
                    "{}  {:<12} {:<16} {}{exit}  {}",
                    short(&task.task_id),
                    escape(&task.vm),
                    escape(&format!("{}#{}", task.step, task.attempt)),
                    state_name(task.state),
                    escape(&said(task)),
                );
            }
        }
        seen.insert(task.task_id.clone(), task.state);
    }
    Ok(())
}
