//! `aditd`: names, HTTP and tasks of one host. It never maps guest memory; each VM's port process does.
//!
//! | module | what |
//! |---|---|
//! | `config`, `reload` | `aditd.toml`; what SIGHUP applies of it |
//! | `listen` | what every listener has: caps, shares, deadlines, descriptors in reserve |
//! | `registry`, `vm`, `fault` | the VMs by name; one of them; what is wrong with it |
//! | `vms`, `vm_dir` | how a VM comes, changes and goes; what becomes of its directory |
//! | `supervisor`, `spawn`, `link` | finds or starts a VM's port process; from which thread; speaks to it |
//! | `uids`, `cgroup` | a user and a cgroup for each port process |
//! | `whose`, `arguments` | which process answers; what it was started with |
//! | `keeper`, `fdstore` | what a port process's successor needs; kept over the end of aditd by systemd |
//! | `reach` | who may reach what in which VM, and the dial |
//! | `proxy` | the HTTP forward proxy |
//! | `services`, `agent` | what guests dial; the talk with an agent |
//! | `desk`, `disk` | goals and tasks: rules, database, and who hears of a change; whether a disk is full |
//! | `api`, `metrics` | JSON on a Unix socket; counters |
//! | `log` | lines to stderr, one of each kind a second |
//! | `state` | what they share |
#![deny(unsafe_code)] // but for `spawn`

pub mod agent;
pub mod api;
pub mod arguments;
pub mod cgroup;
pub mod config;
pub mod desk;
pub mod disk;
pub mod fault;
pub mod fdstore;
pub mod keeper;
pub mod link;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod passing;
pub mod proxy;
pub mod reach;
pub mod registry;
pub mod reload;
pub mod services;
pub mod spawn;
pub mod state;
pub mod supervisor;
pub mod uids;
pub mod vm;
pub mod vm_dir;
pub mod vms;
pub mod whose;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adit_channel::socket_path;
use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};

use cgroup::Cgroups;
use config::Config;
use desk::store::db::Db;
use fdstore::FdStore;
use listen::Gate;
use spawn::Spawner;
use state::State;
use supervisor::Launch;

