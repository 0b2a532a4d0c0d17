//! `adit --server`: an aditd on another host, and whatever else may answer in its place.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::mpsc::channel;

use adit_api::token::sha256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use crate::fake::{self, Asked, Say};
use crate::text;

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// PEM of a certificate and its key, and the key's pin.
struct Pair {
    cert: String,
    key: String,
    pin: String,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let name = rcgen::DnType::CommonName;
        params.distinguished_name.push(name, "an authority");
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    fn signs(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let digest = sha256(&rcgen::PublicKeyData::subject_public_key_info(&key));
        Pair {
            cert: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
            pin: format!("sha256/{}", STANDARD.encode(digest)),
        }
    }
}

/// A server of some kind on a port of its own. Says how often it was asked something.
struct Server {
    port: u16,
    asked: std::sync::mpsc::Receiver<String>,
}

impl Server {
    /// Speaks TLS, and answers each request by this.
    fn tls(
        pair: &Pair,
        clients: Option<&Ca>,
        mut say: impl FnMut(&Asked) -> Say + Send + 'static,
    ) -> Self {
        let chain = vec![CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let config = match clients {
            None => config.with_no_client_auth(),
            Some(ca) => {
                let mut roots = RootCertStore::empty();
                let root = CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap();
                roots.add(root).unwrap();
                let clients =
                    WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
                config.with_client_cert_verifier(clients.unwrap())
            }
        };
        let config = Arc::new(config.with_single_cert(chain, key).unwrap());
        Self::new(move |tcp, note| {
            let session = ServerConnection::new(config.clone()).unwrap();
            let mut client = StreamOwned::new(session, tcp);
            let _ = fake::serve_with(&mut client, &mut say, &mut |head| {
                let _ = note.send(head);
            });
            client.conn.send_close_notify();
            let _ = client.flush();
        })
    }

    /// Does this with each connection.
    fn new(
        mut serve: impl FnMut(TcpStream, &std::sync::mpsc::Sender<String>) + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (note, asked) = channel();
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                serve(tcp.unwrap(), &note);
            }
        });
        Self { port, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.try_iter().collect()
    }

    fn url(&self, host: &str) -> String {
        format!("https://{host}:{}", self.port)
    }
}

/// adit in a directory, without a word of this environment.
fn adit(dir: &Path, args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
    command.args(args).current_dir(dir).env_clear();
    command.envs(variables.iter().copied());
    command.output().unwrap()
}

fn failure(out: &Output) -> Value {
    let said: Value =
        serde_json::from_slice(&out.stderr).unwrap_or_else(|_| panic!("{}", text(&out.stderr)));
    said["error"].clone()
}

fn one_vm(_: &Asked) -> Say {
    Say::Json(json!([fake::vm("web-1")]))
}

/// A directory with the certificates.
fn files(ca: &Ca) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
    dir
}

#[test]
fn what_goes_by_the_socket_goes_by_a_server_with_a_token_by_option_and_by_environment() {
    let ca = Ca::new();
    let dir = files(&ca);
    fs::write(dir.path().join("token"), "adit_secret\n").unwrap();
    let server = Server::tls(&ca.signs("localhost", |_| {}), None, one_vm);
    let url = server.url("localhost");
    let out = adit(
        dir.path(),
        &[
            "--server",
            &url,
            "--ca",
            "ca.crt",
            "--token-file",
            "token",
            "vm",
            "ls",
            "-o",
            "json",
        ],
        &[],
    );
    assert!(out.status.success(), "{}", text(&out.stderr));
    let list: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(list[0]["name"], "web-1");
    let heads = server.asked();
    assert!(
        heads[0].contains("authorization: bearer adit_secret"),
        "{heads:?}"
    );
    assert!(
        heads[0].contains(&format!("host: localhost:{}", server.port)),
        "{heads:?}"
    );
    let out = adit(
        dir.path(),
        &["vm", "ls"],
        &[
            ("ADIT_SERVER", &url),
            ("ADIT_CA", "ca.crt"),
            ("ADIT_TOKEN", "adit_other"),
        ],
    );
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("web-1"));
    assert!(server.asked()[0].contains("authorization: bearer adit_other"));
}

