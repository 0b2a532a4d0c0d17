//! A VM's port process: device, engine and that VM's tunnels. Parses no HTTP; `aditd` maps no guest memory.
//!
//! | module | what |
//! |---|---|
//! | `control`, `control_io` | how `aditd` and a port process speak: all that there is without the `shell` feature |
//! | `process` | the loop: control frames, notices of the port, status |
//! | `rings` | how rings come to the port: the attach socket, ivshmem, a VMM of this process |
//! | `keep` | what a successor needs, on its way to `aditd` |
//! | `place` | the VM's directory: lock, sockets |
//! | `born` | which process it is |
//! | `privilege` | a user of its own, and no capability |
//! | `sandbox` | landlock and seccomp |
//! | `vmm` | for a VMM that has the device itself: to be its VM's port process (feature `vmm`) |
//! | `log` | lines to stderr, limited and escaped |

pub mod born;
pub mod control;
pub mod control_io;
#[cfg(feature = "shell")]
pub mod keep;
#[cfg(feature = "shell")]
pub mod log;
#[cfg(feature = "shell")]
pub mod place;
#[cfg(feature = "shell")]
pub mod privilege;
#[cfg(feature = "shell")]
pub mod process;
#[cfg(feature = "shell")]
pub mod rings;
#[cfg(feature = "shell")]
pub mod sandbox;
#[cfg(feature = "vmm")]
pub mod vmm;

/// An error and its causes in one line.
#[cfg(feature = "shell")]
pub(crate) fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(e) = source {
        text += &format!(": {e}");
        source = e.source();
    }
    text
}
