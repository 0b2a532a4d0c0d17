//! `cargo xtask soak`: tunnels to a real guest echo streams of every length, for a given time.
//!
//! Two streams at a time, of 1 B to 64 MiB, written and read in pieces whose sizes match no buffer, with a half-close at the end.
//! Every byte is compared. The first wrong byte, or 30 s of silence, ends the run.

mod proxy;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use adit_tests::connect::{connect, pattern};
use adit_tests::guest::{Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use anyhow::{Context, ensure};

use crate::{progress, setup};

const VM: &str = "web-1";
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(20);
/// Streams at a time.
const STREAMS: u64 = 2;
/// Longest stream, bytes.
const LENGTH_MAX: u64 = 64 << 20;
/// Largest piece that is written or read at once, bytes.
const PIECE_MAX: u64 = 200_003;

/// How long, and with which guest.
#[derive(clap::Args)]
pub struct Options {
    /// How long
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: Kernel,
    /// Seed of the lengths and pieces
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Instead, clients of every kind through a proxy whose aditd is killed every 20 s
    #[arg(long, conflicts_with = "kernel")]
    proxy: bool,
    /// Instead, boot adit-vmm so many times
    #[arg(long, value_name = "N", conflicts_with_all = ["minutes", "seed", "proxy"])]
    boots: Option<u32>,
}

/// Counters so far.
#[derive(Clone, Copy, Default)]
struct Tally {
    streams: u64,
    bytes: u64,
    /// How often the guest did not answer a dial in time.
    late: u64,
    /// Longest time without a byte while some were expected.
    silence: Duration,
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    setup::run()?;
    if let Some(boots) = options.boots {
        return crate::boots::run(boots, options.kernel);
    }
    if options.proxy {
        return proxy::run(options.minutes, options.seed);
    }
    let bins = setup::host_binaries(true)?;
    setup::guest_binaries()?;
    let image = Image::build(options.kernel, &|what| progress::line(what))?;
    let host = Host::start(&bins, &[VM])?;
    host.wait_port(VM)?;
    let guest = progress::during("booting a guest", || boot(&host, &image))?;
    let before = port(&host)?;
    let limit = Duration::from_secs_f64(options.minutes * 60.0);
    let tally = Mutex::new(Tally::default());
    let (begin, failed) = (Instant::now(), AtomicBool::new(false));
    let done = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..STREAMS)
            .map(|n| {
                let (host, tally, failed) = (&host, &tally, &failed);
                let mut random = Random(options.seed << 8 | n);
                scope.spawn(move || -> anyhow::Result<()> {
                    while begin.elapsed() < limit && !failed.load(Ordering::Relaxed) {
                        let len = random.length();
                        let done = stream(host.proxy(), len, &mut random, tally);
                        failed.fetch_or(done.is_err(), Ordering::Relaxed);
                        let at = begin.elapsed().as_secs_f64();
                        done.with_context(|| format!("a stream of {len} bytes, at {at:.1} s"))?;
                    }
                    Ok(())
                })
            })
            .collect();
        let mut said = Instant::now();
        while !clients.iter().any(|client| client.is_finished()) {
            std::thread::sleep(Duration::from_millis(100));
            if said.elapsed() > Duration::from_secs(60) {
                said = Instant::now();
                progress::line(&shown(&tally, begin));
            }
        }
        clients.into_iter().try_for_each(|client| {
            client
                .join()
                .unwrap_or_else(|_| anyhow::bail!("a client panicked"))
        })
    });
    if let Err(e) = done {
        eprintln!(
            "{}\naditd:\n{}\nport:\n{}",
            shown(&tally, begin),
            host.log(),
            host.port_log(VM)
        );
        eprintln!("guest:\n{}", guest.serial());
        return Err(e);
    }
    let after = port(&host)?;
    println!("{}", shown(&tally, begin));
    println!(
        "adit-port: RssAnon {} KiB before, {} KiB after; descriptors {} before, {} after",
        before.0, after.0, before.1, after.1
    );
    ensure!(before.1 == after.1, "descriptors were left open");
    Ok(true)
}

fn boot(host: &Host, image: &Image) -> anyhow::Result<Guest> {
    let agent = adit_tests::guest_bin("adit-guest");
    let who = Identity {
        name: VM,
        vhost_socket: &host.vhost_socket(VM),
        agent: Some(&agent),
        trust: None,
        script: "",
        boot_files: false,
    };
    let mut guest = Guest::boot(image, &who, &host.dir().join(VM))?;
    guest.wait_ready(BOOT_LIMIT)?;
    let out = host.adit(&["wait", VM, "--for", "agent", "--timeout", "60s"])?;
    ensure!(out.status.success(), "the agent: {}", host.log());
    Ok(guest)
}

