//! Bytes one way through a tunnel, as fast as they go.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure, rounds};

use crate::Options;
use crate::children::{SINK, SINK_SAYS, SOURCE};
use crate::contender::{Contender, HAPROXY, ours, relays};
use crate::host::{Host, Target};

const PIECE: usize = 64 << 10;
const WARM: usize = 8 << 20;
const CELL: Duration = Duration::from_millis(150);

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The VM sends.
    ToClient,
    /// The client does.
    FromClient,
}

/// Each contender's rate, in turn.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let target = Target::start()?;
    let host = Host::start(&options.binaries, 1, target.port)?;
    let ours = ours(&host, &target, 0)?;
    let relays = relays(&host, &target);
    let cells = [
        ("to client", Way::ToClient, false),
        ("from client", Way::FromClient, false),
        ("to client, TLS", Way::ToClient, true),
        ("from client, TLS", Way::FromClient, true),
    ];
    let bar = rounds(options.rounds as u64);
    let mut out = Vec::new();
    for (title, way, tls) in cells {
        let there: Vec<&Contender> = std::iter::once(&ours)
            .chain(&relays)
            .filter(|one| !tls || one.tls.is_some())
            .collect();
        let mut rates = vec![Vec::new(); there.len()];
        for _ in 0..options.rounds {
            for (one, rates) in there.iter().zip(&mut rates) {
                rates.push(rate(one, way, tls)?);
            }
            bar.inc(1);
        }
        let title = format!("CONNECT tunnel, 64 KiB {title}");
        let figure = || Figure::alone(&title, "MiB/s", Better::Higher, &rates[0]);
        for (one, rates) in there.iter().zip(&rates).skip(1) {
            let (must, aim) = match (one.name, tls) {
                (HAPROXY, false) => (1.0, 2.0),
                (HAPROXY, true) => (0.8, 1.0),
                _ => (1.0, 1.0),
            };
            out.push(figure().beside(one.name, rates, must, aim));
        }
    }
    bar.finish_and_clear();
    Ok(out)
}

/// MiB per second.
pub fn rate(contender: &Contender, way: Way, tls: bool) -> anyhow::Result<f64> {
    let first = match way {
        Way::ToClient => SOURCE,
        Way::FromClient => SINK,
    };
    let mut client = contender.open(tls, &[first])?;
    let mut piece = vec![7; PIECE];
    let mut step = || -> anyhow::Result<usize> {
        if way == Way::ToClient {
            return Ok(client.read(&mut piece)?);
        }
        // What counts has arrived at the server: one MiB more is under way at most.
        for _ in 0..SINK_SAYS / PIECE {
            client.write_all(&piece)?;
        }
        Ok(SINK_SAYS)
    };
    let mut moved = 0;
    while moved < WARM {
        moved += step()?;
    }
    let (begin, mut moved) = (Instant::now(), 0);
    while begin.elapsed() < CELL {
        moved += step()?;
    }
    if way == Way::FromClient {
        let mut said = vec![0; (WARM + moved) / SINK_SAYS];
        client.read_exact(&mut said)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    Ok(moved as f64 / seconds / f64::from(1 << 20))
}
