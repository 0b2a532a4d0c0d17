//! Measures the guest's own sockets: round trips of 64 bytes, and a stream that is written in pieces of 64 KiB until the other end
//! has all of it. Prints a line for each figure on the console.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use vsock::VsockStream;

/// Round trips are measured on several connections, one after the other: which CPU wakes which changes with time.
const SERIES: usize = 5;
/// Round trips on each connection. A tenth as many before them are not counted.
const TRIPS: usize = 2000;
const STREAMS: usize = 3;
const STREAM_BYTES: usize = 32 << 20;
const PIECE: usize = 64 << 10;
/// A stream without progress for this time has failed.
const SILENCE: Duration = Duration::from_secs(10);

/// Measures against a port that echoes, and against one that reads as many bytes as the first eight say and answers with one.
/// Measures only the figures whose name contains `only`.
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
    // How much to read. A half-close would do, if every backend passed it on.
    stream.write_all(&(STREAM_BYTES as u64).to_le_bytes())?;
    let begin = Instant::now();
    for _ in 0..STREAM_BYTES / PIECE {
        stream.write_all(&piece)?;
    }
    // The answer says that all of it has arrived.
    stream.read_exact(&mut [0])?;
    Ok(STREAM_BYTES as f64 / begin.elapsed().as_secs_f64())
}

fn median(values: io::Result<Vec<f64>>) -> io::Result<f64> {
    let mut values = values?;
    values.sort_by(f64::total_cmp);
    let middle = values.get(values.len() / 2).copied();
    middle.ok_or_else(|| io::Error::other("nothing was measured"))
}
