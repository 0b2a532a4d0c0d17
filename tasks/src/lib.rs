//! Goals, plans, tasks, reports and their signatures: pure (no clock, no IO), shared by host and guest.
//!
//! ```text
//!  draft (YAML, a person) ─ into_payload ─► goal JSON ─ dsse::sign ─► envelope ─► host: plan, queue
//!                                                                        │
//!                            guest: admit = verify, audience, time, sequence, step ─► Admitted ─► Report
//! ```
//! | module | what |
//! |---|---|
//! | `goal` | what a manager signs, strictly parsed |
//! | `action` | what a step does: a file a kind |
//! | `draft` | what a person writes (feature `yaml`) |
//! | `card` | who a guest is |
//! | `trust` | whom guests are to trust, and whom no longer |
//! | `ticket` | one thing that a guest is to do at once |
//! | `package`, `order` | which program a guest's agent is to be; the messages that say so |
//! | `dsse`, `key`, `anchor` | envelopes and signatures; keys; trust anchors and their roles |
//! | `plan` | goal and VM → tasks with derived ids |
//! | `principal` | whom a file is to belong to |
//! | `plain` | what a parser says, in plain words |
//! | `vms` | some VMs, as a grant or a command line names them |
//! | `window` | which goals of a key a guest has admitted |
//! | `admit` | what a guest checks before it does anything |
//! | `recent` | the envelopes that both ends of a stream have |
//! | `wire` | messages of the `tasks` service |
#![forbid(unsafe_code)]

pub mod action;
pub mod admit;
pub mod anchor;
pub mod card;
#[cfg(feature = "yaml")]
pub mod draft;
pub mod dsse;
pub mod freeze;
pub mod goal;
mod here;
pub mod key;
mod object;
pub mod order;
pub mod package;
pub mod plain;
pub mod plan;
mod principal;
pub mod recent;
pub mod ticket;
pub mod trust;
pub mod vms;
pub mod window;
pub mod wire;

pub use adit_names::{hex, unhex};

pub use action::{Action, Kind};
pub use admit::{Admitted, Denial, admit};
pub use anchor::{Anchor, Role, Roles, TrustStore};
pub use card::Card;
pub use goal::{Goal, Step};
pub use key::{KeyId, PublicKey};
pub use package::Package;
pub use plain::plain;
pub use plan::{PlannedTask, plan, task_id};
pub use principal::Principal;
pub use ticket::Ticket;
