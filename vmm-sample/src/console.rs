//! The serial line: a 16550 whose output goes to the terminal or to a file. The file's length is limited ([`FILE_MAX`]): a
//! guest that writes without end must not fill the host's disk. The thread that writes may not open or truncate a file
//! (`seccomp`), so it cannot rotate the file either: the rest of the output is dropped, and a last line says so.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::lock;

/// Longest file with a serial line's output, bytes.
pub const FILE_MAX: u64 = 64 << 20;

/// Where the line's output goes.
#[derive(Clone, Debug)]
pub enum Line {
    /// This process's terminal.
    Stdio,
    /// A file. There is no input then.
    File(PathBuf),
}

impl std::str::FromStr for Line {
    type Err = std::convert::Infallible;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s {
            "stdio" => Self::Stdio,
            path => Self::File(path.into()),
        })
    }
}

/// The line's interrupt.
pub struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Output that never fails: a guest must not stop because a disk is full or a terminal is closed.
struct Out(Box<dyn Write + Send>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes).and_then(|n| self.0.flush().map(|()| n));
        Ok(written.unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file with a limited length.
struct Bounded {
    file: File,
    left: u64,
}

impl Bounded {
    /// Appends to a file that may have content already. Something else than a regular file (a pipe, a terminal) has no limit.
    fn new(file: File, max: u64) -> io::Result<Self> {
        let meta = file.metadata()?;
        let left = match meta.is_file() {
            true => max.saturating_sub(meta.len()),
            false => u64::MAX,
        };
        Ok(Self { file, left })
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(bytes.len());
        }
        let fits = usize::try_from(self.left).unwrap_or(usize::MAX);
        let written = self.file.write(&bytes[..bytes.len().min(fits)])?;
        self.left -= written as u64;
        if self.left == 0 {
            self.file.write_all(END)?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The last line of a file that is full.
const END: &[u8] =
    b"\nadit-vmm: this file is full: what the guest writes from here on is dropped\n";

/// The serial line.
pub struct Console(Mutex<Serial<Irq, NoEvents, Out>>);

/// The line's registers, and the input that the guest has not read yet.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LineState(#[serde(with = "Registers")] SerialState);

/// The fields of [`SerialState`], for `serde`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl Console {
    /// Opens the line. `interrupt` is the irqfd of its GSI, `state` the state of a saved line.
    ///
    /// # Errors
    /// The file cannot be written, or the state is invalid.
    pub fn open(line: &Line, interrupt: EventFd, state: &LineState) -> anyhow::Result<Arc<Self>> {
        let out: Box<dyn Write + Send> = match line {
            Line::Stdio => Box::new(io::stdout()),
            Line::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                let file = file.and_then(|file| Bounded::new(file, FILE_MAX));
                let file = file.with_context(|| format!("cannot write {}", path.display()))?;
                if file.left == 0 {
                    let mib = FILE_MAX >> 20;
                    let path = path.display();
                    adit_print::note!(
                        "adit-vmm: {path} has {mib} MiB, so the serial line's output is dropped: move the file away"
                    );
                }
                Box::new(file)
            }
        };
        let serial = Serial::from_state(&state.0, Irq(interrupt), NoEvents, Out(out))
            .map_err(|e| anyhow::anyhow!("serial line: {e:?}"))?;
        Ok(Arc::new(Self(Mutex::new(serial))))
    }

    /// The registers, and the input that the guest has not read yet.
    pub fn save(&self) -> LineState {
        LineState(lock(&self.0).state())
    }

    /// Reads a register.
    pub fn read(&self, register: u8) -> u8 {
        lock(&self.0).read(register)
    }

    /// Writes a register.
    pub fn write(&self, register: u8, value: u8) {
        // Fails only if the interrupt's descriptor is closed: the VM is ending.
        let _ = lock(&self.0).write(register, value);
    }

    /// Adds input. Returns how many bytes fitted.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        lock(&self.0).enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// How many bytes of input fit now.
    pub fn room(&self) -> usize {
        lock(&self.0).fifo_capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(to: &mut Bounded, bytes: &[u8]) {
        to.write_all(bytes).unwrap();
    }

    #[test]
    fn a_file_ends_at_its_limit_with_a_line_that_says_so_also_when_it_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(&path);
            Bounded::new(file.unwrap(), 10).unwrap()
        };
        all(&mut open(), b"1234");
        let mut line = open();
        all(&mut line, b"5678");
        all(&mut line, b"90 is lost");
        all(&mut line, b"and this");
        assert_eq!(std::fs::read(&path).unwrap(), [b"1234567890", END].concat());
        let mut line = open();
        assert_eq!(line.left, 0);
        all(&mut line, b"nor more of it");
        assert_eq!(std::fs::read(&path).unwrap(), [b"1234567890", END].concat());
    }

    #[test]
    fn a_pipe_or_device_has_no_limit() {
        let null = OpenOptions::new().append(true).open("/dev/null").unwrap();
        assert_eq!(Bounded::new(null, 1).unwrap().left, u64::MAX);
    }

    /// Tests the whole path, from the guest's register to the file.
    #[test]
    fn a_guest_that_writes_without_end_fills_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        // A sparse file, nearly full.
        std::fs::File::create(&path)
            .unwrap()
            .set_len(FILE_MAX - 3)
            .unwrap();
        let irq = EventFd::new(0).unwrap();
        let line = Line::File(path.clone());
        let console = Console::open(&line, irq, &LineState::default()).unwrap();
        for _ in 0..10_000 {
            console.write(0, b'x');
        }
        let len = std::fs::metadata(&path).unwrap().len();
        assert_eq!(len, FILE_MAX + END.len() as u64);
    }
}
