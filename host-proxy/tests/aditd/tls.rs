//! TLS to clients: what they prove by certificates, what becomes of files that change, and what odd clients cost.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use adit_api::token;
use adit_channel::socket_end;
use rcgen::{CertificateParams, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion,
};
use serde_json::Value;

use crate::access::{UID, audit, curl, grant, listen, other, serve};
use crate::host::{Answer, HANG, Host, Port};

/// Whoever signs certificates.
pub struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
#[derive(Clone)]
pub struct Pair {
    pub cert: String,
    pub key: String,
    pub pin: String,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        // OpenSSL takes whatever has its issuer's name for self-signed.
        let name = rcgen::DnType::CommonName;
        params.distinguished_name.push(name, "an authority");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Self { pem, issuer }
    }

    pub fn signs(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Pair {
        pair(names, change, |params, key| {
            params.signed_by(key, &self.issuer).unwrap()
        })
    }
}

/// A certificate that signs itself.
pub fn own(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Pair {
    pair(names, change, |params, key| {
        params.self_signed(key).unwrap()
    })
}

fn pair(
    names: &[&str],
    change: impl FnOnce(&mut CertificateParams),
    sign: impl FnOnce(&CertificateParams, &KeyPair) -> rcgen::Certificate,
) -> Pair {
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    change(&mut params);
    use base64::Engine as _;
    let digest = token::sha256(&rcgen::PublicKeyData::subject_public_key_info(&key));
    let pin = base64::engine::general_purpose::STANDARD.encode(digest);
    Pair {
        cert: sign(&params, &key).pem(),
        key: key.serialize_pem(),
        pin: format!("cert:sha256/{pin}"),
    }
}

pub fn expired(params: &mut CertificateParams) {
    (params.not_before, params.not_after) = (date_time_ymd(2000, 1, 1), date_time_ymd(2001, 1, 1));
}

/// Files that aditd and curl read.
pub struct Files {
    dir: tempfile::TempDir,
    pub ca: Ca,
}

impl Files {
    /// With the listener's certificate.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let files = Self { dir, ca: Ca::new() };
        files.serves(&files.ca.signs(&["127.0.0.1"], |_| {}));
        files.write("ca.crt", &files.ca.pem);
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    pub fn serves(&self, pair: &Pair) {
        self.write("proxy.crt", &pair.cert);
        self.write("proxy.key", &pair.key);
    }

    /// Path of the certificate that vouches for the listener's.
    pub fn root(&self) -> String {
        self.path("ca.crt").display().to_string()
    }

    /// The same, as whoever vouches for clients.
    pub fn authority(&self) -> String {
        self.write("clients.crt", &self.ca.pem)
    }

    /// Paths of a client's certificate and its key.
    pub fn signs(&self, names: &[&str]) -> (String, String) {
        let pair = self.ca.signs(names, |_| {});
        (
            self.write("signed.crt", &pair.cert),
            self.write("signed.key", &pair.key),
        )
    }

    /// Section of a TLS listener.
    pub fn listen(&self, speak: &str, more: &str) -> String {
        let (cert, key) = (self.path("proxy.crt"), self.path("proxy.key"));
        let (cert, key) = (cert.display(), key.display());
        let keys = format!("cert = \"{cert}\"\nkey = \"{key}\"\n{more}");
        listen("127.0.0.1:0", speak, &keys)
    }

    /// The same, for clients that this authority vouches for.
    fn listen_to(&self, ca: &Ca) -> String {
        let ca = self.write("clients.crt", &ca.pem);
        self.listen("http", &format!("client_ca = \"{ca}\""))
    }

    /// Asks with curl, maybe with a certificate. None: there is no curl.
    fn curl(&self, host: &Host, with: Option<&Pair>, args: &[&str]) -> Option<(u16, String)> {
        let proxy = format!("https://{}", other(host));
        let ca = self.path("ca.crt").display().to_string();
        let mut all = vec!["-x", &proxy, "--proxy-cacert", &ca];
        let shown = with.map(|pair| {
            let cert = self.write("client.crt", &pair.cert);
            (cert, self.write("client.key", &pair.key))
        });
        if let Some((cert, key)) = &shown {
            all.extend(["--proxy-cert", cert, "--proxy-key", key]);
        }
        all.extend(args);
        curl(UID, &all)
    }

    /// A client of our own.
    fn client(&self, host: &Host, with: Option<&Pair>) -> StreamOwned<ClientConnection, TcpStream> {
        self.client_of(&TLS13, host, with)
    }

    fn client_of(
        &self,
        version: &'static SupportedProtocolVersion,
        host: &Host,
        with: Option<&Pair>,
    ) -> StreamOwned<ClientConnection, TcpStream> {
        let config = self.config(version, with);
        let name = "127.0.0.1".try_into().unwrap();
        let client = ClientConnection::new(Arc::new(config), name).unwrap();
        StreamOwned::new(client, tcp(host))
    }

    /// What a client of our own does with TLS.
    pub fn config(
        &self,
        version: &'static SupportedProtocolVersion,
        with: Option<&Pair>,
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.ca.pem.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots);
        match with {
            Some(pair) => {
                let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
                let key = provider.key_provider.load_private_key(key).unwrap();
                // Whether they belong together is for aditd to find out.
                let shown = SingleCertAndKey::from(CertifiedKey::new(vec![cert], key));
                config.with_client_cert_resolver(Arc::new(shown))
            }
            None => config.with_no_client_auth(),
        }
    }
}

