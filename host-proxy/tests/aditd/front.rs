//! Clients of the other listeners that do what they should not.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use adit_channel::socket_end::reset_on_close;

use crate::foreign::try_pass;
use crate::host::{HANG, Host, Port};
use crate::kinds;

const GRANT: &str = "[[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\"]\n";

/// A host with a listener that leads to `a`.
fn started(first: &str, address: &str, more: &str) -> (Host, Vec<Port>) {
    let listen = format!("[[listen]]\naddress = \"{address}\"\n{more}\n");
    Host::serving(&[("a", 3), ("b", 4)], &format!("{first}\n{listen}{GRANT}"))
}

fn other(host: &Host) -> String {
    let run = host.state_dir().with_file_name("run");
    std::fs::read_to_string(run.join("listen.addr"))
        .unwrap()
        .trim()
        .to_owned()
}

fn in_dir(dir: &Path) -> (PathBuf, String) {
    let path = dir.join("proxy.sock");
    let address = format!("unix:{}", path.display());
    (path, address)
}

fn connect(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    client
}

/// Waits until aditd's worker has no more descriptors than before.
fn none_left(host: &Host, before: usize) {
    host.until("nothing is left", |host| {
        (kinds::open_in(host.worker()).len() <= before).then_some(())
    });
}

#[test]
fn r119_a_client_that_is_gone_before_its_dial_is_answered_has_it_given_up() {
    let socks5 = b"\x05\x01\x00\x05\x01\x00\x03\x01a\x00\x50";
    for (speak, says) in [
        ("speak = \"any\"\nto = \"a:80\"", &b""[..]),
        ("speak = \"socks5\"", socks5),
    ] {
        let (host, ports) = started("", "127.0.0.1:0", speak);
        let control = ports[0].connected();
        let mut client = TcpStream::connect(other(&host)).unwrap();
        client.write_all(says).unwrap();
        let dial = control.dial();
        reset_on_close(&client, true);
        drop(client);
        assert_eq!(control.cancelled(dial.id), 0, "{speak}");
        // One that has ended its sending is there, and has its tunnel.
        let mut client = TcpStream::connect(other(&host)).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        client.write_all(says).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (mut guest, _) = control.tunnel();
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
        guest.write_all(b"answer").unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        assert!(heard.ends_with(b"answer"), "{heard:?}");
    }
}

#[test]
fn r110_tunnels_of_one_user_over_a_unix_socket_leave_others_theirs_and_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (path, address) = in_dir(dir.path());
    let any = "speak = \"any\"\nto = \"a:80\"";
    let (host, ports) = started("[limits]\nconnections = 30", &address, any);
    let control = ports[0].connected();
    let before = kinds::open_in(host.worker()).len();
    let tunnels: Vec<_> = (0..5)
        .map(|_| {
            let client = connect(&path);
            let (guest, _) = control.tunnel();
            (client, guest)
        })
        .collect();
    // Half of what such clients have together is one user's.
    let mut refused = connect(&path);
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    // A client of the other listener has its place.
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
        .unwrap();
    let (guest, _) = control.tunnel();
    assert_eq!(client.read(&mut [0]).unwrap(), 1);
    drop((client, guest, tunnels, refused));
    none_left(&host, before);
    // Its share is given back once the sockets are closed; until then it is turned away.
    let _client = host.until("it has places again", |_| {
        let mut client = connect(&path);
        client.set_nonblocking(true).unwrap();
        let begin = std::time::Instant::now();
        while begin.elapsed() < std::time::Duration::from_millis(200) {
            if client.read(&mut [0]).is_ok() {
                return None;
            }
            std::thread::yield_now();
        }
        Some(client)
    });
    control.tunnel();
}

#[test]
fn r108_a_client_of_a_unix_socket_that_stays_after_its_refusal_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (path, address) = in_dir(dir.path());
    let (host, _ports) = started("", &address, "");
    // The first denial opens the audit.
    let mut denied = host.proxy();
    denied
        .write_all(b"GET http://x/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    denied.read_to_end(&mut Vec::new()).unwrap();
    drop(denied);
    let audit = host.state_dir().join("aditd.audit");
    host.until("the audit is open", |_| audit.exists().then_some(()));
    let before = kinds::open_in(host.worker()).len();
    let stay: Vec<_> = [true, false]
        .into_iter()
        .map(|half_closes| {
            let mut client = connect(&path);
            client
                .write_all(b"GET http://x/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .unwrap();
            if half_closes {
                client.shutdown(Shutdown::Write).unwrap();
            }
            let mut said = Vec::new();
            client.read_to_end(&mut said).unwrap();
            assert!(said.starts_with(b"HTTP/1.1 404 "));
            client
        })
        .collect();
    none_left(&host, before);
    drop(stay);
}

#[test]
fn r105_descriptors_on_a_unix_socket_delay_nobody_whoever_passes_them() {
    let dir = tempfile::tempdir().unwrap();
    let (path, address) = in_dir(dir.path());
    let any = "speak = \"any\"\nto = \"a:80\"";
    let (host, ports) = started("[limits]\nconnections = 6", &address, any);
    let (control, _other) = (ports[0].connected(), ports[1].connected());
    let mut fars = Vec::new();
    let mut lingering = || {
        let (lingers, far) = kinds::lingering();
        fars.push(far);
        lingers
    };
    let answers = || assert_eq!(host.get("/v1/vms").as_array().unwrap().len(), 2);
    // By its client: to be read, and then the one more that is not let in.
    let client = connect(&path);
    let dial = control.dial();
    for n in 0..2 {
        let fd = lingering();
        let refused = (n == 1).then(|| connect(&path));
        kinds::stopped(host.worker(), || {
            let by = refused.as_ref().unwrap_or(&client);
            if let Err(e) = try_pass(by, b"x", &[fd.as_fd()]) {
                println!("the kernel does not let a client pass anything: {e}");
                std::mem::forget(fd);
            } else {
                drop(fd);
            }
            drop(refused);
        });
        answers();
    }
    // By the port process, which has the other end of its pair.
    let (pair, _) = control.client(dial.id);
    let fd = lingering();
    kinds::stopped(host.worker(), || {
        try_pass(&pair, b"x", &[fd.as_fd()]).unwrap();
        drop((fd, pair));
    });
    answers();
    drop(client);
    answers();
    drop(fars);
}
