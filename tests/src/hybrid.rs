//! A scripted VMM that has a socket for each stream, as Firecracker and Cloud Hypervisor have it, and an agent behind it: the
//! real server of the agent, in threads of the test. Nothing here is a VM, and no AF_VSOCK is opened.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use adit_channel::frame;
use adit_channel::hello::{self, Common, Hello, HostKey, Open};
use adit_channel::socket_end;
use adit_guest_driver::conn::Conn;
use adit_guest_driver::serve::{Identity, Server, blob};
use adit_guest_driver::transport::Listen;
use anyhow::{Context, bail};

/// The features of `tasks` by which an agent asks for a key, and says that it knows chunks; and the frame that has the key.
const KEY: u64 = 8;
const CHUNKS: u64 = 16;
const HOST_KEY: u16 = 19;

/// What a VMM does with half-closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Firecracker: an end of the host's sending closes the stream, and the guest's is not passed on.
    Closes,
    /// Cloud Hypervisor since 2026, `adit-vmm`.
    Keeps,
}

/// A VMM with a guest.
pub struct Vmm {
    path: PathBuf,
    /// What the guest's agent knows of its host.
    pub identity: Arc<Identity>,
}

/// Streams that the VMM has for the agent.
struct Accepts(UnixListener);

impl Listen for Accepts {
    fn accept(&self) -> io::Result<Option<Conn>> {
        let (stream, _) = self.0.accept()?;
        Ok(Some(OwnedFd::from(stream).into()))
    }
}

impl Vmm {
    /// Starts it, with an agent that serves these ports of 127.0.0.1. `path`: of its socket.
    ///
    /// # Errors
    /// The sockets cannot be made.
    pub fn start(path: &Path, kind: Kind, ports: &[u16]) -> anyhow::Result<Self> {
        let identity = Arc::new(Identity {
            boot_nonce: [6; 16],
            epoch: AtomicU64::new(0),
            admission: Default::default(),
        });
        let guest = path.with_extension("guest");
        let agent = Accepts(UnixListener::bind(&guest)?);
        let blobs = blob::store("/nowhere".as_ref());
        let server = Server::new(ports.to_vec(), blobs, None, identity.clone());
        std::thread::spawn(move || server.run(&agent));
        let listener = UnixListener::bind(path)?;
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let guest = guest.clone();
                std::thread::spawn(move || stream(socket, &guest, kind));
            }
        });
        let path = path.to_owned();
        Ok(Self { path, identity })
    }

    /// Dials the host's port as a process of the guest.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn dial_host(&self) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push("_741");
        UnixStream::connect(path)
    }

    /// Begins the agent's own stream, and takes the key that comes on it.
    ///
    /// # Errors
    /// The host does not give one.
    pub fn agent_stream(&self) -> anyhow::Result<UnixStream> {
        let (stream, key) = self.claim_agent(self.identity.boot_nonce)?;
        self.identity.admission.given(Some(key));
        Ok(stream)
    }

    /// The same for whoever claims to be the agent with this nonce, and without giving the key to the agent.
    ///
    /// # Errors
    /// As above.
    pub fn claim_agent(&self, boot_nonce: [u8; 16]) -> anyhow::Result<(UnixStream, HostKey)> {
        let mut stream = self.dial_host()?;
        let common = Common {
            features: KEY | CHUNKS,
            boot_nonce,
            ..Common::default()
        };
        let open = Hello::Open(Open::new("tasks".parse()?, common));
        stream.write_all(&open.encode())?;
        match hello::read(&mut stream)? {
            Hello::Accept(accept) if accept.common.features == KEY | CHUNKS => {}
            other => bail!("{other:?}"),
        }
        let (header, body) = frame::read(&mut stream, 1024)?.context("a frame")?;
        let key = <[u8; 32]>::try_from(body).ok();
        match (header.kind, key) {
            (HOST_KEY, Some(key)) => Ok((stream, HostKey::new(key))),
            _ => bail!("{header:?}"),
        }
    }

    /// Dials the guest as any process of this machine that may open the VMM's socket. Returns the agent's answer to a hello.
    ///
    /// # Errors
    /// The VMM does not answer.
    pub fn dial_as_stranger(&self, open: Open) -> anyhow::Result<Hello> {
        let mut socket = UnixStream::connect(&self.path)?;
        socket.write_all(b"CONNECT 741\n")?;
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut byte = [0];
            socket.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        socket.write_all(&Hello::Open(open).encode())?;
        Ok(hello::read(&mut socket)?)
    }
}

/// One stream that the host has dialled.
fn stream(mut host: UnixStream, guest: &Path, kind: Kind) {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        if line.len() > 32 || host.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        line.push(byte[0]);
    }
    // Nobody listens on any other port: the stream is closed without a word.
    if line != b"CONNECT 741\n" {
        return;
    }
    let Ok(agent) = UnixStream::connect(guest) else {
        return;
    };
    if host.write_all(b"OK 1073741824\n").is_err() {
        return;
    }
    let (Ok(to), Ok(from)) = (agent.try_clone(), host.try_clone()) else {
        return;
    };
    std::thread::spawn(move || {
        let how = end(kind, &from, copy(&from, &to));
        let _ = to.shutdown(how);
        if how == Shutdown::Both {
            let _ = from.shutdown(how);
        }
    });
    let _ = host.shutdown(end(kind, &agent, copy(&agent, &host)));
}

/// What becomes of the other socket when the bytes of this one have ended.
fn end(kind: Kind, of: &UnixStream, copied: io::Result<()>) -> Shutdown {
    match (kind, copied) {
        (Kind::Keeps, Ok(())) if !socket_end::is_closed(of) => Shutdown::Write,
        // One that does not keep half-closes takes each end for this.
        _ => Shutdown::Both,
    }
}

fn copy(mut from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
    io::copy(&mut from, &mut to).map(drop)
}
