//! Connection engine with virtio-vsock semantics: sans-IO, no payload, no clock.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;

mod engine;
mod packet;

pub use engine::*;
pub use packet::{Kind, Op, PacketHeader, SHUTDOWN_RCV, SHUTDOWN_SEND};
