//! `adit goal ls`: what goals the host holds, and how far each is.

use adit_api::{AllGoals, GoalSummary};
use clap::Args;
use jiff::Timestamp;

use crate::client::Client;
use crate::error::Failure;
use crate::output::{self, age};
use crate::resolve;
use crate::task::{self, LISTED};
use crate::text::Format;

pub const EXAMPLE: &str = "\
KEY is who signed it, as the goal itself says; AGE the time since aditd accepted it. OPEN, DONE and FAILED count steps, each on
each VM, by their last attempt: those that have not ended, that succeeded, and that ended otherwise. With --all-hosts the exit status
is 1 if a host does not say what it has: it is named, and the others' goals are listed.

Examples:
  adit goal ls --limit 5
  adit goal ls --all-hosts
  adit goal ls --all -o json | jq -r '.[] | select(.failed > 0) | .goal_id'";

#[derive(Args)]
pub struct Ls {
    /// List the newest so many; standard error says if there are more
    #[arg(long, value_name = "N", default_value_t = LISTED, value_parser = task::at_least_one)]
    limit: usize,
    /// List all of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Those of all hosts of aditd.toml, each once; with --limit at most 500
    #[arg(long, conflicts_with = "all")]
    all_hosts: bool,
}

pub async fn run(ls: &Ls, client: &Client, format: Format) -> Result<(), Failure> {
    if ls.all_hosts {
        let limit = task::of_all_hosts(ls.limit)?;
        let all: AllGoals = client
            .get(&format!("/v1/all-hosts/goals?newest={limit}"))
            .await?;
        match format {
            Format::Json => output::json(&all)?,
            Format::Table => list(&all.goals)?,
        }
        task::say_more_of_hosts("goals", all.goals.len(), all.earlier);
        return resolve::all_spoke(&all.silent);
    }
    let limit = (!ls.all).then_some(ls.limit);
    let (goals, more) = client.newest("/v1/goals?", limit).await?;
    match format {
        Format::Json => output::json(&goals)?,
        Format::Table => list(&goals)?,
    }
    task::say_more("goals", goals.len(), more);
    Ok(())
}

fn list(goals: &[GoalSummary]) -> Result<(), Failure> {
    if goals.is_empty() {
        return output::line("no goals: sign one and hand it over with `adit goal apply`");
    }
    let now = Timestamp::now();
    let rows: Vec<[String; 9]> = goals
        .iter()
        .map(|g| {
            [
                g.goal_id.clone(),
                task::short(&g.signer).to_owned(),
                age(&g.accepted_at, now),
                g.vms.to_string(),
                g.steps.to_string(),
                g.open.to_string(),
                g.done.to_string(),
                g.failed.to_string(),
                g.not_after.clone(),
            ]
        })
        .collect();
    let head = [
        "GOAL",
        "KEY",
        "AGE",
        "VMS",
        "STEPS",
        "OPEN",
        "DONE",
        "FAILED",
        "VALID-UNTIL",
    ];
    if goals.iter().all(|g| g.hosts.is_empty()) {
        return output::table(head, &rows);
    }
    // Of several hosts.
    let [a, b, c, d, e, f, g, h, i] = head;
    let rows = rows.into_iter().zip(goals).map(|(row, goal)| {
        let [a, b, c, d, e, f, g, h, i] = row;
        [a, b, c, d, e, f, g, h, i, goal.hosts.join(",")]
    });
    let head = [a, b, c, d, e, f, g, h, i, "HOSTS"];
    output::table(head, &rows.collect::<Vec<_>>())
}
