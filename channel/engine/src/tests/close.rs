//! How streams end: in order, by deadline, with the session.

use super::*;
use crate::{ConnectError, How, SHUTDOWN_RCV, SHUTDOWN_SEND};

fn closed(stream: StreamId) -> Event {
    Event::Closed {
        stream,
        reason: None,
    }
}

#[test]
fn r49_peer_ends_its_sending_and_gets_a_mebibyte_back() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    assert_eq!(r.shut(9, SHUTDOWN_SEND), Disposition::Consume);
    assert_eq!(
        r.events(),
        [Event::PeerShutdown {
            stream: s,
            how: How::Send
        }]
    );
    let mut sent = 0;
    while sent < 1 << 20 {
        r.e.offer(s, (1 << 20) - sent);
        sent += r.sent().iter().map(|h| h.len).sum::<u32>();
        r.credit(9, 256 << 10, sent);
    }
    r.events();
    r.e.shutdown(r.now, s, How::Send);
    // First the end of our sending alone; without it the peer would see a broken stream. Then both sides have ended,
    // and the SHUTDOWN with both flags asks for the RST.
    let last: Vec<_> = r.sent().iter().map(|h| (h.op, h.flags)).collect();
    assert_eq!(
        last,
        [
            (Op::Shutdown as u16, SHUTDOWN_SEND),
            (Op::Shutdown as u16, 3)
        ]
    );
    assert_eq!(r.op(Op::Rst, 9), Disposition::Consume);
    assert_eq!(r.events(), [closed(s)]);
    r.empty();
}

#[test]
fn r49_we_end_our_sending_and_get_a_mebibyte_back() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    r.e.shutdown(r.now, s, How::Send);
    let h = r.sent();
    assert_eq!((h.len(), h[0].flags), (1, SHUTDOWN_SEND));
    assert_eq!(
        r.e.poll_timeout(),
        None,
        "a half-closed stream may stay open forever"
    );
    for _ in 0..1024 {
        assert_eq!(
            r.data(9, 1024),
            Disposition::Deliver {
                stream: s,
                len: 1024
            }
        );
        r.e.consumed(r.now, s, 1024);
        r.sent();
    }
    r.shut(9, SHUTDOWN_SEND);
    assert_eq!(r.sent()[0].flags, 3, "both have ended");
    r.op(Op::Rst, 9);
    assert_eq!(
        r.events(),
        [
            Event::PeerShutdown {
                stream: s,
                how: How::Send
            },
            closed(s)
        ]
    );
    assert!(r.sent().is_empty());
    r.empty();
}

/// A process that ends in order sends SHUTDOWN before it closes. A process that dies closes both directions at once
/// (R117).
#[test]
fn r117_closing_both_directions_at_once_is_not_an_orderly_end() {
    for (before, hung_up) in [
        (0, true),
        (SHUTDOWN_RCV, true),
        (SHUTDOWN_SEND, false),
        (3, false),
    ] {
        for we_ended in [false, true] {
            let mut r = Rig::new(EngineConfig::default());
            let s = r.open(9);
            let _ = r.data(9, 100);
            if we_ended {
                r.e.shutdown(r.now, s, How::Send);
                r.sent();
            }
            match before {
                0 => {}
                3 => {
                    r.shut(9, SHUTDOWN_RCV);
                    r.shut(9, SHUTDOWN_SEND);
                }
                flags => drop(r.shut(9, flags)),
            }
            r.shut(9, 3);
            let seen = r.events();
            let told = seen.contains(&Event::HungUp { stream: s });
            assert_eq!(told, hung_up, "{before} {we_ended}: {seen:?}");
            // Its bytes are still delivered, and then its end is reported.
            r.sent();
            r.e.consumed(r.now, s, 100);
            let reason = hung_up.then_some(ResetReason::HungUp);
            assert_eq!(r.events(), [Event::Closed { stream: s, reason }]);
            r.empty();
        }
    }
}

/// On the ring carrier the previous version of the engine ends with both flags when our side has ended already. That
/// is an end in order. If our side has not ended, it is not.
#[test]
fn r117_over_a_ring_both_flags_after_our_end_are_an_orderly_end() {
    for (we_ended, expected) in [(true, None), (false, Some(ResetReason::HungUp))] {
        let mut r = Rig::new(EngineConfig {
            tells_reason: true,
            ..EngineConfig::default()
        });
        let s = r.open(9);
        if we_ended {
            r.e.shutdown(r.now, s, How::Send);
            r.sent();
        }
        r.shut(9, 3);
        let closed = r.events().pop();
        let reason = expected;
        assert_eq!(closed, Some(Event::Closed { stream: s, reason }));
    }
}

