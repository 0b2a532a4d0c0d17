//! The harness for real guests: Debian's kernels in QEMU without a network device, and the real binaries on the host.
//!
//! | module | what |
//! |---|---|
//! | `agent` | a VM without a machine: the agent in the test, on a ring |
//! | `image` | makes a kernel, an initramfs and a state disk from Debian's packages |
//! | `cpio` | the initramfs format |
//! | `debian` | a Debian 12 with its init system, on a disk |
//! | `guest` | a QEMU process and its serial line |
//! | `namespace` | namespaces with a systemd as process 1, for `machine`, `root` and `systemd` |
//! | `nested` | a guest that runs `adit-vmm` with guests of its own |
//! | `host` | aditd with its directories; runs `adit` and `curl` |
//! | `machine` | a machine to be set up by hand: a shell and a systemd; its changes are gone afterwards |
//! | `connect` | a CONNECT client that keeps half-close |
//! | `net` | hosts on a network of their own |
//! | `page` | the commands of a page of the documentation |
//! | `process` | child processes that end with this one |
//! | `root` | a bare Debian to install packages into; its changes are gone afterwards |
//! | `running` | a host, and an agent as a process that runs commands and copies files |
//! | `shell` | a shell that commands are typed into |
//! | `systemd` | a systemd of its own, for the unit that adit ships |
//! | `tamper` | a signed goal with one byte changed |
//! | `tour` | types a page of the documentation into a machine |
#![forbid(unsafe_code)]

pub mod agent;
pub mod before;
pub mod connect;
pub mod cpio;
pub mod debian;
pub mod guest;
pub mod host;
pub mod hybrid;
pub mod image;
pub mod machine;
mod namespace;
pub mod nested;
pub mod net;
pub mod page;
pub mod process;
pub mod root;
pub mod running;
pub mod servers;
pub mod shell;
pub mod sshd;
pub mod systemd;
pub mod tamper;
pub mod tour;

use std::path::{Path, PathBuf};

/// The workspace's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(PathBuf::new, Path::to_owned)
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The packages that tests install.
pub fn packages() -> PathBuf {
    target().join("package/tests")
}

/// The static adit-vmm.
pub fn vmm_bin() -> PathBuf {
    target().join("x86_64-unknown-linux-musl/vmm/adit-vmm")
}

/// A static binary for guests.
pub fn guest_bin(name: &str) -> PathBuf {
    target().join("x86_64-unknown-linux-musl/guest").join(name)
}
