//! The recorded pair changes always agree with the table. A successor process depends on them: it resets every open
//! pair.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use super::{Rig, Rng, SERVICE};
use crate::{
    Answer, Engine, EngineConfig, Event, Kind, Lane, Op, PairChange, ResetReason, SessionChange,
    StreamId, Tick,
};

fn follow(e: &mut Engine, pairs: &mut BTreeSet<(u32, u32)>) {
    for change in e.drain_pairs() {
        match change {
            PairChange::Opened {
                local_port,
                peer_port,
            } => assert!(pairs.insert((local_port, peer_port))),
            PairChange::Closed {
                local_port,
                peer_port,
            } => assert!(pairs.remove(&(local_port, peer_port))),
        }
    }
    assert!(pairs.iter().all(|&(l, p)| e.table.contains(l, p)));
    let mapped = (0..e.table.len()).filter(|&slot| e.table[slot].mapped);
    assert_eq!(mapped.count(), pairs.len());
}

#[test]
fn pair_changes_agree_with_the_table_after_any_operation() {
    for seed in 1..=200 {
        let mut rng = Rng(seed);
        let mut rig = Rig::new(EngineConfig {
            max_streams: 24,
            ..EngineConfig::default()
        });
        rig.e.track_pairs();
        let (mut pairs, mut known) = (BTreeSet::new(), Vec::<StreamId>::new());
        for _ in 0..400 {
            rig.now = Tick(rig.now.0 + rng.next() % 200_000_000);
            let port = (rng.next() % 12) as u32;
            let stream = known.get(rng.next() as usize % known.len().max(1)).copied();
            match (rng.next() % 10, stream) {
                (0..=4, _) => {
                    let op = [
                        Op::Request,
                        Op::Request,
                        Op::Response,
                        Op::Rst,
                        Op::Shutdown,
                    ];
                    let mut h = Rig::packet(op[rng.next() as usize % 5], port, SERVICE);
                    h.flags = (rng.next() % 4) as u32 * u32::from(h.op == Op::Shutdown as u16);
                    rig.handle(h);
                }
                (5, _) => {
                    let asked = rig.e.connect(rig.now, port, Kind::Stream, Lane::Bulk);
                    known.extend(asked.ok());
                }
                (6, Some(s)) => rig.e.answer(rig.now, s, Answer::Accept),
                (7, Some(s)) => rig.e.reset(rig.now, s, ResetReason::Local),
                (8, _) => rig.e.handle_timeout(rig.now),
                (_, _) if rng.next().is_multiple_of(40) => {
                    let change = SessionChange::Attached { epoch: 2 };
                    rig.e.handle_session(rig.now, change);
                }
                _ => while rig.e.poll_transmit(rig.now, 4096).is_some() {},
            }
            while let Some(event) = rig.e.poll_event() {
                if let Event::Incoming { stream, .. } = event {
                    known.push(stream);
                }
            }
            follow(&mut rig.e, &mut pairs);
        }
        rig.e
            .handle_session(rig.now, SessionChange::Lost(ResetReason::Epoch));
        while rig.e.poll_event().is_some() {}
        follow(&mut rig.e, &mut pairs);
        // Resets are kept until it is known whether the next session has the same driver.
        let next = match seed % 2 {
            0 => SessionChange::Attached { epoch: 3 },
            _ => SessionChange::Continued { epoch: 3 },
        };
        rig.e.handle_session(rig.now, next);
        while rig.e.poll_transmit(rig.now, 4096).is_some() {}
        follow(&mut rig.e, &mut pairs);
        assert!(pairs.is_empty(), "seed {seed}: {pairs:?}");
    }
}
