//! Our windows: lent from the pool, grown by use, announced in time. And the peer's packet limit.

use super::*;
use crate::{ConnectError, credit::WINDOW_FLOOR};

/// The first window of the first stream of an engine with the default configuration.
const FIRST: u32 = 64 << 10;

/// The peer sends all that it may, and the sink takes it. Returns the last announced window.
fn stream_through(r: &mut Rig, port: u32, s: StreamId, first: u32, bytes: u64) -> u32 {
    let (mut told, mut fwd, mut sent) = (first, 0u32, 0u32);
    let mut total = 0u64;
    while total < bytes {
        let n = (told - sent.wrapping_sub(fwd)).min(4096);
        assert!(n > 0, "stalled after {total}");
        assert!(matches!(r.data(port, n), Disposition::Deliver { .. }));
        sent = sent.wrapping_add(n);
        total += u64::from(n);
        // The sink only runs when the window is full.
        if sent.wrapping_sub(fwd) == told {
            r.e.consumed(r.now, s, u32::MAX);
        }
        for h in r.sent() {
            (told, fwd) = (h.buf_alloc, h.fwd_cnt);
        }
    }
    told
}

#[test]
fn a_window_grows_by_use_and_is_returned_at_the_end() {
    let cfg = EngineConfig::default();
    let mut r = Rig::new(cfg);
    let s = r.open(9);
    assert_eq!(r.e.lent(), u64::from(FIRST));
    assert_eq!(stream_through(&mut r, 9, s, FIRST, 4 << 20), cfg.max_window);
    assert_eq!(r.e.lent(), u64::from(cfg.max_window));
    r.op(Op::Rst, 9);
    r.events();
    r.empty();
}

#[test]
fn small_messages_do_not_grow_a_window() {
    let cfg = EngineConfig::default();
    let mut r = Rig::new(cfg);
    let s = r.open(9);
    for _ in 0..10_000 {
        let _ = r.data(9, 64);
        r.e.consumed(r.now, s, 64);
        r.sent();
    }
    assert_eq!(r.e.lent(), u64::from(FIRST));
}

#[test]
fn first_windows_are_longer_while_the_pool_is_hardly_lent() {
    let cfg = EngineConfig::default();
    let mut r = Rig::new(cfg);
    let mut windows = Vec::new();
    for port in 0..890 {
        let before = r.e.lent();
        r.open(port);
        windows.push(r.e.lent() - before);
    }
    let initial = u64::from(cfg.initial_window);
    assert!(windows[..16].iter().all(|&w| w == u64::from(FIRST)));
    assert!(windows[16..].iter().all(|&w| w == initial), "{windows:?}");
}

/// Two engines: what a first message of 64 KiB costs on a new stream, in packets and in times that a side waits for the other.
#[test]
fn a_new_streams_first_64_kib_go_in_one_packet_and_wait_for_no_credit() {
    let now = Tick(0);
    let [mut near, mut far] = [1, 2].map(|seed| {
        let mut e = Engine::new(EngineConfig::default(), seed);
        e.handle_session(now, SessionChange::Attached { epoch: 1 });
        e.listen(SERVICE, Kind::Stream).unwrap();
        e
    });
    // Everything that `from` has to send goes to `to`. Returns (operation, bytes) of each packet.
    let cross = |from: &mut Engine, to: &mut Engine| {
        let mut packets = Vec::new();
        while let Some(t) = from.poll_transmit(now, FIRST) {
            let header = match t.body {
                Some((s, len)) => from.commit_body(now, s, len),
                None => t.header,
            };
            if let Disposition::Deliver { stream, len } = to.handle_packet(now, &header, header.len)
            {
                to.consumed(now, stream, len);
            }
            packets.push((Op::parse(header.op).unwrap(), header.len));
        }
        packets
    };
    let s = near
        .connect(now, SERVICE, Kind::Stream, Lane::Bulk)
        .unwrap();
    assert_eq!(cross(&mut near, &mut far), [(Op::Request, 0)]);
    let Some(Event::Incoming { stream, .. }) = far.poll_event() else {
        panic!("no incoming stream");
    };
    far.answer(now, stream, Answer::Accept);
    assert_eq!(cross(&mut far, &mut near), [(Op::Response, 0)]);
    near.offer(s, FIRST);
    assert_eq!(cross(&mut near, &mut far), [(Op::Rw, FIRST)]);
    // The credit for the next message is there with the answer to the first. It is more than was used.
    far.offer(stream, 8);
    assert_eq!(
        cross(&mut far, &mut near),
        [(Op::CreditUpdate, 0), (Op::Rw, 8)]
    );
    near.offer(s, 2 * FIRST);
    assert_eq!(cross(&mut near, &mut far), [(Op::Rw, FIRST); 2]);
}

