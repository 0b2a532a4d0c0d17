//! Whether anything new goes to a VM: its operator may lock it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use adit_api::VmLock;

use super::Changes;

/// Why a VM is locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    /// In the words of whoever locked it; may be empty.
    pub reason: String,
    /// Who that was.
    pub by: String,
    /// Unix time in ms; since when.
    pub since_ms: i64,
}

/// A VM's lock, as the database has it.
#[derive(Debug)]
pub struct Lock {
    /// Every dial looks at this.
    is_on: AtomicBool,
    locked: RwLock<Option<Arc<Locked>>>,
    changes: Changes,
}

impl Lock {
    pub(super) fn new(changes: Changes) -> Self {
        Self {
            is_on: AtomicBool::new(false),
            locked: RwLock::default(),
            changes,
        }
    }

    /// Whether it is locked.
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Acquire)
    }

    /// Why it is; none: it is open.
    pub fn locked(&self) -> Option<Arc<Locked>> {
        let locked = self.locked.read().unwrap_or_else(PoisonError::into_inner);
        locked.clone()
    }

    /// Notes what the database has.
    pub fn set(&self, locked: Option<Locked>) {
        let mut now = self.locked.write().unwrap_or_else(PoisonError::into_inner);
        self.is_on.store(locked.is_some(), Ordering::Release);
        *now = locked.map(Arc::new);
        drop(now);
        self.changes.note();
    }
}

impl Locked {
    /// As the API shows it.
    pub fn show(&self) -> VmLock {
        VmLock {
            reason: self.reason.clone(),
            by: self.by.clone(),
            since: crate::desk::rfc3339(self.since_ms),
        }
    }
}
