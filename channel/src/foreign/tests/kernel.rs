//! What the host's kernel carries: streams that are open when they come, guests' ports that are known, and VMs that are not there.

use super::*;
use crate::socket_end;

/// The guest has accepted a dial. Returns its end.
fn accepts(world: &mut World, port: u32) -> UnixStream {
    let ticket = world.ticket(port);
    let (ours, guest) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    guest.set_nonblocking(true).unwrap();
    let socket = ours.into();
    world.news(DoorNews::Opened { ticket, socket });
    guest
}

fn dials(world: &mut World, guest_port: u32) -> UnixStream {
    let (ours, guest) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    guest.set_nonblocking(true).unwrap();
    let (port, socket) = (741, ours.into());
    world.news(DoorNews::OfferedBy {
        port,
        guest_port,
        socket,
    });
    guest
}

/// The streams that the guest has dialled, with its ports.
fn incoming(world: &World) -> Vec<(StreamId, u32)> {
    let heard = world.heard.iter().filter_map(|n| match n {
        Notice::Incoming {
            stream, peer_port, ..
        } => Some((*stream, *peer_port)),
        _ => None,
    });
    heard.collect()
}

#[test]
fn a_stream_that_comes_open_has_no_line_and_keeps_half_closes() {
    let mut world = World::new();
    let stream = world.ask(22, None);
    let mut guest = accepts(&mut world, 22);
    let mut app = world.dialed(stream);
    // Nothing was said ahead of it, and the guest may speak first.
    guest.write_all(b"OK 1\n").unwrap();
    assert_eq!(world.read(&mut app, 5), b"OK 1\n");
    app.write_all(b"question").unwrap();
    app.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.read(&mut guest, 8), b"question");
    world.end(&mut guest);
    guest.write_all(b"answer").unwrap();
    drop(guest);
    assert_eq!(world.read(&mut app, 6), b"answer");
    world.end(&mut app);
    world.gone();
}

#[test]
fn a_dial_to_a_vm_that_is_gone_has_no_session_and_the_next_vm_is_met() {
    let mut world = World::new();
    let streams = [world.ask(22, None), world.ask(23, None)];
    let tickets = [world.ticket(22), world.ticket(23)];
    world.news(DoorNews::State(Err("no VM has CID 42".into())));
    world.news(DoorNews::Gone { ticket: tickets[0] });
    for stream in streams {
        assert_eq!(world.failed(stream), DialError::NoSession);
    }
    world.until(|w| w.shard.port(HERE).epoch().is_none());
    let said = world.carrier().obstacle();
    assert_eq!(said.as_deref(), Some("no VM has CID 42"));
    // A late answer finds nobody.
    world.news(DoorNews::Gone { ticket: tickets[1] });
    world.news(DoorNews::State(Ok(())));
    world.until(|w| w.shard.port(HERE).epoch() == Some(2));
    let stream = world.ask(22, None);
    let _guest = accepts(&mut world, 22);
    world.dialed(stream);
}

#[test]
fn what_is_open_outlives_the_word_that_its_vm_is_gone() {
    let mut world = World::new();
    let stream = world.ask(22, None);
    let mut guest = accepts(&mut world, 22);
    let mut app = world.dialed(stream);
    let late = world.ask(23, None);
    let ticket = world.ticket(23);
    world.news(DoorNews::State(Err("no VM has CID 42".into())));
    world.news(DoorNews::Gone { ticket });
    assert_eq!(world.failed(late), DialError::Refused);
    // Only its socket knows whether it has ended.
    guest.write_all(b"still").unwrap();
    assert_eq!(world.read(&mut app, 5), b"still");
    drop(guest);
    world.end(&mut app);
    drop(app);
    world.gone();
    world.until(|w| w.shard.port(HERE).epoch().is_none());
}

