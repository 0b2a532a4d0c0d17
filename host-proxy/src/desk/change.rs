//! Every change of a task, within a transaction: [`store`] is read, [`rules`] are asked, and what they say is written.
//! Each returns the tasks that it changed.

use adit_api::Task;
use adit_names::VmId;
use adit_tasks::wire::{Report, TaskId};
use adit_tasks::{Goal, plan, task_id};
use jiff::Timestamp;
use rusqlite::Connection;

use super::enrol::DOCUMENTS_MAX;
use super::rules::{self, After, Candidate, Choice, Event, Step};
use super::store::db::DbError;
use super::store::{self, Handout, NewTask, Open, Wanted, goals, migrations, report};

/// Why the desk refuses.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// The same id with other content.
    #[error("goal {goal_id} is known with other content")]
    GoalTaken {
        /// Its id.
        goal_id: String,
    },
    /// Its time is over: no task of it would ever be handed out.
    #[error("goal {goal_id} was valid until {until}")]
    GoalExpired {
        /// Its id.
        goal_id: String,
        /// Its `not_after`.
        until: Timestamp,
    },
    /// Too many tasks wait already.
    #[error("{vm} has {queued} tasks waiting, at most {max} are allowed")]
    Full {
        /// The VM.
        vm: VmId,
        /// How many wait.
        queued: u32,
        /// How many may.
        max: u32,
    },
    /// No such task.
    #[error("no such task")]
    Unknown,
    /// No such goal.
    #[error("no such goal")]
    UnknownGoal,
    /// A trust document that is older than the one that is kept.
    #[error("the trust document has sequence {sequence}, and {kept} of its signer is kept here")]
    TrustOld {
        /// Its sequence.
        sequence: u64,
        /// That of the one that is kept.
        kept: u64,
    },
    /// Another one of the same sequence is kept.
    #[error("another trust document of the sequence {sequence} of its signer is kept here")]
    TrustTaken {
        /// The sequence of both.
        sequence: u64,
    },
    /// Too many are kept.
    #[error("trust documents of {DOCUMENTS_MAX} signers are kept already")]
    TrustFull,
    /// No such trust document.
    #[error("no trust document of that signer is kept")]
    UnknownTrust,
    /// A report for a task that was never handed to this VM.
    #[error("the task was not handed to this VM")]
    NotLeased,
    /// The database failed.
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<rusqlite::Error> for DeskError {
    fn from(e: rusqlite::Error) -> Self {
        Self::Db(e.into())
    }
}

/// A goal that is handed over.
pub struct NewGoal {
    /// Parsed, not verified: the guest verifies.
    pub goal: Goal,
    /// sha256 of its payload.
    pub digest: [u8; 32],
    /// Exactly as signed.
    pub envelope: Vec<u8>,
    /// Who claims to have signed it.
    pub signer: String,
    /// VMs to queue it for.
    pub vms: Vec<VmId>,
}

/// Queues a goal's tasks, of which at most `max_queued` may wait for one VM. Again with the same bytes it changes nothing but
/// adds VMs that were not named before.
pub fn add_goal(
    c: &Connection,
    new: &NewGoal,
    now_ms: i64,
    max_queued: u32,
) -> Result<Vec<Task>, DeskError> {
    let goal_id = new.goal.goal_id.to_string();
    let is_over = rules::is_over(new.goal.not_after.as_millisecond(), now_ms);
    let too_late = || DeskError::GoalExpired {
        goal_id: new.goal.goal_id.to_string(),
        until: new.goal.not_after,
    };
    match goals::goal(c, &goal_id)? {
        Some((digest, _)) if digest != new.digest => return Err(DeskError::GoalTaken { goal_id }),
        Some(_) => {}
        None if is_over => return Err(too_late()),
        None => {
            let (digest, envelope) = (&new.digest, &new.envelope);
            goals::insert(c, &new.goal, digest, envelope, &new.signer, now_ms)?;
        }
    }
    let mut added = Vec::new();
    for vm in &new.vms {
        // All steps of a goal are queued together: handed over again, nothing is added, so nothing can be too much.
        if goals::is_for(c, &new.digest, vm.as_str())? {
            continue;
        }
        if is_over {
            return Err(too_late());
        }
        added.extend(queue_for(c, new, vm, now_ms, max_queued)?);
    }
    tasks(c, &added)
}

