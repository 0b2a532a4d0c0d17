//! aditd's two processes with real port processes and a software guest: whichever of them is killed, tunnels go on byte for byte.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

#[path = "../../host-proxy/port/tests/guest/mod.rs"]
mod guest;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use adit_channel::port::Notice;
use adit_channel::sink::Sink;
use adit_tests::host::Host;
use adit_tests::process::{output, wait_for};
use adit_tests::systemd::Systemd;
use guest::Guest;

const TUNNELS: usize = 100;
const CID: u64 = 3;
/// The program of the guest that sends back what it gets.
const ECHO: u32 = 5000;
const SOON: Duration = Duration::from_secs(30);

fn bins() -> Option<PathBuf> {
    let bins = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from);
    if bins.is_none() {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
    }
    bins
}

/// A guest that runs in a thread, and whose program echoes.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn boot(socket: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, socket) = (stop.clone(), socket.to_owned());
        let thread = std::thread::spawn(move || {
            let mut guest = Guest::boot(&socket, CID, &[ECHO]);
            while !stopped.load(Ordering::Relaxed) {
                guest.shard.turn(Some(Duration::from_millis(5))).unwrap();
                while let Some(news) = guest.shard.poll_news() {
                    if let adit_channel::shard::News::Notice(_, notice) = news {
                        accept(&mut guest, notice);
                    }
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(guest: &mut Guest, notice: Notice) {
    let Notice::Incoming { stream, .. } = notice else {
        return;
    };
    let (mut far, sink) = UnixStream::pair().unwrap();
    sink.set_nonblocking(true).unwrap();
    let now = guest.shard.now();
    let port = guest.shard.port_mut(guest.port);
    port.accept(now, stream, Some(Sink::Fd(sink.into())));
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = far.read(&mut bytes) {
            if far.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
    });
}

/// A CONNECT through the proxy. `None`: it is refused, or cut off.
fn connect(proxy: SocketAddr) -> Option<TcpStream> {
    let mut client = TcpStream::connect(proxy).ok()?;
    client.set_read_timeout(Some(SOON)).unwrap();
    let request = format!("CONNECT vsock-{ECHO}.a:{ECHO} HTTP/1.1\r\nHost: a\r\n\r\n");
    client.write_all(request.as_bytes()).ok()?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    head.starts_with(b"HTTP/1.1 200 ").then_some(client)
}

/// The byte at a place of a tunnel: no two tunnels have the same bytes, and no two places the same neighbours.
fn byte(tunnel: usize, at: usize) -> u8 {
    let mixed = (at as u64 ^ (tunnel as u64) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8
}

/// Sends, and compares what comes back, until told to stop. Returns how many bytes that were.
fn talk(mut client: TcpStream, tunnel: usize, stop: &AtomicBool) -> usize {
    let mut at = 0;
    while !stop.load(Ordering::Relaxed) {
        let chunk = 1 + (at * 31 + tunnel * 7) % 3000;
        let sent: Vec<u8> = (at..at + chunk).map(|at| byte(tunnel, at)).collect();
        client.write_all(&sent).unwrap();
        let mut back = vec![0; chunk];
        client.read_exact(&mut back).unwrap();
        assert!(sent == back, "tunnel {tunnel}: other bytes at {at}");
        at += chunk;
        std::thread::sleep(Duration::from_millis(2));
    }
    at
}

struct Tunnels {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<usize>>,
}

impl Tunnels {
    fn open(proxy: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..TUNNELS).map(|tunnel| {
            let client = connect(proxy).expect("a tunnel");
            let stop = stop.clone();
            std::thread::spawn(move || talk(client, tunnel, &stop))
        });
        let threads = threads.collect();
        Self { stop, threads }
    }

    fn all_go_on(&self) {
        assert!(self.threads.iter().all(|thread| !thread.is_finished()));
    }

    /// Ends them. Every byte that was sent has come back.
    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let bytes: Vec<usize> = self
            .threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        assert_eq!(bytes.len(), TUNNELS);
        assert!(bytes.iter().all(|n| *n > 3000), "{bytes:?}");
    }
}

/// Waits until the proxy makes new tunnels.
fn serves(host: &Host) {
    let answered = wait_for("a new tunnel", SOON, || Ok(connect(host.proxy())));
    answered.unwrap_or_else(|e| panic!("{e:#}\n{}\n{}", host.log(), host.port_log("a")));
}

fn is_two(host: &Host) -> bool {
    let two = host.worker() != host.pid();
    if !two {
        println!("skipped: aditd is one process here: {}", host.log());
    }
    two
}

#[test]
fn a_hundred_tunnels_go_on_byte_for_byte_whichever_process_of_aditd_is_killed() {
    let Some(bins) = bins() else { return };
    let mut host = Host::start(&bins, &["a"]).unwrap();
    host.wait_port("a").unwrap();
    if !is_two(&host) {
        return;
    }
    let _guest = Echo::boot(&host.vhost_socket("a"));
    serves(&host);
    let tunnels = Tunnels::open(host.proxy());
    let proxy = host.proxy();

    let first = host.worker();
    host.kill_worker();
    let second = host.wait_worker(first).unwrap();
    serves(&host);
    tunnels.all_go_on();

    // The worker serves meanwhile, and the next monitor finds it: the proxy's port is the same, which nobody could bind anew.
    host.kill_monitor();
    serves(&host);
    host.launch().unwrap();
    assert_eq!((host.worker(), host.proxy()), (second, proxy));
    serves(&host);
    tunnels.all_go_on();

    // A worker that its monitor did not start is replaced as well.
    host.kill_worker();
    host.wait_worker(second).unwrap();
    serves(&host);
    assert_eq!(host.proxy(), proxy);

    host.kill();
    tunnels.all_go_on();
    host.launch().unwrap();
    serves(&host);
    tunnels.end();
}

#[test]
fn a_service_survives_the_end_of_each_of_its_processes() {
    let Some(bins) = bins() else { return };
    if let Some(why) = Systemd::missing() {
        println!("skipped: {why}");
        return;
    }
    let mut host = Host::start_as_service(&bins, &["a"]).unwrap();
    host.wait_port("a").unwrap();
    let _guest = Echo::boot(&host.vhost_socket("a"));
    serves(&host);
    let tunnels = Tunnels::open(host.proxy());
    let main = |host: &Host| host.service_property("MainPID").unwrap();

    let (monitor, first) = (main(&host), host.worker());
    host.kill_in_service(first).unwrap();
    let second = host.wait_worker(first).unwrap();
    serves(&host);
    assert_eq!(main(&host), monitor, "the monitor goes on");
    tunnels.all_go_on();

    host.kill_in_service(monitor.parse().unwrap()).unwrap();
    wait_for("another monitor", SOON, || {
        let now = main(&host);
        let state = host.service_property("ActiveState")?;
        // It says that it is ready once it has found the worker.
        let is_ready = state == "active" && now != monitor && now != "0";
        Ok(is_ready.then_some(()))
    })
    .unwrap();
    serves(&host);
    assert_eq!(host.worker(), second, "the worker goes on: {}", host.log());
    tunnels.all_go_on();

    // In order, and both.
    host.restart_service().unwrap();
    host.wait_worker(second).unwrap();
    serves(&host);
    tunnels.end();
}

#[test]
fn the_unit_loads_and_says_what_it_is_exposed_to() {
    if Systemd::missing().is_some() {
        println!("skipped: no systemd");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let unit = adit_tests::root().join("host-proxy/dist/aditd.service");
    let text = std::fs::read_to_string(unit).unwrap();
    // A program that is there: the unit's own is not installed where tests run.
    let text = text.replace("/usr/bin/aditd", "/bin/true");
    let path = dir.path().join("aditd.service");
    std::fs::write(&path, text).unwrap();
    let mut verify = std::process::Command::new("systemd-analyze");
    let said = output(verify.args(["verify", "--man=no"]).arg(&path)).unwrap();
    // A key that this systemd does not know is a warning, and the unit is loaded without it.
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.contains("aditd.service"), "{said}");
    let mut security = std::process::Command::new("systemd-analyze");
    security.args(["security", "--offline=true", "--no-pager", "--threshold=40"]);
    let said = output(security.arg(&path)).unwrap();
    println!("{}", String::from_utf8_lossy(&said.stdout));
}
