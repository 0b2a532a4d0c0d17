//! A VM's port process: device, engine and that VM's tunnels. Parses no HTTP; `aditd` maps no guest memory.
//!
//! Without the `shell` feature this is the control protocol only, which is what `aditd` links.

pub mod control;
pub mod control_io;
