//! The programs of the version before this one, as they were built then: `tests/before/*.xz`, static, for x86-64. What they wrote
//! and what they say must be understood by today's, and the reverse.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;

use crate::process::output;

/// The directory of `aditd`, `adit-port`, `adit` and `adit-guest`, unpacked once.
///
/// # Errors
/// They cannot be unpacked.
pub fn programs() -> anyhow::Result<PathBuf> {
    // Of two tests, one unpacks them.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (packed, dir) = (
        crate::root().join("tests/before"),
        crate::target().join("before"),
    );
    fs::create_dir_all(&dir)?;
    for name in ["aditd", "adit-port", "adit", "adit-guest"] {
        let (from, to) = (packed.join(name).with_extension("xz"), dir.join(name));
        let time = |path: &PathBuf| path.metadata().and_then(|m| m.modified());
        if time(&to).is_ok_and(|to| time(&from).is_ok_and(|from| from < to)) {
            continue;
        }
        let bytes = output(Command::new("xz").arg("-dc").arg(&from));
        let bytes = bytes.with_context(|| format!("cannot unpack {}", from.display()))?;
        let part = dir.join(format!("{name}.{}", std::process::id()));
        fs::write(&part, bytes.stdout)?;
        fs::set_permissions(&part, fs::Permissions::from_mode(0o755))?;
        fs::rename(&part, &to)?;
    }
    Ok(dir)
}
