//! `cargo bench --bench backends [-- --peer PATH] [--rounds N] [--json]`: our vhost-user backend, in a process of its own,
//! beside the `vhost-device-vsock` binary, both driven by the same software guest, cell by cell in turn; medians.
//!
//! - The guest and the host's program are one thread that never sleeps, so that the backend is what is measured; it has
//!   the other core of two. What that thread costs is printed too.
//! - "socket": the host's end of a stream is a Unix socket, reached as the peer and Firecracker have it. "in process": it is
//!   a service inside our backend; the peer has no such thing, so its socket stands beside it.
//! - Failures are figures, not skipped. Without `--peer` ours runs alone. `cargo xtask bench vsock` installs the peer.

mod crowd;
mod figures;
mod frontend;
mod guest;
mod hybrid;
mod measure;
mod process;

use std::path::PathBuf;

use anyhow::Context;

/// What the command line says.
pub struct Options {
    peer: Option<PathBuf>,
    rounds: usize,
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut options = Options {
        peer: None,
        rounds: 0,
        json: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--serve" => return hybrid::serve(&PathBuf::from(value()?)),
            "--peer" => options.peer = Some(value()?.into()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
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
