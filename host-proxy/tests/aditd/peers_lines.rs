//! The connections between two hosts: how many there are, and what becomes of those that end, or say nothing any more.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::DerefMut;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, ServerConfig, ServerConnection, SideData,
    StreamOwned,
};

use crate::access::{UID, curl, serve};
use crate::h2raw::{END_HEADERS, HEADERS, PING, SETTINGS, frame};
use crate::host::{Control, HANG, NO_GRANTS};
use crate::peers::{Member, to_alpha, two};
use crate::seen::{SEEN, access_log};
use crate::tls::{Pair, own};

/// A wire between two hosts: counts connections, and may swallow all that comes over those which there are.
struct Wire {
    address: SocketAddr,
    made: Arc<AtomicUsize>,
    swallowed: Arc<AtomicUsize>,
}

impl Wire {
    fn to(address: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Self {
            address: listener.local_addr().unwrap(),
            made: Arc::default(),
            swallowed: Arc::default(),
        };
        let (made, swallowed) = (wire.made.clone(), wire.swallowed.clone());
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&address) else {
                    continue;
                };
                let number = made.fetch_add(1, Ordering::SeqCst);
                for (mut from, mut to) in [
                    (near.try_clone().unwrap(), far.try_clone().unwrap()),
                    (far, near),
                ] {
                    let swallowed = swallowed.clone();
                    std::thread::spawn(move || {
                        let mut piece = vec![0; 1 << 16];
                        while let Ok(n @ 1..) = from.read(&mut piece) {
                            if number >= swallowed.load(Ordering::SeqCst)
                                && to.write_all(&piece[..n]).is_err()
                            {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        wire
    }

    fn made(&self) -> usize {
        self.made.load(Ordering::SeqCst)
    }

    fn swallow(&self) {
        self.swallowed.store(self.made(), Ordering::SeqCst);
    }
}

/// Two hosts, of which `alpha` reaches `beta` over a wire.
fn wired(more: &str) -> (Member, Member, Wire) {
    let alpha = Member::new("alpha", &[("a", 3)], &format!("{SEEN}{NO_GRANTS}"));
    let beta = Member::new(
        "beta",
        &[("b", 3), ("c", 4)],
        &(more.to_owned() + &to_alpha("\"reach\", \"see\"")),
    );
    let wire = Wire::to(beta.address());
    let section = beta.section("");
    alpha.takes(&section.replace(&beta.address(), &wire.address.to_string()));
    beta.knows(&alpha, "");
    (alpha, beta, wire)
}

/// A tunnel from a client of `alpha` to the guest of `b`.
fn tunnel(alpha: &Member, b: &Control) -> (TcpStream, UnixStream) {
    let mut client = alpha.host.proxy();
    client.set_read_timeout(Some(HANG)).unwrap();
    client
        .write_all(b"CONNECT b:80 HTTP/1.1\r\nHost: b\r\n\r\n")
        .unwrap();
    let (guest, _) = b.tunnel();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    assert!(head.starts_with(b"HTTP/1.1 200"));
    (client, guest)
}

fn carries(client: &mut TcpStream, guest: &mut UnixStream) {
    let mut heard = [0; 5];
    client.write_all(b"hello").unwrap();
    guest.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
    guest.write_all(b"there").unwrap();
    client.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"there");
}

#[test]
fn tunnels_to_another_host_share_a_connection_and_one_that_stalls_holds_up_no_other() {
    let (alpha, beta, wire) = wired("");
    let b = beta.ports[0].connected();
    let served = serve(&b);
    assert_eq!(alpha.get("b").status, 200);
    served.join().unwrap();
    let mut tunnels: Vec<_> = (0..30).map(|_| tunnel(&alpha, &b)).collect();
    // Nobody reads, on either side.
    let (mut client, mut guest) = tunnels.pop().unwrap();
    let stalled = [
        std::thread::spawn(move || while client.write_all(&[7; 1 << 16]).is_ok() {}),
        std::thread::spawn(move || while guest.write_all(&[7; 1 << 16]).is_ok() {}),
    ];
    for _ in 0..3 {
        for (client, guest) in &mut tunnels {
            carries(client, guest);
        }
    }
    assert_eq!(wire.made(), 1);
    assert!(stalled.iter().all(|thread| !thread.is_finished()));
}

#[test]
fn a_connection_to_another_host_that_says_nothing_any_more_is_replaced_and_no_request_fails() {
    let (alpha, beta, wire) = wired("");
    let (b, c) = (beta.ports[0].connected(), beta.ports[1].connected());
    let (mut client, mut guest) = tunnel(&alpha, &b);
    carries(&mut client, &mut guest);
    assert_eq!(wire.made(), 1);
    wire.swallow();
    // The map still knows where it is, so this tunnel is the first that nobody answers.
    let (mut other, mut others_guest) = tunnel(&alpha, &b);
    carries(&mut other, &mut others_guest);
    assert_eq!(wire.made(), 2);
    wire.swallow();
    // Here it is the question where the VM is.
    let served = serve(&c);
    let answer = alpha.get("c");
    assert_eq!(answer.status, 200, "{}", answer.body);
    served.join().unwrap();
    assert_eq!(wire.made(), 3);
}

#[test]
fn a_host_that_begins_anew_breaks_tunnels_off_and_is_reached_again() {
    let (alpha, beta, wire) = wired("");
    let b = beta.ports[0].connected();
    let (mut client, mut guest) = tunnel(&alpha, &b);
    carries(&mut client, &mut guest);
    beta.host.kill_worker();
    assert!(client.read(&mut [0]).is_err(), "broken off, not ended");
    let b = beta.ports[0].connected();
    let (mut client, mut guest) = tunnel(&alpha, &b);
    carries(&mut client, &mut guest);
    assert_eq!(wire.made(), 2);
}

#[test]
fn a_tunnel_to_another_host_is_in_the_access_logs_of_both_with_its_bytes_and_one_trace() {
    let (alpha, beta, _wire) = wired(SEEN);
    let b = beta.ports[0].connected();
    let (mut client, mut guest) = tunnel(&alpha, &b);
    carries(&mut client, &mut guest);
    client.write_all(b"bye").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    guest.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"bye");
    drop(guest);
    client.read_to_end(&mut heard).unwrap();
    let tunnel_of = |member: &Member| {
        member.host.until("its line is written", |host| {
            let mut lines = access_log(host, 1).into_iter();
            lines.find(|line| line["method"] == "CONNECT")
        })
    };
    let (near, far) = (tunnel_of(&alpha), tunnel_of(&beta));
    for line in [&near, &far] {
        assert_eq!(
            (
                &line["bytes_to_vm"],
                &line["bytes_from_vm"],
                &line["status"]
            ),
            (&8.into(), &5.into(), &200.into()),
            "{line}"
        );
        assert_eq!(line["broken_off"], serde_json::Value::Null, "{line}");
    }
    assert_eq!(near["trace_id"], far["trace_id"]);
}

#[test]
fn r126_one_client_of_another_host_leaves_the_others_of_that_host_something() {
    let limits = "[limits]\nconnections_per_client = 4\n";
    let grants = limits.to_owned() + &to_alpha("\"reach\", \"see\"");
    let (alpha, beta) = two(&[], &[("b", 3)], &grants);
    let b = beta.ports[0].connected();
    let _held: Vec<_> = (0..2).map(|_| tunnel(&alpha, &b)).collect();
    let answer = alpha.get("b");
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(answer.body.contains("by way of host"), "{}", answer.body);
    let served = serve(&b);
    let proxy = alpha.host.proxy().peer_addr().unwrap().to_string();
    let Some(said) = curl(UID, &["-x", &proxy, "http://b/"]) else {
        return;
    };
    assert_eq!(said, (200, "ok".into()));
    served.join().unwrap();
}

fn certificates(pair: &Pair) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    (vec![cert], key)
}

/// Says this until nobody hears it any more, and takes what is answered: who reads nothing is not answered for ever.
fn flood<C, S>(tls: &mut StreamOwned<C, TcpStream>, piece: &[u8])
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    let millisecond = std::time::Duration::from_millis(1);
    tls.sock.set_read_timeout(Some(millisecond)).unwrap();
    while tls.write_all(piece).is_ok() {
        while matches!(tls.read(&mut [0; 1 << 16]), Ok(1..)) {}
    }
}

