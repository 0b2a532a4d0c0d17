//! A guest as people run them: Debian 12 with systemd, sshd, nginx and git. The unit that adit ships, and the clients of
//! `docs/clients.md`. Each test boots once.
//!
//! These tests need the binaries and the disk that `cargo xtask test` builds. Without them they print that and pass.

use std::path::PathBuf;
use std::time::Duration;

use adit_tests::debian::{Debian, Init};
use adit_tests::image::Kernel;

mod boot;
mod clients;
mod clones;
mod freeze;
mod images;
mod unit;
mod upgrade;
mod walk;

/// From QEMU's start until the agent is connected, at most. Emulated, on an idle machine, it is some 20 s; beside other work on two
/// cores OpenRC has taken more than two minutes.
const BOOT: Duration = Duration::from_secs(300);
/// Set by `cargo xtask test --full`.
const FULL: &str = "ADIT_TEST_FULL";

/// The directory of aditd, adit-port and adit, and the disk. Prints the reason and returns `None` if nothing can be booted.
fn built(init: Init) -> Option<(PathBuf, Debian)> {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
        return None;
    };
    if let Some(why) = Debian::missing() {
        println!("skipped: {why}");
        return None;
    }
    let kernel = if full() && init == Init::Systemd {
        Kernel::V6_12
    } else {
        Kernel::V6_1
    };
    let debian = Debian::build(kernel, init, &|what| println!("{what}")).unwrap();
    Some((bins, debian))
}

/// Whether the longer variants run: the newer kernel, OpenRC, larger files.
fn full() -> bool {
    std::env::var_os(FULL).is_some()
}
