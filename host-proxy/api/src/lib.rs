//! The JSON types of `aditd`'s API, shared with the command line. Unknown fields in answers are ignored by readers,
//! so fields may be added; none changes its meaning.
//!
//! HTTP/1.1 on a Unix socket (`RUN/aditd.sock`, 0600), whose user may do everything; and on management listeners, where grants say
//! who may do what (docs/operate.md):
//!
//! | method and path | body → answer |
//! |---|---|
//! | `GET /v1/openapi.json` | → this table for programs: OpenAPI 3.1, made from these types |
//! | `GET /v1/vms` | → `Vec<Vm>`, by name |
//! | `GET /v1/vms?limit=N&after=CURSOR` | → at most N (and at most 500) of them; the field `adit-next` has the next page's cursor, and is not there with the last page |
//! | `POST /v1/vms` | `NewVm` → `Vm`; 409 for a taken name, CID or socket; a path is the owner's to name |
//! | `GET /v1/vms/{name}` | → `Vm` |
//! | `PATCH /v1/vms/{name}` | `VmChange` → `Vm`; 409 for a VM of `aditd.toml`, 422 for what cannot change |
//! | `DELETE /v1/vms/{name}?force=true` | ends its port process; 409 for a VM that its VMM holds, without `force` |
//! | `POST /v1/vms/{name}/lock` | `NewLock` → `Vm`: no new task and no new tunnel goes there. Of a VM that is locked it replaces the reason |
//! | `DELETE /v1/vms/{name}/lock` | opens it again |
//! | `POST /v1/vms/{name}/reload` | a new port process goes on with the VMM → `Vm` once it serves; streams end |
//! | `GET /v1/vms/{name}/wait?for=agent&timeout_ms=N` | → `Vm` once ready; 408 says what is known; 404 if it is removed meanwhile. `for=port:N`, `for=service:NAME`: once somebody listens there. `for=drained`: once a locked VM has no tunnel, no request and no task left |
//! | `POST /v1/goals` | `NewGoal` → `Goal` (on disk when answered); 422 for one whose `not_after` has passed. VMs of other hosts are served by these; 502 `partly-queued` says which VMs have it where a host fails after another has taken it |
//! | `GET /v1/goals?newest=N&before=CURSOR&id=` | → `Vec<GoalSummary>`: the newest N (at most 500) before the cursor, in the order in which they were accepted; `id`: the last digits; the field `adit-earlier` has the cursor of those before, and is not there with the first page |
//! | `GET /v1/goals/{goal_id}` | → `Goal`, with what other hosts have of it |
//! | `GET /v1/tasks?vm=&goal=&state=&id=` | → `Vec<Task>`, in the order in which they were queued; `id`: the first digits |
//! | `GET /v1/tasks?…&limit=N&after=CURSOR` | → at most N (and at most 500) of them; the field `adit-next` has the next page's cursor, and is not there with the last page |
//! | `GET /v1/tasks?…&newest=N&before=CURSOR` | → the newest N (at most 500) of them before the cursor, still in that order; `adit-earlier` as above |
//! | `GET /v1/tasks/{task_id}` | → `Task`; of a VM of another host that one is asked, as for `vm=` and `id=` above and for its output |
//! | `GET /v1/tasks/{task_id}/output?stream=stdout` | raw bytes (head, a line that says what is missing, tail); the field `adit-left-out` has the head's length and the number of missing bytes |
//! | `GET /v1/events?goal=` | `application/x-ndjson` of `TaskEvent`: first the present state, then changes; ends when every task of `goal` is terminal. A body that is cut off (no last chunk) ended for another reason: ask again |
//! | `GET /v1/host-events?since=CURSOR&follow=true` | `application/x-ndjson` of `HostEvent`: what is kept of what came behind that event (a `gap` first, if that is not all), and with `follow` what happens from then on, without an end |
//! | `POST /v1/trust` | `NewTrust` → `KeptTrust` (on disk when answered): a trust document, which connected agents get at once and others when they connect; 409 for an older one |
//! | `GET /v1/trust` | → `Vec<KeptTrust>`; `limit` and `after` as of `/v1/vms` |
//! | `DELETE /v1/trust/{signer}?vm=NAME` | passes it on no more; guests that have it keep it |
//! | `GET /v1/blobs/{sha256}` | → `Blob`: how much of it is here |
//! | `PUT /v1/blobs/{sha256}?size=N&from=M` | the next bytes (at most [`PIECE_MAX`]) of a file of N bytes → `Blob`; where `from` is not what is here, nothing is written, and the answer says where to go on; 413, 422 for another digest (all of it is to come again), 507 |
//! | `POST /v1/vms/{name}/blobs/{sha256}` | has it sent to the guest → `Transfer`: how far it is. To be asked again until it is `kept`; why it failed is said once, as an error |
//! | `POST /v1/vms/{name}/agent` | `AgentOrder` → `AgentAnswer`, once the guest has the program on its disk: it was sent before. 422 with the guest's own word (`agent-below-floor`, …) where it refuses |
//! | `GET /v1/access?as=CALLER&verb=VERB&vm=NAME&target=TARGET` | → `AccessDecision`: what the proxy would decide. CALLER is `user:NAME`, `group:NAME`, `token:NAME`, `cert:NAME`, `network:NAME`, `anyone` or `owner`; of a user its groups count |
//! | `GET /v1/resolve/{name}` | `VM` or `VM.HOST` → `Resolution`: the host that has it, and what each claims. Other hosts are asked |
//! | `GET /v1/resolve` | → `AllVms`: those of all hosts, and the rows of this host's map |
//! | `GET /v1/all-hosts/goals?newest=N` | → `AllGoals`: the newest N (at most 500) of all hosts, each once |
//! | `GET /v1/all-hosts/tasks?newest=N&goal=&state=` | → `AllTasks`: the same of tasks |
//! | `GET /v1/hosts` | → `Vec<HostShown>`: where clients reach the proxies of this host and of those that it knows |
//! | `GET /v1/grants?vm=NAME` | → `Vec<GrantShown>`: all, or those about a VM; `limit` and `after` as of `/v1/vms` |
//! | `GET /v1/config` | → `ConfigStatus`: what became of the configuration file |
//! | `POST /v1/reload` | reads the configuration again → `ConfigStatus`, once it is applied or refused |
//! | `POST /v1/shutdown?ports=true` | stops aditd, with `ports=true` the port processes too; not VMMs that are their VMs' own |
//! | `GET /metrics`, `/healthz`, `/readyz` | |
//! | `GET /sd/prometheus?port=9100` | → `Vec<Targets>`: the VMs that may be reached at that port, for `http_sd_configs` |
//!
//! A filter that names an unknown VM or goal is 404, and one that names an unknown state is 400: no empty list.
//!
//! Errors: status and `ErrorBody`. On a management listener also 401 (`log-in`, `bad-token`), 403 (`denied`), and 429 with `retry-after`
//! for wrong tokens; what a caller may not see is answered for as what is not there.
#![forbid(unsafe_code)]

