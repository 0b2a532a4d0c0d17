//! What is said when something fails: what, why, and what to do next; and the exit status that scripts act on.

use std::io;
use std::process::ExitCode;

use serde::Serialize;

use crate::output::{Format, escape};

/// Exit status 3: aditd cannot be reached.
const UNREACHABLE: u8 = 3;
/// Exit status 4: what was named does not exist.
const NOT_FOUND: u8 = 4;
/// Exit status 5: a task did not succeed.
pub const TASK_FAILED: u8 = 5;
/// Exit status 124: time is up, as `timeout` has it.
const TIMEOUT: u8 = 124;

/// A failed command.
#[derive(Debug, Serialize)]
pub struct Failure {
    /// Stable word.
    pub code: String,
    /// What failed and why.
    pub message: String,
    /// What to do next; may be empty.
    pub help: String,
    #[serde(skip)]
    exit: u8,
}

impl Failure {
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        let exit = match code {
            "unreachable" => UNREACHABLE,
            "timeout" => TIMEOUT,
            c if c.starts_with("unknown-") => NOT_FOUND,
            _ => 1,
        };
        Self {
            code: code.to_owned(),
            message: message.into(),
            help: String::new(),
            exit,
        }
    }

    pub fn io(what: &str, e: &io::Error) -> Self {
        Self::new("io", format!("{what}: {e}"))
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = help.into();
        self
    }

    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new("timeout", message)
    }
}

/// Prints a failure and returns its exit status.
pub fn report(failure: &Failure, format: Format) -> ExitCode {
    match format {
        Format::Json => {
            let text = serde_json::to_string(&serde_json::json!({ "error": failure }));
            eprintln!("{}", text.unwrap_or_default());
        }
        Format::Table => {
            eprintln!("error[{}]: {}", failure.code, escape(&failure.message));
            if !failure.help.is_empty() {
                eprintln!("  help: {}", escape(&failure.help));
            }
        }
    }
    ExitCode::from(failure.exit)
}
