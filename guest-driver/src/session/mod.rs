//! Sessions of the service `exec`: each command has a process beside the agent, which is this program again.
//!
//! ```text
//! host ══ stream ══▶ agent: hello, policy ── spawns, gives it the stream ──▶ session process ── pipes or a terminal ── command
//!                      │                                                        ▲
//!                      └─ attach, list, end: RUN_DIR/exec/ID, with the stream ──┘
//! ```
//! The session process has the stream, the command and what it has written; so it goes on when the agent is killed, restarted or
//! replaced by another one, which finds it by its socket. It is in a cgroup beside the agent's, and what it has started is in one of
//! its own. Where the stream is no socket of the kernel's (a ring, chunks), the agent carries its bytes, and its end is the stream's.
//!
//! It never waits in a call: it sleeps in one `poll`, with a timer only where something ends by time.

pub mod ask;
pub(crate) mod child;
mod link;
pub mod place;
mod process;

use std::path::PathBuf;

use adit_exec::seal::Keys;
use adit_exec::{Open, Refused, TEXT_MAX};
use serde::{Deserialize, Serialize};

pub(crate) use self::child::take_stdout;
pub use self::process::run;

/// Variable by which a session's processes are known to people.
pub const MARKER: &str = "ADIT_SESSION_ID";
/// Most bytes of what a session process is told at its start.
pub const SPEC_MAX: u64 = 1 << 20;

/// What a session process is told by the agent that starts it: the same program, so there are no versions of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The session's id.
    pub id: String,
    /// As whom, a name of /etc/passwd.
    pub user: String,
    /// The program: its absolute path, as the policy has allowed it.
    pub program: PathBuf,
    /// The rest.
    pub open: Open,
    /// Where its socket is to be.
    pub run_dir: PathBuf,
    /// Where a cgroup can be made, if anywhere.
    pub cgroups: Option<PathBuf>,
    /// Id of the key that has signed a ticket for it; none: the host says so. Only a ticket does anything to one that a ticket began.
    pub by: Option<String>,
    /// What its stream is sealed with.
    pub seal: Option<Keys>,
    /// A file with its input, which is removed once it is open.
    pub input: Option<PathBuf>,
}

/// A refusal for a client.
pub fn refused(reason: u16, text: impl Into<String>) -> Refused {
    let mut text = text.into();
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    Refused { reason, text }
}