/// A host that begins to speak HTTP/2, and whose nth connection then says the nth of these without an end.
fn flooding(pair: &Pair, pieces: Vec<Vec<u8>>) -> SocketAddr {
    let (cert, key) = certificates(pair);
    let config = ServerConfig::builder().with_no_client_auth();
    let mut config = config.with_single_cert(cert, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        // A host that did not answer may be asked more than once.
        let pieces = pieces.into_iter().cycle();
        for (tcp, piece) in listener.incoming().flatten().zip(pieces) {
            let config = config.clone();
            std::thread::spawn(move || {
                let tls = ServerConnection::new(config).unwrap();
                let mut tls = StreamOwned::new(tls, tcp);
                // Its preface and its first question are there.
                let _ = tls.read(&mut [0; 4096]);
                let _ = tls.write_all(&frame(SETTINGS, 0, 0, &[]));
                flood(&mut tls, &piece);
            });
        }
    });
    address
}

#[test]
fn r126_a_host_whose_connection_is_a_flood_loses_it_and_others_go_on() {
    let pieces = vec![
        frame(PING, 0, 0, b"12345678").repeat(8000),
        frame(SETTINGS, 0, 0, &[]).repeat(8000),
        frame(0xfa, 0, 0, &[0; 1000]).repeat(100),
        // `:status: 103` again and again, and never an answer.
        frame(HEADERS, END_HEADERS, 1, b"\x08\x03103").repeat(8000),
    ];
    let pair = own(&["gamma"], |_| {});
    let address = flooding(&pair, pieces.clone());
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    let b = beta.ports[0].connected();
    let (mut client, mut guest) = tunnel(&alpha, &b);
    let pin = pair.pin.strip_prefix("cert:").unwrap();
    alpha.takes(&format!(
        "[[host]]\nname = \"gamma\"\naddress = \"{address}\"\npin = \"{pin}\"\n"
    ));
    for nth in 1..=pieces.len() {
        alpha.host.until("its connection has ended", |host| {
            // It is asked, and its answer is a flood. For a while after that it is not asked again.
            assert_ne!(alpha.get("x.gamma").status, 200);
            let log = host.log();
            let ended = log.matches("a connection to another host is a flood");
            (ended.count() >= nth).then_some(())
        });
        carries(&mut client, &mut guest);
    }
    let log = alpha.host.log();
    assert!(
        log.contains("host=gamma") && !log.contains("host=beta what"),
        "{log}"
    );
}

