//! A user for each VM's port process, so that no port process has power over another one, and none is root.
//!
//! Which VM has which is noted where nobody but root can write, and for as long as port processes live: the group of the
//! VM's directory. The directory itself stays root's, and closed to its group. So the next aditd finds the same users, and
//! after a reboot, when no port process is left, everything begins anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::bail;
use nix::unistd::Uid;
use rustix::thread::{CapabilitySet, capabilities};

use crate::config::{Config, UidRange};

/// The users of the VMs of one run directory.
#[derive(Debug)]
pub struct Uids {
    range: UidRange,
    /// The worker's, which no VM gets.
    worker: Option<u32>,
    /// Where the VMs' directories are.
    vms: PathBuf,
    /// Users that had processes when aditd started.
    others: BTreeSet<u32>,
    held: Mutex<BTreeMap<u32, Holder>>,
}

#[derive(Debug)]
struct Holder {
    vm: String,
    /// The VM is on the map.
    active: bool,
}

impl Uids {
    /// Returns the users to give; none: aditd cannot give any, which is said. `worker`: one that is taken.
    ///
    /// # Errors
    /// The configuration wants it to.
    pub fn new(config: &Config, worker: Option<u32>) -> anyhow::Result<Option<Self>> {
        let range = config.ports.uids.unwrap_or_default();
        let why = match cannot(range) {
            None => return Ok(Some(Self::open(range, worker, &config.run_dir)?)),
            Some(why) => why,
        };
        if config.ports.uids.is_some() {
            bail!("cannot use the `uids` of [ports]: {why}; run aditd as root, or remove the key");
        }
        tracing::warn!(
            why,
            "port processes run as aditd's own user: only their system call filters separate the VMs"
        );
        Ok(None)
    }

    fn open(range: UidRange, worker: Option<u32>, run_dir: &Path) -> io::Result<Self> {
        let vms = run_dir.join("vm");
        let mut held = BTreeMap::new();
        for (uid, vm) in held_in(&vms)? {
            let active = false;
            // If two have one group, adit did not do it: the second VM gets another user.
            if range.contains(uid) && worker != Some(uid) {
                held.entry(uid).or_insert(Holder { vm, active });
            }
        }
        Ok(Self {
            range,
            worker,
            vms,
            others: running()?,
            held: Mutex::new(held),
        })
    }

    /// Returns the user of a VM, which stays its own; makes its directory.
    ///
    /// # Errors
    /// There is none left, or the directory cannot be made.
    pub fn of(&self, vm: &str) -> io::Result<u32> {
        let dir = self.vms.join(vm);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)?;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let found = held.iter_mut().find(|(_, holder)| holder.vm == vm);
        let uid = match found {
            Some((uid, holder)) => {
                holder.active = true;
                *uid
            }
            None => {
                let free = |uid: &u32| {
                    let others = self.others.contains(uid) || self.worker == Some(*uid);
                    !others && !held.contains_key(uid)
                };
                let uid = match self.range.iter().find(free) {
                    Some(uid) => uid,
                    None => self.take_back(&mut held)?,
                };
                let (vm, active) = (vm.to_owned(), true);
                held.insert(uid, Holder { vm, active });
                uid
            }
        };
        if fs::metadata(&dir)?.gid() != uid {
            chown(&dir, None, Some(uid))?;
        }
        Ok(uid)
    }

    /// Notes that the VM was removed. Its user goes to another VM only when no unused one is left.
    pub fn leave(&self, vm: &str) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for holder in held.values_mut().filter(|h| h.vm == vm) {
            holder.active = false;
        }
    }

    /// Takes the user of a removed VM that has no process left.
    fn take_back(&self, held: &mut BTreeMap<u32, Holder>) -> io::Result<u32> {
        let running = running()?;
        let free = |(uid, holder): &(&u32, &Holder)| !holder.active && !running.contains(uid);
        let Some(uid) = held.iter().find(free).map(|(uid, _)| *uid) else {
            return Err(io::Error::other(format!(
                "all users {} are taken: set more of them as `uids` of [ports]",
                self.range
            )));
        };
        if let Some(holder) = held.remove(&uid) {
            match chown(self.vms.join(holder.vm), None, Some(0)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(uid)
    }
}

/// The groups of the VMs' directories below this one.
fn held_in(vms: &Path) -> io::Result<Vec<(u32, String)>> {
    let of_entry = |entry: io::Result<fs::DirEntry>| {
        let entry = entry?;
        let vm = entry.file_name().to_string_lossy().into_owned();
        Ok((entry.metadata()?.gid(), vm))
    };
    let entries = fs::read_dir(vms).into_iter().flatten();
    entries.map(of_entry).collect()
}

/// The highest user of a range that no VM has and no process, except `known`.
///
/// # Errors
/// The system does not say who has which.
pub fn highest_free(
    range: UidRange,
    run_dir: &Path,
    known: Option<u32>,
) -> io::Result<Option<u32>> {
    let held: BTreeSet<u32> = held_in(&run_dir.join("vm"))?
        .into_iter()
        .map(|(uid, _)| uid)
        .collect();
    let running = running()?;
    let free = |uid: &u32| {
        let other = running.contains(uid) && known != Some(*uid);
        !other && !held.contains(uid)
    };
    Ok(known
        .filter(|uid| range.contains(*uid))
        .filter(free)
        .or_else(|| range.iter().rev().find(free)))
}

/// The users of all processes.
fn running() -> io::Result<BTreeSet<u32>> {
    let mut users = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        users.extend(of_process(&entry?.path()));
    }
    Ok(users)
}

