//! How a VM's port process reaches its guest: `carrier` of `[[vm]]`.

use std::path::{Path, PathBuf};

use adit_api::{CarrierName, NewCarrier};
use adit_channel::socket_path;
use serde::{Deserialize, Serialize};

/// What a VM has between its port process and its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CarrierConfig {
    /// One that needs no more than its name.
    Named(Named),
    /// A socket for each stream.
    Hybrid(Hybrid),
}

/// Carriers without parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Named {
    /// What the VMM brings: vhost-user, and a ring where it offers one.
    Auto,
    /// The same, said.
    VhostUser,
    /// The same, and that there is no ring is a fault.
    Ring,
}

/// The sockets of Firecracker and Cloud Hypervisor. A port process is started with this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hybrid {
    /// The VMM's socket.
    pub hybrid: PathBuf,
    /// The VMM passes a half-close on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub half_closes: bool,
}

impl From<NewCarrier> for CarrierConfig {
    fn from(new: NewCarrier) -> Self {
        match new {
            NewCarrier::Named(CarrierName::Auto) => Self::Named(Named::Auto),
            NewCarrier::Named(CarrierName::VhostUser) => Self::Named(Named::VhostUser),
            NewCarrier::Named(CarrierName::Ring) => Self::Named(Named::Ring),
            NewCarrier::Hybrid(new) => Self::Hybrid(Hybrid {
                hybrid: new.hybrid.into(),
                half_closes: new.half_closes,
            }),
        }
    }
}

impl Default for CarrierConfig {
    fn default() -> Self {
        Self::Named(Named::Auto)
    }
}

impl CarrierConfig {
    /// The sockets of a VMM that has one for each stream.
    pub fn hybrid(&self) -> Option<&Hybrid> {
        match self {
            Self::Named(_) => None,
            Self::Hybrid(hybrid) => Some(hybrid),
        }
    }

    /// Its word: of one with parameters, that of the kind.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Named(Named::Auto) => "auto",
            Self::Named(Named::VhostUser) => "vhost-user",
            Self::Named(Named::Ring) => "ring",
            Self::Hybrid(_) => "hybrid",
        }
    }

    /// Whether there is to be a ring.
    pub fn wants_ring(&self) -> bool {
        *self == Self::Named(Named::Ring)
    }

    /// Whether it is what a configuration without this key has.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// # Errors
    /// Why it cannot be used.
    pub(super) fn check(&self) -> Result<(), String> {
        self.hybrid().map_or(Ok(()), |h| check_path(&h.hybrid))
    }
}

/// Checks the path of a VMM's socket.
///
/// # Errors
/// It is none, or too long for the sockets beside it.
pub(super) fn check_path(path: &Path) -> Result<(), String> {
    socket_path::check_hybrid(path)
}
