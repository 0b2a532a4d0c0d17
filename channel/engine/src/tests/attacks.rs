//! Packets that no honest peer sends. Each costs the peer at most its stream; other streams continue.

use super::*;
use crate::{ConnectError, RST_MAX};

fn ignored(v: Violation) -> Disposition {
    Disposition::Ignore(v)
}

#[test]
fn r36_peer_shrinks_buf_alloc_in_flight() {
    let mut r = Rig::new(EngineConfig {
        packet_overhead: 0,
        ..EngineConfig::default()
    });
    let s = r.open(9);
    r.e.offer(s, 10_000);
    assert_eq!(r.sent().iter().map(|h| h.len).sum::<u32>(), 10_000);
    assert_eq!(r.credit(9, 100, 0), Disposition::Consume);
    r.e.offer(s, u32::MAX);
    assert!(
        r.sent().is_empty(),
        "credit is 0, and did not wrap to nearly 2^32"
    );
    r.credit(9, 100, 9_950);
    assert_eq!(r.sent().iter().map(|h| h.len).collect::<Vec<_>>(), [50]);
    // After 10,000 + 50 bytes the counters have not wrapped. The largest possible buf_alloc is still only WINDOW_MAX.
    r.credit(9, u32::MAX, 10_050);
    r.e.offer(s, 1);
    assert_eq!(r.sent().len(), 1);
}

#[test]
fn r37_huge_windows_and_stopped_readers_stay_inside_the_pool() {
    let cfg = EngineConfig::default();
    let mut r = Rig::new(cfg);
    let mut held = 0u64;
    for port in 0..896 {
        let h = PacketHeader {
            buf_alloc: u32::MAX,
            ..Rig::packet(Op::Request, port, SERVICE)
        };
        r.handle(h);
        let Some(Event::Incoming { stream, .. }) = r.e.poll_event() else {
            panic!()
        };
        r.e.answer(r.now, stream, Answer::Accept);
        let window = r.sent()[0].buf_alloc;
        assert!(matches!(r.data(port, window), Disposition::Deliver { .. }));
        held += u64::from(window);
        assert!(r.e.lent() <= cfg.pool_bytes);
    }
    assert!(held <= cfg.pool_bytes, "{held}");
    for port in 0..896 {
        let one_more = r.data(port, 1);
        assert!(matches!(
            one_more,
            Disposition::Ignore(Violation::CreditExceeded { window: 0, .. })
        ));
    }
}

#[test]
fn r40_a_stream_with_a_zero_window_waits_and_probes_while_others_flow() {
    let mut r = Rig::new(EngineConfig::default());
    let (stuck, free) = (r.open(1), r.open(2));
    r.credit(1, 0, 0);
    r.e.offer(stuck, 100);
    r.e.offer(free, 100);
    assert_eq!(r.ops(), [(Op::Rw, 2)]);
    let mut asked = Vec::new();
    for _ in 0..20 {
        r.wait();
        asked.push(r.now.0);
        assert_eq!(r.ops(), [(Op::CreditRequest, 1)]);
    }
    assert!(
        asked[1] - asked[0] < asked[5] - asked[4],
        "probes less and less often"
    );
    assert!(asked[19] - asked[18] <= 1_000 * MS);
    r.credit(1, 1000, 0);
    assert_eq!(r.events(), [Event::Writable { stream: stuck }]);
    assert_eq!(r.ops(), [(Op::Rw, 1)]);
    assert_eq!(r.e.poll_timeout(), None, "an idle stream has no timer");
}

#[test]
fn r41_fwd_cnt_ahead_or_far_behind_resets() {
    for lie in [1001, 5000, 1 << 31, u32::MAX] {
        let mut r = Rig::new(EngineConfig::default());
        let (s, sibling) = (r.open(9), r.open(10));
        r.e.offer(s, 1000);
        r.sent();
        let v = Violation::FwdCntAhead {
            fwd_cnt: lie,
            tx_cnt: 1000,
        };
        assert_eq!(r.credit(9, 1 << 18, lie), ignored(v));
        assert_eq!(
            r.events(),
            [Event::Closed {
                stream: s,
                reason: Some(ResetReason::Protocol(v))
            }]
        );
        assert_eq!(r.ops(), [(Op::Rst, 9)]);
        assert_eq!(r.e.ports(sibling), Some((SERVICE, 10)));
    }
}

