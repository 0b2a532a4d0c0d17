//! Runs the programs that write images.

use std::io;
use std::process::{Command, Output, Stdio};

/// A program cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot run {program}: is the package {package} installed?")]
pub struct NoProgram {
    /// Its name.
    program: &'static str,
    /// The Debian package that has it.
    package: &'static str,
    /// Why not.
    source: io::Error,
}

/// Runs a program to its end. It can ask nothing, and speaks English.
pub(crate) fn output(
    program: &'static str,
    package: &'static str,
    mut command: Command,
) -> Result<Output, NoProgram> {
    let done = command.stdin(Stdio::null()).env("LC_ALL", "C").output();
    done.map_err(|source| NoProgram {
        program,
        package,
        source,
    })
}