mod carrier;
pub mod doctor;
mod event;
#[cfg(feature = "openapi")]
mod openapi;
mod state;
pub mod token;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use carrier::{CarrierName, NewAutoAt, NewCarrier, NewHybrid, NewKernel, NewVsock};
pub use event::{HostEvent, HostEventKind};
pub use state::{TaskState, VmState};

/// Version of these types, in every top-level answer.
pub const SCHEMA_VERSION: u32 = 1;

/// Header field with the cursor of a list's next page.
pub const NEXT: &str = "adit-next";

/// Header field with the cursor of a list's earlier elements, where the newest were asked for.
pub const EARLIER: &str = "adit-earlier";

/// Header field of a task's output of which something is missing: where, and how many bytes.
pub const LEFT_OUT: &str = "adit-left-out";

/// What a task's output has in place of bytes that are missing.
pub fn left_out(bytes: u64) -> String {
    format!("\n[adit: {bytes} bytes left out]\n")
}

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

/// Which program an agent is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Of a program that came over the channel, 64 hex digits; none: it is the one of the guest's image.
    pub sha256: Option<String>,
    /// The oldest version that the guest takes; none: any.
    pub floor: Option<String>,
    /// The program that was to be the agent last, and is not: 64 hex digits. `fault` says why.
    pub taken_back: Option<String>,
}