pub fn tcp(host: &Host) -> TcpStream {
    let tcp = TcpStream::connect(other(host)).unwrap();
    tcp.set_read_timeout(Some(HANG)).unwrap();
    tcp
}

fn started(more: &str) -> (Host, Vec<Port>) {
    Host::serving(&[("a", 3), ("b", 4)], more)
}

const CONNECT: &[u8] = b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n";

/// The head of an answer.
fn head(client: &mut impl Read) -> String {
    let mut said = Vec::new();
    while !said.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        said.extend(byte);
    }
    String::from_utf8(said).unwrap()
}

#[test]
fn r125_a_certificate_has_the_grants_of_its_names_and_no_other_certificate_is_let_in() {
    let (files, clients, others) = (Files::new(), Ca::new(), Ca::new());
    let grants = grant("\"cert:ci.example\"", "\"a\"", "\"reach\"")
        + &grant("\"cert:spiffe://adit/ops\"", "\"b\"", "\"reach\"");
    let (host, ports) = started(&(files.listen_to(&clients) + &grants));
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let ci = clients.signs(&["ci.example"], |_| {});
    for form in ["-s", "-p"] {
        let served = serve(&a);
        let Some(said) = files.curl(&host, Some(&ci), &[form, "http://a/"]) else {
            return;
        };
        assert_eq!(said, (200, "ok".into()), "{form}");
        served.join().unwrap();
    }
    let ops = clients.signs(&[], |params| {
        let uri = SanType::URI("spiffe://adit/ops".try_into().unwrap());
        params.subject_alt_names.push(uri);
    });
    let served = serve(&b);
    assert_eq!(
        files.curl(&host, Some(&ops), &["http://b/"]).unwrap().0,
        200
    );
    served.join().unwrap();
    // Its common name says nothing, and neither does a URI that reads as a DNS name.
    let named = clients.signs(&["ci2.example"], |params| {
        let name = rcgen::DnType::CommonName;
        params.distinguished_name.push(name, "ci.example");
        let uri = SanType::URI("ci.example".try_into().unwrap());
        params.subject_alt_names.push(uri);
    });
    for (with, url) in [
        (&ci, "http://b/"),
        (&ops, "http://a/"),
        (&named, "http://a/"),
    ] {
        assert_eq!(
            files.curl(&host, Some(with), &[url]).unwrap().0,
            404,
            "{url}"
        );
    }
    assert_eq!(files.curl(&host, None, &["http://a/"]).unwrap().0, 404);
    let lines = audit(&host, 4);
    assert!(
        lines
            .iter()
            .any(|line| line["caller"] == "cert:ci2.example"),
        "{lines:?}"
    );
    let server_only = clients.signs(&["ci.example"], |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    for (why, with) in [
        ("another authority", others.signs(&["ci.example"], |_| {})),
        ("itself", own(&["ci.example"], |_| {})),
        ("expired", clients.signs(&["ci.example"], expired)),
        ("for servers", server_only),
    ] {
        let (code, said) = files.curl(&host, Some(&with), &["http://a/"]).unwrap();
        assert_eq!(code, 0, "{why}: {said}");
        assert!(said.contains("alert"), "{why}: {said}");
    }
    host.until("handshakes that failed are logged", |host| {
        host.log().contains("TLS handshake failed").then_some(())
    });
}

#[test]
fn r125_without_an_authority_the_key_of_a_certificate_says_who_it_is_and_its_names_nothing() {
    let files = Files::new();
    let (pinned, other) = (own(&["x"], |_| {}), own(&["ci.example"], |_| {}));
    let grants = grant(&format!("\"{}\"", pinned.pin), "\"a\"", "\"reach\"")
        + &grant("\"cert:ci.example\", \"cert:x\"", "\"b\"", "\"reach\"");
    let (host, ports) = started(&(files.listen("http", "") + &grants));
    let a = ports[0].connected();
    let served = serve(&a);
    let Some(said) = files.curl(&host, Some(&pinned), &["http://a/"]) else {
        return;
    };
    assert_eq!(said, (200, "ok".into()));
    served.join().unwrap();
    for (with, url) in [
        (&pinned, "http://b/"),
        (&other, "http://b/"),
        (&other, "http://a/"),
    ] {
        assert_eq!(files.curl(&host, Some(with), &[url]).unwrap().0, 404);
    }
    let path = format!("/v1/access?as={}&verb=reach&vm=a&target=tcp:80", pinned.pin);
    let path = path.replace('+', "%2B");
    assert_eq!(host.get(&path)["allowed"], true);
    // The certificate without its key is nobody's.
    let stolen = Pair {
        cert: pinned.cert.clone(),
        ..other
    };
    for version in [&TLS12, &TLS13] {
        let mut client = files.client_of(version, &host, Some(&stolen));
        let asked = client
            .write_all(CONNECT)
            .and_then(|()| client.read_exact(&mut [0]));
        assert!(asked.is_err());
    }
}

#[test]
fn r69_a_token_goes_over_tls_and_a_client_that_does_not_know_the_listener_sends_none() {
    let files = Files::new();
    let (secret, sha256) = token::new().unwrap();
    let section = format!("[[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n");
    let more = files.listen("http", "") + &section + &grant("\"token:ci\"", "\"a\"", "\"reach\"");
    let (host, ports) = started(&more);
    let a = ports[0].connected();
    let user = format!("x:{secret}");
    for form in ["-s", "-p", "--http1.0"] {
        let served = serve(&a);
        let args = [form, "--proxy-user", &user, "http://a/"];
        let Some(said) = files.curl(&host, None, &args) else {
            return;
        };
        assert_eq!(said, (200, "ok".into()), "{form}");
        let heard = String::from_utf8(served.join().unwrap()).unwrap();
        assert!(!heard.contains(&secret), "{heard}");
    }
    files.write("ca.crt", &Ca::new().pem);
    let args = ["--proxy-user", &*user, "http://a/"];
    let (code, said) = files.curl(&host, None, &args).unwrap();
    assert_eq!(code, 0, "{said}");
    // Whoever speaks no TLS hears why there is no answer.
    let mut plain = tcp(&host);
    plain
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    plain.shutdown(Shutdown::Write).unwrap();
    let mut said = Vec::new();
    plain.read_to_end(&mut said).unwrap();
    let answer = Answer::parse(&said).unwrap();
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("https://"), "{}", answer.body);
}

