//! The executors: what a verified step may do to this guest, and what came of it. One file a kind.
//!
//! To add a kind: its file here, with `Executor` for the type that `adit_tasks::action` has for it; its line in `executor`;
//! and its switch in `config`.

pub mod capture;
pub mod cgroup;
pub mod file;
pub mod proc;
pub mod reap;
pub mod script;
pub mod tree;

use adit_tasks::wire::{Captured, Outcome};
use adit_tasks::{Action, KeyId};

use crate::config::Config;

/// What one kind of step does.
trait Executor {
    /// Does it.
    fn execute(&self, job: &Job<'_>) -> Executed;
}

/// What an executor is told besides its step.
pub struct Job<'a> {
    /// The task's id in hex.
    pub task: &'a str,
    /// The guest's configuration.
    pub config: &'a Config,
    /// Where scripts run.
    pub scripts: &'a script::Dirs,
}

/// Who executes a step: one line a kind.
fn executor(action: &Action) -> &dyn Executor {
    match action {
        Action::Script(script) => script,
        Action::File(file) => file,
    }
}

/// Does what a step says, unless this guest's owner has switched its kind off.
pub fn execute(action: &Action, job: &Job<'_>) -> Executed {
    let kind = action.kind();
    if job.config.enabled(kind) {
        return executor(action).execute(job);
    }
    let kind = kind.name();
    Executed::refused(format!(
        "policy: steps of kind `{kind}` are switched off in this guest ([{kind}] enabled = false)"
    ))
}

/// What came of one effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// Terminal state.
    pub outcome: Outcome,
    /// Exit status, 128+N for a signal; none if no process ran.
    pub exit: Option<i32>,
    /// Why, if the outcome is not `Done`; then, what else is to be said of it.
    pub reason: String,
    /// Standard output.
    pub stdout: Captured,
    /// Standard error.
    pub stderr: Captured,
}

impl Executed {
    /// It worked; `said` is shown as its output.
    pub fn done(said: String) -> Self {
        let stdout = Captured {
            total: said.len() as u64,
            head: said.into_bytes(),
            tail: Vec::new(),
        };
        Self {
            outcome: Outcome::Done,
            exit: None,
            reason: String::new(),
            stdout,
            stderr: Captured::default(),
        }
    }

    /// It was started, or should have been, and did not work.
    pub fn failed(reason: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Failed,
            reason: reason.into(),
            ..Self::done(String::new())
        }
    }

    /// Whoever ordered it was revoked while it ran, and what had not ended then was ended.
    pub fn cut_off(self, key: KeyId) -> Self {
        if self.outcome == Outcome::Done {
            return self;
        }
        let reason = format!(
            "revoked-key: the key {key}, which has ordered it, was revoked while it ran: {}",
            self.reason
        );
        Self { reason, ..self }
    }

    /// Policy of this guest says no; nothing was done. `reason` begins with a stable code.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self {
            outcome: Outcome::Refused,
            ..Self::failed(reason)
        }
    }
}

/// Held by every test that starts a process: to the executor under test, all processes below this one are its task's.
#[cfg(test)]
pub(crate) fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let guard = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    guard
}

#[cfg(test)]
mod tests {
    use adit_tasks::{Goal, Kind};
    use serde_json::json;

    use super::*;

    #[test]
    fn a_kind_that_is_switched_off_is_refused_and_does_nothing() {
        let _alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("made");
        let goal = json!({
            "goal_id": "01990000-0000-7000-8000-000000000001", "key_seq": 1, "audience": {"vms": ["web-1"]},
            "not_before": "2020-01-01T00:00:00Z", "not_after": "2120-01-01T00:00:00Z", "min_planner": 1,
            "steps": [
                {"id": "s", "script": {"interpreter": "/bin/sh", "script": "echo x >\"$1\"", "args": [made]}},
                {"id": "f", "file": {"path": made, "content": "x"}}
            ]
        });
        let goal = Goal::parse_unverified(goal.to_string().as_bytes()).unwrap();
        let kinds: Vec<_> = goal.steps.iter().map(|s| s.action.kind()).collect();
        assert_eq!(kinds, Kind::ALL, "each kind is tried here");
        for step in &goal.steps {
            let kind = step.action.kind().name();
            let text = format!("vm_id = \"web-1\"\n[{kind}]\nenabled = false\n");
            let config = Config::parse("/etc/a.toml".as_ref(), &text).unwrap();
            for &other in Kind::ALL {
                assert_eq!(config.enabled(other), other != step.action.kind());
            }
            let executed = execute(
                &step.action,
                &Job {
                    task: "00",
                    config: &config,
                    scripts: &script::Dirs {
                        cgroups: None,
                        dir: dir.path().into(),
                    },
                },
            );
            assert_eq!(executed.outcome, Outcome::Refused);
            assert!(
                executed.reason.starts_with("policy: "),
                "{}",
                executed.reason
            );
            assert!(!made.exists(), "{kind}");
        }
    }
}
