//! What the store does, over a map: as plain as it can be said.

use std::collections::{BTreeMap, BTreeSet};

use adit_api::TaskState;
use adit_tasks::task_id;
use adit_tasks::wire::{Outcome, TaskId};

use crate::desk::NewGoal;
use crate::desk::rules::{self, After, Candidate, Choice, Event, Step};

/// Tasks that changed, with their new states.
pub(in crate::desk) type Said = Vec<(TaskId, TaskState)>;

/// A host's tasks: the model's, or the database's.
pub(in crate::desk) trait Books {
    fn add_goal(&mut self, new: &NewGoal, now: i64) -> Said;
    fn hand_out(&mut self, vm: &str, now: i64, overtake: bool) -> (Option<TaskId>, Said);
    fn begun(&mut self, vm: &str, id: TaskId, now: i64) -> Said;
    /// None: the task was not handed out to this VM.
    fn report(&mut self, vm: &str, id: TaskId, outcome: Outcome, now: i64) -> Option<Said>;
    fn expire(&mut self, now: i64) -> (Option<i64>, Said);
    fn remove_vm(&mut self, vm: &str, now: i64) -> Said;
    /// aditd is killed and started: what was only in memory is gone.
    fn killed(&mut self);
    fn states(&mut self) -> BTreeMap<TaskId, TaskState>;
}

#[derive(Clone, Debug)]
struct Row {
    vm: String,
    step: String,
    step_no: usize,
    attempt: u32,
    idempotent: bool,
    continue_on_error: bool,
    task: Candidate,
}

/// A fault to plant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::desk) enum Fault {
    /// What is said to have begun stays as it is in every list.
    HidesBegun,
    /// A failed step skips nothing.
    SkipsNothing,
    /// Held goals are handed out.
    HoldsNothing,
    /// A held goal does not hold later ones of its key for a guest that needs it.
    Overtakes,
    /// A second report counts.
    ReportsAgain,
    /// The steps of a goal are offered in the wrong order.
    Backwards,
    /// What is due is forgotten.
    NeverDue,
}

impl Fault {
    pub(in crate::desk) const ALL: [Self; 7] = [
        Self::HidesBegun,
        Self::SkipsNothing,
        Self::HoldsNothing,
        Self::Overtakes,
        Self::ReportsAgain,
        Self::Backwards,
        Self::NeverDue,
    ];
}

#[derive(Clone, Debug, Default)]
pub(in crate::desk) struct Model {
    rows: BTreeMap<TaskId, Row>,
    begun: BTreeSet<TaskId>,
    fault: Option<Fault>,
}

impl Model {
    pub(in crate::desk) fn with(fault: Fault) -> Self {
        Self {
            fault: Some(fault),
            ..Self::default()
        }
    }

    fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// Writes which tasks of the VM have begun.
    fn write_begun(&mut self, vm: &str) {
        for (id, row) in self.rows.iter_mut().filter(|(_, row)| row.vm == vm) {
            if self.begun.remove(id) && row.task.state == TaskState::Leased {
                row.task.state = TaskState::Started;
            }
        }
    }

    fn happen(&mut self, ids: Vec<TaskId>, event: impl Fn(&Candidate) -> Event) -> Said {
        let mut said = Vec::new();
        for id in ids {
            let task = &mut self.rows.get_mut(&id).unwrap().task;
            if let Step::To(state) = rules::step(task.state, event(task)) {
                task.state = state;
                self.begun.remove(&id);
                said.push((id, state));
            }
        }
        said
    }

    fn ids(&self, of: impl Fn(&Row) -> bool) -> Vec<TaskId> {
        let rows = self.rows.iter().filter(|(_, row)| of(row));
        rows.map(|(id, _)| *id).collect()
    }
}

impl Books for Model {
    fn add_goal(&mut self, new: &NewGoal, now: i64) -> Said {
        let mut said = Vec::new();
        if rules::is_over(new.goal.not_after.as_millisecond(), now) {
            return said;
        }
        for vm in &new.vms {
            let known = self.ids(|row| row.task.digest == new.digest && row.vm == vm.as_str());
            if !known.is_empty() {
                continue;
            }
            self.write_begun(vm.as_str());
            for (step_no, step) in new.goal.steps.iter().enumerate() {
                let row = Row {
                    vm: vm.to_string(),
                    step: step.id.clone(),
                    step_no,
                    attempt: 1,
                    idempotent: step.idempotent,
                    continue_on_error: step.continue_on_error,
                    task: Candidate {
                        digest: new.digest,
                        signer: new.signer.clone(),
                        key_seq: new.goal.key_seq as i64,
                        state: TaskState::Queued,
                        not_before_ms: new.goal.not_before.as_millisecond(),
                        not_after_ms: new.goal.not_after.as_millisecond(),
                    },
                };
                let id = task_id(&new.digest, vm, &step.id, 1);
                self.rows.insert(id, row);
                said.push((id, TaskState::Queued));
            }
        }
        said
    }

