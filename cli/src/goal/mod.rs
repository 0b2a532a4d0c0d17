//! `adit goal …`: sign a goal, hand it over, list and show goals.

mod apply;
mod ls;

use std::process::ExitCode;

use adit_api::{Goal, GoalSummary};
use clap::Subcommand;

use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output;
use crate::task;
use crate::text::{Format, escape};

#[derive(Subcommand)]
pub enum GoalCommand {
    /// Sign a goal and hand it to aditd, which queues its tasks
    #[command(after_help = apply::EXAMPLE)]
    Apply(apply::Apply),
    /// List the goals that this host holds, the newest last
    #[command(alias = "list", after_help = ls::EXAMPLE)]
    Ls(ls::Ls),
    /// Show a goal and its tasks, also those of VMs of other hosts; exit status 1 if a host does not say what it has
    Show {
        /// Id of the goal, or the last digits of it
        #[arg(add = completion::goals())]
        id: String,
    },
}

pub async fn run(
    command: &GoalCommand,
    client: &Client,
    format: Format,
) -> Result<ExitCode, Failure> {
    match command {
        GoalCommand::Apply(apply) => return apply::run(apply, client, format).await,
        GoalCommand::Ls(ls) => ls::run(ls, client, format).await?,
        GoalCommand::Show { id } => {
            let id = resolve(client, id).await?;
            let goal: Goal = client.get(&format!("/v1/goals/{id}")).await?;
            show(&goal, format)?;
            check_silent(&goal)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The whole id of a goal that is named by it, or by the last digits of it.
///
/// The first digits of an id are a time, and those of goals that were signed within a minute are the same.
pub async fn resolve(client: &Client, id: &str) -> Result<String, Failure> {
    if let Ok(whole) = id.parse::<uuid::Uuid>() {
        return Ok(whole.to_string());
    }
    let unknown = || {
        let message = format!("no goal's id ends with `{}`", escape(id));
        Failure::new("unknown-goal", message).help("`adit goal ls` lists them")
    };
    let fit = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    if id.is_empty() || id.len() > 36 || !id.bytes().all(fit) {
        return Err(unknown());
    }
    let id = id.to_ascii_lowercase();
    let mut found: Vec<GoalSummary> = client.get(&format!("/v1/goals?newest=2&id={id}")).await?;
    found.retain(|goal| goal.goal_id.ends_with(&id));
    match found.len() {
        1 => Ok(found.swap_remove(0).goal_id),
        0 => Err(unknown()),
        _ => Err(Failure::new(
            "ambiguous",
            format!("the ids of several goals end with `{id}`"),
        )
        .help("give more digits")),
    }
}

/// Last digits of an id: enough to name it in a list.
pub fn short(id: &str) -> &str {
    id.len()
        .checked_sub(8)
        .and_then(|at| id.get(at..))
        .unwrap_or(id)
}

fn show(goal: &Goal, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(goal);
    }
    let (n, plural) = match goal.tasks.len() {
        1 => (1, ""),
        n => (n, "s"),
    };
    output::line(format_args!(
        "goal {} ({n} task{plural}, sha256 {})",
        escape(&goal.goal_id),
        escape(task::short(&goal.digest))
    ))?;
    task::list(&goal.tasks)
}

/// Fails where a host has not said what it has of a goal: the tasks that were shown may not be all.
fn check_silent(goal: &Goal) -> Result<(), Failure> {
    let Some(silent) = goal.silent.first() else {
        return Ok(());
    };
    let (host, why) = (escape(&silent.host), escape(&silent.why));
    let message = format!("host `{host}` does not say what it has of the goal: {why}");
    Err(Failure::new("silent-host", message)
        .help("see that aditd runs there; there may be more tasks than those above"))
}
