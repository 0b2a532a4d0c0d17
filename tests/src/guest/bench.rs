//! What a guest measures of its own sockets: round trips of 64 bytes, and a stream that is written in pieces of 64 KiB until
//! its other end has all of it. A line a figure, for whoever reads the console.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use vsock::VsockStream;

/// Connections on which round trips are measured, one after the other: which CPU wakes which changes with time.
const SERIES: usize = 5;
/// Round trips of each, after a tenth as many that do not count.
const TRIPS: usize = 2000;
const STREAMS: usize = 3;
const STREAM_BYTES: usize = 32 << 20;
const PIECE: usize = 64 << 10;
/// A stream that stands still for so long is a failure.
const SILENCE: Duration = Duration::from_secs(10);

/// Measures against a port that echoes, and one that takes as many bytes as the first eight say and answers with one.
/// Only the figures whose name has `only` in it.
pub fn run(name: &str, cid: u32, echo: u32, sink: u32, only: &str) {
    type Measure<'a> = &'a dyn Fn() -> io::Result<Vec<f64>>;
    let figures: [(&str, Measure<'_>); 2] = [
        ("rtt_ns", &|| round_trips(cid, echo)),
        ("bytes_per_s", &|| {
            (0..STREAMS).map(|_| stream(cid, sink)).collect()
        }),
    ];
    for (figure, measure) in figures.iter().filter(|(figure, _)| figure.contains(only)) {
        match median(measure()) {
            Ok(value) => println!("ADIT-BENCH {name} {figure} {value:.0}"),
            Err(e) => println!("ADIT-BENCH {name} {figure} failed: {e}"),
        }
    }
}

fn dial(cid: u32, port: u32) -> io::Result<VsockStream> {
    let stream = VsockStream::connect_with_cid_port(cid, port)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}

fn round_trips(cid: u32, port: u32) -> io::Result<Vec<f64>> {
    let (sent, mut got) = ([7; 64], [0; 64]);
    let mut times = Vec::with_capacity(SERIES * TRIPS);
    for _ in 0..SERIES {
        let mut stream = dial(cid, port)?;
        for trip in 0..TRIPS + TRIPS / 10 {
            let begin = Instant::now();
            stream.write_all(&sent)?;
            stream.read_exact(&mut got)?;
            if trip >= TRIPS / 10 {
                times.push(begin.elapsed().as_nanos() as f64);
            }
        }
    }
    Ok(times)
}

fn stream(cid: u32, port: u32) -> io::Result<f64> {
    let mut stream = dial(cid, port)?;
    let piece = vec![7; PIECE];
    // How much to wait for. A half-close would do, if it were passed on by whoever is measured.
    stream.write_all(&(STREAM_BYTES as u64).to_le_bytes())?;
    let begin = Instant::now();
    for _ in 0..STREAM_BYTES / PIECE {
        stream.write_all(&piece)?;
    }
    // The answer: all of it is there.
    stream.read_exact(&mut [0])?;
    Ok(STREAM_BYTES as f64 / begin.elapsed().as_secs_f64())
}

fn median(values: io::Result<Vec<f64>>) -> io::Result<f64> {
    let mut values = values?;
    values.sort_by(f64::total_cmp);
    let middle = values.get(values.len() / 2).copied();
    middle.ok_or_else(|| io::Error::other("nothing was measured"))
}
