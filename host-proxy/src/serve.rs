//! The service itself, in the worker, or in the one process that there is without root: from open listeners to the stop.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use adit_api::HostEventKind;
use rustix::net::{SocketType, sockopt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::access::audit::Audit;
use crate::access::callers::Callers;
use crate::access::tokens::Tokens;
use crate::access::{diag, enforce};
use crate::config::{Config, Sources};
use crate::desk::store::db::Db;
use crate::front::Fronts;
use crate::listen::{self, Gate};
use crate::monitor::Monitor;
use crate::place::{Bound, Listeners};
use crate::state::State;
use crate::visit::Visits;
use crate::{api, blobs, desk, events, guests, identity, reload, vms};

/// How long requests that are under way may go on after the stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Where the database is.
#[derive(Debug)]
pub struct Database {
    /// As this process opens it.
    pub path: PathBuf,
    /// As people know it.
    pub shown: PathBuf,
}

/// What the service is made of.
#[derive(Debug)]
pub struct Parts {
    /// As read at the start.
    pub config: Config,
    /// The database.
    pub database: Database,
    /// What needs root.
    pub monitor: Monitor,
    /// Where clients connect.
    pub listeners: Listeners,
    /// To ask the kernel who they are.
    pub diag: io::Result<diag::Socket>,
}

/// A service that is ready to run.
pub struct Service {
    /// What its parts share.
    pub state: Arc<State>,
    listeners: Listeners,
}

impl Service {
    /// Opens the database.
    ///
    /// # Errors
    /// It cannot be used: one line that says what to do.
    pub fn open(parts: Parts) -> anyhow::Result<Self> {
        let Parts {
            config,
            database: Database { path, shown },
            monitor,
            listeners,
            diag,
        } = parts;
        let db = Db::open_as(&path, &shown, &desk::store::SCHEMA).map_err(|e| {
            anyhow::anyhow!("cannot use {}: {e}; {}", shown.display(), e.remedy(&path))
        })?;
        let mut boot_nonce = [0; 16];
        getrandom::fill(&mut boot_nonce)
            .map_err(|e| anyhow::anyhow!("cannot get random numbers: {e}"))?;
        // In the same directory: the worker has no other.
        let dir = path.parent().unwrap_or(&path);
        let host_id = identity::of_host(dir).map_err(|e| {
            let file = shown.with_file_name(identity::FILE);
            anyhow::anyhow!("cannot use {}: {e}", file.display())
        })?;
        let blobs = blobs::Blobs::new(dir);
        let key = identity::key(dir).map_err(|e| {
            let file = shown.with_file_name(identity::KEY_FILE);
            anyhow::anyhow!("cannot use {}: {e}", file.display())
        })?;
        let audit = Audit::start(dir, config.audit.allows)
            .map_err(|e| anyhow::anyhow!("no thread for the audit: {e}"))?;
        let visits = Visits::start(dir, config.log.access, Arc::new(audit), key)
            .map_err(|e| anyhow::anyhow!("no thread for the access log: {e}"))?;
        let tokens = Tokens::new(&config.token);
        let diag = diag.and_then(|socket| {
            // There is one at least: [proxy] has it.
            let listener = listeners.all().find_map(over_tcp);
            listener.map_or(Ok(()), |at| socket.check(at))?;
            Ok(socket)
        });
        let callers = Callers::new(monitor.clone(), diag, tokens);
        let state = State::new(
            config,
            monitor,
            db,
            blobs,
            (callers, Arc::new(visits)),
            boot_nonce,
            host_id,
        );
        Ok(Self { state, listeners })
    }

    /// Serves until `stopped` ends, or the API says so. `changes` are texts of the configuration that was read again, and
    /// `ready` is called once VMs are looked after and clients let in.
    ///
    /// # Errors
    /// One line that says what to do.
    pub async fn run(
        self,
        changes: mpsc::Receiver<Result<Sources, String>>,
        stopped: impl Future<Output = ()>,
        ready: impl AsyncFnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let Self { state, listeners } = self;
        let mut tasks = tokio::task::JoinSet::new();
        // Ahead of everything that changes a task.
        tasks.spawn(events::follow_tasks(state.clone(), state.desk.subscribe()));
        let metrics = listeners.metrics.map(TcpListener::from_std).transpose()?;
        let api = UnixListener::from_std(listeners.api)?;
        state.events.note(HostEventKind::Started, None, "");
        vms::load(&state).await?;
        state.monitor.forget_others().await;
        state.found.renew(&state, &state.config.discover);
        state.found.first().await;
        let fronts = state.config.fronts();
        let bound = listeners.fronts.iter().map(Bound::tcp).collect();
        // It is set here only.
        let _ = state.bound.set(bound);
        let proxy = listeners.fronts.first().map(Bound::address);
        let proxy = proxy.unwrap_or_default();
        tracing::info!(proxy, api = %state.config.api_socket().display(), "serving");
        if state.grants().all().is_empty() {
            tracing::warn!(
                "there is no [[grant]]: nobody reaches a VM over the proxy; `aditd check-config` says what to write"
            );
        }
        ready().await?;
        crate::tell_status(&state).await;

        let fronts = fronts.into_iter().zip(listeners.fronts).collect();
        let clients = tokio::spawn(Fronts::new(state.clone()).start(fronts)?);
        let timed = state.clone();
        tasks.spawn(async move { timed.desk.keep_time(&timed.stop).await });
        tasks.spawn(reload::follow(state.clone(), changes));
        tasks.spawn(enforce::keep(state.clone()));
        tasks.spawn(guests::serve(state.clone()));
        tasks.spawn(state.events.clone().count_denials());
        if let Some(listener) = metrics {
            let app = api::observe(state.clone()).with_state(state.clone());
            let room = state.room;
            let gate = Gate::new(state.metrics.listener("metrics", room.metrics));
            let spares = move |client: &TcpStream| room.spares(client);
            tasks.spawn(listen::serve(
                listener,
                app,
                gate,
                0,
                spares,
                // Whoever may connect sees all.
                |_: &TcpStream| api::Owner(None),
                state.stop.clone(),
            ));
        }
        let server = tokio::spawn(listen::serve(
            api,
            api::router(state.clone()),
            Gate::new(state.metrics.listener("api", state.room.api)),
            api::BODY_MAX,
            // What the others leave is for this one.
            |_: &UnixStream| true,
            |client: &UnixStream| {
                let user = client.peer_cred().ok();
                api::Owner(user.map(|user| user.uid()))
            },
            state.stop.clone(),
        ));
        tokio::select! {
            () = stopped => tracing::info!("told to stop; port processes go on"),
            () = state.stop.cancelled() => tracing::info!("told to stop by the API"),
        }
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
        Ok(())
    }
}

/// The address of a listener, if it is one of TCP.
fn over_tcp(listener: BorrowedFd<'_>) -> Option<SocketAddr> {
    let is_stream = sockopt::socket_type(listener) == Ok(SocketType::STREAM);
    let at = rustix::net::getsockname(listener).ok()?;
    SocketAddr::try_from(at).ok().filter(|_| is_stream)
}
