//! What names of VMs mean, and which host has them: what `aditd`'s proxy and that of a client machine (`adit proxy`) have in common.
//!
//! | module | what |
//! |---|---|
//! | [`destination`] | what host names mean |
//! | [`authority`] | how HTTP spells a destination |
//! | [`socks5`] | SOCKS5, without its socket |
//! | [`map`] | what hosts say of where VMs are, for as long as it counts |
//! | [`rows`] | a file that says which host has a VM |
//! | [`resolve`] | which of several hosts has a VM |
//!
//! All of it is pure: no clock, no lock, no IO.
#![forbid(unsafe_code)]

pub mod authority;
pub mod destination;
pub mod map;
pub mod resolve;
pub mod rows;
pub mod socks5;

pub use destination::{Destination, DestinationError, Suffix};