#[test]
fn pool_bounds_the_sum_and_leaves_newcomers_a_floor() {
    let cfg = EngineConfig {
        max_streams: 64,
        pool_bytes: 1 << 20,
        ..EngineConfig::default()
    };
    let mut r = Rig::new(cfg);
    for port in 0..8 {
        let before = r.e.lent();
        let s = r.open(port);
        let first = u32::try_from(r.e.lent() - before).unwrap();
        stream_through(&mut r, port, s, first, 2 << 20);
        assert!(r.e.lent() <= cfg.pool_bytes * 3 / 4);
    }
    for port in 8..56 {
        r.open(port);
        assert!(r.e.lent() <= cfg.pool_bytes);
    }
    // If the pool is too small even for floors, both sides get an error.
    let cfg = EngineConfig {
        pool_bytes: u64::from(WINDOW_FLOOR) * 2,
        ..cfg
    };
    let mut r = Rig::new(cfg);
    r.open(1);
    r.open(2);
    assert_eq!(
        r.e.connect(r.now, 1, Kind::Stream, Lane::Bulk),
        Err(ConnectError::NoCredit)
    );
    r.op(Op::Request, 3);
    assert_eq!(r.ops(), [(Op::Rst, 3)]);
}

/// The pool has nothing left to lend, so every stream has the smallest window. Even then the peer gets updates of at
/// least a quarter of it, and is never made to send single bytes.
#[test]
fn a_small_pool_causes_no_silly_windows() {
    let cfg = EngineConfig::default();
    let cfg = EngineConfig {
        pool_bytes: u64::from(WINDOW_FLOOR) * u64::from(cfg.max_streams),
        ..cfg
    };
    let mut r = Rig::new(cfg);
    let s = r.open(9);
    assert_eq!(r.e.lent(), u64::from(WINDOW_FLOOR));
    let (mut told, mut in_view, mut sent, mut updates) = (0, 0, 0, 0);
    for _ in 0..10_000 {
        // The peer sends all that it may, and the sink takes it byte by byte.
        let n = WINDOW_FLOOR - in_view;
        if n > 0 {
            assert!(n >= WINDOW_FLOOR / 4 || sent == 0, "{n} bytes are free");
            assert!(matches!(r.data(9, n), Disposition::Deliver { .. }));
            (sent, in_view) = (sent + n, in_view + n);
        }
        r.e.consumed(r.now, s, 1);
        for h in r.sent() {
            assert_eq!(Op::parse(h.op), Some(Op::CreditUpdate));
            (in_view, told, updates) = (sent - h.fwd_cnt, h.fwd_cnt, updates + 1);
        }
    }
    assert!(told >= 10_000 - WINDOW_FLOOR / 4 && updates <= told / (WINDOW_FLOOR / 4));
}

#[test]
fn r54_credit_is_announced_before_the_peer_stalls_but_not_per_packet() {
    for window in [1, 2, 3, 5, 64, 8192] {
        let cfg = EngineConfig {
            initial_window: window,
            max_window: window,
            ..EngineConfig::default()
        };
        let mut r = Rig::new(cfg);
        let s = r.open(9);
        let (mut in_view, mut updates) = (0, 0u32);
        for _ in 0..10_000 {
            assert!(in_view < window, "stalled with window {window}");
            let n = 1.max(window / 64);
            let _ = r.data(9, n.min(window - in_view));
            in_view += n.min(window - in_view);
            r.e.consumed(r.now, s, n);
            let told = r.sent();
            updates += told.len() as u32;
            if !told.is_empty() {
                in_view = 0;
            }
        }
        if window >= 64 {
            assert!(
                updates <= 10_000 / 30,
                "{updates} updates with window {window}"
            );
        }
    }
}

