//! The virtio test harness: a software guest driver for the virtio-vsock device, in this process.
//!
//! It posts the same buffers as Linux, so that a test, a fuzz target or a bench drives the device without a VM:
//!
//! | | Linux 6.1 | Linux 6.12 |
//! |---|---|---|
//! | RX | 44 + 4096 bytes in two descriptors | 4 KiB in all, header included, in one |
//! | TX | header + 1 data descriptor | header + 1..17 data descriptors |
//! | both | queue size 128, EVENT_IDX, indirect descriptors for TX when there is more than one buffer |
//!
//! - [`memory`]: guest memory, anonymous or in a sealed memfd, and its layout.
//! - [`queue`]: the driver's side of one split virtqueue, down to raw descriptors for hostile tests.
//! - [`driver`]: both queues of a virtio-vsock driver.
//! - [`guest`]: a guest that kicks and waits, while the device runs on another thread.
//! - [`session`]: the device as a carrier whose session begins.
//! - [`service`]: services of the host, for the other end of its streams.
//! - [`stream`]: the guest's side of one connection: credit, fwd_cnt, half-close.
//!
//! What it is **not**: a model of the guest kernel's sockets. A real guest is booted in `tests/`.

pub mod driver;
pub mod guest;
pub mod memory;
pub mod queue;
pub mod service;
pub mod session;
pub mod stream;

pub use driver::{Driver, DriverConfig, RxShape};
pub use guest::Guest;
pub use memory::VmMemory;
