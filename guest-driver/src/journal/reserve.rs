//! Disk space that is held back for results: a task has started, its effect is real, and how it ended must be written even
//! when the disk is full by then.
//!
//! A file beside the journal has the space. It is there before a task starts (else the task does not start), and is
//! removed when a result does not fit.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// Held back: the longest report, which is two outputs of 256 KiB, in the database's pages of a power of two, and the
/// pages around it.
pub const RESERVE_BYTES: u32 = 2 << 20;

/// What `st_blocks` counts.
const BLOCK_BYTES: u64 = 512;

/// The file.
#[derive(Debug)]
pub struct Reserve(PathBuf);

impl Reserve {
    /// Will be at this path.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Has the space, now or since before.
    ///
    /// # Errors
    /// There is not so much.
    pub fn hold(&self) -> io::Result<()> {
        if fs::symlink_metadata(&self.0).is_ok_and(|meta| has_the_space(&meta)) {
            return Ok(());
        }
        // Whatever else is there: a link must not be followed, and a fifo would be waited for.
        self.release();
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let held = options.open(&self.0).and_then(|file| fill(&file));
        if held.is_err() {
            self.release();
        }
        held
    }

    /// Gives the space back to the file system.
    pub fn release(&self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A copy of a disk or a directory may have the length without the space.
fn has_the_space(meta: &Metadata) -> bool {
    let bytes = u64::from(RESERVE_BYTES);
    meta.is_file() && meta.len() == bytes && meta.blocks() * BLOCK_BYTES >= bytes
}

fn fill(mut file: &File) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, RESERVE_BYTES.into()) {
        // A file system without it has the space once it is written.
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
            file.write_all(&vec![0; RESERVE_BYTES as usize])?;
            file.sync_all()
        }
        done => Ok(done?),
    }
}
