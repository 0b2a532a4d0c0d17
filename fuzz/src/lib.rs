//! Arbitrary bytes in place of a guest, a peer or a frontend. A target panics when a rule is broken. That something is refused is
//! not an error.
//!
//! | target | whose bytes | compared with |
//! |---|---|---|
//! | `descriptor_chain` | the guest's: descriptors and tables over memory with a seam, a hole and an end | an independent walk; only bytes that should change do, and each is marked dirty |
//! | `vsock_packet` | the guest's: well-framed packets through virtqueues, device and engine | what was sent, in both directions; `shell` |
//! | `port_packet` | the same, over a port with services | no fault, never too many streams |
//! | `engine_ops` | the peer's packets and the shell's calls, in any order | `shell`: each id once, windows inside the pool, credit never exceeded |
//! | `vhost_user_messages` | the frontend's: messages and descriptors on its socket | complete answers, no leak, the next frontend is served |
//! | `mem_table` | the frontend's: regions over files of any kind and size | the rules in 128 bits; no leak, no SIGBUS |
//! | `record` | the producer's: a ring's memory | a second reader |
//! | `ring_ops` | calls of both ends in any order, and a peer that overwrites any word | a queue |
//! | `ring_packet` | the other side's of a ring: packets, restarts, any word of the region | what was sent, in both directions; `shell` |
//! | `ring_function` | the guest's of a ring's PCI function: accesses, and saved states of any origin | a second reader of the saved state |
//! | `attach` | both sides' words, and the head of a region | two new sides reach a session |
//! | `card` | the platform's and a signer's: a card, and the places that it is carried in | JSON without rules; what is believed is in its limits |
//! | `trust` | the host's and a signer's: a trust document, where it is carried, and what a guest keeps of it | JSON without rules; what is taken is in its limits, and no revoked key is left |
//! | `ticket` | a signer's and the host's: a ticket, a sealed stream, and which tickets come again while the clock goes anywhere | JSON without rules; what is believed is in its limits, nothing comes out that was not sealed, none is used twice |
//! | `policy` | a guest's policy file | its limits; mistakes have places; a rule less allows nothing more |
//! | `package` | the host's: an agent's package, and what is said to carry files and orders | JSON without rules; what is taken is in its limits, and written again is the same |
//! | `http_head` | a client's head of a request | a second reader, as hyper has it; written anew it stays |
//! | `authority` | a client's name of a VM and a port | one spelling, in every case |
//! | `socks5` | a SOCKS5 client's | itself in other pieces; a second reader of what it asks for |
//! | `gate` | a client's of `adit proxy`: heads, bodies, SOCKS5 | a second reader of what a host gets of it; itself in other pieces; it ends |
//! | `hybrid_connect` | a VMM's answer to `CONNECT`, and a client's line to ours | itself in other pieces; a second reader |
//! | `hybrid_frames` | an agent's chunks, where the VMM does not keep half-closes | itself in other pieces; a second reader; what a writer makes |
//! | `client_hello_sni` | a TLS client's first message | a part of itself |
//! | `dns_query` | a DNS client's | a second reader of header and question; a bound on the answer |
//! | `grants` | an operator's grants, and a caller's names | one spelling; a second reader of the decision |
//! | `copy_frames` | a sender's of files, a receiver's, or a hello's arguments | the order and the tree; a frame is written as it was read |
//! | `exec_frames` | a client's of a command, and a guest's to `adit exec` | itself in other pieces; what is kept is bounded |
//! | `succession` | a predecessor's that its guest controls: handover record, live file, unread bytes | a verdict in time, no leak, no thread lost |
//!
//! Seeds are in `corpus/TARGET/`: a minimal set of what libFuzzer found that still reaches every place it reached, and every input
//! that ever broke a rule. `cargo test` replays them, and `cargo xtask fuzz` continues from them with libFuzzer.
//!
//! Executions under libFuzzer so far: ten million each of `mem_table`, `engine_ops`, `vhost_user_messages`, `vsock_packet`,
//! `record`, `ring_ops` and `attach`; `descriptor_chain` 6,889,556 with dirty pages and 5,332,276 with a dirty bit for sixteen
//! bytes; `ring_packet` 486,798; `ring_function` 398,203; `port_packet` 157,237; `succession` 64,373;
//! `policy` 748,433. Found: a SIGPIPE in a
//! process that does not ignore it (`succession`); bytes other than zero behind a dropped grant (`ring_ops`). Faults that were
//! planted on purpose are found.

mod attach;
mod authority;
mod card;
mod client_hello_sni;
mod copy_frames;
mod descriptor_chain;
mod dns_query;
mod engine_ops;
mod exec_frames;
mod gate;
mod grants;
mod http_head;
mod hybrid_connect;
mod hybrid_frames;
mod input;
mod mem_table;
mod package;
mod pattern;
mod policy;
mod port_packet;
mod record;
mod ring_function;
mod ring_ops;
mod ring_packet;
mod shell;
mod socks5;
mod succession;
mod ticket;
mod trust;
mod vhost_user_messages;
mod vsock_packet;

use std::path::{Path, PathBuf};

/// Runs one input.
pub type Target = fn(&[u8]);

/// The targets by name.
pub const TARGETS: [(&str, Target); 28] = [
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
    ("card", card::run),
    ("trust", trust::run),
    ("ticket", ticket::run),
    ("package", package::run),
    ("policy", policy::run),
    ("http_head", http_head::run),
    ("authority", authority::run),
    ("socks5", socks5::run),
    ("gate", gate::run),
    ("hybrid_connect", hybrid_connect::run),
    ("hybrid_frames", hybrid_frames::run),
    ("client_hello_sni", client_hello_sni::run),
    ("dns_query", dns_query::run),
    ("grants", grants::run),
    ("copy_frames", copy_frames::run),
    ("exec_frames", exec_frames::run),
];

/// The directory of a target's seeds.
pub fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target)
}