/// The users of a process, by its directory in /proc. One that has ended since has none.
pub fn of_process(dir: &Path) -> Vec<u32> {
    let status = fs::read_to_string(dir.join("status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("Uid:"));
    let words = line.into_iter().flat_map(str::split_whitespace);
    words.filter_map(|w| w.parse().ok()).collect()
}

/// Why aditd cannot start processes as these users; none: it can.
pub fn cannot(range: UidRange) -> Option<String> {
    if !Uid::effective().is_root() {
        return Some("aditd is not root".into());
    }
    let wanted = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::CHOWN;
    let has = capabilities(None).map(|c| c.effective);
    if !has.is_ok_and(|has| has.contains(wanted)) {
        return Some("aditd lacks CAP_SETUID, CAP_SETGID or CAP_CHOWN".into());
    }
    // A kernel without user namespaces has neither file.
    for map in ["/proc/self/uid_map", "/proc/self/gid_map"] {
        let map = fs::read_to_string(map).ok();
        if map.is_some_and(|map| !mapped(&map, range)) {
            return Some(format!("the user namespace has no users {range}"));
        }
    }
    None
}

/// Whether one line of such a file has the whole range.
fn mapped(map: &str, range: UidRange) -> bool {
    map.lines().any(|line| {
        let words: Vec<u64> = line.split_whitespace().flat_map(str::parse).collect();
        let [inside, _, len] = words[..] else {
            return false;
        };
        inside <= range.first().into() && u64::from(range.last()) < inside + len
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_lacks_the_users_is_noticed() {
        let range: UidRange = "70000-78191".parse().unwrap();
        assert!(mapped("         0          0 4294967295\n", range));
        assert!(!mapped("0 100000 65536\n", range));
        assert!(mapped("0 1000 1\n1 100000 78191\n", range));
        assert!(!mapped("0 1000 1\n1 100000 78190\n", range));
    }

    #[test]
    fn r115_each_vm_has_a_user_of_its_own_that_stays_until_the_vm_and_its_processes_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        if !Uid::effective().is_root() {
            println!("skipped: only root can give a directory to another group");
            return;
        }
        // Nobody's, unless a test of another tree runs at the same time: the users of this process' number.
        let first = 1_000_000 + 4 * std::process::id();
        let range: UidRange = format!("{first}-{}", first + 1).parse().unwrap();
        let uids = Uids::open(range, None, dir.path()).unwrap();
        let (a, b) = (uids.of("a").unwrap(), uids.of("b").unwrap());
        assert_eq!((a, b), (first, first + 1));
        assert_eq!(uids.of("a").unwrap(), a);
        let refused = uids.of("c").unwrap_err().to_string();
        assert!(refused.contains("are taken"), "{refused}");
        // The next aditd, asked in another order.
        let uids = Uids::open(range, None, dir.path()).unwrap();
        assert_eq!((uids.of("b").unwrap(), uids.of("a").unwrap()), (b, a));
        // A process of the VM that was removed still runs.
        uids.leave("b");
        let mut left = std::process::Command::new("sleep");
        let mut left = std::os::unix::process::CommandExt::uid(left.arg("1000"), b)
            .spawn()
            .unwrap();
        uids.of("c").unwrap_err();
        left.kill().unwrap();
        left.wait().unwrap();
        assert_eq!(uids.of("c").unwrap(), b);
        let group = |vm: &str| fs::metadata(dir.path().join("vm").join(vm)).unwrap().gid();
        assert_eq!((group("a"), group("b"), group("c")), (a, 0, b));
        uids.of("b").unwrap_err();
    }
}
