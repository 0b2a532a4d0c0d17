//! Streams of guests that are scripted, and a port process of which only the control socket is there. No AF_VSOCK is opened.

use std::os::unix::net::UnixStream;
use std::path::Path;

use adit_passed::Closer;
use adit_port::control::{FEATURE_ACCEPTED, Features};
use adit_port::control_io::{Message, receive, send};
use nix::sys::socket::socketpair;

use super::*;
use crate::config::{CarrierConfig, VmConfig};
use crate::link::Link;
use crate::vm::Origin;
use crate::whose::Peer;

fn arrived(cid: u32, port: u32) -> (Arrived, UnixStream) {
    let (socket, far) = UnixStream::pair().unwrap();
    let socket = socket.into();
    (Arrived { cid, port, socket }, far)
}

/// `web-1` of the kernel with CID 42, and `web-2` with a device.
fn registry() -> Registry {
    let vms = Registry::new(Path::new("/run/adit"));
    let mut config = VmConfig::new("web-1".parse().unwrap(), 42);
    config.carrier = CarrierConfig::of_kernel(42);
    vms.add(config, Origin::File).unwrap();
    let config = VmConfig::new("web-2".parse().unwrap(), 43);
    vms.add(config, Origin::File).unwrap();
    vms
}

/// What becomes of a stream.
fn taken(vms: &Registry, rates: &mut Buckets, cid: u32) -> Result<(), Refused> {
    let (arrived, far) = arrived(cid, 742);
    let passed = pass(vms, rates, 0, arrived);
    if passed.is_err() {
        // It is closed, and the guest sees that.
        assert_eq!(std::io::Read::read(&mut (&far), &mut [0]).unwrap(), 0);
    }
    passed
}

/// Serves a VM by a port process that says what it is able to. Returns its end of the control socket.
async fn served(vms: &Registry, name: &str, bits: u64) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let vm = vms.get(&name.parse().unwrap()).unwrap();
    let (link, driver) = Link::new(&Closer::default());
    let features = Message::Features(Features { bits });
    send(&theirs, &features, None).unwrap();
    tokio::spawn(driver.run(ours, |_| ()));
    // It is read before the first answer is sent.
    let _ = tokio::time::timeout(Duration::from_millis(1), link.tunnels(0)).await;
    vm.channel.begin(link, Peer::new(1, true));
    theirs
}

/// The next stream that a port process gets.
async fn got(socket: &OwnedFd) -> (Accepted, OwnedFd) {
    loop {
        match receive(socket) {
            Ok(Some((Message::Accepted(accepted), Some(fd)))) => return (accepted, fd),
            Ok(Some(_)) => {}
            Ok(None) => panic!("it is closed"),
            Err(e) if e.would_block() => tokio::task::yield_now().await,
            Err(e) => panic!("{e}"),
        }
    }
}

#[tokio::test]
async fn a_guests_stream_arrives_at_its_own_port_process_with_its_port() {
    let (vms, mut rates) = (registry(), Buckets::default());
    let port = served(&vms, "web-1", FEATURE_ACCEPTED).await;
    let (stream, far) = arrived(42, 1023);
    let mut stream = Some(stream);
    // The features may not have been read yet.
    while let Some(next) = stream.take() {
        if pass(&vms, &mut rates, 0, next).is_err() {
            tokio::task::yield_now().await;
            rates = Buckets::default();
            stream = Some(Arrived {
                cid: 42,
                port: 1023,
                socket: far.try_clone().unwrap().into(),
            });
        }
    }
    let (accepted, _fd) = got(&port).await;
    let want = Accepted {
        port: 741,
        guest_port: 1023,
    };
    assert_eq!(accepted, want);
}

#[tokio::test]
async fn r128_who_has_no_vm_of_the_kernel_or_no_port_process_for_it_is_closed() {
    let (vms, mut rates) = (registry(), Buckets::default());
    // Users of this host dial as 1 or 2.
    for cid in [0, 1, 2, 3, 41, u32::MAX] {
        assert_eq!(taken(&vms, &mut rates, cid), Err(Refused::Unknown(cid)));
    }
    let other = Refused::Carrier("web-2".parse().unwrap(), 43);
    assert_eq!(taken(&vms, &mut rates, 43), Err(other));
    let nobody = Refused::PortProcess("web-1".parse().unwrap());
    assert_eq!(taken(&vms, &mut rates, 42), Err(nobody.clone()));
    // One of an older build.
    let _old = served(&vms, "web-1", 31).await;
    assert_eq!(taken(&vms, &mut rates, 42), Err(nobody));
}

#[test]
fn a_vm_that_dials_without_end_is_cut_off_and_keeps_nobody_out() {
    let (vms, mut rates) = (registry(), Buckets::default());
    let mut config = VmConfig::new("web-3".parse().unwrap(), 44);
    config.carrier = CarrierConfig::of_kernel(44);
    vms.add(config, Origin::File).unwrap();
    let rate = Refused::Rate("web-1".parse().unwrap());
    let cut = (0..1000).filter(|_| taken(&vms, &mut rates, 42).as_ref() == Err(&rate));
    assert_eq!(cut.count(), 1000 - STREAMS_A_SECOND as usize);
    let other = Refused::PortProcess("web-3".parse().unwrap());
    assert_eq!(taken(&vms, &mut rates, 44), Err(other));
}

#[test]
fn why_there_is_no_listener_says_what_to_do() {
    let said = |e: Errno| NoListener::from(e).to_string();
    assert!(said(Errno::EAFNOSUPPORT).contains("modprobe vhost_vsock"));
    assert!(said(Errno::EADDRINUSE).contains("adit-guest"));
    assert!(said(Errno::EACCES).contains("root"));
    assert!(said(Errno::ENOMEM).contains("741"));
}
