//! A VMM on `vm-memory` 0.18 links the device through raw regions.

#[path = "../../suite/mod.rs"]
mod suite;

/// The trait of this version that lists regions.
use vm_memory::GuestMemoryBackend as Regions;
