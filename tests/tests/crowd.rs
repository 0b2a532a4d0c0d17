//! A VM that stands still with a thousand tunnels, and a client with thousands of sockets: others go on. A real aditd, port processes
//! and software guests.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

mod echo;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use adit_tests::host::Host;
use adit_tests::process::wait_for;
use echo::{ECHO, Echo};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const SOON: Duration = Duration::from_secs(30);
/// Of the VM that stands still.
const STALLED: usize = 1_000;
/// Of the client that takes all it can.
const SOCKETS: usize = 4_000;
const OPENED: usize = 200;
const TRIPS: usize = 2_000;
fn connect(host: &Host, vm: &str) -> std::io::Result<TcpStream> {
    let mut client = TcpStream::connect(host.proxy())?;
    client.set_read_timeout(Some(SOON))?;
    client.set_nodelay(true)?;
    write!(
        client,
        "CONNECT vsock-{ECHO}.{vm}:{ECHO} HTTP/1.1\r\nHost: x\r\n\r\n"
    )?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    match head.starts_with(b"HTTP/1.1 200 ") {
        true => Ok(client),
        false => Err(std::io::Error::other(
            String::from_utf8_lossy(&head).into_owned(),
        )),
    }
}

fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// Sockets of another user of this machine, who is another client. Those that are more than its share are refused, and stay open here.
fn sockets(proxy: SocketAddr) -> Vec<TcpStream> {
    let connects = move || {
        if nix::unistd::geteuid().is_root() {
            // Of this thread only; the kernel says of a socket who has made it.
            nix::unistd::setfsuid(nix::unistd::Uid::from_raw(54_321));
        }
        let sockets = (0..SOCKETS).map_while(|_| TcpStream::connect(proxy).ok());
        sockets.collect()
    };
    std::thread::spawn(connects).join().unwrap()
}

/// Tunnels to a VM, and round trips of one of them: all of them, in a client's time. 99th percentiles.
fn served(host: &Host, vm: &str) -> [Duration; 2] {
    let timed = |one: &mut dyn FnMut()| {
        let begin = Instant::now();
        one();
        begin.elapsed()
    };
    let mut opened = || {
        let mut client = connect(host, vm).unwrap();
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    };
    let opened = (0..OPENED).map(|_| timed(&mut opened)).collect();
    let mut client = connect(host, vm).unwrap();
    let mut trip = || {
        client.write_all(&[7; 64]).unwrap();
        client.read_exact(&mut [0; 64]).unwrap();
    };
    let trips = (0..TRIPS).map(|_| timed(&mut trip)).collect();
    [p99(opened), p99(trips)]
}

#[test]
fn r110_beside_a_vm_stalled_with_a_thousand_tunnels_and_a_client_with_4000_sockets_all_others_go_on()
 {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
        return;
    };
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    if hard < 20_000 {
        println!("skipped: a process may have {hard} descriptors here, and this takes 20000");
        return;
    }
    let host = Host::start(&bins, &["a", "b"]).unwrap();
    for vm in ["a", "b"] {
        host.wait_port(vm).unwrap();
    }
    let _well = Echo::boot_as(&host.vhost_socket("a"), 3);
    let stalled = Echo::boot_as(&host.vhost_socket("b"), 4);
    for vm in ["a", "b"] {
        wait_for("the guest", SOON, || Ok(connect(&host, vm).ok())).unwrap();
    }
    let alone = served(&host, "a");
    let mut tunnels: Vec<_> = (0..STALLED)
        .map(|n| connect(&host, "b").unwrap_or_else(|e| panic!("{n}: {e}")))
        .collect();
    stalled.stands_still();
    // What is sent to it waits: in its ring, in the port process, in the client's socket.
    let piece = vec![1; 64 << 10];
    for tunnel in &mut tunnels {
        tunnel.set_nonblocking(true).unwrap();
        while tunnel.write(&piece).is_ok() {}
    }
    let greedy = sockets(host.proxy());
    assert_eq!(greedy.len(), SOCKETS);
    let beside = served(&host, "a");
    println!(
        "p99 of {OPENED} new tunnels and of {TRIPS} round trips: {alone:?} alone, {beside:?} beside {STALLED} stalled tunnels and {SOCKETS} sockets"
    );
    // Nothing of the stalled VM was lost meanwhile: it goes on where it stood.
    drop(greedy);
    stalled.goes_on();
    let mut alive = 0;
    for tunnel in &mut tunnels {
        tunnel.set_nonblocking(false).unwrap();
        let mut back = [0; 4096];
        tunnel.read_exact(&mut back).unwrap();
        assert!(back.iter().all(|b| *b == 1));
        alive += 1;
    }
    assert_eq!(alive, STALLED);
}
