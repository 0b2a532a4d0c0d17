//! A CONNECT tunnel through a real `aditd` and its port process, beside `socat` and haproxy, which relay TCP.
//!
//! ```text
//! ours:    software guest ── virtqueues ── adit-port ── TCP ── client        (aditd made the tunnel, but carries no bytes)
//! relays:  TCP server     ──   TCP     ──   relay    ── TCP ── client
//! ```
//! Client, and guest or server, are one thread that never sleeps, as in all these benches. The thread's cost differs only at the
//! far side: packets in queues, or a socket. Relays use buffers of 64 KiB and one thread.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure, median};
use adit_channel::device::GuestCid;
use adit_testkit::DriverConfig;
use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Options;
use crate::frontend::Attached;
use crate::guest::{Guest, Key, PATIENCE};
use crate::measure::CELL;

const PIECE: usize = 64 << 10;
const WARM: usize = 4 << 20;
/// Tunnels that are made and ended one after the other, in each round.
const SET_UPS: u32 = 100;

/// Measures the tunnel and the relays in turn.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let Some(binaries) = &options.binaries else {
        return Ok(Vec::new());
    };
    let mut tunnel = Tunnel::start(binaries, options.rounds)?;
    let mut relays = Vec::new();
    for (name, must, aim) in [("socat", 1.0, 1.0), ("haproxy", 0.7, 1.0)] {
        match Relay::start(name) {
            Ok(relay) => relays.push((relay, name, must, aim, [Vec::new(), Vec::new()])),
            Err(e) => eprintln!("skipped: {name}: {e:#}"),
        }
    }
    let mut ours = [Vec::new(), Vec::new()];
    for _ in 0..options.rounds {
        ours[0].push(tunnel.download()?);
        ours[1].push(tunnel.upload()?);
        for (relay, .., rates) in &mut relays {
            rates[0].push(relay.forward()?);
            rates[1].push(relay.backward()?);
        }
    }
    let title = "CONNECT, from the request to the greeting";
    let mut out = vec![Figure::alone(title, "us", Better::Lower, &tunnel.set_ups)];
    for (way, ours) in ["to client", "from client"].into_iter().zip(&ours) {
        let which = usize::from(way == "from client");
        for (_, name, must, aim, rates) in &relays {
            let title = format!("CONNECT tunnel, 64 KiB {way}, beside {name}");
            out.push(Figure::alone(title, "MiB/s", Better::Higher, ours).beside(
                name,
                &rates[which],
                *must,
                *aim,
            ));
        }
    }
    Ok(out)
}

/// Repeats `step`, which returns the bytes that arrived. The measurement starts after a warm-up. MiB per second.
fn steady(mut step: impl FnMut() -> anyhow::Result<usize>) -> anyhow::Result<f64> {
    let (give_up, mut moved) = (Instant::now() + PATIENCE, 0);
    while moved < WARM {
        moved += step()?;
        if Instant::now() > give_up {
            bail!("only {moved} bytes in {PATIENCE:?}");
        }
    }
    let (begin, mut moved) = (Instant::now(), 0);
    while begin.elapsed() < CELL {
        for _ in 0..8 {
            moved += step()?;
        }
    }
    Ok(moved as f64 / begin.elapsed().as_secs_f64() / f64::from(1 << 20))
}

fn take(mut from: &TcpStream) -> anyhow::Result<usize> {
    let mut buf = [0; PIECE];
    match from.read(&mut buf) {
        Ok(0) => bail!("closed"),
        Ok(n) => Ok(n),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(0),
        Err(e) => Err(e.into()),
    }
}

fn give(mut to: &TcpStream) -> anyhow::Result<()> {
    match to.write(&[7; PIECE]) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Child processes, which end when this is dropped.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Worker and port process are aditd's children, and survive it unless they are ended.
            let threads = std::fs::read_dir(format!("/proc/{}/task", child.id()));
            let children: String = threads
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
                .collect();
            let _ = child.kill();
            let _ = child.wait();
            for pid in children.split_whitespace().filter_map(|p| p.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
        }
    }
}

struct Tunnel {
    // Dropped before the processes, so that the port process sees its frontend go first.
    guest: Guest,
    key: Key,
    client: TcpStream,
    /// Time of one set-up, in each round, µs.
    set_ups: Vec<f64>,
    _processes: Processes,
    _dir: tempfile::TempDir,
}