    fn hand_out(&mut self, vm: &str, now: i64, overtake: bool) -> (Option<TaskId>, Said) {
        let mut ids = self.ids(|row| row.vm == vm && !row.task.state.is_terminal());
        let backwards = self.has(Fault::Backwards);
        ids.sort_by_key(|id| {
            let row = &self.rows[id];
            let step_no = match backwards {
                true => usize::MAX - row.step_no,
                false => row.step_no,
            };
            (row.task.key_seq, row.task.digest, step_no, row.attempt)
        });
        let holds_nothing = self.has(Fault::HoldsNothing);
        let mut choice = Choice::new(now, overtake || self.has(Fault::Overtakes), false);
        let next = ids.into_iter().find(|id| {
            let mut task = self.rows[id].task.clone();
            if holds_nothing {
                task.not_before_ms = 0;
            }
            choice.takes(&task)
        });
        let Some(id) = next else {
            return (None, Vec::new());
        };
        if self.rows[&id].task.state != TaskState::Queued {
            return (Some(id), Vec::new());
        }
        self.write_begun(vm);
        (Some(id), self.happen(vec![id], |_| Event::HandedOut))
    }

    fn begun(&mut self, vm: &str, id: TaskId, _: i64) -> Said {
        let row = self.rows.get(&id).filter(|row| row.vm == vm);
        let state = row.map(|row| rules::step(row.task.state, Event::Begun));
        match state {
            Some(Step::To(state)) if self.begun.insert(id) => vec![(id, state)],
            _ => Vec::new(),
        }
    }

    fn report(&mut self, vm: &str, id: TaskId, outcome: Outcome, _: i64) -> Option<Said> {
        let row = self.rows.get(&id).filter(|row| row.vm == vm)?.clone();
        let event = Event::Reported(outcome);
        let state = match rules::step(row.task.state, event) {
            Step::NotHandedOut => return None,
            Step::Stays if self.has(Fault::ReportsAgain) => outcome.into(),
            Step::Stays => return Some(Vec::new()),
            Step::To(state) => state,
        };
        self.begun.remove(&id);
        self.write_begun(vm);
        self.rows.get_mut(&id).unwrap().task.state = state;
        let mut said = vec![(id, state)];
        let (attempt, idempotent, go_on) = (row.attempt, row.idempotent, row.continue_on_error);
        match rules::after(outcome, attempt, idempotent, go_on) {
            After::Again(attempt) => {
                let vm = vm.parse().unwrap();
                let next = task_id(&row.task.digest, &vm, &row.step, attempt);
                let mut row = Row { attempt, ..row };
                row.task.state = TaskState::Queued;
                self.rows.insert(next, row);
                said.push((next, TaskState::Queued));
            }
            After::SkipRest if !self.has(Fault::SkipsNothing) => {
                let rest = self.ids(|r| {
                    r.vm == vm && r.task.digest == row.task.digest && r.step_no > row.step_no
                });
                said.extend(self.happen(rest, |_| Event::EarlierFailed));
            }
            After::SkipRest | After::GoOn => {}
        }
        Some(said)
    }

    fn expire(&mut self, now_ms: i64) -> (Option<i64>, Said) {
        let ids = self.ids(|_| true);
        let said = self.happen(ids, |task| Event::Time {
            now_ms,
            not_after_ms: task.not_after_ms,
        });
        let rows = self.rows.values().map(|row| &row.task);
        let due = rows
            .clone()
            .filter_map(|t| rules::due(t.state, t.not_after_ms));
        let held = rows.filter(|t| t.state == TaskState::Queued && t.not_before_ms > now_ms);
        let next = due.chain(held.map(|t| t.not_before_ms)).min();
        (next.filter(|_| !self.has(Fault::NeverDue)), said)
    }

    fn remove_vm(&mut self, vm: &str, _: i64) -> Said {
        let ids = self.ids(|row| row.vm == vm);
        self.happen(ids, |_| Event::VmRemoved)
    }

    fn killed(&mut self) {
        self.begun.clear();
    }

    fn states(&mut self) -> BTreeMap<TaskId, TaskState> {
        let hides = self.has(Fault::HidesBegun);
        let rows = self.rows.iter().map(|(id, row)| {
            let begun = row.task.state == TaskState::Leased && self.begun.contains(id);
            let state = match begun && !hides {
                true => TaskState::Started,
                false => row.task.state,
            };
            (*id, state)
        });
        rows.collect()
    }
}
