//! `cargo xtask soak --proxy`: clients of every kind use one VM while aditd's worker is killed again and again.
//!
//! | client | while aditd is killed |
//! |---|---|
//! | CONNECT over TCP, SOCKS5: streams of every length, echoed and compared | those that are open go on; only a new one may fail |
//! | requests in absolute form on a connection that stays; curl over TLS; Node with many streams of HTTP/2 | may be cut off |
//! | one that leaves in the middle of its request | |
//!
//! Away from kills nothing may fail. The VM is the guest's agent as threads of this process, on a ring. At the end descriptors and memory
//! of aditd's worker, just before each kill, and of the port process are compared with those of the beginning.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_tests::agent;
use adit_tests::connect::connect;
use adit_tests::host::Host;
use adit_tests::servers::{echoes, serving};
use anyhow::{Context as _, bail, ensure};

use super::{Random, Tally, VM, echoed, usage};
use crate::{progress, setup};

/// How often the worker is killed.
const KILL_EVERY: Duration = Duration::from_secs(20);
/// How long after a kill what is new may still fail.
const RECOVERY: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(30);
/// More descriptors than at the beginning that are no leak: of clients that are just there.
const FDS_MORE: usize = 64;
/// More memory than at the beginning that is no leak, KiB.
const KIB_MORE: u64 = 16 << 10;

/// Where the clients go.
struct Ways {
    plain: SocketAddr,
    socks: SocketAddr,
    /// Of the listener with TLS.
    tls: u16,
    certificate: String,
    echo: u16,
    page: u16,
}

/// When aditd was killed.
struct Kills {
    begin: Instant,
    /// Milliseconds since then.
    last: AtomicU64,
}

impl Kills {
    fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether something that began then may have failed for a kill.
    fn excuse(&self, since: u64) -> bool {
        let until = self.last.load(Ordering::SeqCst) + RECOVERY.as_millis() as u64;
        since <= until
    }
}

pub fn run(minutes: f64, seed: u64) -> anyhow::Result<bool> {
    let bins = setup::host_binaries(false)?;
    let dir = tempfile::tempdir()?;
    let (echo, page) = (serving(echoes)?, serving(pages)?);
    let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let pem = dir.path().join("host.pem");
    std::fs::write(
        &pem,
        signed.cert.pem() + &signed.signing_key.serialize_pem(),
    )?;
    let pem = pem.display().to_string();
    let config = format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\n\
         [[listen]]\naddress = \"127.0.0.1:0\"\nspeak = \"socks5\"\n\
         [[listen]]\naddress = \"127.0.0.1:0\"\ncert = \"{pem}\"\nkey = \"{pem}\"\n\
         [[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n\
         [[vm]]\nname = \"{VM}\"\ncid = 3\nallow = [{echo}, {page}]\n"
    );
    let host = Host::start_configured(&bins, &config)?;
    host.wait_port(VM)?;
    agent::start(&host.vm_dir(VM), &[echo, page])?;
    let listeners = host.listeners()?;
    let [socks, tls] = &listeners[..] else {
        bail!("listeners: {listeners:?}");
    };
    let tls: SocketAddr = tls.parse()?;
    let ways = Ways {
        plain: host.proxy(),
        socks: socks.parse()?,
        tls: tls.port(),
        certificate: pem,
        echo,
        page,
    };
    let kills = Kills {
        begin: Instant::now(),
        last: AtomicU64::new(0),
    };
    let limit = Duration::from_secs_f64(minutes * 60.0);
    let done = soak(&host, &ways, &kills, limit, seed);
    if done.is_err() {
        eprintln!("aditd:\n{}\nport:\n{}", host.log(), host.port_log(VM));
    }
    done.map(|()| true)
}

type Client = fn(&Ways, &mut Random) -> anyhow::Result<()>;

/// Each with what it is called, and whether a kill may cut it off.
const CLIENTS: [(&str, Client, bool); 7] = [
    ("CONNECT", tunnel, false),
    ("SOCKS5", socks5, false),
    ("SOCKS5, another", socks5, false),
    ("requests", requests, true),
    ("curl over TLS", curl, true),
    ("Node over HTTP/2", node, true),
    ("left early", leaves, true),
];

