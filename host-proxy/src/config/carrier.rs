//! How a VM's port process reaches its guest: `carrier` of `[[vm]]`.

use std::path::{Path, PathBuf};

use adit_api::{CarrierName, NewCarrier, NewHybrid};
use adit_channel::socket_path;
use serde::{Deserialize, Serialize};

use super::{CID_MAX, CID_MIN};

/// What a VM has between its port process and its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CarrierConfig {
    /// One that needs no more than its name.
    Named(Named),
    /// A socket for each stream.
    Hybrid(Hybrid),
    /// AF_VSOCK of the host's kernel.
    Kernel(Kernel),
    /// Whichever there is, with the VMM's socket elsewhere than in the VM's directory.
    AutoAt(AutoAt),
}

/// Carriers without parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Named {
    /// Whichever there is: a ring, vhost-user, the host's kernel, a socket of the VMM's in the VM's directory.
    Auto,
    /// What the VMM brings: vhost-user, and a ring where it offers one. A VM that says nothing has this.
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

/// Whichever way there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoAt {
    /// The VMM's socket, if it has one for each stream.
    pub auto: Hybrid,
}

impl From<NewHybrid> for Hybrid {
    fn from(new: NewHybrid) -> Self {
        Self {
            hybrid: new.hybrid.into(),
            half_closes: new.half_closes,
        }
    }
}

impl From<NewCarrier> for CarrierConfig {
    fn from(new: NewCarrier) -> Self {
        match new {
            NewCarrier::Named(CarrierName::Auto) => Self::Named(Named::Auto),
            NewCarrier::Named(CarrierName::VhostUser) => Self::Named(Named::VhostUser),
            NewCarrier::Named(CarrierName::Ring) => Self::Named(Named::Ring),
            NewCarrier::Kernel(new) => Self::of_kernel(new.vsock.cid),
            NewCarrier::Hybrid(new) => Self::Hybrid(new.into()),
            NewCarrier::AutoAt(new) => Self::AutoAt(AutoAt {
                auto: new.auto.into(),
            }),
        }
    }
}

/// A VM whose streams the host's kernel carries: `vhost-vsock-pci`, as QEMU and libvirt have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Which.
    pub vsock: KernelVsock,
}

/// What the kernel knows of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelVsock {
    /// The CID that the VMM has given it.
    pub cid: u32,
}

/// What carries a VM's streams, as its port process has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way<'a> {
    /// A device, by vhost-user or in the VMM itself.
    Device,
    /// A socket of the VMM's for each stream.
    Hybrid(&'a Hybrid),
    /// The host's kernel, to this CID.
    Kernel(u32),
    /// Whichever there is. The VMM's socket is there; none: in the VM's directory.
    Auto(Option<&'a Hybrid>),
}

impl Default for CarrierConfig {
    fn default() -> Self {
        Self::Named(Named::VhostUser)
    }
}

impl CarrierConfig {
    /// The sockets of a VMM that has one for each stream, if a path is said.
    pub fn hybrid(&self) -> Option<&Hybrid> {
        match self.way() {
            Way::Hybrid(hybrid) | Way::Auto(Some(hybrid)) => Some(hybrid),
            Way::Device | Way::Kernel(_) | Way::Auto(None) => None,
        }
    }

    /// The CID of a VM whose streams the host's kernel carries.
    pub fn kernel(&self) -> Option<u32> {
        match self.way() {
            Way::Kernel(cid) => Some(cid),
            Way::Device | Way::Hybrid(_) | Way::Auto(_) => None,
        }
    }

    /// Whether the host's kernel may carry its streams.
    pub fn may_be_kernel(&self) -> bool {
        matches!(self.way(), Way::Kernel(_) | Way::Auto(_))
    }

    /// One whose streams the host's kernel carries.
    pub fn of_kernel(cid: u32) -> Self {
        let vsock = KernelVsock { cid };
        Self::Kernel(Kernel { vsock })
    }

    /// What carries the streams.
    pub fn way(&self) -> Way<'_> {
        match self {
            Self::Named(Named::Auto) => Way::Auto(None),
            Self::AutoAt(at) => Way::Auto(Some(&at.auto)),
            Self::Named(Named::VhostUser | Named::Ring) => Way::Device,
            Self::Hybrid(hybrid) => Way::Hybrid(hybrid),
            Self::Kernel(kernel) => Way::Kernel(kernel.vsock.cid),
        }
    }

    /// Its word: of one with parameters, that of the kind.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Named(Named::Auto) | Self::AutoAt(_) => "auto",
            Self::Named(Named::VhostUser) => "vhost-user",
            Self::Named(Named::Ring) => "ring",
            Self::Hybrid(_) => "hybrid",
            Self::Kernel(_) => "vhost-vsock",
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
        match self.way() {
            Way::Device | Way::Auto(None) => Ok(()),
            Way::Hybrid(hybrid) | Way::Auto(Some(hybrid)) => check_path(&hybrid.hybrid),
            Way::Kernel(cid) => check_cid(cid.into()),
        }
    }
}

/// Checks a guest's CID.
///
/// # Errors
/// The kernel gives it to no guest.
pub(super) fn check_cid(cid: u64) -> Result<(), String> {
    match (CID_MIN..=CID_MAX).contains(&cid) {
        true => Ok(()),
        false => Err(format!("a CID is {CID_MIN} to {CID_MAX}, not {cid}")),
    }
}

/// Checks the path of a VMM's socket.
///
/// # Errors
/// It is none, or too long for the sockets beside it.
pub(super) fn check_path(path: &Path) -> Result<(), String> {
    socket_path::check_hybrid(path)
}
