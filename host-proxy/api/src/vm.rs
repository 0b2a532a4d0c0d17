//! A VM: what is shown of it, how it is registered and changed, and its lock.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::carrier::{Carrier, NewCarrier};
use crate::guest::{Card, GuestKey, Holding, Program, StoodStill, Trust};
#[cfg(feature = "openapi")]
use crate::openapi;
use crate::state::VmState;

/// One VM.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Name and id.
    pub name: String,
    /// Its CID.
    pub cid: u64,
    /// How its channel stands.
    pub state: VmState,
    /// Version that the agent told; none before it spoke.
    pub agent: Option<String>,
    /// Which program the agent is, as it told; none: it has told nothing of it.
    #[serde(default)]
    pub program: Option<Program>,
    /// Kernel release that the agent told.
    pub kernel: Option<String>,
    /// Id that the image was enrolled with, if it is not this VM's. `fault` says so, too.
    pub enrolled_as: Option<String>,
    /// What it is used for: the labels of the configuration, then those of its card while this host believes it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The card that the guest shows; none: it shows none.
    #[serde(default)]
    pub card: Option<Card>,
    /// The guest's own key, as it says.
    #[serde(default)]
    pub guest_key: Option<GuestKey>,
    /// Keys that may order work in the guest, as its agent says. 0: it runs none.
    #[serde(default)]
    pub goal_keys: Option<u16>,
    /// The id that this host has given the guest, 32 hex digits; none before its agent was heard, or it is of a version before.
    #[serde(default)]
    pub guest_id: Option<String>,
    /// What the guest has taken of trust documents; none as above.
    #[serde(default)]
    pub trust: Option<Trust>,
    /// How far the guest's clock was ahead of this host's when the agent told it last, ms; negative: behind.
    #[serde(default)]
    pub clock_ahead_ms: Option<i64>,
    /// That the guest's time stood still: it was paused, or restored from a snapshot. None: it did not, as long as `aditd` knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stood_still: Option<StoodStill>,
    /// What the agent holds because its goal is not yet valid by the guest's clock.
    #[serde(default)]
    pub holding: Option<Holding>,
    /// Milliseconds since the agent was last heard; none if never.
    pub last_seen_ms: Option<u64>,
    /// Counts sessions.
    pub epoch: u64,
    /// Streams open now.
    pub streams: u32,
    /// Tasks that are not terminal.
    pub queued: u32,
    /// Guest TCP ports that may be reached.
    pub allow: Vec<u16>,
    /// Plain AF_VSOCK ports that may be reached as `VM:vsock-PORT`.
    pub allow_vsock: Vec<u32>,
    /// Services that may be reached, by the names that the guest has for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_services: Vec<String>,
    /// Microseconds that its port process polls before it sleeps.
    #[serde(default)]
    pub busy_poll_us: u32,
    /// Settings that its port process was not started with: it has them after `POST …/reload`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<String>,
    /// Process id of its port process.
    pub port_pid: Option<u32>,
    /// That process is the VM's VMM, which has registered it: it takes the VM off the map when the VM ends.
    #[serde(default)]
    pub held_by: Option<u32>,
    /// Where the VMM connects.
    pub vhost_socket: String,
    /// Which carrier the agent's services take.
    #[serde(default)]
    pub carrier: Carrier,
    /// Where a VMM hands a ring over.
    #[serde(default)]
    pub ring_socket: String,
    /// Where a stock QEMU is given a ring (`-chardev socket` of `-device ivshmem-doorbell`).
    #[serde(default)]
    pub ivshmem_socket: String,
    /// Everything that is wrong with it, the gravest first: it needs a power cycle, has no port process, its guest broke the
    /// protocol, or its image is another VM's.
    pub fault: Option<String>,
    /// The same, each by itself.
    #[serde(default)]
    pub faults: Vec<VmFault>,
    /// A VMM is connected; none: an aditd of before does not say.
    #[serde(default)]
    pub vmm: Option<bool>,
    /// The last dial into it that ended; none: there was none since aditd was started.
    #[serde(default)]
    pub last_dial: Option<LastDial>,
    /// It is locked: no new task and no new tunnel goes there.
    #[serde(default)]
    pub lock: Option<VmLock>,
    /// Where its settings come from: `file` (aditd.toml), `api` (`adit vm add`), `found` (a socket in a directory of `[[discover]]`); a later
    /// aditd may have others.
    #[serde(default)]
    pub origin: Option<String>,
}

