//! A VM's port process: device, engine and that VM's tunnels. Parses no HTTP; `aditd` maps no guest memory.
//!
//! | module | what |
//! |---|---|
//! | `control`, `control_io` | how `aditd` and a port process speak: all that there is without the `shell` feature |
//! | `process` | the loop: control frames, notices of the port, status |
//! | `keep` | what a successor needs, on its way to `aditd` |
//! | `place` | the VM's directory: lock, sockets |
//! | `sandbox` | landlock and seccomp |
//! | `log` | lines to stderr, limited and escaped |

pub mod control;
pub mod control_io;
#[cfg(feature = "shell")]
pub mod keep;
#[cfg(feature = "shell")]
pub mod log;
#[cfg(feature = "shell")]
pub mod place;
#[cfg(feature = "shell")]
pub mod process;
#[cfg(feature = "shell")]
pub mod sandbox;
