//! `adit goal …`: sign a goal, hand it over, show it.

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use adit_api::{Goal, NewGoal};
use adit_tasks::VmId;
use adit_tasks::draft::{Draft, Inputs};
use adit_tasks::dsse;
use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::client::Client;
use crate::error::Failure;
use crate::output::{self, Format};
use crate::{key, task};

const EXAMPLE: &str = "\
A goal, in YAML:
  valid_for: 24h
  steps:
    - id: hello
      script: {interpreter: /bin/sh, script: \"uname -a\\n\", timeout_s: 30}
    - id: motd
      idempotent: true
      file: {path: /etc/motd, content: \"managed by adit\\n\", mode: \"0644\"}

  adit goal apply hello.yaml --sign fleet.key --to web-1,web-2
  adit goal apply hello.yaml --sign fleet.key --to web-1 --save signed.json --dry-run
  adit goal apply signed.json";

#[derive(Subcommand)]
pub enum GoalCommand {
    /// Sign a goal and hand it to aditd, which queues its tasks
    #[command(after_help = EXAMPLE)]
    Apply(Apply),
    /// Show a goal and its tasks
    Show {
        /// Its id
        id: String,
    },
}

#[derive(Args)]
pub struct Apply {
    /// A goal in YAML or JSON (with --sign), or one that is signed already; `-` = standard input
    file: PathBuf,
    /// Private key to sign with
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
    /// VMs that it is for; of a signed goal: those of its audience that it is queued for
    #[arg(long, value_delimiter = ',', value_name = "VM,…")]
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
}

pub async fn run(command: &GoalCommand, client: &Client, format: Format) -> Result<(), Failure> {
    match command {
        GoalCommand::Apply(apply) => run_apply(apply, client, format).await,
        GoalCommand::Show { id } => {
            let id: uuid::Uuid = id.parse().map_err(|_| {
                Failure::new(
                    "unknown-goal",
                    format!("`{}` is no goal id", output::escape(id)),
                )
            })?;
            show(&client.get(&format!("/v1/goals/{id}")).await?, format)
        }
    }
}

async fn run_apply(apply: &Apply, client: &Client, format: Format) -> Result<(), Failure> {
    let text = read(&apply.file)?;
    let envelope = match &apply.sign {
        Some(key_file) => {
            let payload = payload(apply, &text)?;
            if apply.dry_run {
                println!("{}", String::from_utf8_lossy(&payload));
            }
            dsse::sign(&payload, &key::read(key_file)?)
        }
        None => text,
    };
    dsse::Envelope::parse(envelope.as_bytes()).map_err(|e| {
        Failure::new("bad-goal", format!("{}: {e}", apply.file.display()))
            .help("a goal that is not signed yet needs --sign KEY and --to VM,…")
    })?;
    if let Some(file) = &apply.save {
        fs::write(file, &envelope)
            .map_err(|e| Failure::io(&format!("cannot write {}", file.display()), &e))?;
    }
    if apply.dry_run {
        return Ok(());
    }
    let new = NewGoal {
        envelope,
        to: apply.to.clone(),
        relay_unchecked: apply.relay_unchecked,
    };
    let goal: Goal = client.post("/v1/goals", &new).await?;
    show(&goal, format)
}

fn read(file: &PathBuf) -> Result<String, Failure> {
    let mut text = String::new();
    let done = match file.to_str() {
        Some("-") => std::io::stdin().read_to_string(&mut text).map(drop),
        _ => fs::read_to_string(file).map(|t| text = t),
    };
    done.map_err(|e| Failure::io(&format!("cannot read {}", file.display()), &e))?;
    Ok(text)
}

/// The bytes to sign.
fn payload(apply: &Apply, text: &str) -> Result<Vec<u8>, Failure> {
    if apply.to.is_empty() {
        return Err(
            Failure::new("usage", "nobody is named that the goal is for")
                .help("name VMs with --to web-1,web-2"),
        );
    }
    let vms = apply.to.iter().map(|name| {
        name.parse::<VmId>().map_err(|e| {
            Failure::new(
                "unknown-vm",
                format!("`{}` names no VM: {e}", output::escape(name)),
            )
        })
    });
    let draft = Draft::parse(text, &apply.file.display().to_string()).map_err(|e| {
        Failure::new("bad-goal", e.to_string()).help("`adit goal apply --help` shows a goal")
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

fn show(goal: &Goal, format: Format) -> Result<(), Failure> {
    if format == Format::Json {
        return output::json(goal);
    }
    println!(
        "goal {} ({} tasks, sha256 {})",
        goal.goal_id,
        goal.tasks.len(),
        task::short(&goal.digest)
    );
    task::list(&goal.tasks);
    Ok(())
}
