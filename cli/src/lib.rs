//! `adit`: what people type. Talks to `aditd` on its Unix socket, or on another host (`server`); signs goals here, so that no key leaves the manager.
//!
//! A command is a module of its own (`vm`, `goal`, `task`, `access`, `key`, `card`, `trust`, `agent`, `image`, `connect`, `forward`, `gate`, `config`,
//! `events`, `doctor`, `completion`, `exec`, `ticket`); `client` speaks HTTP, `proxy` opens tunnels, `output` prints,
//! `error` says what failed, why and what to do next, and maps it to an exit status.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod access;
mod agent;
mod card;
mod client;
mod completion;
mod config;
mod connect;
mod doctor;
mod error;
mod events;
mod exec;
mod files;
mod forward;
mod gate;
mod goal;
mod image;
mod key;
mod output;
mod proxy;
mod resolve;
mod server;
mod task;
mod text;
mod ticket;
mod trust;
mod vm;

#[cfg(feature = "test-util")]
pub use gate::faked;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use error::Failure;
use server::Which;
use text::Format;

const EXAMPLES: &str = "\
Examples:
  adit vm ls
  adit wait web-1 --for agent --timeout 30s
  adit doctor web-1
  adit key new fleet.key
  adit image inject web-1.qcow2 --vm-id web-1 --trust fleet.key.pub --allow-port 22,80
  adit goal apply patch.yaml --sign fleet.key --to web-1,web-2
  adit agent upgrade --to web-1 --package adit-guest --sign agents.key
  adit events --follow
  adit task watch                                  # or `adit goal apply … --watch`
  adit task ls --state failed
  adit task output 3f2a --stream stderr
  curl -x http://127.0.0.1:7080 http://web-1/      # the proxy needs no adit command
  ssh root@web-1.adit                              # by `adit connect`, see its --help
  adit forward web-1 8443:443
  adit exec web-1 -- uname -a                      # where the guest's owner allows it
  adit shell web-1
  adit --server https://host-a:7443 --ca hosts.crt --cert me.crt --key me.key proxy
  adit --server https://host-a:7443 --ca hosts.crt --token-file ops.token vm ls

Exit status:
    0  done; of `task watch`: every step has succeeded
    1  failed; standard error says what, why and what to do next
    2  usage: a wrong option, argument or value
    3  aditd or its proxy cannot be reached, or does not answer
    4  not found: no such VM, goal or task, or nothing to watch
    5  a step did not succeed (`task watch`, `goal apply --watch`)
    6  something is wrong with aditd or a VM (`doctor`)
  124  the time of --timeout is over
  130  Ctrl-C; of `vm rm --drain`: the VM stays locked
  141  whoever reads standard output has closed it, as with `adit vm ls | head -1`";

/// Heading of the options that every command has.
const EVERYWHERE: &str = "Options of every command";

