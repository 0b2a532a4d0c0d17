//! R105: every kind of descriptor is recognised, and no caller ever blocks in a close.

#[path = "../../host-proxy/port/tests/kinds/mod.rs"]
mod kinds;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use adit_passed::{Closer, PENDING_MAX, Passed};
use kinds::Foreign;
use nix::sys::eventfd::EventFd;
use rustix::fs::{MemfdFlags, memfd_create};

#[track_caller]
fn closes_all(closer: &Closer) {
    let end = Instant::now() + Duration::from_secs(30);
    while closer.pending() > 0 {
        assert!(Instant::now() < end, "{} wait", closer.pending());
        std::thread::yield_now();
    }
}

#[test]
fn r105_only_an_eventfd_is_a_doorbell_and_only_a_memfd_is_memory() {
    let closer = Closer::default();
    let (all, far) = kinds::all();
    for Foreign { name, fd } in all {
        let again = || Passed::new(fd.try_clone().unwrap(), &closer);
        assert!(again().eventfd().is_err(), "{name}");
        assert!(again().memory().is_err(), "{name}");
        assert!(again().unix_stream().is_err(), "{name}");
        assert_eq!(again().regular_file().is_ok(), name == "a file", "{name}");
    }
    drop(far);
    let event = EventFd::from_value(7).unwrap();
    let passed = Passed::from(event.as_fd().try_clone_to_owned().unwrap());
    let eventfd = passed.eventfd().unwrap();
    // The check added nothing to the counter.
    assert_eq!(event.read().unwrap(), 7);
    drop(eventfd);
    let memory = memfd_create("r105", MemfdFlags::ALLOW_SEALING).unwrap();
    assert!(Passed::from(memory.try_clone().unwrap()).eventfd().is_err());
    assert!(Passed::from(memory).memory().is_ok());
    let (stream, _other) = UnixStream::pair().unwrap();
    assert!(Passed::from(OwnedFd::from(stream)).unix_stream().is_ok());
    let datagrams = UnixDatagram::unbound().unwrap();
    assert!(
        Passed::from(OwnedFd::from(datagrams))
            .unix_stream()
            .is_err()
    );
    closes_all(&closer);
}

#[test]
fn r105_a_blocked_close_fills_only_its_own_closer() {
    let (stuck, other) = (Closer::default(), Closer::default());
    let (lingers, far) = kinds::lingering();
    drop(Passed::new(lingers, &stuck));
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    for n in 1..PENDING_MAX {
        assert!(!stuck.is_full(), "{n}");
        drop(Passed::new(null(), &stuck));
    }
    assert!(stuck.is_full() && stuck.stays_full());
    drop(Passed::new(null(), &other));
    closes_all(&other);
    assert_eq!(stuck.pending(), PENDING_MAX);
    drop(far);
    closes_all(&stuck);
    assert!(!stuck.stays_full());
}

#[test]
fn a_held_closer_closes_nothing_until_it_is_prepared() {
    let closer = Closer::default();
    closer.hold();
    drop(Passed::new(
        std::fs::File::open("/dev/null").unwrap().into(),
        &closer,
    ));
    assert_eq!(closer.pending(), 1);
    closer.prepare();
    closes_all(&closer);
}
