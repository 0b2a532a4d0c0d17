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
//! | `package`, `order` | which program a guest's agent is to be; the messages that say so |
//! | `dsse`, `key`, `anchor` | envelopes and signatures; keys; trust anchors and their roles |
//! | `plan` | goal and VM → tasks with derived ids |
//! | `principal` | whom a file is to belong to |
//! | `plain` | what a parser says, in plain words |
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
pub mod goal;
pub mod key;
mod object;
pub mod order;
pub mod package;
pub mod plain;
pub mod plan;
mod principal;
pub mod recent;
pub mod trust;
pub mod window;
pub mod wire;

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

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
            // Writing to a String cannot fail.
            let _ = write!(out, "{b:02x}");
            out
        })
}

/// The bytes of lower-case hex of exactly this length.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}