#[test]
fn a_certificate_of_ours_is_shown_and_refusals_are_as_by_the_socket() {
    let ca = Ca::new();
    let dir = files(&ca);
    let ours = ca.signs("ops.example", |_| {});
    fs::write(dir.path().join("ours.crt"), &ours.cert).unwrap();
    fs::write(dir.path().join("ours.key"), &ours.key).unwrap();
    fs::write(
        dir.path().join("both.pem"),
        format!("{}{}", ours.cert, ours.key),
    )
    .unwrap();
    let server = Server::tls(
        &ca.signs("127.0.0.1", |_| {}),
        Some(&ca),
        |asked| match asked.path.as_str() {
            "/v1/vms" => one_vm(asked),
            "/v1/vms/hidden" => Say::Error(404, "unknown-vm"),
            _ => Say::Error(403, "denied"),
        },
    );
    let url = server.url("127.0.0.1");
    let asks = |more: &[&str]| {
        let mut args = vec!["--server", &url, "--ca", "ca.crt", "-o", "json"];
        args.extend(more);
        adit(dir.path(), &args, &[])
    };
    for identity in [
        &["--cert", "ours.crt", "--key", "ours.key"][..],
        &["--cert", "both.pem"],
    ] {
        let out = asks(&[identity, &["vm", "ls"]].concat());
        assert!(out.status.success(), "{}", text(&out.stderr));
    }
    let out = asks(&["--cert", "both.pem", "vm", "show", "hidden"]);
    assert_eq!(
        (out.status.code(), &failure(&out)["code"]),
        (Some(4), &json!("unknown-vm"))
    );
    let out = asks(&["--cert", "both.pem", "reload"]);
    assert_eq!(
        (out.status.code(), &failure(&out)["code"]),
        (Some(1), &json!("denied"))
    );
    // It says what the server says of a client that shows nothing.
    let out = asks(&["vm", "ls"]);
    assert_eq!(out.status.code(), Some(3));
    let said = failure(&out).to_string();
    assert!(said.to_lowercase().contains("certificate"), "{said}");
}

#[test]
fn r70_a_rogue_server_hears_nothing_and_the_refusal_says_why() {
    let (ca, another) = (Ca::new(), Ca::new());
    let dir = files(&ca);
    let good = ca.signs("localhost", |_| {});
    let expired = ca.signs("localhost", |params| {
        (params.not_before, params.not_after) =
            (date_time_ymd(2000, 1, 1), date_time_ymd(2001, 1, 1));
    });
    let early = ca.signs("localhost", |params| {
        (params.not_before, params.not_after) =
            (date_time_ymd(2090, 1, 1), date_time_ymd(2091, 1, 1));
    });
    let wrong_pin = format!("sha256/{}", "A".repeat(43) + "=");
    let by_ca: &[&str] = &["--ca", "ca.crt"];
    let by_pin = ["--pin", wrong_pin.as_str()];
    let by_both = ["--ca", "ca.crt", "--pin", wrong_pin.as_str()];
    for (pair, trust, why) in [
        (&ca.signs("other.example", |_| {}), by_ca, "another name"),
        (&expired, by_ca, "expired"),
        (&early, by_ca, "not valid yet"),
        (
            &another.signs("localhost", |_| {}),
            by_ca,
            "nobody that --ca",
        ),
        (&good, &by_pin, "not the pinned one"),
        (&good, &by_both, "not the pinned one"),
        (
            &another.signs("localhost", |_| {}),
            &by_both,
            "nobody that --ca",
        ),
    ] {
        let server = Server::tls(pair, None, one_vm);
        let url = server.url("localhost");
        let mut args = vec!["--server", &url, "-o", "json", "vm", "ls"];
        args.extend(trust);
        let out = adit(dir.path(), &args, &[("ADIT_TOKEN", "adit_secret")]);
        let said = failure(&out);
        assert_eq!(
            (out.status.code(), &said["code"]),
            (Some(3), &json!("untrusted-server")),
            "{said}"
        );
        assert!(
            said["message"].as_str().unwrap().contains(why),
            "{why}: {said}"
        );
        assert!(!said.to_string().contains("adit_secret"));
        assert_eq!(server.asked(), Vec::<String>::new());
    }
    // What an attacker says that the key is, is there to be compared.
    let server = Server::tls(&good, None, one_vm);
    let out = adit(
        dir.path(),
        &[
            "--server",
            &server.url("localhost"),
            "--pin",
            &wrong_pin,
            "vm",
            "ls",
        ],
        &[],
    );
    assert!(
        text(&out.stderr).contains(&good.pin),
        "{}",
        text(&out.stderr)
    );
    // The pin alone is enough, whatever else the certificate says.
    let server = Server::tls(&expired, None, one_vm);
    let out = adit(
        dir.path(),
        &[
            "--server",
            &server.url("127.0.0.1"),
            "--pin",
            &expired.pin,
            "vm",
            "ls",
        ],
        &[],
    );
    assert!(out.status.success(), "{}", text(&out.stderr));
}

