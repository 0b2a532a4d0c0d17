//! What the parts of aditd share.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use adit_api::{Task, TaskEvent};
use adit_names::VmId;
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore, broadcast};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::db::Db;
use crate::fdstore::FdStore;
use crate::listen::{Room, Shares};
use crate::metrics::Metrics;
use crate::proxy::pool::Pool;
use crate::queue::{self, retention, retention::Keep};
use crate::registry::Registry;
use crate::reload::Reloads;
use crate::supervisor::Launch;
use crate::vm::VmEntry;

/// Events that a slow watcher may be behind; one more and it starts over.
const EVENTS_BEHIND_MAX: usize = 1024;
/// How soon a database that has failed is asked again.
const AGAIN_MS: i64 = 10_000;

/// Shared by all tasks of the process.
pub struct State {
    /// As read at start; of its VMs, [`registry`](Self::registry) has those that are served now.
    pub config: Config,
    /// What became of the configuration file since then.
    pub reloads: Reloads,
    /// What a port process is started with.
    pub launch: Arc<Launch>,
    /// The VMs.
    pub registry: Registry,
    /// The database.
    pub db: Db,
    /// Descriptors that systemd holds for us.
    pub fd_store: FdStore,
    /// Counters.
    pub metrics: Metrics,
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
    /// Stops everything.
    pub stop: CancellationToken,
    /// Clients of the proxy: a stop waits for them.
    pub clients: TaskTracker,
    /// What expires next may have changed.
    pub expiry: Notify,
    events: broadcast::Sender<TaskEvent>,
    seq: AtomicU64,
}

impl State {
    /// Puts the parts together.
    pub fn new(
        config: Config,
        launch: Launch,
        db: Db,
        boot_nonce: [u8; 16],
        fd_store: FdStore,
    ) -> Arc<Self> {
        let room = Room::of_process(config.limits.connections);
        let per_vm = config.limits.requests_per_vm.unwrap_or(room.proxy / 4);
        Arc::new(Self {
            room,
            vm_shares: Shares::new(per_vm.max(1)),
            pool: Pool::new(room.proxy),
            patient: Arc::new(Semaphore::new((room.api / 2).max(1))),
            registry: Registry::new(&config.run_dir),
            config,
            reloads: Reloads::default(),
            launch: Arc::new(launch),
            db,
            fd_store,
            metrics: Metrics::default(),
            boot_nonce,
            stop: CancellationToken::new(),
            clients: TaskTracker::new(),
            expiry: Notify::new(),
            events: broadcast::Sender::new(EVENTS_BEHIND_MAX),
            seq: AtomicU64::new(1),
        })
    }

    /// Unix time. The one place where aditd reads the wall clock.
    pub fn now_ms(&self) -> i64 {
        Timestamp::now().as_millisecond()
    }

    /// Tells watchers what changed.
    pub fn publish(&self, tasks: impl IntoIterator<Item = Task>) {
        for task in tasks {
            // Nobody may be watching.
            let _ = self.events.send(self.event(task));
        }
    }

    /// Numbers a change.
    pub fn event(&self, task: Task) -> TaskEvent {
        TaskEvent {
            seq: self.seq.fetch_add(1, Ordering::Relaxed),
            task,
        }
    }

    /// Follows changes from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<TaskEvent> {
        self.events.subscribe()
    }

    /// Counts tasks that ended.
    pub fn count_ended(&self, tasks: &[Task]) {
        for task in tasks.iter().filter(|t| t.state.is_terminal()) {
            self.metrics.task_ended(task.state.name());
        }
    }

    /// Brings the number of a VM's open tasks up to date.
    pub async fn refresh_open_tasks(&self, vm: &Arc<VmEntry>) {
        let name = vm.name.to_string();
        if let Ok(n) = self.db.run(move |c| queue::queued(c, &name)).await {
            vm.set_open_tasks(n);
        }
    }

    /// How much is kept of what has ended.
    pub fn keep(&self) -> Keep {
        let limits = &self.config.limits;
        Keep {
            age_ms: i64::from(limits.kept_days) * 86_400_000,
            tasks: limits.kept_per_vm,
            bytes: u64::from(limits.kept_mib_per_vm) << 20,
        }
    }

    /// Wakes the agents that wait for a goal which was held until now.
    async fn release(&self, since: &mut i64, now: i64) {
        let from = *since;
        match self.db.run(move |c| queue::released(c, from, now)).await {
            Ok(vms) => {
                *since = now;
                let vms = vms
                    .iter()
                    .filter_map(|vm| self.registry.get(&vm.parse().ok()?));
                vms.for_each(|vm| vm.queued.notify_waiters());
            }
            Err(e) => tracing::error!(error = %e, "cannot look for what was held"),
        }
    }

    /// Forgets what ended long ago. Returns when to look again.
    async fn retire(&self, now: i64) -> Option<i64> {
        let keep = self.keep();
        match self.db.run(move |c| retention::retire(c, &keep, now)).await {
            Ok((gone, next)) => {
                if gone > 0 {
                    tracing::info!(gone, "tasks that ended long ago are forgotten");
                }
                next
            }
            Err(e) => {
                tracing::error!(error = %e, "cannot forget what ended long ago");
                Some(now + AGAIN_MS)
            }
        }
    }

    /// Ends tasks whose goal's time is over, exactly when it is; begins what was held; forgets what ended long ago.
    pub async fn expire_tasks(self: Arc<Self>) {
        let mut released = self.now_ms();
        while !self.stop.is_cancelled() {
            let changed = self.expiry.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let now = self.now_ms();
            let keep = self.keep();
            let expired = self.db.run(move |c| {
                let (ended, next) = queue::expire(c, now)?;
                let vms: BTreeSet<&str> = ended.iter().map(|t| t.vm.as_str()).collect();
                for vm in vms {
                    retention::trim(c, vm, &keep)?;
                }
                Ok::<_, queue::QueueError>((ended, next))
            });
            let next = match expired.await {
                Ok((ended, next)) => {
                    self.release(&mut released, now).await;
                    self.count_ended(&ended);
                    let names: BTreeSet<VmId> =
                        ended.iter().filter_map(|t| t.vm.parse().ok()).collect();
                    self.publish(ended);
                    for vm in names.iter().filter_map(|name| self.registry.get(name)) {
                        self.refresh_open_tasks(&vm).await;
                    }
                    next.into_iter().chain(self.retire(now).await).min()
                }
                Err(e) => {
                    tracing::error!(error = %e, "cannot look for expired tasks");
                    Some(now + AGAIN_MS)
                }
            };
            let due = async {
                match next {
                    // A clock that is set is noticed within the hour.
                    Some(at) => {
                        let ms = u64::try_from(at - now + 1).unwrap_or(1).min(3_600_000);
                        tokio::time::sleep(std::time::Duration::from_millis(ms)).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = &mut changed => {}
                () = due => {}
                () = self.stop.cancelled() => {}
            }
        }
    }
}