impl Tunnel {
    fn start(binaries: &Path, rounds: usize) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let at = dir.path().display();
        let config = format!(
            "run_dir = \"{at}/run\"\nstate_dir = \"{at}/state\"\n[proxy]\nlisten = \"127.0.0.1:0\"\n\
             [[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\"]\n\
             [[vm]]\nname = \"bench\"\ncid = 3\nallow_vsock = [5000]\n"
        );
        std::fs::write(dir.path().join("aditd.toml"), config)?;
        let log = std::fs::File::create(dir.path().join("log"))?;
        let mut command = Command::new(binaries.join("aditd"));
        command
            .args(["run", "--port-bin"])
            .arg(binaries.join("adit-port"));
        command.arg("--config").arg(dir.path().join("aditd.toml"));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let processes = Processes(vec![command.spawn().context("cannot start aditd")?]);
        let end = Instant::now() + PATIENCE;
        let addr = loop {
            match std::fs::read_to_string(dir.path().join("run/proxy.addr")) {
                Ok(addr) if !addr.trim().is_empty() => break addr,
                _ if Instant::now() > end => bail!("aditd does not serve"),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let socket = dir.path().join("run/vm/bench/vhost.sock");
        let cid = GuestCid::new(3).context("a guest's CID")?;
        let mut guest = Guest::new(Attached::new(&socket, cid, DriverConfig::LINUX_6_1)?);
        guest.silent = true;
        let (client, key) = loop {
            match connect(&mut guest, addr.trim()) {
                Ok(made) => break made,
                // aditd may not know yet that the guest is up.
                Err(e) if Instant::now() > end => return Err(e),
                Err(_) => guest.forget_ended(),
            }
        };
        drop(client);
        guest.reset(key);
        let set_ups = (0..rounds).map(|_| set_up(&mut guest, addr.trim()));
        let set_ups = set_ups.collect::<anyhow::Result<_>>()?;
        let (client, key) = connect(&mut guest, addr.trim())?;
        Ok(Self {
            guest,
            key,
            client,
            set_ups,
            _processes: processes,
            _dir: dir,
        })
    }

    fn download(&mut self) -> anyhow::Result<f64> {
        let (guest, key) = (&mut self.guest, self.key);
        steady(|| {
            loop {
                let n = PIECE.min(guest.credit(key));
                if n == 0 || !guest.send(key, n, None) {
                    break;
                }
            }
            guest.pump();
            take(&self.client)
        })
    }

    fn upload(&mut self) -> anyhow::Result<f64> {
        // First let the bytes in flight reach the client.
        while self.guest.in_flight(self.key) > 0 && take(&self.client)? > 0 {
            self.guest.pump();
        }
        steady(|| {
            give(&self.client)?;
            Ok(self.guest.pump())
        })
    }
}

/// Time to make a tunnel, µs: the median of some that follow each other.
fn set_up(guest: &mut Guest, addr: &str) -> anyhow::Result<f64> {
    let mut took = Vec::new();
    for _ in 0..SET_UPS {
        let begin = Instant::now();
        let (client, key) = connect(guest, addr)?;
        took.push(begin.elapsed().as_secs_f64() * 1e6);
        drop(client);
        guest.reset(key);
        guest.pump();
    }
    Ok(median(&took))
}

fn connect(guest: &mut Guest, addr: &str) -> anyhow::Result<(TcpStream, Key)> {
    let mut client = TcpStream::connect(addr)?;
    client
        .write_all(b"CONNECT vsock-5000.bench:80 HTTP/1.1\r\nHost: vsock-5000.bench:80\r\n\r\n")?;
    client.set_nonblocking(true)?;
    let (mut head, end) = (Vec::new(), Instant::now() + PATIENCE);
    while !head.ends_with(b"\r\n\r\n") {
        guest.pump();
        let mut byte = [0];
        match client.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < end => {}
            _ => bail!("no answer from aditd's proxy"),
        }
    }
    if !head.starts_with(b"HTTP/1.1 200") {
        bail!(
            "aditd: {}",
            String::from_utf8_lossy(&head).trim().escape_debug()
        );
    }
    let key = guest.accepted().context("the guest has no stream")?;
    Ok((client, key))
}

/// A relay between two sockets of this thread.
struct Relay {
    client: TcpStream,
    server: TcpStream,
    _process: Processes,
    _dir: tempfile::TempDir,
}

impl Relay {
    fn start(name: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let server = TcpListener::bind("127.0.0.1:0")?;
        let to = server.local_addr()?.port();
        // The relays cannot report a port that the kernel chose, so take one that was free just now.
        let at = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new(name);
        if name == "socat" {
            command.args(["-b", "65536"]);
            command.arg(format!("TCP-LISTEN:{at},bind=127.0.0.1,reuseaddr"));
            command.arg(format!("TCP:127.0.0.1:{to}"));
        } else {
            let path = dir.path().join("haproxy.cfg");
            let config = format!(
                "global\n nbthread 1\n tune.bufsize 65536\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n \
                 timeout server 1h\nlisten relay\n bind 127.0.0.1:{at}\n server s 127.0.0.1:{to}\n"
            );
            std::fs::write(&path, config)?;
            command.arg("-db").arg("-f").arg(path);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let process = Processes(vec![child]);
        let end = Instant::now() + PATIENCE;
        let client = loop {
            match TcpStream::connect(("127.0.0.1", at)) {
                Ok(client) => break client,
                Err(e) if Instant::now() > end => return Err(e.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let (server, _) = server.accept()?;
        client.set_nonblocking(true)?;
        server.set_nonblocking(true)?;
        Ok(Self {
            client,
            server,
            _process: process,
            _dir: dir,
        })
    }

    fn forward(&self) -> anyhow::Result<f64> {
        steady(|| {
            give(&self.server)?;
            take(&self.client)
        })
    }

    fn backward(&self) -> anyhow::Result<f64> {
        steady(|| {
            give(&self.client)?;
            take(&self.server)
        })
    }
}
