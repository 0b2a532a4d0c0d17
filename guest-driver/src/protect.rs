//! What the agent takes for itself at its start and its tasks must not have: more descriptors, a place behind the others
//! when memory is short, no core dumps.
//!
//! It takes them by itself, whatever started it: a directive of a service manager (a filter of system calls, a bounding
//! set, a limit) passes on to every child and could not be given back. What was there before is kept, and each child gets
//! that again between fork and exec.

use std::fs;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// The agent ends after the guest's services: it is how the host sees why memory was short.
const OOM_SCORE: i32 = -500;
/// Where a process has its score.
const OOM_FILE: &str = "/proc/self/oom_score_adj";

/// What the agent found at its start, for its children.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Before {
    /// Limits that were changed: which, soft, hard.
    pub limits: Vec<(Resource, rlim_t, rlim_t)>,
    /// The text for the child's own score file, if ours was changed.
    pub oom_score: Option<String>,
}

static BEFORE: OnceLock<Before> = OnceLock::new();

/// Takes what can be had. What cannot is not taken, and the agent runs without.
pub fn take() {
    BEFORE.get_or_init(|| {
        let mut before = Before::default();
        // Two descriptors a tunnel; the soft limit is what programs with `select` need, and that is 1024.
        change(&mut before, Resource::RLIMIT_NOFILE, |_, hard| hard);
        // A core of the agent would hold what passed through it.
        change(&mut before, Resource::RLIMIT_CORE, |_, _| 0);
        let had = fs::read_to_string(OOM_FILE).unwrap_or_default();
        if let Ok(had) = had.trim().parse::<i32>() {
            let took = fs::write(OOM_FILE, OOM_SCORE.to_string()).is_ok();
            // Protection that a service manager gave the agent is no more a task's than our own.
            before.oom_score = (took || had < 0).then(|| had.max(0).to_string());
        }
        before
    });
}

/// What a child is given back; nothing if nothing was taken.
pub fn before() -> Before {
    BEFORE.get().cloned().unwrap_or_default()
}

fn change(before: &mut Before, which: Resource, to: impl Fn(rlim_t, rlim_t) -> rlim_t) {
    if let Ok((soft, hard)) = getrlimit(which)
        && setrlimit(which, to(soft, hard), hard).is_ok()
    {
        before.limits.push((which, soft, hard));
    }
}
