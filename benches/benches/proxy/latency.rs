//! What a way adds to the round trip of 64 bytes.

use std::io::{Read, Write};

use adit_benches::duel::warm;
use adit_benches::report::{Better, Figure, rounds};

use crate::Options;
use crate::children::ECHO;
use crate::contender::{Contender, HAPROXY, nobody, ours, relays};
use crate::host::{Host, Target};

const TRIPS: usize = 4000;

/// Each contender's round trip without that of nobody in between, in turn.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let target = Target::start()?;
    let host = Host::start(&options.binaries, 1, target.port)?;
    let mut all = vec![nobody(&target), ours(&host, &target, 0)?];
    all.extend(relays(&host, &target));
    let mut times = vec![[Vec::new(), Vec::new()]; all.len()];
    let bar = rounds(options.rounds as u64);
    for _ in 0..options.rounds {
        let mut base = [0.0; 2];
        for (n, (one, times)) in all.iter().zip(&mut times).enumerate() {
            let took = trips(one)?;
            if n == 0 {
                base = took;
            }
            for (which, times) in times.iter_mut().enumerate() {
                times.push(took[which] - if n == 0 { 0.0 } else { base[which] });
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut out = Vec::new();
    for (which, title) in ["p50", "p99"].into_iter().enumerate() {
        let title = |what: &str| format!("{what} 64 B, {title}");
        out.push(Figure::alone(
            title("round trip with nobody in between,"),
            "us",
            Better::Lower,
            &times[0][which],
        ));
        for (one, theirs) in all.iter().zip(&times).skip(2) {
            let (must, aim) = match one.name {
                HAPROXY => (1.0, 0.7),
                _ => (1.0, 1.0),
            };
            let figure = Figure::alone(
                title("added latency,"),
                "us",
                Better::Lower,
                &times[1][which],
            );
            out.push(figure.beside(one.name, &theirs[which], must, aim));
        }
    }
    Ok(out)
}

/// Median and 99th percentile, us.
fn trips(contender: &Contender) -> anyhow::Result<[f64; 2]> {
    let mut client = contender.open(false, &[ECHO])?;
    let mut bytes = [7; 64];
    let mut times = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let begin = std::time::Instant::now();
        client.write_all(&bytes)?;
        client.read_exact(&mut bytes)?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    let of = warm(&mut times);
    Ok([of[0], of[1]])
}
