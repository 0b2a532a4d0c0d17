//! Commands in a guest, without IO: what is said on a stream of the service `exec`, and what each end keeps of a session.
//!
//! ```text
//! adit ── Client ── frames (`wire`) ── Session ── the session process in the guest: pipes or a terminal, the child
//!                                        │
//!                                        └ a Spool for each output; input that the child has not read yet
//! ```
//! A hello says as whom and what ([`Asked`]); aditd has written it, and the guest believes nothing else about either. The first frame
//! says the rest.
//!
//! | rule | by |
//! |---|---|
//! | nothing is kept without bound | [`SPOOL_MAX`] of each output, [`STDIN_WINDOW`] of the input; whoever has more waits |
//! | nothing is lost unseen | every piece has its offset, and the end says how many bytes there were |
//! | a signal never waits behind input | input is sent only as far as the guest has said it takes |
//!
//! What it never does: read a clock, start anything, or decide who may.
#![forbid(unsafe_code)]

mod asked;
mod client;
#[cfg(feature = "seal")]
pub mod seal;
mod session;
mod spool;
mod stdin;
mod wire;

pub use asked::{Asked, USER_MAX, WHAT_MAX, What};
pub use client::{Client, ClientError, Heard};
pub use session::{Effect, Gone, Next, Session, Violation};
pub use spool::{SPOOL_MAX, Spool};
pub use stdin::STDIN_WINDOW;
pub use wire::{
    ARGV_BYTES_MAX, ARGV_MAX, Attach, DATA_MAX, Decoder, ENV_MAX, Exit, FRAME_MAX, How, Message,
    Open, OpenError, Out, ROWS_MAX, Refused, Row, Size, Started, TEXT_MAX, ToClient, ToGuest,
    WireError, refusal,
};

/// Name of the service.
pub const SERVICE: &str = "exec";
