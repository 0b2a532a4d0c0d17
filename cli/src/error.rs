//! What is said when something fails: what, why, and what to do next; and the exit status that scripts act on.

use std::io;
use std::process::ExitCode;

use adit_api::doctor::{Finding, Health};
use adit_print::PrintError;
use clap::error::ErrorKind;
use serde::Serialize;

use crate::text::{Format, escape, json_text};

/// Exit status 2: the command line asks for something that makes no sense, as clap has it.
const USAGE: u8 = 2;
/// Exit status 3: aditd cannot be reached, or another host's.
const UNREACHABLE: u8 = 3;
/// Exit status 4: what was named does not exist.
const NOT_FOUND: u8 = 4;
/// Exit status 5: a task did not succeed.
pub const TASK_FAILED: u8 = 5;
/// Exit status 6: `adit doctor` has found something.
pub const UNWELL: u8 = 6;
/// Exit status 124: time is up, as `timeout` has it.
const TIMEOUT: u8 = 124;

/// Exit status 130: by Ctrl-C, as a shell has it.
const INTERRUPTED: u8 = 130;

/// Codes of aditd, where it is not to blame.
const WAY: [&str; 6] = [
    "no-port-process",
    "no-session",
    "no-agent",
    "no-answer",
    "reset",
    "broken-off",
];

/// A failed command.
#[derive(Debug, Serialize)]
pub struct Failure {
    /// Stable word.
    pub code: String,
    /// What failed and why.
    pub message: String,
    /// What to do next; may be empty.
    pub help: String,
    /// aditd may answer if it is asked a little later.
    #[serde(skip)]
    pub passing: bool,
    #[serde(skip)]
    exit: u8,
    /// The exit status is what was asked for, whatever the code.
    #[serde(skip)]
    pub settled: bool,
}

impl Failure {
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        let exit = match code {
            "usage" => USAGE,
            "unreachable" | "cut-off" | "untrusted-server" | "silent-host" => UNREACHABLE,
            "timeout" => TIMEOUT,
            "nothing-open" => NOT_FOUND,
            "unknown-path" => 1,
            c if c.starts_with("unknown-") => NOT_FOUND,
            _ => 1,
        };
        Self {
            code: code.to_owned(),
            message: message.into(),
            help: String::new(),
            passing: matches!(code, "unreachable" | "cut-off" | "busy"),
            exit,
            settled: false,
        }
    }

    /// Somebody has pressed Ctrl-C.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self {
            exit: INTERRUPTED,
            ..Self::new("interrupted", message)
        }
    }

    /// With this exit status.
    pub fn with_status(mut self, status: u8) -> Self {
        (self.exit, self.settled) = (status, true);
        self
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        self.exit
    }

    /// Whether there was no stream to what was asked, or it broke off.
    pub fn is_of_the_way(&self) -> bool {
        let code = self.code.as_str();
        self.is_about_aditd() || WAY.contains(&code)
    }

    pub fn io(what: &str, e: &io::Error) -> Self {
        Self::new("io", format!("{what}: {e}"))
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = help.into();
        self
    }

    /// Nothing could be asked, because aditd does not answer.
    pub fn is_about_aditd(&self) -> bool {
        self.exit == UNREACHABLE
    }

    /// The same as what `adit doctor` finds of the host.
    pub fn finding(&self) -> Finding {
        Finding {
            check: "host".into(),
            health: Health::Failed,
            says: self.message.clone(),
            remedy: self.help.clone(),
        }
    }

    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new("timeout", message)
    }
}

/// A command line that is wrong. What clap says for people has paragraphs: what is wrong, tips, how it is used.
impl From<&clap::Error> for Failure {
    fn from(e: &clap::Error) -> Self {
        if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            return Self::new("usage", "no command was given")
                .help("the same with --help lists the commands");
        }
        let text = e.render().to_string();
        let mut parts = text.split("\n\n").map(|part| {
            let lines = part.lines().map(str::trim);
            lines.collect::<Vec<_>>().join(" ").trim().to_owned()
        });
        let what = parts.next().unwrap_or_default();
        let what = what.strip_prefix("error: ").unwrap_or(&what);
        let help: Vec<String> = parts.filter(|part| !part.is_empty()).collect();
        Self::new("usage", what).help(help.join("; "))
    }
}

impl From<PrintError> for Failure {
    fn from(e: PrintError) -> Self {
        match &e {
            PrintError::Closed => Self {
                exit: adit_print::CLOSED_PIPE,
                ..Self::new("closed-pipe", e.to_string())
            },
            PrintError::Failed(why) => Self::io(&e.to_string(), why),
        }
    }
}

/// Prints a failure and returns its exit status. Whoever has closed standard output gets no word.
pub fn report(failure: &Failure, format: Format) -> ExitCode {
    let code = ExitCode::from(failure.exit);
    if failure.exit == adit_print::CLOSED_PIPE {
        return code;
    }
    match format {
        Format::Json => {
            let text = json_text(&serde_json::json!({ "error": failure }));
            adit_print::note(text.unwrap_or_default());
        }
        Format::Table => {
            let (code, message) = (escape(&failure.code), escape(&failure.message));
            let mut text = format!("error[{code}]: {message}");
            if !failure.help.is_empty() {
                text.push_str(&format!("\n  help: {}", escape(&failure.help)));
            }
            adit_print::note(text);
        }
    }
    code
}
