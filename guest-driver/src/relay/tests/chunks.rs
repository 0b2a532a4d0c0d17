//! The same relay where the host's side is in chunks.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use adit_channel::chunk::{Reader, Stop, Writer};

use super::super::{Moved, relay_chunks};
use crate::conn::Conn;

const END: [u8; 4] = [2, 0, 0, 0];

fn chunk(payload: &[u8]) -> Vec<u8> {
    let [a, b, c, _] = (payload.len() as u32).to_le_bytes();
    [&[1, a, b, c], payload].concat()
}

/// The host's end, and a local server's.
fn relayed() -> (UnixStream, TcpStream, JoinHandle<Moved>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let b = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (local, _) = listener.accept().unwrap();
    let (host, a) = UnixStream::pair().unwrap();
    let join = thread::spawn(move || {
        let (a, b) = (OwnedFd::from(a).into(), OwnedFd::from(b).into());
        relay_chunks(&a, &b, Reader::default(), Writer::default()).unwrap()
    });
    (host, local, join)
}

/// Everything that comes in chunks until the stream is closed; and how it stopped.
fn unwrapped(mut from: &UnixStream) -> (Vec<u8>, Option<Stop>) {
    let (mut reader, mut all) = (Reader::default(), Vec::new());
    let mut bytes = vec![0; 70_001];
    loop {
        let n = from.read(&mut bytes).unwrap_or(0);
        if n == 0 {
            return (all, reader.stopped());
        }
        let (payload, outcome) = reader.unwrap(&mut bytes[..n]);
        assert_eq!(outcome, Ok(()));
        all.extend(&bytes[..payload]);
    }
}

#[test]
fn r117_each_end_is_a_chunk_and_leaves_the_other_direction_open() {
    let data: Vec<u8> = (0..700_001).map(|i| (i * 31 % 251) as u8).collect();
    // The host's end first.
    let (mut host, mut local, join) = relayed();
    host.write_all(&[chunk(b"request"), END.to_vec()].concat())
        .unwrap();
    let mut got = Vec::new();
    local.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"request");
    let answer = data.clone();
    let writer = thread::spawn(move || local.write_all(&answer).unwrap());
    assert!(unwrapped(&host) == (data.clone(), Some(Stop::End)));
    writer.join().unwrap();
    assert!(!join.join().unwrap().aborted);
    // The local server's end first.
    let (mut host, mut local, join) = relayed();
    local.write_all(b"banner").unwrap();
    local.shutdown(std::net::Shutdown::Write).unwrap();
    let mut got = vec![0; 14];
    host.read_exact(&mut got).unwrap();
    assert_eq!(got, [chunk(b"banner"), END.to_vec()].concat());
    let sent = data.clone();
    let mut to = host.try_clone().unwrap();
    let writer = thread::spawn(move || {
        for piece in sent.chunks(65_536) {
            to.write_all(&chunk(piece)).unwrap();
        }
        to.write_all(&END).unwrap();
    });
    let mut got = Vec::new();
    local.read_to_end(&mut got).unwrap();
    assert!(got == data);
    writer.join().unwrap();
    assert!(!join.join().unwrap().aborted);
}

#[test]
fn r117_what_stops_without_an_end_resets_the_local_server() {
    let cases: [&[u8]; 7] = [
        &[],
        &[1, 9, 0, 0, b'x'],
        &[1, 0],
        &[3, 0, 0, 0],
        &[0; 4],
        b"GET / HTTP/1.1\r\n",
        &[1, 1, 0, 2],
    ];
    for last in cases {
        let (mut host, mut local, join) = relayed();
        host.write_all(&[&chunk(b"half"), last].concat()).unwrap();
        let mut got = [0; 4];
        local.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"half");
        drop(host);
        let mut rest = Vec::new();
        let end = local.read_to_end(&mut rest).map_err(|e| e.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "{last:?}");
        assert!(join.join().unwrap().aborted);
    }
}

#[test]
fn r117_a_local_server_that_resets_is_an_abort_for_the_host() {
    let (host, mut local, join) = relayed();
    local.write_all(b"413").unwrap();
    let mut got = [0; 7];
    (&host).read_exact(&mut got).unwrap();
    assert_eq!(got[..], chunk(b"413"));
    Conn::from(OwnedFd::from(local)).reset_on_close(true);
    assert_eq!(unwrapped(&host), (vec![], Some(Stop::Abort)));
    assert!(join.join().unwrap().aborted);
}