/// How long requests that are under way may go on after the stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Runs until told to stop. Port processes, and the tunnels in them, go on. `file` is where the configuration was read
/// from; `spawner` starts port processes; `passed` is what systemd held for us, by name.
///
/// # Errors
/// One line that says what to do: another aditd runs, a port is busy, a directory or the database cannot be used.
pub async fn run(
    config: Config,
    file: PathBuf,
    spawner: Arc<Spawner>,
    passed: Vec<(String, OwnedFd)>,
) -> anyhow::Result<()> {
    // A signal that comes before aditd serves is handled as soon as it does.
    let hangup = signal(SignalKind::hangup()).context("cannot watch SIGHUP")?;
    let stopped = stop_signals().context("cannot watch SIGTERM")?;
    make_dir(&config.run_dir)?;
    make_dir(&config.state_dir)?;
    let _lock = lock(&config.run_dir)?;
    let path = config.state_dir.join("aditd.db");
    let db = Db::open(&path, &desk::store::SCHEMA)
        .map_err(|e| anyhow::anyhow!("cannot use {}: {e}; {}", path.display(), e.remedy(&path)))?;
    let mut boot_nonce = [0; 16];
    getrandom::fill(&mut boot_nonce)
        .map_err(|e| anyhow::anyhow!("cannot get random numbers: {e}"))?;
    let store = FdStore::new(passed);
    let launch = Launch {
        spawner,
        uids: uids::Uids::new(&config)?,
        cgroups: Uid::effective().is_root().then(Cgroups::new).flatten(),
    };
    let state = State::new(config, launch, db, boot_nonce, store);

    let proxy = bind(state.config.proxy.listen, "[proxy]").await?;
    let metrics = match &state.config.metrics {
        Some(m) => Some(bind(m.listen, "[metrics]").await?),
        None => None,
    };
    let api = bind_api(&state.config.api_socket())?;
    if let Some(metrics) = &metrics {
        write_address(&state.config.run_dir, "metrics.addr", metrics)?;
    }
    write_address(&state.config.run_dir, "proxy.addr", &proxy)?;

    vms::load(&state).await?;
    state.fd_store.forget_others();
    tracing::info!(proxy = %proxy.local_addr()?, api = %state.config.api_socket().display(), "serving");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tell_status(&state);

    let mut tasks = tokio::task::JoinSet::new();
    let clients = tokio::spawn(proxy::serve(state.clone(), proxy));
    let timed = state.clone();
    tasks.spawn(async move { timed.desk.keep_time(&timed.stop).await });
    tasks.spawn(reload::at_hangup(state.clone(), file, hangup));
    if let Some(listener) = metrics {
        let app = api::observe(state.clone()).with_state(state.clone());
        let (gate, room) = (Gate::new(state.room.metrics), state.room);
        let spares = move |client: &TcpStream| room.spares(client);
        tasks.spawn(listen::serve(
            listener,
            app,
            gate,
            0,
            spares,
            state.stop.clone(),
        ));
    }
    let server = tokio::spawn(listen::serve(
        api,
        api::router(state.clone()),
        Gate::new(state.room.api),
        api::BODY_MAX,
        // What the others leave is for this one.
        |_: &UnixStream| true,
        state.stop.clone(),
    ));
    tokio::select! {
        () = stopped => tracing::info!("told to stop; port processes go on"),
        () = state.stop.cancelled() => tracing::info!("told to stop by the API"),
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    state.stop.cancel();
    let ended = async { drop(tokio::join!(server, clients)) };
    if tokio::time::timeout(STOP_LIMIT, ended).await.is_err() {
        tracing::info!("requests that are still under way are cut off");
    }
    tasks.shutdown().await;
    match tokio::time::timeout(STOP_LIMIT, state.desk.write_begun()).await {
        Ok(Ok(())) => {}
        // Their agents say it again to the next aditd.
        Ok(Err(e)) => tracing::warn!(error = %e, "which tasks run is not written down"),
        Err(_) => {
            tracing::warn!("which tasks run is not written down: the database takes too long")
        }
    }
    let _ = socket_path::remove(&state.config.api_socket());
    for file in ["proxy.addr", "metrics.addr"] {
        let _ = std::fs::remove_file(state.config.run_dir.join(file));
    }
    Ok(())
}

/// Tells the service manager how things are, for `systemctl status`.
fn tell_status(state: &State) {
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
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&status)]);
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| {
            format!(
                "cannot make {}: run as root, or set run_dir and state_dir",
                dir.display()
            )
        })
}

/// One aditd a run_dir: whoever holds the lock may remove what an earlier one left.
fn lock(run_dir: &Path) -> anyhow::Result<Flock<std::fs::File>> {
    let path = run_dir.join("aditd.lock");
    let mut options = std::fs::OpenOptions::new();
    let file = options
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)
                .and_then(|()| write!(lock, "{}", std::process::id()))
                .with_context(|| format!("cannot write {}", path.display()))?;
            Ok(lock)
        }
        Err(_) => {
            let pid = std::fs::read_to_string(&path).unwrap_or_default();
            bail!(
                "aditd runs in {} already (process {}): stop it, or set another run_dir",
                run_dir.display(),
                pid.trim()
            )
        }
    }
}

async fn bind(address: std::net::SocketAddr, section: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}: choose another address in {section} (port 0 = any)")
    })
}

fn bind_api(path: &Path) -> anyhow::Result<UnixListener> {
    // The lock of the directory is ours: nobody listens there.
    socket_path::remove(path)?;
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    // The directory is 0700: nobody came in between.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whole or not at all: somebody may be waiting for the file.
fn write_address(run_dir: &Path, file: &str, listener: &TcpListener) -> anyhow::Result<()> {
    let (path, new) = (run_dir.join(file), run_dir.join(format!("{file}.new")));
    std::fs::write(&new, format!("{}\n", listener.local_addr()?))
        .and_then(|()| std::fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
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

#[cfg(test)]
mod tests {
    use super::*;
    use adit_channel::socket_path::SocketPathError;

    #[test]
    fn what_is_no_socket_at_the_apis_path_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aditd.sock");
        std::fs::write(&path, "precious").unwrap();
        let refused = bind_api(&path).unwrap_err();
        let why = refused.downcast_ref();
        assert!(matches!(why, Some(SocketPathError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
