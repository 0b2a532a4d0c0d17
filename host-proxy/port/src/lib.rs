//! A VM's port process: device, engine and the VM's tunnels. It parses no HTTP, and `aditd` never maps guest memory.
//!
//! | module | what |
//! |---|---|
//! | `control`, `control_io` | the protocol with `aditd`: the only modules without the `shell` feature |
//! | `process` | the loop: control frames, notices of the port, status |
//! | `rings` | how the port gets rings: the attach socket, ivshmem, a VMM in this process |
//! | `keep` | sends what a successor needs to `aditd` |
//! | `ways`, `auto` | which way to the guest is taken where the configuration leaves it open, and the carrier that takes it |
//! | `door` | the sockets to a VMM that has one for each stream, and the process that opens them |
//! | `place` | the VM's directory: lock, sockets |
//! | `born` | identifies a process by pid and start time |
//! | `privilege` | a user of its own, and no capability |
//! | `sandbox` | landlock and seccomp |
//! | `vmm` | lets a VMM with the device in its own process be its VM's port process (feature `vmm`) |
//! | `log` | lines to stderr, limited and escaped |

#[cfg(feature = "shell")]
pub mod auto;
pub mod born;
pub mod control;
pub mod control_io;
#[cfg(feature = "shell")]
pub mod door;
#[cfg(feature = "shell")]
pub mod keep;
#[cfg(feature = "shell")]
pub mod log;
#[cfg(feature = "shell")]
pub mod place;
#[cfg(feature = "sandbox")]
pub mod privilege;
#[cfg(feature = "shell")]
pub mod process;
#[cfg(feature = "shell")]
pub mod rings;
#[cfg(feature = "sandbox")]
pub mod sandbox;
#[cfg(feature = "vmm")]
pub mod vmm;
pub mod ways;