/// Has an agent become another program.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentOrder {
    /// The DSSE envelope of the package, exactly as signed: JSON text.
    pub envelope: String,
}

/// An agent's answer: it follows the order.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentAnswer {
    /// It is that program already.
    pub already: bool,
    /// It waits for the end of a task that runs.
    pub waits: bool,
}

/// A card that a guest shows.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Where the guest says that it found it.
    pub place: String,
    /// Which; none if it was not believed when it was shown.
    pub generation: Option<u64>,
    /// Id of the key that signed it; none as above.
    pub signer: Option<String>,
    /// RFC 3339; until when it is valid; none as above.
    pub not_after: Option<String>,
    /// Why this host does not believe it; none: it does.
    pub unproved: Option<String>,
}

/// A guest's own key.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestKey {
    /// The line of the public half.
    pub public: String,
    /// Why it may be anybody's; none: the card that is believed names it.
    pub unproved: Option<String>,
}

/// What a guest has taken of trust documents, as it says.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// The newest of each signer.
    pub documents: Vec<TrustTaken>,
    /// How many keys are revoked there.
    pub revoked: u32,
    /// Those that it did not take.
    pub refused: Vec<TrustRefused>,
}

/// A trust document that a guest has taken.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustTaken {
    /// Id of the key that signed it.
    pub signer: String,
    /// It is for this VM only.
    pub own: bool,
    /// Counts the documents of a signer.
    pub sequence: u64,
}

/// A trust document that a guest has not taken.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustRefused {
    /// Id of the key that signed it.
    pub signer: String,
    /// Which.
    pub sequence: u64,
    /// Why, in the guest's words: begins with a stable code.
    pub why: String,
}

/// A task that waits in the guest.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// 32 hex digits.
    pub task_id: String,
    /// RFC 3339; from when its goal is valid.
    pub valid_from: String,
    /// RFC 3339; what the guest's clock showed when it said so.
    pub guest_time: String,
}

/// What carries bytes between host and guest.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CarrierKind {
    /// The guest's own AF_VSOCK.
    #[default]
    Vsock,
    /// A ring in memory that both sides have.
    Ring,
}

/// Which carrier new dials of the agent's services take. What is reached as a vsock port takes vsock whatever this says.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carrier {
    /// Which.
    pub kind: CarrierKind,
    /// Why.
    pub why: String,
    /// The way to the guest: `vhost-user`, `device` (the VMM's own), `vhost-vsock` (the host's kernel), `hybrid`; a later aditd may have
    /// others. None: of a VM that takes whichever there is (`auto`), there is none yet.
    #[serde(default)]
    pub way: Option<String>,
    /// Who has chosen that way, and as what. With `auto`: why it is this one, and what of those before it is missing.
    #[serde(default)]
    pub way_why: Option<String>,
    /// What the VMM cannot do with the VM because of it: `migration`, `savevm`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forbids: Vec<String>,
    /// What that way costs.
    #[serde(default)]
    pub costs: Option<String>,
    /// The VMM's socket, where the VMM has one for each stream; none: it has a device, by vhost-user or in its own process.
    #[serde(default)]
    pub hybrid: Option<String>,
    /// The CID of a VM whose streams the host's kernel carries (vhost_vsock).
    #[serde(default)]
    pub kernel_cid: Option<u32>,
    /// What the ring's memory is and how it came; none: there is no ring.
    pub memory: Option<String>,
    /// Bytes of the ring's region.
    pub bytes: u64,
    /// What a read of a line of it takes on the host, ns, as measured when it came.
    pub line_ns: u32,
    /// How the guest is rung, as its agent says.
    #[serde(default)]
    pub doorbell: Option<String>,
    /// What 64 bytes take to the agent and back on an open stream over the ring, ns, as measured when the session began.
    #[serde(default)]
    pub rtt_ns: Option<u64>,
    /// The same over vsock, measured at the same time.
    #[serde(default)]
    pub vsock_rtt_ns: Option<u64>,
    /// Streams open over the ring now.
    pub streams: u32,
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

