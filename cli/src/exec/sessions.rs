//! `adit ps`, `adit attach` and `adit kill`: commands that run already.

use std::process::ExitCode;
use std::str::FromStr;

use adit_exec::{How, Row, Started, ToGuest, What};
use adit_tasks::ticket::{self, Verb};
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::sign::{self, Sign};
use super::stream::{self, Carries, Ended, Signals, Stream};
use super::{ours, terminal};
use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output;
use crate::text::{Format, escape};

const PS: &str = "\
Examples:
  adit ps web-1
  adit ps web-1 --user deploy -o json

ID is what `adit attach` and `adit kill` take. A command that was started with --detach stays in the list for an hour after its
end, a minute where somebody ended it, or until somebody has attached to it and seen that end.";

const ATTACH: &str = "\
Examples:
  adit attach web-1/3fa94c0d11e2
  adit attach web-1/3fa94c0d11e2 --since 41230        # as the message at the last Ctrl-C says

What the command has written is kept in the guest: 256 KiB of each output. When nobody has read that much, the command waits:
nothing is cut. Ctrl-C leaves it, and it goes on; with a terminal (`exec -t --detach`) keys are the command's, and closing the
window leaves it. Whoever attaches takes the place of whoever was attached.

Exit status: that of the command, as `adit exec` has it; 0 it was left.";

const KILL: &str = "\
Examples:
  adit kill web-1/3fa94c0d11e2                        # TERM, and after a second KILL to all that it has started
  adit kill web-1/3fa94c0d11e2 --signal 10

With --signal it gets that signal, and nothing else is done.";

/// List the commands that `adit exec` runs in a VM
#[derive(Args)]
#[command(after_help = PS)]
pub struct Ps {
    /// Name of the VM
    #[arg(add = completion::vms())]
    vm: String,
    /// Those of this user of the guest alone; whoever may not run commands as any user has to say which
    #[arg(long)]
    user: Option<String>,
    #[command(flatten)]
    sign: Sign,
}

/// Show what a command writes that was started with --detach, until it ends
#[derive(Args)]
#[command(after_help = ATTACH)]
pub struct Attach {
    /// Id of the session, VM/ID
    id: Id,
    /// Begin with the output behind so many bytes, and the error output behind so many; all that is kept otherwise
    #[arg(long, value_name = "BYTES[,BYTES]")]
    since: Option<Since>,
    /// The session is of this user; whoever may not run commands as any user has to say which
    #[arg(long)]
    user: Option<String>,
    #[command(flatten)]
    sign: Sign,
}

/// End a command that `adit exec` has started, with all that it has started
#[derive(Args)]
#[command(after_help = KILL)]
pub struct Kill {
    /// Id of the session, VM/ID
    id: Id,
    /// Send it the signal of this number instead
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=31))]
    signal: Option<u8>,
    /// The session is of this user; whoever may not run commands as any user has to say which
    #[arg(long)]
    user: Option<String>,
    #[command(flatten)]
    sign: Sign,
}

/// A stream for one of these: at the host's word, or sealed, with a ticket.
async fn open(
    client: &Client,
    (vm, user): (&str, Option<&str>),
    (what, verb): (&What, Verb),
    sign: &Sign,
) -> Result<Stream, Failure> {
    match &sign.sign {
        Some(_) => sign::sealed(client, (vm, user), verb, sign).await,
        None => stream::open(client, vm, user, what).await,
    }
}

#[derive(Clone)]
struct Id {
    vm: String,
    id: String,
}

impl FromStr for Id {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (vm, id) = text
            .split_once('/')
            .filter(|(vm, id)| !vm.is_empty() && !id.is_empty())
            .ok_or("it is VM/ID, as `adit ps` and `adit exec --detach` print it")?;
        Ok(Self {
            vm: vm.to_owned(),
            id: id.to_owned(),
        })
    }
}

#[derive(Clone, Copy)]
struct Since(u64, Option<u64>);

impl FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<u64>()
                .map_err(|_| format!("`{text}` is no number of bytes"))
        };
        match text.split_once(',') {
            Some((out, err)) => Ok(Self(number(out)?, Some(number(err)?))),
            None => Ok(Self(number(text)?, None)),
        }
    }
}

/// A session, for programs.
#[derive(Serialize)]
struct Shown {
    id: String,
    user: String,
    program: String,
    started_at: String,
    detached: bool,
    attached: bool,
    stdout_bytes: u64,
    stderr_bytes: u64,
    state: String,
}

