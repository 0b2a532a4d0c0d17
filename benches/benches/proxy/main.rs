//! `cargo bench --bench proxy -- --binaries DIR [--rounds N] [--only CELL] [--realtime] [--json]`: a real `aditd` with its port
//! process, and the guest's agent as a process on a ring, beside relays of Debian in the same run.
//!
//! ```text
//! ours:    client ── TCP ── adit-port ══ ring ══ agent ── TCP ── server        (aditd makes tunnels, and carries only TLS and HTTP)
//! haproxy: client ── TCP ── haproxy ── TCP ── server
//! second:  client ── TCP ── aditd ══ mTLS ══ aditd ── adit-port ══ ring ══ agent ── TCP ── server
//!          client ── TCP ── haproxy ══ mTLS ══ haproxy ── TCP ── server
//! ```
//! - The server is one process for all. Ours has one process more in the way than a relay: the agent, which stands for the
//!   guest, without a VM around it, so that no VM is measured.
//! - Contenders take turns in each round; figures are medians, and ratios are of the same rounds.
//! - haproxy has one thread and buffers of 64 KiB.

mod bulk;
mod children;
mod client;
mod contender;
mod crowd;
mod host;
mod latency;
mod opened;
mod second;
mod tables;

use std::path::PathBuf;

use anyhow::Context;

/// The command line.
pub struct Options {
    /// Directory of aditd and adit-port.
    binaries: PathBuf,
    rounds: usize,

    only: Option<String>,
}

impl Options {
    fn wants(&self, cell: &str) -> bool {
        self.only.as_ref().is_none_or(|only| cell.contains(only))
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (mut binaries, mut rounds, mut json, mut only) = (None, 9, false, None);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--server" => return children::server(),
            "--agent" => {
                let socket = value()?;
                let ports = args.map(|port| port.parse()).collect::<Result<_, _>>()?;
                return children::agent(socket.as_ref(), ports);
            }
            "--binaries" => binaries = Some(PathBuf::from(value()?)),
            "--rounds" => rounds = value()?.parse().context("--rounds")?,
            "--realtime" => adit_benches::realtime::realtime(),
            "--only" => only = Some(value()?),
            "--json" => json = true,
            // Arguments that `cargo bench` adds.
            _ => {}
        }
    }
    let Some(binaries) = binaries else {
        eprintln!(
            "skipped: --binaries DIR says where aditd and adit-port are; `cargo xtask bench proxy` builds them"
        );
        return Ok(());
    };
    let options = Options {
        binaries,
        rounds,
        only,
    };
    type Cell = fn(&Options) -> anyhow::Result<Vec<adit_benches::report::Figure>>;
    let cells: [(&str, Cell); 6] = [
        ("tables", tables::figures),
        ("bulk", bulk::figures),
        ("opened", opened::figures),
        ("latency", latency::figures),
        ("crowd", crowd::figures),
        ("second", second::figures),
    ];
    for (name, figures) in cells {
        if options.wants(name) {
            for figure in figures(&options)? {
                figure.print(json);
            }
        }
    }
    Ok(())
}
