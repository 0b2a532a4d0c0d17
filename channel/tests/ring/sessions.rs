//! Sessions end and begin: a side is killed, started again, or poisoned. Each time a new epoch begins within a second.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use adit_channel::ring::{RingBells, RingCarrier, spec};
use adit_engine::ResetReason;
use adit_ringbuf::RingMem;
use adit_ringbuf::region::Features;
use adit_ringbuf_io::attach::{Offer, Socket};

use crate::world::{BYTES, End, LONG, Region, SOON, echo, epoch, serve};

const PORT: u32 = 741;
const SOCKET: &str = "ADIT_RING_SOCKET";
const SIDE: &str = "ADIT_RING_SIDE";

/// Not a test itself, but the process that the tests below kill. It gets the region over an attach socket, takes one
/// side of it and echoes.
#[test]
fn child() {
    let (Some(path), Some(side)) = (std::env::var_os(SOCKET), std::env::var_os(SIDE)) else {
        return;
    };
    let socket = Socket::connect(path.as_ref()).expect("our parent");
    let offered = socket.offered().expect("an offer");
    let (_socket, mem, bells) = offered.accept(epoch()).expect("our parent");
    let carrier = if side == "host" {
        let spec = spec(mem.len()).expect("room");
        RingCarrier::host(mem, spec, epoch(), RingBells::of_host(bells))
    } else {
        RingCarrier::guest(
            mem,
            epoch() << 16,
            Features::NONE,
            RingBells::of_guest(bells),
        )
    };
    let end = End::spawn(carrier.expect("a region"));
    serve(end.listen(PORT), echo);
    std::thread::sleep(3 * LONG);
}

/// Starts a process at the other end of the region.
fn peer(region: &Region, side: &str) -> Child {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("attach");
    let listener = adit_ringbuf_io::attach::Listener::bind(&path).expect("a socket");
    let child = Command::new(std::env::current_exe().expect("this test"))
        .args(["sessions::child", "--exact", "--nocapture"])
        .env(SOCKET, &path)
        .env(SIDE, side)
        .stdout(Stdio::null())
        .spawn()
        .expect("a process");
    let socket = listener.accept().expect("our child");
    let offer = Offer {
        vm: "web-1".into(),
        bytes: BYTES as u64,
        lanes: 2,
    };
    let taken = socket.offer(&offer, 1, region.fd.as_fd(), &region.bells);
    taken.expect("it takes it");
    child
}

fn kill(mut child: Child) {
    child.kill().expect("our child");
    child.wait().expect("our child");
}

fn echoed(end: &End) {
    let mut stream = end.dial(PORT);
    stream.write_all(b"still there?").expect("room");
    let mut buf = [0; 12];
    stream.read_exact(&mut buf).expect("an answer");
    assert_eq!(&buf, b"still there?");
}

/// Checks the error of a stream of the last session, once there is a new session.
fn ended(mut stream: adit_channel::stream::Stream, reason: ResetReason) {
    stream.set_deadline(Some(Instant::now() + LONG));
    let error = stream.read(&mut [0; 8]).expect_err("its session is over");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(stream.reason(), Some(reason));
}

#[test]
fn a_killed_guest_attaches_again_and_old_streams_end() {
    let region = Region::new();
    let host = End::spawn(region.host());
    let first = peer(&region, "guest");
    echoed(&host);
    let old = host.dial(PORT);
    kill(first);
    let second = peer(&region, "guest");
    let begin = Instant::now();
    ended(old, ResetReason::Epoch);
    echoed(&host);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    kill(second);
}

#[test]
fn a_killed_host_offers_again_and_old_streams_end() {
    let region = Region::new();
    let first = peer(&region, "host");
    let guest = End::spawn(region.guest());
    echoed(&guest);
    let old = guest.dial(PORT);
    kill(first);
    let second = peer(&region, "host");
    let begin = Instant::now();
    ended(old, ResetReason::Epoch);
    echoed(&guest);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    kill(second);
}

#[test]
fn a_side_that_ends_closes_the_session() {
    let region = Region::new();
    let host = End::spawn(region.host());
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    let old = host.dial(PORT);
    drop(guest);
    ended(old, ResetReason::Epoch);
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    echoed(&host);
}
