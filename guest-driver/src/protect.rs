//! What the agent sets for itself at its start and its tasks must not have: more descriptors, a lower score for the OOM
//! killer, no core dumps.
//!
//! The agent sets them itself, whatever started it: what a service manager sets (a filter of system calls, a bounding set, a
//! limit) every child inherits and may be unable to undo. The values from before are kept, and each child gets them back
//! between fork and exec.

use std::fs;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// The OOM killer ends the guest's services before the agent: through it the host sees why memory was short.
const OOM_SCORE: i32 = -500;
/// A process's score for the OOM killer.
const OOM_FILE: &str = "/proc/self/oom_score_adj";

/// What the agent inherited and changed, for its children.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inherited {
    /// Limits that were changed: which, soft, hard.
    pub limits: Vec<(Resource, rlim_t, rlim_t)>,
    /// The text for the child's own score file, if ours was changed.
    pub oom_score: Option<String>,
}

static INHERITED: OnceLock<Inherited> = OnceLock::new();

/// Sets what can be set. The agent runs without the rest.
pub fn apply() {
    INHERITED.get_or_init(|| {
        let mut inherited = Inherited::default();
        // A tunnel has two descriptors. The usual soft limit of 1024 is for programs with `select`.
        change(&mut inherited, Resource::RLIMIT_NOFILE, |_, hard| hard);
        // A core dump of the agent would have the data of tunnels in it.
        change(&mut inherited, Resource::RLIMIT_CORE, |_, _| 0);
        let had = fs::read_to_string(OOM_FILE).unwrap_or_default();
        if let Ok(had) = had.trim().parse::<i32>() {
            let took = fs::write(OOM_FILE, OOM_SCORE.to_string()).is_ok();
            // Nor does a task keep the protection that a service manager gave the agent.
            inherited.oom_score = (took || had < 0).then(|| had.max(0).to_string());
        }
        inherited
    });
}

/// Gives back what was inherited, for a program that this process becomes: it is to find what this one has found.
pub fn undo() {
    let inherited = inherited();
    if let Some(score) = &inherited.oom_score {
        let _ = fs::write(OOM_FILE, score);
    }
    for &(which, soft, hard) in &inherited.limits {
        let _ = setrlimit(which, soft, hard);
    }
}

/// Sets it again, where this process stays what it is.
pub fn redo() {
    let inherited = inherited();
    for &(which, _, hard) in &inherited.limits {
        let soft = match which {
            Resource::RLIMIT_CORE => 0,
            _ => hard,
        };
        let _ = setrlimit(which, soft, hard);
    }
    if inherited.oom_score.is_some() {
        let _ = fs::write(OOM_FILE, OOM_SCORE.to_string());
    }
}

/// What a child gets back; nothing if nothing was changed.
pub fn inherited() -> Inherited {
    INHERITED.get().cloned().unwrap_or_default()
}

fn change(inherited: &mut Inherited, which: Resource, to: impl Fn(rlim_t, rlim_t) -> rlim_t) {
    if let Ok((soft, hard)) = getrlimit(which)
        && setrlimit(which, to(soft, hard), hard).is_ok()
    {
        inherited.limits.push((which, soft, hard));
    }
}
