//! One task from frame to report: known? verified? journaled as accepted, as started, run, journaled as ended.
//!
//! ```text
//! id known ──▶ its stored result, never a second run
//! not verified, journal unusable, disk full ──▶ refused: nothing has run
//! valid only later ──▶ not yet: nothing has run, and the client asks again when its time comes
//! else: received ▸ started ▸ effect ▸ result          (▸ = on disk before the next)
//!                          ▸ refused by configuration or policy: nothing has run, and that is the result
//! ```
//! A result that the journal cannot take although space was held for it is *unsaved*: the report says so, it is delivered
//! from memory, and no other task starts before it is written.

use std::mem;
use std::sync::Arc;

use adit_tasks::wire::{Outcome, Report, Started, Task, TaskId};
use adit_tasks::{Step, hex};

use crate::crash::{self, Point};
use crate::exec::{self, Executed, Job, cgroup, script, tree};
use crate::journal::{self, Journal, JournalError, Kept, Origin, Phase};
use crate::live::Live;
use crate::verify::{Denied, verify};
use crate::{clock, log};

/// The result of handing a task to the runner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handled {
    /// Its terminal state.
    Ended(Report),
    /// It may run from this time on, unix ms by the guest's clock.
    NotYet(u64),
}

/// Runs what those whom the image trusts have ordered.
pub struct Runner {
    live: Arc<Live>,
    journal: Result<Journal, JournalError>,
    scripts: script::Dirs,
    boot_nonce: [u8; 16],
    unsaved: Option<Unsaved>,
    /// What was last logged of a journal that could not be opened.
    journal_failed: Option<String>,
}

/// A result that the journal could not take: delivered from memory while this process lives.
struct Unsaved {
    report: Report,
    /// The host has it.
    acked: bool,
}

impl Runner {
    /// Continues where an earlier agent ended: kills what it left running and reports it as interrupted.
    pub fn new(live: Arc<Live>, boot_nonce: [u8; 16]) -> Self {
        let scripts = script::Dirs {
            cgroups: cgroup::base(),
            dir: live.config().run_dir.clone(),
        };
        let mut runner = Self {
            live,
            journal: Err(JournalError::Unavailable("not open yet".into())),
            scripts,
            boot_nonce,
            unsaved: None,
            journal_failed: None,
        };
        runner.open_journal();
        runner
    }

    fn open_journal(&mut self) {
        self.journal = journal::open_checked(&self.live.config().state_dir);
        if let Err(e) = self.end_interrupted() {
            self.journal = Err(e);
        }
        let failed = self.journal.as_ref().err().map(ToString::to_string);
        // It is tried again for each task: one line for as long as the error is the same.
        if mem::replace(&mut self.journal_failed, failed.clone()) == failed {
            return;
        }
        if let Err(e) = &self.journal {
            let remedy = e.remedy(&self.live.config().state_dir);
            log::event(
                "journal-failed",
                &[
                    ("error", e),
                    ("effect", &"every task is refused; ports are served"),
                    ("do", &remedy),
                ],
            );
        }
    }

    /// Why the journal takes no task, and what to do. For people.
    pub fn journal_fault(&self) -> Option<String> {
        let error = self.journal.as_ref().err()?;
        let remedy = error.remedy(&self.live.config().state_dir);
        Some(format!("{error}; no task runs: {remedy}"))
    }

    /// Opens the journal if it could not be opened before: the cause may be gone by now.
    fn open_journal_again(&mut self) {
        if matches!(
            self.journal,
            Err(JournalError::NoSpace(_) | JournalError::Unavailable(_))
        ) {
            self.open_journal();
        }
    }

    /// Closes the journal, for another program. It is opened again for the next task, if this one stays.
    pub fn close(&mut self) {
        let why = "closed for another agent".into();
        self.journal = Err(JournalError::Unavailable(why));
    }

