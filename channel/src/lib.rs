//! Carriers, the virtio-vsock device, ports and shards, streams, hello and message frames.
#![cfg_attr(not(feature = "device"), forbid(unsafe_code))]

#[cfg(feature = "device")]
pub mod carrier;
pub mod frame;
pub mod hello;
pub mod name;
