//! Control frames on a `SOCK_SEQPACKET` Unix socket: one packet, one frame, and the descriptors that belong to it.
//!
//! Both sides use it: the port process in its epoll loop, `aditd` inside `AsyncFd::try_io`. On a nonblocking socket every
//! function here returns `WouldBlock` when the socket does. Nothing is queued or buffered.
//!
//! Rules:
//! - These are errors: a truncated packet (`MSG_TRUNC`), a frame with bytes after it, an unknown kind without `IGNORABLE`, and
//!   a descriptor with a kind that has none. After an error the connection cannot be used any more. All descriptors of a
//!   refused packet are closed.
//! - Received descriptors are close-on-exec from the start.
use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use adit_passed::{Closer, Passed};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket,
};
use rustix::net::RecvFlags;

use crate::control::PACKET_MAX;

pub use crate::control::message::{ControlError, Message};

/// Makes a nonblocking control socket.
///
/// # Errors
/// There are no descriptors left.
pub fn seqpacket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let sock = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    Ok(sock)
}

/// Connects to a control socket. Never blocks, even if the listening process is stopped.
///
/// # Errors
/// Nothing listens there (`ConnectionRefused`), there is no socket (`NotFound`), or the backlog of the listening process is full
/// (`WouldBlock`).
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let sock = seqpacket()?;
    nix::sys::socket::connect(sock.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(sock)
}

/// Sends one frame with its descriptor, if it has one. The caller's descriptor stays open.
///
/// # Errors
/// As [`send_all`].
pub fn send(
    sock: impl AsFd,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), ControlError> {
    send_all(sock, message, fd.as_slice())
}