fn state(row: &Row) -> String {
    let Some((how, value)) = row.ended else {
        return "runs".into();
    };
    match How::of(how) {
        Some(How::Code) => format!("ended {value}"),
        Some(How::Signal) => format!("signal {value}"),
        Some(How::TimedOut) => "timed out".into(),
        Some(How::Ended) => "was ended".into(),
        Some(How::Lost) | None => "lost".into(),
    }
}

impl Shown {
    fn of(vm: &str, row: Row) -> Self {
        let at = Timestamp::from_millisecond(row.started_ms).unwrap_or(Timestamp::UNIX_EPOCH);
        Self {
            id: format!("{vm}/{}", row.id),
            started_at: at.to_string(),
            state: state(&row),
            user: row.user,
            program: row.program,
            detached: row.kept,
            attached: row.attached,
            stdout_bytes: row.written[0],
            stderr_bytes: row.written[1],
        }
    }
}

/// Lists sessions.
pub async fn ps(ps: &Ps, client: &Client, format: Format) -> Result<(), Failure> {
    let listed = async {
        let user = ps.user.as_deref();
        let of = (&What::List, Verb::List(ticket::List {}));
        let mut stream = open(client, (&ps.vm, user), of, &ps.sign).await?;
        stream.rows().await
    };
    let rows = listed.await.map_err(ours)?;
    let all: Vec<_> = rows.into_iter().map(|row| Shown::of(&ps.vm, row)).collect();
    if format == Format::Json {
        return output::json(&all);
    }
    let now = Timestamp::now();
    let rows: Vec<_> = all
        .into_iter()
        .map(|one| {
            let client = match (one.attached, one.detached) {
                (true, _) => "yes",
                (false, true) => "no",
                (false, false) => "gone",
            };
            let written = (one.stdout_bytes + one.stderr_bytes).to_string();
            let age = output::age(&one.started_at, now);
            [
                one.id,
                one.user,
                age,
                one.state,
                client.into(),
                written,
                one.program,
            ]
        })
        .collect();
    let heading = ["ID", "USER", "AGE", "STATE", "CLIENT", "BYTES", "PROGRAM"];
    output::table(heading, &rows)
}

/// Attaches to a session.
pub async fn attach(attach: &Attach, client: &Client, _: Format) -> Result<ExitCode, Failure> {
    attach_to(attach, client).await.map_err(ours)
}

async fn attach_to(attach: &Attach, client: &Client) -> Result<ExitCode, Failure> {
    let Id { vm, id } = &attach.id;
    let what = What::Attach(id.clone());
    let session = id.clone();
    let of = (&what, Verb::Attach(ticket::Attach { session }));
    let mut stream = open(client, (vm, attach.user.as_deref()), of, &attach.sign).await?;
    let since = attach.since;
    let from = adit_exec::Attach {
        stdout: since.map(|since| since.0),
        stderr: since.and_then(|since| since.1),
        size: terminal::size(),
    };
    stream.say(&ToGuest::Attach(from)).await?;
    let Started { tty, input, .. } = stream.started().await?;
    let tty = tty && terminal::size().is_some();
    let carries = Carries {
        input: input && tty,
        tty,
        escapes: false,
        signals: Signals::Leave,
    };
    match stream.carry(carries).await? {
        Ended::Exit(exit) => Ok(stream::status(&exit)),
        Ended::Left([out, err]) => {
            adit_print::note(format_args!(
                "it goes on: `adit attach {}/{} --since {out},{err}`",
                escape(vm),
                escape(id)
            ));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Ends a session.
pub async fn kill(kill: &Kill, client: &Client, format: Format) -> Result<(), Failure> {
    let Id { vm, id } = &kill.id;
    let what = What::End {
        id: id.clone(),
        signal: kill.signal.unwrap_or(0),
    };
    let done = async {
        let of = Verb::End(ticket::End {
            session: id.clone(),
            signal: kill.signal.unwrap_or(0),
        });
        let to = (vm.as_str(), kill.user.as_deref());
        let mut stream = open(client, to, (&what, of), &kill.sign).await?;
        stream.done().await
    };
    done.await.map_err(ours)?;
    let said = match kill.signal {
        Some(number) => format!("{vm}/{id} has got signal {number}"),
        None => format!("{vm}/{id} is being ended"),
    };
    match format {
        Format::Json => output::json(
            &serde_json::json!({ "session": format!("{vm}/{id}"), "signal": kill.signal }),
        ),
        Format::Table => output::line(escape(&said)),
    }
}
