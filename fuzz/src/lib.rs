//! What a guest, a peer or a frontend may say, made of arbitrary bytes. A target panics when a rule is broken; it says
//! nothing about what is merely refused.
//!
//! | target | whose bytes |
//! |---|---|
//! | `descriptor_chain` | the guest's: descriptors, indirect tables, both rings, under a device in use |
//! | `vsock_packet` | the guest's: packets, well-framed, over device, engine and port |
//! | `engine_ops` | the peer's packets and the shell's calls, in any order |
//! | `vhost_user_messages` | the frontend's: messages and descriptors on its socket |
//! | `mem_table` | the frontend's: regions over files of any kind and size |
//!
//! Seeds stand in `corpus/TARGET/`; every input that ever broke something is added there. `cargo test` replays them,
//! `cargo xtask fuzz` goes on from them with libFuzzer.

mod descriptor_chain;
mod engine_ops;
mod mem_table;
mod vhost_user_messages;
mod vsock_packet;

use std::path::{Path, PathBuf};

/// Runs one input.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Target); 5] = [
    ("descriptor_chain", descriptor_chain::run),
    ("vsock_packet", vsock_packet::run),
    ("engine_ops", engine_ops::run),
    ("vhost_user_messages", vhost_user_messages::run),
    ("mem_table", mem_table::run),
];

/// Where the seeds of a target lie.
pub fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target)
}
