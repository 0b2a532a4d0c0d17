//! The guest owner's policy: what may run here and what the host may dial, whoever has signed or dialled it.
//!
//! ```text
//!  /etc/adit-guest/policy.toml ── source: root's alone? ─► parse: every mistake, or a Policy ─► Standing: in force, closed, none
//!                                                                                                  │
//!   a task (exec::permit), a dial (serve), `adit-guest policy explain` ── accounts: numbers ──► decide: Allow{line} | Deny{line, why}
//! ```
//! It is the third of three that must all agree: the manager's signature, the host's rules, and this. What the agent's
//! configuration forbids stays forbidden, whatever a policy allows.

pub mod accounts;
pub mod command;
pub mod decide;
pub mod keys;
pub mod parse;
pub mod source;
pub mod standing;

pub use accounts::Touches;
pub use decide::{Policy, is_plain};
pub use parse::Problem;
pub use source::PolicyError;
pub use standing::{Answer, DEFAULT_FILE, Standing, file_of};
