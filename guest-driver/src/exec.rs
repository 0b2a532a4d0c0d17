//! The executors: what a verified step may do to this guest, and what came of it. One file a kind.
//!
//! To add a kind: its file here, with `Executor` for the type that `adit_tasks::action` has for it; its line in `executor`;
//! and its switch in `config`. What it says that it touches is what the guest's policy decides on.

pub mod capture;
pub mod cgroup;
pub mod file;
pub mod proc;
pub mod reap;
pub mod script;
pub mod sessions;
pub mod tree;

use adit_tasks::wire::{Captured, Outcome};
use adit_tasks::{Action, KeyId};

use crate::config::Config;
use crate::policy::{Standing, Touches};

/// What one kind of step does.
trait Executor {
    /// Whom it runs as and what it writes.
    fn touches(&self) -> Touches<'_>;

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
    /// That this guest's owner allows it.
    pub permit: Permit,
}

/// This guest's owner allows a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permit {
    /// The policy's root that a file must be below, besides one of the configuration's.
    root: Option<String>,
}

/// Who executes a step: one line a kind.
fn executor(action: &Action) -> &dyn Executor {
    match action {
        Action::Script(script) => script,
        Action::File(file) => file,
    }
}

/// Asks this guest's owner about a step: the configuration, and the policy if there is one. Both must allow it.
///
/// # Errors
/// One does not: a reason for a report, with its code.
pub fn permit(action: &Action, config: &Config, policy: &Standing) -> Result<Permit, String> {
    if let Some(off) = config.switched_off(action.kind().name()) {
        return Err(format!("policy: {off}"));
    }
    let root = policy.step(executor(action).touches());
    let root = root.map_err(|said| format!("policy: {said}"))?;
    Ok(Permit { root })
}

/// Does what a step says.
pub fn execute(action: &Action, job: &Job<'_>) -> Executed {
    executor(action).execute(job)
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

    /// This guest's owner says no; nothing was done. `reason` begins with a stable code.
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
    fn a_kind_that_is_switched_off_is_refused() {
        let made = "/tmp/made";
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
            let refused = permit(&step.action, &config, &Standing::default()).unwrap_err();
            assert!(refused.starts_with("policy: "), "{refused}");
            assert!(refused.contains(kind), "{refused}");
        }
    }
}