/// What somebody gets who gives the right host and the wrong port of it, or the right port and the wrong certificate: what to do.
#[test]
fn an_authority_that_shows_itself_and_a_proxys_port_are_told_what_they_are() {
    let ca = Ca::new();
    let dir = files(&ca);
    let fails = |server: &Server, trust: &[&str], code: &str, why: &str, help: &str| {
        let url = server.url("localhost");
        let args = [&["--server", &url, "-o", "json", "vm", "ls"], trust].concat();
        let said = failure(&adit(dir.path(), &args, &[("ADIT_TOKEN", "adit_secret")]));
        let has = |key: &str, part: &str| said[key].as_str().unwrap().contains(part);
        assert_eq!(said["code"], code, "{said}");
        assert!(has("message", why) && has("help", help), "{said}");
    };
    // Its own certificate vouches for others, which one that is made in a hurry does.
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".into()]).unwrap();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let digest = sha256(&rcgen::PublicKeyData::subject_public_key_info(&key));
    let own = Pair {
        cert: params.self_signed(&key).unwrap().pem(),
        key: key.serialize_pem(),
        pin: format!("sha256/{}", STANDARD.encode(digest)),
    };
    fs::write(dir.path().join("own.crt"), &own.cert).unwrap();
    let server = Server::tls(&own, None, one_vm);
    let by_own: &[&str] = &["--ca", "own.crt"];
    fails(&server, by_own, "untrusted-server", "CA:TRUE", "--pin");
    fails(
        &server,
        by_own,
        "untrusted-server",
        &own.pin,
        "without --ca",
    );
    assert_eq!(server.asked(), Vec::<String>::new());
    // And what the help says is right.
    let url = server.url("localhost");
    let args = ["--server", &url, "--pin", &own.pin, "vm", "ls"];
    let out = adit(dir.path(), &args, &[]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    // A listener of the proxy: what it says of a request for a path is no answer of the API.
    let good = ca.signs("localhost", |_| {});
    let by_ca: &[&str] = &["--ca", "ca.crt"];
    let proxy = Server::tls(&good, None, |_| {
        let status = "adit; error=destination_not_found; details=\"x\"".to_owned();
        Say::Refused(
            404,
            "proxy-status",
            status,
            b"no VM is named `localhost`\nx\n".into(),
        )
    });
    fails(
        &proxy,
        by_ca,
        "not-the-api",
        "a proxy of aditd",
        "role = \"management\"",
    );
    // One that passes TLS on to VMs knows nobody of this name.
    let passes_on = Server::new(|mut tcp, _| {
        let _ = tcp.read(&mut [0; 4096]);
        let _ = tcp.write_all(&[21, 3, 3, 0, 2, 2, 112]);
        let _ = tcp.read(&mut [0; 4096]);
    });
    fails(
        &passes_on,
        by_ca,
        "untrusted-server",
        "nothing of that name",
        "role = \"management\"",
    );
    // One that speaks something else within TLS, and hangs up.
    let socks = Server::tls(&good, None, |_| Say::HangUp);
    fails(
        &socks,
        by_ca,
        "cut-off",
        "did not answer",
        "role = \"management\"",
    );
}

#[test]
fn r70_there_is_no_way_without_tls_and_none_to_whoever_says_nothing() {
    let ca = Ca::new();
    let dir = files(&ca);
    // It speaks plain HTTP, and would have the token.
    let plain = Server::new(|mut tcp, note| {
        let mut said = vec![0; 4096];
        let n = tcp.read(&mut said).unwrap_or(0);
        let said = String::from_utf8_lossy(&said[..n]).to_lowercase();
        if said.contains("authorization") || said.contains("get /v1") {
            let _ = note.send(said);
        }
        let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]");
    });
    let token = [("ADIT_TOKEN", "adit_secret")];
    let asks = |url: &str, more: &[&str]| {
        let mut args = vec!["--server", url, "--ca", "ca.crt", "-o", "json"];
        args.extend(more);
        adit(dir.path(), &args, &token)
    };
    let out = asks(&format!("http://localhost:{}", plain.port), &["vm", "ls"]);
    assert_eq!(
        (out.status.code(), &failure(&out)["code"]),
        (Some(2), &json!("usage"))
    );
    assert!(
        failure(&out)["message"]
            .as_str()
            .unwrap()
            .contains("only https://")
    );
    let out = asks(&plain.url("localhost"), &["vm", "ls"]);
    let said = failure(&out);
    assert_eq!(
        (out.status.code(), &said["code"]),
        (Some(3), &json!("untrusted-server")),
        "{said}"
    );
    assert!(
        said["message"].as_str().unwrap().contains("no TLS"),
        "{said}"
    );
    assert_eq!(plain.asked(), Vec::<String>::new());
    // Handshake records without an end, and none at all.
    let endless = Server::new(|mut tcp, _| {
        // A ServerHello of which each record has one byte.
        let header = [22, 3, 3, 0, 4, 2, 255, 255, 255];
        let mut sent = tcp.write_all(&header);
        while sent.is_ok() {
            sent = tcp.write_all(&[22, 3, 3, 0, 1, 0]);
        }
    });
    let silent = Server::new(|tcp, _| {
        drop(std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_secs(60));
            drop(tcp);
        }))
    });
    for server in [endless, silent] {
        let out = asks(
            &server.url("localhost"),
            &["--request-timeout", "2s", "vm", "ls"],
        );
        assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    }
    // Nobody there.
    let out = asks("https://127.0.0.1:1", &["vm", "ls"]);
    assert_eq!(
        (out.status.code(), &failure(&out)["code"]),
        (Some(3), &json!("unreachable"))
    );
}

