//! `adit events`: what happens on the host, numbered, so that whoever follows it misses nothing without hearing so.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use adit_api::{HostEvent, HostEventKind};
use clap::Args;
use form_urlencoded::Serializer as Query;

use crate::client::Client;
use crate::error::Failure;
use crate::output;
use crate::text::{Format, escape};

/// How soon an aditd that has gone is looked for again.
const AGAIN: Duration = Duration::from_millis(200);

pub const EXAMPLE: &str = "\
Examples:
  adit events                                   # what is kept, the oldest first
  adit events --follow -o json                  # and then what happens: one JSON value a line
  adit events --follow --since 91c0e3a2b1d4f567.42

`gap` says that events are missing: more than aditd keeps, or of the time before it was started anew.

Exit status: 0 all that is kept is printed; with --follow it ends with the time of --request-timeout without aditd (3).";

/// Show what happens on the host: VMs, tasks, configuration, grants, denials
#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub struct Events {
    /// Go on with what happens from now on, also when aditd is started anew
    #[arg(short, long)]
    follow: bool,
    /// Only what came behind this event: its field `cursor`
    #[arg(long, value_name = "CURSOR")]
    since: Option<String>,
}

pub async fn run(args: &Events, client: &Client, format: Format) -> Result<ExitCode, Failure> {
    let mut since = args.since.clone();
    let mut heard = None;
    loop {
        let taken = take(args.follow, &mut since, &mut heard, client, format).await;
        match (taken, heard) {
            (Ok(()), _) if !args.follow => return Ok(ExitCode::SUCCESS),
            // It was there, and comes again.
            (Err(e), Some(at)) if e.passing && args.follow => {
                if Instant::elapsed(&at) >= client.limit() {
                    return Err(e);
                }
            }
            (Err(e), _) => return Err(e),
            (Ok(()), _) => {}
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Takes one stream to its end.
async fn take(
    follow: bool,
    since: &mut Option<String>,
    heard: &mut Option<Instant>,
    client: &Client,
    format: Format,
) -> Result<(), Failure> {
    let mut query = Query::new(String::new());
    if let Some(since) = since {
        query.append_pair("since", since);
    }
    query.append_pair("follow", if follow { "true" } else { "false" });
    let path = format!("/v1/host-events?{}", query.finish());
    let mut lines = client.stream(&path).await?;
    *heard = Some(Instant::now());
    loop {
        let next = lines.next::<HostEvent>().await.map_err(Failure::from);
        *heard = Some(Instant::now());
        let Some(event) = next? else { return Ok(()) };
        print(&event, format)?;
        *since = Some(event.cursor);
    }
}

fn print(event: &HostEvent, format: Format) -> Result<(), Failure> {
    if let Format::Json = format {
        return output::json(event);
    }
    let said = [
        event.state.as_deref(),
        event.task.as_deref().map(|id| id.get(..8).unwrap_or(id)),
        Some(event.text.as_str()).filter(|text| !text.is_empty()),
    ];
    let mut words: Vec<String> = said.into_iter().flatten().map(escape_text).collect();
    match (event.count, event.kind) {
        (Some(count), HostEventKind::Gap) => words.insert(0, format!("{count} are missing")),
        (Some(count), _) => words.insert(0, count.to_string()),
        (None, _) => {}
    }
    output::line(format_args!(
        "{}  {:<15} {:<16} {}",
        escape(&event.at),
        event.kind.name(),
        escape(event.vm.as_deref().unwrap_or("-")),
        words.join("  "),
    ))
}

fn escape_text(text: &str) -> String {
    escape(text).to_string()
}