#[test]
fn r41_overtaken_credit_is_ignored() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    r.e.offer(s, 1000);
    r.sent();
    assert_eq!(r.credit(9, 1000, 1000), Disposition::Consume);
    assert_eq!(r.credit(9, 7, 400), Disposition::Consume);
    r.e.offer(s, 1000);
    assert_eq!(
        r.sent()[0].len,
        1000,
        "neither fwd_cnt nor buf_alloc decreased"
    );
    let request = PacketHeader {
        fwd_cnt: 1,
        ..Rig::packet(Op::Request, 77, SERVICE)
    };
    assert_eq!(
        r.handle(request),
        ignored(Violation::FwdCntAhead {
            fwd_cnt: 1,
            tx_cnt: 0
        })
    );
    assert_eq!(r.ops(), [(Op::Rst, 77)]);
}

#[test]
fn r42_lengths_and_windows_are_checked() {
    // Of the first stream.
    let window = 8 * EngineConfig::default().initial_window;
    for (len, body, v) in [
        (
            101,
            100,
            Violation::LengthMismatch {
                header: 101,
                body: 100,
            },
        ),
        (
            u32::MAX,
            0,
            Violation::LengthMismatch {
                header: u32::MAX,
                body: 0,
            },
        ),
        (
            window + 1,
            window + 1,
            Violation::CreditExceeded {
                len: window + 1,
                window,
            },
        ),
        (
            u32::MAX,
            u32::MAX,
            Violation::CreditExceeded {
                len: u32::MAX,
                window,
            },
        ),
    ] {
        let mut r = Rig::new(EngineConfig::default());
        let s = r.open(9);
        let h = PacketHeader {
            len,
            ..Rig::packet(Op::Rw, 9, SERVICE)
        };
        assert_eq!(r.e.handle_packet(r.now, &h, body), ignored(v));
        let reason = if matches!(v, Violation::CreditExceeded { .. }) {
            ResetReason::Credit
        } else {
            ResetReason::Protocol(v)
        };
        r.ended(s, 9, reason);
    }
    let mut r = Rig::new(EngineConfig::default());
    let stream = r.open(9);
    assert_eq!(r.data(9, 0), Disposition::Consume);
    assert_eq!(
        r.data(9, window),
        Disposition::Deliver {
            stream,
            len: window
        }
    );
    assert_eq!(
        r.data(9, 0),
        Disposition::Consume,
        "nothing fits into a full window"
    );
}

#[test]
fn r43_every_op_and_a_sample_of_types_and_flags() {
    for op in 0..=u16::MAX {
        for kind in [0u16, 1, 2, 3, u16::MAX] {
            if kind == 1 && Op::parse(op).is_some() {
                continue;
            }
            let mut rst = crate::rst::RstSet::new();
            let mut r = Rig::new(EngineConfig {
                max_streams: 1,
                ..EngineConfig::default()
            });
            core::mem::swap(&mut rst, &mut r.e.rst);
            let h = PacketHeader {
                op,
                kind,
                ..Rig::packet(Op::Rw, 9, SERVICE)
            };
            assert!(matches!(r.handle(h), Disposition::Ignore(_)));
            let expected = usize::from(op != Op::Rst as u16);
            let sent = r.sent();
            assert_eq!(sent.len(), expected, "op {op} kind {kind}");
            assert!(
                sent.iter()
                    .all(|p| p.op == 3 && p.kind == kind && p.dst_port == 9)
            );
        }
    }
    for (op, flags, bad) in [
        (Op::Shutdown, 4, true),
        (Op::Shutdown, u32::MAX, true),
        (Op::Shutdown, 0, false),
        (Op::Rw, 1, true),
        (Op::Request, 1, true),
        (Op::CreditUpdate, 1 << 31, true),
    ] {
        let mut r = Rig::new(EngineConfig::default());
        let s = r.open(9);
        let got = r.handle(PacketHeader {
            flags,
            ..Rig::packet(op, 9, SERVICE)
        });
        if bad {
            assert_eq!(got, ignored(Violation::BadFlags { flags }));
            r.ended(s, 9, ResetReason::Protocol(Violation::BadFlags { flags }));
        } else {
            assert_eq!(got, Disposition::Consume);
        }
    }
}

