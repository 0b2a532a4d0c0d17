//! Tunnels opened in a second, each by a connection of its own and with a byte there and back; and requests in a second, on
//! connections that stay.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure, rounds};
use anyhow::ensure;

use crate::Options;
use crate::children::ECHO;
use crate::contender::{Contender, HAPROXY, OURS, ours, relays};
use crate::host::{Host, SOON, Target};

const CELL: Duration = Duration::from_millis(300);
/// Clients at a time, each a thread that waits.
pub const CLIENTS: usize = 8;

/// Each contender's rate, in turn.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let target = Target::start()?;
    let host = Host::start(&options.binaries, 1, target.port)?;
    let ours = ours(&host, &target, 0)?;
    let relays = relays(&host, &target);
    type Cell = fn(&Contender, &Target) -> anyhow::Result<f64>;
    let cells: [(&str, &str, Cell); 4] = [
        ("tunnels opened, one client", "/s", |one, _| {
            together(1, || open(one, false))
        }),
        ("tunnels opened, 8 clients", "/s", |one, _| {
            together(CLIENTS, || open(one, false))
        }),
        ("tunnels opened over TLS, 8 clients", "/s", |one, _| {
            together(CLIENTS, || open(one, true))
        }),
        ("keep-alive GET, 8 clients", "/s", get),
    ];
    let bar = rounds(options.rounds as u64);
    let mut out = Vec::new();
    for (title, unit, cell) in cells {
        let wants = |one: &&Contender| match title {
            title if title.contains("GET") => one.http.is_some(),
            title if title.contains("TLS") => one.tls.is_some(),
            _ => true,
        };
        let there: Vec<&Contender> = std::iter::once(&ours)
            .chain(&relays)
            .filter(wants)
            .collect();
        let mut rates = vec![Vec::new(); there.len()];
        for _ in 0..options.rounds {
            for (one, rates) in there.iter().zip(&mut rates) {
                rates.push(cell(one, &target)?);
            }
            bar.inc(1);
        }
        for (one, theirs) in there.iter().zip(&rates).skip(1) {
            let (must, aim) = match one.name {
                HAPROXY => (0.7, 1.0),
                _ => (1.0, 1.0),
            };
            let figure = Figure::alone(title, unit, Better::Higher, &rates[0]);
            out.push(figure.beside(one.name, theirs, must, aim));
        }
    }
    bar.finish_and_clear();
    Ok(out)
}

/// One tunnel, with a byte there and back.
pub fn open(contender: &Contender, tls: bool) -> anyhow::Result<()> {
    let mut client = contender.open(tls, &[ECHO, 7])?;
    let mut byte = [0];
    client.read_exact(&mut byte)?;
    ensure!(byte == [7], "another byte came back");
    Ok(())
}

/// Many clients at the same time; how often one was done, in a second.
pub fn together(
    clients: usize,
    one: impl Fn() -> anyhow::Result<()> + Sync,
) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let count = || {
        let mut count = 0;
        while begin.elapsed() < CELL {
            one()?;
            count += 1;
        }
        anyhow::Ok(count)
    };
    let counts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(count)).collect();
        let counts = threads.into_iter().map(|t| t.join().expect("a client"));
        counts.sum::<anyhow::Result<u32>>()
    })?;
    Ok(f64::from(counts) / begin.elapsed().as_secs_f64())
}

/// Requests on connections that stay.
fn get(contender: &Contender, target: &Target) -> anyhow::Result<f64> {
    let to = contender.http.expect("it was asked");
    let path = match (contender.name, &contender.tunnel) {
        (OURS, Some(to)) => format!("http://{to}/"),
        _ => "/".to_owned(),
    };
    let host = contender.tunnel.clone();
    let host = host.unwrap_or_else(|| format!("127.0.0.1:{}", target.port));
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let begin = Instant::now();
    let count = || {
        let mut tcp = TcpStream::connect(to)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(SOON))?;
        let (mut count, mut answer) = (0, vec![0; 4096]);
        while begin.elapsed() < CELL {
            tcp.write_all(request.as_bytes())?;
            let mut len = 0;
            while !answer[..len].ends_with(b"\r\n\r\nok") {
                let n = tcp.read(&mut answer[len..])?;
                ensure!(n > 0, "closed: {}", String::from_utf8_lossy(&answer[..len]));
                len += n;
            }
            ensure!(answer.starts_with(b"HTTP/1.1 200"), "refused");
            count += 1;
        }
        anyhow::Ok(count)
    };
    let counts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(count)).collect();
        let counts = threads.into_iter().map(|t| t.join().expect("a client"));
        counts.sum::<anyhow::Result<u32>>()
    })?;
    Ok(f64::from(counts) / begin.elapsed().as_secs_f64())
}