/// Has a VM's file systems stand still.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewFreeze {
    /// For so long, ms: 1000 to 300000. Then they go on by themselves.
    pub lease_ms: u32,
}

/// File systems of a VM that stand still.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Where they are mounted in the guest, at most 32.
    pub file_systems: Vec<String>,
    /// How many there are; 0: all go on.
    pub count: u32,
    /// For so long still, ms.
    pub left_ms: u32,
}

/// Why a VM is locked.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLock {
    /// In the words of whoever locked it; may be empty.
    pub reason: String,
    /// Who that was, as grants name callers; `owner`: who may use aditd's own socket.
    pub by: String,
    /// RFC 3339; since when.
    pub since: String,
}

/// Most characters of [`NewLock::reason`].
pub const LOCK_REASON_MAX: usize = 200;

/// Locks a VM.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewLock {
    /// Why, in one line: at most [`LOCK_REASON_MAX`] characters, none of which is a control character.
    #[serde(default)]
    pub reason: String,
}

/// Something that is wrong with a VM.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmFault {
    /// What it is about: as the label of the metric `adit_vm_fault`.
    pub kind: String,
    /// What is wrong, and what to do.
    pub text: String,
}

/// A dial into a VM.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastDial {
    /// Milliseconds since it ended.
    pub ms_ago: u64,
    /// What was dialled.
    pub to: String,
    /// Microseconds that it took.
    pub took_us: u64,
    /// Why there was no stream; none: there was.
    pub refused: Option<Refused>,
}

/// A refused dial.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Stable word.
    pub code: String,
    /// What failed and why. Part of it may be the guest's.
    pub text: String,
    /// What to do.
    pub remedy: String,
}

/// Registers a VM.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVm {
    /// Name and id.
    #[cfg_attr(
        feature = "openapi",
        schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    )]
    pub name: String,
    /// CID, 3 or more; 0, or not there: aditd chooses one that no other VM has.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[cfg_attr(feature = "openapi", schema(minimum = 0, maximum = 4_294_967_294_i64))]
    pub cid: u64,
    /// How its guest is reached; none: `vhost-user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carrier: Option<NewCarrier>,
    /// Guest TCP ports that may be reached.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(schema_with = openapi::ports, required = false))]
    pub allow: Vec<u16>,
    /// Plain AF_VSOCK ports that may be reached.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(schema_with = openapi::vsock_ports, required = false))]
    pub allow_vsock: Vec<u32>,
    /// Services that may be reached, by the names that the guest has for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "openapi", schema(schema_with = openapi::services, required = false))]
    pub allow_services: Vec<String>,
}

/// Serde passes a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Changes settings of a VM; what is not given stays.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Serialize, Deserialize, Default, Debug, Clone)]
#[serde(deny_unknown_fields)]
pub struct VmChange {
    /// Guest TCP ports that may be reached from now on. Streams that are open go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(schema_with = openapi::new_ports, required = false))]
    pub allow: Option<Vec<u16>>,
    /// Plain AF_VSOCK ports that may be reached from now on. Streams that are open go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(schema_with = openapi::new_vsock_ports, required = false))]
    pub allow_vsock: Option<Vec<u32>>,
    /// Services that may be reached from now on. Streams that are open go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(schema_with = openapi::new_services, required = false))]
    pub allow_services: Option<Vec<String>>,
    /// Microseconds that its port process polls before it sleeps. The port process has it after `POST …/reload`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy_poll_us: Option<u32>,
}