#[test]
fn r43_unknown_op_on_a_stream_ends_only_that_stream() {
    let mut r = Rig::new(EngineConfig::default());
    let (s, sibling) = (r.open(9), r.open(10));
    r.handle(PacketHeader {
        op: 99,
        ..Rig::packet(Op::Rw, 9, SERVICE)
    });
    let reason = Some(ResetReason::Protocol(Violation::UnknownOp { op: 99 }));
    assert_eq!(r.events(), [Event::Closed { stream: s, reason }]);
    assert_eq!(r.ops(), [(Op::Rst, 9)]);
    assert_eq!(
        r.data(10, 5),
        Disposition::Deliver {
            stream: sibling,
            len: 5
        }
    );
}

#[test]
fn r45_rst_is_never_answered() {
    let mut r = Rig::new(EngineConfig::default());
    for kind in [1, 2, 9] {
        let _ = r.handle(PacketHeader {
            kind,
            ..Rig::packet(Op::Rst, 9, SERVICE)
        });
    }
    assert!(r.sent().is_empty());
    // Both sides reset at the same time: our reset is withdrawn.
    let s = r.open(9);
    r.e.reset(r.now, s, ResetReason::Local);
    assert_eq!(r.op(Op::Rst, 9), Disposition::Consume);
    assert!(r.sent().is_empty());
    assert_eq!(
        r.events(),
        [Event::Closed {
            stream: s,
            reason: Some(ResetReason::Local)
        }]
    );
    r.empty();
}

#[test]
fn r45_a_reused_pair_survives_a_reset_owed_to_its_earlier_stream() {
    let mut r = Rig::new(EngineConfig::default());
    // A reset is owed to a stray packet, to a stream that was reset, or to one that ended in order. A new REQUEST
    // cancels it.
    assert_eq!(r.op(Op::CreditUpdate, 9), Disposition::Consume);
    let a = r.open(9);
    r.e.reset(r.now, a, ResetReason::Local);
    let b = {
        r.op(Op::Request, 9);
        let ev = r.events();
        assert_eq!(ev.len(), 2);
        match ev[1] {
            Event::Incoming { stream, .. } => stream,
            e => panic!("{e:?}"),
        }
    };
    r.e.answer(r.now, b, Answer::Accept);
    assert_eq!(r.ops(), [(Op::Response, 9)]);
    assert_ne!(a, b);
    r.shut(9, 3);
    r.events();
    r.op(Op::Request, 9);
    let Some(Event::Incoming { stream: c, .. }) = r.e.poll_event() else {
        panic!()
    };
    r.e.answer(r.now, c, Answer::Accept);
    assert_eq!(r.ops(), [(Op::Response, 9)]);
    // A late reset that confirms bytes that this stream never sent is not for this stream.
    let late = PacketHeader {
        fwd_cnt: 4711,
        ..Rig::packet(Op::Rst, 9, SERVICE)
    };
    assert_eq!(
        r.handle(late),
        ignored(Violation::FwdCntAhead {
            fwd_cnt: 4711,
            tx_cnt: 0
        })
    );
    assert_eq!(r.data(9, 5), Disposition::Deliver { stream: c, len: 5 });
}

#[test]
fn r45_stale_ids_are_harmless() {
    let mut r = Rig::new(EngineConfig::default());
    let old = r.open(9);
    r.op(Op::Rst, 9);
    r.events();
    let new = r.open(10);
    assert_eq!(old.slot(), new.slot());
    r.e.offer(old, 5);
    r.e.consumed(r.now, old, 5);
    r.e.shutdown(r.now, old, crate::How::Both);
    r.e.reset(r.now, old, ResetReason::Local);
    r.e.answer(r.now, old, Answer::Refuse);
    let h = r.e.commit_body(r.now, old, 5);
    assert_eq!((h.op, h.src_port, h.dst_port), (Op::Rst as u16, 0, 0));
    assert_eq!(r.e.ports(old), None);
    assert!(r.sent().is_empty() && r.events().is_empty());
    assert_eq!(r.e.ports(new), Some((SERVICE, 10)));
}

