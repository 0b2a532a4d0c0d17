//! `cargo xtask sanitize` runs tests of memory that threads share under ThreadSanitizer. The standard library is built with it
//! too, from rust-src, which rustup installs.
//!
//! Tests in which one side overwrites the other's memory on purpose are left out: they race by design. ThreadSanitizer treats two
//! mappings of one memfd as different memory, so it cannot check the ordering between them; loom does.

use std::process::Command;

use adit_tests::process::output;
use anyhow::bail;

use crate::progress;

/// Package, test target, and its tests that are left out.
const TESTS: [(&str, &str, &[&str]); 6] = [
    ("adit-ringbuf", "session", &[]),
    (
        "adit-ringbuf",
        "hostile",
        &["a_region_that_is_rewritten_at_random"],
    ),
    ("adit-ringbuf-io", "ends", &["r11_"]),
    ("adit-ringbuf-io", "attach", &[]),
    ("adit-channel", "races", &[]),
    ("adit-channel", "vhost_user", &[]),
];

pub fn run() -> anyhow::Result<bool> {
    progress::during("adding rust-src", || {
        output(Command::new("rustup").args(["component", "add", "rust-src"]))
    })?;
    let host = "x86_64-unknown-linux-gnu";
    let mut sound = true;
    for (package, test, skip) in TESTS {
        let mut command = Command::new("cargo");
        command
            .args(["test", "--quiet", "-Zbuild-std", "--target", host])
            .args(["-p", package, "--test", test, "--"])
            .args(skip.iter().flat_map(|name| ["--skip", name]))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", "-Zsanitizer=thread")
            .env("CARGO_TARGET_DIR", adit_tests::target().join("sanitize"))
            .current_dir(adit_tests::root());
        for name in skip {
            progress::line(&format!("left out: {package} {test} {name}"));
        }
        if !command.status()?.success() {
            eprintln!("ThreadSanitizer or a test failed in {package} {test}");
            sound = false;
        }
    }
    if !sound {
        bail!("not sound: see the output above");
    }
    Ok(true)
}
