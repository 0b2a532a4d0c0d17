//! The serial line: a 16550 whose output goes to the terminal or to a file.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::lock;

/// Where the line ends.
#[derive(Clone, Debug)]
pub enum Line {
    /// This process's terminal.
    Stdio,
    /// A file; nothing can be typed.
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

/// The interrupt of the line.
pub struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Output that never fails: a guest does not stop because a log is full or a terminal is gone.
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

/// The serial line.
pub struct Console(Mutex<Serial<Irq, NoEvents, Out>>);

/// The line's registers, and what was typed and not read.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LineState(#[serde(with = "Registers")] SerialState);

/// What a [`SerialState`] is, for `serde`.
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
    /// Opens the line; `interrupt` is the irqfd of its GSI. `state`: of a line that was saved.
    ///
    /// # Errors
    /// The file cannot be written, or the state is no line's.
    pub fn open(line: &Line, interrupt: EventFd, state: &LineState) -> anyhow::Result<Arc<Self>> {
        let out: Box<dyn Write + Send> = match line {
            Line::Stdio => Box::new(io::stdout()),
            Line::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                Box::new(file.with_context(|| format!("cannot write {}", path.display()))?)
            }
        };
        let serial = Serial::from_state(&state.0, Irq(interrupt), NoEvents, Out(out))
            .map_err(|e| anyhow::anyhow!("serial line: {e:?}"))?;
        Ok(Arc::new(Self(Mutex::new(serial))))
    }

    /// The registers, and what was typed and not read.
    pub fn save(&self) -> LineState {
        LineState(lock(&self.0).state())
    }

    /// Reads a register.
    pub fn read(&self, register: u8) -> u8 {
        lock(&self.0).read(register)
    }

    /// Writes a register.
    pub fn write(&self, register: u8, value: u8) {
        // Fails when nothing listens to the interrupt any more: the VM is ending.
        let _ = lock(&self.0).write(register, value);
    }

    /// Types; returns how many bytes the line took.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        lock(&self.0).enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// How much can be typed now.
    pub fn room(&self) -> usize {
        lock(&self.0).fifo_capacity()
    }
}
