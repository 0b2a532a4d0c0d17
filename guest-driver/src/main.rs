//! Command line of `adit-guest`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use adit_guest_driver::config::{BAD_CONFIG, Config, ConfigError, DEFAULT_PATH};
use adit_guest_driver::install::{Init, Install, What, install};
use adit_guest_driver::policy::command::{self, PolicyCommand, Said};
use adit_guest_driver::ring::{Carriers, Link};
use adit_guest_driver::run::{self, RunError};
use adit_guest_driver::self_test::{self, Found};
#[cfg(feature = "test-util")]
use adit_guest_driver::transport::Transport;
use adit_guest_driver::transport::Vsock;
use adit_guest_driver::upgrade::begin::{self, How};
use adit_guest_driver::upgrade::{self, Begun, program};
use adit_guest_driver::{documents, enrol, fork_server, freeze, journal, show};
use adit_print::PrintError;
use anyhow::Context;
use clap::{Parser, Subcommand};

/// The adit agent inside a VM: serves allowed local ports to the host, runs tasks that a trusted key has signed.
#[derive(Parser)]
#[command(name = "adit-guest", version)]
struct Args {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run the agent; the service does this.
    Run {
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// This program came over the channel: the image's program has begun it.
        #[arg(long, hide = true)]
        kept_by: Option<PathBuf>,
        /// It has not had a hello with the host yet.
        #[arg(long, hide = true, requires = "kept_by")]
        trial: bool,
        /// For tests: `unix:DIR` in place of AF_VSOCK.
        #[cfg(feature = "test-util")]
        #[arg(long)]
        test_transport: Option<String>,
    },
    /// Put agent, service, configuration and trust anchors into an image's root directory.
    Install {
        /// The image's root directory.
        #[arg(long)]
        root: PathBuf,
        /// The image's init system; looked for in the image if not given.
        #[arg(long)]
        init: Option<Init>,
        #[command(flatten)]
        what: What,
        /// The agent's binary; this one by default.
        #[arg(long)]
        binary: Option<PathBuf>,
    },
    /// Show what this image is configured to do, and who it is.
    Status {
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Check a configuration and show what is in force.
    CheckConfig {
        /// Configuration file.
        #[arg(default_value = DEFAULT_PATH)]
        file: PathBuf,
    },
    /// Say what would fail on this image. Exit status 1 if something would.
    SelfTest {
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Take the identity out of this image, so that each copy of it gets its own: key, journal, card. Anchors stay.
    Seal {
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// Seal although the configuration has a vm_id, which each copy will have too.
        #[arg(long)]
        keep_vm_id: bool,
    },
    /// Say whom this guest trusts from now on, and whom no longer.
    #[command(subcommand)]
    Trust(TrustCmd),
    /// Check this guest's policy file, and say what it decides.
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Print the version.
    Version,
    /// Exit status 0 if the agent is a program on trial: services ask it before they let one be that ended with status 78.
    #[command(hide = true)]
    OnTrial {
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Start sessions of commands, and copies, for the agent.
    #[command(hide = true)]
    ForkServer,
    /// Read a whole journal once.
    #[command(hide = true)]
    JournalCheck {
        /// The state directory.
        dir: PathBuf,
    },
}

#[derive(Subcommand)]
enum TrustCmd {
    /// Take a trust document, as `adit trust change` makes it. `systemctl reload adit-guest` ends what a revoked key runs.
    Add {
        /// The document.
        file: PathBuf,
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let args: Args = match adit_print::parse("adit-guest") {
        Ok(args) => args,
        Err(done) => return done,
    };
    let mut is_on_trial = false;
    let done = match args.command {
        Cmd::Run {
            config,
            kept_by,
            trial,
            #[cfg(feature = "test-util")]
            test_transport,
        } => {
            is_on_trial = trial;
            #[cfg(not(feature = "test-util"))]
            let test_transport = None;
            run_agent(config, kept_by, trial, test_transport)
        }
        Cmd::Install {
            root,
            init,
            what,
            binary,
        } => own_binary(binary)
            .and_then(|binary| into_image(&what.install(&root, init, Some(&binary)))),
        Cmd::Status { config } => status(&config),
        Cmd::CheckConfig { file } => check_config(&file),
        Cmd::SelfTest { config } => self_test(&config),
        Cmd::Seal { config, keep_vm_id } => seal(&config, keep_vm_id),
        Cmd::Trust(TrustCmd::Add { file, config }) => trust_add(&file, &config),
        Cmd::Policy { command } => return policy(&command),
        Cmd::OnTrial { config } => return ExitCode::from(u8::from(!begin::is_on_trial(&config))),
        Cmd::Version => print(&format!("adit-guest {}\n", program::version())),
        Cmd::ForkServer => fork_server::serve().map_err(Into::into),
        Cmd::JournalCheck { dir } => journal::check(&dir).map_err(Into::into),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let status = match exit_status(&e) {
                // A service that does not ask `on-trial` would not start it again, nor what ran before it.
                BAD_CONFIG if is_on_trial => 1,
                status => status,
            };
            failed(&e, status)
        }
    }
}

fn failed(e: &anyhow::Error, status: u8) -> ExitCode {
    if status != adit_print::CLOSED_PIPE {
        // One line, whatever a cause brings along.
        let line = format!("adit-guest: {}", format!("{e:#}").replace('\n', " "));
        adit_print::note!("{line}");
        adit_guest_driver::log::console(&line);
    }
    ExitCode::from(status)
}

fn policy(command: &PolicyCommand) -> ExitCode {
    let Said { text, status } = match command::run(command) {
        Ok(said) => said,
        Err(e) => return failed(&anyhow::Error::from(e), command::NO_ANSWER),
    };
    match print(&text) {
        Ok(()) => ExitCode::from(status),
        Err(e) => failed(&e, exit_status(&e)),
    }
}

/// Runs the agent: this program, or the one that is the agent.
fn run_agent(
    config: PathBuf,
    kept_by: Option<PathBuf>,
    is_on_trial: bool,
    transport: Option<String>,
) -> anyhow::Result<()> {
    let is_kept = kept_by.is_some();
    let image = match kept_by {
        Some(image) => image,
        None => upgrade::image(&std::env::current_exe().unwrap_or_default()),
    };
    let how = How {
        config,
        image,
        transport,
    };
    #[cfg(feature = "test-util")]
    if is_kept {
        fail_as_told();
    }
    // First: what an agent writes at its start could be on what stands still. What is wrong with the configuration is said below.
    if let Ok(config) = Config::load(&how.config) {
        freeze::thaw_left(&config.run_dir);
    }
    let faults = match is_kept {
        true => Vec::new(),
        false => begin::begin(&how),
    };
    let transport = how.transport.clone();
    let begun = Begun {
        how,
        is_kept,
        is_on_trial,
        faults,
    };
    match transport {
        #[cfg(feature = "test-util")]
        Some(arg) => Ok(run::run(begun, test_transport_of(&arg)?, None)?),
        _ => {
            let ring = Link::default();
            let carriers = Carriers {
                vsock: Vsock,
                ring: ring.clone(),
            };
            Ok(run::run(begun, Arc::new(carriers), Some(ring))?)
        }
    }
}

/// As a bad program would.
#[cfg(feature = "test-util")]
fn fail_as_told() {
    use adit_guest_driver::upgrade::program::test::behaves;
    adit_blob::disk::steps_by("ADIT_TEST_KILL_AT_STEP_KEPT");
    if behaves("crash") {
        std::process::exit(1);
    }
    if behaves("hang") {
        loop {
            std::thread::park();
        }
    }
}

#[cfg(feature = "test-util")]
fn test_transport_of(arg: &str) -> anyhow::Result<Arc<dyn Transport>> {
    use adit_guest_driver::transport::UnixDir;
    let dir = arg.strip_prefix("unix:");
    let dir = dir.context("--test-transport takes unix:DIR")?;
    Ok(Arc::new(UnixDir(dir.into())))
}

fn own_binary(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    match given {
        Some(path) => Ok(path),
        None => std::env::current_exe()
            .context("cannot find the agent's own binary; name one with --binary"),
    }
}

fn into_image(what: &Install<'_>) -> anyhow::Result<()> {
    print(&(install(what)?.join("\n") + "\n"))
}

fn status(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let journal = config.state_dir.join("journal.redb");
    let made = match std::fs::exists(&journal) {
        Ok(true) => "",
        Ok(false) => " (not made yet)",
        Err(_) => " (cannot be seen: run this as root)",
    };
    let head = format!("{:<15} {}\n", "config", path.display());
    let tail = format!("{:<15} {}{made}\n", "journal", journal.display());
    let who = show::enrolment(&config, &enrol::look(&config));
    let agent = show::agent(&config);
    print(&(head + &show::in_force(&config) + &tail + &who + &agent))
}

fn check_config(file: &Path) -> anyhow::Result<()> {
    let config = Config::load(file)?;
    print(&format!(
        "{}: ok\n{}",
        file.display(),
        show::in_force(&config)
    ))
}

fn self_test(path: &Path) -> anyhow::Result<()> {
    let (mut text, mut failed) = (String::new(), 0);
    for found in self_test::run(&Config::load(path)?) {
        let (word, what) = match found {
            Found::Ok(what) => ("ok", what),
            Found::Note(what) => ("note", what),
            Found::Fails(what) => ("FAILS", what),
        };
        failed += usize::from(word == "FAILS");
        text.push_str(&format!("{word:<6} {what}\n"));
    }
    print(&text)?;
    match failed {
        0 => Ok(()),
        n => anyhow::bail!("self-test: {n} would fail"),
    }
}

fn seal(path: &Path, keep_vm_id: bool) -> anyhow::Result<()> {
    let gone = enrol::seal::seal(&Config::load(path)?, keep_vm_id)?;
    let lines = gone
        .iter()
        .map(|file| format!("removed {}\n", file.display()));
    let lines: String = lines.collect();
    print(match lines.is_empty() {
        true => "there was no identity to remove\n",
        false => &lines,
    })
}

fn trust_add(file: &Path, config: &Path) -> anyhow::Result<()> {
    let config = Config::load(config)?;
    let envelope = documents::read_file(file)
        .with_context(|| format!("cannot read the trust document {}", file.display()))?;
    let found = enrol::look(&config);
    match documents::take(&config, &found, &envelope) {
        Ok(true) => print("taken\n"),
        Ok(false) => print("it was taken before\n"),
        Err(fault) => anyhow::bail!("{}: {fault}", file.display()),
    }
}

/// Writes to standard output.
fn print(text: &str) -> anyhow::Result<()> {
    Ok(adit_print::bytes(text.as_bytes())?)
}

/// [`BAD_CONFIG`] for a configuration that cannot be used, [`CLOSED_PIPE`] where nobody reads standard output any more, 1
/// for all else.
///
/// [`CLOSED_PIPE`]: adit_print::CLOSED_PIPE
fn exit_status(e: &anyhow::Error) -> u8 {
    if let Some(PrintError::Closed) = e.downcast_ref() {
        return adit_print::CLOSED_PIPE;
    }
    let config =
        e.is::<ConfigError>() || matches!(e.downcast_ref::<RunError>(), Some(RunError::Config(_)));
    if config { BAD_CONFIG } else { 1 }
}
