//! A stopped VM with a thousand tunnels affects nobody else, and its tunnels continue when it does.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use adit_tests::connect::{connect, pattern};
use adit_tests::guest::{Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{BOOT, bins, echo};

const TUNNELS: u64 = 1000;
/// Most bytes that are written into each tunnel while nobody reads.
const PUSHED_MAX: u64 = 64 << 10;

/// Writes until the tunnel accepts no more, or `most` bytes are written. Returns how many were written.
pub fn push(stream: &mut TcpStream, most: u64) -> u64 {
    stream.set_nonblocking(true).unwrap();
    let mut at = 0;
    while at < most {
        let bytes: Vec<u8> = (at..at + 4096).map(pattern).collect();
        match stream.write(&bytes) {
            Ok(n) => at += n as u64,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    at
}

#[test]
fn a_stopped_vm_with_a_thousand_tunnels_does_not_affect_others() {
    let Some(bins) = bins() else { return };
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let host = Host::start(&bins, &["web-1", "web-2"]).unwrap();
    let mut guests = ["web-1", "web-2"].map(|name| {
        host.wait_port(name).unwrap();
        let who = Identity {
            name,
            vhost_socket: &host.vhost_socket(name),
            agent: None,
            trust: None,
            script: "",
            boot_files: false,
        };
        Guest::boot(&image, &who, &host.dir().join(name)).unwrap()
    });
    for guest in &mut guests {
        guest.wait_ready(BOOT).unwrap();
    }
    // "Ready" does not include the guest's listeners.
    for name in ["web-1", "web-2"] {
        let to = format!("vsock-5000.{name}:5000");
        wait_for("guest's listener", BOOT, || {
            Ok(connect(host.proxy(), &to).ok())
        })
        .unwrap();
    }
    let mut tunnels: Vec<TcpStream> = (0..TUNNELS)
        .map(|n| {
            let dialled = connect(host.proxy(), "vsock-5000.web-1:5000");
            dialled.unwrap_or_else(|e| panic!("tunnel {n}: {e}\n{}", host.log()))
        })
        .collect();
    let qemu = Pid::from_raw(i32::try_from(guests[0].pid()).unwrap());
    kill(qemu, Signal::SIGSTOP).unwrap();
    let pushed: Vec<u64> = tunnels.iter_mut().map(|t| push(t, PUSHED_MAX)).collect();
    for _ in 0..20 {
        echo(&host, "vsock-5000.web-2:5000", 100_000);
    }
    let listed = host.adit(&["vm", "ls"]).unwrap();
    assert!(listed.status.success());
    kill(qemu, Signal::SIGCONT).unwrap();
    for (stream, pushed) in tunnels.iter_mut().zip(pushed) {
        take_back(stream, pushed);
    }
}

/// Reads what was pushed.
pub fn take_back(stream: &mut TcpStream, pushed: u64) {
    let mut back = vec![0; usize::try_from(pushed).unwrap()];
    stream.read_exact(&mut back).unwrap();
    assert!((0..).zip(&back).all(|(i, &b)| b == pattern(i)));
}
