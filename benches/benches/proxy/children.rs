//! The bench's own processes: the server behind everything, and the agent on a ring.
//!
//! | first byte of a connection | the server |
//! |---|---|
//! | [`ECHO`] | sends back whatever comes |
//! | [`SOURCE`] | sends until the client is gone |
//! | [`SINK`] | reads, and says each [`SINK_SAYS`] bytes with one byte that they came |
//! | `G`, as of a GET | answers HTTP/1.1 with two bytes, until the client is gone |

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use adit_channel::ring::RingBells;
use adit_guest_driver::serve::{Identity, Server, blob};
use adit_guest_driver::transport::ring::{RingEnd, carrier};
use adit_ringbuf::Mapped;
use adit_ringbuf_io::attach::{Bells, Offer, Socket};
use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Echoes.
pub const ECHO: u8 = b'e';
/// Sends.
pub const SOURCE: u8 = b's';
/// Reads.
pub const SINK: u8 = b'k';
/// After so many bytes a sink says that they came.
pub const SINK_SAYS: usize = 1 << 20;
const PIECE: usize = 64 << 10;
/// Bytes of the ring.
const BYTES: usize = 4 << 20;
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Serves on a port of 127.0.0.1, and prints it.
pub fn server() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?.port());
        std::io::stdout().flush()?;
        loop {
            let (client, _) = listener.accept().await?;
            tokio::spawn(async move {
                // Clients go when they like.
                let _ = client.set_nodelay(true);
                let _ = serve(client).await;
            });
        }
    })
}

async fn serve(mut client: TcpStream) -> std::io::Result<()> {
    let mut first = [0];
    if client.peek(&mut first).await? == 0 {
        return Ok(());
    }
    let mut piece = vec![0; 4 << 10];
    if first[0] == b'G' {
        return http(client, piece).await;
    }
    client.read_exact(&mut first).await?;
    match first[0] {
        SOURCE => {
            let piece = vec![7; PIECE];
            loop {
                client.write_all(&piece).await?;
            }
        }
        SINK => {
            piece.resize(PIECE, 0);
            let mut owed = 0;
            loop {
                let n = client.read(&mut piece).await?;
                if n == 0 {
                    return Ok(());
                }
                owed += n;
                while owed >= SINK_SAYS {
                    owed -= SINK_SAYS;
                    client.write_all(&[1]).await?;
                }
            }
        }
        _ => loop {
            let n = client.read(&mut piece).await?;
            if n == 0 {
                return Ok(());
            }
            client.write_all(&piece[..n]).await?;
        },
    }
}

/// Heads of requests without bodies.
async fn http(mut client: TcpStream, mut piece: Vec<u8>) -> std::io::Result<()> {
    let mut len = 0;
    loop {
        let n = client.read(&mut piece[len..]).await?;
        if n == 0 {
            return Ok(());
        }
        len += n;
        while let Some(end) = piece[..len].windows(4).position(|w| w == b"\r\n\r\n") {
            client.write_all(ANSWER).await?;
            piece.copy_within(end + 4..len, 0);
            len -= end + 4;
        }
    }
}

/// The guest's agent on a ring that it offers to the port process of its VM.
pub fn agent(socket: &Path, ports: Vec<u16>) -> anyhow::Result<()> {
    let vm = socket.parent().and_then(Path::file_name);
    let offer = Offer {
        vm: vm
            .context("a VM's directory")?
            .to_string_lossy()
            .into_owned(),
        bytes: BYTES as u64,
        lanes: 2,
    };
    let (memory, fd) = Mapped::memfd(BYTES)?;
    let bells = Bells::new()?;
    // The ring lives as long as the connection.
    let attached = Socket::connect(socket)?;
    attached.offer(&offer, 1, fd.as_fd(), &bells)?;
    let ring = RingEnd::start(carrier(memory, RingBells::of_guest(bells))?)?;
    let identity = Arc::new(Identity {
        boot_nonce: [5; 16],
        epoch: AtomicU64::new(0),
        admission: Default::default(),
    });
    let server = Server::new(ports, blob::store("/nowhere".as_ref()), None, identity);
    server.run_on_ring(ring.listen()?);
    Ok(())
}
