//! The log of a port process: a file in its VM's directory that is kept short. What is in it may be a guest's words, and is not
//! read here beyond its length: its end is handed on as it is.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A port process's log, and what it was before.
pub(crate) const LOG: &str = "port.log";
pub(crate) const LOG_PAST: &str = "port.log.1";
/// Bytes of each at most, but for what is written until the next look; without aditd a port process writes four times as
/// much and then nothing more (`adit_port::log`).
const LOG_MAX: u64 = 1 << 20;
/// Bytes at the end of a log that are handed on.
const TAIL_MAX: u64 = 4096;

/// Opens a VM's log for its next port process.
///
/// # Errors
/// As the file system says.
pub fn file(dir: &Path) -> io::Result<File> {
    shorten(dir)?;
    open(&dir.join(LOG), OpenOptions::new().append(true))
}

/// The directory is the port process's, too: what it puts in a log's place is not followed.
fn open(path: &Path, how: &mut OpenOptions) -> io::Result<File> {
    how.create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Moves the end of a log that is too long into the file of its past, and empties it. Whoever writes it has it open for
/// appending, and goes on at its start.
///
/// # Errors
/// As the file system says.
pub fn shorten(dir: &Path) -> io::Result<()> {
    let path = dir.join(LOG);
    let long = std::fs::symlink_metadata(&path).is_ok_and(|m| m.is_file() && m.len() > LOG_MAX);
    if !long {
        return Ok(());
    }
    let mut log = open(&path, OpenOptions::new().read(true).write(true))?;
    let mut end = Vec::new();
    log.seek(SeekFrom::End(-i64::try_from(LOG_MAX).unwrap_or(i64::MAX)))?;
    (&log).take(LOG_MAX).read_to_end(&mut end)?;
    let past = dir.join(LOG_PAST);
    // Made anew, so that it is a file of ours.
    match std::fs::remove_file(&past) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    open(&past, OpenOptions::new().write(true))?.write_all(&end)?;
    log.set_len(0)
}

/// The end of what was added to a log since `from`.
///
/// # Errors
/// As the file system says.
pub fn tail(dir: &Path, from: u64) -> io::Result<Vec<u8>> {
    let mut file = open(&dir.join(LOG), OpenOptions::new().read(true).append(true))?;
    let len = file.metadata()?.len();
    // A log that is shorter now was begun anew.
    let from = if from > len { 0 } else { from };
    file.seek(SeekFrom::Start(from.max(len.saturating_sub(TAIL_MAX))))?;
    let mut text = Vec::new();
    file.take(TAIL_MAX).read_to_end(&mut text)?;
    Ok(text)
}
