//! `cargo bench --bench guest [-- --peer PATH] [--rounds N] [--kernel 6.1|6.12] [--only rtt_ns|bytes_per_s] [--realtime] [--json]`:
//! real guests in QEMU, booted in turn on our vhost-user backend and on `vhost-device-vsock`; medians over the boots.
//!
//! ```text
//! a boot:  backend ─ QEMU ─ guest: adit-testguest bench ─► CID 2 ─► backend ─► Unix socket ─► echo, sink (threads here)
//!                                                       └► CID 1, vsock_loopback: the floor, no device at all
//! ```
//! - The guest measures with its own clock: round trips of 64 B, and 64 KiB writes until the host has all of them.
//! - The host's end is a Unix socket for both, as the peer requires. Ours is also measured as a VM with `busy_poll_us` set.
//! - With `--realtime` (root) QEMU, backend and host program run as SCHED_FIFO, so other work on the machine does not disturb.
//! - Without KVM the guest's CPU is emulated, and its kernel is most of every figure: only compare figures of one run.
//! - The peer hangs with a 6.12 guest that writes more than 32 KiB at a time. That is printed as a failure after 10 s.

#[path = "../backends/hybrid.rs"]
mod hybrid;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure};
use adit_tests::guest::{Accel, Guest, Identity};
use adit_tests::image::{Image, Kernel};
use adit_tests::process::{Reaped, wait_for};
use anyhow::Context;

const PEER: &str = "vhost-device-vsock";
const ECHO: u32 = hybrid::SOCKETS.start;
const SINK: u32 = hybrid::SOCKETS.start + 1;
/// `busy_poll_us` of the row that is measured with it.
const BUSY_POLL_US: u32 = 50;
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Limit for all measurements of one boot, including those that hang.
const MEASURE_LIMIT: Duration = Duration::from_secs(180);
const MIB: f64 = 1024.0 * 1024.0;

/// Which backend a guest is booted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Ours,
    OursPolling,
    Peer,
}

struct Options {
    peer: Option<PathBuf>,
    rounds: usize,
    kernels: Vec<Kernel>,
    /// Measure only figures whose name contains this.
    only: String,
    json: bool,
}

/// The values of each figure in each boot: `host rtt_ns`, `loopback bytes_per_s`…
#[derive(Default)]
struct Series {
    values: BTreeMap<(Who, String), Vec<f64>>,
    failures: BTreeMap<(Who, String), Vec<String>>,
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut options = Options {
        peer: None,
        rounds: 5,
        kernels: vec![Kernel::V6_1, Kernel::V6_12],
        only: String::new(),
        json: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--serve" => {
                let (dir, us) = (PathBuf::from(value()?), value()?.parse()?);
                return hybrid::serve(&dir, Duration::from_micros(us));
            }
            "--peer" => options.peer = Some(value()?.into()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds")?,
            "--kernel" => {
                let kernel = value()?.parse().map_err(anyhow::Error::msg)?;
                options.kernels = vec![kernel];
            }
            "--only" => options.only = value()?,
            "--realtime" => adit_benches::realtime::realtime(),
            "--json" => options.json = true,
            // Arguments that `cargo bench` adds.
            _ => {}
        }
    }
    eprintln!("guests run by {}", Accel::detect().name());
    for kernel in options.kernels.clone() {
        measure(&options, kernel)?;
    }
    Ok(())
}

fn measure(options: &Options, kernel: Kernel) -> anyhow::Result<()> {
    let image = Image::build(kernel, &|what| eprintln!("{what}"))?;
    let mut everyone = vec![Who::Ours, Who::OursPolling];
    everyone.extend(options.peer.is_some().then_some(Who::Peer));
    let (mut series, begin) = (Series::default(), Instant::now());
    for round in 0..options.rounds {
        // The order rotates, so that each backend is first in turn.
        let at = round % everyone.len();
        everyone.rotate_left(at);
        for &who in &everyone {
            let said = boot(who, options, &image)
                .with_context(|| format!("{who:?} in a {} guest", kernel.name()))?;
            series.take(who, &said);
            eprintln!("{} {who:?}: {}", kernel.name(), shown(&said));
        }
        everyone.rotate_right(at);
    }
    for figure in series.table(kernel) {
        figure.print(options.json);
    }
    for ((who, name), whys) in &series.failures {
        let (guest, n, why) = (kernel.name(), whys.len(), &whys[0]);
        eprintln!(
            "{guest}: {name} of {who:?} failed in {n} of {} boots: {why}",
            options.rounds
        );
    }
    let (boots, took) = (
        options.rounds * everyone.len(),
        begin.elapsed().as_secs_f64(),
    );
    eprintln!("{}: {boots} boots in {took:.0} s", kernel.name());
    Ok(())
}

/// Boots a guest, waits until it has measured, and returns its output.
fn boot(who: Who, options: &Options, image: &Image) -> anyhow::Result<String> {
    let dir = tempfile::tempdir()?;
    serve(dir.path(), ECHO, echo)?;
    serve(dir.path(), SINK, sink)?;
    let socket = dir.path().join("vhost.sock");
    // Dropped after QEMU, which would complain if its backend ended first.
    let _backend = backend(who, options.peer.as_deref(), dir.path())?;
    wait_for("the backend listens", BOOT_LIMIT, || {
        Ok(socket.exists().then_some(()))
    })?;
    let only = &options.only;
    let script = format!(
        "insmod /lib/adit/vsock_loopback.ko\n\
         adit-testguest vsock-echo {ECHO} &\nadit-testguest vsock-sink {SINK} &\nsleep 1\n\
         adit-testguest bench host 2 {ECHO} {SINK} {only}\nadit-testguest bench loopback 1 {ECHO} {SINK} {only}\necho ADIT-MEASURED\n"
    );
    let identity = Identity {
        name: "bench",
        vhost_socket: &socket,
        agent: None,
        trust: None,
        script: &script,
        boot_files: false,
    };
    let mut guest = Guest::boot(image, &identity, &dir.path().join("guest"))?;
    guest.wait_ready(BOOT_LIMIT)?;
    guest.wait_serial("the guest's figures", MEASURE_LIMIT, |log| {
        log.contains("ADIT-MEASURED")
    })?;
    let said = guest.serial();
    guest.kill()?;
    Ok(said)
}