#[test]
fn r126_another_host_that_floods_as_a_client_is_told_so_and_its_name_is_in_the_log() {
    let (alpha, beta) = two(&[("a", 3)], &[("b", 3)], &to_alpha("\"reach\", \"see\""));
    let b = beta.ports[0].connected();
    let (mut client, mut guest) = tunnel(&alpha, &b);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificates(&beta.key).0.remove(0)).unwrap();
    let (cert, key) = certificates(&alpha.key);
    let config = ClientConfig::builder().with_root_certificates(roots);
    let mut config = config.with_client_auth_cert(cert, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("beta").unwrap();
    let tls = ClientConnection::new(Arc::new(config), name).unwrap();
    let tcp = TcpStream::connect(beta.address()).unwrap();
    let mut tls = StreamOwned::new(tls, tcp);
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    let pings = frame(PING, 0, 0, b"12345678").repeat(8000);
    let _ = tls.write_all(&frame(SETTINGS, 0, 0, &[]));
    flood(&mut tls, &pings);
    beta.host.until("it is written down", |host| {
        let log = host.log();
        let line = log
            .lines()
            .find(|line| line.contains("another host's connection is a flood"))?;
        assert!(line.contains("alpha"), "{line}");
        Some(())
    });
    // What it has on another connection goes on.
    carries(&mut client, &mut guest);
}
