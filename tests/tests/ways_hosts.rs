//! `adit proxy` on a client machine: two real aditds, a software guest, and the certificate by which the client is known.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

mod echo;
mod own;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use adit_tests::host::Host;
use adit_tests::process::{Reaped, wait_for};
use echo::{ECHO, Echo};
use own::{Own, listen, own};

const SOON: Duration = Duration::from_secs(30);
const ANYONE: &str = "to = [\"anyone\"]";

/// Changes a host's configuration, and starts it by that.
fn restarted(host: &mut Host, change: impl FnOnce(String) -> String) {
    let path = host.dir().join("aditd.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, change(text)).unwrap();
    host.kill();
    host.launch().unwrap();
}

/// Addresses of `[[listen]]`s.
fn addresses(host: &Host) -> Vec<String> {
    let text = fs::read_to_string(host.dir().join("run/listen.addr")).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn head(client: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap().to_lowercase()
}

fn echoes(mut client: TcpStream) {
    client.write_all(b"there and back").unwrap();
    let mut back = [0; 14];
    client.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"there and back");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut back).unwrap(), 0);
}

#[test]
fn a_proxy_on_a_client_machine_asks_one_host_and_reaches_the_vm_of_another_one() {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let certificates = ["alpha", "beta", "me"].map(|name| own(dir.path(), name));
    let [of_alpha, of_beta, me] = &certificates;
    let to_me = format!("to = [\"cert:{}\"]", me.pin);
    let mut beta = Host::start(&bins, &["a"]).unwrap();
    let sections = format!("[names]\nhost = \"beta\"\n{}", listen(of_beta, ""));
    restarted(&mut beta, |text| {
        text.replace("[proxy]", &format!("{sections}[proxy]"))
            .replace(ANYONE, &to_me)
    });
    beta.wait_port("a").unwrap();
    let _guest = Echo::boot(&beta.vhost_socket("a"));
    let mut alpha = Host::start(&bins, &["z"]).unwrap();
    let sections = format!(
        "[names]\nhost = \"alpha\"\n[peers]\ncert = \"{}\"\nkey = \"{}\"\n[[host]]\nname = \"beta\"\naddress = \"{}\"\npin = \"{}\"\n{}{}",
        of_alpha.cert.display(),
        of_alpha.key.display(),
        addresses(&beta)[0],
        of_beta.pin,
        listen(of_alpha, "role = \"management\"\n"),
        listen(of_alpha, ""),
    );
    restarted(&mut alpha, |text| {
        text.replace("[proxy]", &format!("{sections}[proxy]"))
            .replace(ANYONE, &to_me)
    });
    // beta answers whoever it knows.
    let knows = format!(
        "[[host]]\nname = \"alpha\"\naddress = \"{}\"\npin = \"{}\"\n[[grant]]\n",
        addresses(&alpha)[1],
        of_alpha.pin
    );
    let path = beta.dir().join("aditd.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("[[grant]]\n", &knows, 1)).unwrap();
    let out = beta.adit(&["reload"]).unwrap();
    assert!(out.status.success(), "{out:?}");

    let server = format!("https://{}", addresses(&alpha)[0]);
    let proxy = |cert: &Own| {
        let mut command = Command::new(bins.join("adit"));
        command
            .args(["--server", &server, "--pin", &of_alpha.pin, "--cert"])
            .arg(&cert.cert)
            .arg("--key")
            .arg(&cert.key)
            .args(["proxy", "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    };
    let mut child = Reaped(proxy(me).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let at = lines.next().unwrap().unwrap();
    let at = at.strip_prefix("listening on ").unwrap();
    let at = at.split_once(' ').unwrap().0.to_owned();
    assert!(at.starts_with("127.0.0.1:"), "{at}");
    let mut said = BufReader::new(child.0.stderr.take().unwrap()).lines();
    let whom = said.next().unwrap().unwrap();
    assert!(whom.contains("acts with this certificate"), "{whom}");
    let connect = || {
        let client = TcpStream::connect(&at).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client
    };
    // The guest may boot still.
    let opened = wait_for("the guest", SOON, || {
        let mut client = connect();
        write!(
            client,
            "CONNECT vsock-{ECHO}.a:1 HTTP/1.1\r\nHost: a\r\n\r\n"
        )
        .unwrap();
        let head = head(&mut client);
        Ok(head.starts_with("http/1.1 200").then_some((client, head)))
    });
    let (client, head_of_it) = opened.unwrap();
    assert!(head_of_it.contains("proxy-status"), "{head_of_it}");
    echoes(client);
    for name in [
        format!("vsock-{ECHO}.a.beta"),
        format!("vsock-{ECHO}.A.adit"),
    ] {
        let mut client = connect();
        write!(client, "CONNECT {name}:1 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert!(head(&mut client).starts_with("http/1.1 200"), "{name}");
        echoes(client);
    }
    // SOCKS5.
    let name = format!("vsock-{ECHO}.a");
    let mut socks = connect();
    socks
        .write_all(&[5, 1, 0, 5, 1, 0, 3, name.len() as u8])
        .unwrap();
    socks.write_all(name.as_bytes()).unwrap();
    socks.write_all(&[0, 1]).unwrap();
    let mut said = [0; 12];
    socks.read_exact(&mut said).unwrap();
    assert_eq!((said[0], said[1], said[3]), (5, 0, 0));
    echoes(socks);
    // What is refused, here and there.
    for (request, status, cause) in [
        (
            "CONNECT nobody:1 HTTP/1.1\r\nHost: x\r\n\r\n",
            "404",
            "no host that the server knows",
        ),
        (
            "GET http://nobody/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            "404",
            "no host that the server knows",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            "400",
            "forward proxy",
        ),
        (
            "GET https://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            "400",
            "absolute-form",
        ),
        ("CONNECT a:0 HTTP/1.1\r\nHost: a\r\n\r\n", "400", "no port"),
        ("CONNECT a:23 HTTP/1.1\r\nHost: a\r\n\r\n", "403", "`allow`"),
        (
            "GET http://a:23/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            "403",
            "`allow`",
        ),
    ] {
        let mut client = connect();
        client.write_all(request.as_bytes()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert!(
            said.starts_with(&format!("HTTP/1.1 {status}")),
            "{request}: {said}"
        );
        assert!(said.to_lowercase().contains("proxy-status: "), "{said}");
        assert!(said.contains(cause), "{request}: {said}");
    }
    // Whoever the server does not know gets no proxy.
    let stranger = own(dir.path(), "stranger");
    let out = proxy(&stranger).output().unwrap();
    assert!(!out.status.success());
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("help: "), "{said}");
}
