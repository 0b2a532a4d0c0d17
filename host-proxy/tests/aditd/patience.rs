//! How long a client is waited for, and how one that waits is told from one that is gone (R67, R71).

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::host::{Answer, Control, Host};
use crate::proxy::{drained, head};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const GET: &str = "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n";

/// The guest's end of the next stream, with its request read.
fn guest(control: &Control) -> std::os::unix::net::UnixStream {
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    guest
}

fn all(client: &mut impl Read) -> String {
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    String::from_utf8(said).unwrap()
}

#[test]
fn a_client_that_ends_its_sending_gets_its_answer() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for version in ["1.1", "1.0"] {
        let mut client = host.proxy();
        client
            .write_all(GET.replace("1.1", version).as_bytes())
            .unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        guest(&control).write_all(OK).unwrap();
        let said = all(&mut client);
        assert!(said.starts_with(&format!("HTTP/{version} 200 ")), "{said}");
        assert_eq!(Answer::parse(said.as_bytes()).unwrap().body, "ok");
    }
    // A refusal, too, and each of several requests.
    let mut client = host.proxy();
    client
        .write_all(GET.replace("//a", "//nobody").as_bytes())
        .unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert!(all(&mut client).starts_with("HTTP/1.1 404 "));
    let mut client = host.proxy();
    client.write_all(GET.repeat(3).as_bytes()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    for _ in 0..3 {
        guest(&control).write_all(OK).unwrap();
    }
    assert_eq!(all(&mut client).matches("\r\n\r\nok").count(), 3);
}

#[test]
fn a_client_that_ends_its_sending_and_waits_is_asked_and_gets_a_late_answer() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client.write_all(GET.as_bytes()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut guest = guest(&control);
    // It is there, and is not given up.
    assert_eq!(head(&mut client), "HTTP/1.1 100 Continue\r\n\r\n");
    guest.write_all(OK).unwrap();
    assert!(all(&mut client).starts_with("HTTP/1.1 200 "));
}

#[test]
fn r71_a_client_that_leaves_during_its_answer_takes_its_stream_along() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client.write_all(GET.as_bytes()).unwrap();
    let mut guest = guest(&control);
    guest.write_all(b"HTTP/1.1 200 OK\r\n\r\nevent").unwrap();
    head(&mut client);
    let mut event = [0; 5];
    client.read_exact(&mut event[..1]).unwrap();
    drop(client);
    host.until("the guest's stream ends", |_| {
        guest.write_all(b"event").is_err().then_some(())
    });
    drop(guest);
}

/// A guest that says nothing more: TCP finds out, when the client's kernel has forgotten the client.
#[test]
fn r71_a_client_that_leaves_a_silent_answer_takes_its_stream_along() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    // A kernel answers for a socket without a process for a minute. This client's forgets it after a second.
    let program = ["socat", "-", "TCP:ADDR:PORT,linger2=1"];
    let Some(mut client) = spawned(&host, &program) else {
        return;
    };
    let (mut to, mut from) = (client.stdin.take().unwrap(), client.stdout.take().unwrap());
    to.write_all(GET.as_bytes()).unwrap();
    let mut guest = guest(&control);
    guest.write_all(b"HTTP/1.1 200 OK\r\n\r\nevent").unwrap();
    let mut said = Vec::new();
    while !said.ends_with(b"event\r\n") {
        let mut byte = [0];
        from.read_exact(&mut byte).unwrap();
        said.extend(byte);
    }
    client.kill().unwrap();
    client.wait().unwrap();
    guest
        .set_read_timeout(Some(Duration::from_secs(150)))
        .unwrap();
    assert!(drained(&mut guest), "the guest's stream goes on");
}

/// A program that speaks to the proxy; none: it is not there.
fn spawned(host: &Host, program: &[&str]) -> Option<Child> {
    let to = host.proxy().peer_addr().unwrap();
    let args = program[1..].iter().map(|arg| {
        let arg = arg.replace("ADDR", &to.ip().to_string());
        arg.replace("PORT", &to.port().to_string())
    });
    let mut command = Command::new(program[0]);
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
        .spawn()
        .inspect_err(|e| eprintln!("skipped: no {} ({e})", program[0]))
        .ok()
}

