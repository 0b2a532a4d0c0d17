//! VMs to which nothing new goes. What is on disk is in force when it is answered, for dials too.

use std::sync::Arc;

use adit_names::VmId;

use super::{Desk, DeskError, store};
use crate::vm::{Locked, VmEntry};

impl Desk {
    /// Locks a VM, or gives its lock another reason.
    ///
    /// # Errors
    /// The database fails.
    pub async fn lock_vm(&self, vm: &Arc<VmEntry>, locked: Locked) -> Result<(), DeskError> {
        let (name, entry) = (vm.name.clone(), vm.clone());
        let write = move |c: &_| {
            store::locks::put(c, name.as_str(), &locked)?;
            Ok::<_, DeskError>(locked)
        };
        let then = move |locked: &Locked| entry.lock.set(Some(locked.clone()));
        self.db.run_then(write, then).await.map(drop)
    }

    /// Opens a VM. Returns whether it was locked.
    ///
    /// # Errors
    /// The database fails.
    pub async fn unlock_vm(&self, vm: &Arc<VmEntry>) -> Result<bool, DeskError> {
        let (name, entry) = (vm.name.clone(), vm.clone());
        let write = move |c: &_| Ok::<_, DeskError>(store::locks::delete(c, name.as_str())?);
        let then = move |_: &bool| {
            entry.lock.set(None);
            // Whoever waits for a task looks again.
            entry.queued.notify_waiters();
        };
        self.db.run_then(write, then).await
    }

    /// How many tasks the guest of a VM has.
    ///
    /// # Errors
    /// The database fails.
    pub async fn leased(&self, vm: &VmId) -> Result<u32, DeskError> {
        let name = vm.clone();
        let count = move |c: &_| Ok(store::count_leased(c, name.as_str())?);
        self.db.run(count).await
    }
}
