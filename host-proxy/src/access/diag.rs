//! Which user of this host is behind a loopback connection: the kernel is asked (sock_diag(7)), by a thread that may wait.
//!
//! Only a connection that belongs to a process counts: of one that is closed already the kernel says user 0. The user is the one
//! who made the client's socket, whoever uses it by now.
//!
//! A client that breaks off leaves what it has sent, and frees its port: another user's connection may have that port before the
//! kernel is asked. So the kernel is asked last about this side of the connection. Where that is the socket that was accepted,
//! the client's end cannot have been another's.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, IPPROTO_TCP, TCP_CLOSE_WAIT, TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2,
};
use netlink_packet_sock_diag::inet::{
    ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags,
};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recvmsg, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::sync::oneshot;

/// Questions that wait at most; more clients at once stay unknown.
const WAITING_MAX: usize = 4096;
/// Longest answer.
const ANSWER_MAX: usize = 4096;
/// How long the kernel may take. It answers at once; a lost answer must not stop everybody.
const LIMIT_MS: i64 = 1000;

/// A socket to ask the kernel with. It is made while a process may still make sockets.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// The thread that asks.
#[derive(Debug)]
pub struct Diag(SyncSender<Question>);

/// What the kernel says of one end of a connection.
#[derive(Clone, Copy)]
struct End {
    /// Who made it, if a process still has it.
    user: Option<u32>,
    cookie: u64,
}

struct Question {
    client: SocketAddr,
    server: SocketAddr,
    cookie: u64,
    answer: oneshot::Sender<Option<u32>>,
}

impl Socket {
    /// Makes one.
    ///
    /// # Errors
    /// The kernel has no such sockets.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::milliseconds(LIMIT_MS),
        )?;
        Ok(Self(socket))
    }

    /// Who made the client's socket of a connection whose socket here has that cookie; none: nobody knows.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    fn user(
        &self,
        client: SocketAddr,
        server: SocketAddr,
        cookie: u64,
        nth: u32,
    ) -> io::Result<Option<u32>> {
        let Some(user) = self.end(client, server, nth)?.and_then(|end| end.user) else {
            return Ok(None);
        };
        let here = self.end(server, client, nth)?;
        Ok(here.filter(|here| here.cookie == cookie).map(|_| user))
    }

    /// Checks that the kernel knows of TCP sockets, by one that listens there.
    ///
    /// # Errors
    /// It cannot be asked, or has no `tcp_diag`: it says of no socket that it is there, then.
    pub fn check(&self, listener: SocketAddr) -> io::Result<()> {
        let listener = canonical(listener);
        let nobody = match listener {
            SocketAddr::V4(_) => SocketAddr::from(([0; 4], 0)),
            SocketAddr::V6(_) => SocketAddr::from(([0_u16; 8], 0)),
        };
        match self.find(listener, nobody, 0)? {
            Some(_) => Ok(()),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel has no tcp_diag",
            )),
        }
    }

    /// The end of a connection that is at `near`.
    fn end(&self, near: SocketAddr, far: SocketAddr, nth: u32) -> io::Result<Option<End>> {
        let (near, far) = (canonical(near), canonical(far));
        let end = self.ask(near, far, nth)?;
        match (end, near.ip(), far.ip()) {
            // It may be an IPv6 socket for IPv4.
            (None, IpAddr::V4(here), IpAddr::V4(there)) => {
                let mapped = |ip: std::net::Ipv4Addr, port| {
                    SocketAddr::from((IpAddr::V6(ip.to_ipv6_mapped()), port))
                };
                let (near, far) = (mapped(here, near.port()), mapped(there, far.port()));
                self.ask(near, far, nth)
            }
            _ => Ok(end),
        }
    }

    fn ask(&self, near: SocketAddr, far: SocketAddr, nth: u32) -> io::Result<Option<End>> {
        let Some(found) = self.find(near, far, nth)? else {
            return Ok(None);
        };
        // What is asked for with a wildcard could be another's.
        let is_it = found.socket_id.source_port == near.port()
            && found.socket_id.destination_port == far.port()
            && found.socket_id.source_address == near.ip()
            && found.socket_id.destination_address == far.ip();
        // A client may have ended its sending already.
        let is_open = matches!(
            found.state,
            TCP_ESTABLISHED | TCP_FIN_WAIT1 | TCP_FIN_WAIT2 | TCP_CLOSE_WAIT
        );
        Ok((is_it && is_open).then(|| End {
            user: (found.inode != 0).then_some(found.uid),
            cookie: u64::from_ne_bytes(found.socket_id.cookie),
        }))
    }

    /// What the kernel says of a socket.
    fn find(
        &self,
        near: SocketAddr,
        far: SocketAddr,
        nth: u32,
    ) -> io::Result<Option<InetResponseHeader>> {
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (NLM_F_REQUEST, nth);
        let request = InetRequest {
            family: if near.is_ipv4() { AF_INET } else { AF_INET6 },
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: SocketId {
                source_port: near.port(),
                destination_port: far.port(),
                source_address: near.ip(),
                destination_address: far.ip(),
                interface_id: 0,
                // Any.
                cookie: [0xff; 8],
            },
        };
        let mut packet = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        let (fd, none) = (self.0.as_raw_fd(), MsgFlags::empty());
        sendmsg::<NetlinkAddr>(fd, &[IoSlice::new(&bytes)], &[], none, None)?;
        let mut answer = vec![0; ANSWER_MAX];
        loop {
            let mut into = [IoSliceMut::new(&mut answer)];
            let (len, sender) = match recvmsg::<NetlinkAddr>(fd, &mut into, None, none) {
                Ok(got) => (got.bytes, got.address.map(|from| from.pid())),
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            };
            if sender != Some(0) {
                // Not the kernel: whoever administers the network may send here.
                continue;
            }
            let bytes = answer.get(..len).unwrap_or_default();
            let message =
                NetlinkMessage::<SockDiagMessage>::deserialize(bytes).map_err(io::Error::other)?;
            if message.header.sequence_number != nth {
                // Of a question that was given up.
                continue;
            }
            return Ok(match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) => {
                    Some(found.header)
                }
                _ => None,
            });
        }
    }
}