/// The same from our side: the `shutdown` calls decide what the peer sees.
#[test]
fn r117_the_end_of_sending_is_sent_alone_only_if_the_caller_asked_for_it() {
    for (asked, told) in [
        (&[How::Both][..], &[3][..]),
        (&[How::Send], &[SHUTDOWN_SEND]),
        (&[How::Receive], &[SHUTDOWN_RCV]),
        (&[How::Send, How::Receive], &[SHUTDOWN_SEND, 3]),
        (&[How::Receive, How::Send], &[SHUTDOWN_SEND, 3]),
    ] {
        let mut r = Rig::new(EngineConfig::default());
        let s = r.open(9);
        for how in asked {
            r.e.shutdown(r.now, s, *how);
        }
        let flags: Vec<_> = r.sent().iter().map(|h| h.flags).collect();
        assert_eq!(flags, told, "{asked:?}");
    }
}

/// A driver that stays the same still has streams that this engine no longer knows. Each gets a reset. Another driver
/// gets none.
#[test]
fn r117_a_continued_driver_gets_a_reset_for_every_lost_stream() {
    let ends = |by_stop, next: SessionChange| {
        let mut r = Rig::new(EngineConfig::default());
        let [s, reset, answered, again] = [1, 2, 3, 6].map(|port| r.open(port));
        let _ = r.data(3, 10);
        r.shut(3, 3);
        assert_eq!(r.ops(), [(Op::Rst, 3)], "the sink of stream 3 still drains");
        r.e.reset(r.now, reset, ResetReason::Local);
        let unsent = r.e.connect(r.now, 4, Kind::Stream, Lane::Bulk).unwrap();
        r.op(Op::Rw, 5);
        if by_stop {
            r.e.handle_session(r.now, SessionChange::Lost(ResetReason::Epoch));
            assert!(r.sent().is_empty());
        }
        r.e.handle_session(r.now, next);
        let gone = r.events();
        for stream in [s, reset, answered, unsent, again] {
            let closed = |e: &&Event| matches!(e, Event::Closed { stream: s, .. } if *s == stream);
            assert_eq!(gone.iter().filter(closed).count(), 1);
        }
        let mut told = r.ops();
        r.empty();
        told.sort_by_key(|&(_, port)| port);
        told
    };
    for by_stop in [false, true] {
        let lives = ends(by_stop, SessionChange::Continued { epoch: 2 });
        assert_eq!(lives, [1, 2, 5, 6].map(|port| (Op::Rst, port)));
        assert_eq!(ends(by_stop, SessionChange::Attached { epoch: 2 }), []);
        assert_eq!(ends(by_stop, SessionChange::Restored { epoch: 2 }), []);
    }
}

#[test]
fn r57_send_then_close_loses_nothing_to_a_slow_sink() {
    for by_rst in [false, true] {
        let mut r = Rig::new(EngineConfig::default());
        let s = r.open(9);
        assert_eq!(
            r.data(9, 5000),
            Disposition::Deliver {
                stream: s,
                len: 5000
            }
        );
        r.shut(9, SHUTDOWN_SEND);
        if !by_rst {
            r.shut(9, 3);
        }
        if by_rst {
            r.e.shutdown(r.now, s, How::Send);
            r.sent();
            r.op(Op::Rst, 9);
        }
        assert_eq!(r.events().len(), 1, "the shutdown, not the end");
        let ops = r.ops();
        assert_eq!(ops.len(), usize::from(!by_rst), "answered at once: {ops:?}");
        // The peer may use the pair again while the sink drains.
        let new = r.open(9);
        r.e.consumed(r.now, s, 4999);
        assert!(r.events().is_empty());
        r.e.consumed(r.now, s, u32::MAX);
        assert_eq!(r.events(), [closed(s)]);
        assert_eq!(r.e.ports(new), Some((SERVICE, 9)));
    }
}

#[test]
fn r57_reset_after_half_close_drains_first_and_keeps_its_reason() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    let _ = r.data(9, 100);
    r.shut(9, SHUTDOWN_SEND);
    r.op(Op::Rst, 9);
    assert_eq!(r.events().len(), 1);
    r.e.consumed(r.now, s, 100);
    assert_eq!(
        r.events(),
        [Event::Closed {
            stream: s,
            reason: Some(ResetReason::Peer)
        }]
    );
    r.empty();
}

#[test]
fn r57_shutdown_waits_until_all_offered_bytes_are_sent() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    r.credit(9, 100, 0);
    r.e.offer(s, u32::MAX);
    r.e.shutdown(r.now, s, How::Send);
    assert_eq!(r.ops(), [(Op::Rw, 9)]);
    r.credit(9, 100, 100);
    let t = r.e.poll_transmit(r.now, 4096).unwrap();
    assert_eq!(t.body, Some((s, 100)));
    // The sink turns out to be empty.
    r.e.offer(s, 0);
    assert_eq!(r.ops(), [(Op::Shutdown, 9)]);
    r.e.offer(s, 50);
    assert!(r.sent().is_empty(), "nothing after the end");
}

