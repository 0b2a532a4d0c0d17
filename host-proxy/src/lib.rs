//! `aditd`: names, HTTP and tasks of one host. Maps no guest memory: that do the port processes, one a VM.
//!
//! | module | what |
//! |---|---|
//! | `config` | `aditd.toml` |
//! | `listen` | what every listener has: caps, shares, deadlines, descriptors in reserve |
//! | `registry` | the VMs and how each one's channel stands |
//! | `supervisor`, `spawn`, `ports` | a port process a VM: found or started; from which thread; spoken to |
//! | `uids`, `cgroup`, `whose` | a user and a cgroup for each of them; which process it is |
//! | `keeper`, `fdstore` | what a port process's successor needs; kept over the end of aditd by systemd |
//! | `proxy` | the HTTP forward proxy |
//! | `agent` | the tasks service that guests dial |
//! | `queue`, `db` | the durable queue; the thread that commits it |
//! | `api`, `metrics` | JSON on a Unix socket; counters |
//! | `log` | lines to stderr, one a kind a second |
//! | `state` | what they share |
#![deny(unsafe_code)] // but for `spawn`

pub mod agent;
pub mod api;
pub mod cgroup;
pub mod config;
pub mod db;
pub mod fdstore;
pub mod keeper;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod passing;
pub mod ports;
pub mod proxy;
pub mod queue;
pub mod registry;
pub mod spawn;
pub mod state;
pub mod supervisor;
pub mod uids;
pub mod whose;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use adit_channel::{hello, socket_path};
use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use cgroup::Cgroups;
use config::{Config, VmConfig};
use db::Db;
use fdstore::FdStore;
use listen::Gate;
use queue::QueueError;
use registry::VmEntry;
use spawn::Spawner;
use state::State;
use supervisor::Launch;

/// How long requests that are under way may go on after the stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Runs until told to stop. Port processes, and the tunnels in them, go on. `spawner` starts
/// them; `passed` is what systemd held for us, by name.
///
/// # Errors
/// One line that says what to do: another aditd runs, a port is busy, a directory or the database cannot be used.
pub async fn run(
    config: Config,
    spawner: Arc<Spawner>,
    passed: Vec<(String, OwnedFd)>,
) -> anyhow::Result<()> {
    make_dir(&config.run_dir)?;
    make_dir(&config.state_dir)?;
    let _lock = lock(&config.run_dir)?;
    let path = config.state_dir.join("aditd.db");
    let db = Db::open(&path, queue::schema::MIGRATIONS)
        .map_err(|e| anyhow::anyhow!("cannot use {}: {e}; {}", path.display(), e.remedy()))?;
    let mut boot_nonce = [0; 16];
    getrandom::fill(&mut boot_nonce)
        .map_err(|e| anyhow::anyhow!("no randomness to be had: {e}"))?;
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

    load_vms(&state).await?;
    state.fd_store.forget_others();
    tracing::info!(proxy = %proxy.local_addr()?, api = %state.config.api_socket().display(), "serving");
    let status = format!(
        "proxy on {}, {} VMs",
        proxy.local_addr()?,
        state.registry.all().len()
    );
    let _ = sd_notify::notify(&[
        sd_notify::NotifyState::Ready,
        sd_notify::NotifyState::Status(&status),
    ]);

    let mut tasks = tokio::task::JoinSet::new();
    let clients = tokio::spawn(proxy::serve(state.clone(), proxy));
    tasks.spawn(state.clone().expire_tasks());
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
        () = stop_signal() => tracing::info!("told to stop; port processes go on"),
        () = state.stop.cancelled() => tracing::info!("told to stop by the API"),
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    state.stop.cancel();
    let ended = async { drop(tokio::join!(server, clients)) };
    if tokio::time::timeout(STOP_LIMIT, ended).await.is_err() {
        tracing::info!("requests that are still under way are cut off");
    }
    tasks.shutdown().await;
    let _ = socket_path::remove(&state.config.api_socket());
    for file in ["proxy.addr", "metrics.addr"] {
        let _ = std::fs::remove_file(state.config.run_dir.join(file));
    }
    Ok(())
}

/// Adds a VM and starts to look after it; `keep` writes it down, so that it is there after a restart.
///
/// # Errors
/// Its name or CID is taken, or it cannot be written down.
pub(crate) async fn add_vm(
    state: &Arc<State>,
    config: VmConfig,
    keep: bool,
) -> Result<Arc<VmEntry>, api::ApiError> {
    let vm = state.registry.add(config.clone())?;
    vm.keeper.open(&state.fd_store, config.name.as_str());
    if keep {
        // Lists of numbers always serialise.
        let allow = serde_json::to_string(&config.allow).unwrap_or_default();
        let allow_vsock = serde_json::to_string(&config.allow_vsock).unwrap_or_default();
        let name = config.name.to_string();
        let kept = state.db.run::<_, QueueError, _>(move |c| {
            let row = rusqlite::params![
                name,
                i64::try_from(config.cid).unwrap_or(i64::MAX),
                allow,
                allow_vsock
            ];
            Ok(c.execute("INSERT OR REPLACE INTO vms VALUES (?1, ?2, ?3, ?4)", row)?)
        });
        if let Err(e) = kept.await {
            state.registry.remove(&vm.config.name);
            return Err(e.into());
        }
    }
    state.refresh_open_tasks(&vm).await;
    let (for_agents, of_vm) = (state.clone(), vm.clone());
    let on_incoming = move |incoming: adit_port::control::Incoming, fd| {
        if incoming.port == hello::PORT {
            agent::accept(&for_agents, &of_vm, incoming, fd);
        }
    };
    tokio::spawn(supervisor::supervise(
        vm.clone(),
        state.launch.clone(),
        on_incoming,
    ));
    Ok(vm)
}

/// VMs of the configuration, then those that were added by the API and do not clash with them.
async fn load_vms(state: &Arc<State>) -> anyhow::Result<()> {
    for vm in state.config.vm.clone() {
        if add_vm(state, vm, false).await.is_err() {
            bail!("the VMs of the configuration clash"); // it was checked when it was read
        }
    }
    let rows = state
        .db
        .run::<Vec<(String, u64, String, String)>, QueueError, _>(|c| {
            let mut statement =
                c.prepare("SELECT name, cid, allow, allow_vsock FROM vms ORDER BY name")?;
            let rows = statement.query_map([], |r| {
                Ok((r.get(0)?, r.get::<_, u32>(1)?.into(), r.get(2)?, r.get(3)?))
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        });
    for (name, cid, allow, allow_vsock) in rows.await? {
        let config = (|| {
            Some(VmConfig {
                name: name.parse().ok()?,
                cid,
                allow: serde_json::from_str(&allow).ok()?,
                allow_vsock: serde_json::from_str(&allow_vsock).ok()?,
                busy_poll_us: 0,
                ivshmem_mib: crate::config::default_ivshmem_mib(),
                allow_any_memory: false,
            })
        })();
        let added = match config {
            Some(config) => add_vm(state, config, false).await.is_ok(),
            None => false,
        };
        if !added {
            tracing::error!(
                vm = name,
                cid,
                "a VM that was added earlier clashes with the configuration: not served"
            );
        }
    }
    Ok(())
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
        .open(&path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)?;
            write!(lock, "{}", std::process::id())?;
            Ok(lock)
        }
        Err(_) => {
            let pid = std::fs::read_to_string(&path).unwrap_or_default();
            bail!(
                "aditd runs already in {} (process {}): stop it, or set another run_dir",
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

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (term, int) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    );
    let (Ok(mut term), Ok(mut int)) = (term, int) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
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
