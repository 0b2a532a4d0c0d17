//! `[names]`: what this host is called, and what names may end with. Hosts and VMs share one space of names.

use adit_names::VmId;
use serde::{Deserialize, Serialize};

use super::Config;
use crate::reach::Suffix;

/// `[names]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Names {
    /// This host's own; none: [`Config::host_name`] says which.
    pub host: Option<VmId>,
    /// What names may end with.
    pub suffix: Suffix,
    /// First label of the machine's host name, if it can be a name. Not of the file.
    #[serde(skip)]
    pub hostname: Option<VmId>,
}

impl Config {
    /// This host's own name, as far as the file knows. The one of the machine counts only where nothing else has it: nobody
    /// chose it for this.
    pub fn host_name(&self) -> Option<&VmId> {
        if let Some(host) = &self.names.host {
            return Some(host);
        }
        let is_free = |name: &&VmId| {
            !self.names.suffix.hides(name)
                && self.vm.iter().all(|vm| vm.name != **name)
                && self.host.iter().all(|host| host.name != **name)
        };
        self.names.hostname.as_ref().filter(is_free)
    }
}

/// First label of a machine's host name, if it can be a name.
pub(super) fn of_machine(hostname: &str) -> Option<VmId> {
    let first = hostname.trim().split('.').next()?;
    first.to_ascii_lowercase().parse().ok()
}
