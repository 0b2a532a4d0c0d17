//! `adit connect`, through proxies that are honest and ones that are not.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::channel;

use adit_passed::Closer;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::net::{AddressFamily, RecvFlags, SocketType};

use crate::proxy::{OK, Proxy, end, request, reset};
use crate::text;

#[test]
fn bytes_go_both_ways_and_each_half_ends_by_itself() {
    let proxy = Proxy::start(|mut client, _| {
        // The guest speaks first, and its bytes come with the head.
        client.write_all(&[OK, b"hello "].concat()).unwrap();
        let (got, _) = end(&mut client);
        client.write_all(&got).unwrap();
    });
    let mut child = proxy
        .connect(&["web-1.adit", "25"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let big = vec![b'x'; 3 << 20];
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&big).unwrap();
    drop(stdin);
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(0));
    assert_eq!(out.stdout, [&b"hello "[..], &big].concat());
    let asked = proxy.asked();
    assert!(
        asked.starts_with("CONNECT web-1:25 HTTP/1.1\r\nHost: web-1:25\r\n"),
        "{asked}"
    );
}

#[test]
fn a_service_is_reached_by_its_name_or_uri_without_a_port() {
    for (name, asked) in [
        ("docker.web-1.svc.adit", "docker.web-1.svc:1"),
        ("adit://alpha/web-1/docker", "docker.web-1.alpha.svc:1"),
        ("adit:///web-1/22", "web-1:22"),
    ] {
        let proxy = Proxy::start(|mut client, _| {
            client.write_all(&[OK, b"there"].concat()).unwrap();
        });
        let out = proxy
            .connect(&[name])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(out.stdout, b"there", "{name}: {}", text(&out.stderr));
        let head = proxy.asked();
        assert!(head.starts_with(&format!("CONNECT {asked} ")), "{head}");
    }
    let proxy = Proxy::start(|_, _| {});
    for args in [
        &["web-1"][..],
        &["adit:///web-1/22", "22"],
        &["adit://web-1", "22"],
    ] {
        let out = proxy.connect(args).stdin(Stdio::null()).output().unwrap();
        assert_eq!(
            out.status.code(),
            Some(2),
            "{args:?}: {}",
            text(&out.stderr)
        );
    }
}

