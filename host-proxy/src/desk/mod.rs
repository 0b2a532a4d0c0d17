//! The desk: every change of a task goes through here. One transaction writes it; then, in the order of the commits, it is
//! counted, published to watchers, and agents are woken that it concerns.
//!
//! | module | what |
//! |---|---|
//! | [`rules`] | what may become of a task, and which one is next: pure |
//! | [`store`] | the tables: only SQL; the thread that commits |
//! | [`change`] | each change in a transaction: the store read, the rules asked, the answer written |
//! | `enrol` | what is kept of VMs' enrolments |
//! | `lists` | what the API reads |
//! | `locks` | VMs to which nothing new goes |
//! | `time` | what ends, begins or is forgotten because time passes |
//!
//! A step of a goal costs two commits: that it is handed out is on disk before the guest has it, and how it ended is on disk
//! before the guest may forget it. What the guest says in between is published at once, and written with the VM's next
//! transaction. After a kill such a task is `leased` again until its agent, which connects anew, says once more that it runs.

pub mod change;
mod enrol;
mod lists;
mod locks;
pub mod rules;
pub mod store;
mod time;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use adit_api::{Task, TaskEvent, TaskState};
use adit_names::VmId;
use adit_tasks::wire::{Report, TaskId};
use rusqlite::Connection;
use tokio::sync::{Notify, broadcast};

use crate::config::{Limits, VmConfig};
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::vm::VmEntry;
pub use change::{DeskError, NewGoal};
pub use enrol::{DOCUMENTS_MAX, Whose};
use store::db::Db;
use store::retention::{self, Keep};
pub use store::{Handout, Wanted, rfc3339};

/// Events that a slow watcher may be behind; one more and it starts over.
const EVENTS_BEHIND_MAX: usize = 1024;

/// A goal that was taken.
pub struct Accepted {
    /// When, Unix ms.
    pub accepted_ms: i64,
    /// All tasks that it has now.
    pub tasks: Vec<Task>,
}

/// The host's tasks.
pub struct Desk {
    db: Db,
    bell: Arc<Bell>,
    /// How much is kept of what has ended.
    keep: Keep,
    /// Tasks that may wait for one VM.
    queued_per_vm: u32,
    /// Unix time in ms.
    clock: fn() -> i64,
}

impl Desk {
    /// Works on this database for these VMs.
    pub fn new(
        db: Db,
        registry: Arc<Registry>,
        metrics: Arc<Metrics>,
        limits: &Limits,
        clock: fn() -> i64,
    ) -> Self {
        Self {
            db,
            bell: Arc::new(Bell {
                registry,
                metrics,
                events: broadcast::Sender::new(EVENTS_BEHIND_MAX),
                seq: AtomicU64::new(1),
                timetable: Notify::new(),
            }),
            keep: Keep {
                age_ms: i64::from(limits.kept_days) * 86_400_000,
                tasks: limits.kept_per_vm,
                bytes: u64::from(limits.kept_mib_per_vm) << 20,
            },
            queued_per_vm: limits.queued_per_vm,
            clock,
        }
    }

    /// Queues a goal's tasks. Again with the same bytes it changes nothing but adds VMs that were not named before.
    ///
    /// # Errors
    /// Another goal has the id, its time is over, a VM has too many tasks, or the database fails.
    pub async fn add_goal(&self, new: NewGoal) -> Result<Accepted, DeskError> {
        let (now, max) = (self.now_ms(), self.queued_per_vm);
        self.change(move |c| {
            let added = change::add_goal(c, &new, now, max)?;
            let goal_id = new.goal.goal_id.to_string();
            let (_, accepted_ms) =
                store::goals::goal(c, &goal_id)?.ok_or(DeskError::UnknownGoal)?;
            let tasks = store::of_goal(c, &goal_id)?;
            Ok((Accepted { accepted_ms, tasks }, added))
        })
        .await
    }

    /// Leases the next task of a VM that its guest takes, if there is one: on disk before it is returned.
    ///
    /// # Errors
    /// The database fails.
    pub async fn hand_out(&self, vm: &VmId, wanted: Wanted) -> Result<Option<Handout>, DeskError> {
        let (vm, now) = (vm.clone(), self.now_ms());
        self.change(move |c| change::hand_out(c, vm.as_str(), now, &wanted))
            .await
    }

    /// The guest says that a task has begun. Watchers hear of it, and it is written with the VM's next transaction.
    ///
    /// # Errors
    /// The database fails.
    pub async fn begun(&self, vm: &VmId, id: TaskId) -> Result<(), DeskError> {
        let (vm, now) = (vm.clone(), self.now_ms());
        self.change(move |c| Ok(((), change::begun(c, vm.as_str(), &id, now)?)))
            .await
    }

    /// Takes a report: on disk when this returns, unless the task was terminal already.
    ///
    /// # Errors
    /// The task is not this VM's, it was never handed out, or the database fails.
    pub async fn report(&self, vm: &VmId, report: Report) -> Result<(), DeskError> {
        let (vm, now, keep) = (vm.clone(), self.now_ms(), self.keep);
        self.change(move |c| {
            let changed = change::report(c, vm.as_str(), &report, now)?;
            retention::trim(c, vm.as_str(), &keep)?;
            Ok(((), changed))
        })
        .await
    }

