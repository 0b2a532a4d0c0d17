//! Files of any size, named by their content: what is under a name has that sha256.
//!
//! ```text
//!   a piece, and another ─► HEX-SIZE.part ── whole? its digest? ─► fsync ─► HEX ─► fsync of the directory
//!                            └ stays, and is gone on with               └ read by whoever holds it
//! ```
//! | file | what |
//! |---|---|
//! | `digest` | the name of a blob |
//! | `store` | blobs in a directory: limits, what goes when there is no room |
//! | `disk` | changes on disk, each of which a test may be cut off at |
//! | `wire` | what host and guest say while one is carried |
#![forbid(unsafe_code)]

mod digest;
pub mod disk;
pub mod store;
pub mod wire;

pub use digest::{Digest, DigestError};
pub use store::{Begun, BlobError, Limits, Present, Reading, Store, Writing};
