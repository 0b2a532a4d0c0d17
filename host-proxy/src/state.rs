//! What the parts of aditd share.

use std::sync::Arc;

use adit_names::VmId;
use adit_tasks::TrustStore;
use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::blobs::Blobs;
use crate::config::Config;
use crate::desk::Desk;
use crate::desk::store::db::Db;
use crate::listen::{Room, Shares};
use crate::metrics::Metrics;
use crate::monitor::Monitor;
use crate::proxy::pool::Pool;
use crate::registry::Registry;
use crate::reload::Reloads;

/// Shared by all tasks of the process.
pub struct State {
    /// As read at start; of its VMs, [`registry`](Self::registry) has those that are served now.
    pub config: Config,
    /// What became of the configuration file since then.
    pub reloads: Reloads,
    /// Whose cards are believed.
    pub trust: TrustStore,
    /// What needs root.
    pub monitor: Monitor,
    /// The VMs.
    pub registry: Arc<Registry>,
    /// Their tasks.
    pub desk: Desk,
    /// Files for VMs.
    pub blobs: Blobs,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How many connections there may be.
    pub room: Room,
    /// Each VM's share of the requests that are under way through the proxy.
    pub vm_shares: Arc<Shares<VmId>>,
    /// Connections to guests' servers that wait for the next request.
    pub pool: Arc<Pool>,
    /// Requests of the API that wait for something to happen: half of its connections at most.
    pub patient: Arc<Semaphore>,
    /// Drawn once a process.
    pub boot_nonce: [u8; 16],
    /// Drawn once a host, see [`identity`](crate::identity).
    pub host_id: [u8; 16],
    /// Stops everything.
    pub stop: CancellationToken,
    /// Clients of the proxy: a stop waits for them.
    pub clients: TaskTracker,
}

impl State {
    /// Puts the parts together.
    pub fn new(
        config: Config,
        monitor: Monitor,
        db: Db,
        blobs: Blobs,
        boot_nonce: [u8; 16],
        host_id: [u8; 16],
    ) -> Arc<Self> {
        let room = Room::of_process(config.limits.connections);
        let registry = Arc::new(Registry::new(&config.run_dir));
        let metrics = Arc::new(Metrics::default());
        let per_vm = config.limits.requests_per_vm.unwrap_or(room.proxy / 4);
        Arc::new(Self {
            room,
            vm_shares: Shares::new(per_vm.max(1)),
            pool: Pool::new(room.proxy),
            patient: Arc::new(Semaphore::new((room.api / 2).max(1))),
            desk: Desk::new(
                db,
                registry.clone(),
                metrics.clone(),
                &config.limits,
                now_ms,
            ),
            registry,
            trust: config.trust.anchors(),
            config,
            reloads: Reloads::default(),
            monitor,
            metrics,
            blobs,
            boot_nonce,
            host_id,
            stop: CancellationToken::new(),
            clients: TaskTracker::new(),
        })
    }

    /// Unix time.
    pub fn now_ms(&self) -> i64 {
        now_ms()
    }
}

/// Unix time. The one place where aditd reads the wall clock.
fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}