#[test]
fn shut_down_stream_is_reset_at_its_deadline() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    r.e.shutdown(r.now, s, How::Both);
    assert_eq!(r.sent()[0].flags, 3);
    assert_eq!(
        r.data(9, 100),
        Disposition::Consume,
        "dropped, and its credit is returned"
    );
    r.wait();
    assert_eq!(r.now.0, 8_000 * MS);
    r.ended(s, 9, ResetReason::Timeout);
    // The same if the peer has ended its sending: the stream ends in order, and only the RST is missing.
    let s = r.open(9);
    r.shut(9, SHUTDOWN_SEND);
    r.e.shutdown(r.now, s, How::Send);
    r.sent();
    r.events();
    r.wait();
    assert_eq!(r.events(), [closed(s)]);
    assert_eq!(r.ops(), [(Op::Rst, 9)]);
    r.empty();
}

#[test]
fn shutdown_flags_of_the_peer_add_up() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    r.e.offer(s, 10);
    r.shut(9, SHUTDOWN_RCV);
    assert_eq!(
        r.events(),
        [Event::PeerShutdown {
            stream: s,
            how: How::Receive
        }]
    );
    r.e.offer(s, 10);
    assert!(r.sent().is_empty(), "the peer wants no more bytes");
    assert_eq!(r.data(9, 10), Disposition::Deliver { stream: s, len: 10 });
    r.e.consumed(r.now, s, 10);
    r.shut(9, SHUTDOWN_SEND);
    assert_eq!(
        r.events(),
        [
            Event::PeerShutdown {
                stream: s,
                how: How::Send
            },
            closed(s)
        ]
    );
    assert_eq!(r.ops(), [(Op::Rst, 9)]);
    r.empty();
}

#[test]
fn connect_is_answered_refused_or_times_out() {
    let mut r = Rig::new(EngineConfig::default());
    r.dial(80, Lane::Bulk);
    let s = r.e.connect(r.now, 81, Kind::Stream, Lane::Bulk).unwrap();
    let (local, _) = r.e.ports(s).unwrap();
    // A reset before our request was sent is for an earlier stream.
    r.handle(Rig::packet(Op::Rst, 81, local));
    assert_eq!(r.ops(), [(Op::Request, 81)]);
    r.handle(Rig::packet(Op::Rst, 81, local));
    assert_eq!(
        r.events(),
        [Event::Closed {
            stream: s,
            reason: Some(ResetReason::Refused)
        }]
    );
    assert!(r.sent().is_empty());
    let s = r.e.connect(r.now, 81, Kind::Stream, Lane::Bulk).unwrap();
    r.sent();
    r.wait();
    assert_eq!(r.now.0, 2_000 * MS);
    assert_eq!(
        r.events(),
        [Event::Closed {
            stream: s,
            reason: Some(ResetReason::Timeout)
        }]
    );
    assert_eq!(r.ops(), [(Op::Rst, 81)]);
    // If the caller gives up before the request was sent, nothing is sent.
    let s = r.e.connect(r.now, 81, Kind::Stream, Lane::Bulk).unwrap();
    r.e.reset(r.now, s, ResetReason::Local);
    assert!(r.sent().is_empty());
}

#[test]
fn session_change_ends_every_stream_once() {
    for (change, reason) in [
        (SessionChange::Attached { epoch: 2 }, ResetReason::Epoch),
        (
            SessionChange::Lost(ResetReason::CarrierFault),
            ResetReason::CarrierFault,
        ),
    ] {
        let mut r = Rig::new(EngineConfig::default());
        let open = r.open(1);
        let draining = r.open(2);
        let _ = r.data(2, 100);
        r.shut(2, 3);
        r.events();
        assert_eq!(r.ops(), [(Op::Rst, 2)]);
        let reset = r.open(3);
        r.e.reset(r.now, reset, ResetReason::Local);
        r.op(Op::Request, 4);
        let asked = r.e.connect(r.now, 5, Kind::Stream, Lane::Bulk).unwrap();
        r.op(Op::Rw, 6);
        r.e.handle_session(r.now, change);
        let mut ends = r.events();
        ends.sort_by_key(|e| match e {
            Event::Closed { stream, .. } => stream.slot(),
            e => panic!("{e:?}"),
        });
        let end = |stream, reason| Event::Closed {
            stream,
            reason: Some(reason),
        };
        assert_eq!(
            ends,
            [
                end(open, reason),
                end(draining, reason),
                end(reset, ResetReason::Local),
                end(asked, reason)
            ]
        );
        assert!(
            r.sent().is_empty(),
            "the new session does not know these streams"
        );
        if change != SessionChange::Lost(reason) {
            r.empty();
        } else {
            assert_eq!(
                r.op(Op::Request, 9),
                Disposition::Ignore(unexpected(Op::Request))
            );
            let refused = r.e.connect(r.now, 1, Kind::Stream, Lane::Bulk);
            assert_eq!(refused, Err(ConnectError::NoSession));
            r.e.handle_session(r.now, SessionChange::Attached { epoch: 3 });
        }
        r.empty();
        r.open(9);
    }
}