#[test]
fn which_aditd_is_meant_is_never_guessed() {
    let ca = Ca::new();
    let dir = files(&ca);
    let url = "https://127.0.0.1:1";
    for (args, variables) in [
        (&["--server", url, "vm", "ls"][..], &[][..]),
        (&["--server", url, "--socket", "/a", "vm", "ls"], &[]),
        (
            &["vm", "ls"],
            &[("ADIT_SERVER", url), ("ADIT_SOCKET", "/a")],
        ),
        (&["--pin", "sha256/x", "vm", "ls"], &[]),
        (
            &[
                "--server", url, "--ca", "ca.crt", "--key", "ca.crt", "vm", "ls",
            ],
            &[],
        ),
        (
            &[
                "--server",
                "https://user:secret@h:1",
                "--ca",
                "ca.crt",
                "vm",
                "ls",
            ],
            &[],
        ),
        (&["--server", url, "connect", "web-1", "22"], &[]),
        (&["--server", url, "forward", "web-1", "8443:443"], &[]),
    ] {
        let out = adit(dir.path(), args, variables);
        assert_eq!(
            out.status.code(),
            Some(2),
            "{args:?}: {}",
            text(&out.stderr)
        );
        assert!(
            !text(&out.stderr).contains("secret"),
            "{}",
            text(&out.stderr)
        );
    }
    // One that is given comes before one of the environment.
    let out = adit(
        dir.path(),
        &["--socket", "none.sock", "vm", "ls"],
        &[("ADIT_SERVER", url)],
    );
    assert!(
        text(&out.stderr).contains("none.sock"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn a_stream_over_tls_that_is_cut_off_is_no_end() {
    let ca = Ca::new();
    let dir = files(&ca);
    let event = fake::event(fake::task('1', "one", 1, "queued"));
    let server = Server::tls(
        &ca.signs("localhost", |_| {}),
        None,
        move |asked| match asked.path.starts_with("/v1/events") {
            true => Say::Cut(vec![event.clone()]),
            false => Say::Error(500, "broken"),
        },
    );
    let out = adit(
        dir.path(),
        &[
            "--server",
            &server.url("localhost"),
            "--ca",
            "ca.crt",
            "task",
            "watch",
            "--timeout",
            "2s",
        ],
        &[],
    );
    assert!(!out.status.success());
}
