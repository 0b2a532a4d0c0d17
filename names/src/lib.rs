//! Names that host, guest and port process spell alike, and texts of others made fit to show. A name has exactly one spelling: a text with upper case, Unicode, a
//! prefix, a trailing dot or NUL is refused, not folded, so that no two texts mean one thing and no text means two.
//!
//! | module | what |
//! |---|---|
//! | `vm_id` | a VM |
//! | `service` | a service on the well-known port of a guest or a host |
//! | `name` | the check that both have, and why a name is refused |
//! | `hex` | bytes as hex |
//! | `by_text` | serde for a type that is written as its text |
//! | `escape` | text that somebody else wrote, for terminals and logs |
#![forbid(unsafe_code)]

mod by_text;
mod escape;
mod hex;
mod name;
mod service;
mod vm_id;

pub use escape::{Escaped, escape, is_unsafe};
pub use hex::{hex, unhex};
pub use name::NameError;
pub use service::ServiceName;
pub use vm_id::VmId;

#[doc(hidden)]
pub use serde as __serde;