    fn end_interrupted(&mut self) -> Result<(), JournalError> {
        let Ok(journal) = &mut self.journal else {
            return Ok(());
        };
        for (id, started_ms) in journal.unfinished()? {
            let name = hex(&id);
            let dead = tree::kill_orphans(&name, self.scripts.cgroups.as_deref());
            let mut reason = "the agent or the guest ended while it ran".to_owned();
            if !dead {
                reason.push_str("; some of its processes could not be killed");
            }
            log::event("interrupted", &[("task", &name)]);
            let interrupted = Executed {
                outcome: Outcome::Interrupted,
                ..Executed::failed(reason)
            };
            journal.result(&report(id, interrupted, started_ms, self.boot_nonce))?;
        }
        Ok(())
    }

    /// Reports that the host has not acknowledged, oldest first.
    pub fn unacknowledged(&mut self) -> Vec<Report> {
        self.open_journal_again();
        let stored = self
            .journal
            .as_mut()
            .map_or(Ok(Vec::new()), |j| j.unacknowledged());
        let mut reports = stored.unwrap_or_else(|e| {
            log::event("journal-failed", &[("error", &e)]);
            Vec::new()
        });
        let unsaved = self.unsaved.iter().filter(|u| !u.acked);
        reports.extend(unsaved.map(|u| u.report.clone()));
        reports
    }

    /// The host has a result on disk.
    pub fn acknowledged(&mut self, id: &TaskId) {
        let unsaved = self.unsaved.as_mut().filter(|u| u.report.task_id == *id);
        let acked = match (unsaved, &mut self.journal) {
            (Some(unsaved), _) => {
                unsaved.acked = true;
                self.save()
            }
            (None, Ok(journal)) => journal.acked(id),
            (None, Err(_)) => Ok(()),
        };
        if let Err(e) = acked {
            // It is sent again after a restart; the host keeps the first.
            log::event("journal-failed", &[("error", &e)]);
        }
    }

    /// Writes the result that the journal could not take before, if there is one.
    fn save(&mut self) -> Result<(), JournalError> {
        let (Some(unsaved), Ok(journal)) = (&self.unsaved, &mut self.journal) else {
            return Ok(());
        };
        journal.result(&unsaved.report)?;
        if unsaved.acked {
            journal.acked(&unsaved.report.task_id)?;
        }
        self.unsaved = None;
        Ok(())
    }

    /// Brings a task to its terminal state, or finds the one that it has. `announce` is called once the task is on disk as
    /// started.
    pub fn handle(&mut self, task: &Task, announce: impl FnOnce(&Started)) -> Handled {
        let name = hex(&task.task_id);
        // Before it is looked up: one that has run must not be refused as if it had not.
        self.open_journal_again();
        if let Some(known) = self.known(&task.task_id) {
            log::event(
                "known",
                &[
                    ("task", &name),
                    ("outcome", &format!("{:?}", known.outcome)),
                ],
            );
            return Handled::Ended(known);
        }
        let step = match self.accept(task) {
            Ok(step) => step,
            Err(Denied::Refused(why)) => {
                self.live.ran();
                log::event("refused", &[("task", &name), ("why", &why)]);
                let refused = Executed::refused(why);
                return Handled::Ended(report(task.task_id, refused, 0, self.boot_nonce));
            }
            Err(Denied::NotYet {
                not_before_ms,
                text,
            }) => {
                log::event("held", &[("task", &name), ("why", &text)]);
                return Handled::NotYet(not_before_ms);
            }
        };
        crash::at(Point::Started);
        let started_ms = clock::now_ms();
        // One state of both for the whole task, whatever is reloaded meanwhile.
        let (config, policy) = (self.live.config(), self.live.policy());
        let executed = match exec::permit(&step.action, &config, &policy) {
            // Journaled as any end of a step: a goal may let the steps after it run.
            Err(why) => Executed::refused(why),
            Ok(permit) => {
                log::event(
                    "started",
                    &[
                        ("task", &name),
                        ("step", &task.step_id),
                        ("attempt", &task.attempt),
                    ],
                );
                announce(&Started {
                    task_id: task.task_id,
                });
                let job = Job {
                    task: &name,
                    config: &config,
                    scripts: &self.scripts,
                    permit,
                };
                exec::execute(&step.action, &job)
            }
        };
        let executed = match self.live.ran() {
            Some(key) => executed.cut_off(key),
            None => executed,
        };
        let mut report = report(task.task_id, executed, started_ms, self.boot_nonce);
        self.store(&mut report);
        // Logged only now, when the result is on disk: a test may cut the power at this line.
        log::event(
            "ended",
            &[
                ("task", &name),
                ("outcome", &format!("{:?}", report.outcome)),
                ("why", &report.reason),
            ],
        );
        crash::at(Point::ResultStored);
        Handled::Ended(report)
    }