/// Reach VMs that have no network, and give them signed work
#[derive(Parser)]
#[command(name = "adit", version, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    which: Which,
    /// How long aditd may take to answer a request; the --timeout of a command that waits is beside it [default: 60s]
    #[arg(long, value_parser = output::duration, global = true, value_name = "DURATION", help_heading = EVERYWHERE)]
    request_timeout: Option<Duration>,
    /// How to print [default: table]
    #[arg(short, long, value_enum, global = true, value_name = "FORMAT", help_heading = EVERYWHERE)]
    output: Option<Format>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List, show, add, change and remove VMs
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Sign a goal and hand it over; list and show goals
    #[command(subcommand)]
    Goal(goal::GoalCommand),
    /// List, show and watch tasks, and print what they wrote
    #[command(subcommand)]
    Task(task::TaskCommand),
    /// Make and show the keys that goals and cards are signed with
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Put the agent into VM images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Sign and show cards, which say who a guest is
    #[command(subcommand)]
    Card(card::CardCommand),
    /// Sign trust documents, which say whom guests trust and whom no longer, and hand them over
    #[command(subcommand)]
    Trust(trust::TrustCommand),
    /// Give VMs the next agent
    #[command(subcommand)]
    Agent(agent::AgentCommand),
    /// Show who may do what with which VM; make tokens
    #[command(subcommand)]
    Access(access::AccessCommand),
    /// Say which host has a VM
    Resolve(resolve::Resolve),
    /// Wait until a VM is ready
    Wait(vm::Wait),
    Exec(exec::Exec),
    Shell(exec::Shell),
    Ps(exec::Ps),
    Attach(exec::Attach),
    Kill(exec::Kill),
    Cp(files::Cp),
    Ls(files::Ls),
    Stat(files::Stat),
    Rm(files::Rm),
    /// Sign commands here that are brought to a VM from elsewhere
    #[command(subcommand)]
    Ticket(ticket::TicketCommand),
    /// Open a tunnel to a VM's port on standard input and output, or hand its socket to ssh
    Connect(connect::Connect),
    /// Listen on this host, and lead each connection to a VM's port
    Forward(forward::Forward),
    /// Be a proxy on this machine that leads to the VMs of all hosts that a server knows
    Proxy(gate::Gate),
    /// Say what is wrong with aditd and its VMs, and what to do
    Doctor(doctor::Doctor),
    Events(events::Events),
    /// Show whether aditd runs by its configuration file as it is now
    #[command(after_help = config::EXAMPLE)]
    Config,
    /// Have aditd read its configuration again, and show what became of it
    #[command(after_help = config::RELOAD_EXAMPLE)]
    Reload,
    /// Print the completions for a shell
    Completion(completion::Completion),
    /// Print the version
    Version,
}

/// Whether a command line asks for JSON, also one that is wrong otherwise.
fn asks_for_json(words: impl Iterator<Item = OsString>) -> bool {
    let words: Vec<_> = words.take_while(|word| word != "--").collect();
    let is_whole = |word: &OsString| {
        let of = ["-ojson", "-o=json", "--output=json"];
        of.into_iter().any(|whole| word == whole)
    };
    let is_pair =
        |pair: &[OsString]| (pair[0] == "-o" || pair[0] == "--output") && pair[1] == "json";
    words.iter().any(is_whole) || words.windows(2).any(is_pair)
}

/// Whether a command line, also a wrong one, is of a command whose exit status is a program's in the guest: ours must be told from that.
fn passes_a_status_on(words: impl Iterator<Item = OsString>) -> bool {
    let command = Cli::command().ignore_errors(true);
    let matches = command.try_get_matches_from(words);
    matches.is_ok_and(|matches| {
        let name = matches.subcommand_name().unwrap_or_default();
        ["exec", "shell", "attach"].contains(&name)
    })
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    if let Some(done) = completion::asked() {
        return done;
    }
    let wrong = |e: &clap::Error| {
        let mut failure = Failure::from(e);
        let passes_on = passes_a_status_on(std::env::args_os());
        if passes_on {
            failure = failure.with_status(exec::OWN);
        }
        if asks_for_json(std::env::args_os().skip(1)) {
            return Some(error::report(&failure, Format::Json));
        }
        // Whoever cannot read what is wrong is told by the status.
        passes_on.then(|| {
            let _ = e.print();
            ExitCode::from(failure.status())
        })
    };
    let cli = match adit_print::parse_or::<Cli>("adit", wrong) {
        Ok(cli) => cli,
        Err(done) => return done,
    };
    let format = match &cli.command {
        Command::Doctor(doctor) if doctor.json => Format::Json,
        _ => cli.output.unwrap_or(Format::Table),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return error::report(&Failure::io("cannot start", &e), format),
    };
    let done = runtime.block_on(run(cli, format));
    // A name of a proxy that is still being looked up is waited for by nobody.
    runtime.shutdown_background();
    match done {
        Ok(code) => code,
        Err(failure) => error::report(&failure, format),
    }
}

