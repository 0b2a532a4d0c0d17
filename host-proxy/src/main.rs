//! `aditd`: the host's daemon. `aditd run` serves, `aditd check-config` checks a file, `aditd example-config` prints one.
#![deny(clippy::print_stdout, clippy::print_stderr)]
#![allow(unsafe_code)] // systemd passes descriptors as numbers

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use adit_host_proxy::config::{self, Config, DEFAULT_PATH, Sources};
use adit_host_proxy::desk::store::SCHEMA;
use adit_host_proxy::desk::store::db::would_take;
use adit_host_proxy::monitor::run::Boot;
use adit_host_proxy::spawn::Spawner;
use adit_host_proxy::worker;
use anyhow::Context;
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};

/// A tunnel that is opened takes and gives back some hundred pieces of memory. The allocators of glibc and of musl, with which the packages are
/// linked, give pages back to the kernel and take them again for that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXAMPLE: &str = "\
A configuration (`aditd example-config` prints one with every key):
  [proxy]
  listen = \"127.0.0.1:7080\"
  [[grant]]
  to = [\"user:root\", \"group:ops\"]
  vms = [\"*\"]
  may = [\"reach\", \"see\"]
  [[vm]]
  name = \"web-1\"
  cid = 3
  allow = [80, 22]

Then:
  aditd check-config /etc/adit/aditd.toml
  aditd run                 # SIGHUP: read the configuration again
  curl -x http://127.0.0.1:7080 http://web-1/

The VMM of web-1 connects to /run/adit/vm/web-1/vhost.sock (vhost-user-vsock).
Each VM has a port process (adit-port) that holds its tunnels. It outlives aditd.";

/// Carries management traffic and signed tasks to VMs by name.
#[derive(Parser)]
#[command(name = "aditd", version, after_help = EXAMPLE)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM; SIGHUP applies a changed configuration
    Run {
        /// Configuration file
        #[arg(long, default_value = DEFAULT_PATH, value_name = "FILE")]
        config: PathBuf,
        /// Program of the port processes [default: adit-port in the directory of aditd]
        #[arg(long, env = "ADIT_PORT_BIN", value_name = "FILE")]
        port_bin: Option<PathBuf>,
        /// Write log lines as JSON
        #[arg(long)]
        log_json: bool,
    },
    /// The part of aditd that serves clients and guests; `aditd run` starts it
    #[command(hide = true)]
    Worker {
        /// Write log lines as JSON
        #[arg(long)]
        log_json: bool,
    },
    /// Check a configuration: name every mistake, or print what it makes aditd serve
    CheckConfig {
        /// Check also that this aditd would take the database in its state_dir, as before an upgrade or a step back
        #[arg(long)]
        database: bool,
        /// Configuration file
        #[arg(default_value = DEFAULT_PATH)]
        file: PathBuf,
    },
    /// Print a configuration with every key, its meaning, default and limit, all in comments
    ExampleConfig,
}

fn main() -> ExitCode {
    let args: Args = match adit_print::parse("aditd") {
        Ok(args) => args,
        Err(done) => return done,
    };
    let result: anyhow::Result<ExitCode> = match args.command {
        Command::CheckConfig { file, database } => {
            check(&file, database).map(|()| ExitCode::SUCCESS)
        }
        Command::ExampleConfig => print(&config::example()).map(|()| ExitCode::SUCCESS),
        Command::Run {
            config,
            port_bin,
            log_json,
        } => {
            adit_host_proxy::log::start(log_json);
            run(&config, port_bin, log_json)
        }
        Command::Worker { log_json } => {
            adit_host_proxy::log::start(log_json);
            // Its program's name is that of a link in /proc.
            let _ = rustix::thread::set_name(c"aditd");
            settle();
            worker::run().map(|()| ExitCode::SUCCESS)
        }
    };
    match result {
        Ok(code) => code,
        Err(e) => adit_print::failed("aditd", e.as_ref()),
    }
}

fn check(file: &Path, database: bool) -> anyhow::Result<()> {
    let config = Config::load(file)?;
    if database {
        let path = config.state_dir.join("aditd.db");
        would_take(&path, &SCHEMA).map_err(|e| {
            anyhow::anyhow!("cannot use {}: {e}; {}", path.display(), e.remedy(&path))
        })?;
    }
    print(&format!("{}: ok\n{}", file.display(), config.summary()))
}

/// Writes to standard output.
fn print(text: &str) -> anyhow::Result<()> {
    Ok(adit_print::bytes(text.as_bytes())?)
}

/// Sets what the process inherits and must not depend on.
fn settle() {
    // The database holds what guests are told to do and what they answered; sockets are as private.
    umask(Mode::from_bits_truncate(0o077));
    // A client takes up to three descriptors; the usual 1,024 are too few for the clients and VMs that there may be.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(error = %e, soft, "cannot raise the limit of open files");
    }
}

fn run(file: &Path, port_bin: Option<PathBuf>, log_json: bool) -> anyhow::Result<ExitCode> {
    let beside = || Ok::<_, std::io::Error>(std::env::current_exe()?.with_file_name("adit-port"));
    let port_bin = port_bin.map_or_else(beside, Ok)?;
    anyhow::ensure!(
        port_bin.exists(),
        "{} is not there: install adit-port, or set --port-bin",
        port_bin.display()
    );
    let spawner =
        Spawner::start(port_bin).context("cannot make the thread that starts port processes")?;
    let passed = passed_on();
    // Whatever becomes of the working directory, SIGHUP reads the same file.
    let file = std::path::absolute(file)?;
    let text = Sources::read(&file)?;
    let config = Config::of(&text)?;
    settle();
    adit_host_proxy::run(Boot {
        config,
        text,
        file,
        spawner,
        passed,
        log_json,
    })
}

/// Takes the descriptors that systemd held for an earlier aditd. To be called once, before anything else is opened.
fn passed_on() -> Vec<(String, OwnedFd)> {
    let passed = match sd_notify::listen_fds_with_names() {
        Ok(passed) => passed,
        Err(e) => {
            tracing::warn!(error = %e, "cannot take the descriptors that the service manager passed");
            return vec![];
        }
    };
    // The numbers are made close-on-exec, which fails for one that is not open.
    passed
        .map(|(raw, name)| {
            // SAFETY: the service manager opened the descriptor for this process (LISTEN_PID is ours), and this is the only
            // place that takes it.
            (name, unsafe { OwnedFd::from_raw_fd(raw) })
        })
        .collect()
}
