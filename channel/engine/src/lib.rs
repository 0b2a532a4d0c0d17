//! Connection engine with virtio-vsock semantics: sans-IO, no payload, no clock, no lock, `no_std + alloc`.
//!
//! | module | what it holds |
//! |---|---|
//! | `engine` | [`Engine`]: the machine, its four families of methods and the diagram of a stream's life |
//! | `input`, `command`, `output` | `handle_*`; what the shell asks for; `poll_*` |
//! | `stream`, `table` | one stream's record; the slab, the map from port pair to slot and the intrusive lists |
//! | `credit` | the peer's window, our window, the pool that all windows of a VM are lent from |
//! | `ports`, `rst`, `timers` | ephemeral ports; resets for pairs that are no stream; deadlines |
//! | `packet`, `types`, `config` | what goes in and comes out |
//! | `frame` | a packet's header on a carrier of ours |
//!
//! The engine decides, a shell moves the bytes: see `adit-channel`. It does not check CIDs (the channel that a packet
//! came on says whose it is), does not speak seqpacket, and does not carry a reset reason over the wire (virtio has no
//! field for it).
//!
//! Source of the rules: virtio 1.3 §5.10.6, and what Linux's `virtio_transport_common.c` does where the text is silent.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

mod command;
mod config;
mod credit;
mod engine;
mod frame;
mod input;
mod output;
mod packet;
mod ports;
mod rst;
mod stream;
mod table;
mod timers;
mod types;

#[cfg(test)]
mod tests;

pub use config::EngineConfig;
pub use engine::{Engine, LISTEN_MAX, STREAMS_MAX};
pub use frame::FRAME_BYTES;
pub use packet::{Kind, Op, PacketHeader, SHUTDOWN_RCV, SHUTDOWN_SEND};
pub use rst::RST_MAX;
pub use types::{
    Answer, ConnectError, Disposition, Event, How, Lane, ListenError, PairChange, PeerReason,
    ResetReason, SessionChange, StreamId, Tick, Transmit, Violation,
};