#[test]
fn r46_resets_owed_are_bounded_and_stream_resets_are_not_lost() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(1);
    let overflow = (0..10_000u32)
        .filter(|&port| {
            r.handle(Rig::packet(Op::Rw, port + 2, 5)) == ignored(Violation::RstOverflow)
        })
        .count();
    assert_eq!(overflow, 10_000 - RST_MAX);
    r.e.reset(r.now, s, ResetReason::Local);
    assert_eq!(
        r.ops()[0],
        (Op::Rst, 1),
        "the stream's reset goes before those of the storm"
    );
}

#[test]
fn r47_full_table_refuses_and_recovers() {
    let cfg = EngineConfig {
        max_streams: 4,
        ..EngineConfig::default()
    };
    let mut r = Rig::new(cfg);
    let streams: Vec<_> = (0..4).map(|p| r.open(p)).collect();
    for port in 4..200 {
        r.op(Op::Request, port);
    }
    assert!(r.ops().iter().all(|&(op, _)| op == Op::Rst));
    let full = r.e.connect(r.now, 1, Kind::Stream, Lane::Bulk);
    assert_eq!(full, Err(ConnectError::TableFull { max: 4 }));
    // An ended stream whose reset is not sent yet still uses its slot, because the limit bounds memory.
    r.e.reset(r.now, streams[0], ResetReason::Local);
    r.events();
    assert_eq!(r.e.connect(r.now, 1, Kind::Stream, Lane::Bulk), full);
    r.sent();
    assert!(r.e.connect(r.now, 1, Kind::Stream, Lane::Bulk).is_ok());
}

#[test]
fn r47_a_peer_that_fills_its_slots_can_still_be_reached() {
    let mut r = Rig::new(EngineConfig::default());
    for port in 0..65_536 {
        r.op(Op::Request, port);
        r.sent();
    }
    assert_eq!(r.e.table.used(), 896);
    assert!(r.e.connect(r.now, 1, Kind::Stream, Lane::Bulk).is_ok());
}

#[test]
fn a_host_that_listens_to_all_gets_requests_for_any_port() {
    let mut r = Rig::new(EngineConfig::default());
    assert!(matches!(
        r.handle(Rig::packet(Op::Request, 1024, SERVICE + 1)),
        Disposition::Consume
    ));
    assert_eq!(r.e.poll_event(), None, "refused");
    r.e.listen_to_all();
    r.handle(Rig::packet(Op::Request, 1025, SERVICE + 1));
    assert!(matches!(
        r.e.poll_event(),
        Some(Event::Incoming { local_port, peer_port: 1025, .. }) if local_port == SERVICE + 1
    ));
}

#[test]
fn r47_listening_ports_are_bounded() {
    let mut r = Rig::new(EngineConfig::default());
    let ok = (0..5000)
        .filter(|&p| r.e.listen(p, Kind::Stream).is_ok())
        .count();
    assert!(ok as u32 <= crate::LISTEN_MAX);
    assert_eq!(r.e.listening.len() as u32, crate::LISTEN_MAX);
    assert!(
        r.e.listen(SERVICE, Kind::Stream).is_ok(),
        "listening again is not an error"
    );
}

#[test]
fn r39_a_slot_is_freed_however_a_request_fails() {
    let mut r = Rig::new(EngineConfig {
        max_streams: 2,
        ..EngineConfig::default()
    });
    for round in 0..50 {
        r.op(Op::Request, 9);
        match round % 5 {
            0 => drop(r.op(Op::Rst, 9)),
            1 => drop(r.shut(9, 3)),
            2 => drop(r.data(9, 1)),
            3 => {
                let Some(Event::Incoming { stream, .. }) = r.e.poll_event() else {
                    panic!()
                };
                r.e.answer(r.now, stream, Answer::Refuse);
                r.ended(stream, 9, ResetReason::Refused);
            }
            _ => {
                let Some(Event::Incoming { stream, .. }) = r.e.poll_event() else {
                    panic!()
                };
                r.wait();
                r.ended(stream, 9, ResetReason::Timeout);
            }
        }
        r.sent();
        assert!(
            r.events().is_empty(),
            "a stream that was never announced is never closed"
        );
        r.empty();
    }
}