#[test]
fn a_new_certificate_counts_from_the_next_connection_and_a_broken_one_changes_nothing() {
    let (files, clients) = (Files::new(), Ca::new());
    let more =
        files.listen_to(&clients) + &grant("\"cert:ci.example\"", "\"a\"", "\"reach\", \"see\"");
    let (host, ports) = started(&more);
    let a = ports[0].connected();
    let ci = clients.signs(&["ci.example"], |_| {});
    let mut tunnel = files.client(&host, Some(&ci));
    tunnel.write_all(CONNECT).unwrap();
    let (mut guest, _) = a.tunnel();
    assert!(head(&mut tunnel).starts_with("HTTP/1.1 200"));
    let mut kept = files.client(&host, Some(&ci));
    let mut get = || {
        kept.write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
            .unwrap();
        let said = head(&mut kept);
        let lower = said.to_lowercase();
        let len = lower.split("content-length: ").nth(1).unwrap();
        let len = len.split("\r\n").next().unwrap().parse().unwrap();
        kept.read_exact(&mut vec![0; len]).unwrap();
        said[9..12].to_owned()
    };
    let first = serve(&a);
    assert_eq!(get(), "200");
    first.join().unwrap();
    let old = fs::read_to_string(files.path("proxy.key")).unwrap();
    let key = files.path("proxy.key").display().to_string();
    for broken in ["", "-----BEGIN PRIVATE KEY-----\nAAAA", &ci.key] {
        files.write("proxy.key", broken);
        let status = host.reload(|text| text);
        let error = status["error"].as_str().unwrap();
        assert!(error.contains("`key`") && error.contains(&key), "{error}");
        assert!(
            !broken
                .lines()
                .any(|line| line.len() > 20 && error.contains(line))
        );
    }
    fs::remove_file(files.path("proxy.key")).unwrap();
    let status = host.reload(|text| text);
    assert!(status["error"].as_str().unwrap().contains(&key), "{status}");
    let served = |files: &Files| {
        let mut client = files.client(&host, None);
        client.conn.complete_io(&mut client.sock).unwrap();
        client.conn.peer_certificates().unwrap()[0]
            .clone()
            .into_owned()
    };
    let before = served(&files);
    files.serves(&files.ca.signs(&["127.0.0.1"], |_| {}));
    assert_ne!(fs::read_to_string(files.path("proxy.key")).unwrap(), old);
    let status = host.reload(|text| text);
    assert_eq!(
        (&status["error"], &status["restart"]),
        (&Value::Null, &Value::Array(vec![]))
    );
    assert_ne!(served(&files), before);
    // Nobody vouches for the client any more: neither on the connection that it has, nor on a new one.
    let second = serve(&a);
    assert_eq!(get(), "200");
    second.join().unwrap();
    files.write("clients.crt", &Ca::new().pem);
    host.reload(|text| text);
    assert_eq!(get(), "404");
    let mut refused = files.client(&host, Some(&ci));
    let asked = refused
        .write_all(CONNECT)
        .and_then(|()| refused.read_exact(&mut [0]));
    assert!(asked.is_err());
    // The tunnel has gone on.
    tunnel.write_all(b"ping").unwrap();
    let mut heard = [0; 4];
    guest.read_exact(&mut heard).unwrap();
    guest.write_all(b"pong").unwrap();
    tunnel.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"pong");
    // A worker that is started anew has the same.
    host.kill_worker();
    host.until("a worker serves", |_| {
        let mut client = files.client(&host, None);
        client.conn.complete_io(&mut client.sock).ok()
    });
    assert_ne!(served(&files), before);
}

