//! Many tunnels: what idle ones cost, and what others feel of a VM that has stalled and of a client that takes all it can.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use adit_benches::duel::warm;
use adit_benches::report::{Better, Figure, rounds};
use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Options;
use crate::children::{ECHO, SOURCE};
use crate::client::Client;
use crate::contender::{Contender, ours};
use crate::host::{Host, Target};

/// An agent serves 512 streams.
const OF_EACH: usize = 500;
/// Dials of the VM that has stalled, which are under way until it is over, besides its tunnels.
const DIALS: usize = 500;
const IDLE_VMS: usize = 20;
const QUIET: Duration = Duration::from_secs(2);
const SETTLED: Duration = Duration::from_secs(3);
/// Sockets of the client that takes all it can.
const SOCKETS: usize = 4000;
const TRIPS: usize = 2000;

/// Idle tunnels; then others beside a stalled VM and a greedy client.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let target = Target::start()?;
    let mut out = idle(options, &target)?;
    out.extend(beside(options, &target)?);
    Ok(out)
}

fn idle(options: &Options, target: &Target) -> anyhow::Result<Vec<Figure>> {
    let host = Host::start(&options.binaries, IDLE_VMS, target.port)?;
    let all: Vec<Contender> = (0..IDLE_VMS)
        .map(|n| ours(&host, target, n))
        .collect::<anyhow::Result<_>>()?;
    std::thread::sleep(SETTLED);
    let before = used(&host)?;
    let mut tunnels: Vec<Client> = Vec::new();
    for one in &all {
        for _ in 0..OF_EACH {
            let mut tunnel = one.open(false, &[ECHO])?;
            tunnel.write_all(&[1])?;
            tunnel.read_exact(&mut [0])?;
            tunnels.push(tunnel);
        }
    }
    std::thread::sleep(SETTLED);
    let after = used(&host)?;
    std::thread::sleep(QUIET);
    let quiet = used(&host)?;
    // They still work.
    for tunnel in &mut tunnels {
        tunnel.write_all(&[1])?;
        tunnel.read_exact(&mut [0])?;
    }
    let each = after.anon.saturating_sub(before.anon) as f64 / tunnels.len() as f64 / 1024.0;
    let wakes = (quiet.switches - after.switches) as f64;
    let title = |what: &str| format!("{} idle tunnels: {what}", tunnels.len());
    Ok(vec![
        Figure::alone(
            title("memory of each in aditd and port processes"),
            "KiB",
            Better::Lower,
            &[each],
        )
        .goal(4.0, 1.0),
        Figure::alone(
            title("wake-ups in 2 s of all of them"),
            "",
            Better::Lower,
            &[wakes],
        )
        .goal(0.0, 0.0),
    ])
}

/// What aditd and the port processes have used.
#[derive(Clone, Copy, Default)]
struct Used {
    anon: u64,
    switches: u64,
}

fn used(host: &Host) -> anyhow::Result<Used> {
    let mut used = Used::default();
    for pid in host.processes() {
        let status = |path: String| std::fs::read_to_string(path).unwrap_or_default();
        used.anon += field(&status(format!("/proc/{pid}/status")), "RssAnon:") << 10;
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).context("its threads")?;
        for task in tasks.flatten() {
            let text = status(format!("{}/status", task.path().display()));
            used.switches += field(&text, "voluntary_ctxt_switches:");
        }
    }
    Ok(used)
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn beside(options: &Options, target: &Target) -> anyhow::Result<Vec<Figure>> {
    let host = Host::start(&options.binaries, 2, target.port)?;
    let (well, stalled) = (ours(&host, target, 0)?, ours(&host, target, 1)?);
    let mut figures = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    let bar = rounds(options.rounds as u64);
    for _ in 0..options.rounds {
        let [trip, open] = p99(&well)?;
        // Tunnels full of bytes that nobody takes, of a VM whose agent stands still.
        let (mut kept, mut dials) = (Vec::new(), Vec::new());
        for n in 0..OF_EACH {
            kept.push(stalled.open(false, &[if n % 2 == 0 { SOURCE } else { ECHO }])?);
        }
        let agent = Pid::from_raw(host.agent(1).cast_signed());
        kill(agent, Signal::SIGSTOP)?;
        for _ in 0..DIALS {
            dials.push(stalled.dial()?);
        }
        let greedy: Vec<TcpStream> = (0..SOCKETS)
            .map_while(|_| TcpStream::connect(host.plain).ok())
            .collect();
        let disturbed = p99(&well);
        kill(agent, Signal::SIGCONT)?;
        let disturbed = disturbed?;
        drop((kept, dials, greedy));
        std::thread::sleep(Duration::from_millis(300));
        for (figure, value) in figures
            .iter_mut()
            .zip([trip, disturbed[0], open, disturbed[1]])
        {
            figure.push(value);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let [trip, trip_beside, open, open_beside] = &figures;
    let figure = |what: &str, alone: &[f64], beside: &[f64]| {
        let title = format!(
            "beside a stalled VM with {} tunnels, half of them still dialled, and a client with {SOCKETS} sockets: {what}, p99",
            OF_EACH + DIALS
        );
        let figure = Figure::alone(title, "us", Better::Lower, beside);
        figure.beside("alone", alone, 1.5, 1.1)
    };
    Ok(vec![
        figure("round trip of another VM", trip, trip_beside),
        figure("a new tunnel to another VM", open, open_beside),
    ])
}

/// 99th percentiles: of a round trip, of a new tunnel; us.
fn p99(one: &Contender) -> anyhow::Result<[f64; 2]> {
    let mut tunnel = one.open(false, &[ECHO])?;
    let trip = times(TRIPS, || {
        tunnel.write_all(&[7; 64])?;
        Ok(tunnel.read_exact(&mut [0; 64])?)
    })?;
    let open = times(TRIPS / 4, || {
        let mut tunnel = one.open(false, &[ECHO, 7])?;
        Ok(tunnel.read_exact(&mut [0])?)
    })?;
    Ok([trip, open])
}

fn times(count: usize, mut one: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        one()?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(warm(&mut times)[1])
}
