//! The client's side of the ways to a VM, `adit connect` and `adit forward`: a real aditd, a port process and a software guest.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

mod echo;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use adit_tests::connect::pattern;
use adit_tests::host::Host;
use adit_tests::process::Reaped;
use echo::{ECHO, started, started_with};
use nix::sys::signal::Signal;

fn adit(bins: &Path, host: &Host, args: &[&str]) -> Child {
    Command::new(bins.join("adit"))
        .args(args)
        .env("ADIT_PROXY", format!("http://{}", host.proxy()))
        .current_dir(host.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Sends much, ends its half, and reads what comes back.
fn comes_back(mut client: impl Read + Write, end: impl FnOnce()) {
    let sent: Vec<u8> = (0..100_000).map(pattern).collect();
    client.write_all(&sent).unwrap();
    end();
    let mut back = Vec::new();
    client.read_to_end(&mut back).unwrap();
    assert!(sent == back, "{} bytes came back", back.len());
}

#[test]
fn connect_carries_bytes_to_a_guest_and_back_and_says_why_it_cannot() {
    let Some((host, _guest, bins)) = started() else {
        return;
    };
    let (vm, port) = (format!("vsock-{ECHO}.a.adit"), ECHO.to_string());
    let mut child = adit(&bins, &host, &["connect", &vm, &port]);
    let sent: Vec<u8> = (0..100_000).map(pattern).collect();
    let mut stdin = child.stdin.take().unwrap();
    let all = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&all).unwrap());
    let out = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(out.status.success() && out.stdout == sent, "{out:?}");
    // aditd's own words.
    for (args, exit, why) in [
        (["connect", "nobody", "22"], 4, "nobody"),
        (["connect", "a", "23"], 1, "`allow`"),
    ] {
        let out = adit(&bins, &host, &args).wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(exit), "{said}");
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_vm_with_a_rate_of_bytes_has_no_more_whichever_way_its_clients_come() {
    const PER_S: usize = 200_000;
    let Some((host, _guest, bins)) = started_with(&format!("bytes_per_s = {PER_S}")) else {
        return;
    };
    let begin = Instant::now();
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let args = ["connect", &format!("vsock-{ECHO}.a"), &ECHO.to_string()];
            let mut child = adit(&bins, &host, &args);
            let mut stdin = child.stdin.take().unwrap();
            let sent: Vec<u8> = (0..3 * PER_S as u64 / 2).map(pattern).collect();
            let all = sent.clone();
            let writer = std::thread::spawn(move || stdin.write_all(&all).unwrap());
            (child, sent, writer)
        })
        .collect();
    for (child, sent, writer) in clients {
        let out = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(out.status.success() && out.stdout == sent);
    }
    // Both together have three seconds' bytes, of which the first second's were saved.
    assert!(begin.elapsed() >= Duration::from_millis(1900));
}

#[test]
fn a_forward_leads_many_connections_to_a_guest() {
    let Some((host, _guest, bins)) = started() else {
        return;
    };
    let vm = format!("vsock-{ECHO}.a");
    let forwards = [format!("0:{ECHO}"), format!("unix:a.sock:{ECHO}")];
    let child = adit(&bins, &host, &["forward", &vm, &forwards[0], &forwards[1]]);
    let mut forward = Reaped(child);
    let mut lines = BufReader::new(forward.0.stdout.take().unwrap()).lines();
    let at = lines.next().unwrap().unwrap();
    let at = at.strip_prefix("listening on ").unwrap();
    let at = at.split_once(' ').unwrap().0.to_owned();
    lines.next().unwrap().unwrap();
    let unix = host.dir().join("a.sock");
    let clients = (0..20).map(|n| {
        let (at, unix) = (at.clone(), unix.clone());
        std::thread::spawn(move || match n % 2 {
            0 => {
                let client = TcpStream::connect(at).unwrap();
                let other = client.try_clone().unwrap();
                comes_back(client, || other.shutdown(Shutdown::Write).unwrap());
            }
            _ => {
                let client = std::os::unix::net::UnixStream::connect(unix).unwrap();
                let other = client.try_clone().unwrap();
                comes_back(client, || other.shutdown(Shutdown::Write).unwrap());
            }
        })
    });
    let clients: Vec<_> = clients.collect();
    for client in clients {
        client.join().unwrap();
    }
    // A port process that is killed takes its tunnels along, and no client takes that for an end.
    let mut client = TcpStream::connect(&at).unwrap();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let out = host.adit(&["vm", "show", "a", "-o", "json"]).unwrap();
    let vm: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let pid = vm["port_pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.unwrap()), Signal::SIGKILL).unwrap();
    let end = client.read(&mut [0]).map_err(|e| e.kind());
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
}