fn soak(host: &Host, ways: &Ways, kills: &Kills, limit: Duration, seed: u64) -> anyhow::Result<()> {
    let (failed, counts) = (
        AtomicBool::new(false),
        Mutex::new([[0_u64; 2]; CLIENTS.len()]),
    );
    let port = super::port_pid(host)?;
    let mut seen = Vec::new();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let clients: Vec<_> = (0..)
            .zip(CLIENTS)
            .map(|(nth, (name, client, is_cut))| {
                let (failed, counts) = (&failed, &counts);
                let mut random = Random(seed << 8 | nth as u64);
                scope.spawn(move || -> anyhow::Result<()> {
                    while kills.begin.elapsed() < limit && !failed.load(Ordering::Relaxed) {
                        let since = kills.now();
                        let did = client(ways, &mut random);
                        let is_new = did.as_ref().is_err_and(|e| e.is::<New>());
                        let excused = (is_cut || is_new) && kills.excuse(since);
                        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
                        counts[nth][usize::from(did.is_err())] += 1;
                        drop(counts);
                        match did {
                            Err(e) if !excused => {
                                failed.store(true, Ordering::Relaxed);
                                let at = kills.now() as f64 / 1e3;
                                return Err(e).with_context(|| format!("{name}, at {at:.1} s"));
                            }
                            Err(_) => std::thread::sleep(Duration::from_millis(100)),
                            Ok(()) => {}
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let mut due = KILL_EVERY;
        while kills.begin.elapsed() < limit && !failed.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(100));
            if kills.begin.elapsed() < due {
                continue;
            }
            due += KILL_EVERY;
            let worker = host.worker();
            seen.push((usage(worker)?, usage(port)?));
            kills.last.store(kills.now(), Ordering::SeqCst);
            host.kill_worker();
            host.wait_worker(worker)?;
            kills.last.store(kills.now(), Ordering::SeqCst);
            progress::line(&shown(&counts, &seen));
        }
        clients
            .into_iter()
            .try_for_each(|client| client.join().unwrap_or_else(|_| bail!("a client panicked")))
    })?;
    println!("{}", shown(&counts, &seen));
    flat(&seen)
}

/// Memory in KiB and descriptors, of aditd's worker and of the port process.
type Seen = ((u64, usize), (u64, usize));
type Of = fn(&Seen) -> (u64, usize);

/// The last half of what was seen is not larger than the first.
fn flat(seen: &[Seen]) -> anyhow::Result<()> {
    let (first, last) = seen.split_at(seen.len() / 2);
    let most = |half: &[Seen], of: Of| {
        let all = || half.iter().map(of);
        let kib = all().map(|one| one.0).max().unwrap_or(0);
        (kib, all().map(|one| one.1).max().unwrap_or(0))
    };
    let both: [(&str, Of); 2] = [("aditd", |one| one.0), ("adit-port", |one| one.1)];
    for (name, of) in both {
        let ((kib, fds), (kib_last, fds_last)) = (most(first, of), most(last, of));
        println!(
            "{name}: at most {kib} KiB and {fds} descriptors in the first half, {kib_last} and {fds_last} in the second"
        );
        ensure!(kib_last <= kib + KIB_MORE, "{name} grows");
        ensure!(fds_last <= fds + FDS_MORE, "{name} leaves descriptors open");
    }
    Ok(())
}

fn shown(counts: &Mutex<[[u64; 2]; CLIENTS.len()]>, seen: &[Seen]) -> String {
    let counts = *counts.lock().unwrap_or_else(PoisonError::into_inner);
    let each = CLIENTS.iter().zip(counts);
    let each: Vec<_> = each
        .map(|((name, ..), [did, failed])| format!("{name} {did} ({failed} cut off)"))
        .collect();
    format!("{} kills; {}", seen.len(), each.join(", "))
}

/// It was not opened.
#[derive(Debug)]
struct New(io::Error);

impl std::fmt::Display for New {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not opened: {}", self.0)
    }
}

impl std::error::Error for New {}

fn tunnel(ways: &Ways, random: &mut Random) -> anyhow::Result<()> {
    let near = connect(ways.plain, &format!("{VM}:{}", ways.echo)).map_err(New)?;
    echoed(near, random.length(), random, &Mutex::new(Tally::default()))
}

fn socks5(ways: &Ways, random: &mut Random) -> anyhow::Result<()> {
    let open = || -> io::Result<TcpStream> {
        let mut near = TcpStream::connect(ways.socks)?;
        near.set_read_timeout(Some(SILENCE))?;
        near.set_write_timeout(Some(SILENCE))?;
        let mut request = vec![5, 1, 0, 5, 1, 0, 3, VM.len() as u8];
        request.extend_from_slice(VM.as_bytes());
        request.extend_from_slice(&ways.echo.to_be_bytes());
        near.write_all(&request)?;
        // The method, and the answer with an IPv4 address.
        let mut answer = [0; 12];
        near.read_exact(&mut answer)?;
        match answer[3] {
            0 => Ok(near),
            code => Err(io::Error::other(format!("SOCKS5 says {code}"))),
        }
    };
    let near = open().map_err(New)?;
    echoed(near, random.length(), random, &Mutex::new(Tally::default()))
}

/// Some on one connection.
fn requests(ways: &Ways, random: &mut Random) -> anyhow::Result<()> {
    let mut near = BufReader::new(TcpStream::connect(ways.plain)?);
    near.get_ref().set_read_timeout(Some(SILENCE))?;
    for _ in 0..1 + random.next() % 50 {
        let len = random.next() % 100_000;
        let request = format!(
            "GET http://{VM}:{}/{len} HTTP/1.1\r\nHost: {VM}\r\n\r\n",
            ways.page
        );
        near.get_mut().write_all(request.as_bytes())?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(near.read_line(&mut head)? > 0, "closed: {head}");
        }
        ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
        let mut body = vec![0; usize::try_from(len)?];
        near.read_exact(&mut body)?;
        ensure!(body.iter().all(|b| *b == b'x'), "another body");
    }
    Ok(())
}

