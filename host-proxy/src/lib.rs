//! `aditd`: names, HTTP and tasks of one host. It never maps guest memory; each VM's port process does.
//!
//! | module | what |
//! |---|---|
//! | `config`, `reload` | `aditd.toml`; what SIGHUP applies of it |
//! | `listen` | what every listener has: caps, shares, deadlines, descriptors in reserve |
//! | `registry`, `vm`, `fault` | the VMs by name; one of them; what is wrong with it |
//! | `vms`, `vm_dir` | how a VM comes, changes and goes; what becomes of its directory |
//! | `supervisor`, `link` | keeps a VM's port process; speaks to it |
//! | `monitor` | what needs root: a process of its own, or a part of this one |
//! | `worker` | what serves strangers, confined |
//! | `spawn`, `place`, `text` | the thread that starts processes; the run directory; texts between the two processes |
//! | `uids`, `cgroup` | a user and a cgroup for each port process |
//! | `whose`, `arguments` | which process answers; what it was started with |
//! | `keeper`, `fdstore` | what a port process's successor needs; kept over the end of the worker, and of aditd |
//! | `access` | who asks, and who may do what with which VM |
//! | `front` | every listener for clients of VMs |
//! | `peers` | other hosts and their VMs |
//! | `visit`, `trace`, `lines` | a request or tunnel to its end, and what is written of it; its trace; files of lines |
//! | `reach`, `remedy` | from a destination to a stream; what to do where it is refused |
//! | `proxy` | the HTTP forward proxy |
//! | `services`, `agent` | what guests dial; the talk with an agent |
//! | `guests` | guests that dial through the host's kernel |
//! | `desk`, `disk` | goals and tasks: rules, database, and who hears of a change; whether a disk is full |
//! | `api`, `metrics`, `events` | JSON on a Unix socket; counters; what happens here, numbered |
//! | `log` | lines to stderr, one of each kind a second |
//! | `serve`, `state` | the service put together; what its parts share |
#![deny(unsafe_code)] // but for `spawn` and `proxy::cut_off`

pub mod access;
pub mod agent;
pub mod api;
pub mod arguments;
pub mod blobs;
pub mod cgroup;
pub mod config;
pub mod desk;
pub mod disk;
pub mod enrolment;
pub mod events;
pub mod fault;
pub mod fdstore;
pub mod found;
pub mod front;
pub mod guests;
pub mod identity;
pub mod keeper;
pub mod lines;
pub mod link;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod monitor;
pub mod no_passing;
pub mod passing;
pub mod peers;
pub mod place;
pub mod proxy;
pub mod reach;
pub mod registry;
pub mod reload;
pub mod remedy;
pub mod serve;
pub mod services;
pub mod spawn;
pub mod state;
pub mod supervisor;
mod taken;
pub mod text;
mod trace;
pub mod uids;
pub mod visit;
pub mod vm;
pub mod vm_dir;
pub mod vms;
pub mod whose;
pub mod worker;

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use anyhow::Context;
use nix::unistd::Uid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use monitor::Monitor;
use monitor::privileged::Privileged;
use monitor::run::Boot;
use monitor::store::Store;
use place::Listeners;
use serve::{Database, Parts, Service};
use state::State;

/// Runs until told to stop: as two processes where aditd is root and can, or else as one. Port processes, and the tunnels in
/// them, go on.
///
/// # Errors
/// One line that says what to do: another aditd runs, a port is busy, a directory or the database cannot be used.
pub fn run(boot: Boot) -> anyhow::Result<ExitCode> {
    place::make_dirs(&boot.config)?;
    let worker = monitor::user::of_worker(&boot.config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match worker {
        Ok(account) => runtime.block_on(monitor::run::run(boot, account)),
        Err(why) => {
            tracing::warn!(
                why,
                "aditd is one process: what serves clients and guests has all of its rights"
            );
            runtime.block_on(in_one(boot))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn in_one(boot: Boot) -> anyhow::Result<()> {
    let Boot {
        config,
        file,
        spawner,
        passed,
        ..
    } = boot;
    // A signal that comes before aditd serves is handled as soon as it does.
    let mut hangup = signal(SignalKind::hangup()).context("cannot watch SIGHUP")?;
    let stopped = stop_signals().context("cannot watch SIGTERM")?;
    let _lock = place::lock(&config.run_dir)?;
    let privileged = Privileged::new(
        config.run_dir.clone(),
        spawner,
        uids::Uids::new(&config, None)?,
        Uid::effective()
            .is_root()
            .then(cgroup::Cgroups::new)
            .flatten(),
        Store::new(passed),
        false,
    );
    privileged.set(&config);
    let known = privileged.clone();
    let listeners = Listeners::bind(&config)?;
    let addresses = Listeners::of(
        &config,
        listeners
            .all()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<std::io::Result<_>>()?,
    )?;
    let path = config.state_dir.join("aditd.db");
    let service = Service::open(Parts {
        config: config.clone(),
        database: Database {
            shown: path.clone(),
            path,
        },
        monitor: Monitor::Here(privileged),
        listeners,
        diag: access::diag::Socket::open(),
    });
    let (tell, changes) = mpsc::channel(1);
    let reread = tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let file = file.clone();
            // Not on the thread that serves: its file system may take its time.
            let text = tokio::task::spawn_blocking(move || reload::read_again(&file)).await;
            let text = text.unwrap_or_else(|e| Err(e.to_string()));
            if let Ok(Ok(config)) = text.as_ref().map(config::Config::of) {
                known.set(&config);
            }
            if tell.send(text).await.is_err() {
                return;
            }
        }
    });
    let ready = async || {
        addresses.write_addresses(&config.run_dir)?;
        drop(addresses);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        Ok(())
    };
    let served = match service {
        Ok(service) => service.run(changes, stopped, ready).await,
        Err(e) => Err(e),
    };
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    reread.abort();
    place::clear(&config);
    served
}

/// Tells the service manager how things are, for `systemctl status`.
async fn tell_status(state: &State) {
    let vms = state.registry.all().len();
    let mut status = format!("{vms} VMs");
    let reloaded = state.reloads.show();
    if let Some(error) = reloaded.error {
        status.push_str(&format!("; configuration refused: {error}"));
    }
    if !reloaded.restart.is_empty() {
        status.push_str("; a restart is needed for ");
        status.push_str(&reloaded.restart.join(", "));
    }
    // Errors quote what is in a file of any length.
    state.monitor.status(text::line_of(&status)).await;
}

/// Which program this process is: its file, whatever has its path by now.
fn build() -> u64 {
    let mut hasher = DefaultHasher::new();
    if let Ok(file) = std::fs::metadata("/proc/self/exe") {
        (file.dev(), file.ino(), file.mtime(), file.mtime_nsec()).hash(&mut hasher);
    }
    hasher.finish()
}

/// Watches the signals that stop aditd, from now on. Returns what ends at the first of them.
fn stop_signals() -> std::io::Result<impl Future<Output = ()>> {
    let (mut term, mut int) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