    /// Writes the settings of a VM of the API.
    ///
    /// # Errors
    /// The database fails.
    pub async fn keep_vm(&self, config: &VmConfig) -> Result<(), DeskError> {
        // Strings and numbers always serialise.
        let spec = serde_json::to_string(config).unwrap_or_default();
        let cid = i64::try_from(config.cid).unwrap_or(i64::MAX);
        let name = config.name.clone();
        self.db
            .run(move |c| Ok(store::vms::put(c, name.as_str(), cid, &spec)?))
            .await
    }

    /// Removes the settings of a VM, and ends its open tasks.
    ///
    /// # Errors
    /// The database fails.
    pub async fn remove_vm(&self, vm: &VmId) -> Result<(), DeskError> {
        let (vm, now, keep) = (vm.clone(), self.now_ms(), self.keep);
        self.change(move |c| {
            store::vms::delete(c, vm.as_str())?;
            store::enrolments::forget_guest(c, vm.as_str())?;
            store::identities::delete(c, vm.as_str())?;
            store::trust::delete(c, vm.as_str())?;
            store::locks::delete(c, vm.as_str())?;
            let ended = change::remove_vm(c, vm.as_str(), now)?;
            retention::trim(c, vm.as_str(), &keep)?;
            Ok(((), ended))
        })
        .await
    }

    /// Brings the number of open tasks of a VM that has just come up to date, and whether it is locked.
    pub async fn greet(&self, vm: &Arc<VmEntry>) {
        let (name, entry) = (vm.name.clone(), vm.clone());
        let look = move |c: &Connection| {
            let name = name.as_str();
            Ok((store::count_open(c, name)?, store::locks::of(c, name)?))
        };
        let looked = self
            .db
            .run_then::<_, DeskError, _, _>(look, move |(n, locked)| {
                entry.set_open_tasks(*n);
                entry.lock.set(locked.clone());
            });
        if let Err(e) = looked.await {
            tracing::error!(vm = %vm.name, error = %e, "cannot count the VM's tasks");
        }
    }

    /// Writes what is only in memory. For a stop; what is said later is said again to the next aditd.
    ///
    /// # Errors
    /// The database fails.
    pub async fn write_begun(&self) -> Result<(), DeskError> {
        self.db.run(|c| Ok(store::write_begun(c, None)?)).await
    }

    /// Follows changes from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<TaskEvent> {
        self.bell.events.subscribe()
    }

    /// Numbers a task that is told as it is now.
    pub fn event(&self, task: Task) -> TaskEvent {
        self.bell.event(task)
    }

    fn now_ms(&self) -> i64 {
        (self.clock)()
    }

    /// The one way in which tasks change: `job` returns an answer and the tasks that it changed. If the caller is dropped
    /// meanwhile, what was written is told all the same.
    async fn change<T, F>(&self, job: F) -> Result<T, DeskError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<(T, Vec<Task>), DeskError> + Send + 'static,
    {
        let job = move |c: &Connection| {
            let (answer, tasks) = job(c)?;
            let changed = Changed::new(c, tasks)?;
            Ok::<_, DeskError>((answer, changed))
        };
        let bell = self.bell.clone();
        let then = move |(_, changed): &(T, Changed)| bell.ring(changed);
        let (answer, _) = self.db.run_then(job, then).await?;
        Ok(answer)
    }
}

/// What a transaction changed.
struct Changed {
    tasks: Vec<Task>,
    /// How many open tasks the VMs have now to which tasks came, or of which tasks ended.
    open: Vec<(VmId, u32)>,
}

impl Changed {
    fn new(c: &Connection, tasks: Vec<Task>) -> Result<Self, DeskError> {
        let recounted = tasks
            .iter()
            .filter(|t| t.state == TaskState::Queued || t.state.is_terminal());
        let vms: BTreeSet<VmId> = recounted.filter_map(|t| t.vm.parse().ok()).collect();
        let mut open = Vec::new();
        for vm in vms {
            let n = store::count_open(c, vm.as_str())?;
            open.push((vm, n));
        }
        Ok(Self { tasks, open })
    }
}

/// Tells what was committed.
struct Bell {
    registry: Arc<Registry>,
    metrics: Arc<Metrics>,
    events: broadcast::Sender<TaskEvent>,
    seq: AtomicU64,
    /// When there is next something to do may have changed.
    timetable: Notify,
}

impl Bell {
    fn event(&self, task: Task) -> TaskEvent {
        TaskEvent {
            seq: self.seq.fetch_add(1, Ordering::Relaxed),
            task,
        }
    }

    /// Counts, publishes, wakes. On the database's thread: nothing here blocks.
    fn ring(&self, changed: &Changed) {
        for task in &changed.tasks {
            if task.state.is_terminal() {
                self.metrics.task_ended(task.state.name());
            }
            // Nobody may be watching.
            let _ = self.events.send(self.event(task.clone()));
        }
        for (name, open) in &changed.open {
            if let Some(vm) = self.registry.get(name) {
                vm.set_open_tasks(*open);
                vm.queued.notify_waiters();
            }
        }
        if !changed.open.is_empty() {
            self.timetable.notify_one();
        }
    }
}

#[cfg(test)]
mod tests;
