//! Connection engine with virtio-vsock semantics: sans-IO, no payload, no clock, no lock, `no_std + alloc`.
//!
//! | module | what it contains |
//! |---|---|
//! | `engine` | [`Engine`]: the state machine, its four families of methods and the diagram of a stream's life |
//! | `input`, `command`, `output` | `handle_*`; the commands of the shell; `poll_*` |
//! | `stream`, `table` | the record of one stream; the slab, the map from port pair to slot and the intrusive lists |
//! | `credit` | the peer's window, our window, and the pool that lends all windows of a VM |
//! | `ephemeral`, `rst`, `timers` | ephemeral ports; resets for pairs that have no stream; deadlines |
//! | `packet`, `types`, `config` | inputs and outputs |
//! | `ring_packet` | the packet header as the ring carrier encodes it |
//!
//! The engine decides, and a shell moves the bytes: see `adit-channel`. The engine does not check CIDs (the channel on
//! which a packet arrives tells whose it is) and does not support seqpacket. It sends no reset reason over virtio,
//! which has no field for it.
//!
//! Source of the rules: virtio 1.3 §5.10.6, and Linux's `virtio_transport_common.c` where the text is silent.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

mod command;
mod config;
mod credit;
mod engine;
mod ephemeral;
mod input;
mod output;
mod packet;
mod ring_packet;
mod rst;
mod stream;
mod table;
mod timers;
mod types;

#[cfg(test)]
mod tests;

pub use config::EngineConfig;
pub use engine::{Engine, LISTEN_MAX, STREAMS_MAX};
pub use packet::{Kind, Op, PacketHeader, SHUTDOWN_RCV, SHUTDOWN_SEND};
pub use ring_packet::PACKET_HEADER_BYTES;
pub use rst::RST_MAX;
pub use types::{
    Answer, ConnectError, Disposition, Event, How, Lane, ListenError, PairChange, PeerReason,
    ResetReason, SessionChange, StreamId, Tick, Transmit, Violation,
};
