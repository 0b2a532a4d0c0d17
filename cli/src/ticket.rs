//! `adit ticket …`: commands that are signed on one machine, and brought to the guest from another.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use adit_exec::Open;
use adit_tasks::Ticket;
use adit_tasks::dsse::{Envelope, TICKET_MAX, Type};
use adit_tasks::ticket::{Input, Run, Verb};
use clap::{Args, Subcommand};
use jiff::Timestamp;

use crate::card::{read, trusted};
use crate::client::Client;
use crate::error::Failure;
use crate::exec::sign;
use crate::output::{self, duration};
use crate::text::Format;
use crate::{completion, exec, key};

const EXAMPLE: &str = "\
Example:
  adit key new ops.key --role exec                  # its public half is an anchor of the guest
  adit ticket new web-1 --sign ops.key --user deploy -- /usr/bin/uptime > uptime.ticket
  adit ticket run uptime.ticket                     # wherever aditd is reached, within two minutes, once

Whoever carries a ticket can run what it says, or not; and nothing else.";

#[derive(Subcommand)]
pub enum TicketCommand {
    /// Sign a command for a VM, and print the ticket
    #[command(after_help = EXAMPLE)]
    New(New),
    /// Print what a ticket says
    Show {
        /// The ticket; `-` = standard input
        file: PathBuf,
        /// Check its signature against these public keys
        #[arg(long, value_name = "KEYFILE.pub", value_delimiter = ',')]
        trust: Vec<PathBuf>,
    },
    /// Have a guest do what a ticket says, with its output and exit status here
    Run {
        /// The ticket
        file: PathBuf,
    },
}

#[derive(Args)]
pub struct New {
    /// Private key to sign with; the guest needs its public half as an anchor of the role exec
    #[arg(long, value_name = "KEY")]
    sign: PathBuf,
    /// User of the guest, by name or number
    #[arg(long, default_value = "root")]
    user: String,
    /// Set a variable of its environment
    #[arg(long = "env", value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Working directory in the guest [default: the user's home]
    #[arg(long, value_name = "DIRECTORY")]
    cwd: Option<String>,
    /// Give it what is in this file as its input, and sign that, too; `adit ticket run` reads it from standard input
    #[arg(long, value_name = "FILE")]
    stdin: Option<PathBuf>,
    /// End it after this long
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    timeout: Option<Duration>,
    /// Let it go on without a client
    #[arg(long)]
    detach: bool,
    /// From when on the guest takes it, as 2027-11-21T22:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    not_before: Option<Timestamp>,
    /// For how long, at most 10m
    #[arg(long, value_parser = duration, value_name = "DURATION", default_value = "2m")]
    valid: Duration,
    /// Name of the VM
    #[arg(add = completion::vms())]
    vm: String,
    /// Program and arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<std::ffi::OsString>,
}

