//! Who may do what with which VM.
//!
//! ```text
//!  connection ─► caller: who is it? ─┐
//!  aditd.toml ─► grants ─────────────┼─► decide ─► Allow | Deny ─► audit
//!  VM: lists, labels ────────────────┘
//! ```
//!
//! | module | what |
//! |---|---|
//! | `subject`, `caller` | names of who may ask; who asks |
//! | `grant` | what the configuration grants to whom, with which VMs |
//! | `decide` | the decision. Pure, as are those before it: front ends, `adit access` and tests ask the same function |
//! | `callers`, `diag`, `tokens`, `certificate` | finds out who is at the other end of a connection |
//! | `log_in`, `guesses`, `client` | a token that is shown; who has shown too many wrong ones (pure), and who is one client |
//! | `rate`, `limits` | how many connections, and how many bytes, a second |
//! | `audit` | what was denied |
//! | `tag`, `enforce` | tunnels that end with their grant |

pub mod audit;
pub mod caller;
pub mod callers;
pub mod certificate;
pub mod client;
pub mod decide;
pub mod diag;
pub mod enforce;
pub mod grant;
pub mod guesses;
pub mod limits;
pub mod log_in;
pub mod rate;
pub mod subject;
pub mod tag;
pub mod tokens;

pub use caller::Caller;
pub use decide::{Access, Denial, Grants, Reason, Verb, VmView};
pub use grant::{Grant, May, Users};
pub use subject::Subject;
