//! A software guest whose program sends back what it gets, and tunnels to it that compare every byte.
#![allow(dead_code)] // each test uses its part

#[path = "../../../host-proxy/port/tests/guest/mod.rs"]
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
use adit_engine::EngineConfig;
use adit_tests::host::Host;
use adit_tests::process::wait_for;
use guest::Guest;

const TUNNELS: usize = 100;
/// Of the VM `a`.
pub const CID: u64 = 3;
/// The program of the guest that sends back what it gets.
pub const ECHO: u32 = 5000;
const SOON: Duration = Duration::from_secs(30);

/// A guest that runs in a thread, and whose program echoes.
pub struct Echo {
    stop: Arc<AtomicBool>,
    still: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// `socket`: the VM's `vhost.sock`.
    pub fn boot(socket: &Path) -> Self {
        Self::boot_as(socket, CID)
    }

    /// The same with this CID.
    pub fn boot_as(socket: &Path, cid: u64) -> Self {
        let (stop, still) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        // As many as a kernel takes, which has no limit but memory.
        let config = EngineConfig {
            max_streams: adit_engine::STREAMS_MAX,
            ..EngineConfig::default()
        };
        let (stopped, stands, socket) = (stop.clone(), still.clone(), socket.to_owned());
        let thread = std::thread::spawn(move || {
            let mut guest = Guest::boot_with(&socket, cid, &[ECHO], config);
            while !stopped.load(Ordering::Relaxed) {
                if stands.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
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
            still,
            thread: Some(thread),
        }
    }

    /// It runs no more, as one whose VMM is stopped.
    pub fn stands_still(&self) {
        self.still.store(true, Ordering::Relaxed);
    }

    /// It runs again.
    pub fn goes_on(&self) {
        self.still.store(false, Ordering::Relaxed);
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
pub fn connect(proxy: SocketAddr) -> Option<TcpStream> {
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

/// A hundred tunnels that talk.
pub struct Tunnels {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<usize>>,
}

impl Tunnels {
    pub fn open(proxy: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..TUNNELS).map(|tunnel| {
            let client = connect(proxy).expect("a tunnel");
            let stop = stop.clone();
            std::thread::spawn(move || talk(client, tunnel, &stop))
        });
        let threads = threads.collect();
        Self { stop, threads }
    }

    pub fn all_go_on(&self) {
        assert!(self.threads.iter().all(|thread| !thread.is_finished()));
    }

    /// Ends them. Every byte that was sent has come back.
    pub fn end(self) {
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

/// aditd with the VM `a`, whose guest echoes, and the directory of the programs.
pub fn started() -> Option<(Host, Echo, PathBuf)> {
    started_with("")
}

/// The same. `more` are additional lines of the VM's configuration.
pub fn started_with(more: &str) -> Option<(Host, Echo, PathBuf)> {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
        return None;
    };
    let host = Host::start_with(&bins, &["a"], more).unwrap();
    host.wait_port("a").unwrap();
    let guest = Echo::boot(&host.vhost_socket("a"));
    wait_for("the guest", SOON, || Ok(connect(host.proxy()))).unwrap();
    Some((host, guest, bins))
}
