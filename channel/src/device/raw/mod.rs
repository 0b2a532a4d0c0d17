//! What a VMM needs that has another version of the rust-vmm crates than this one, or none: guest memory as addresses
//! and pointers ([`RawMemory`]), interrupts as eventfds or a function ([`EventFdSignal`], [`FnSignal`]), and kicks that
//! it sends itself ([`Kicks`]). Queues are plain numbers everywhere ([`QueueConfig`](super::QueueConfig)).
//!
//! ```text
//!  the VMM's memory, of any type                         this crate
//!  region at 0x0         ─► RawRegion { guest_addr: 0, len, host, dirty } ─┐
//!  region at 0x1_0000_0000 ─► RawRegion { … }                              ├─► Arc<RawMemory> ─► the device
//!  what keeps them mapped  ─► owner ───────────────────────────────────────┘     (its only way into the guest)
//! ```
//! `Arc<RawMemory>` implements the traits of our `vm-memory`, so the device has one code for all guest memory. The
//! VMM names none of those traits.
//!
//! # Who keeps the memory mapped, and until when
//! The VMM, until the `owner` that it passed to [`RawMemory::new`] is dropped. That happens when the last
//! `Arc<RawMemory>` is dropped. The device drops its own:
//!
//! | call | when it returns |
//! |---|---|
//! | `set_memory(new)` | the device uses the new set only |
//! | `reset`, `halt` | the device uses no guest memory |
//! | drop of the device | as above |
//!
//! So a VMM that gives its own reference-counted mapping as `owner` need not think about it. One that unmaps by itself
//! first calls `set_memory` or `reset`, and then unmaps.
//!
//! # Dirty pages
//! Everything that the device writes is reported to the region's `dirty`: packet headers, payload (also that which the
//! kernel copies from a socket), used elements, indices and event indices. It is called on the thread that runs the
//! device, after the bytes were written.

mod error;
mod memory;
mod region;
mod signal;

pub use error::RawMemoryError;
pub use memory::{REGIONS_MAX, RawMemory};
pub use region::{DirtyFn, PAGE_BYTES, RawRegion};
pub use signal::{EventFdSignal, FnSignal, Kicks};

#[cfg(test)]
mod tests;
