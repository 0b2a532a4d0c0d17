//! What a ring needs from the operating system: [`doorbell`]s that wake the other side, [`blocking`] ends that sleep,
//! ends for tokio (`asynchronous`, feature `tokio`), and two sockets that hand over a region: from a VMM to the
//! process that serves it ([`attach`]), and from that process to an unmodified QEMU ([`ivshmem`]).
//!
//! The ring itself (`adit-ringbuf`) uses no clock and no descriptor. An end in this crate owns one direction of one
//! lane. A loop that serves several lanes uses the ends of `adit-ringbuf` directly, and waits on the doorbell once.

#[cfg(feature = "tokio")]
pub mod asynchronous;
pub mod attach;
pub mod blocking;
pub mod doorbell;
pub mod ivshmem;
pub mod passed;
mod spin;

pub use spin::Spin;
