//! What the process gives up once its files are open and its sockets are bound: it becomes a user of its own, without any
//! capability.
//!
//! Where `aditd` is root, it starts the process as root, because the VM's directory belongs to root. Before the process serves a
//! guest, a VMM or `aditd`, it changes to the VM's own user id, and gives up all groups and capabilities and every way to regain
//! them. So what a process can reach by the system calls that its filter allows belongs to its VM. Its directory stays root's.
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

#[cfg(feature = "shell")]
/// Most threads of one VM's user: those of a process that ends, and of its successor.
const THREADS_MAX: u64 = 64;
#[cfg(feature = "shell")]
/// Most bytes of its own memory. Memory shared with its guest does not count. The process uses some MiB; frames for an aditd
/// that does not read may take up to a quarter of this.
const OWN_MEMORY_MAX: u64 = 1 << 30;

/// Why the process still has a privilege. It must end.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct PrivilegeError {
    what: &'static str,
    #[source]
    source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> PrivilegeError {
    move |source| PrivilegeError { what, source }
}

/// Gives up every privilege, and becomes the user and group `own`, if given, which needs root. The longest file that it may
/// write has `file_max_bytes`, or twice [`FILE_MAX`](crate::log::FILE_MAX) if that is more: its log is a file, and so is
/// memory for a ring. Call this while there is only one thread. Returns as [`become_user`].
///
/// # Errors
/// The kernel refuses.
#[cfg(feature = "shell")]
pub fn give_up(own: Option<u32>, file_max_bytes: u64) -> Result<bool, PrivilegeError> {
    // A core dump would contain guest memory, and the process never locks memory.
    for resource in [Resource::RLIMIT_CORE, Resource::RLIMIT_MEMLOCK] {
        limit(resource, 0).map_err(failed("set its limits"))?;
    }
    limit(Resource::RLIMIT_DATA, OWN_MEMORY_MAX).map_err(failed("set its limits"))?;
    // A process that its guest has taken over could write its log until the disk is full.
    let file_max = file_max_bytes.max(2 * crate::log::FILE_MAX);
    limit(Resource::RLIMIT_FSIZE, file_max).map_err(failed("set its limits"))?;
    if own.is_some() {
        limit(Resource::RLIMIT_NPROC, THREADS_MAX).map_err(failed("set its limits"))?;
    }
    become_user(own.map(|own| (own, own)))
}

/// Becomes the user and group, if given, which needs root, and gives up all groups and capabilities and every way to regain
/// them. Call this while there is only one thread. Returns false if the capability bounding set could not be emptied. That is
/// harmless: only another program could gain capabilities, and the process never starts one.
///
/// # Errors
/// The kernel refuses.
pub fn become_user(own: Option<(u32, u32)>) -> Result<bool, PrivilegeError> {
    let bounded = empty_bounds().map_err(failed("empty the capability bounding set"))?;
    if let Some((uid, gid)) = own {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        let become_own = || {
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)
        };
        become_own().map_err(|e| failed("become a user of its own")(e.into()))?;
    }
    match clear_ambient_capability_set() {
        // An old kernel has no ambient capabilities.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(e) => return Err(failed("clear the ambient capabilities")(e.into())),
    }
    drop_capabilities().map_err(failed("drop its capabilities"))?;
    set_no_new_privs(true).map_err(|e| failed("set no_new_privs")(e.into()))?;
    Ok(bounded)
}

/// Gives up all capabilities but those of these that the process has, and every way to regain the others. Its user stays. Call this
/// while there is only one thread.
///
/// # Errors
/// The kernel refuses.
pub fn keep_capabilities(these: CapabilitySet) -> Result<(), PrivilegeError> {
    empty_bounds().map_err(failed("empty the capability bounding set"))?;
    let keep = || {
        let has = capabilities(None)?.permitted;
        have_capabilities(has.intersection(these))
    };
    keep().map_err(failed("drop its capabilities"))?;
    set_no_new_privs(true).map_err(|e| failed("set no_new_privs")(e.into()))
}

/// Drops all capabilities of the calling thread.
///
/// # Errors
/// The kernel refuses.
pub fn drop_capabilities() -> io::Result<()> {
    have_capabilities(CapabilitySet::empty())
}

fn have_capabilities(these: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets {
        effective: these,
        permitted: these,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}

fn empty_bounds() -> io::Result<bool> {
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // The kernel knows no higher capability.
            Err(Errno::INVAL) => break,
            // Not root, or root without CAP_SETPCAP.
            Err(Errno::PERM) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

/// Lowers a limit, soft and hard.
///
/// # Errors
/// The kernel refuses.
pub fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let (_, hard) = getrlimit(resource)?;
    let most = most.min(hard);
    Ok(setrlimit(resource, most, most)?)
}
