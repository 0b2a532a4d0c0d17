//! Initramfs archives: cpio, "newc" (Linux Documentation/driver-api/early-userspace/buffer-format.rst). One archive may follow
//! another, and files of the later one win. So a VM gets its identity without a new image.

use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// Writes one archive.
pub struct Writer<W> {
    out: W,
    written: usize,
    inode: u32,
}

/// Archives are padded to whole pages. QEMU's microvm loads an initramfs at the very end of memory, where its firmware puts the
/// ACPI tables: 3 KiB in the last page, which it loads first. An archive that ends inside that page may overwrite them, depending
/// on its length. One of whole pages ends before it.
const PAGE: usize = 4096;
const MODE_DIR: u32 = 0o040_000;
const MODE_FILE: u32 = 0o100_000;
const MODE_LINK: u32 = 0o120_000;

impl<W: Write> Writer<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 1,
        }
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn dir(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, MODE_DIR | 0o755, &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, MODE_FILE | mode, data)
    }

    /// Adds everything below a directory, owned by root, with its modes.
    ///
    /// # Errors
    /// It cannot be read, or the output cannot be written.
    pub fn tree(&mut self, root: &Path) -> io::Result<()> {
        self.below(root, "")
    }

    fn below(&mut self, dir: &Path, prefix: &str) -> io::Result<()> {
        let mut entries: Vec<_> = std::fs::read_dir(dir)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let meta = entry.path().symlink_metadata()?;
            let mode = meta.permissions().mode() & 0o7777;
            if meta.is_dir() {
                self.entry(&name, MODE_DIR | mode, &[])?;
                self.below(&entry.path(), &format!("{name}/"))?;
            } else if meta.is_symlink() {
                let to = std::fs::read_link(entry.path())?;
                self.entry(&name, MODE_LINK | 0o777, to.to_string_lossy().as_bytes())?;
            } else if meta.size() <= u64::from(u32::MAX) {
                self.file(&name, mode, &std::fs::read(entry.path())?)?;
            }
        }
        Ok(())
    }

    /// Ends the archive and returns the output.
    ///
    /// # Errors
    /// The output cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        let padding = self.written.wrapping_neg() % PAGE;
        self.put(&[0; PAGE][..padding])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let (inode, size, name_size) = (self.inode, data.len(), name.len() + 1);
        self.inode += 1;
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
            0, 1
        );
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let padding = self.written.wrapping_neg() % 4;
        self.put(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_padded_to_whole_pages_and_so_is_one_behind_it() {
        let mut archive = Vec::new();
        for len in [0, 1, 3000, 4096, 10_000] {
            let mut writer = Writer::new(archive);
            writer.file("a", 0o644, &vec![b'x'; len]).unwrap();
            archive = writer.finish().unwrap();
            assert_eq!(archive.len() % PAGE, 0, "{len}");
        }
    }
}
