//! Tunnels and their grants: a real aditd, a port process and a software guest.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

mod echo;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_tests::host::Host;
use adit_tests::process::wait_for;
use echo::{ECHO, started};

const SOON: Duration = Duration::from_secs(30);

/// Has aditd read a changed configuration, and waits until it has.
fn reload(host: &Host, change: impl Fn(String) -> String) {
    let path = host.dir().join("aditd.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let changed = change(text.clone());
    assert_ne!(text, changed);
    std::fs::write(&path, changed).unwrap();
    let out = host.adit(&["reload"]).unwrap();
    assert!(out.status.success(), "{out:?}");
}

/// A tunnel that works.
fn tunnel(mut client: impl Read + Write) -> impl Read + Write {
    write!(
        client,
        "CONNECT vsock-{ECHO}.a:{ECHO} HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(
        head.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&head)
    );
    echoes(&mut client);
    client
}

fn echoes(client: &mut (impl Read + Write)) {
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

fn tcp(host: &Host) -> TcpStream {
    let client = TcpStream::connect(host.proxy()).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client
}

/// How a tunnel ends that nobody ended.
fn end(mut client: impl Read) -> Option<ErrorKind> {
    client.read(&mut [0]).map_err(|e| e.kind()).err()
}

#[test]
fn r125_a_tunnel_is_broken_off_when_its_grant_is_taken_away_and_others_go_on() {
    let Some((host, _guest, _)) = started() else {
        return;
    };
    // By another name than the one that is taken away.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let secret = adit_api::token::new().unwrap();
    reload(&host, |text| {
        let token = format!("[[token]]\nname = \"ci\"\nsha256 = \"{}\"\n", secret.1);
        let grant = "[[grant]]\nto = [\"token:ci\"]\nvms = [\"a\"]\nmay = [\"reach\"]\n";
        text + &token + grant
    });
    let with_token = || {
        let mut client = tcp(&host);
        let request = format!(
            "CONNECT vsock-{ECHO}.a:{ECHO} HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Bearer {}\r\n\r\n",
            secret.0
        );
        client.write_all(request.as_bytes()).unwrap();
        let mut head = [0; 12];
        client.read_exact(&mut head).unwrap();
        (head == *b"HTTP/1.1 200").then_some(client)
    };
    let mut kept = wait_for("the token", SOON, || Ok(with_token())).unwrap();
    // The rest of the head.
    let mut last = [0; 4];
    while last != *b"\r\n\r\n" {
        last.rotate_left(1);
        kept.read_exact(&mut last[3..]).unwrap();
    }
    let lost = tunnel(tcp(&host));
    reload(&host, |text| {
        text.replace("to = [\"anyone\"]", "to = [\"user:nobody-at-all\"]")
    });
    assert_eq!(end(lost), Some(ErrorKind::ConnectionReset));
    echoes(&mut kept);
    // Nothing new, either.
    let mut refused = tcp(&host);
    write!(
        refused,
        "CONNECT vsock-{ECHO}.a:{ECHO} HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    .unwrap();
    let mut said = String::new();
    refused.read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 40"), "{said}");
    // A token that is gone, while aditd is not there: its successor finds what it left.
    let mut host = host;
    host.kill();
    let path = host.dir().join("aditd.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("name = \"ci\"", "name = \"other\"")).unwrap();
    echoes(&mut kept);
    host.launch().unwrap();
    assert_eq!(end(kept), Some(ErrorKind::ConnectionReset));
    // A thread of its own writes it.
    wait_for("the audit", SOON, || {
        let audit = std::fs::read_to_string(host.dir().join("state/aditd.audit"))?;
        let is_there = audit.contains("\"grant-gone\"") && audit.contains("token:ci");
        Ok(is_there.then_some(()))
    })
    .unwrap();
}

#[test]
fn r125_a_grant_that_is_taken_away_ends_its_tunnels_within_a_second_and_says_how_long_it_took() {
    let Some((host, _guest, _)) = started() else {
        return;
    };
    let tunnels: Vec<_> = (0..20).map(|_| tunnel(tcp(&host))).collect();
    let others = "to = [\"user:nobody-at-all\"]";
    let path = host.dir().join("aditd.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("to = [\"anyone\"]", others)).unwrap();
    // From when the operator says so.
    let begin = Instant::now();
    let out = host.adit(&["reload"]).unwrap();
    assert!(out.status.success(), "{out:?}");
    let reloaded = begin.elapsed();
    for lost in tunnels {
        assert_eq!(end(lost), Some(ErrorKind::ConnectionReset));
    }
    let ended = begin.elapsed();
    println!("20 tunnels had ended {ended:?} after `adit reload` began, which took {reloaded:?}");
    // A second is what is promised; a machine that is busy with other tests has ten.
    assert!(ended < Duration::from_secs(10), "{ended:?}");
}

#[test]
fn tunnels_outlive_their_grants_where_the_operator_says_so_and_nothing_new_is_opened() {
    let Some((mut host, _guest, _)) = started() else {
        return;
    };
    let path = host.dir().join("aditd.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    host.kill();
    let more = "[limits]\ntunnels_outlive_grants = true\n";
    std::fs::write(&path, text + more).unwrap();
    host.launch().unwrap();
    host.wait_port("a").unwrap();
    let first = wait_for("a tunnel", SOON, || Ok(echo::connect(host.proxy())));
    let mut tunnels = vec![first.unwrap()];
    tunnels.extend((0..20).map(|_| echo::connect(host.proxy()).unwrap()));
    reload(&host, |text| {
        text.replace("to = [\"anyone\"]", "to = [\"user:nobody-at-all\"]")
    });
    assert!(echo::connect(host.proxy()).is_none());
    // For longer than it takes to end one, and with an aditd that has never known the grant.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        tunnels.iter_mut().for_each(echoes);
    }
    host.kill();
    host.launch().unwrap();
    host.wait_port("a").unwrap();
    assert!(echo::connect(host.proxy()).is_none());
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        tunnels.iter_mut().for_each(echoes);
    }
}