/// On a carrier with reset reasons the reset carries the reason, in both directions. Without an agreement it never
/// does.
#[test]
fn resets_carry_a_reason_if_the_carrier_has_one() {
    use crate::PeerReason::{Credit, Local, Refused, Timeout};
    for tells_reason in [false, true] {
        let cfg = EngineConfig {
            tells_reason,
            ..EngineConfig::default()
        };
        let flags = |r: &mut Rig| r.sent().pop().unwrap().flags;
        let told = |why| if tells_reason { why as u32 } else { 0 };
        let mut r = Rig::new(cfg);
        let s = r.open(1);
        r.e.reset(r.now, s, ResetReason::Local);
        assert_eq!(flags(&mut r), told(Local));
        r.events();
        let _ = r.open(2);
        r.data(2, 1 << 20);
        assert_eq!(flags(&mut r), told(Credit));
        r.events();
        r.handle(Rig::packet(Op::Request, 3, 1));
        assert_eq!(flags(&mut r), told(Refused));
        for (said, heard) in [
            (Timeout as u32, ResetReason::Told(Timeout)),
            (Refused as u32, ResetReason::Told(Refused)),
            (0, ResetReason::Peer),
            (77, ResetReason::Peer),
        ] {
            let stream = r.open(9);
            r.handle(PacketHeader {
                flags: said,
                ..Rig::packet(Op::Rst, 9, SERVICE)
            });
            let reason = Some(if tells_reason {
                heard
            } else {
                ResetReason::Peer
            });
            assert_eq!(r.events(), [Event::Closed { stream, reason }]);
        }
        r.empty();
    }
}

#[test]
fn a_restored_guest_gets_no_resets_until_it_opens_a_stream() {
    let mut r = Rig::new(EngineConfig::default());
    let stream = r.open(9);
    let epoch = Some(ResetReason::Epoch);
    r.e.handle_session(r.now, SessionChange::Restored { epoch: 2 });
    assert_eq!(
        r.events(),
        [Event::Closed {
            stream,
            reason: epoch
        }]
    );
    assert_eq!(r.data(9, 4), Disposition::Consume);
    assert_eq!(r.credit(9, 256 << 10, 4), Disposition::Consume);
    assert_eq!(r.shut(9, SHUTDOWN_SEND), Disposition::Consume);
    assert_eq!(
        r.ops(),
        [],
        "after a reset a reader would treat the stream as complete"
    );
    // The guest now knows that its streams are gone.
    let _ = r.open(10);
    assert_eq!(r.data(9, 4), Disposition::Consume);
    assert_eq!(r.ops(), [(Op::Rst, 9)]);
    // The first attachment of a new guest sends no resets.
    r.e.handle_session(r.now, SessionChange::Restored { epoch: 3 });
    r.e.handle_session(r.now, SessionChange::Attached { epoch: 4 });
    r.events();
    assert_eq!(r.data(10, 4), Disposition::Consume);
    assert_eq!(r.ops(), [(Op::Rst, 10)]);
    r.empty();
}

/// The generations of a slot start again after 2^32 streams. The previous id stays stale, and the new stream works as
/// any other.
#[test]
fn r118_a_slot_works_after_its_generations_wrap() {
    let mut r = Rig::new(EngineConfig::default());
    let slot = r.open(1).slot();
    r.op(Op::Rst, 1);
    r.events();
    r.e.table[slot].generation = u32::MAX;
    let last = r.open(2);
    assert_eq!((last.slot(), last.generation()), (slot, u32::MAX));
    r.op(Op::Rst, 2);
    r.events();
    let next = r.open(3);
    assert_eq!((next.slot(), next.generation()), (slot, 0));
    r.e.reset(r.now, last, ResetReason::Local);
    assert_eq!((r.e.ports(last), r.events().len()), (None, 0));
    assert!(matches!(r.data(3, 5), Disposition::Deliver { stream, .. } if stream == next));
}