/// Sends one frame with its descriptors. The caller's descriptors stay open.
///
/// # Errors
/// The socket fails or is full (`WouldBlock`), the frame is too long, or the kind has another number of descriptors.
pub fn send_all(
    sock: impl AsFd,
    message: &Message,
    fds: &[BorrowedFd<'_>],
) -> Result<(), ControlError> {
    message.check_descriptors(fds.len())?;
    let bytes = message.encode()?;
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = (!raw.is_empty()).then(|| ControlMessage::ScmRights(&raw));
    loop {
        let sent = sendmsg::<UnixAddr>(
            sock.as_fd().as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights.as_slice(),
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            // SOCK_SEQPACKET sends a packet completely or not at all.
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
    }
}

/// Receives the next frame and its first descriptor, if it has one. `None`: the other side closed the connection.
///
/// # Errors
/// As [`receive_all`].
pub fn receive(sock: impl AsFd) -> Result<Option<(Message, Option<OwnedFd>)>, ControlError> {
    let received = receive_all(sock)?;
    Ok(received.map(|(message, fds)| (message, fds.into_iter().next())))
}

/// Receives the next frame and its descriptors from a trusted process. `None`: the other side closed the connection.
///
/// # Errors
/// As [`receive_passed`], but it does not matter how many descriptors wait to be closed: those came from others.
pub fn receive_all(sock: impl AsFd) -> Result<Option<(Message, Vec<OwnedFd>)>, ControlError> {
    let received = receive_any(sock, &Closer::shared())?;
    let trust = |fds: Vec<Passed>| fds.into_iter().filter_map(Passed::trust).collect();
    Ok(received.map(|(message, fds)| (message, trust(fds))))
}

/// Receives the next frame and its descriptors from a process that is not trusted. `closer` closes descriptors that nobody uses.
/// `None`: the other side closed the connection.
///
/// # Errors
/// The socket fails or is empty (`WouldBlock`); no descriptors are left; or the packet is not a control frame, and then the
/// caller must close the connection.
pub fn receive_passed(
    sock: impl AsFd,
    closer: &Closer,
) -> Result<Option<(Message, Vec<Passed>)>, ControlError> {
    if closer.is_full() {
        return Err(ControlError::Overfull);
    }
    receive_any(sock, closer)
}

thread_local! {
    /// Where packets are received. Zeroed pages for each would cost more than all else that a dial takes here.
    static PACKET: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn receive_any(
    sock: impl AsFd,
    closer: &Closer,
) -> Result<Option<(Message, Vec<Passed>)>, ControlError> {
    PACKET.with_borrow_mut(|packet| {
        packet.resize(PACKET_MAX, 0);
        receive_into(packet, sock, closer)
    })
}

fn receive_into(
    packet: &mut [u8],
    sock: impl AsFd,
    closer: &Closer,
) -> Result<Option<(Message, Vec<Passed>)>, ControlError> {
    loop {
        let got = match adit_passed::receive(&sock, packet, RecvFlags::empty(), closer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            received => received?,
        };
        if got.bytes == 0 && got.fds.is_empty() && !got.table_full {
            return Ok(None);
        }
        if got.cut {
            return Err(ControlError::TooLong);
        }
        let Some(message) = Message::decode(&packet[..got.bytes])? else {
            continue;
        };
        if got.table_full {
            let message = Box::new(message);
            return Err(ControlError::NoDescriptors { message });
        }
        message.check_descriptors(got.fds.len())?;
        return Ok(Some((message, got.fds)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_channel::frame::{self, FrameError, IGNORABLE};

    use crate::control::*;
    use adit_channel::hello::{ARGUMENTS_MAX, CALLER_MAX, Extensions, TRACE_MAX};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
    }

    fn raw_send(sock: &OwnedFd, bytes: &[u8], fds: &[i32]) {
        let rights = ControlMessage::ScmRights(fds);
        let rights = if fds.is_empty() {
            &[][..]
        } else {
            std::slice::from_ref(&rights)
        };
        let iov = [IoSlice::new(bytes)];
        sendmsg::<UnixAddr>(sock.as_raw_fd(), &iov, rights, MsgFlags::empty(), None).unwrap();
    }

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    fn connect(prefix: usize, greeting: usize) -> Connect {
        let extensions = Extensions {
            arguments: vec![1; ARGUMENTS_MAX].try_into().unwrap(),
            caller: vec![2; CALLER_MAX].try_into().unwrap(),
            trace: vec![3; TRACE_MAX].try_into().unwrap(),
        };
        Connect {
            id: 1,
            to: Target::VsockPort(22),
            deadline_ms: 5000,
            extensions,
            prefix: vec![7; prefix],
            greeting: vec![8; greeting],
        }
    }

    #[test]
    fn every_kind_crosses_the_socket() {
        let (a, b) = pair();
        let failed = DialFailed {
            id: 4,
            error: crate::control::DialError::Timeout,
            status: 0,
            errno: 0,
            text: "x".into(),
        };
        let status = Status {
            vm: "web-1".parse().unwrap(),
            cid: 3,
            pid: 1,
            session: true,
            epoch: 2,
            streams: 1,
            bytes: (5, 6),
            faults: 0,
            last_fault: String::new(),
        };
        let limit = Limit {
            key: [5; 16],
            bytes_per_s: u64::MAX,
        };
        let dial = |to| {
            Message::Dial(Dial {
                id: 1,
                to,
                deadline_ms: 5,
            })
        };
        for m in [
            dial(Target::VsockPort(22)),
            dial(Target::Service("tcp:80".parse().unwrap())),
            Message::Attach(Attach {
                id: 1,
                prefix: vec![7; PREFIX_MAX],
            }),
            Message::Connect(connect(PREFIX_MAX, GREETING_MAX)),
            Message::Ask(Ask {
                id: 1,
                text: vec![8; GREETING_MAX],
            }),
            Message::ConnectAs(ConnectAs {
                connect: connect(PREFIX_MAX, GREETING_MAX),
                tag: vec![9; TAG_MAX],
            }),
            Message::ConnectNoted(ConnectNoted {
                connect: connect(PREFIX_MAX, GREETING_MAX),
                tag: Some(vec![9; TAG_MAX]),
                note: vec![9; NOTE_MAX],
            }),
            Message::ConnectLimited(ConnectLimited {
                connect: connect(PREFIX_MAX, GREETING_MAX),
                tag: Some(vec![1; TAG_MAX]),
                note: Some(vec![2; NOTE_MAX]),
                limits: vec![limit; LIMITS_MAX],
            }),
            Message::SetLimits(SetLimits {
                tunnels: vec![(u64::MAX, vec![limit; LIMITS_MAX]); LIMITED_MAX],
            }),
            Message::EndsTaken(EndsTaken { seq: u64::MAX }),
            Message::Ends(Ends {
                seq: 1,
                ends: vec![],
                lost: u64::MAX,
            }),
            Message::ListTunnels(ListTunnels { after: u64::MAX }),
            Message::Tunnels(Tunnels {
                after: 1,
                tunnels: vec![(2, vec![3])],
                last: true,
            }),
            Message::EndTunnels(EndTunnels {
                numbers: vec![u64::MAX; TUNNELS_MAX],
            }),
            Message::Features(Features { bits: u64::MAX }),
            Message::Key(Key { key: Some([7; 32]) }),
            Message::Accepted(Accepted {
                port: 741,
                guest_port: u32::MAX,
            }),
            Message::BegunAnew(BegunAnew {
                port: 741,
                guest_port: 742,
            }),
            Message::Cancel(Cancel { id: 3 }),
            Message::Quit(Quit {}),
            Message::Status(status),
            Message::Dialed(Dialed {
                id: 1,
                boot_nonce: [9; 16],
            }),
            Message::DialFailed(failed),
            Message::Incoming(Incoming {
                port: 741,
                peer_port: 5,
            }),
            Message::Kept(Kept { seq: 3 }),
            Message::Release(Release {}),
            Message::Handover(Handover {
                seq: 3,
                record: vec![1; 4096],
                ring: 0,
            }),
            Message::Handover(Handover {
                seq: 4,
                record: vec![1; 4096],
                ring: 6,
            }),
            Message::Stuck(Stuck { reason: "x".into() }),
            Message::Way(Way {
                way: 2,
                why: "a VM has the CID".into(),
            }),
            Message::Held(Held {}),
        ] {
            for n in [*m.descriptors().start(), *m.descriptors().end()] {
                send_all(&a, &m, &vec![a.as_fd(); n]).unwrap();
                let (got, fds) = receive_all(&b).unwrap().unwrap();
                assert_eq!((got, fds.len()), (m.clone(), n));
            }
        }
        assert!(receive(&b).unwrap_err().would_block());
        drop(a);
        assert!(receive(&b).unwrap().is_none());
    }

    #[test]
    fn dial_has_golden_bytes() {
        let to = Target::Service("tcp:80".parse().unwrap());
        let bytes = Message::Dial(Dial {
            id: 7,
            to,
            deadline_ms: 5000,
        })
        .encode()
        .unwrap();
        assert_eq!(
            bytes[..16],
            [11, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            bytes[16..],
            [7, 0, 6, b't', b'c', b'p', b':', b'8', b'0', 0x88, 0x27]
        );
    }

    #[test]
    fn a_dial_with_an_extension_that_is_too_long_is_no_frame() {
        let mut body = b"\x07\x01\x16\x05\0\x81\x02".to_vec();
        body.resize(body.len() + CALLER_MAX + 1, b'c');
        body.extend([0, 0, 0]);
        let mut packet = vec![0; 16];
        packet[..2].copy_from_slice(&(body.len() as u16).to_le_bytes());
        (packet[4], packet[6]) = (7, 1);
        packet.extend(body);
        let refused = Message::decode(&packet);
        assert!(
            matches!(refused, Err(ControlError::Frame(_))),
            "{refused:?}"
        );
    }

    #[test]
    fn a_handover_without_a_ring_is_one_of_version_1() {
        let handover = |ring| {
            let record = vec![1, 2];
            let seq = 7;
            Message::Handover(Handover { seq, record, ring }).encode()
        };
        let head = |version, len| [len, 0, 0, 0, 20, 0, version, 0, 0, 0, 0, 0, 4, 0, 0, 0];
        let without = handover(0).unwrap();
        assert_eq!(without, [&head(1, 4)[..], &[7, 2, 1, 2]].concat());
        let with = handover(6).unwrap();
        assert_eq!(with, [&head(2, 5)[..], &[7, 2, 1, 2, 6]].concat());
    }

    #[test]
    fn unknown_kinds_are_errors_unless_ignorable() {
        let (a, b) = pair();
        raw_send(&a, &frame::encode(99, 1, 0, IGNORABLE, &1u8).unwrap(), &[]);
        send(&a, &Message::Quit(Quit {}), None).unwrap();
        assert_eq!(receive(&b).unwrap().unwrap().0, Message::Quit(Quit {}));
        raw_send(&a, &frame::encode(99, 1, 0, 0, &1u8).unwrap(), &[]);
        assert!(matches!(
            receive(&b),
            Err(ControlError::Frame(FrameError::Unknown { kind: 99, .. }))
        ));
    }

    #[test]
    fn cut_long_and_trailing_packets_are_errors() {
        let (a, b) = pair();
        let good = Message::Cancel(Cancel { id: 300 }).encode().unwrap();
        for cut in 1..good.len() {
            raw_send(&a, &good[..cut], &[]);
            assert!(
                matches!(receive(&b), Err(ControlError::Cut { .. })),
                "{cut}"
            );
        }
        raw_send(&a, &[&good[..], &[0]].concat(), &[]);
        assert!(matches!(
            receive(&b),
            Err(ControlError::Frame(FrameError::Trailing { .. }))
        ));
        raw_send(&a, &vec![0; PACKET_MAX + 1], &[]);
        assert!(matches!(receive(&b), Err(ControlError::TooLong)));
    }

    #[test]
    fn r105_what_others_passed_does_not_keep_a_trusted_process_from_being_heard() {
        let (ours, theirs) = pair();
        let closer = Closer::new(1);
        closer.hold();
        closer.close(std::fs::File::open("/dev/null").unwrap());
        send(&theirs, &Message::Quit(Quit {}), None).unwrap();
        let deaf = receive_passed(&ours, &closer).unwrap_err();
        assert!(matches!(deaf, ControlError::Overfull));
        let heard = receive_any(&ours, &closer).unwrap();
        assert!(matches!(heard, Some((Message::Quit(_), fds)) if fds.is_empty()));
    }

    #[test]
    fn descriptors_that_do_not_belong_are_closed() {
        let (a, b) = pair();
        let raw = a.as_raw_fd();
        let quit = Message::Quit(Quit {}).encode().unwrap();
        let attach = Message::Attach(Attach {
            id: 1,
            prefix: vec![],
        })
        .encode()
        .unwrap();
        let connect = Message::Connect(connect(1, 1)).encode().unwrap();
        for (bytes, fds) in [
            (&quit, &[raw; 1][..]),
            (&attach, &[]),
            (&attach, &[raw; 2]),
            (&attach, &[raw; 200]),
            (&connect, &[]),
            (&connect, &[raw; 2]),
        ] {
            raw_send(&a, bytes, fds);
            assert!(matches!(receive(&b), Err(ControlError::Descriptors { .. })));
        }
        // Other tests of this process open descriptors too, but never hundreds.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while open_fds() >= 150 {
            assert!(std::time::Instant::now() < end, "{} are open", open_fds());
            std::thread::yield_now();
        }
    }
}
