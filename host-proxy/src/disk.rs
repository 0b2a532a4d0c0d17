//! Whether a file system is full: many errors that this causes do not say so.

use std::path::Path;

/// Fewer bytes free than this is full: not even a small file can be written, or soon none.
const FULL_BYTES: u64 = 64 << 10;

/// Whether the file system of this path is full. One that cannot be asked is not.
pub fn is_full(path: &Path) -> bool {
    adit_blob::disk::free(path).is_ok_and(|free| free < FULL_BYTES)
}
