//! `adit goal ls`: what goals the host holds, and how far each is.

use adit_api::GoalSummary;
use clap::Args;
use jiff::Timestamp;

use crate::client::Client;
use crate::error::Failure;
use crate::output::{self, age};
use crate::task::{self, LISTED};
use crate::text::Format;

pub const EXAMPLE: &str = "\
KEY is who signed it, as the goal itself says; AGE the time since aditd accepted it. OPEN, DONE and FAILED count steps, each on
each VM, by their last attempt: those that have not ended, that succeeded, and that ended otherwise.

Examples:
  adit goal ls --limit 5
  adit goal ls --all -o json | jq -r '.[] | select(.failed > 0) | .goal_id'";

#[derive(Args)]
pub struct Ls {
    /// List the newest so many; standard error says if there are more
    #[arg(long, value_name = "N", default_value_t = LISTED, value_parser = task::at_least_one)]
    limit: usize,
    /// List all of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
}

pub async fn run(ls: &Ls, client: &Client, format: Format) -> Result<(), Failure> {
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
    let rows: Vec<_> = goals
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
    output::table(
        [
            "GOAL",
            "KEY",
            "AGE",
            "VMS",
            "STEPS",
            "OPEN",
            "DONE",
            "FAILED",
            "VALID-UNTIL",
        ],
        &rows,
    )
}
