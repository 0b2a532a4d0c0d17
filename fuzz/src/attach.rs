//! Target `attach`: a region's head and both sides' state words, which each side can overwrite at will. Two sides attach, restart,
//! close and poison in any order, and words of any value overwrite theirs in between.
//!
//! Input: lanes, sizes, alignment; then operations. Without overwriting, both sides reach the same epoch and exchange a record.

use adit_ringbuf::region::{Features, Lane, Region, Spec};
use adit_ringbuf::session::{Event, Guest, Host, State};
use adit_ringbuf::{Mapped, RingMem, Wake};

use crate::input::Input;

const BYTES: usize = 12288 + 8 * 8192;

thread_local! {
    static MEMORY: Mapped = Mapped::anonymous(BYTES).expect("memory");
}

pub fn run(data: &[u8]) {
    MEMORY.with(|memory| {
        memory.zero(0, 12288 + 4096);
        play(memory, Input(data));
    });
}

fn play(memory: &Mapped, mut input: Input<'_>) {
    let lanes: Vec<Lane> = (0..=input.below(4))
        .map(|_| Lane {
            to_guest: input.pick(&[4096, 8192]),
            to_host: input.pick(&[4096, 8192]),
        })
        .collect();
    let mut spec = Spec::new(&lanes);
    spec.align = input.pick(&[8, 64]);
    let Ok(mut host) = Host::offer(memory, spec, input.u64() >> 1) else {
        panic!("a region that fits");
    };
    let mut guest = Guest::find(memory, input.u64(), Features::NONE).expect("it was just made");
    while !input.is_empty() {
        let (before, said) = (host.state(), memory.load(8192));
        match input.below(8) {
            0 => drop(guest.attach()),
            1 | 2 => {
                let turn = host.poll();
                if let Some(Event::Attached { epoch, .. }) = turn.event {
                    assert_eq!((before, said & 0xff), (State::Ready, State::Run as u64));
                    assert_eq!(epoch, host.region().epoch());
                    for lane in 0..lanes.len() {
                        host.ends(lane, true).expect("it fits");
                    }
                }
            }
            3 | 4 => {
                let was = guest.state();
                if let Ok(turn) = guest.poll()
                    && let Some(Event::Attached { .. }) = turn.event
                {
                    assert_eq!(was, State::Want);
                    let lanes = guest.region().map_or(0, |r| r.spec().lanes().len());
                    for lane in 0..lanes {
                        guest
                            .ends(lane, true)
                            .expect("it was checked")
                            .expect("attached");
                    }
                }
            }
            5 => match input.below(4) {
                0 => drop(host.close()),
                1 => drop(host.poison()),
                2 => drop(guest.close()),
                _ => drop(guest.poison()),
            },
            6 => {
                // Overwrite the head, the state words, or the words of the lanes.
                let page = input.pick(&[0, 4096, 8192]);
                let at = page + ((usize::from(input.u16()) % 2048) & !7);
                memory.store(at, input.u64());
                let _ = Region::read(memory);
            }
            _ => {
                let at = input.pick(&[4096, 8192]);
                let word = memory.load(at);
                memory.store(at, word ^ 1 << input.below(64));
            }
        }
    }
    settle(memory, spec, host.region().epoch());
}

/// Whatever happened before: two new sides reach a session.
fn settle(memory: &Mapped, spec: Spec, epoch: u64) {
    let mut host = Host::offer(memory, spec, epoch + 1).expect("it fitted before");
    let mut guest = Guest::find(memory, 77 << 8, Features::NONE).expect("just made");
    let _ = guest.attach();
    let _ = host.poll();
    let attached = |event| matches!(event, Some(Event::Attached { .. }));
    assert!(attached(guest.poll().expect("just made").event));
    assert!(attached(host.poll().event));
    let mut to = host.ends(0, false).expect("it fits").producer;
    let there = guest.ends(0, false).expect("it fits");
    let mut from = there.expect("attached").consumer;
    let mut buf = [0; 8];
    assert_eq!(to.try_push(b"a record"), Ok(Wake::No));
    assert_eq!(from.pop(&mut buf), Ok(Some(8)));
    assert_eq!((&buf, from.pop(&mut [])), (b"a record", Ok(None)));
}