/// Queues all steps of a goal for one VM.
fn queue_for(
    c: &Connection,
    new: &NewGoal,
    vm: &VmId,
    now_ms: i64,
    max: u32,
) -> Result<Vec<TaskId>, DeskError> {
    let queued = store::count_open(c, vm.as_str())?;
    let planned = plan(&new.goal, &new.digest, vm);
    if !rules::has_room(queued, planned.len(), max) {
        let vm = vm.clone();
        return Err(DeskError::Full { vm, queued, max });
    }
    store::write_begun(c, Some(vm.as_str()))?;
    let reason = match rules::is_held(new.goal.not_before.as_millisecond(), now_ms) {
        true => format!("held until {}", new.goal.not_before),
        false => String::new(),
    };
    for (step_no, t) in planned.iter().enumerate() {
        let task = NewTask {
            task_id: t.task_id,
            digest: new.digest,
            vm: vm.as_str(),
            step: &t.step_id,
            step_no: i64::try_from(step_no).unwrap_or(i64::MAX),
            attempt: t.attempt,
            idempotent: t.idempotent,
            continue_on_error: t.continue_on_error,
            output_cap: migrations::output_cap(&new.goal, &t.step_id),
            reason: &reason,
        };
        store::insert_task(c, &task, now_ms)?;
    }
    Ok(planned.into_iter().map(|t| t.task_id).collect())
}

/// Leases the next task of a VM.
pub fn hand_out(
    c: &Connection,
    vm: &str,
    now_ms: i64,
    wanted: &Wanted,
) -> Result<(Option<Handout>, Vec<Task>), DeskError> {
    let is_locked = store::locks::of(c, vm)?.is_some();
    let mut choice = Choice::new(now_ms, wanted.overtake, is_locked);
    let takes = |task: &Candidate| !wanted.held.contains(&task.digest) && choice.takes(task);
    let Some(next) = store::first_open(c, vm, &wanted.sent, takes)? else {
        return Ok((None, Vec::new()));
    };
    let changed = match rules::step(next.state, Event::HandedOut) {
        Step::To(_) => {
            store::write_begun(c, Some(vm))?;
            store::set_leased(c, &next.task_id)?;
            tasks(c, &[next.task_id])?
        }
        // A guest may ask for a task again and again.
        Step::Stays | Step::NotHandedOut => Vec::new(),
    };
    Ok((Some(next), changed))
}

/// The guest has begun a task. That is noted in memory only: see [`store`].
pub fn begun(c: &Connection, vm: &str, id: &TaskId, now_ms: i64) -> Result<Vec<Task>, DeskError> {
    let Some(row) = store::row(c, vm, id)? else {
        return Ok(Vec::new());
    };
    let is_news = match rules::step(row.state, Event::Begun) {
        Step::To(_) => store::note_begun(c, vm, id, now_ms)?,
        Step::Stays | Step::NotHandedOut => false,
    };
    match is_news {
        true => tasks(c, &[*id]),
        false => Ok(Vec::new()),
    }
}

