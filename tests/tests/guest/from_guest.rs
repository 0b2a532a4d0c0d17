//! Streams that the guest opens: all bytes are right in both directions, and either end may half-close. There is only the port
//! process, as for the author of a VMM: no aditd, no agent.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use adit_port::control::{CONTROL_SOCKET, Kept, VHOST_SOCKET};
use adit_port::control_io::{self, Message};
use adit_tests::connect::pattern;
use adit_tests::guest::{Guest, Identity};
use adit_tests::image::{Image, Kernel};
use adit_tests::process::{Reaped, bound, wait_for};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::{AsFd, AsRawFd};

use crate::{BOOT, bins};

/// The host echoes. The guest sends, half-closes and reads the rest.
const ECHO: u32 = 7000;
/// The host sends first and half-closes. The guest answers after that.
const HOST_FIRST: u32 = 7001;
/// Longest silence of a stream.
const SILENCE: Duration = Duration::from_secs(30);
/// Bytes that the host sends on [`HOST_FIRST`].
const SAID: u64 = 1 << 20;

/// Echoes everything; ends when the guest does.
fn echo(stream: &UnixStream) -> std::io::Result<()> {
    std::io::copy(&mut &*stream, &mut &*stream)?;
    stream.shutdown(Shutdown::Write)
}

/// Sends and half-closes first, then counts what comes back.
fn host_first(mut stream: &UnixStream) -> std::io::Result<()> {
    let said: Vec<u8> = (0..SAID).map(pattern).collect();
    stream.write_all(&said)?;
    stream.shutdown(Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    assert!(
        back == said,
        "{} of {} bytes came back",
        back.len(),
        said.len()
    );
    Ok(())
}

fn serve(port: u32, fd: OwnedFd) {
    let stream = UnixStream::from(fd);
    for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
        set(&stream, Some(SILENCE)).unwrap();
    }
    stream.set_nonblocking(false).unwrap();
    match port {
        ECHO => echo(&stream).unwrap(),
        HOST_FIRST => host_first(&stream).unwrap(),
        other => panic!("guest dialled {other}, which is not served"),
    }
}

/// Accepts streams until the port process ends. Sends the port of each stream that ended as it should.
fn accept(control: &OwnedFd, whole: &Sender<u32>) {
    loop {
        let mut fds = [PollFd::new(control.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        match control_io::receive(control) {
            Ok(Some((Message::Incoming(incoming), Some(fd)))) => {
                let whole = whole.clone();
                std::thread::spawn(move || {
                    serve(incoming.port, fd);
                    // An error means that the test is over.
                    let _ = whole.send(incoming.port);
                });
            }
            // A successor would need this. No successor is started here.
            Ok(Some((Message::Handover(handover), _))) => {
                let kept = Message::Kept(Kept { seq: handover.seq });
                control_io::send(control, &kept, None).unwrap();
            }
            Ok(Some(_)) => {}
            Err(e) if e.would_block() => {}
            Ok(None) | Err(_) => return,
        }
    }
}

fn dials_of(kernel: Kernel) {
    let Some(bins) = bins() else { return };
    let image = Image::build(kernel, &|what| println!("{what}")).unwrap();
    let dir = tempfile::Builder::new().prefix("adit-").tempdir().unwrap();
    let place: PathBuf = dir.path().join("vm");
    let port = bound(bins.join("adit-port"))
        .args(["--name", "bare", "--cid", "9", "--dir"])
        .arg(&place)
        .args([
            "--serve-port",
            &ECHO.to_string(),
            "--serve-port",
            &HOST_FIRST.to_string(),
        ])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let _port = Reaped(port);
    let control = wait_for("control socket", SILENCE, || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        let at = UnixAddr::new(&place.join(CONTROL_SOCKET))?;
        Ok(connect(fd.as_raw_fd(), &at).is_ok().then_some(fd))
    })
    .unwrap();
    let (whole, served) = mpsc::channel();
    std::thread::spawn(move || accept(&control, &whole));

    let who = Identity {
        name: "bare",
        vhost_socket: &place.join(VHOST_SOCKET),
        agent: None,
        trust: None,
        script: &format!("adit-testguest dial-echo {ECHO} {HOST_FIRST} > /dev/console 2>&1 &\n"),
        boot_files: false,
    };
    let mut guest = Guest::boot(&image, &who, &dir.path().join("guest")).unwrap();
    guest
        .wait_serial("guest's own dials", BOOT, |log| log.contains("DIALS-OK"))
        .unwrap();
    // Wait for the guest's last stream too: its bytes may still be in flight when the guest prints that it is done.
    while served.recv_timeout(SILENCE).expect("all came back") != HOST_FIRST {}
}

#[test]
fn streams_that_the_guest_dials_carry_every_byte_6_1() {
    dials_of(Kernel::V6_1);
}

#[test]
fn streams_that_the_guest_dials_carry_every_byte_6_12() {
    dials_of(Kernel::V6_12);
}