/// What is decided of a request.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessDecision {
    /// Whether it may be done.
    pub allowed: bool,
    /// Every name of the caller that counted.
    pub caller: Vec<String>,
    /// File and line of the grant that allows it; none: it is denied, or the owner's right.
    pub by: Option<String>,
    /// Why not, in a word: `unknown-vm`, `not-granted`, `expired`, `not-listed`, `no-rule`.
    pub reason: Option<String>,
    /// The same for people.
    pub text: String,
    /// The caller is told only that there is no such VM.
    pub hidden: bool,
}

/// A grant of the configuration.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantShown {
    /// File and line.
    pub place: String,
    /// To whom.
    pub to: Vec<String>,
    /// With which VMs.
    pub vms: Vec<String>,
    /// What may be done.
    pub may: Vec<String>,
    /// Until when; RFC 3339.
    pub until: Option<String>,
    /// Its time is over.
    pub expired: bool,
    /// Connections that each of them may open in a second; none: any number.
    // A build before does not say these.
    #[serde(default)]
    pub connections_per_s: Option<u32>,
    /// Bytes a second, each way, of each of them with one VM; none: any number.
    #[serde(default)]
    pub bytes_per_s: Option<u64>,
    /// How many times a client's share each of them has.
    #[serde(default)]
    pub weight: Option<u32>,
}

/// What became of the configuration file when it was read last: at the start, or at SIGHUP.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigStatus {
    /// How often it was read; 1 after the start.
    pub reads: u64,
    /// Why it was refused; none: it is applied, but for what `restart` names.
    pub error: Option<String>,
    /// What differs from what is running, and takes a restart; also a VM that could not be added or removed, and why.
    pub restart: Vec<String>,
    /// The version of aditd.
    #[serde(default)]
    pub version: Option<String>,
    /// Why users of this host who come over TCP are not known, so that grants to them do not count there; none: they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users_unknown: Option<String>,
    /// Directories in which VMs are found.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub discover: Vec<DiscoverShown>,
}

/// A directory in which VMs are found.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscoverShown {
    /// Its path.
    pub dir: String,
    /// What is looked for.
    pub pattern: String,
    /// VMs that are there because of it.
    pub vms: u32,
    /// What is there and not used, and why: a line each.
    pub refused: Vec<String>,
}

/// Most bytes of a file that one request brings.
pub const PIECE_MAX: usize = 512 << 10;

/// Targets for Prometheus, in the form of its HTTP service discovery.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    /// `VM:PORT`, as the proxy takes it.
    pub targets: Vec<String>,
    /// What Prometheus knows of them before it relabels.
    pub labels: BTreeMap<String, String>,
}

/// A file that aditd has for VMs.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// 64 hex digits.
    pub sha256: String,
    /// Bytes that are here, from its start.
    pub bytes: u64,
    /// Bytes that it will have; none: nothing is here.
    pub size: Option<u64>,
    /// All of it is here, and has that digest.
    pub whole: bool,
}

/// A file on its way into a guest.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// 64 hex digits.
    pub sha256: String,
    /// Bytes that the guest has or that are on their way.
    pub sent: u64,
    /// Bytes of the file.
    pub size: u64,
    /// The guest has all of it, on its disk.
    pub kept: bool,
}

/// Hands a signed goal over.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewGoal {
    /// The DSSE envelope, exactly as signed: JSON text.
    pub envelope: String,
    /// VMs to queue it for; empty: its audience.
    #[serde(default)]
    pub to: Vec<String>,
    /// Queue it even for a VM that its audience does not name; the guest decides (it will refuse).
    #[serde(default)]
    pub relay_unchecked: bool,
}

