//! A VMM whose packets are written by hand, and the server that it talks to.
#![allow(dead_code)] // each test file uses only a part

use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use adit_ringbuf_io::attach::{AttachError, Offer, Offered, Socket};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub fn offer(bytes: usize) -> Offer {
    Offer {
        vm: "web-1".into(),
        bytes: bytes as u64,
        lanes: 2,
    }
}

/// Runs a server against the VMM code in `vmm`. Returns the server's result and the VMM's.
pub fn run_server_against<T: Send>(
    vmm: impl FnOnce(Socket) -> T + Send,
) -> (Result<Offered, AttachError>, T) {
    let (near, far) = Socket::pair().unwrap();
    near.answer_within(Duration::from_secs(10)).unwrap();
    far.answer_within(Duration::from_secs(10)).unwrap();
    std::thread::scope(|scope| {
        let vmm = scope.spawn(|| vmm(near));
        let offered = far.offered();
        (offered, vmm.join().unwrap())
    })
}

/// A packet by hand.
pub fn packet(what: u16, body: &impl serde::Serialize, fds: u16) -> Vec<u8> {
    let mut packet = vec![0; 32];
    packet[..8].copy_from_slice(b"ADITATT1");
    packet[8] = 1;
    packet[10..12].copy_from_slice(&what.to_le_bytes());
    packet[12..14].copy_from_slice(&fds.to_le_bytes());
    packet.extend(postcard::to_allocvec(body).unwrap());
    packet
}

pub fn send(socket: &Socket, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
}

/// Receives the next packet and returns its type.
pub fn next_packet_type(socket: &Socket) -> Option<u16> {
    let mut buf = [0; 4096];
    let (n, _) = rustix::net::recv(socket, &mut buf[..], rustix::net::RecvFlags::empty()).ok()?;
    (n >= 32).then(|| u16::from_le_bytes([buf[10], buf[11]]))
}

/// Says hello, sends the bytes, and returns the type of the answer.
pub fn hello_and_send(socket: &Socket, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Option<u16> {
    send(socket, &packet(1, &"by hand", 0), &[]);
    assert_eq!(next_packet_type(socket), Some(1));
    send(socket, bytes, fds);
    next_packet_type(socket)
}
