//! A note that the host has given a key since this guest has booted, for the agent that is started next: it is a file of `run_dir`,
//! which no boot finds again.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The file's name.
const NAME: &str = "host-key-given";

/// Where the note is.
#[derive(Debug)]
pub(super) struct Note(PathBuf);

impl Note {
    pub(super) fn of(run_dir: &Path) -> Self {
        Self(run_dir.join(NAME))
    }

    /// Whether there is one. What cannot be looked at counts as one: then only the host is served.
    pub(super) fn is_there(&self) -> bool {
        self.0.try_exists().unwrap_or(true)
    }

    /// Leaves the note, or takes it away.
    pub(super) fn set(&self, given: bool) -> io::Result<()> {
        if given {
            return File::create(&self.0).map(drop);
        }
        match fs::remove_file(&self.0) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}
