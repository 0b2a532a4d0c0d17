//! Hosts that are made up: they have every VM whose name has no `x`, and answer at once. For tests of what clients say.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use adit_names::VmId;
use adit_reach::{Destination, Suffix};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HeaderValue;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::problem::{Body, Problem};
use super::{Lead, Shared};

/// Bytes on the way to a host.
const ROOM: usize = 64 << 10;
/// Longer than a client is waited for that has ended its half.
const HANG: Duration = Duration::from_secs(20);
/// The name of the one host.
const HOST: &str = "h";

/// What came of a client.
#[derive(Debug, Default)]
pub struct Heard {
    /// What it was told.
    pub client: Vec<u8>,
    /// What hosts were told, each on its connection.
    pub hosts: Vec<Vec<u8>>,
}

/// All hosts: what each connection to one comes to.
#[derive(Default)]
struct Faked(Arc<Mutex<Vec<JoinHandle<Vec<u8>>>>>);

impl Lead for Faked {
    fn token(&self) -> Option<&HeaderValue> {
        None
    }

    async fn find(&self, to: &Destination) -> Result<VmId, Problem> {
        let host = HOST.parse().ok().filter(|_| !to.vm.as_str().contains('x'));
        host.ok_or_else(|| Problem::unknown(&to.name()))
    }

    async fn reach(&self, _: &VmId) -> Result<SendRequest<Body>, Problem> {
        let (near, far) = tokio::io::duplex(ROOM);
        let heard = tokio::spawn(host(far));
        {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(heard);
        }
        let shaken = http1::handshake(TokioIo::new(near)).await;
        let (sender, connection) = shaken.map_err(|_| Problem::unknown(HOST))?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    fn forget(&self, _: &VmId, _: &VmId) {}
}

/// A host: it reads a request with its body, answers by what it is, and sends back what comes in a tunnel. Returns what it has read.
async fn host(mut client: DuplexStream) -> Vec<u8> {
    let mut heard = Vec::new();
    let head = loop {
        if let Some(end) = heard.windows(4).position(|end| end == b"\r\n\r\n") {
            break end + 4;
        }
        if client.read_buf(&mut heard).await.unwrap_or(0) == 0 {
            return heard;
        }
    };
    let text = String::from_utf8_lossy(&heard[..head]).to_ascii_lowercase();
    let connect = text.starts_with("connect ");
    let len = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"));
    let len: usize = len.and_then(|len| len.trim().parse().ok()).unwrap_or(0);
    let chunked = text.contains("\ntransfer-encoding:");
    let is_whole = |heard: &[u8]| match (connect, chunked) {
        (true, _) => true,
        (_, true) => is_last(&heard[head..]),
        _ => heard.len() - head >= len,
    };
    while !is_whole(&heard) {
        if client.read_buf(&mut heard).await.unwrap_or(0) == 0 {
            return heard;
        }
    }
    let upgrades = text.contains("\nupgrade:") && text.contains("\nconnection:");
    let answer: &[u8] = match (connect, upgrades) {
        (true, _) => b"HTTP/1.1 200 OK\r\n\r\n",
        (_, true) => {
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: any\r\n\r\n"
        }
        _ => b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    };
    // The client may have left; what it sent is known then.
    let _ = client.write_all(answer).await;
    let mut piece = [0; 1024];
    while let Ok(n @ 1..) = client.read(&mut piece).await {
        heard.extend_from_slice(&piece[..n]);
        if connect && client.write_all(&piece[..n]).await.is_err() {
            break;
        }
    }
    heard
}

/// Whether chunks have ended, with their trailers.
fn is_last(chunks: &[u8]) -> bool {
    let last = chunks.starts_with(b"0\r\n") || chunks.windows(5).any(|end| end == b"\r\n0\r\n");
    last && chunks.ends_with(b"\r\n\r\n")
}

/// Has a client say these bytes, in pieces of such a length, and end its half.
///
/// # Panics
/// The client is not done with in time, or this system has no sockets.
pub fn serve(bytes: &[u8], piece: usize) -> Heard {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (near, far) = UnixStream::pair().expect("sockets");
        for socket in [&near, &far] {
            socket.set_nonblocking(true).expect("a socket");
        }
        let faked = Faked::default();
        let hosts = faked.0.clone();
        let shared = Arc::new(Shared {
            hosts: faked,
            suffix: Suffix::default(),
        });
        let served = tokio::spawn(super::one(far.into(), shared));
        let near = tokio::net::UnixStream::from_std(near).expect("a socket");
        let (mut reader, mut writer) = near.into_split();
        let says = async {
            for piece in bytes.chunks(piece.max(1)) {
                if writer.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            let _ = writer.shutdown().await;
        };
        let mut heard = Heard::default();
        let hears = reader.read_to_end(&mut heard.client);
        let all = async {
            // A client that is cut off has heard what there is.
            let _ = tokio::join!(says, hears);
            let _ = served.await.expect("no panic");
            let hosts = std::mem::take(&mut *hosts.lock().unwrap_or_else(PoisonError::into_inner));
            let mut all = Vec::new();
            for host in hosts {
                all.push(host.await.expect("no panic"));
            }
            all
        };
        let hosts = timeout(HANG, all).await.expect("it ends");
        heard.hosts = hosts;
        heard
    })
}
