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

mod access;
mod carrier;
pub mod doctor;
mod event;
mod goals;
mod guest;
mod hosts;
#[cfg(feature = "openapi")]
mod openapi;
mod state;
pub mod token;
mod vm;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use access::{AccessDecision, GrantShown};
pub use carrier::{
    Carrier, CarrierKind, CarrierName, NewAutoAt, NewCarrier, NewHybrid, NewKernel, NewVsock,
};
pub use event::{HostEvent, HostEventKind};
pub use goals::{AllGoals, AllTasks, Goal, GoalSummary, NewGoal, Task, TaskEvent};
pub use guest::{
    AgentAnswer, AgentOrder, Blob, Card, GuestKey, Holding, KeptTrust, NewTrust, PIECE_MAX,
    Program, StoodStill, Transfer, Trust, TrustRefused, TrustTaken,
};
pub use hosts::{AllVms, HostAnswer, HostShown, Resolution, Silent, VmAt};
pub use state::{TaskState, VmState};
pub use vm::{
    Frozen, LOCK_REASON_MAX, LastDial, NewFreeze, NewLock, NewVm, Refused, Vm, VmChange, VmFault,
    VmLock,
};

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

/// Targets for Prometheus, in the form of its HTTP service discovery.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    /// `VM:PORT`, as the proxy takes it.
    pub targets: Vec<String>,
    /// What Prometheus knows of them before it relabels.
    pub labels: BTreeMap<String, String>,
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