#[test]
fn r117_a_tunnel_over_tls_carries_all_bytes_both_ends_and_tells_an_end_from_a_break() {
    let files = Files::new();
    let more = files.listen("http", "") + &grant("\"anyone\"", "\"*\"", "\"reach\"");
    let (host, ports) = started(&more);
    let a = ports[0].connected();
    let open = || {
        let mut client = files.client(&host, None);
        client.write_all(CONNECT).unwrap();
        let (guest, _) = a.tunnel();
        assert!(head(&mut client).starts_with("HTTP/1.1 200"));
        (client, guest)
    };
    // More than sockets hold, and then nothing: nothing of it waits for more.
    let (mut client, mut guest) = open();
    let many = vec![7; 16 << 20];
    let sent = many.clone();
    let sending = std::thread::spawn(move || {
        guest.write_all(&sent).unwrap();
        guest
    });
    let mut heard = vec![0; many.len()];
    client.read_exact(&mut heard).unwrap();
    assert!(heard == many);
    let mut guest = sending.join().unwrap();
    // The client's end, and then the guest's.
    client.write_all(b"bye").unwrap();
    client.conn.send_close_notify();
    client.flush().unwrap();
    let mut heard = Vec::new();
    guest.read_to_end(&mut heard).unwrap();
    assert!(heard == b"bye" && !socket_end::is_closed(&guest));
    guest.write_all(b"bye").unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    drop(guest);
    heard.clear();
    client.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"bye");
    // An end of TCP within TLS is none.
    let (client, mut guest) = open();
    client.sock.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    assert!(socket_end::is_closed(&guest));
    // And a guest that breaks off is not one that ends.
    let (mut client, guest) = open();
    drop(guest);
    assert!(client.read(&mut [0]).is_err());
}

