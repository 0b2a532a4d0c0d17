//! Command line of `adit-guest`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use adit_guest_driver::config::{Config, DEFAULT_PATH};
use adit_guest_driver::install::{Init, Install, install};
use adit_guest_driver::ring::{Carriers, Link};
#[cfg(feature = "test-util")]
use adit_guest_driver::transport::Transport;
use adit_guest_driver::transport::Vsock;
use adit_guest_driver::verify::Verifier;
use adit_guest_driver::{journal, run};
use adit_tasks::VmId;
use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};

/// The adit agent inside a VM: serves allowed local ports to the host, runs tasks that a trusted key has signed.
#[derive(Parser)]
#[command(name = "adit-guest", version)]
struct Args {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run the agent (the service does this).
    Run {
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
        /// For tests: `unix:DIR` in place of AF_VSOCK.
        #[cfg(feature = "test-util")]
        #[arg(long)]
        test_transport: Option<String>,
    },
    /// Put agent, service, configuration and trust anchor into an image's root directory.
    Install {
        /// The image's root directory.
        #[arg(long)]
        root: PathBuf,
        /// The image's init system.
        #[arg(long)]
        init: InitArg,
        /// The id that this VM is enrolled with, for example web-1.
        #[arg(long)]
        vm_id: VmId,
        /// Public key of the manager whose goals this guest runs; without it, it runs none.
        #[arg(long, value_name = "KEYFILE.pub")]
        trust: Option<PathBuf>,
        /// Local TCP ports that the host may reach, for example 80,22.
        #[arg(long, value_delimiter = ',')]
        allow_port: Vec<u16>,
        /// The agent's binary; this one by default.
        #[arg(long)]
        binary: Option<PathBuf>,
    },
    /// Show what this image is configured to do.
    Status {
        /// Configuration file.
        #[arg(long, default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Print the version.
    Version,
    /// Read all of a journal once.
    #[command(hide = true)]
    JournalCheck {
        /// The state directory.
        dir: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum InitArg {
    Systemd,
    Openrc,
    Busybox,
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        #[cfg(not(feature = "test-util"))]
        Cmd::Run { config } => on_vsock(config),
        #[cfg(feature = "test-util")]
        Cmd::Run {
            config,
            test_transport,
        } => match test_transport {
            Some(arg) => test_transport_of(&arg).and_then(|t| Ok(run::run(&config, t, None)?)),
            None => on_vsock(config),
        },
        Cmd::Install {
            root,
            init,
            vm_id,
            trust,
            allow_port,
            binary,
        } => into_image(root, init, vm_id, trust, allow_port, binary),
        Cmd::Status { config } => status(config),
        Cmd::Version => {
            println!("adit-guest {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Cmd::JournalCheck { dir } => journal::check(&dir).map_err(Into::into),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("adit-guest: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn on_vsock(config: PathBuf) -> anyhow::Result<()> {
    let ring = Link::default();
    let carriers = Carriers {
        vsock: Vsock,
        ring: ring.clone(),
    };
    Ok(run::run(&config, Arc::new(carriers), Some(ring))?)
}

#[cfg(feature = "test-util")]
fn test_transport_of(arg: &str) -> anyhow::Result<Arc<dyn Transport>> {
    use adit_guest_driver::transport::UnixDir;
    let dir = arg.strip_prefix("unix:");
    let dir = dir.context("--test-transport takes unix:DIR")?;
    Ok(Arc::new(UnixDir(dir.into())))
}

fn into_image(
    root: PathBuf,
    init: InitArg,
    vm_id: VmId,
    trust: Option<PathBuf>,
    ports: Vec<u16>,
    binary: Option<PathBuf>,
) -> anyhow::Result<()> {
    let binary = match binary {
        Some(path) => path,
        None => std::env::current_exe()
            .context("cannot find the agent's own binary; name one with --binary")?,
    };
    if let Some(file) = &trust {
        Verifier::check_key(file)?;
    }
    let init = match init {
        InitArg::Systemd => Init::Systemd,
        InitArg::Openrc => Init::Openrc,
        InitArg::Busybox => Init::Busybox,
    };
    let what = Install {
        root: &root,
        init,
        vm_id: &vm_id,
        trust: trust.as_deref(),
        ports: &ports,
        binary: &binary,
    };
    for line in install(&what)? {
        println!("{line}");
    }
    Ok(())
}

fn status(path: PathBuf) -> anyhow::Result<()> {
    let config = Config::load(&path)?;
    let verifier = Verifier::load(&config);
    let anchors = verifier.anchors();
    let running = std::fs::exists(config.state_dir.join("journal.redb")).unwrap_or(false);
    println!("config   {}", path.display());
    println!("vm       {}", config.vm_id);
    println!(
        "anchors  {anchors}{}",
        if anchors == 0 {
            " (no task will be run)"
        } else {
            ""
        }
    );
    println!("ports    {:?}", config.allow_ports);
    println!("clock    {}", format!("{:?}", config.clock).to_lowercase());
    println!(
        "scripts  {}",
        if config.script.enabled { "on" } else { "off" }
    );
    println!(
        "files    {}",
        if config.file.enabled {
            format!("under {:?}", config.file.roots)
        } else {
            "off".into()
        }
    );
    println!(
        "journal  {}{}",
        config.state_dir.display(),
        if running { "" } else { " (not made yet)" }
    );
    Ok(())
}
