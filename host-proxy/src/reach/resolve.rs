//! Where a destination's VM is. Pure: who knows the VMs is asked by the caller's function.

use adit_names::VmId;

use super::destination::Destination;

/// Where it is. A VM of another host would be one more case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved<V> {
    /// On this host.
    Local(V),
    /// Nowhere: no VM has that name.
    Unknown,
}

/// Finds the VM of a destination; `local` knows those of this host.
pub fn resolve<V>(to: &Destination, local: impl FnOnce(&VmId) -> Option<V>) -> Resolved<V> {
    match local(&to.vm) {
        Some(vm) => Resolved::Local(vm),
        None => Resolved::Unknown,
    }
}
