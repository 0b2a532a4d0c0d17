//! TLS that is the VM's own: a listener reads the server's name in a client's first message, and passes everything on as it is.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use adit_tests::agent;
use adit_tests::host::Host;
use adit_tests::process::wait_for;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Error, RootCertStore, ServerConfig,
    ServerConnection, StreamOwned, SupportedProtocolVersion,
};

use super::keys::{Keys, Pair};
use super::{LIMIT, bins};

const MUCH: usize = 1 << 20;

fn certificate(path: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(Path::new(path)).unwrap()
}

fn key(pair: &Pair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_file(Path::new(&pair.key)).unwrap()
}

fn roots(keys: &Keys) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&keys.ca())).unwrap();
    roots.into()
}

/// What the VM's server knows of a client.
#[derive(Debug, PartialEq)]
struct Seen {
    name: Option<String>,
    certificate: Option<CertificateDer<'static>>,
}

/// The VM's server: sends back what it gets, and ends when its client has ended in order. Returns its port.
fn server(keys: &Keys, own: &Pair) -> (u16, Receiver<Seen>) {
    let provider = Arc::new(default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(roots(keys), provider.clone());
    let clients = clients.allow_unauthenticated().build().unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![certificate(&own.cert)], key(own));
    let config = Arc::new(config.unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (note, seen) = channel();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (config, note) = (config.clone(), note.clone());
            std::thread::spawn(move || -> std::io::Result<()> {
                let session = ServerConnection::new(config).unwrap();
                let mut client = StreamOwned::new(session, client);
                let mut bytes = vec![0; 16 << 10];
                let mut is_seen = false;
                loop {
                    // It fails where the end is not in order.
                    let n = client.read(&mut bytes)?;
                    if !std::mem::replace(&mut is_seen, true) {
                        let shown = client.conn.peer_certificates();
                        let _ = note.send(Seen {
                            name: client.conn.server_name().map(str::to_owned),
                            certificate: shown.map(|all| all[0].clone().into_owned()),
                        });
                    }
                    if n == 0 {
                        break;
                    }
                    client.write_all(&bytes[..n])?;
                    client.flush()?;
                }
                client.conn.send_close_notify();
                client.flush()
            });
        }
    });
    (port, seen)
}

/// A client's socket that sends its first bytes one by one.
struct Dribbles(TcpStream, usize);

impl Read for Dribbles {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Dribbles {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self.1 {
            0 => self.0.write(bytes),
            _ => {
                self.1 -= 1;
                self.0.write(&bytes[..1])
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn a_whole_handshake_goes_through_to_the_vm_and_the_certificate_is_the_vms() {
    let Some(bins) = bins() else { return };
    let keys = Keys::new();
    let (own, me) = (keys.signs(&["web-1.adit", "web-1"]), keys.signs(&["me"]));
    let (port, seen) = server(&keys, &own);
    let config = format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\n\
         [[listen]]\naddress = \"127.0.0.1:0\"\nspeak = \"tls\"\nport = {port}\n\
         [[grant]]\nto = [\"user:root\"]\nvms = [\"web-1\"]\nmay = [\"reach\", \"see\"]\n\
         [[vm]]\nname = \"web-1\"\ncid = 3\nallow = [{port}]\n\
         [[vm]]\nname = \"web-2\"\ncid = 4\nallow = [{port}]\n"
    );
    let host = Host::start_configured(&bins, &config).unwrap();
    agent::start(&host.vm_dir("web-1"), &[port]).unwrap();
    let at = host.listeners().unwrap().remove(0);
    let connect = |name: &str, version: &'static SupportedProtocolVersion, shows: Option<&Pair>| {
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots(&keys));
        let config = match shows {
            Some(pair) => config
                .with_client_auth_cert(vec![certificate(&pair.cert)], key(pair))
                .unwrap(),
            None => config.with_no_client_auth(),
        };
        let name = name.to_owned().try_into().unwrap();
        let session = ClientConnection::new(config.into(), name).unwrap();
        let tcp = TcpStream::connect(&at).unwrap();
        tcp.set_nodelay(true).unwrap();
        tcp.set_read_timeout(Some(LIMIT)).unwrap();
        StreamOwned::new(session, Dribbles(tcp, 700))
    };
    wait_for("the VM", LIMIT, || {
        let mut client = connect("web-1.adit", &TLS13, None);
        let is_there = client.write_all(b"x").is_ok() && client.read_exact(&mut [0]).is_ok();
        Ok(is_there.then_some(()))
    })
    .unwrap();
    while seen.try_recv().is_ok() {}
    for version in [&TLS12, &TLS13] {
        for (name, shows) in [("web-1.adit", None), ("web-1", Some(&me))] {
            let mut client = connect(name, version, shows);
            let sent: Vec<u8> = (0..MUCH).map(|n| (n * 7 + n / 251) as u8).collect();
            for piece in sent.chunks(16 << 10) {
                client.write_all(piece).unwrap();
                let mut back = vec![0; piece.len()];
                client.read_exact(&mut back).unwrap();
                assert!(back == piece);
            }
            // It was checked for this name against the authority, too.
            let shown = client.conn.peer_certificates().unwrap();
            assert_eq!(shown, [certificate(&own.cert)]);
            assert_eq!(client.conn.protocol_version(), Some(version.version));
            let is_seen = Seen {
                name: Some(name.into()),
                certificate: shows.map(|pair| certificate(&pair.cert)),
            };
            assert_eq!(seen.recv_timeout(LIMIT).unwrap(), is_seen);
            // Each end hears that the other one has ended, and not that it was cut off.
            client.conn.send_close_notify();
            client.flush().unwrap();
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        }
    }
    // Nothing of a client reaches a VM that is not there, or that it may not reach: and it cannot tell which.
    for name in ["nobody.adit", "web-2.adit", "example.com"] {
        let e = connect(name, &TLS13, None).write_all(b"x").unwrap_err();
        let alert = e.get_ref().and_then(|e| e.downcast_ref::<Error>());
        let unrecognised = Error::AlertReceived(AlertDescription::UnrecognisedName);
        assert_eq!(alert, Some(&unrecognised), "{name}: {e}");
    }
    assert!(seen.try_recv().is_err());
}
