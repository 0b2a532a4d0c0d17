//! How something in a VM is reached, whoever asks for it and in whichever protocol.
//!
//! ```text
//! front end ── Caller, Destination ──► find ─┬─► here: decide ──► a share of the VM ──► dial ──► open
//!     ▲                              unknown  └─► there: that host does all of this
//!     └───────────── Refusal ◄───────────┴──────────────┴──────────────┴──────────────┘
//! ```
//! A front end makes a [`Caller`](crate::access::Caller) and a [`Destination`] from what its client says. It is told that the stream is open, or why
//! not: a [`Refusal`](adit_channel::refusal::Refusal), which it says in its protocol. Its client's end is the client's own socket
//! ([`Admitted::hand_over`]) or one of aditd's ([`Admitted::relayed`]). It knows no rule, no list and no control socket.
//! [`choose`](resolve::choose), [`VmMap`](map::VmMap) and [`decide`](crate::access::Grants::decide) are pure: they read no clock, take no lock and do no IO.

pub mod dial;
pub mod find;

pub use adit_reach::{destination, map, resolve, rows};

pub use crate::link::ClientSocket;
pub use destination::{Destination, DestinationError, Suffix};
pub use dial::{Admitted, DIAL_LIMIT, Lasts, NotOpened, Over, admit, refusal, share};