/// Anonymous memory in KiB, and descriptors, of the VM's port process.
fn port(host: &Host) -> anyhow::Result<(u64, usize)> {
    usage(port_pid(host)?)
}

fn port_pid(host: &Host) -> anyhow::Result<u32> {
    wait_for("aditd knows the port process", SOON, || {
        let out = host.adit(&["vm", "show", VM, "-o", "json"])?;
        let vm: serde_json::Value = serde_json::from_slice(&out.stdout)?;
        Ok(vm["port_pid"].as_u64().map(u32::try_from).transpose()?)
    })
}

/// A process's anonymous memory in KiB, and its descriptors.
fn usage(pid: u32) -> anyhow::Result<(u64, usize)> {
    let proc = Path::new("/proc").join(pid.to_string());
    let status = std::fs::read_to_string(proc.join("status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
    let fds = std::fs::read_dir(proc.join("fd"))?.count();
    Ok((kib.context("no RssAnon")?, fds))
}

fn shown(tally: &Mutex<Tally>, begin: Instant) -> String {
    let t = *lock(tally);
    format!(
        "{:.0} s: {} streams, {} MiB in each direction, all bytes correct; longest silence {:.2} s, {} dials answered late",
        begin.elapsed().as_secs_f64(),
        t.streams,
        t.bytes >> 20,
        t.silence.as_secs_f64(),
        t.late
    )
}

/// Dials. A guest with a busy processor may answer late, which the proxy reports with 504: that is counted, but is not an error.
fn dial(proxy: SocketAddr, tally: &Mutex<Tally>) -> anyhow::Result<Option<TcpStream>> {
    match connect(proxy, &format!("{VM}:7")) {
        Ok(stream) => Ok(Some(stream)),
        Err(e) if e.to_string().starts_with("HTTP/1.1 504") => {
            lock(tally).late += 1;
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One stream to the guest's echo and back.
fn stream(
    proxy: SocketAddr,
    len: u64,
    random: &mut Random,
    tally: &Mutex<Tally>,
) -> anyhow::Result<()> {
    match dial(proxy, tally)? {
        Some(near) => echoed(near, len, random, tally),
        None => Ok(()),
    }
}

/// Sends so many bytes and their end, and compares what comes back.
fn echoed(
    mut near: TcpStream,
    len: u64,
    random: &mut Random,
    tally: &Mutex<Tally>,
) -> anyhow::Result<()> {
    let mut sender = near.try_clone()?;
    let mut pieces = Random(random.next());
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let sending = scope.spawn(move || -> std::io::Result<()> {
            let mut at = 0;
            while at < len {
                let n = pieces.piece().min(len - at);
                let bytes: Vec<u8> = (at..at + n).map(pattern).collect();
                sender.write_all(&bytes)?;
                at += n;
            }
            sender.shutdown(Shutdown::Write)
        });
        let (mut at, mut buf) = (0, vec![0; PIECE_MAX as usize]);
        loop {
            let (asked, room) = (Instant::now(), random.piece() as usize);
            let n = near
                .read(&mut buf[..room])
                .with_context(|| format!("no byte {at}"))?;
            let mut t = lock(tally);
            t.silence = t.silence.max(asked.elapsed());
            if n == 0 {
                t.streams += 1;
                break;
            }
            t.bytes += n as u64;
            drop(t);
            for (i, byte) in (at..).zip(&buf[..n]) {
                ensure!(*byte == pattern(i), "byte {i} is {byte}");
            }
            at += n as u64;
        }
        ensure!(at == len, "it ended after {at}");
        sending
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the sender panicked")))?;
        Ok(())
    })
}

/// SplitMix64: the same seed gives the same numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A length. Short ones are as frequent as long ones.
    fn length(&mut self) -> u64 {
        let up_to = 1 << (self.next() % (LENGTH_MAX.ilog2() as u64 + 1));
        1 + self.next() % up_to
    }

    fn piece(&mut self) -> u64 {
        let up_to = 1 << (self.next() % 18);
        (1 + self.next() % (2 * up_to)).min(PIECE_MAX)
    }
}