#[test]
fn operations_that_do_not_fit_the_state_end_the_stream() {
    for op in [Op::Request, Op::Response] {
        let mut r = Rig::new(EngineConfig::default());
        let s = r.open(9);
        assert_eq!(r.op(op, 9), ignored(unexpected(op)));
        r.ended(s, 9, ResetReason::Protocol(unexpected(op)));
    }
    for op in [Op::Rw, Op::Shutdown, Op::Request] {
        let mut r = Rig::new(EngineConfig::default());
        let s = r.e.connect(r.now, 5, Kind::Stream, Lane::Bulk).unwrap();
        let (local, _) = r.e.ports(s).unwrap();
        r.sent();
        r.handle(Rig::packet(op, 5, local));
        r.ended(s, 5, ResetReason::Protocol(unexpected(op)));
    }
    // A request is repeated before the answer: the first one counts.
    let mut r = Rig::new(EngineConfig::default());
    r.op(Op::Request, 9);
    assert_eq!(r.op(Op::Request, 9), ignored(unexpected(Op::Request)));
    assert_eq!(r.events().len(), 1);
    // Data after the end of the peer's sending.
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    r.shut(9, 2);
    r.events();
    assert_eq!(r.data(9, 1), ignored(unexpected(Op::Rw)));
    r.ended(s, 9, ResetReason::Protocol(unexpected(Op::Rw)));
}

#[test]
fn a_thousand_credit_requests_get_one_answer() {
    let mut r = Rig::new(EngineConfig::default());
    r.open(9);
    for _ in 0..1000 {
        assert_eq!(r.op(Op::CreditRequest, 9), Disposition::Consume);
        assert_eq!(r.shut(9, 1), Disposition::Consume);
    }
    assert_eq!(r.events().len(), 1);
    assert_eq!(r.ops(), [(Op::CreditUpdate, 9)]);
}

#[test]
fn random_packets_leave_nothing_behind() {
    for seed in 0..200 {
        let cfg = EngineConfig {
            max_streams: 8,
            pool_bytes: 20_000,
            ..EngineConfig::default()
        };
        let (mut r, mut rng) = (Rig::new(cfg), Rng(seed));
        for _ in 0..400 {
            let mut word = |choices: &[u32]| match rng.below(8) {
                0 => rng.next() as u32,
                _ => choices[rng.below(choices.len() as u64) as usize],
            };
            let h = PacketHeader {
                src_port: word(&[1, 2, 3, 4]),
                dst_port: word(&[SERVICE]),
                len: word(&[0, 1, 100, 5000]),
                kind: word(&[1, 1, 1, 1, 2]) as u16,
                op: word(&[1, 2, 3, 4, 5, 5, 5, 6, 7]) as u16,
                flags: word(&[0, 0, 0, 1, 2, 3]),
                buf_alloc: word(&[0, 100, 1 << 18]),
                fwd_cnt: word(&[0, 0, 0, 10]),
            };
            let body = word(&[0, h.len, h.len, h.len]);
            let disposition = r.e.handle_packet(r.now, &h, body);
            if let Disposition::Deliver { stream, len } = disposition {
                assert!(len > 0 && len <= body && r.e.ports(stream).is_some());
                r.e.consumed(r.now, stream, rng.below(u64::from(len) + 1) as u32);
            }
            if rng.one_in(3) {
                for event in r.events() {
                    if let Event::Incoming { stream, .. } = event {
                        r.e.answer(
                            r.now,
                            stream,
                            if rng.one_in(4) {
                                Answer::Refuse
                            } else {
                                Answer::Accept
                            },
                        );
                        r.e.offer(stream, rng.below(3000) as u32);
                    }
                }
            }
            if rng.one_in(3) {
                r.sent();
            }
            if rng.one_in(20) && r.e.poll_timeout().is_some() {
                r.wait();
            }
            assert!(r.e.lent() <= cfg.pool_bytes && r.e.table.used() <= 8);
        }
        r.e.handle_session(r.now, SessionChange::Lost(ResetReason::CarrierFault));
        r.events();
        r.e.handle_session(r.now, SessionChange::Attached { epoch: 2 });
        r.empty();
    }
}