#[test]
fn a_tunnel_over_a_unix_socket_ends_with_its_grants_time() {
    let Some((mut host, _guest, _)) = started() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let text = std::fs::read_to_string(host.dir().join("aditd.toml")).unwrap();
    let listen = format!("[[listen]]\naddress = \"unix:{}\"\n", path.display());
    host.kill();
    std::fs::write(host.dir().join("aditd.toml"), text + &listen).unwrap();
    host.launch().unwrap();
    host.wait_port("a").unwrap();
    let client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    let lost = tunnel(client);
    let over = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(2);
    reload(&host, |text| {
        text.replace(
            "to = [\"anyone\"]",
            &format!("to = [\"anyone\"]\nuntil = \"{over}\""),
        )
    });
    // A Unix socket has no reset: it is closed.
    assert_eq!(end(lost), None);
    assert!(jiff::Timestamp::now() >= over);
}

/// The lines of a file of the audit's kind, once one is there that `is`.
fn line(host: &Host, file: &str, is: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let path = host.dir().join("state").join(file);
    wait_for("a line", SOON, || {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        Ok(lines.into_iter().find(|line| is(line)))
    })
    .unwrap()
}

#[test]
fn a_tunnel_has_its_line_with_its_bytes_at_its_end_also_if_another_aditd_runs_by_then() {
    let Some((mut host, _guest, _)) = started() else {
        return;
    };
    host.kill();
    let path = host.dir().join("aditd.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text + "[log]\naccess = \"file\"\n[audit]\nallows = true\n",
    )
    .unwrap();
    host.launch().unwrap();
    host.wait_port("a").unwrap();
    // Both have sent one byte and had it back.
    let first = tunnel(tcp(&host));
    let mut second = tunnel(tcp(&host));
    for _ in 0..9 {
        echoes(&mut second);
    }
    drop(first);
    let of = |bytes: u64| move |line: &serde_json::Value| line["bytes_to_vm"] == bytes;
    let ended = line(&host, "aditd.access", of(1));
    assert_eq!(ended["bytes_from_vm"], 1, "{ended}");
    assert_eq!(ended["method"], "CONNECT");
    assert!(ended["first_byte_ms"].as_f64() >= ended["dial_ms"].as_f64());
    host.kill();
    drop(second);
    host.launch().unwrap();
    let ended = line(&host, "aditd.access", of(10));
    assert_eq!(ended["bytes_from_vm"], 10, "{ended}");
    let allow = line(&host, "aditd.audit", of(10));
    assert_eq!(allow["decision"], "allow");
    assert_eq!(allow["trace_id"], ended["trace_id"]);
}
