//! What a ring needs of a system: [`doorbell`]s that wake the other side, [`blocking`] ends that sleep, ends for tokio
//! (`asynchronous`, feature `tokio`), and the sockets over which a region changes hands: from a VMM to whoever serves it
//! ([`attach`]), and from whoever serves it to a stock QEMU ([`ivshmem`]).
//!
//! The ring itself (`adit-ringbuf`) knows no clock and no descriptor. An end here owns one direction of one lane; whoever
//! serves several lanes in one loop polls `adit-ringbuf`'s own ends, and waits on the doorbell once.

#[cfg(feature = "tokio")]
pub mod asynchronous;
pub mod attach;
pub mod blocking;
pub mod doorbell;
pub mod ivshmem;
pub mod passed;
mod spin;

pub use spin::Spin;