pub async fn run(
    command: &TicketCommand,
    client: impl FnOnce() -> Result<Client, Failure>,
    format: Format,
) -> Result<ExitCode, Failure> {
    match command {
        TicketCommand::New(new) => self::new(new)?,
        TicketCommand::Show { file, trust } => show(file, trust, format)?,
        TicketCommand::Run { file } => {
            let (envelope, ticket) = parsed(file)?;
            let input = match &ticket.verb {
                Verb::Run(Run {
                    stdin: Input::Bytes(content),
                    ..
                }) => {
                    let (input, Input::Bytes(is)) = sign::whole_stdin()? else {
                        return Err(bad("it has no input"));
                    };
                    if is != *content {
                        let text = "standard input is not what was signed with the ticket";
                        return Err(
                            bad(text).help("give the file that `adit ticket new --stdin` had")
                        );
                    }
                    input
                }
                _ => Vec::new(),
            };
            return exec::run_ticket(&client()?, &ticket, envelope, &input, format).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn bad(what: impl Into<String>) -> Failure {
    Failure::new("bad-ticket", what)
}

fn new(new: &New) -> Result<(), Failure> {
    let bytes = |text: &std::ffi::OsString| text.as_bytes().to_vec();
    let argv: Vec<_> = new.command.iter().map(bytes).collect();
    let (names, values): (Vec<_>, Vec<_>) = exec::env(&new.env)?.into_iter().unzip();
    let timeout = new.timeout.map(|limit| limit.as_millis());
    let timeout_ms = timeout.map_or(0, |ms| u64::try_from(ms).unwrap_or(u64::MAX));
    let open = Open {
        argv: argv.clone(),
        env: names.iter().cloned().zip(values.iter().cloned()).collect(),
        cwd: new.cwd.clone().unwrap_or_default().into_bytes(),
        ..Open::default()
    };
    open.check()
        .map_err(|e| bad(format!("the command cannot be run: {e}")))?;
    let stdin = match &new.stdin {
        Some(file) => {
            let open = File::open(file)
                .map_err(|e| Failure::io(&format!("cannot read {}", file.display()), &e))?;
            sign::whole(open)?.1
        }
        None => Input::None,
    };
    let run = Run {
        argv: sign::texts(&argv)?,
        env: (sign::texts(&names)?.into_iter())
            .zip(sign::texts(&values)?)
            .collect(),
        cwd: new.cwd.clone().unwrap_or_default(),
        tty: None,
        stdin,
        timeout_ms,
        detach: new.detach,
    };
    let from = new.not_before.unwrap_or_else(Timestamp::now);
    let when = (from, sign::life(new.valid)?);
    let ticket = sign::ticket(&new.vm, &new.user, Verb::Run(run), when)?;
    let envelope = sign::signed(&ticket, &key::read(&new.sign)?)?;
    // It is JSON.
    output::line(String::from_utf8_lossy(&envelope))
}

fn envelope_in(file: &Path) -> Result<(Vec<u8>, Envelope), Failure> {
    let mut bytes = read(file, TICKET_MAX as u64 + 1)?;
    bytes.truncate(bytes.trim_ascii_end().len());
    let of = |e: String| bad(format!("{}: {e}", file.display()));
    let envelope = Envelope::parse_as(Type::Ticket, &bytes).map_err(|e| of(e.to_string()))?;
    Ok((bytes, envelope))
}

fn parsed(file: &Path) -> Result<(Vec<u8>, Ticket), Failure> {
    let (bytes, envelope) = envelope_in(file)?;
    let ticket = Ticket::parse(envelope.unverified_payload());
    let ticket = ticket.map_err(|e| bad(format!("{}: {e}", file.display())))?;
    Ok((bytes, ticket))
}

fn show(file: &Path, trust: &[PathBuf], format: Format) -> Result<(), Failure> {
    let (_, envelope) = envelope_in(file)?;
    let of = |e: String| bad(format!("{}: {e}", file.display()));
    let signer = envelope.unverified_signer().map(|id| id.to_string());
    let signer = signer.unwrap_or_default();
    let ticket = Ticket::parse(envelope.unverified_payload()).map_err(|e| of(e.to_string()))?;
    if !trust.is_empty() {
        let verified = envelope.verify(&trusted(trust)?);
        verified.map_err(|e| of(e.to_string()))?;
    }
    let proved = !trust.is_empty();
    let verb = serde_json::to_value(&ticket.verb).map_err(io::Error::other);
    let verb = verb.map_err(|e| of(e.to_string()))?;
    if format == Format::Json {
        return output::json(&serde_json::json!({
            "vm_id": ticket.vm_id, "user": ticket.user, "verb": verb, "not_before": ticket.not_before,
            "not_after": ticket.not_after, "signer": signer, "proved": proved,
        }));
    }
    let signed = match proved {
        true => signer,
        false => format!("{signer}, as the ticket says: not checked without --trust"),
    };
    let rows = [
        ["vm_id".into(), ticket.vm_id.to_string()],
        ["user".into(), ticket.user.clone()],
        ["does".into(), verb.to_string()],
        ["not before".into(), ticket.not_before.to_string()],
        ["not after".into(), ticket.not_after.to_string()],
        ["signed by".into(), signed],
    ];
    output::pairs(12, &rows)
}
