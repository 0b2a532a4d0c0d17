//! The executors: what a verified step may do to this guest, and what came of it.

pub mod capture;
pub mod cgroup;
pub mod file;
pub mod proc;
pub mod reap;
pub mod script;
pub mod tree;

use adit_tasks::wire::{Captured, Outcome};

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
