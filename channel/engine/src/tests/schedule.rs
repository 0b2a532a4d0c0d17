//! Which stream sends next.

use super::*;

fn cfg() -> EngineConfig {
    EngineConfig {
        max_streams: 200,
        ..EngineConfig::default()
    }
}

/// Sends one packet of at most `capacity` bytes and returns its stream. The peer takes the bytes at once.
fn send_one(r: &mut Rig, capacity: u32, fwd: &mut [u32]) -> (StreamId, u32) {
    let t =
        r.e.poll_transmit(r.now, capacity)
            .expect("a stream has bytes to send");
    let (s, len) = t.body.expect("data");
    let h = r.e.commit_body(r.now, s, len);
    let sum = &mut fwd[h.dst_port as usize];
    *sum = sum.wrapping_add(len);
    let fwd_cnt = *sum;
    assert_eq!(
        r.credit(h.dst_port, 256 << 10, fwd_cnt),
        Disposition::Consume
    );
    (s, len)
}

#[test]
fn echo_waits_for_at_most_100_packets_among_99_bulk_streams() {
    for capacity in [100, 3700, 4096, 65_536] {
        let mut r = Rig::new(cfg());
        let mut fwd = [0u32; 200];
        let streams: Vec<_> = (0..100).map(|p| r.open(p)).collect();
        streams[..99].iter().for_each(|&s| r.e.offer(s, u32::MAX));
        let echo = streams[99];
        let mut rng = Rng(5);
        for _ in 0..50 {
            for _ in 0..rng.below(300) {
                send_one(&mut r, capacity, &mut fwd);
            }
            r.e.offer(echo, 64);
            let waited = (1..)
                .find(|_| send_one(&mut r, capacity, &mut fwd).0 == echo)
                .unwrap();
            assert!(waited <= 100, "{waited} packets with slots of {capacity}");
        }
    }
}

#[test]
fn bulk_streams_share_evenly_and_one_alone_fills_its_slots() {
    let mut r = Rig::new(cfg());
    let mut fwd = [0u32; 200];
    let streams: Vec<_> = (0..10).map(|p| r.open(p)).collect();
    streams.iter().for_each(|&s| r.e.offer(s, u32::MAX));
    let mut rng = Rng(11);
    // Slots of all sizes: the part of a turn that a small slot could not use is used later.
    for _ in 0..10_000 {
        send_one(&mut r, 500 + rng.below(16_000) as u32, &mut fwd);
    }
    let (min, max) = (
        fwd[..10].iter().min().unwrap(),
        fwd[..10].iter().max().unwrap(),
    );
    assert!(f64::from(*max) <= f64::from(*min) * 1.05, "{min}..{max}");
    streams[1..].iter().for_each(|&s| r.e.offer(s, 0));
    assert_eq!(send_one(&mut r, 65_536, &mut fwd), (streams[0], 65_536));
}

#[test]
fn control_goes_first_but_bulk_does_not_starve() {
    let mut r = Rig::new(cfg());
    let bulk = r.open(1);
    let control = r.dial(2, Lane::Control);
    let (local, _) = r.e.ports(control).unwrap();
    r.e.offer(bulk, u32::MAX);
    r.e.offer(control, u32::MAX);
    let (mut ours, mut longest, mut run, mut sum) = (0, 0, 0, 0);
    for _ in 0..300 {
        let t = r.e.poll_transmit(r.now, 10).unwrap();
        let (s, len) = t.body.unwrap();
        r.e.commit_body(r.now, s, len);
        if s == control {
            (ours, run, sum) = (ours + 1, run + 1, sum + len);
            let h = PacketHeader {
                fwd_cnt: sum,
                ..Rig::packet(Op::CreditUpdate, 2, local)
            };
            assert_eq!(r.handle(h), Disposition::Consume);
        } else {
            run = 0;
        }
        longest = longest.max(run);
    }
    assert!(
        longest == crate::output::CONTROL_RUN_MAX && ours > 270,
        "{ours}, {longest}"
    );
}

