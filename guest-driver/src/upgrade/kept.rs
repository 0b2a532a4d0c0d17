//! `agent/state.json` in the state directory: what the rules go by, replaced whole.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use adit_blob::disk;
use nix::time::{ClockId, clock_gettime};

use super::rules::{Kept, Now};
use crate::{facts, owned};

/// Most bytes of it.
const SIZE_MAX: u64 = 64 << 10;

/// Where programs that came over the channel are.
pub fn dir(state_dir: &Path) -> PathBuf {
    state_dir.join("agent")
}

fn file(state_dir: &Path) -> PathBuf {
    dir(state_dir).join("state.json")
}

/// Reads it; what nobody has kept is as it was at first.
///
/// # Errors
/// It is there, and cannot be read, or others could have written it.
pub fn read(state_dir: &Path) -> io::Result<Kept> {
    let path = file(state_dir);
    let file = match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Kept::default()),
        file => file?,
    };
    for part in [state_dir, &dir(state_dir), &path] {
        let meta = fs::symlink_metadata(part)?;
        owned::check(&meta).map_err(|e| io::Error::other(format!("{}: {e}", part.display())))?;
    }
    let mut text = Vec::new();
    file.take(SIZE_MAX).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Writes it: on disk when this returns.
///
/// # Errors
/// The state directory cannot be written; what was there before is there then.
pub fn write(state_dir: &Path, kept: &Kept) -> io::Result<()> {
    disk::own_dir(&dir(state_dir))?;
    disk::replace(&file(state_dir), &serde_json::to_vec(kept)?)
}

/// The time by a clock that nobody sets, which also counts a suspended guest's.
pub fn now() -> Now {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from);
    let at_ms = time.map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
    Now {
        boot: adit_tasks::hex(&facts::boot_nonce()),
        at_ms,
    }
}
