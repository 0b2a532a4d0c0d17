//! `adit cp`, `ls`, `stat` and `rm`, and what `adit wait` needs of a guest's files.
//!
//! `place` reads `VM:PATH`, `link` has the connection, `copy` a copy with all its attempts, `progress` what is shown of it.

mod copy;
mod link;
mod place;
mod progress;

use std::process::ExitCode;

use adit_files::{Message, Row, What};
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use tokio::task::AbortHandle;

use crate::client::Client;
use crate::error::Failure;
use crate::exec::{OWN, ours};
use crate::output;
use crate::text::Format;

pub use copy::{Cp, cp};
use place::Remote;

/// Most entries of a directory that are shown.
const ROWS_MAX: usize = 100_000;

const LS: &str = "\
Examples:
  adit ls web-1:/srv
  adit ls web-1: --user deploy        # that user's home
  adit ls web-1:/srv -o json | jq -r '.[] | select(.type == \"file\") | .name'

As a user of the guest, which the guest's policy must allow: `adit cp --help` says how.
Exit status: 0; 125 adit, aditd or the guest refused, or there is no such file; 255 the guest was not reached.";

const RM: &str = "\
Examples:
  adit rm web-1:/srv/app/cache.db
  adit rm -r web-1:/srv/app/old

No link is followed: of a link, the link is removed. It takes a rule of the guest's policy with `write`.
Exit status: 0; 125 adit, aditd or the guest refused, or there is no such file; 255 the guest was not reached.";

/// List what is in a directory of a VM
#[derive(Args)]
#[command(after_help = LS)]
pub struct Ls {
    /// User of the guest, by name or number
    #[arg(long, default_value = "root")]
    user: String,
    /// Directory, or file
    #[arg(value_name = "VM:PATH")]
    place: String,
}

/// Show what is known of one file of a VM
#[derive(Args)]
#[command(after_help = LS)]
pub struct Stat {
    /// User of the guest, by name or number
    #[arg(long, default_value = "root")]
    user: String,
    /// File; of a link, the link itself
    #[arg(value_name = "VM:PATH")]
    place: String,
}

/// Remove a file of a VM, or a directory with -r
#[derive(Args)]
#[command(after_help = RM)]
pub struct Rm {
    /// User of the guest, by name or number
    #[arg(long, default_value = "root")]
    user: String,
    /// A directory, too, with all that is below
    #[arg(short, long)]
    recursive: bool,
    /// File
    #[arg(value_name = "VM:PATH")]
    place: String,
}

/// A row for programs.
#[derive(Serialize)]
struct Shown {
    name: String,
    r#type: &'static str,
    mode: String,
    size: u64,
    mtime: String,
    uid: u32,
    gid: u32,
    target: Option<String>,
}

impl Shown {
    fn of(row: &Row) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (seconds, nanoseconds) = row.mtime;
        let nanoseconds = i32::try_from(nanoseconds).unwrap_or(0);
        Self {
            name: text(&row.name),
            r#type: match row.kind {
                '-' => "file",
                'd' => "directory",
                'l' => "link",
                'p' => "fifo",
                's' => "socket",
                'b' => "block-device",
                'c' => "character-device",
                _ => "unknown",
            },
            mode: format!("{:04o}", row.mode & 0o7777),
            size: row.size,
            // A guest may say that it is of any year.
            mtime: Timestamp::new(seconds, nanoseconds)
                .map_or_else(|_| seconds.to_string(), |at| at.to_string()),
            uid: row.uid,
            gid: row.gid,
            target: (!row.target.is_empty()).then(|| text(&row.target)),
        }
    }

    fn cells(&self) -> [String; 6] {
        let name = match &self.target {
            Some(target) => format!("{} -> {target}", self.name),
            None => self.name.clone(),
        };
        [
            self.r#type.into(),
            self.mode.clone(),
            format!("{}:{}", self.uid, self.gid),
            self.size.to_string(),
            self.mtime.clone(),
            name,
        ]
    }
}

const HEADING: [&str; 6] = ["TYPE", "MODE", "OWNER", "SIZE", "MODIFIED", "NAME"];

/// Ends what waits on a stream when nobody waits for that any more.
struct Ends(AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn asked(client: &Client, user: &str, place: &str, what: What) -> Result<Vec<Row>, Failure> {
    let Remote { vm, path, .. } = Remote::parse(place)?;
    let (stream, pump) = link::open(client, (&vm, user), (what, &path)).await?;
    let _ends = Ends(pump);
    let heard = tokio::task::spawn_blocking(move || {
        let mut stream = stream;
        let mut rows = Vec::new();
        loop {
            match stream.hear()? {
                Message::Rows(more) if rows.len() + more.len() <= ROWS_MAX => rows.extend(more),
                Message::Rows(_) => {
                    let text = format!("it has more than {ROWS_MAX} entries");
                    let why = adit_files::Refused::new(adit_files::refusal::FAILED, text);
                    return Err(adit_files::tree::Fault::Local(why));
                }
                Message::Done => return Ok(rows),
                Message::Refused(refused) => {
                    return Err(adit_files::tree::Fault::Refused(refused));
                }
                _ => {
                    let why = adit_files::Violation::NotDue;
                    return Err(adit_files::tree::Fault::Violation(why));
                }
            }
        }
    });
    let heard = heard
        .await
        .map_err(|e| Failure::new("internal", e.to_string()))?;
    heard.map_err(|fault| link::failure(&fault))
}

/// Lists a directory.
pub async fn ls(ls: &Ls, client: &Client, format: Format) -> Result<(), Failure> {
    let rows = asked(client, &ls.user, &ls.place, What::List)
        .await
        .map_err(ours)?;
    let mut rows: Vec<Shown> = rows.iter().map(Shown::of).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    match format {
        Format::Json => output::json(&rows),
        Format::Table => {
            let cells: Vec<_> = rows.iter().map(Shown::cells).collect();
            output::table(HEADING, &cells)
        }
    }
}

/// Shows one file.
pub async fn stat(stat: &Stat, client: &Client, format: Format) -> Result<(), Failure> {
    let rows = asked(client, &stat.user, &stat.place, What::Stat)
        .await
        .map_err(ours)?;
    let Some(row) = rows.first().map(Shown::of) else {
        return Err(Failure::new("bad-answer", "the guest says nothing of it").with_status(OWN));
    };
    match format {
        Format::Json => output::json(&row),
        Format::Table => output::table(HEADING, &[row.cells()]),
    }
}

/// Waits until something is at a path of a VM.
pub async fn wait(client: &Client, vm: &str, user: &str, path: &str) -> Result<(), Failure> {
    let place = format!("{vm}:{path}");
    asked(client, user, &place, What::Wait).await.map(drop)
}

/// Removes.
pub async fn rm(rm: &Rm, client: &Client) -> Result<ExitCode, Failure> {
    let what = What::Remove { all: rm.recursive };
    asked(client, &rm.user, &rm.place, what)
        .await
        .map_err(ours)?;
    Ok(ExitCode::SUCCESS)
}