#[test]
fn r55_one_stopped_reader_stops_nobody_else() {
    let mut r = Rig::new(cfg());
    let streams: Vec<_> = (0..100).map(|p| r.open(p)).collect();
    streams.iter().for_each(|&s| r.e.offer(s, u32::MAX));
    let (mut sent, mut fwd) = ([0u32; 100], [0u32; 100]);
    for _ in 0..10_000 {
        let t = r.e.poll_transmit(r.now, 4096).unwrap();
        let (s, len) = t.body.unwrap();
        let port = r.e.commit_body(r.now, s, len).dst_port as usize;
        sent[port] += len;
        if port != 7 {
            fwd[port] = sent[port];
            r.credit(port as u32, 256 << 10, fwd[port]);
        }
    }
    assert_eq!(sent[7], 256 << 10, "its window, no more");
    let fair = 10_000 * 4096 / 100;
    assert!(
        sent.iter()
            .enumerate()
            .all(|(p, &n)| p == 7 || n >= fair / 10 * 9)
    );
}

#[test]
fn owed_packets_go_ahead_of_data_and_poll_without_commit_changes_nothing() {
    let mut r = Rig::new(cfg());
    let s = r.open(1);
    r.e.offer(s, 500);
    let t = r.e.poll_transmit(r.now, 4096).unwrap();
    assert_eq!(t.body, Some((s, 500)));
    assert_eq!(r.e.poll_transmit(r.now, 4096), Some(t));
    assert_eq!(r.e.poll_transmit(r.now, 0), None);
    assert!(r.e.wants_transmit());
    r.op(Op::CreditRequest, 1);
    assert_eq!(r.ops(), [(Op::CreditUpdate, 1), (Op::Rw, 1)]);
}

#[test]
fn the_rest_of_a_turn_is_kept_after_a_small_slot() {
    let mut r = Rig::new(cfg());
    let (a, b) = (r.open(1), r.open(2));
    r.e.offer(a, u32::MAX);
    r.e.offer(b, u32::MAX);
    let mut fwd = [0u32; 3];
    let quantum = cfg().quantum;
    assert_eq!(send_one(&mut r, 100, &mut fwd), (a, 100));
    assert_eq!(send_one(&mut r, 65_536, &mut fwd), (b, quantum));
    assert_eq!(send_one(&mut r, 65_536, &mut fwd), (a, 2 * quantum - 100));
    assert_eq!(send_one(&mut r, 65_536, &mut fwd), (b, quantum));
    assert_eq!(send_one(&mut r, 65_536, &mut fwd), (a, quantum));
}

/// The packets of a stream keep their order on the lane on which the stream was requested. So do resets for pairs that
/// have no stream. If one lane has no room its packets wait, whether the other lane has room or not.
#[test]
fn a_lane_without_room_keeps_its_packets() {
    let mut r = Rig::new(EngineConfig {
        tells_reason: true,
        ..cfg()
    });
    let bulk = r.open(1);
    let request = |port, to| Rig::packet(Op::Request, port, to);
    r.e.handle_packet_on(r.now, Lane::Control, &request(2, SERVICE), 0);
    let Some(Event::Incoming { stream, .. }) = r.e.poll_event() else {
        panic!("no incoming stream");
    };
    r.e.answer(r.now, stream, Answer::Accept);
    r.e.offer(stream, 5);
    r.e.offer(bulk, 7);
    r.e.handle_packet_on(r.now, Lane::Control, &request(3, 1), 0);
    r.e.handle_packet_on(r.now, Lane::Bulk, &request(4, 1), 0);
    let sent = |r: &mut Rig, lane| {
        let mut all = Vec::new();
        while let Some(t) = r.e.poll_transmit_on(r.now, Some(lane), 4096) {
            assert_eq!(t.lane, lane);
            let h = match t.body {
                Some((s, len)) => r.e.commit_body(r.now, s, len),
                None => t.header,
            };
            all.push((Op::parse(h.op).unwrap(), h.dst_port, h.len));
        }
        assert!(!r.e.wants_transmit_on(lane));
        all
    };
    assert_eq!(
        sent(&mut r, Lane::Bulk),
        [(Op::Rst, 4, 0), (Op::Rw, 1, 7)],
        "lane control had no room"
    );
    assert!(r.e.wants_transmit());
    assert_eq!(
        sent(&mut r, Lane::Control),
        [(Op::Response, 2, 0), (Op::Rst, 3, 0), (Op::Rw, 2, 5)]
    );
    assert!(!r.e.wants_transmit());
}
