//! What a guest, a peer or a frontend may say, made of arbitrary bytes. A target panics when a rule is broken; it says
//! nothing about what is merely refused.
//!
//! | target | whose bytes | held against |
//! |---|---|---|
//! | `descriptor_chain` | the guest's: descriptors and tables over memory with a seam, a hole and an end | a second walk that knows nothing of the device's; every byte that changed was to, and is marked dirty |
//! | `vsock_packet` | the guest's: packets, well-framed, over rings, device and engine | what was put in, both ways; `shell` |
//! | `port_packet` | the same over a port with services | no fault, no stream too many |
//! | `engine_ops` | the peer's packets and the shell's calls, in any order | `shell`: ids once, windows inside the pool, credit never over-run |
//! | `vhost_user_messages` | the frontend's: messages and descriptors on its socket | whole answers, no leak, the next frontend is served |
//! | `mem_table` | the frontend's: regions over files of any kind and size | the rules in 128 bits; no leak, no SIGBUS |
//! | `record` | the producer's: a ring's memory | a second reader |
//! | `ring_ops` | calls of both ends in any order, and a peer that writes over any word | a queue |
//! | `ring_packet` | the other side's of a ring: packets, a new beginning, any word of the region | what was put in, both ways; `shell` |
//! | `ring_function` | the guest's of a ring's PCI function: accesses, and states from anywhere | a second reader of what it saves |
//! | `attach` | both sides' words, and the head of a region | who begins anew comes to run |
//! | `succession` | a predecessor's, in its guest's hands: handover record, live file, unread bytes | a verdict in time, no leak, no thread lost |
//!
//! Seeds stand in `corpus/TARGET/`: the least of what libFuzzer found that reaches every place it reached, and every input
//! that ever broke something. `cargo test` replays them, `cargo xtask fuzz` goes on from them with libFuzzer.
//!
//! Executions under libFuzzer so far: ten million each of `mem_table`, `engine_ops`, `vhost_user_messages`, `vsock_packet`,
//! `record`, `ring_ops` and `attach`; `descriptor_chain` 6,889,556 with dirty pages and 5,332,276 with dirty bytes by sixteen;
//! `ring_packet` 486,798; `ring_function` 398,203; `port_packet` 157,237; `succession` 64,373. Found: a SIGPIPE in a process that does not ignore it
//! (`succession`); zeroes that were none any more behind a dropped grant (`ring_ops`). Faults that were planted are found.

mod attach;
mod descriptor_chain;
mod engine_ops;
mod input;
mod mem_table;
mod pattern;
mod port_packet;
mod record;
mod ring_function;
mod ring_ops;
mod ring_packet;
mod shell;
mod succession;
mod vhost_user_messages;
mod vsock_packet;

use std::path::{Path, PathBuf};

/// Runs one input.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Target); 12] = [
    ("descriptor_chain", descriptor_chain::run),
    ("vsock_packet", vsock_packet::run),
    ("port_packet", port_packet::run),
    ("engine_ops", engine_ops::run),
    ("vhost_user_messages", vhost_user_messages::run),
    ("mem_table", mem_table::run),
    ("succession", succession::run),
    ("record", record::run),
    ("ring_ops", ring_ops::run),
    ("attach", attach::run),
    ("ring_packet", ring_packet::run),
    ("ring_function", ring_function::run),
];

/// Where the seeds of a target lie.
pub fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target)
}