#[test]
fn r108_handshakes_that_do_not_end_cost_only_themselves() {
    let files = Files::new();
    let more = files.listen("http", "")
        + &grant("\"anyone\"", "\"*\"", "\"reach\"")
        + "[limits]\nconnections_per_client = 4\n";
    let (host, ports) = started(&more);
    let a = ports[0].connected();
    let open = || {
        let mut client = files.client(&host, None);
        client.conn.complete_io(&mut client.sock).ok()?;
        client.write_all(CONNECT).unwrap();
        let (guest, _) = a.tunnel();
        assert!(head(&mut client).starts_with("HTTP/1.1 200"));
        Some((client, guest))
    };
    // A silent one, one that stops within a record, and what is no record.
    let mut odd: Vec<_> = (0..3).map(|_| tcp(&host)).collect();
    odd[1].write_all(b"\x16\x03\x01\x02\x00\x01").unwrap();
    odd[2].write_all(b"\x16\xff\xff\xff\xff\xff").unwrap();
    let mut said = Vec::new();
    let _ = odd[2].read_to_end(&mut said);
    // A close between the messages of a handshake (RUSTSEC-2024-0336).
    let mut closing = files.client(&host, None);
    closing.conn.write_tls(&mut closing.sock).unwrap();
    closing
        .sock
        .write_all(b"\x15\x03\x03\x00\x02\x01\x00")
        .unwrap();
    let _ = closing.sock.read_to_end(&mut said);
    let first = host.until("a tunnel beside them", |_| open());
    drop((odd, closing));
    let mut tunnels = vec![first];
    while tunnels.len() < 4 {
        tunnels.push(host.until("a share is given back", |_| open()));
    }
    // aditd carries them, so they are in their client's share.
    assert!(open().is_none());
    tunnels.pop();
    host.until("a share is given back", |_| open());
}

#[test]
fn socks5_speaks_within_tls() {
    let files = Files::new();
    let client = own(&["x"], |_| {});
    let more =
        files.listen("socks5", "") + &grant(&format!("\"{}\"", client.pin), "\"a\"", "\"reach\"");
    let (host, ports) = started(&more);
    let a = ports[0].connected();
    for version in [&TLS12, &TLS13] {
        let mut socks = files.client_of(version, &host, Some(&client));
        socks.write_all(b"\x05\x01\x00").unwrap();
        let mut said = [0; 2];
        socks.read_exact(&mut said).unwrap();
        assert_eq!(said, [5, 0]);
        socks
            .write_all(b"\x05\x01\x00\x03\x01a\x00\x50ahead")
            .unwrap();
        let (mut guest, prefix) = a.tunnel();
        let mut said = [0; 10];
        socks.read_exact(&mut said).unwrap();
        assert_eq!((said[0], said[1]), (5, 0));
        let mut heard = prefix;
        while heard.len() < 5 {
            let mut byte = [0];
            guest.read_exact(&mut byte).unwrap();
            heard.extend(byte);
        }
        assert_eq!(heard, b"ahead");
    }
}
