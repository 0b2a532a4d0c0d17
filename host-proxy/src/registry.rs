//! The VMs of this host, by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use adit_blob::Digest;
use adit_names::VmId;

use crate::config::{VMS_MAX, VmConfig};
use crate::vm::{Origin, VmEntry};

/// CIDs that aditd chooses begin here. People choose small ones, and a file with one that is taken would be refused.
pub const CHOSEN_MIN: u64 = 1 << 30;

/// Why a VM cannot be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Another VM has the name.
    #[error("there is a VM named `{0}` already")]
    NameTaken(VmId),
    /// Another VM has the CID.
    #[error("CID {cid} is taken by `{by}`")]
    CidTaken {
        /// The CID.
        cid: u64,
        /// Who has it.
        by: VmId,
    },
    /// Another VM has the socket of the VMM.
    #[error("the socket {} is that of `{by}`'s VMM already", path.display())]
    SocketTaken {
        /// Its path.
        path: PathBuf,
        /// Who has it.
        by: VmId,
    },
    /// A host has the name.
    #[error("`{0}` is the name of a host, and hosts and VMs share their names")]
    HostHasIt(VmId),
    /// [`VMS_MAX`] VMs.
    #[error("there are {VMS_MAX} VMs already")]
    Full,
}

/// All VMs by name.
#[derive(Debug)]
pub struct Registry {
    run_dir: PathBuf,
    vms: RwLock<BTreeMap<VmId, Arc<VmEntry>>>,
    /// Names of hosts.
    hosts: RwLock<BTreeSet<VmId>>,
}

impl Registry {
    /// Makes an empty registry; VMs get directories under `run_dir`.
    pub fn new(run_dir: &Path) -> Self {
        Self {
            run_dir: run_dir.to_owned(),
            vms: RwLock::default(),
            hosts: RwLock::default(),
        }
    }

    /// No VM gets one of these names from now on.
    pub fn reserve(&self, hosts: impl IntoIterator<Item = VmId>) {
        *self.hosts.write().unwrap_or_else(PoisonError::into_inner) = hosts.into_iter().collect();
    }

    /// Adds a VM.
    ///
    /// # Errors
    /// Its name or CID is taken, or a host has the name, or there are too many.
    pub fn add(&self, config: VmConfig, origin: Origin) -> Result<Arc<VmEntry>, AddError> {
        if self.is_host(&config.name) {
            return Err(AddError::HostHasIt(config.name));
        }
        self.put_back(config, origin)
    }

    /// Whether a host has the name.
    pub fn is_host(&self, name: &VmId) -> bool {
        let hosts = self.hosts.read().unwrap_or_else(PoisonError::into_inner);
        hosts.contains(name)
    }

    /// Adds a VM that was there before, also if a host has got its name meanwhile: nobody may lose a VM by that.
    ///
    /// # Errors
    /// Its name or CID is taken, or there are too many.
    pub fn put_back(&self, config: VmConfig, origin: Origin) -> Result<Arc<VmEntry>, AddError> {
        let mut vms = self.vms.write().unwrap_or_else(PoisonError::into_inner);
        if vms.contains_key(&config.name) {
            return Err(AddError::NameTaken(config.name));
        }
        if let Some(other) = vms.values().find(|v| v.cid == config.cid) {
            return Err(AddError::CidTaken {
                cid: config.cid,
                by: other.name.clone(),
            });
        }
        if let Some(hybrid) = config.carrier.hybrid() {
            let has = |v: &&Arc<VmEntry>| {
                let spec = v.spec();
                let other = spec.carrier.hybrid();
                // As `Path` compares: without empty parts and `.`.
                other.is_some_and(|other| other.hybrid == hybrid.hybrid)
            };
            if let Some(other) = vms.values().find(has) {
                return Err(AddError::SocketTaken {
                    path: hybrid.hybrid.clone(),
                    by: other.name.clone(),
                });
            }
        }
        if vms.len() >= VMS_MAX {
            return Err(AddError::Full);
        }
        let entry = Arc::new(VmEntry::new(&self.run_dir, config, origin));
        vms.insert(entry.name.clone(), entry.clone());
        Ok(entry)
    }

    /// A CID that no VM has, of those that nobody writes down: for a VM whose CID means nothing to its VMM. It is of the name, so that the
    /// next aditd finds the port process with the same.
    pub fn free_cid(&self, name: &VmId) -> u64 {
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        let taken: BTreeSet<u64> = vms.values().map(|vm| vm.cid).collect();
        let Digest([a, b, c, d, ..]) = Digest::of(name.as_str().as_bytes());
        let first = CHOSEN_MIN + u64::from(u32::from_be_bytes([a, b, c, d])) % CHOSEN_MIN;
        // There are fewer VMs than numbers.
        (first..).find(|cid| !taken.contains(cid)).unwrap_or(first)
    }

    /// Takes a VM out.
    pub fn remove(&self, name: &VmId) -> Option<Arc<VmEntry>> {
        self.vms
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name)
    }

    /// Finds a VM.
    pub fn get(&self, name: &VmId) -> Option<Arc<VmEntry>> {
        self.vms
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// Finds a VM by its CID.
    pub fn by_cid(&self, cid: u64) -> Option<Arc<VmEntry>> {
        let vms = self.vms.read().unwrap_or_else(PoisonError::into_inner);
        vms.values().find(|vm| vm.cid == cid).cloned()
    }

    /// All VMs, by name.
    pub fn all(&self) -> Vec<Arc<VmEntry>> {
        self.vms
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r61_a_taken_name_or_cid_is_refused() {
        let vm = |name: &str, cid| VmConfig::new(name.parse().unwrap(), cid);
        let r = Registry::new(Path::new("/run/adit"));
        r.add(vm("a", 3), Origin::Api).unwrap();
        let taken = r.add(vm("a", 4), Origin::File);
        assert!(matches!(taken, Err(AddError::NameTaken(_))));
        let taken = r.add(vm("b", 3), Origin::Api);
        assert!(matches!(taken, Err(AddError::CidTaken { cid: 3, .. })));
        r.remove(&"a".parse().unwrap()).unwrap();
        r.add(vm("b", 3), Origin::Api).unwrap();
        let name = "d".parse().unwrap();
        let free = r.free_cid(&name);
        assert!((CHOSEN_MIN..2 * CHOSEN_MIN).contains(&free));
        assert_eq!(r.free_cid(&name), free);
        r.add(vm("d", free), Origin::Api).unwrap();
        assert_eq!(r.free_cid(&name), free + 1);
        let hybrid = |name: &str, cid, path: &str| {
            let carrier = format!(r#"{{"hybrid": "{path}"}}"#);
            VmConfig {
                carrier: serde_json::from_str(&carrier).unwrap(),
                ..vm(name, cid)
            }
        };
        r.add(hybrid("e", 6, "/a/v.sock"), Origin::Api).unwrap();
        let taken = r.add(hybrid("f", 7, "/a/./v.sock"), Origin::Api);
        assert!(matches!(taken, Err(AddError::SocketTaken { .. })));
        r.add(hybrid("f", 7, "/a/w.sock"), Origin::Api).unwrap();
        r.reserve(["c".parse().unwrap()]);
        let taken = r.add(vm("c", 5), Origin::Api);
        assert!(matches!(taken, Err(AddError::HostHasIt(_))));
    }
}
