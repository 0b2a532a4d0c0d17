//! Files of a guest: what is said on a stream of the service `files`, what each end believes of the other, and how either of them reads and
//! writes a tree.
//!
//! ```text
//! adit ── Begin ──► guest: is it this user's, beneath what the policy and the grant name? ── Ready
//!   write: adit is the sender      send(Source) ══ Entry · Data* · End · … ══► receive(Target)      guest is the receiver
//!   read:  guest is the sender     send(Source) ══ the same ══════════════════► receive(Target)     adit is the receiver
//!   list, stat, remove, wait: ◄ Rows* · Done
//! ```
//! Both sides use the same code, so neither can be led out of its target by the other, whoever lies (R122).
//!
//! | module | what |
//! |---|---|
//! | `asked` | the arguments of a hello: as whom, what, where, and beneath which directory |
//! | `wire` | messages; names that may be in them |
//! | `incoming`, `outgoing` | what a receiver takes of a sender, and a sender of a receiver: without IO |
//! | `tree` | the IO: a directory that nothing leads out of, sources, targets, lists, waiting |
//!
//! What it never does: decide who may, or start anything.
#![forbid(unsafe_code)]

mod asked;
mod incoming;
mod outgoing;
pub mod tree;
mod wire;

pub use asked::{Asked, PATH_MAX, USER_MAX, What, is_plain};
pub use incoming::{Incoming, Told};
pub use outgoing::{Heard, Outgoing};
pub use wire::{
    Begin, DATA_MAX, DEPTH_MAX, Data, End, Entry, FRAME_MAX, Have, Kind, LEN_MAX, Message,
    NAME_MAX, NameError, Place, ROWS_MAX, Refused, Row, Skipped, TEXT_MAX, TREE_PATH_MAX, Totals,
    Violation, WireError, check_path, refusal, text,
};

/// Name of the service.
pub const SERVICE: &str = "files";
