//! Texts that pass between aditd's two processes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::config::FILE_MAX;

/// Characters of a line for the service manager.
const LINE_MAX: usize = 500;

/// Puts a text into a file of memory that nobody changes any more.
///
/// # Errors
/// There is no memory.
pub fn file_of(text: &str) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("aditd.toml", flags)?;
    let mut file = File::from(file);
    file.write_all(text.as_bytes())?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// Reads such a file. Its position, which all who have it share, does not count and is not changed.
///
/// # Errors
/// It is no text, or too long.
pub fn text_in(file: OwnedFd) -> io::Result<String> {
    let file = File::from(file);
    let len = file.metadata()?.len();
    if len > FILE_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    String::from_utf8(bytes).map_err(io::Error::other)
}

/// A line without control characters, which the service manager would take for the next assignment.
pub fn line_of(text: &str) -> String {
    let printed = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(printed).take(LINE_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_again_and_again_and_nobody_changes_it() {
        let file = file_of("[proxy]\n").unwrap();
        for _ in 0..2 {
            let copy = file.try_clone().unwrap();
            assert_eq!(text_in(copy).unwrap(), "[proxy]\n");
        }
        let mut file = File::from(file);
        file.write_all(b"x").unwrap_err();
        file.set_len(0).unwrap_err();
    }

    #[test]
    fn a_status_is_one_line_and_short() {
        let hostile = format!("1 VMs\nMAINPID=1\nFDSTORE=1\r{}", "x".repeat(1 << 20));
        let line = line_of(&hostile);
        assert!(line.starts_with("1 VMs MAINPID=1") && line.len() <= LINE_MAX);
    }
}
