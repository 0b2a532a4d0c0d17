//! Standard output and standard error of the commands. `println!` panics when it cannot write; nothing here does.
//!
//! | what happens | what the command does |
//! |---|---|
//! | whoever reads standard output has closed it (`adit vm ls \| head -1`) | ends without a word, with status [`CLOSED_PIPE`] |
//! | standard output cannot be written otherwise (`> /dev/full`) | says why on standard error, with status 1 |
//! | standard error cannot be written | goes on: there is nobody to tell |
//!
//! A closed pipe is not status 0, because the command did not do all that was asked: `adit task watch | head -1` does not
//! know how the tasks end. The status is the one a shell shows for `cat`, `grep` and `git`, which SIGPIPE kills. The signal
//! itself stays ignored, as Rust's runtime sets it: these programs also write to sockets, where a peer that has gone is
//! an error to handle.
#![forbid(unsafe_code)]

mod man;

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

/// Exit status of a command whose output nobody reads any more: 128 and the number of SIGPIPE.
pub const CLOSED_PIPE: u8 = 141;

/// Why something was not printed.
#[derive(Debug, thiserror::Error)]
pub enum PrintError {
    /// The reader of standard output has closed it.
    #[error("standard output is closed")]
    Closed,
    /// Standard output cannot be written.
    #[error("cannot write to standard output")]
    Failed(#[source] io::Error),
}

impl From<io::Error> for PrintError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Failed(e),
        }
    }
}

impl PrintError {
    /// Says what failed, where that is worth a word, and returns the exit status.
    pub fn report(&self, program: &str) -> ExitCode {
        match self {
            Self::Closed => ExitCode::from(CLOSED_PIPE),
            Self::Failed(e) => {
                note(format_args!("{program}: {self}: {e}"));
                ExitCode::FAILURE
            }
        }
    }
}

/// Prints a line to standard output.
///
/// # Errors
/// It cannot be written.
pub fn line(text: impl Display) -> Result<(), PrintError> {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints bytes to standard output as they are.
///
/// # Errors
/// They cannot be written.
pub fn bytes(bytes: &[u8]) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())?;
    Ok(())
}

/// Prints a line to standard error, with one write.
pub fn note(text: impl Display) {
    // Nobody is left to be told that this failed.
    let _ = io::stderr()
        .lock()
        .write_all(format!("{text}\n").as_bytes());
}

/// [`note()`] with the arguments of `format!`.
#[macro_export]
macro_rules! note {
    ($($text:tt)*) => { $crate::note(::core::format_args!($($text)*)) };
}

/// Says why a command failed, with its causes, and returns its exit status: [`CLOSED_PIPE`] and no word for a closed
/// standard output, else 1.
pub fn failed(program: &str, error: &(dyn std::error::Error + 'static)) -> ExitCode {
    if let Some(PrintError::Closed) = error.downcast_ref() {
        return ExitCode::from(CLOSED_PIPE);
    }
    note(format_args!("{program}: {}", with_causes(error)));
    ExitCode::FAILURE
}

/// An error and its causes, in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(&format!(": {e}"));
        cause = e.source();
    }
    text
}

/// Reads the command line.
///
/// # Errors
/// There is nothing to run: the command line is wrong (status 2), or help, the version or manual pages were asked for and
/// have been printed or written.
pub fn parse<T: Parser>(program: &str) -> Result<T, ExitCode> {
    parse_or(program, |_| None)
}

/// The same. Of a wrong command line `said` may say by itself what is wrong, and returns the exit status then.
///
/// # Errors
/// As [`parse`].
pub fn parse_or<T: Parser>(
    program: &str,
    said: impl FnOnce(&clap::Error) -> Option<ExitCode>,
) -> Result<T, ExitCode> {
    if let Some(dir) = man::asked() {
        return Err(match man::write(T::command(), &dir) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => failed(program, &e),
        });
    }
    T::try_parse().map_err(|e| {
        if e.use_stderr()
            && let Some(done) = said(&e)
        {
            return done;
        }
        let printed = e.print().and_then(|()| io::stdout().flush());
        match printed {
            Err(failed) if !e.use_stderr() => PrintError::from(failed).report(program),
            _ => ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(1)),
        }
    })
}