fn curl(ways: &Ways, random: &mut Random) -> anyhow::Result<()> {
    let len = random.next() % (4 << 20);
    let out = Command::new("curl")
        .args(["-sS", "--max-time", "30", "--noproxy", "", "--proxytunnel"])
        .args(["--proxy-cacert", &ways.certificate])
        .args(["-x", &format!("https://localhost:{}", ways.tls)])
        .arg(format!("http://{VM}:{}/{len}", ways.page))
        .output()?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    ensure!(
        out.stdout.len() as u64 == len,
        "{} bytes of {len}",
        out.stdout.len()
    );
    Ok(())
}

fn node(ways: &Ways, random: &mut Random) -> anyhow::Result<()> {
    let (tunnels, bytes) = (1 + random.next() % 40, 1 + random.next() % 200_000);
    let asked = serde_json::json!({
        "proxy": format!("https://localhost:{}", ways.tls), "ca": ways.certificate, "tunnels": tunnels, "bytes": bytes,
        "echo": format!("{VM}:{}", ways.echo),
    });
    let script = adit_tests::root().join("tests/tests/clients/tunnel.mjs");
    let out = Command::new("node")
        .arg(script)
        .arg(asked.to_string())
        .output()?;
    let said = String::from_utf8_lossy(&out.stdout);
    let came: serde_json::Value = serde_json::from_str(&said).unwrap_or_default();
    ensure!(
        came["echoed"] == tunnels,
        "{said}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(())
}

fn leaves(ways: &Ways, random: &mut Random) -> anyhow::Result<()> {
    let whole = format!(
        "CONNECT {VM}:{} HTTP/1.1\r\nHost: {VM}\r\n\r\nsome bytes",
        ways.echo
    );
    let mut near = TcpStream::connect(ways.plain)?;
    near.write_all(&whole.as_bytes()[..random.next() as usize % whole.len()])?;
    std::thread::sleep(Duration::from_millis(random.next() % 20));
    Ok(())
}

/// `GET /N`: so many bytes.
fn pages(client: TcpStream) {
    let mut client = BufReader::new(client);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if !matches!(client.read_line(&mut head), Ok(1..)) {
                return;
            }
        }
        let path = head.split_whitespace().nth(1).unwrap_or_default();
        let len: usize = path.trim_start_matches('/').parse().unwrap_or(0);
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n").into_bytes();
        answer.resize(answer.len() + len, b'x');
        if client.get_mut().write_all(&answer).is_err() {
            return;
        }
    }
}