fn backend(who: Who, peer: Option<&Path>, dir: &Path) -> anyhow::Result<Reaped> {
    let mut command = match (who, peer) {
        (Who::Peer, Some(peer)) => {
            let at = dir.display();
            let vm = format!("guest-cid=3,socket={at}/vhost.sock,uds-path={at}/uds");
            let mut command = Command::new(peer);
            command.arg("--vm").arg(vm);
            command
        }
        _ => {
            let us = if who == Who::OursPolling {
                BUSY_POLL_US
            } else {
                0
            };
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("--serve").arg(dir).arg(us.to_string());
            command
        }
    };
    command.env("RUST_LOG", "off").stderr(Stdio::null());
    // Ours ends at the end of its standard input.
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    Ok(Reaped(command.spawn().context("cannot start the backend")?))
}

/// The host's program on a port, with a thread for each connection.
fn serve(dir: &Path, port: u32, each: fn(UnixStream) -> io::Result<()>) -> anyhow::Result<()> {
    let listener = UnixListener::bind(dir.join(format!("uds_{port}")))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || each(stream));
        }
    });
    Ok(())
}

fn echo(mut stream: UnixStream) -> io::Result<()> {
    let mut buf = [0; 4096];
    loop {
        match stream.read(&mut buf)? {
            0 => return Ok(()),
            n => stream.write_all(&buf[..n])?,
        }
    }
}

/// Reads as many bytes as the first eight say, and answers with one byte.
fn sink(mut stream: UnixStream) -> io::Result<()> {
    let (mut len, mut buf) = ([0; 8], vec![0; 256 << 10]);
    stream.read_exact(&mut len)?;
    let mut left = u64::from_le_bytes(len);
    while left > 0 {
        match stream.read(&mut buf)? {
            0 => break,
            n => left = left.saturating_sub(n as u64),
        }
    }
    stream.write_all(&[1])
}

const LINE: &str = "ADIT-BENCH ";

/// The output of one boot's guest, in a line.
fn shown(said: &str) -> String {
    let lines = said.lines().filter_map(|l| l.trim().strip_prefix(LINE));
    lines.collect::<Vec<_>>().join(", ")
}

impl Series {
    fn take(&mut self, who: Who, said: &str) {
        for line in said.lines().filter_map(|l| l.trim().strip_prefix(LINE)) {
            let mut words = line.splitn(3, ' ');
            let (Some(place), Some(figure), Some(value)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let key = (who, format!("{place} {figure}"));
            match value.parse() {
                Ok(value) => self.values.entry(key).or_default().push(value),
                Err(_) => {
                    let why = value.trim_start_matches("failed: ").to_owned();
                    self.failures.entry(key).or_default().push(why);
                }
            }
        }
    }

    fn table(&self, kernel: Kernel) -> Vec<Figure> {
        let guest = kernel.name();
        let rows = [
            (
                "64 B RTT p50",
                "rtt_ns",
                "us",
                1000.0,
                Better::Lower,
                (0.95, 0.8),
            ),
            (
                "64 KiB stream",
                "bytes_per_s",
                "MiB/s",
                MIB,
                Better::Higher,
                (1.3, 2.0),
            ),
        ];
        let mut out = Vec::new();
        for (what, key, unit, scale, better, (must, aim)) in rows {
            let scaled = |who, place: &str| -> Vec<f64> {
                let found = self.values.get(&(who, format!("{place} {key}")));
                found.into_iter().flatten().map(|v| v / scale).collect()
            };
            let peer = scaled(Who::Peer, "host");
            for (who, words) in [(Who::Ours, ""), (Who::OursPolling, ", busy_poll_us 50")] {
                let name = format!("{what}, {guest} guest to a socket of the host{words}");
                let ours = scaled(who, "host");
                if ours.is_empty() {
                    continue;
                }
                let figure = Figure::alone(name, unit, better, &ours);
                out.push(match peer.is_empty() {
                    true => figure,
                    false => figure.beside(PEER, &peer, must, aim),
                });
            }
            // Independent of the device, so the boots of all backends count.
            let floor = [Who::Ours, Who::OursPolling, Who::Peer].map(|who| scaled(who, "loopback"));
            let name = format!("{what}, {guest} guest to itself (vsock_loopback): the floor");
            let floor = floor.concat();
            if !floor.is_empty() {
                out.push(Figure::alone(name, unit, better, &floor));
            }
        }
        for who in [Who::Ours, Who::OursPolling, Who::Peer] {
            let of =
                |((w, _), whys): (&(Who, String), &Vec<String>)| (*w == who).then_some(whys.len());
            let n: usize = self.failures.iter().filter_map(of).sum();
            let name = format!("figures that failed, {guest} guest, {who:?}");
            out.push(Figure::alone(name, "", Better::Lower, &[n as f64]));
        }
        out
    }
}
