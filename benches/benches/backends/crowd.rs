//! Figures of our backend with very many connections, and with none.

use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure, median};
use adit_testkit::DriverConfig;
use anyhow::bail;

use crate::Options;
use crate::guest::{Key, PATIENCE};
use crate::hybrid::{ECHO, STREAMS};
use crate::measure::{self, CELL, Open};
use crate::process::{Backend, Kind};

const PEER: &str = "vhost-device-vsock";
const CROWD: usize = 10_000;
const READERS: usize = 100;

/// Measures all of them.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let mut out = many(options)?;
    out.push(stopped_reader(options)?);
    out.extend(idle(options)?);
    out.push(copies(options)?);
    Ok(out)
}

fn ours() -> anyhow::Result<Backend> {
    Backend::start(Kind::Ours, None, DriverConfig::LINUX_6_1)
}

/// Opens `n` streams that end in the backend.
fn open_many(backend: &mut Backend, n: usize) -> anyhow::Result<Vec<Key>> {
    let mut keys = Vec::new();
    while keys.len() < n {
        let batch: Vec<Key> = (0..64.min(n - keys.len()))
            .map(|_| backend.guest.request(ECHO))
            .collect();
        let begin = Instant::now();
        while batch.iter().any(|k| !backend.guest.conn(*k).open) {
            backend.guest.pump();
            if begin.elapsed() > PATIENCE {
                bail!("{} streams open, then no more", keys.len());
            }
        }
        keys.extend(batch);
    }
    Ok(keys)
}

/// RTT with 10,000 open streams against one, memory of a stream, and the largest number of streams.
fn many(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let (mut alone, mut crowded, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    let mut one = ours()?;
    let open = Open {
        key: one.guest.connect(ECHO)?,
        host: None,
    };
    let mut many = ours()?;
    let first = Open {
        key: many.guest.connect(ECHO)?,
        host: None,
    };
    let before = many.usage()?.anon;
    open_many(&mut many, CROWD)?;
    memory.push((many.usage()?.anon as f64 - before as f64) / CROWD as f64);
    for _ in 0..options.rounds.max(5) {
        alone.push(median(&measure::round_trips_on(&mut one, &open, 64)?) / 1000.0);
        crowded.push(median(&measure::round_trips_on(&mut many, &first, 64)?) / 1000.0);
    }
    open_many(&mut many, STREAMS as usize - CROWD - 1)?;
    let most = many.guest.open() as f64;
    Ok(vec![
        Figure::alone(
            "RTT 64 B with 10,000 streams open",
            "us",
            Better::Lower,
            &crowded,
        )
        .beside("one stream", &alone, 1.2, 1.05),
        Figure::alone(
            "memory of an idle stream (RssAnon)",
            "B",
            Better::Lower,
            &memory,
        )
        .goal(4096.0, 1024.0),
        Figure::alone("streams of one VM at a time", "", Better::Higher, &[most])
            .goal(f64::from(STREAMS), f64::from(STREAMS)),
    ])
}

/// Bytes that 99 streams move while the reader of a hundredth has stopped, against the same without the hundredth.
fn stopped_reader(options: &Options) -> anyhow::Result<Figure> {
    let mut backend = ours()?;
    let open: Vec<Open> = (0..READERS)
        .map(|_| measure::open_socket(&mut backend))
        .collect::<anyhow::Result<_>>()?;
    let (stopped, others) = (&open[0], &open[1..]);
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds.max(5) {
        without.push(move_on(&mut backend, others, None)?);
        with.push(move_on(&mut backend, others, Some(stopped))?);
    }
    Ok(Figure::alone(
        "99 streams, the hundredth's reader stopped",
        "MiB/s",
        Better::Higher,
        &with,
    )
    .beside("99 streams alone", &without, 0.95, 1.0))
}

fn move_on(backend: &mut Backend, others: &[Open], stopped: Option<&Open>) -> anyhow::Result<f64> {
    let mut buf = vec![0; measure::SPAN];
    let (begin, mut moved) = (Instant::now(), 0);
    while begin.elapsed() < CELL {
        for open in stopped.into_iter().chain(others) {
            let n = backend.guest.credit(open.key).min(4096);
            if n > 0 {
                backend.guest.send(open.key, n, None);
            }
        }
        backend.guest.pump();
        for open in others {
            if let Some(host) = &open.host {
                moved += measure::read_all(host, &mut buf)?;
            }
        }
    }
    Ok(moved as f64 / begin.elapsed().as_secs_f64() / f64::from(1 << 20))
}

/// Context switches of the whole process in a second without traffic, with one open stream: with polling, and without.
fn idle(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let mut kinds = vec![Kind::Ours, Kind::OursSleeping];
    let peer = options.peer.as_deref();
    kinds.extend(peer.map(|_| Kind::Peer));
    let mut counts = Vec::new();
    for kind in kinds {
        let mut backend = Backend::start(kind, peer, DriverConfig::LINUX_6_1)?;
        let open = measure::open_socket(&mut backend)?;
        measure::round_trips_on(&mut backend, &open, 64)?;
        // Wait until the work after the last round trip is done.
        std::thread::sleep(Duration::from_millis(300));
        let before = backend.usage()?.switches;
        std::thread::sleep(Duration::from_secs(1));
        counts.push((backend.usage()?.switches - before) as f64);
    }
    let ours = [("", counts[0]), (" (no polling)", counts[1])];
    Ok(ours
        .map(|(words, count)| {
            let name = format!("wake-ups in an idle second{words}");
            Figure {
                peer: counts.get(2).copied(),
                peer_name: counts.get(2).map(|_| PEER),
                ..Figure::alone(name, "", Better::Lower, &[count]).goal(0.0, 0.0)
            }
        })
        .into())
}

/// How often a payload byte is copied, in our process or by the kernel for it: 64 KiB in each direction through sockets.
fn copies(_: &Options) -> anyhow::Result<Figure> {
    let mut backend = ours()?;
    let before = backend.totals()?;
    measure::upload(&mut backend, measure::End::Socket, 65536)?;
    measure::download(&mut backend, measure::End::Socket, 65536)?;
    let after = backend.totals()?;
    let copied =
        (after.guest_copies - before.guest_copies) + (after.copies_beside - before.copies_beside);
    let each = copied as f64 / (after.payload - before.payload) as f64;
    Ok(Figure::alone(
        "copies of a byte, 64 KiB each way, socket",
        "",
        Better::Lower,
        &[each],
    )
    .goal(1.01, 1.0))
}
