//! Goals, plans, tasks, reports and their signatures: pure, shared by host and guest.
#![forbid(unsafe_code)]

pub mod wire;
mod vm_id;

pub use vm_id::{VmId, VmIdError};
