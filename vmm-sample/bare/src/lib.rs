//! A guest without an operating system, and the interface between it and its VMM.
//!
//! The image runs in user mode, may use I/O ports, and has identity page tables that the VMM made. It has no kernel and no
//! interrupt handler. So it runs at full speed even under a KVM that emulates kernel mode, where no Linux boots.
#![no_std]
extern crate alloc;
#[cfg(feature = "host")]
extern crate std;

pub mod abi;
pub mod attacks;
#[cfg(feature = "host")]
pub mod figures;
pub mod noise;
pub mod ring;
pub mod streams;
