//! Log lines to stderr: at most [`LINES_PER_SECOND`], with control characters escaped, so that a guest can neither fill the disk
//! nor send escape sequences to a terminal. If stderr is a file, aditd truncates it. Without an aditd the file grows to
//! [`FILE_MAX`] at most.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::stat::fstat;
use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;

/// Most lines per second. A line says how many were left out.
pub const LINES_PER_SECOND: u32 = 20;

/// If stderr is a file of at least this length, nothing more is written to it.
pub const FILE_MAX: u64 = 4 << 20;

/// Starts logging.
pub fn start(level: Level) {
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_writer(Lines::default())
        .init();
}

/// Counts the lines of the current second.
#[derive(Debug, Default)]
struct Lines(Mutex<Second>);

#[derive(Debug, Default)]
struct Second {
    began: Option<Instant>,
    lines: u32,
    dropped: u64,
}

impl Second {
    /// Returns `Some` if a line may be written now, with the number of lines that were left out before it.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self
            .began
            .is_none_or(|began| now.duration_since(began) >= Duration::from_secs(1))
        {
            self.began = Some(now);
            self.lines = 0;
        }
        if self.lines >= LINES_PER_SECOND {
            self.dropped += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        let mut second = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if has_room(io::stderr()) {
            Line(second.admit(Instant::now()))
        } else {
            second.dropped += 1;
            Line(None)
        }
    }
}

/// Tells whether the file has room for one more line.
fn has_room(file: impl AsFd) -> bool {
    match fstat(file) {
        Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFREG => {
            u64::try_from(stat.st_size).is_ok_and(|len| len < FILE_MAX)
        }
        _ => true,
    }
}

/// One line. `None`: it is left out. `Some`: it is written, with the number of lines that were left out before it.
struct Line(Option<u64>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(dropped) = self.0 {
            let mut line = Vec::with_capacity(bytes.len() + 32);
            if dropped > 0 {
                line.extend_from_slice(format!("({dropped} lines left out)\n").as_bytes());
            }
            escape(bytes, &mut line);
            io::stderr().write_all(&line)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn escape(bytes: &[u8], out: &mut Vec<u8>) {
    let end = bytes.len().saturating_sub(1);
    for (at, &byte) in bytes.iter().enumerate() {
        match byte {
            b'\n' if at == end => out.push(byte),
            0..=0x1f | 0x7f => out.extend_from_slice(format!("\\x{byte:02x}").as_bytes()),
            _ => out.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_over_the_limit_are_counted_not_written() {
        let (mut second, now) = (Second::default(), Instant::now());
        let written = (0..100).filter(|_| second.admit(now).is_some()).count();
        assert_eq!(written, LINES_PER_SECOND as usize);
        assert_eq!(second.admit(now + Duration::from_secs(1)), Some(80));
    }

    #[test]
    fn r111_a_file_that_nobody_cuts_is_written_up_to_its_limit() {
        let file = tempfile::tempfile().unwrap();
        assert!(has_room(&file));
        file.set_len(FILE_MAX).unwrap();
        assert!(!has_room(&file));
        file.set_len(0).unwrap();
        assert!(has_room(&file));
        let (pipe, _other) = io::pipe().unwrap();
        assert!(has_room(&pipe));
    }

    #[test]
    fn control_characters_are_escaped() {
        let mut out = Vec::new();
        escape(b"a\x1b[31m\nforged\n", &mut out);
        assert_eq!(out, b"a\\x1b[31m\\x0aforged\n");
    }
}
