//! `cargo bench --bench backends [-- --peer PATH] [--binaries DIR] [--rounds N] [--only CELL] [--realtime] [--json]`: our vhost-user backend, in a process of its own,
//! beside the `vhost-device-vsock` binary, both driven by the same software guest, cell by cell in turn; medians.
//!
//! - The guest and the host's program are one thread that never sleeps, so that the backend is what is measured; it has
//!   the other core of two. What that thread costs is printed too.
//! - "socket": the host's end of a stream is a Unix socket, reached as the peer and Firecracker have it. "in process": it is
//!   a service inside our backend; the peer has no such thing, so its socket stands beside it.
//! - With `--realtime` (root) the harness and both backends run as SCHED_FIFO: other work on the machine does not count.
//! - Failures are figures, not skipped. Without `--peer` ours runs alone. `cargo xtask bench vsock` installs the peer.

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

/// What the command line says.
pub struct Options {
    peer: Option<PathBuf>,
    /// Where aditd and adit-port are, for tunnels.
    binaries: Option<PathBuf>,
    rounds: usize,
    json: bool,
    /// Only cells whose name has this in it: `64 KiB up`, `rtt`, `connections`, `crowd`…
    only: Option<String>,
}

impl Options {
    /// Tells whether a cell is to be measured.
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
            // What `cargo bench` passes.
            _ => {}
        }
    }
    if options.rounds == 0 {
        options.rounds = if options.peer.is_some() { 15 } else { 5 };
    }
    figures::run(&options)
}