#[test]
fn a_guest_that_ends_first_is_seen_at_once_and_may_still_be_sent_to() {
    let (note, got) = channel();
    let note = Mutex::new(note);
    let proxy = Proxy::start(move |mut client, _| {
        client.write_all(&[OK, b"bye"].concat()).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        note.lock().unwrap().send(end(&mut client)).unwrap();
    });
    let mut child = proxy
        .connect(&["web-1", "25"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It is the end of standard output while standard input is open: ssh and others wait for it.
    let mut said = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(said, "bye");
    child.stdin.take().unwrap().write_all(b"late").unwrap();
    assert_eq!(got.recv().unwrap(), (b"late".to_vec(), None));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn r117_a_reset_of_the_guest_is_no_end() {
    let proxy = Proxy::start(|mut client, _| {
        client.write_all(&[OK, b"part"].concat()).unwrap();
        // All that was sent is there, before the reset.
        client.read_exact(&mut [0; 4]).unwrap();
        reset(client);
    });
    let mut child = proxy.connect(&["web-1", "25"]);
    let mut child = child
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut part = [0; 4];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut part)
        .unwrap();
    assert_eq!(&part, b"part");
    // Standard input stays open.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"more").unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    assert!(text(&out.stderr).starts_with("error[broken-off]: "));
}

#[test]
fn r117_an_adit_that_is_killed_is_no_end_for_the_guest() {
    let (note, got) = channel();
    let note = Mutex::new(note);
    let proxy = Proxy::start(move |mut client, _| {
        client.write_all(&[OK, b"x"].concat()).unwrap();
        note.lock().unwrap().send(end(&mut client).1).unwrap();
    });
    let mut child = proxy
        .connect(&["web-1", "25"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        got.recv().unwrap(),
        Some(std::io::ErrorKind::ConnectionReset)
    );
}

#[test]
fn whoever_closes_standard_output_ends_it_with_141() {
    let proxy = Proxy::start(|mut client, _| {
        client.write_all(OK).unwrap();
        while client.write_all(&[0; 1 << 16]).is_ok() {}
    });
    let mut child = proxy
        .connect(&["web-1", "25"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

/// Runs `adit connect --fdpass` with a Unix socket as standard output, as ssh does. Returns the status, and what was passed.
fn fdpass(mut command: Command) -> (i32, Vec<OwnedFd>) {
    let (near, far) = UnixStream::pair().unwrap();
    command
        .arg("--fdpass")
        .stdout(OwnedFd::from(far))
        .stderr(Stdio::inherit());
    let status = command.status().unwrap();
    // The command has its duplicates of the other end.
    drop(command);
    let mut byte = [7; 2];
    let got =
        adit_passed::receive(&near, &mut byte, RecvFlags::empty(), &Closer::shared()).unwrap();
    let fds: Vec<_> = got
        .fds
        .into_iter()
        .filter_map(adit_passed::Passed::trust)
        .collect();
    assert_eq!(
        got.bytes,
        fds.len(),
        "ssh reads one byte with the descriptor"
    );
    (status.code().unwrap(), fds)
}

#[test]
fn with_fdpass_the_socket_is_passed_with_every_byte_of_the_tunnel() {
    // The head is cut at every place, and the guest's first bytes look as a head does.
    const TUNNEL: &[u8] = b"SSH-2.0-x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n";
    let whole: Vec<u8> = [b"HTTP/1.1 100 Continue\r\n\r\n", OK, TUNNEL].concat();
    let answer = whole.clone();
    let proxy = Proxy::start(move |mut client, number| {
        let cut = number.min(answer.len());
        client.write_all(&answer[..cut]).unwrap();
        client.write_all(&answer[cut..]).unwrap();
        let (got, _) = end(&mut client);
        client.write_all(&got).unwrap();
    });
    for cut in (0..whole.len()).step_by(3) {
        let (status, mut fds) = fdpass(proxy.connect(&["web-1", "22"]));
        assert_eq!((status, fds.len()), (0, 1), "{cut}");
        let fd = fds.pop().unwrap();
        // As ssh has its own sockets.
        assert!(!fcntl_getfl(&fd).unwrap().contains(OFlags::NONBLOCK));
        let mut tunnel = std::net::TcpStream::from(fd);
        tunnel.write_all(b"client").unwrap();
        tunnel.shutdown(Shutdown::Write).unwrap();
        assert_eq!(
            end(&mut tunnel),
            ([TUNNEL, b"client"].concat(), None),
            "{cut}"
        );
    }
}

#[test]
fn with_fdpass_a_head_that_comes_byte_by_byte_costs_no_byte_of_the_tunnel() {
    let proxy = Proxy::start(|mut client, _| {
        for byte in [OK, b"banner"].concat() {
            client.write_all(&[byte]).unwrap();
        }
    });
    let (status, fds) = fdpass(proxy.connect(&["web-1", "22"]));
    assert_eq!((status, fds.len()), (0, 1));
    let mut tunnel = std::net::TcpStream::from(fds.into_iter().next().unwrap());
    assert_eq!(end(&mut tunnel).0, b"banner");
}

#[test]
fn with_fdpass_a_refusal_passes_nothing() {
    let proxy = Proxy::saying("HTTP/1.1 403 x\r\nContent-Length: 3\r\n\r\nno\n");
    let (status, fds) = fdpass(proxy.connect(&["web-1", "22"]));
    assert_eq!((status, fds.len()), (1, 0));
}

#[test]
fn fdpass_without_a_socket_to_pass_it_over_asks_nobody() {
    let proxy = Proxy::saying(OK);
    let out = proxy.run(&["web-1", "22", "--fdpass"]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
    assert!(!proxy.was_asked());
}

#[test]
fn a_refusal_is_one_line_with_the_proxys_words_and_a_status() {
    let plain = "Content-Type: text/plain; charset=utf-8\r\n";
    for (status, code, exit) in [
        (403, "not-allowed", 1),
        (404, "unknown-vm", 4),
        (407, "not-allowed", 1),
        (500, "http", 1),
        (502, "refused", 1),
        (503, "unavailable", 1),
        (504, "no-answer", 1),
        (302, "http", 1),
    ] {
        let proxy = Proxy::saying(format!(
            "HTTP/1.1 {status} Some Thing\r\n{plain}Content-Length: 21\r\n\r\nport 23 \x1b[2J is not it\n"
        ));
        let out = proxy.run(&["web-1", "23"]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(exit), "{said}");
        assert!(said.starts_with(&format!("error[{code}]: ")), "{said}");
        assert!(
            said.contains("port 23 \\u{1b}[2J") && said.contains("web-1:23"),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(out.stdout.is_empty());
    }
    // What to do is a line of its own.
    let proxy = Proxy::saying("HTTP/1.1 403 x\r\n\r\nit is not allowed\nadd it to `allow`\n");
    let said = text(&proxy.run(&["web-1", "23"]).stderr);
    assert!(
        said.contains("it is not allowed\n  help: add it to `allow`\n"),
        "{said}"
    );
    // A page for a browser is not shown; what the proxy says for programs is.
    let proxy = Proxy::saying(
        "HTTP/1.1 403 x\r\nContent-Type: text/html\r\nProxy-Status: p; details=\"why not\"\r\n\r\n<html>no</html>",
    );
    let said = text(&proxy.run(&["web-1", "23"]).stderr);
    assert!(said.contains("why not") && !said.contains('<'), "{said}");
}

#[test]
fn what_a_hostile_proxy_says_ends_in_a_word_and_a_status() {
    let endless = |bytes: &'static [u8]| {
        Proxy::start(move |mut client, _| {
            let _ = client.write_all(b"HTTP/1.1 200 OK\r\n");
            while client.write_all(bytes).is_ok() {}
        })
    };
    let interim =
        Proxy::start(
            |mut client, _| {
                while client.write_all(b"HTTP/1.1 102 Processing\r\n\r\n").is_ok() {}
            },
        );
    for proxy in [
        endless(b"a: b\r\n"),
        endless(b"aaaaaaaaaaaaaaaa"),
        endless(&[0; 64]),
        interim,
        Proxy::saying("SSH-2.0-OpenSSH_9.2\r\n"),
        Proxy::saying("HTTP/1.1 200 OK\n\n"),
        Proxy::saying("HTTP/1.1 200 OK\nx: y\r\n\r\n"),
        Proxy::saying("HTTP/2 200 OK\r\n\r\n"),
        Proxy::saying("HTTP/1.1 101 Switching\r\n\r\n"),
        Proxy::saying(vec![0xff; 100]),
    ] {
        let out = proxy.run(&["web-1", "23"]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.starts_with("error[bad-answer]: "), "{said}");
        assert!(said.len() < 1000 && out.stdout.is_empty(), "{said}");
    }
    // A text without an end, and one that never comes.
    let text_without_end = Proxy::start(|mut client, _| {
        let _ = client.write_all(b"HTTP/1.1 403 x\r\n\r\n");
        while client.write_all(b"no, no, no, ").is_ok() {}
    });
    let silent = Proxy::start(|mut client, _| {
        let _ = client.write_all(b"HTTP/1.1 403 x\r\n\r\n");
        end(&mut client);
    });
    for proxy in [text_without_end, silent] {
        let out = proxy.run(&["web-1", "23"]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(
            said.starts_with("error[not-allowed]: ") && said.len() < 1000,
            "{said}"
        );
    }
}

#[test]
fn a_proxy_that_says_nothing_or_is_not_there_is_told_apart() {
    let mute = Proxy::start(|mut client, _| drop(end(&mut client)));
    let half = Proxy::start(|mut client, _| {
        let _ = client.write_all(b"HTTP/1.1 200 OK\r\n");
        end(&mut client);
    });
    for proxy in [mute, half] {
        let out = proxy.run(&["web-1", "23", "--timeout", "100ms"]);
        assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
    }
    for cut in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 100 Continue\r\n\r\n"] {
        let out = Proxy::saying(cut).run(&["web-1", "23"]);
        assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
        assert!(text(&out.stderr).starts_with("error[cut-off]: "));
    }
    let dir = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}", dir.path().join("none").display());
    // A port that is bound, so that no other test gets it, and on which nobody listens.
    let held = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&held, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let held = std::net::TcpListener::from(held);
    let gone = held.local_addr().unwrap();
    for proxy in [unix, format!("http://{gone}")] {
        let out = crate::adit(dir.path(), &["connect", "web-1", "22", "--proxy", &proxy]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{said}");
        assert!(said.contains(&proxy) && said.contains("help:"), "{said}");
    }
}

#[test]
fn what_names_no_vm_and_no_port_is_asked_of_nobody() {
    let proxy = Proxy::saying(OK);
    for (args, exit) in [
        (["Web-1", "22"], 4),
        (["web-1..adit", "22"], 4),
        (["a\r\nX: y", "22"], 4),
        (["web-1", "0"], 2),
        (["web-1", "+22"], 2),
        (["web-1", "022"], 2),
        (["web-1", "70000"], 2),
    ] {
        let out = proxy.run(&args);
        assert_eq!(
            out.status.code(),
            Some(exit),
            "{args:?}: {}",
            text(&out.stderr)
        );
    }
    assert!(!proxy.was_asked());
}

#[test]
fn the_environment_names_the_proxy_and_the_option_comes_first() {
    let (named, other) = (Proxy::saying(OK), Proxy::saying(OK));
    let adit = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
        command
            .args(["connect", "web-1", "22"])
            .env("ADIT_PROXY", &named.url)
            .stdin(Stdio::null());
        command
    };
    assert!(adit().status().unwrap().success());
    assert!(named.was_asked());
    assert!(
        adit()
            .args(["--proxy", &other.url])
            .status()
            .unwrap()
            .success()
    );
    assert!(other.was_asked() && !named.was_asked());
    let out = adit()
        .env("ADIT_PROXY", "https://me:secret@x:1")
        .output()
        .unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    assert!(
        said.contains("ADIT_PROXY") && !said.contains("secret"),
        "{said}"
    );
}

#[test]
fn a_unix_socket_is_a_proxy_too_and_its_close_is_told_from_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let proxy = format!("unix:{}", path.display());
    let spawn = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
        command.args(["connect", "web-1", "22", "--proxy", &proxy]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let (mut client, _) = listener.accept().unwrap();
        assert!(request(&mut client).starts_with("CONNECT web-1:22 "));
        client.write_all(&[OK, b"bytes"].concat()).unwrap();
        (child, client)
    };
    let (mut child, client) = spawn();
    client.shutdown(Shutdown::Write).unwrap();
    let mut said = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    drop(child.stdin.take());
    assert_eq!(
        (child.wait().unwrap().code(), said),
        (Some(0), b"bytes".to_vec())
    );

    let (mut child, client) = spawn();
    let stdin = child.stdin.take();
    drop(client);
    let out = child.wait_with_output().unwrap();
    assert_eq!(
        (out.status.code(), out.stdout),
        (Some(1), b"bytes".to_vec())
    );
    drop(stdin);
}

#[test]
fn a_unix_socket_with_a_full_queue_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // The kernel takes one client more than that.
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let proxy = format!("unix:{}", path.display());
    let args = [
        "connect",
        "web-1",
        "22",
        "--proxy",
        &proxy,
        "--timeout",
        "300ms",
    ];
    let out = crate::adit(dir.path(), &args);
    assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
}

#[test]
fn a_token_is_shown_to_the_proxy_from_the_environment_or_a_file() {
    let refuses = "HTTP/1.1 407 x\r\nContent-Length: 9\r\n\r\nno token\n";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "adit_file\n").unwrap();
    let file = file.to_str().unwrap();
    for (args, environment, shown) in [
        (&["web-1", "22"][..], "", None),
        (&["web-1", "22"], "adit_env", Some("adit_env")),
        (
            &["web-1", "22", "--token-file", file],
            "adit_env",
            Some("adit_file"),
        ),
    ] {
        let proxy = Proxy::saying(refuses);
        let out = proxy
            .connect(args)
            .env("ADIT_TOKEN", environment)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1));
        let asked = proxy.asked();
        let field = shown.map(|token| format!("\r\nProxy-Authorization: Bearer {token}\r\n\r\n"));
        match field {
            Some(field) => assert!(asked.ends_with(&field), "{asked}"),
            None => assert!(!asked.contains("Authorization"), "{asked}"),
        }
    }
}
