//! A VM's port process: device, engine and that VM's tunnels. Parses no HTTP; `aditd` maps no guest memory.
pub mod control;
