//! Carriers, the virtio-vsock device, `Port`s and shards, streams, hello and message frames.
#![cfg_attr(not(feature = "device"), forbid(unsafe_code))]

#[cfg(feature = "device")]
mod backlog;
#[cfg(feature = "device")]
pub mod carrier;
pub mod chunk;
#[cfg(feature = "device")]
pub mod device;
#[cfg(feature = "device")]
pub mod dial;
#[cfg(feature = "device")]
pub mod either;
#[cfg(feature = "device")]
pub mod foreign;
pub mod frame;
pub mod hello;
#[cfg(feature = "device")]
pub mod hybrid;
#[cfg(feature = "device")]
mod inbox;
#[cfg(feature = "device")]
pub mod linked;
#[cfg(feature = "device")]
pub mod live;
#[cfg(feature = "device")]
pub mod polling;
#[cfg(feature = "device")]
pub mod port;
#[cfg(feature = "device")]
pub mod rate;
pub mod refusal;
#[cfg(feature = "ring")]
pub mod ring;
#[cfg(feature = "device")]
pub mod shard;
#[cfg(feature = "device")]
pub mod sink;
#[cfg(feature = "socket")]
pub mod socket_end;
#[cfg(feature = "socket")]
pub mod socket_path;
#[cfg(feature = "device")]
pub mod stream;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;