/// Takes a report. Nothing changes if the task was terminal already.
pub fn report(
    c: &Connection,
    vm: &str,
    report: &Report,
    now_ms: i64,
) -> Result<Vec<Task>, DeskError> {
    let id = &report.task_id;
    let task = store::row(c, vm, id)?.ok_or(DeskError::Unknown)?;
    let state = match rules::step(task.state, Event::Reported(report.outcome)) {
        Step::To(state) => state,
        Step::Stays => return Ok(Vec::new()),
        Step::NotHandedOut => return Err(DeskError::NotLeased),
    };
    // Of this task the report says all that the note does.
    store::forget_begun(c, id)?;
    store::write_begun(c, Some(vm))?;
    report::write(c, report, state, task.output_cap, now_ms)?;
    let mut changed = vec![*id];
    let (idempotent, go_on) = (task.idempotent, task.continue_on_error);
    match rules::after(report.outcome, task.attempt, idempotent, go_on) {
        After::Again(attempt) => {
            let vm_id: VmId = vm.parse().map_err(|_| DeskError::Unknown)?;
            let next = NewTask {
                task_id: task_id(&task.digest, &vm_id, &task.step, attempt),
                digest: task.digest,
                vm,
                step: &task.step,
                step_no: task.step_no,
                attempt,
                idempotent,
                continue_on_error: go_on,
                output_cap: task.output_cap,
                reason: "",
            };
            store::insert_task(c, &next, now_ms)?;
            // Ahead of the one that ended: at no time is nothing open for whoever watches the goal.
            changed.insert(0, next.task_id);
        }
        After::SkipRest => {
            let rest = store::open_after(c, &task.digest, vm, task.step_no)?;
            let why = format!("step `{}` did not succeed", task.step);
            changed.extend(close(
                c,
                rest,
                |_| Event::EarlierFailed,
                Some(&why),
                now_ms,
            )?);
        }
        After::GoOn => {}
    }
    tasks(c, &changed)
}

/// Ends tasks that still wait after their goal's `not_after`, and those of which nothing was heard long after it. Returns
/// also when there is next something to do: one is due, or one that was held may begin.
pub fn expire(c: &Connection, now_ms: i64) -> Result<(Option<i64>, Vec<Task>), DeskError> {
    let open = store::open_of_past_goals(c, now_ms)?;
    let event = |not_after_ms| Event::Time {
        now_ms,
        not_after_ms,
    };
    let ended = close(c, open, event, None, now_ms)?;
    let due = |state| -> rusqlite::Result<Option<i64>> {
        let not_after_ms = store::first_not_after(c, state)?;
        Ok(not_after_ms.and_then(|at| rules::due(state, at)))
    };
    use adit_api::TaskState::{Leased, Queued, Started};
    let mut next = store::first_not_before(c, now_ms)?;
    for state in [Queued, Leased, Started] {
        next = next.into_iter().chain(due(state)?).min();
    }
    Ok((next, tasks(c, &ended)?))
}

/// Ends every open task of a VM that is removed.
pub fn remove_vm(c: &Connection, vm: &str, now_ms: i64) -> Result<Vec<Task>, DeskError> {
    let open = store::open_of_vm(c, vm)?;
    let why = Some("the VM was removed");
    let ended = close(c, open, |_| Event::VmRemoved, why, now_ms)?;
    tasks(c, &ended)
}

/// Has an event happen to open tasks, none of which a report ends. `why`: the reason that is shown; none: that of the state.
fn close(
    c: &Connection,
    open: Open,
    event: impl Fn(i64) -> Event,
    why: Option<&str>,
    now_ms: i64,
) -> Result<Vec<TaskId>, DeskError> {
    let mut ended = Vec::new();
    for (id, state, not_after_ms) in open {
        let Step::To(state) = rules::step(state, event(not_after_ms)) else {
            continue;
        };
        let why = why.unwrap_or_else(|| rules::why(state));
        store::close(c, &id, state, why, now_ms)?;
        ended.push(id);
    }
    Ok(ended)
}

fn tasks(c: &Connection, ids: &[TaskId]) -> Result<Vec<Task>, DeskError> {
    let task = |id| store::task(c, id)?.ok_or(DeskError::Unknown);
    ids.iter().map(task).collect()
}