/// Without a scope, and as IPv4 where it is.
fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::from((at.ip().to_canonical(), at.port()))
}

impl Diag {
    /// Starts the thread.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start(socket: Socket) -> io::Result<Self> {
        let (ask, questions) = sync_channel(WAITING_MAX);
        let thread = std::thread::Builder::new().name("sock-diag".into());
        thread.spawn(move || answer_all(&socket, &questions))?;
        Ok(Self(ask))
    }

    /// Who is behind a connection whose socket here has that cookie; none: nobody knows.
    pub async fn user(&self, client: SocketAddr, server: SocketAddr, cookie: u64) -> Option<u32> {
        let (answer, answered) = oneshot::channel();
        let question = Question {
            client,
            server,
            cookie,
            answer,
        };
        match self.0.try_send(question) {
            Ok(()) => answered.await.ok().flatten(),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => None,
        }
    }
}

fn answer_all(socket: &Socket, questions: &Receiver<Question>) {
    let (mut nth, mut is_told) = (0_u32, false);
    while let Ok(question) = questions.recv() {
        nth = nth.wrapping_add(1);
        if question.answer.is_closed() {
            continue;
        }
        let Question {
            client,
            server,
            cookie,
            ..
        } = question;
        let user = socket.user(client, server, cookie, nth);
        let user = match user {
            Ok(user) => {
                is_told = false;
                user
            }
            // Clients choose how often it is asked.
            Err(e) => {
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(error = %e, "the kernel does not say who a local client is");
                }
                None
            }
        };
        // Whoever asked may have gone.
        let _ = question.answer.send(user);
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn connected(at: &str) -> Option<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind(at).ok()?;
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Some((client, listener.accept().unwrap().0))
    }

    fn user(socket: &Socket, server: &TcpStream) -> Option<u32> {
        let (from, to) = (server.peer_addr().unwrap(), server.local_addr().unwrap());
        let cookie = rustix::net::sockopt::socket_cookie(server).unwrap();
        socket.user(from, to, cookie, 7).unwrap()
    }

    #[test]
    fn the_user_of_a_live_loopback_connection_is_known_and_of_a_closed_one_is_not() {
        let socket = Socket::open().unwrap();
        let me = nix::unistd::getuid().as_raw();
        for at in ["127.0.0.1:0", "127.1.2.3:0", "[::1]:0"] {
            let Some((client, server)) = connected(at) else {
                println!("skipped: no {at}");
                continue;
            };
            assert_eq!(user(&socket, &server), Some(me), "{at}");
            assert_eq!(
                user(&socket, &client),
                Some(me),
                "{at}: the other way round"
            );
            client.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(user(&socket, &server), Some(me), "{at}: half closed");
            drop(client);
            assert_eq!(user(&socket, &server), None, "{at}: closed");
        }
    }

    #[test]
    fn a_kernel_that_knows_no_socket_is_told_from_one_that_does_by_a_listener() {
        let socket = Socket::open().unwrap();
        for at in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(at) else {
                println!("skipped: no {at}");
                continue;
            };
            socket.check(listener.local_addr().unwrap()).unwrap();
        }
        // Nobody listens on port 0: so a kernel answers that has no tcp_diag.
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let e = socket.check(nowhere).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn a_listener_is_nobodys_connection() {
        let socket = Socket::open().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let from = SocketAddr::from(([127, 0, 0, 1], 1));
        assert_eq!(socket.user(at, from, 0, 1).unwrap(), None);
        assert_eq!(socket.user(from, at, 0, 2).unwrap(), None);
    }

    #[test]
    fn r125_whoever_has_the_port_of_a_client_that_broke_off_is_not_taken_for_it() {
        use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let connected = |from: SocketAddr| {
            let client = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            rustix::net::sockopt::set_socket_reuseaddr(&client, true).unwrap();
            bind(&client, &from).unwrap();
            connect(&client, &to).unwrap();
            TcpStream::from(client)
        };
        let (first, from) = {
            // No other test has a port of this address.
            let client = connected(SocketAddr::from(([127, 125, 30, 1], 0)));
            let (server, from) = listener.accept().unwrap();
            std::io::Write::write_all(&mut &client, b"GET / HTTP/1.1\r\n").unwrap();
            adit_channel::socket_end::reset_on_close(&client, true);
            (server, from)
        };
        let _next = connected(from);
        let (second, again) = listener.accept().unwrap();
        assert_eq!(again, from);
        // What the first has said is still there to be read.
        assert!(first.peek(&mut [0]).is_ok());
        let socket = Socket::open().unwrap();
        let cookie = rustix::net::sockopt::socket_cookie(&first).unwrap();
        assert_eq!(socket.user(from, to, cookie, 1).unwrap(), None);
        let me = nix::unistd::getuid().as_raw();
        assert_eq!(user(&socket, &second), Some(me));
    }

    #[test]
    fn an_ipv6_socket_that_speaks_ipv4_has_its_user() {
        use rustix::net::{AddressFamily, SocketType, connect, socket};
        let Ok(listener) = TcpListener::bind("127.0.0.1:0") else {
            return;
        };
        let to = listener.local_addr().unwrap();
        let Ok(client) = socket(AddressFamily::INET6, SocketType::STREAM, None) else {
            println!("skipped: no IPv6");
            return;
        };
        let mapped = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        connect(
            &client,
            &std::net::SocketAddrV6::new(mapped, to.port(), 0, 0),
        )
        .unwrap();
        let (server, _) = listener.accept().unwrap();
        let me = nix::unistd::getuid().as_raw();
        assert_eq!(user(&Socket::open().unwrap(), &server), Some(me));
    }
}
