//! Opening a journal that may be damaged: a damaged page may panic inside the database, and that must not take the ports
//! down. So a process of its own reads everything first.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use redb::Builder;

use super::overlay::Overlay;
use super::{CACHE_BYTES, FILE, Journal, JournalError, Result, any};
use crate::exec::reap;

/// Opens the journal if a process of its own could read all of it.
///
/// # Errors
/// What is wrong with it.
pub fn open_checked(dir: &Path) -> Result<Journal> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("journal-check").arg(dir);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let ended = reap::spawn(|| command.spawn())
        .and_then(|(child, _claim)| child.wait_with_output())
        .map_err(|e| JournalError::Unavailable(format!("cannot check it: {e}")))?;
    if ended.status.success() {
        return Journal::open(dir);
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    let last = said.lines().last().unwrap_or_default();
    let last = last.trim_start_matches("adit-guest: ");
    // Its own words when it has some; its panic otherwise.
    match ["journal-", "no-space"]
        .iter()
        .any(|code| last.starts_with(code))
    {
        true => Journal::open(dir).and(Err(JournalError::Unavailable(last.to_owned()))),
        false => Err(JournalError::Corrupt(describe(&ended, last))),
    }
}

fn describe(ended: &Output, last: &str) -> String {
    format!("reading it ended with {}: {last}", ended.status)
}

/// Reads everything in the journal of a directory once.
///
/// # Errors
/// What is wrong with it.
pub fn check(dir: &Path) -> Result<()> {
    let path = dir.join(FILE);
    if std::fs::exists(&path).map_err(any)? {
        check_sums(&path)?;
    }
    let mut journal = Journal::open(dir)?;
    journal.collect(|_, _| None::<()>)?;
    journal.read_windows()?;
    Ok(())
}

/// Compares every page with its checksum: opening does not, and a value that is damaged may still be one. A window with a lower
/// floor, for example, would let goals run again that were forgotten.
fn check_sums(path: &Path) -> Result<()> {
    // Writable only because the database takes a lock that another agent must not have.
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(any)?;
    let mut builder = Builder::new();
    let db = builder
        .set_cache_size(CACHE_BYTES)
        .create_with_backend(Overlay::over(file).map_err(any)?);
    match db.map_err(any)?.check_integrity().map_err(any)? {
        true => Ok(()),
        false => Err(JournalError::Corrupt(
            "its pages are not as they were written".into(),
        )),
    }
}
