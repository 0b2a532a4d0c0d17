//! Session processes of the service `exec` that this agent has started: they descend from it, and no task has started them.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::cgroup::Cgroup;
use super::proc::{self, ProcId};
use super::tree::KILL_LIMIT;

/// Prefix of a session's cgroup, behind that of all tasks.
pub const CGROUP: &str = "exec-";

/// So many are started before the first look.
const FEW: usize = 32;

static STARTED: Mutex<Vec<ProcId>> = Mutex::new(Vec::new());

fn started_ones() -> MutexGuard<'static, Vec<ProcId>> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One was started. Those that have ended are forgotten, now and then: each is looked for.
pub fn started(pid: i32) {
    let mut all = started_ones();
    if all.len() == all.capacity() {
        all.retain(|id| proc::read(id.pid).is_some_and(|p| p.id == *id && !p.zombie));
        let room = all.len().max(FEW);
        all.reserve(room);
    }
    all.extend(proc::read(pid).map(|p| p.id));
}

/// Whether any of these is one.
pub fn has_any(mut ids: impl Iterator<Item = ProcId>) -> bool {
    let all = started_ones();
    !all.is_empty() && ids.any(|id| all.contains(&id))
}

/// Ends what a session has left whose process was killed: its command has died with it, and whatever that had started is in the cgroup.
pub fn end_left(base: &Path, id: &str) {
    if let Some(cgroup) = Cgroup::find(base, &format!("{CGROUP}{id}")) {
        cgroup.kill(Instant::now() + KILL_LIMIT);
        cgroup.release();
    }
}