#[test]
fn netcats_and_socat_get_their_answer() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for program in [
        &["nc.openbsd", "-N", "ADDR", "PORT"][..],
        &["nc.openbsd", "-q", "5", "ADDR", "PORT"],
        &["ncat", "ADDR", "PORT"],
        &["socat", "-t", "10", "-", "TCP:ADDR:PORT"],
    ] {
        for version in ["1.1", "1.0"] {
            let request = GET.replace("1.1\r\n", &format!("{version}\r\nConnection: close\r\n"));
            let Some(mut child) = spawned(&host, program) else {
                continue;
            };
            // Its input ends with the request.
            let mut input = child.stdin.take().unwrap();
            input.write_all(request.as_bytes()).unwrap();
            drop(input);
            guest(&control).write_all(OK).unwrap();
            let out = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(said.ends_with("\r\n\r\nok"), "{program:?}: {said}");
        }
    }
}

#[test]
fn r67_a_header_that_trickles_is_given_up_and_told() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    let begin = Instant::now();
    let mut client = host.proxy();
    client.write_all(b"GET http://a/ HTTP/1.1\r\nX: ").unwrap();
    let mut trickle = client.try_clone().unwrap();
    let trickling = std::thread::spawn(move || {
        while trickle.write_all(b"y").is_ok() {
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    let said = all(&mut client);
    assert!(said.starts_with("HTTP/1.1 408 "), "{said}");
    assert!(begin.elapsed() >= Duration::from_secs(9));
    client.shutdown(Shutdown::Both).unwrap();
    trickling.join().unwrap();
}

fn keep(host: &Host, from: [u8; 4]) -> TcpStream {
    let mut client = host.tcp("proxy.addr", from);
    client
        .write_all(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    client
}

#[test]
fn a_kept_connection_may_be_idle_for_longer_than_a_header_may_take() {
    let (host, _ports) = Host::serving(&[], "");
    let mut client = keep(&host, [127, 0, 0, 1]);
    client
        .set_read_timeout(Some(Duration::from_secs(12)))
        .unwrap();
    let end = loop {
        match client.read(&mut [0]).map_err(|e| e.kind()) {
            // A read with a time limit is not repeated by the kernel.
            Err(std::io::ErrorKind::Interrupted) => {}
            end => break end,
        }
    };
    assert_eq!(end, Err(std::io::ErrorKind::WouldBlock), "it was closed");
    client
        .write_all(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    // Once it has begun, a header has the time of any other.
    client.write_all(b"OPTIONS").unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    assert!(all(&mut client).starts_with("HTTP/1.1 408 "));
}

#[test]
fn a_kept_connection_that_is_idle_makes_room() {
    let (host, _ports) =
        Host::serving(&[], "[limits]\nconnections = 4\nconnections_per_client = 4");
    let mut kept: Vec<_> = (0..4).map(|_| keep(&host, [127, 0, 0, 1])).collect();
    let _other = keep(&host, [127, 0, 0, 2]);
    assert_eq!(kept[0].read(&mut [0]).unwrap(), 0, "the oldest is closed");
    kept[3]
        .write_all(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    assert!(head(&mut kept[3]).starts_with("HTTP/1.1 200 "));
}

#[test]
fn programs_tunnel_through_the_proxy_as_ssh_has_them() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for program in [
        &["socat", "-", "PROXY:ADDR:A:80,proxyport=PORT"][..],
        &["nc.openbsd", "-X", "connect", "-x", "ADDR:PORT", "a.", "80"],
        &[
            "ncat",
            "--proxy",
            "ADDR:PORT",
            "--proxy-type",
            "http",
            "A.adit",
            "80",
        ],
    ] {
        let Some(mut child) = spawned(&host, program) else {
            continue;
        };
        let (mut guest, ahead) = control.tunnel();
        assert!(ahead.is_empty());
        let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        input.write_all(b"up").unwrap();
        let mut two = [0; 2];
        guest.read_exact(&mut two).unwrap();
        guest.write_all(b"down").unwrap();
        let mut four = [0; 4];
        output.read_exact(&mut four).unwrap();
        assert_eq!((&two, &four), (b"up", b"down"), "{program:?}");
        drop((input, guest));
        child.wait().unwrap();
    }
}

#[test]
fn an_upload_that_waits_for_its_100_is_told_to_go_on_only_if_it_is_carried() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let expecting = |name: &str| {
        format!(
            "POST http://{name}/ HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        )
    };
    let mut client = host.proxy();
    client.write_all(expecting("nobody").as_bytes()).unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 404 "));
    let mut client = host.proxy();
    client.write_all(expecting("a").as_bytes()).unwrap();
    let mut guest = guest(&control);
    assert_eq!(head(&mut client), "HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"body").unwrap();
    let mut body = [0; 4];
    guest.read_exact(&mut body).unwrap();
    guest.write_all(OK).unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
}
