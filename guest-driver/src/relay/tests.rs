//! Relay over socket pairs and TCP: every byte, each half-close, resets, back-pressure.

mod chunks;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use super::*;

fn relayed() -> (UnixStream, UnixStream, JoinHandle<Moved>) {
    let ((host, a), (b, local)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let join =
        thread::spawn(move || relay(&OwnedFd::from(a).into(), &OwnedFd::from(b).into()).unwrap());
    (host, local, join)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn every_byte_arrives_both_ways_at_once_in_odd_splits() {
    let (host, local, join) = relayed();
    let data = pattern(3 * 1024 * 1024 + 17);
    let write = |mut s: UnixStream, data: Vec<u8>, split: usize| {
        thread::spawn(move || {
            data.chunks(split).for_each(|c| s.write_all(c).unwrap());
            s.shutdown(std::net::Shutdown::Write).unwrap();
        })
    };
    let read = |mut s: UnixStream| {
        thread::spawn(move || {
            let mut got = Vec::new();
            s.read_to_end(&mut got).unwrap();
            got
        })
    };
    let writers = [
        write(host.try_clone().unwrap(), data.clone(), 4093),
        write(local.try_clone().unwrap(), data.clone(), 70_001),
    ];
    let readers = [read(host), read(local)];
    writers.into_iter().for_each(|w| w.join().unwrap());
    readers
        .into_iter()
        .for_each(|r| assert!(r.join().unwrap() == data));
    let n = data.len() as u64;
    assert_eq!(
        join.join().unwrap(),
        Moved {
            a_to_b: n,
            b_to_a: n,
            aborted: false
        }
    );
}

#[test]
fn half_close_each_way_leaves_the_other_direction_open() {
    for flip in [false, true] {
        let (host, local, join) = relayed();
        let (mut first, mut second) = if flip { (local, host) } else { (host, local) };
        first.write_all(b"request").unwrap();
        first.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = Vec::new();
        second.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"request");
        let answer = pattern(500_000);
        let send = answer.clone();
        let writer = thread::spawn(move || second.write_all(&send).unwrap());
        let mut got = Vec::new();
        first.read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        assert!(got == answer);
        assert!(!join.join().unwrap().aborted);
    }
}

#[test]
fn bytes_before_a_full_close_are_delivered() {
    let (mut host, mut local, join) = relayed();
    let data = pattern(300_000);
    let send = data.clone();
    let writer = thread::spawn(move || host.write_all(&send).unwrap());
    let mut got = vec![0; data.len()];
    local.read_exact(&mut got).unwrap();
    writer.join().unwrap();
    assert!(got == data);
    assert_eq!(local.read(&mut [0; 1]).unwrap(), 0);
    drop(local);
    join.join().unwrap();
}

/// A host's side as a socket whose closing can be seen, a local server's as TCP.
fn served() -> (UnixStream, TcpStream, JoinHandle<Moved>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let b = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (local, _) = listener.accept().unwrap();
    let (host, a) = UnixStream::pair().unwrap();
    let join =
        thread::spawn(move || relay(&OwnedFd::from(a).into(), &OwnedFd::from(b).into()).unwrap());
    (host, local, join)
}

/// How a side stops, after some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Ends,
    Closes,
    Resets,
}

#[test]
fn r117_the_local_server_sees_whether_the_host_ended_or_broke_off() {
    for stop in [Stop::Ends, Stop::Closes] {
        let (mut host, mut local, join) = served();
        host.write_all(b"half of a body").unwrap();
        let mut got = [0; 14];
        local.read_exact(&mut got).unwrap();
        match stop {
            Stop::Ends => host.shutdown(std::net::Shutdown::Write).unwrap(),
            _ => drop(host.shutdown(std::net::Shutdown::Both)),
        }
        let end = local.read(&mut [0; 1]).map_err(|e| e.kind());
        let expected = match stop {
            Stop::Ends => Ok(0),
            _ => Err(ErrorKind::ConnectionReset),
        };
        assert_eq!(end, expected, "{stop:?}");
        drop(local);
        assert_eq!(join.join().unwrap().aborted, stop != Stop::Ends, "{stop:?}");
    }
}

#[test]
fn r117_the_host_sees_whether_the_local_server_ended_or_broke_off() {
    for stop in [Stop::Ends, Stop::Resets] {
        let (mut host, mut local, join) = served();
        local.write_all(b"413").unwrap();
        let mut got = [0; 3];
        host.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"413");
        match stop {
            Stop::Ends => local.shutdown(std::net::Shutdown::Write).unwrap(),
            _ => Conn::from(OwnedFd::from(local.try_clone().unwrap())).reset_on_close(true),
        }
        let server = (stop == Stop::Ends).then_some(local);
        assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
        // What it sent has arrived either way, and after that: an end leaves the other direction open.
        let host = Conn::from(OwnedFd::from(host));
        assert_eq!(host.is_broken_off(), stop == Stop::Resets, "{stop:?}");
        host.shutdown_write().ok();
        drop(host);
        drop(server);
        assert_eq!(join.join().unwrap().aborted, stop != Stop::Ends, "{stop:?}");
    }
}

#[test]
fn a_stalled_reader_stops_the_writer_and_burns_no_cpu() {
    let (mut host, mut local, join) = relayed();
    host.set_nonblocking(true).unwrap();
    let (chunk, mut sent) = (vec![7u8; 65536], 0usize);
    // Until the whole path is full: two kernel buffers and ours. The reader takes nothing.
    let mut refusals = 0;
    while refusals < 1000 {
        match host.write(&chunk) {
            Ok(n) => (sent, refusals) = (sent + n, 0),
            Err(_) => {
                refusals += 1;
                thread::yield_now();
            }
        }
    }
    assert!(
        sent < 16 * 1024 * 1024,
        "nothing bounds the bytes in flight"
    );
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let mut got = Vec::new();
    local.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), sent);
    drop(local);
    join.join().unwrap();
}
