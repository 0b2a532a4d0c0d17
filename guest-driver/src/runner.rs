//! One task from frame to report: known? verified? journaled as accepted, as begun, run, journaled as ended.
//!
//! ```text
//! id known ──▶ its stored result, never a second run
//! not verified, journal unusable ──▶ refused, nothing was done, nothing is journaled
//! valid only later ──▶ not yet: nothing was done, nothing is journaled, and the client asks again when its time comes
//! else: received ▸ started ▸ effect ▸ result          (▸ = on disk before the next)
//! ```

use std::path::PathBuf;

use adit_tasks::goal::Work;
use adit_tasks::wire::{Outcome, Report, Started, Task, TaskId};
use adit_tasks::{Step, VmId, hex};

use crate::config::Config;
use crate::crash::{self, Point};
use crate::exec::file::FilePolicy;
use crate::exec::{Executed, cgroup, file, script, tree};
use crate::journal::{Journal, JournalError, Origin, Phase};
use crate::verify::{Denied, Verifier};
use crate::{clock, log};

/// What came of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handled {
    /// Its terminal state.
    Ended(Report),
    /// It may run from this time on, unix ms by the guest's clock.
    NotYet(u64),
}

/// Runs what it is told by those whom the image trusts.
pub struct Runner {
    verifier: Verifier,
    journal: Result<Journal, JournalError>,
    script_enabled: bool,
    file_enabled: bool,
    file_policy: FilePolicy,
    scripts: script::Place,
    boot_nonce: [u8; 16],
    /// A result that the journal could not take: delivered from memory while this process lives.
    unsaved: Option<Report>,
}

impl Runner {
    /// Takes up where an earlier agent ended: kills what it left running and reports it as interrupted.
    pub fn new(
        config: &Config,
        own_paths: Vec<PathBuf>,
        verifier: Verifier,
        journal: Result<Journal, JournalError>,
        boot_nonce: [u8; 16],
    ) -> Self {
        let mut runner = Self {
            verifier,
            journal,
            script_enabled: config.script.enabled,
            file_enabled: config.file.enabled,
            file_policy: FilePolicy {
                roots: config.file.roots.clone(),
                protected: own_paths,
            },
            scripts: script::Place {
                cgroups: cgroup::base(),
                dir: config.run_dir.clone(),
            },
            boot_nonce,
            unsaved: None,
        };
        if let Err(e) = runner.end_interrupted() {
            log::event("journal-failed", &[("error", &e)]);
            runner.journal = Err(e);
        }
        runner
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

    /// The id that this image was enrolled with.
    pub fn vm_id(&self) -> &VmId {
        self.verifier.vm_id()
    }

    /// How many keys are trusted.
    pub fn anchors(&self) -> u16 {
        self.verifier.anchors()
    }

    /// Reports that the host has not acknowledged, oldest first.
    pub fn unacknowledged(&mut self) -> Vec<Report> {
        let stored = self
            .journal
            .as_mut()
            .map_or(Ok(Vec::new()), |j| j.unacknowledged());
        let mut reports = stored.unwrap_or_else(|e| {
            log::event("journal-failed", &[("error", &e)]);
            Vec::new()
        });
        reports.extend(self.unsaved.clone());
        reports
    }

    /// The host has a result on disk.
    pub fn acknowledged(&mut self, id: &TaskId) {
        if self.unsaved.as_ref().is_some_and(|r| r.task_id == *id) {
            self.unsaved = None;
        }
        if let Ok(journal) = &mut self.journal
            && let Err(e) = journal.acked(id)
        {
            // It is sent again after a restart; the host keeps the first.
            log::event("journal-failed", &[("error", &e)]);
        }
    }

    /// Brings a task to its terminal state, or finds the one that it has. `announce` is called once it is on disk that
    /// it begins.
    pub fn handle(&mut self, task: &Task, announce: impl FnOnce(&Started)) -> Handled {
        let name = hex(&task.task_id);
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
        let executed = match step.work() {
            // Journaled as any end of a step: a goal may let the steps after it run.
            Some(Work::Script(_)) if !self.script_enabled => Executed::refused(
                "policy: scripts are switched off in this guest ([script] enabled = false)",
            ),
            Some(Work::File(_)) if !self.file_enabled => Executed::refused(
                "policy: files are switched off in this guest ([file] enabled = false)",
            ),
            Some(Work::Script(script)) => script::run(script, &name, &self.scripts),
            Some(Work::File(file)) => file::write(file, &self.file_policy),
            None => Executed::failed("the step says nothing that this agent can do"),
        };
        let report = report(task.task_id, executed, started_ms, self.boot_nonce);
        if let Ok(journal) = &mut self.journal
            && let Err(e) = journal.result(&report)
        {
            log::event("journal-failed", &[("error", &e)]);
            self.unsaved = Some(report.clone());
        }
        // Whoever reads this may cut the power: the result is on the disk.
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

    /// The terminal state of a task that was begun before.
    fn known(&mut self, id: &TaskId) -> Option<Report> {
        if let Some(report) = self.unsaved.as_ref().filter(|r| r.task_id == *id) {
            return Some(report.clone());
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
                let executed = Executed::failed("begun before; its result could not be stored");
                let executed = Executed {
                    outcome: Outcome::Interrupted,
                    ..executed
                };
                Some(report(*id, executed, at_ms, self.boot_nonce))
            }
        }
    }

    /// Verifies a task and takes it up to `started`.
    fn accept(&mut self, task: &Task) -> Result<Step, Denied> {
        if self.verifier.anchors() == 0 {
            return Err(self.verifier.why_no_anchor().into());
        }
        let journal = self.journal.as_mut().map_err(|e| e.to_string())?;
        let admitted = self.verifier.verify(task, journal, self.unsaved.as_ref())?;
        let origin = Origin {
            key: admitted.key.0.into(),
            seq: admitted.last.key_seq,
            digest: admitted.last.digest,
        };
        crash::at(Point::Received);
        journal
            .received(&task.task_id, &origin)
            .map_err(|e| e.to_string())?;
        crash::at(Point::Stored);
        journal
            .started(&task.task_id, clock::now_ms())
            .map_err(|e| e.to_string())?;
        Ok(admitted.step)
    }
}

fn report(task_id: TaskId, executed: Executed, started_ms: u64, boot_nonce: [u8; 16]) -> Report {
    let Executed {
        outcome,
        exit,
        mut reason,
        stdout,
        stderr,
    } = executed;
    if outcome == Outcome::Done {
        reason.clear();
    }
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
