//! Programs on disk: `agent/VERSION-DIGEST/`, with the program and the package that was signed. Beside the image's program, which
//! is never touched.
//!
//! | file | mode | |
//! |---|---|---|
//! | `adit-guest` | 0700 | the program |
//! | `package.json` | 0600 | the envelope, which is checked again at each start |

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use adit_blob::{Digest, Reading, disk};
use adit_tasks::TrustStore;
use adit_tasks::dsse::{AGENT_MAX, VerifyError};
use adit_tasks::package::{self, Package, PackageError};
use nix::errno::Errno;

use super::program::ARCHITECTURE;
use super::rules::{Installed, Kept};
use super::{Refused, kept};
use crate::owned;

/// Name of a program in its directory.
const PROGRAM: &str = "adit-guest";
const PACKAGE: &str = "package.json";
/// Bytes of the guest's disk that no program takes.
const SPARE: u64 = 8 << 20;
/// Bytes that are copied at a time.
const CHUNK: usize = 256 << 10;

/// The directory of a program.
pub fn of(state_dir: &Path, installed: &Installed) -> PathBuf {
    let digest = installed.digest.to_string();
    let name = format!("{}-{}", installed.version, &digest[..16]);
    kept::dir(state_dir).join(name)
}

/// The program itself.
pub fn program(state_dir: &Path, installed: &Installed) -> PathBuf {
    of(state_dir, installed).join(PROGRAM)
}

/// Puts a program there: whole, or nothing of it.
///
/// # Errors
/// It is not what was signed, or there is no room.
pub fn put(
    state_dir: &Path,
    package: &Package,
    envelope: &[u8],
    mut from: Reading,
) -> Result<(), Refused> {
    let whole = of(state_dir, &Installed::of(package));
    let part = whole.with_extension("part");
    let mut put = || -> io::Result<bool> {
        disk::own_dir(&kept::dir(state_dir))?;
        disk::remove(&part)?;
        disk::own_dir(&part)?;
        let program = disk::create(&part.join(PROGRAM), 0o700)?;
        let mut chunk = vec![0; CHUNK];
        loop {
            match from.read(&mut chunk)? {
                0 => break,
                n => disk::write(&program, &chunk[..n])?,
            }
        }
        disk::sync(&program)?;
        drop(program);
        // Of what is there, not of what was read: it is what will run.
        let is = Digest::of_reader(File::open(part.join(PROGRAM))?)?;
        if is != (Digest(package.digest), package.size) {
            return Ok(false);
        }
        let signed = disk::create(&part.join(PACKAGE), 0o600)?;
        disk::write(&signed, envelope)?;
        disk::sync(&signed)?;
        disk::sync_dir(&part)?;
        // One that was damaged, or is gone back to by an order.
        disk::remove(&whole)?;
        disk::rename(&part, &whole)?;
        Ok(true)
    };
    let done = room(state_dir, package.size).and_then(|()| put().map_err(refused));
    if !matches!(done, Ok(true)) {
        // It is removed at the next order where it cannot be now.
        let _ = disk::remove(&part);
    }
    match done? {
        true => Ok(()),
        false => Err(Refused::new(
            "agent-wrong-digest",
            "the program is not the one that was signed; send it again",
        )),
    }
}

fn room(state_dir: &Path, size: u64) -> Result<(), Refused> {
    let free = disk::free(state_dir).map_err(refused)?;
    match size.saturating_add(SPARE) {
        needed if free < needed => {
            let text = format!(
                "{free} bytes of the guest's disk are free, {needed} are needed; make room"
            );
            Err(Refused::new("no-space", text))
        }
        _ => Ok(()),
    }
}

/// A disk that refuses.
pub fn refused(e: io::Error) -> Refused {
    let code = match disk::is_full(&e) {
        true => "no-space",
        false => "agent-not-kept",
    };
    Refused::new(code, format!("{e}; see to the disk of state_dir"))
}

/// Why a program is not to be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRun {
    /// It is not what was signed, or nothing that runs here, and does not become it by itself.
    #[error("{0}")]
    Damaged(String),
    /// As things are at this moment: the disk fails, or its key is no anchor, which it may be again. An anchor that a card brings
    /// is none for as long as the clock is wrong.
    #[error("{0}")]
    Now(String),
}

impl NotRun {
    fn disk(path: &Path, e: &io::Error) -> Self {
        let why = format!("{}: {e}", path.display());
        match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::Damaged(why),
            _ => Self::Now(why),
        }
    }

    /// It could not be begun.
    pub fn exec(path: &Path, e: &io::Error) -> Self {
        let why = format!("{} cannot be begun: {e}", path.display());
        let errno = e.raw_os_error().map(Errno::from_raw);
        match errno {
            Some(Errno::ENOEXEC | Errno::ENOENT | Errno::ELIBBAD) => Self::Damaged(why),
            _ => Self::Now(why),
        }
    }
}

impl From<PackageError> for NotRun {
    fn from(e: PackageError) -> Self {
        match &e {
            PackageError::Verify(
                VerifyError::NoAnchor
                | VerifyError::UntrustedKey { .. }
                | VerifyError::WrongRole { .. },
            ) => Self::Now(e.to_string()),
            // A key that is revoked is so for good.
            _ => Self::Damaged(e.to_string()),
        }
    }
}

/// Checks that a program is still what was signed, by a key that is trusted now, and nobody else could have changed it. Returns
/// its path.
///
/// # Errors
/// Why it is not to be run.
pub fn verify(
    state_dir: &Path,
    installed: &Installed,
    trust: &TrustStore,
) -> Result<PathBuf, NotRun> {
    let dir = of(state_dir, installed);
    let (program, signed) = (dir.join(PROGRAM), dir.join(PACKAGE));
    for path in [state_dir, &kept::dir(state_dir), &dir, &program, &signed] {
        let damaged = |e: &dyn Display| NotRun::Damaged(format!("{}: {e}", path.display()));
        let meta = fs::symlink_metadata(path).map_err(|e| NotRun::disk(path, &e))?;
        if meta.is_symlink() {
            return Err(damaged(&"is a link"));
        }
        owned::check(&meta).map_err(|e| damaged(&e))?;
    }
    let read = || {
        let mut envelope = Vec::new();
        let most = AGENT_MAX as u64 + 1;
        File::open(&signed)?.take(most).read_to_end(&mut envelope)?;
        io::Result::Ok(envelope)
    };
    let envelope = read().map_err(|e| NotRun::disk(&signed, &e))?;
    let (package, _) = package::check(&envelope, trust, ARCHITECTURE)?;
    if Installed::of(&package) != *installed {
        return Err(NotRun::Damaged("the package there is another one".into()));
    }
    let is = File::open(&program).and_then(Digest::of_reader);
    match is.map_err(|e| NotRun::disk(&program, &e))? == (Digest(package.digest), package.size) {
        true => Ok(program),
        false => {
            let why = format!("{} has been changed", program.display());
            Err(NotRun::Damaged(why))
        }
    }
}

/// Removes all programs but those that are kept.
pub fn clean(state_dir: &Path, kept: &Kept) {
    let current = kept.current.iter().map(|current| &current.installed);
    let stay: Vec<_> = current
        .chain(&kept.previous)
        .map(|installed| of(state_dir, installed))
        .collect();
    let Ok(all) = fs::read_dir(kept::dir(state_dir)) else {
        return;
    };
    for path in all.flatten().map(|entry| entry.path()) {
        let is_program = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
        if is_program && !stay.contains(&path) {
            // What stays is removed the next time.
            let _ = disk::remove(&path);
        }
    }
}
