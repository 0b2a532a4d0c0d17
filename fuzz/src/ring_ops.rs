//! Target `ring_ops`: both ends of a ring with calls in any order, compared with a queue; and a peer that overwrites any word of
//! it. After that the ends may fail, but never return a record that was not there, and never access memory outside the ring.
//!
//! Input: size, alignment, wraps, events, then operations.

use std::collections::VecDeque;

use adit_ringbuf::{Armed, Consumer, Geometry, Mapped, Producer, PushError, RingMem};

use crate::input::Input;

const BYTES: usize = 1 << 14;

thread_local! {
    static MEMORY: Mapped = Mapped::anonymous(BYTES).expect("memory");
}

pub fn run(data: &[u8]) {
    MEMORY.with(|memory| {
        memory.zero(0, BYTES);
        play(memory, Input(data));
    });
}

fn play(memory: &Mapped, mut input: Input<'_>) {
    let size = input.pick(&[64, 256, 1024, 4096]);
    let align = if size >= 256 { input.pick(&[8, 64]) } else { 8 };
    let geometry = Geometry::alone(size, align);
    let events = input.flag();
    let mut producer = Producer::new(memory, geometry, events).expect("a ring");
    let mut consumer = Consumer::new(memory, geometry, events).expect("a ring");
    // Records that a correct ring would hold: committed, and published.
    let (mut committed, mut shown) = (VecDeque::new(), VecDeque::new());
    let mut honest = true;
    let mut next = 0u8;
    let mut buf = [0; 4096];
    while !input.is_empty() {
        match input.below(11) {
            0 | 1 => {
                let len = usize::from(input.u16()) % (geometry.record_max + 2);
                next = next.wrapping_add(1);
                let record = vec![next; len];
                let taken = match producer.reserve(len) {
                    Ok(mut grant) => {
                        grant.write(0, &record);
                        // Dropped, so there is no record.
                        input.flag() && {
                            let _ = grant.commit();
                            true
                        }
                    }
                    Err(why) => {
                        assert_eq!(
                            matches!(why, PushError::TooLong { .. }),
                            len > geometry.record_max
                        );
                        assert!(!honest || !matches!(why, PushError::Corrupt(_)));
                        false
                    }
                };
                if taken {
                    committed.push_back(record);
                }
                if producer.unpublished() == 0 {
                    shown.append(&mut committed);
                }
            }
            2 => {
                let _ = producer.publish();
                shown.append(&mut committed);
            }
            3 | 4 => match consumer.pop(&mut buf) {
                Ok(Some(len)) if honest => {
                    let record: Vec<u8> = shown.pop_front().expect("it was shown");
                    assert_eq!(buf[..len], record);
                }
                Ok(Some(len)) => assert!(len <= geometry.record_max),
                Ok(None) => assert!(!honest || shown.is_empty()),
                Err(_) => assert!(!honest),
            },
            5 => {
                let _ = consumer.release();
            }
            6 => {
                let armed = consumer.arm_data();
                let armed = armed.map(|(armed, _)| armed);
                assert!(armed.is_ok() || !honest);
                assert!(!honest || (armed == Ok(Armed::Sleep)) == shown.is_empty());
                let space = producer.arm_space(usize::from(input.u16()));
                shown.append(&mut committed);
                assert!(space.is_ok() || !honest);
            }
            7 => {
                let lens = [(); 2].map(|()| usize::from(input.u16()) % (geometry.record_max + 2));
                next = next.wrapping_add(1);
                if let Some(record) = some(&mut producer, lens, next, &mut input, honest) {
                    committed.push_back(record);
                }
                if producer.unpublished() == 0 {
                    shown.append(&mut committed);
                }
            }
            8 => {
                let at = (usize::from(input.u16()) % geometry.bytes()) & !7;
                memory.store(at, input.u64());
                honest = false;
            }
            9 => {
                let len = usize::from(input.u16()) % (geometry.record_max + 2);
                next = next.wrapping_add(1);
                let record = vec![next; len];
                match producer.append(&record) {
                    Ok(_) => committed.push_back(record),
                    Err(why) => {
                        let too_long = matches!(why, PushError::TooLong { .. });
                        assert_eq!(too_long, len > geometry.record_max);
                        assert!(!honest || !matches!(why, PushError::Corrupt(_)));
                    }
                }
                if producer.unpublished() == 0 {
                    shown.append(&mut committed);
                }
            }
            _ => {
                let limit = input.below(5);
                let due = shown.len().min(limit);
                let drained = consumer.drain(&mut buf, limit, |record| {
                    if honest {
                        assert_eq!(shown.pop_front().as_deref(), Some(record));
                    }
                    assert!(record.len() <= geometry.record_max);
                });
                assert!(!honest || drained.map(|(count, _)| count) == Ok(due));
            }
        }
    }
}

/// Reserves as much as fits, and commits a part of it.
fn some(
    producer: &mut Producer<&Mapped>,
    [least, most]: [usize; 2],
    next: u8,
    input: &mut Input<'_>,
    honest: bool,
) -> Option<Vec<u8>> {
    let max = producer.record_max();
    let mut grant = match producer.reserve_some(least, most) {
        Ok(grant) => grant,
        Err(why) => {
            assert_eq!(matches!(why, PushError::TooLong { .. }), least > max);
            assert!(!honest || !matches!(why, PushError::Corrupt(_)));
            return None;
        }
    };
    assert!((least..=most.max(least)).contains(&grant.len()));
    let used = usize::from(input.u16()) % (grant.len() + 1);
    let record = vec![next; used];
    let spoilt = input.flag();
    if spoilt {
        // Write more than is committed.
        let all = vec![0xff; grant.len()];
        grant.write(0, &all);
    }
    grant.write(0, &record);
    if !spoilt && used == 0 && input.flag() {
        grant.unused();
        return None;
    }
    let _ = grant.commit_first(used, spoilt);
    Some(record)
}
