//! What a guest without an operating system does, and how it and its VMM understand each other.
//!
//! The image runs in user mode with the right to use ports, on identity page tables that the VMM made: no kernel and no
//! interrupt handler. So it runs at full speed even under a KVM that emulates kernel mode, where no Linux
//! boots.
#![no_std]
extern crate alloc;
#[cfg(feature = "host")]
extern crate std;

pub mod abi;
#[cfg(feature = "host")]
pub mod figures;
pub mod noise;
pub mod ring;
pub mod rude;
pub mod streams;
