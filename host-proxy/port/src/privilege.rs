//! What the process is once its files are open and its sockets are bound: a user of its own, and nobody's superior.
//!
//! It is started as root where `aditd` is root, since the VM's directory is root's. Before it has a guest, a VMM or an
//! `aditd` to hear, it takes the VM's own user id, and with it no group, no capability, and no way to any: so what it could
//! still reach by a system call that its filter allows is nobody's but its VM's. Its directory stays root's.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Threads of one VM's user at most: those of a process that ends, and of its successor.
const THREADS_MAX: u64 = 64;
/// Bytes of memory of its own at most. What it shares with its guest is no part of that. It uses some MiB; frames for an
/// aditd that does not read may come to a quarter of this.
const OWN_MEMORY_MAX: u64 = 1 << 30;

/// Why the process still has what it should not have. It must not go on.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct PrivilegeError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// Gives every privilege up, and becomes the user and group `own`, if one is named; that takes root. No file may become
/// longer than `file_max_bytes` (but twice [`FILE_MAX`](crate::log::FILE_MAX) at least): its log is a file, and memory for a ring is one, too.
/// To be called while there is one thread. Returns false if capabilities stay within its bounds, which takes another program to gain them, and
/// no such program is ever started.
///
/// # Errors
/// The kernel refuses.
pub fn give_up(own: Option<u32>, file_max_bytes: u64) -> Result<bool, PrivilegeError> {
    let failed = |what| move |source: io::Error| PrivilegeError { what, source };
    let bounded = empty_bounds().map_err(failed("empty the capability bounding set"))?;
    // Guest memory is in a core, and locked memory is no part of what it does.
    for resource in [Resource::RLIMIT_CORE, Resource::RLIMIT_MEMLOCK] {
        limit(resource, 0).map_err(failed("set its limits"))?;
    }
    limit(Resource::RLIMIT_DATA, OWN_MEMORY_MAX).map_err(failed("set its limits"))?;
    // In its guest's hands it could write its log until the disk is full.
    let file_max = file_max_bytes.max(2 * crate::log::FILE_MAX);
    limit(Resource::RLIMIT_FSIZE, file_max).map_err(failed("set its limits"))?;
    if let Some(own) = own {
        limit(Resource::RLIMIT_NPROC, THREADS_MAX).map_err(failed("set its limits"))?;
        let (uid, gid) = (Uid::from_raw(own), Gid::from_raw(own));
        let become_own = || {
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)
        };
        become_own().map_err(|e| failed("become the VM's own user")(e.into()))?;
    }
    match clear_ambient_capability_set() {
        // A kernel without them.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(e) => return Err(failed("clear the ambient capabilities")(e.into())),
    }
    drop_capabilities().map_err(failed("drop its capabilities"))?;
    set_no_new_privs(true).map_err(|e| failed("set no_new_privs")(e.into()))?;
    Ok(bounded)
}

/// Takes every capability from the calling thread.
///
/// # Errors
/// The kernel refuses.
pub fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, none)?)
}

fn empty_bounds() -> io::Result<bool> {
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // The kernel knows no more of them.
            Err(Errno::INVAL) => break,
            // Not root, or not wholly.
            Err(Errno::PERM) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

/// Lowers a limit for good.
fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let (_, hard) = getrlimit(resource)?;
    let most = most.min(hard);
    Ok(setrlimit(resource, most, most)?)
}
