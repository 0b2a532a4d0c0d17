//! The main thread: waits for input, the operator's requests and the VM's end.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::terminal::Terminal;

use crate::api::Api;
use crate::bus::lock;
use crate::console::Console;
use crate::exit::{Exit, Reason};
use crate::machine::Machine;

/// A descriptor for the signals that end the VM. Call this before any thread is created: threads inherit the signal mask.
///
/// # Errors
/// No descriptor is left.
pub fn signals() -> anyhow::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    // Its terminal has gone: QEMU ends then, too.
    set.add(Signal::SIGHUP);
    set.thread_block()?;
    Ok(SignalFd::with_flags(
        &set,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

/// SIGTERM, SIGINT and SIGHUP end the VM, like pulling its plug. The VM's own end wakes the loop.
struct Ends(SignalFd, Arc<Exit>);

impl MutEventSubscriber for Ends {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.0.as_raw_fd());
        watch(ops, self.1.event().as_raw_fd());
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // Keeps an earlier reason, if there is one.
        self.1.end(Reason::Stopped);
    }
}

/// Sends all input to the serial line. A terminal is in raw mode while the VM runs; Ctrl-A x stops the VM.
struct Keyboard {
    line: Arc<Console>,
    exit: Arc<Exit>,
    /// Ctrl-A was typed.
    escaped: bool,
}

const ESCAPE: u8 = 1;

impl Keyboard {
    fn new(line: Arc<Console>, exit: Arc<Exit>) -> Self {
        // Fails if standard input is not a terminal.
        let _ = io::stdin().lock().set_raw_mode();
        Self {
            line,
            exit,
            escaped: false,
        }
    }

    fn typed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x') => self.exit.end(Reason::Stopped),
                // Ctrl-A twice sends one to the guest.
                _ => drop(self.line.type_in(&[byte])),
            }
        }
    }
}

impl MutEventSubscriber for Keyboard {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // epoll refuses a file or /dev/null: then there is no input.
        let _ = ops.add(Events::new_raw(libc::STDIN_FILENO, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let mut bytes = [0; 64];
        let room = self.line.room().min(bytes.len());
        match nix::unistd::read(io::stdin().as_fd(), &mut bytes[..room]) {
            Ok(n) if n > 0 => self.typed(&bytes[..n]),
            // The guest has no room for input. The descriptor stays readable, so this is called again at once.
            Ok(_) if room == 0 => std::thread::yield_now(),
            // End of input, or the terminal was closed.
            _ => drop(ops.remove(events)),
        }
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        let _ = io::stdin().lock().set_canon_mode();
    }
}

/// Watches a descriptor for reading.
pub fn watch(ops: &mut EventOps<'_>, fd: i32) {
    if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
        adit_print::note!("adit-vmm: a descriptor cannot be watched: {e}");
    }
}

/// Runs the event loop until the VM ends.
///
/// # Errors
/// The API's socket cannot be made, or waiting fails.
pub fn until_end(
    machine: &Arc<Mutex<Machine>>,
    signals: SignalFd,
    api: Option<&Path>,
) -> anyhow::Result<Reason> {
    let (exit, console) = {
        let machine = lock(machine);
        (machine.exit.clone(), machine.bus.console.clone())
    };
    let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
    events.add_subscriber(Box::new(Ends(signals, exit.clone())));
    events.add_subscriber(Box::new(Keyboard::new(console, exit.clone())));
    if let Some(path) = api {
        events.add_subscriber(Box::new(Api::open(path, machine.clone())?));
    }
    loop {
        if let Some(reason) = exit.reason() {
            return Ok(reason);
        }
        events.run().context("event loop")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_that_goes_away_ends_the_vm_as_sigterm_does() {
        let signals = signals().unwrap();
        for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
            nix::sys::signal::raise(signal).unwrap();
            let taken = signals.read_signal().unwrap().unwrap();
            assert_eq!(taken.ssi_signo, signal as u32);
        }
    }
}
