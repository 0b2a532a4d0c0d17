//! The root of a VM image, as what puts files into images sees it.
//!
//! | kind | what it is |
//! |---|---|
//! | [`Dir`] | a directory, as `debootstrap` makes it |
//! | [`Ext4`] | an ext4 file system in a file, read by `ext4-view` and written by `debugfs`: nothing is mounted |
//! | [`Disk`] | a disk image: raw or qcow2, with or without a partition table; finds the [`Ext4`] that is the root |
//!
//! No link in an image leads out of it: in a directory the kernel sees to that (`openat2`), and in a file system there is no
//! way out.

mod dir;
#[cfg(feature = "disk")]
mod disk;
#[cfg(feature = "disk")]
mod ext4;
#[cfg(feature = "disk")]
mod program;

use std::io;

pub use dir::Dir;
#[cfg(feature = "disk")]
pub use disk::{Disk, DiskError};
#[cfg(feature = "disk")]
pub use ext4::{Ext4, Ext4Error};
#[cfg(feature = "disk")]
pub use program::NoProgram;

/// An image's root directory. Paths are relative to it, without `.` and `..`; directories that are missing are made.
pub trait Root {
    /// Tells whether there is something at a path; a link is followed, within the image.
    fn has(&self, path: &str) -> bool;

    /// Tells whether two paths lead to one file; links are followed, within the image.
    fn is_same(&self, one: &str, other: &str) -> bool;

    /// Puts a file there, unless it is there already with this content and mode; true if it changes.
    ///
    /// # Errors
    /// It cannot be written; the old one is there then.
    fn place(&mut self, path: &str, content: &[u8], mode: u32) -> io::Result<bool>;

    /// Makes a symbolic link, unless it is there already; true if it changes.
    ///
    /// # Errors
    /// It cannot be made; what was there before is there then.
    fn place_link(&mut self, path: &str, target: &str) -> io::Result<bool>;
}

/// What only root may read: directories that are made there are closed to others.
const PRIVATE: &str = "etc/adit-guest";

/// Mode of a directory that is made at `path`.
fn dir_mode(path: &str) -> u32 {
    let private = path == PRIVATE
        || path
            .strip_prefix(PRIVATE)
            .is_some_and(|p| p.starts_with('/'));
    if private { 0o700 } else { 0o755 }
}