/// Hands a trust document over.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewTrust {
    /// The DSSE envelope, exactly as signed: JSON text.
    pub envelope: String,
    /// VMs to give it to; empty: all, also those that come, or the one that it is for.
    #[serde(default)]
    pub to: Vec<String>,
}

/// A trust document that is kept for guests.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptTrust {
    /// Id of the key that has signed it, as it says.
    pub signer: String,
    /// It is for one VM only.
    pub own: bool,
    /// Counts the documents of a signer.
    pub sequence: u64,
    /// VMs that are given it; empty: all.
    pub vms: Vec<String>,
    /// RFC 3339; since when.
    pub given_at: String,
}

/// A goal as the host knows it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goal {
    /// From its payload.
    pub goal_id: String,
    /// sha256 of the payload, hex.
    pub digest: String,
    /// RFC 3339.
    pub accepted_at: String,
    /// Its tasks, in order of VM and step; those of other hosts with them.
    pub tasks: Vec<Task>,
    /// Hosts that did not say what they have of it, and why: there may be more tasks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<Silent>,
}

/// A goal in a list: how far it is. Each step on each VM counts once, by its last attempt.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoalSummary {
    /// From its payload.
    pub goal_id: String,
    /// sha256 of the payload, hex.
    pub digest: String,
    /// Id of the key that signed it, as the goal itself says: 32 hex digits, or empty where that is not known.
    pub signer: String,
    /// Counts the goals of its key.
    pub key_seq: u64,
    /// RFC 3339; when this host accepted it.
    pub accepted_at: String,
    /// RFC 3339; from when it is valid.
    pub not_before: String,
    /// RFC 3339; until when it is valid.
    pub not_after: String,
    /// VMs for which this host has tasks of it.
    pub vms: u32,
    /// Steps of which this host has tasks.
    pub steps: u32,
    /// Steps on VMs that have not ended.
    pub open: u32,
    /// Steps on VMs that succeeded.
    pub done: u32,
    /// Steps on VMs that ended otherwise.
    pub failed: u32,
    /// The hosts whose tasks are counted, where several were asked; empty: this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
}

/// Goals of all hosts.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllGoals {
    /// The newest, by the time at which they were accepted first.
    pub goals: Vec<GoalSummary>,
    /// There are older ones.
    pub earlier: bool,
    /// Hosts that did not say what they have, and why.
    pub silent: Vec<Silent>,
}

/// Tasks of all hosts.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllTasks {
    /// The newest, by the time at which they were queued.
    pub tasks: Vec<Task>,
    /// There are older ones.
    pub earlier: bool,
    /// Hosts that did not say what they have, and why.
    pub silent: Vec<Silent>,
}

/// One task: one attempt of one step for one VM.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// 32 hex digits.
    pub task_id: String,
    /// Goal that ordered it.
    pub goal_id: String,
    /// VM that runs it.
    pub vm: String,
    /// The host that has it, where several were asked; none: this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Step of the goal.
    pub step: String,
    /// 1 for the first.
    pub attempt: u32,
    /// Where it stands.
    pub state: TaskState,
    /// Exit status of what ran.
    pub exit: Option<i32>,
    /// Why it ended so.
    pub reason: String,
    /// Of a refused one, the stable word for why: `policy`, `untrusted-key`, `wrong-target`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// RFC 3339; when it was queued.
    pub queued_at: String,
    /// RFC 3339 by the guest's clock.
    pub started_at: Option<String>,
    /// RFC 3339 by the guest's clock.
    pub ended_at: Option<String>,
    /// Bytes written to stdout and stderr.
    pub output_bytes: (u64, u64),
    /// The first bytes of stdout as text, at most 200, for lists.
    pub output_preview: String,
}

/// A change of a task.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskEvent {
    /// Counts changes on this host; 0 where `adit task watch -o json` has asked for the task after a stream ended.
    pub seq: u64,
    /// The task as it is now.
    pub task: Task,
}

/// What comes with every status of 400 and above.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Stable word, kebab-case: `unknown-vm`, `taken`, `bad-goal`, …
    pub code: String,
    /// What failed and why.
    pub message: String,
    /// What to do next; may be empty.
    pub help: String,
}
