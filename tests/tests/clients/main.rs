//! Programs that people use, unchanged, as clients of a real aditd: each reaches a VM by its name over a listener that an operator
//! would expose, or hears why not. The VM is the guest's agent in the test, on a ring, and its servers are the test's.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

mod device;
mod gate;
mod hosts;
mod keys;
mod passthrough;
mod programs;
mod servers;
mod services;

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

/// Longer than anything in these tests takes.
const LIMIT: Duration = Duration::from_secs(60);

fn bins() -> Option<PathBuf> {
    let bins = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from);
    if bins.is_none() {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
    }
    bins
}

/// A file beside this one.
fn beside(name: &str) -> PathBuf {
    adit_tests::root().join("tests/tests/clients").join(name)
}

/// Runs it to its end, which must be a good one.
fn run(command: &mut Command) -> Output {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", shown(&out));
    out
}

/// All that it said.
fn shown(out: &Output) -> String {
    let (stdout, stderr) = (&out.stdout, &out.stderr);
    format!(
        "{}: {}{}",
        out.status,
        String::from_utf8_lossy(stdout),
        String::from_utf8_lossy(stderr)
    )
}

/// What a script printed.
fn json(command: &mut Command) -> Value {
    let out = run(command);
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", shown(&out)))
}
