//! `adit-guest seal`: an image that is to be copied has no identity in it, so that each copy gets one of its own. What goes: the
//! guest's key, what was kept of cards, the journal, the card in the image, files that the host sent. What stays: the agent, also one
//! that came over the channel, its configuration, the anchors, and what was taken of trust documents: a key that is revoked in the
//! image is revoked in each copy.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::PathBuf;

use adit_names::VmId;

use super::{kept, key};
use crate::config::Config;
use crate::journal;
use crate::serve::blob;
use crate::tickets;

/// Why an image is not sealed. Nothing was removed, unless it says what could not be.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Each copy would be the same VM.
    #[error(
        "{}: key `vm_id`: each copy would be {vm_id}; take the line out, so that a card says who each is, or give --keep-vm-id",
        path.display()
    )]
    VmId {
        /// The configuration.
        path: PathBuf,
        /// What it says.
        vm_id: VmId,
    },
    /// It would write all of it again.
    #[error(
        "the agent runs, and has the journal open: stop it first, and seal as the last thing before the shutdown"
    )]
    Running,
    /// Something could not be removed.
    #[error("cannot remove {}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The files that make an image somebody.
pub fn identity(config: &Config) -> Vec<PathBuf> {
    let state = &config.state_dir;
    let [journal, reserve] = journal::FILES.map(|file| state.join(file));
    let mut files: Vec<_> = key::set_aside(state).collect();
    files.extend([
        state.join(key::FILE),
        state.join(kept::FILE),
        state.join(kept::COPY),
        journal,
        reserve,
        config.card.clone(),
    ]);
    files
}

/// Removes them; returns those that were there. A second time it finds nothing to do.
///
/// # Errors
/// The image has a fixed `vm_id` and `keep_vm_id` does not say that this is meant, the agent runs, or a file stays.
pub fn seal(config: &Config, keep_vm_id: bool) -> Result<Vec<PathBuf>, SealError> {
    if let Some(vm_id) = config.vm_id.clone().filter(|_| !keep_vm_id) {
        let path = config.path.clone();
        return Err(SealError::VmId { path, vm_id });
    }
    let journal = config.state_dir.join(journal::FILES[0]);
    if let Ok(open) = File::open(&journal)
        && let Err(TryLockError::WouldBlock) = open.try_lock()
    {
        return Err(SealError::Running);
    }
    let mut gone = Vec::new();
    for path in identity(config) {
        match fs::remove_file(&path) {
            Ok(()) => gone.push(path),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(source) => return Err(SealError::Io { path, source }),
        }
    }
    // What the host has sent: it is sent again to whoever needs it. The agent's own programs stay, and which are too old. Tickets name
    // their VM, which no copy is.
    for dir in [blob::DIR, tickets::DIR] {
        let path = config.state_dir.join(dir);
        match fs::remove_dir_all(&path) {
            Ok(()) => gone.push(path),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(source) => return Err(SealError::Io { path, source }),
        }
    }
    for dir in gone.iter().filter_map(|path| path.parent()) {
        // A copy that is made right after this has none of it.
        let _ = File::open(dir).and_then(|dir| dir.sync_all());
    }
    Ok(gone)
}