async fn run(cli: Cli, format: Format) -> Result<ExitCode, Failure> {
    let limit = cli.request_timeout.unwrap_or(client::REQUEST_LIMIT);
    // What asks nobody needs none.
    let client = || cli.which.client(limit);
    match &cli.command {
        Command::Vm(command) => vm::run(command, &client()?, format).await?,
        Command::Resolve(resolve) => resolve::resolve(resolve, &client()?, format).await?,
        Command::Wait(wait) => vm::wait(wait, &client()?, format).await?,
        Command::Goal(command) => return goal::run(command, &client()?, format).await,
        Command::Events(events) => return events::run(events, &client()?, format).await,
        Command::Task(command) => return task::run(command, &client()?, format).await,
        Command::Key(command) => key::run(command, format)?,
        Command::Image(command) => image::run(command, format)?,
        Command::Card(command) => card::run(command, format)?,
        Command::Trust(command) => trust::run(command, &client()?, format).await?,
        Command::Agent(command) => agent::run(command, &client()?, format).await?,
        Command::Access(command) => access::run(command, &client()?, format).await?,
        Command::Exec(command) => return exec::run(command, &client()?, format).await,
        Command::Shell(command) => return exec::shell(command, &client()?).await,
        Command::Ps(command) => exec::ps(command, &client()?, format).await?,
        Command::Attach(command) => return exec::attach(command, &client()?, format).await,
        Command::Kill(command) => exec::kill(command, &client()?, format).await?,
        Command::Cp(command) => return files::cp(command, &client()?, format).await,
        Command::Ls(command) => files::ls(command, &client()?, format).await?,
        Command::Stat(command) => files::stat(command, &client()?, format).await?,
        Command::Rm(command) => return files::rm(command, &client()?).await,
        Command::Ticket(command) => return ticket::run(command, client, format).await,
        Command::Connect(command) => {
            cli.which.is_not_asked("connect")?;
            connect::connect(command).await?;
        }
        Command::Forward(command) => {
            cli.which.is_not_asked("forward")?;
            forward::forward(command, format).await?;
        }
        Command::Proxy(command) => {
            let elsewhere = cli.which.elsewhere("proxy", limit)?;
            gate::run(command, elsewhere, format).await?;
        }
        Command::Doctor(doctor) => return doctor::run(doctor, &client()?, format).await,
        Command::Config => config::show(&client()?, format).await?,
        Command::Reload => config::reload(&client()?, format).await?,
        Command::Completion(completion) => completion::print(completion, format)?,
        Command::Version => version(format)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn version(format: Format) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    match format {
        Format::Json => output::json(&serde_json::json!({ "name": "adit", "version": version })),
        Format::Table => output::line(format_args!("adit {version}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(line: &str) -> (bool, serde_json::Value) {
        let words = || line.split_whitespace();
        let json = asks_for_json(words().skip(1).map(OsString::from));
        let e = Cli::try_parse_from(words()).err().unwrap();
        (json, serde_json::to_value(Failure::from(&e)).unwrap())
    }

    #[test]
    fn a_wrong_command_line_of_a_program_in_a_guest_is_told_from_the_programs_status() {
        for (line, passes_on) in [
            ("adit exec --bogus web-1 -- true", true),
            ("adit --socket exec vm ls --bogus", false),
            ("adit --socket x -o json exec web-1", true),
            ("adit shell", true),
            ("adit attach nothing", true),
            ("adit vm ls exec", false),
            // It may have a value, so nobody can say what the command is.
            ("adit --bogus exec web-1 -- true", false),
            ("adit", false),
        ] {
            let words = line.split_whitespace().map(OsString::from);
            assert_eq!(passes_a_status_on(words), passes_on, "{line}");
        }
    }

    #[test]
    fn a_wrong_command_line_is_an_error_as_others_are() {
        for line in [
            "adit vm ls --bogus -o json",
            "adit --output json vm ls --bogus",
            "adit -ojson vm ls --bogus",
            "adit vm ls --bogus --output=json",
        ] {
            let (json, failure) = failure(line);
            assert!(json, "{line}");
            assert_eq!(failure["code"], "usage");
            let said = failure["message"].as_str().unwrap();
            assert!(said.contains("--bogus") && !said.contains('\n'), "{said}");
            assert!(failure["help"].as_str().unwrap().contains("Usage: adit"));
        }
        let (json, missing) = failure("adit vm show -o table");
        assert!(!json && missing["message"].as_str().unwrap().contains("NAME"));
        assert!(!failure("adit vm ls --bogus -- -o json").0);
        let (_, nothing) = failure("adit -o json");
        assert_eq!(nothing["code"], "usage");
    }
}
