//! Which host has a VM, and what other hosts say.

use serde::{Deserialize, Serialize};

/// A VM, and the host that has it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmAt {
    /// Its name.
    pub name: String,
    /// The host's.
    pub host: String,
    /// The guest's driver runs.
    pub live: bool,
    /// Generation of its card, where that host believes one.
    #[serde(default)]
    pub generation: Option<u64>,
    /// It is locked.
    #[serde(default)]
    pub locked: bool,
    /// The host whose map file says so, where the one that has it does not; none: that one has said it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by_map_of: Option<String>,
}

/// Where a name leads.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// Name of the VM.
    pub vm: String,
    /// The host that has it; none: none has, or several have and nothing says which is meant.
    pub host: Option<String>,
    /// It is this one.
    pub here: bool,
    /// What each host that has such a VM says of it.
    pub claims: Vec<VmAt>,
}

/// VMs of all hosts.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllVms {
    /// By name, and then by host.
    pub vms: Vec<VmAt>,
    /// Hosts that did not say what they have, and why.
    pub silent: Vec<Silent>,
}

/// A host that does not answer.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silent {
    /// Its name.
    pub host: String,
    /// Why.
    pub why: String,
}

/// A host, as clients of its proxy find it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostShown {
    /// Its name.
    pub name: String,
    /// IP address and port of a listener of its proxy that speaks TLS. An unspecified IP address stands for the one by which this host is
    /// asked.
    pub address: String,
    /// Digest of its key: `sha256/` and base64.
    pub pin: String,
    /// It is the one that is asked.
    pub here: bool,
}

/// What a host says of the VMs that it has.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostAnswer {
    /// Its own name; none: it has none.
    pub host: Option<String>,
    /// Those that were asked for and that it has.
    pub vms: Vec<VmAt>,
}