/// A newer Linux has no more bytes in flight than its own buffer has room for. Programs choose the size of that buffer.
#[test]
fn r54_a_peer_that_uses_only_a_part_of_the_window_gets_credit_in_time() {
    for buffer in [1, 2, 100, 4 << 10, 16 << 10, 40 << 10, 256 << 10] {
        let cfg = EngineConfig::default();
        let mut r = Rig::new(cfg);
        let s = r.open(9);
        r.credit(9, buffer, 0);
        let (mut told, mut fwd, mut sent) = (FIRST, 0, 0);
        let (total, mut updates) = ((64 * buffer).min(4 << 20), 0);
        while sent < total {
            let n = (told.min(buffer) - (sent - fwd)).min(4 << 10);
            assert!(n > 0, "a buffer of {buffer} bytes: stalled after {sent}");
            let packet = PacketHeader {
                len: n,
                buf_alloc: buffer,
                ..Rig::packet(Op::Rw, 9, SERVICE)
            };
            assert!(matches!(r.handle(packet), Disposition::Deliver { .. }));
            sent += n;
            r.e.consumed(r.now, s, n);
            for h in r.sent() {
                (told, fwd, updates) = (h.buf_alloc, h.fwd_cnt, updates + 1);
            }
        }
        let most = total / (buffer.min(FIRST) / 4).max(1);
        assert!(updates <= most, "{updates} updates, buffer {buffer}");
    }
}

/// The peer's program makes its buffer smaller than what it has in flight.
#[test]
fn r54_a_peer_whose_buffer_shrinks_gets_the_credit_that_it_waits_for() {
    let mut r = Rig::new(EngineConfig::default());
    let s = r.open(9);
    let _ = r.data(9, 20 << 10);
    r.e.consumed(r.now, s, 20 << 10);
    assert_eq!(r.ops(), []);
    r.credit(9, 16 << 10, 0);
    let told = r.sent();
    assert_eq!((told.len(), told[0].fwd_cnt), (1, 20 << 10));
}

#[test]
fn packets_in_flight_stay_below_the_peers_limit() {
    let cfg = EngineConfig::default();
    let limit = (256 << 10) / cfg.packet_overhead as usize;
    let mut r = Rig::new(cfg);
    let s = r.open(9);
    let (mut sizes, mut rng) = (Vec::new(), Rng(3));
    let (mut sent, mut taken, mut fwd) = (0usize, 0usize, 0u32);
    let mut fullest = 0;
    for _ in 0..20_000 {
        r.e.offer(s, u32::MAX);
        if let Some(t) = r.e.poll_transmit(r.now, 1 + rng.below(64) as u32) {
            let n = match t.body {
                Some((s, len)) => r.e.commit_body(r.now, s, len).len,
                None => continue,
            };
            sizes.push(n);
            sent += 1;
            fullest = fullest.max(sent - taken);
            assert!(
                (sent - taken) as u32 * 576 <= 256 << 10,
                "{} packets",
                sent - taken
            );
        } else {
            assert!(
                sent - taken > limit - limit / 8 - 1,
                "stopped early, at {}",
                sent - taken
            );
            for _ in 0..=rng.below((sent - taken) as u64) {
                if taken < sent {
                    fwd = fwd.wrapping_add(sizes[taken]);
                    taken += 1;
                }
            }
            // The engine asks a Linux peer that sends no updates for small packets.
            r.wait();
            assert_eq!(r.ops(), [(Op::CreditRequest, 9)]);
            r.credit(9, 256 << 10, fwd);
            // A group counts until its last packet is taken.
            if sent - taken > limit - limit / 4 {
                fwd = sizes.iter().fold(0, |a: u32, &n| a.wrapping_add(n));
                taken = sent;
                r.credit(9, 256 << 10, fwd);
            }
        }
    }
    assert!(fullest >= limit - limit / 8, "{fullest} of {limit}");
}

#[test]
fn idle_stream_is_small() {
    assert!(size_of::<crate::stream::Stream>() + 3 * 12 + 16 + 3 * 16 < 512);
}