    /// Has the journal take a result; marks the report if it cannot.
    fn store(&mut self, report: &mut Report) {
        let Ok(journal) = &mut self.journal else {
            return;
        };
        let error = match journal.result(report) {
            Ok(Kept::Whole) => return,
            Ok(Kept::WithoutOutput) => {
                return log::event(
                    "output-dropped",
                    &[
                        ("task", &hex(&report.task_id)),
                        (
                            "why",
                            &"guest disk full: the journal has the result without its output",
                        ),
                    ],
                );
            }
            Err(e) => e,
        };
        log::event("journal-failed", &[("error", &error)]);
        let why = match error {
            JournalError::NoSpace(_) => {
                "guest disk full: this result could not be written to the guest's journal".into()
            }
            e => format!("this result could not be written to the guest's journal: {e}"),
        };
        remark(&mut report.reason, &why);
        self.unsaved = Some(Unsaved {
            report: report.clone(),
            acked: false,
        });
    }

    /// The terminal state of a task that was started before.
    fn known(&mut self, id: &TaskId) -> Option<Report> {
        if let Some(unsaved) = self.unsaved.as_ref().filter(|u| u.report.task_id == *id) {
            return Some(unsaved.report.clone());
        }
        match self.journal.as_mut().ok()?.phase(id).ok()?? {
            Phase::Received => None,
            Phase::Result(report) => Some(*report),
            Phase::Acked(outcome) => {
                let executed = Executed {
                    outcome,
                    ..Executed::failed("acknowledged before; its output is gone")
                };
                Some(report(*id, executed, 0, self.boot_nonce))
            }
            Phase::Started { at_ms } => {
                let executed = Executed::failed("started before; its result could not be stored");
                let executed = Executed {
                    outcome: Outcome::Interrupted,
                    ..executed
                };
                Some(report(*id, executed, at_ms, self.boot_nonce))
            }
        }
    }

    /// Verifies a task and records it up to `started`.
    fn accept(&mut self, task: &Task) -> Result<Step, Denied> {
        let anchors = self.live.anchors();
        if anchors.keys.knows_nobody() {
            return Err(anchors.why_none().into());
        }
        let me = self.live.me(&anchors)?;
        self.save().map_err(|e| e.to_string())?;
        let journal = self.journal.as_mut().map_err(|e| e.to_string())?;
        let unsaved = self.unsaved.as_ref().map(|u| &u.report);
        let now_ms = clock::unix_ms();
        let admitted = verify(task, &anchors.keys, &me, now_ms, journal, unsaved)?;
        self.live.runs(&hex(&task.task_id), admitted.key)?;
        let origin = Origin {
            key: admitted.key.0.into(),
            seq: admitted.goal.key_seq,
            digest: admitted.goal.digest,
        };
        crash::at(Point::Received);
        let not_started = |e: JournalError| format!("{e}; the task was not started");
        journal
            .received(&task.task_id, &origin)
            .map_err(not_started)?;
        crash::at(Point::Stored);
        journal
            .started(&task.task_id, clock::now_ms())
            .map_err(not_started)?;
        Ok(admitted.step)
    }
}

/// Adds a remark to the reason of a report, which may be empty.
pub(crate) fn remark(reason: &mut String, text: &str) {
    if !reason.is_empty() {
        reason.push_str("; ");
    }
    reason.push_str(text);
}

fn report(task_id: TaskId, executed: Executed, started_ms: u64, boot_nonce: [u8; 16]) -> Report {
    let Executed {
        outcome,
        exit,
        reason,
        stdout,
        stderr,
    } = executed;
    Report {
        task_id,
        outcome,
        exit,
        reason,
        started_ms,
        ended_ms: clock::now_ms(),
        stdout,
        stderr,
        boot_nonce,
    }
}
