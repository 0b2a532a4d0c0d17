//! One engine between a peer that sends anything and a shell that calls anything, at any time.

use std::collections::BTreeMap;

use adit_engine::{
    Answer, Disposition, Engine, EngineConfig, Event, How, Kind, Lane, PacketHeader, ResetReason,
    SessionChange, StreamId, Tick,
};
use arbitrary::{Result, Unstructured};

const STREAMS: u32 = 8;
const POOL: u64 = 4096;
const OPS_MAX: usize = 400;

/// What the shell keeps of a stream: bytes delivered and not consumed.
type Held = BTreeMap<u32, (StreamId, u64)>;

pub fn run(data: &[u8]) {
    let cfg = EngineConfig {
        max_streams: STREAMS,
        pool_bytes: POOL,
        initial_window: 64,
        max_window: 512,
        quantum: 100,
        packet_overhead: 7,
        connect_timeout: 1000,
        shutdown_timeout: 1000,
    };
    let mut e = Engine::new(cfg, 1);
    let mut u = Unstructured::new(data);
    let (mut now, mut held) = (Tick(0), Held::new());
    let _ = e.listen(1, Kind::Stream);
    e.handle_session(now, SessionChange::Attached { epoch: 1 });
    for _ in 0..OPS_MAX {
        if u.is_empty() || op(&mut u, &mut e, &mut now, &mut held).is_err() {
            break;
        }
        events(&mut e, now, &mut held);
        assert!(e.streams() <= STREAMS as usize, "{} streams", e.streams());
        assert!(e.lent() <= POOL, "{} bytes lent", e.lent());
    }
    // Whatever happened: a new session is a clean one.
    e.handle_session(now, SessionChange::Attached { epoch: 2 });
    events(&mut e, now, &mut held);
    assert!(held.is_empty() && e.streams() == 0 && e.lent() == 0);
    assert!(!e.wants_transmit() && e.poll_timeout().is_none());
}

fn op(u: &mut Unstructured<'_>, e: &mut Engine, now: &mut Tick, held: &mut Held) -> Result<()> {
    let nth = u.int_in_range(0..=STREAMS as usize)?;
    let some = held.values().nth(nth).map(|(s, _)| *s);
    match u.int_in_range(0..=15u8)? {
        0..5 => packet(u, e, *now, held)?,
        5 => {
            let lane = if u.arbitrary()? {
                Lane::Control
            } else {
                Lane::Bulk
            };
            if let Ok(s) = e.connect(*now, u.int_in_range(0..=3)?, Kind::Stream, lane) {
                held.insert(s.slot(), (s, 0));
            }
        }
        6 | 7 => {
            if let Some(s) = some {
                e.offer(s, u.arbitrary()?);
            }
        }
        8 | 9 => {
            if let Some((s, n)) = held.values_mut().nth(nth) {
                let all = u32::try_from(*n).unwrap_or(u32::MAX);
                let take = u.int_in_range(0..=all)?;
                *n -= u64::from(take);
                e.consumed(*now, *s, take);
            }
        }
        10 => {
            let how = [How::Send, How::Receive, How::Both][u.int_in_range(0..=2)?];
            if let Some(s) = some {
                e.shutdown(*now, s, how);
            }
        }
        11 => {
            if let Some(s) = some {
                e.reset(*now, s, ResetReason::Local);
            }
        }
        12 | 13 => {
            let capacity = u.int_in_range(0..=300)?;
            transmit(u, e, *now, capacity)?;
        }
        14 => {
            now.0 += u.int_in_range(0..=2000)?;
            e.handle_timeout(*now);
        }
        _ => {
            let change = if u.arbitrary()? {
                SessionChange::Attached {
                    epoch: u.arbitrary()?,
                }
            } else {
                SessionChange::Lost(ResetReason::CarrierFault)
            };
            e.handle_session(*now, change);
        }
    }
    Ok(())
}

fn packet(u: &mut Unstructured<'_>, e: &mut Engine, now: Tick, held: &mut Held) -> Result<()> {
    let port = |u: &mut Unstructured<'_>| -> Result<u32> {
        // Streams that there are, often.
        let live: Vec<_> = held.values().filter_map(|(s, _)| e.ports(*s)).collect();
        match live.get(u.int_in_range(0..=STREAMS as usize * 2)?) {
            Some((_, peer)) => Ok(*peer),
            None => Ok(u32::from(u.int_in_range(0..=9u8)?)),
        }
    };
    let src_port = port(u)?;
    let live = held.values().filter_map(|(s, _)| e.ports(*s));
    let dst = live
        .filter(|(_, peer)| *peer == src_port)
        .map(|(own, _)| own);
    let dst_port = dst.max().unwrap_or(1);
    let len = u.int_in_range(0..=600u32)?;
    let h = PacketHeader {
        src_port,
        dst_port: if u.ratio(1, 8)? {
            u.arbitrary()?
        } else {
            dst_port
        },
        len: if u.ratio(1, 16)? { u.arbitrary()? } else { len },
        kind: if u.ratio(1, 16)? { u.arbitrary()? } else { 1 },
        op: if u.ratio(1, 16)? {
            u.arbitrary()?
        } else {
            u.int_in_range(1..=7)?
        },
        flags: if u.ratio(1, 4)? {
            u.int_in_range(0..=5)?
        } else {
            0
        },
        buf_alloc: if u.ratio(1, 8)? { u.arbitrary()? } else { 1000 },
        fwd_cnt: if u.ratio(1, 4)? { u.arbitrary()? } else { 0 },
    };
    let body = if u.ratio(1, 16)? {
        u.int_in_range(0..=600)?
    } else {
        len
    };
    if let Disposition::Deliver { stream, len } = e.handle_packet(now, &h, body) {
        assert!(len > 0 && len <= body, "{len} bytes of {body}");
        let (id, n) = held
            .get_mut(&stream.slot())
            .expect("a stream that was told of");
        assert_eq!(*id, stream);
        *n += u64::from(len);
        assert!(*n <= POOL, "{n} bytes beyond every window");
    }
    Ok(())
}

fn transmit(u: &mut Unstructured<'_>, e: &mut Engine, now: Tick, capacity: u32) -> Result<()> {
    for _ in 0..64 {
        let wanted = e.wants_transmit();
        let Some(t) = e.poll_transmit(now, capacity) else {
            break;
        };
        assert!(wanted, "something to send, but it said that there was not");
        if let Some((s, len)) = t.body {
            assert!(
                len > 0 && len <= capacity,
                "{len} bytes in a slot of {capacity}"
            );
            let n = u.int_in_range(0..=len)?;
            if n == 0 {
                e.offer(s, 0);
            } else {
                e.commit_body(now, s, n);
            }
        }
    }
    Ok(())
}

fn events(e: &mut Engine, now: Tick, held: &mut Held) {
    while let Some(event) = e.poll_event() {
        match event {
            Event::Incoming { stream, .. } => {
                assert!(held.insert(stream.slot(), (stream, 0)).is_none());
                let odd = stream.generation() % 4 == 3;
                e.answer(
                    now,
                    stream,
                    if odd { Answer::Refuse } else { Answer::Accept },
                );
            }
            Event::Closed { stream, reason } => {
                let (id, n) = held.remove(&stream.slot()).expect("closed once");
                assert_eq!(id, stream);
                assert!(reason.is_some() || n == 0, "ended in order over {n} bytes");
            }
            Event::Connected { .. } | Event::Writable { .. } | Event::PeerShutdown { .. } => {}
        }
    }
}
