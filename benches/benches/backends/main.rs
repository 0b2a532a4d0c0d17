//! `cargo bench --bench backends [-- --peer PATH] [--binaries DIR] [--rounds N] [--only CELL] [--realtime] [--json]`: our
//! vhost-user backend beside the `vhost-device-vsock` binary. Each is a process of its own, and the same software guest drives
//! both. The backends take turns in each cell. The figures are medians.
//!
//! - The guest and the host program are one thread that never sleeps, so that the backend is what is measured. The backend has
//!   the other of two cores. The cost of the harness's thread is printed too.
//! - "socket": the host's end of a stream is a Unix socket, reached as with the peer and Firecracker. "in process": it is a
//!   service inside our backend. The peer has no such thing, so it is compared with the peer's socket.
//! - With `--realtime` (root) the harness and both backends run as SCHED_FIFO, so other work on the machine does not disturb.
//! - A failure is a figure, not a skipped cell. Without `--peer` ours runs alone. `cargo xtask bench vsock` installs the peer.

mod crowd;
mod figures;
mod frontend;
mod guest;
mod hybrid;
mod measure;
mod process;
mod tunnel;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

/// The command line.
pub struct Options {
    peer: Option<PathBuf>,
    /// Directory of aditd and adit-port, for tunnels.
    binaries: Option<PathBuf>,
    rounds: usize,
    json: bool,
    /// Run only cells whose name contains this: `64 KiB up`, `rtt`, `connections`, `crowd`…
    only: Option<String>,
}

impl Options {
    /// Tells whether a cell should run.
    fn wants(&self, cell: &str) -> bool {
        self.only.as_ref().is_none_or(|only| cell.contains(only))
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut options = Options {
        peer: None,
        binaries: None,
        rounds: 0,
        json: false,
        only: None,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--serve" => {
                let dir = PathBuf::from(value()?);
                let us = args.next().and_then(|us| us.parse().ok()).unwrap_or(0);
                return hybrid::serve(&dir, Duration::from_micros(us));
            }
            "--peer" => options.peer = Some(value()?.into()),
            "--binaries" => options.binaries = Some(value()?.into()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
            "--realtime" => adit_benches::realtime::realtime(),
            "--only" => options.only = Some(value()?),
            "--json" => options.json = true,
            // Arguments that `cargo bench` adds.
            _ => {}
        }
    }
    if options.rounds == 0 {
        options.rounds = if options.peer.is_some() { 15 } else { 5 };
    }
    figures::run(&options)
}
