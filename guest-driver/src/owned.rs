//! Whether anybody but root and the agent's own user can change a file or a directory.
//!
//! The agent's configuration, trust anchors and journal are only as safe as the directory that they are in: whoever may write
//! the directory can put another file in their place.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// Others than root and the agent's user can change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its owner (uid {uid}) and mode {mode:04o} let others than root write it")]
pub struct Writable {
    /// Its owner.
    pub uid: u32,
    /// Its permission bits.
    pub mode: u32,
}

/// Checks owner and mode.
///
/// # Errors
/// Others than root and the agent's own user can change it.
pub fn check(meta: &Metadata) -> Result<(), Writable> {
    let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
    let ours = uid == 0 || uid == nix::unistd::geteuid().as_raw();
    match ours && mode & 0o022 == 0 {
        true => Ok(()),
        false => Err(Writable { uid, mode }),
    }
}
