//! The IO of a copy, on a blocking stream: the same for the guest and for `adit`.
//!
//! | file | what |
//! |---|---|
//! | `beneath` | a directory that no path leads out of |
//! | `source` | reads a file or a tree, and sends it |
//! | `target` | where a tree goes; receives it |
//! | `writer` | writes it: each file beside its place, and renamed at its end |
//! | `list` | what is in a directory; removes |
//! | `wait` | until something is there |
//! | `link` | the stream, and what can go wrong |

mod beneath;
mod link;
mod list;
mod source;
mod target;
mod wait;
mod writer;

pub use beneath::{Follow, Root};
pub use link::{Fault, Stream, Watch};
pub use list::{list, remove, stat};
pub use source::{Source, send};
pub use target::{Sink, Target, receive};
pub use wait::wait;

/// Most levels of directories; each holds a descriptor while it is read.
pub const LEVELS_MAX: usize = crate::wire::DEPTH_MAX;
