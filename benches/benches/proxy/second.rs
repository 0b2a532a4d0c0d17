//! A VM of another host: bytes through its tunnels, and tunnels opened in a second.

use std::net::SocketAddr;

use adit_benches::report::{Better, Figure, rounds};

use crate::Options;
use crate::bulk::{Way, rate};
use crate::contender::{Contender, HAPROXY, ours, two_haproxies};
use crate::host::{Host, Identity, Target};
use crate::opened::{CLIENTS, open, together};

/// Each contender's rate, in turn.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let target = Target::start()?;
    let (alpha, beta) = (Identity::new("alpha")?, Identity::new("beta")?);
    // It asks nobody.
    let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
    let far = Host::named(
        &options.binaries,
        1,
        target.port,
        &beta,
        &alpha.section(nowhere),
    )?;
    // Its agent is there.
    ours(&far, &target, 0)?;
    let near = Host::named(
        &options.binaries,
        0,
        target.port,
        &alpha,
        &beta.section(far.tls),
    )?;
    let ours = ours(&near, &target, 0)?;
    let (relay, _second) = two_haproxies(&near, &target)?;
    type Cell = fn(&Contender) -> anyhow::Result<f64>;
    let cells: [(&str, &str, Cell); 4] = [
        ("64 KiB to client", "MiB/s", |one| {
            rate(one, Way::ToClient, false)
        }),
        ("64 KiB from client", "MiB/s", |one| {
            rate(one, Way::FromClient, false)
        }),
        ("tunnels opened, one client", "/s", |one| {
            together(1, || open(one, false))
        }),
        ("tunnels opened, 8 clients", "/s", |one| {
            together(CLIENTS, || open(one, false))
        }),
    ];
    let bar = rounds(options.rounds as u64);
    let mut out = Vec::new();
    for (title, unit, cell) in cells {
        let (mut own, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            own.push(cell(&ours)?);
            theirs.push(cell(&relay)?);
            bar.inc(1);
        }
        let title = format!("via a second host, {title}");
        let figure = Figure::alone(&title, unit, Better::Higher, &own);
        out.push(figure.beside(HAPROXY, &theirs, 0.7, 1.0));
    }
    bar.finish_and_clear();
    Ok(out)
}
