//! `adit`: what people type. Talks to `aditd` on its Unix socket; signs goals here, so that no key leaves the manager.
//!
//! A command is a module of its own (`vm`, `goal`, `task`, `key`); `client` speaks HTTP, `output` prints, `error` says
//! what failed, why and what to do next, and maps it to an exit status.

mod client;
mod error;
mod goal;
mod key;
mod output;
mod task;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use client::Client;
use error::Failure;
use output::Format;

const EXAMPLES: &str = "\
Examples:
  adit vm ls
  adit wait web-1 --for agent --timeout 30s
  adit key new fleet.key
  adit goal apply patch.yaml --sign fleet.key --to web-1,web-2
  adit task watch
  adit task output 3f2a --stream stderr
  curl -x http://127.0.0.1:7080 http://web-1/      # the proxy needs no adit command

Exit status:
  0 ok   1 failed   2 usage   3 aditd cannot be reached   4 not found   5 a task did not succeed   124 timeout";

/// Reach VMs that have no network, and give them signed work.
#[derive(Parser)]
#[command(name = "adit", version, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Cli {
    /// Socket of aditd
    #[arg(
        long,
        env = "ADIT_SOCKET",
        default_value = "/run/adit/aditd.sock",
        global = true,
        value_name = "PATH"
    )]
    socket: PathBuf,
    /// How long aditd may take to answer a request; `wait` and `watch` have their own --timeout beside it
    #[arg(long, value_parser = output::duration, default_value = "60s", global = true, value_name = "DURATION")]
    request_timeout: Duration,
    /// How to print: a table for people, JSON for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table, global = true)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List, show, add and remove VMs
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Sign a goal and hand it over; show one
    #[command(subcommand)]
    Goal(goal::GoalCommand),
    /// See what became of the tasks
    #[command(subcommand)]
    Task(task::TaskCommand),
    /// Make and show the keys that goals are signed with
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Wait until a VM is ready
    Wait(vm::Wait),
    /// Print completions for a shell, for example `adit completion bash > /etc/bash_completion.d/adit`
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return error::report(&Failure::io("cannot start", &e), cli.output),
    };
    match runtime.block_on(run(&cli)) {
        Ok(code) => code,
        Err(failure) => error::report(&failure, cli.output),
    }
}

async fn run(cli: &Cli) -> Result<ExitCode, Failure> {
    let client = Client::new(&cli.socket, cli.request_timeout);
    match &cli.command {
        Command::Vm(command) => vm::run(command, &client, cli.output).await?,
        Command::Wait(wait) => vm::wait(wait, &client, cli.output).await?,
        Command::Goal(command) => goal::run(command, &client, cli.output).await?,
        Command::Task(command) => return task::run(command, &client, cli.output).await,
        Command::Key(command) => key::run(command, cli.output)?,
        Command::Completion { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "adit", &mut std::io::stdout());
        }
        Command::Version => println!("adit {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(ExitCode::SUCCESS)
}