#[test]
fn r118_the_guests_own_port_is_told_and_a_second_stream_of_a_pair_is_refused() {
    let mut world = World::new();
    let mut ends = Vec::new();
    for (nth, port) in [742, 1023, u32::MAX, GUEST_PORTS].into_iter().enumerate() {
        ends.push(dials(&mut world, port));
        world.until(|w| incoming(w).len() == nth + 1);
        assert_eq!(incoming(&world)[nth].1, port);
    }
    let mut again = dials(&mut world, 742);
    world.end(&mut again);
    assert_eq!(incoming(&world).len(), 4);
    // The port is free when the stream has ended.
    let (stream, _) = incoming(&world)[0];
    let now = world.shard.now();
    world.shard.port_mut(HERE).refuse(now, stream);
    world.end(&mut ends[0]);
    let _third = dials(&mut world, 742);
    world.until(|w| incoming(w).len() == 5);
    assert_eq!(incoming(&world)[4].1, 742);
}

#[test]
fn r128_streams_of_a_guest_that_has_begun_anew_end_and_those_that_came_after_go_on() {
    let mut world = World::new();
    let stream = world.ask(22, None);
    let mut old_guest = accepts(&mut world, 22);
    let mut old_app = world.dialed(stream);
    let mut old_own = dials(&mut world, 742);
    let waiting = world.ask(24, None);
    world.ticket(24);
    let _own = dials(&mut world, 743);
    world.until(|w| incoming(w).len() == 2);
    let stream = world.ask(23, None);
    let mut guest = accepts(&mut world, 23);
    let mut app = world.dialed(stream);
    // One that nobody knows changes nothing.
    for guest_port in [744, 743] {
        let port = 741;
        world.news(DoorNews::BegunAnew { port, guest_port });
    }
    world.end(&mut old_app);
    world.end(&mut old_guest);
    world.end(&mut old_own);
    assert_eq!(world.failed(waiting), DialError::Refused);
    guest.write_all(b"new").unwrap();
    assert_eq!(world.read(&mut app, 3), b"new");
    assert_eq!(world.shard.port(HERE).streams(), 2);
}

/// Where half-closes are passed on, an agent finishes by one and closes later: a close without one is a break (R117). It is told apart also
/// when the bytes before it are still there.
#[test]
fn r117_a_stream_that_the_guest_breaks_off_is_told_apart_from_one_that_ended() {
    for breaks_off in [true, false] {
        for late in [true, false] {
            let mut world = World::new();
            let (stream, mut vmm) = world.dial_agent();
            vmm.write_all(&chunks::accept(0)).unwrap();
            let mut app = world.attached(stream);
            vmm.write_all(b"half of it").unwrap();
            if !breaks_off {
                vmm.shutdown(Shutdown::Write).unwrap();
                if !late {
                    // As a program of the host would, which has read to the end.
                    assert_eq!(world.rest(&mut app), (b"half of it".to_vec(), false));
                    app.shutdown(Shutdown::Write).unwrap();
                    world.end(&mut vmm);
                }
            } else if !late {
                assert_eq!(world.read(&mut app, 10), b"half of it");
            }
            if breaks_off || !late {
                drop(vmm);
            }
            let (bytes, reset) = world.rest(&mut app);
            assert!(late == (bytes == b"half of it"), "{bytes:?}");
            // A Unix socket of an application shows no reset: its end takes no bytes any more, which cannot be seen behind an end of
            // its own.
            assert!(!reset);
            if breaks_off || late {
                assert_eq!(socket_end::is_closed(&app), breaks_off, "late: {late}");
            }
            drop(app);
            world.gone();
            assert_eq!(world.reason().unwrap().is_some(), breaks_off);
        }
    }
}

/// A program that is no agent just closes when it is done.
#[test]
fn a_plain_port_that_closes_has_ended() {
    let mut world = World::new();
    let (mut app, mut vmm) = world.open();
    vmm.write_all(b"all of it").unwrap();
    drop(vmm);
    assert_eq!(world.rest(&mut app), (b"all of it".to_vec(), false));
    drop(app);
    world.gone();
    assert_eq!(world.reason(), Some(None));
}
