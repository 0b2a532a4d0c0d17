//! Two sides of a region that attach, end, restart and write invalid values.

mod common;

use adit_ringbuf::region::{Features, LANES_MAX, Region, RegionError, Side, Spec};
use adit_ringbuf::session::{Ends, Event, Guest, Host, Lost, State};
use adit_ringbuf::{Corrupt, Mapped, RingMem, Wake};

const HOST_WORD: usize = 4096;
const GUEST_WORD: usize = 8192;

struct Both {
    memory: Mapped,
    host: Host<Mapped>,
    guest: Guest<Mapped>,
}

fn spec() -> Spec {
    Spec::uniform(2, 4096)
}

fn offered(spec: Spec) -> Both {
    let (near, fd) = Mapped::memfd(spec.bytes()).unwrap();
    let far = Mapped::from_memfd(fd, spec.bytes()).unwrap();
    let host = Host::offer(near.clone(), spec, 100).unwrap();
    Both {
        memory: near,
        host,
        guest: Guest::find(far, 0x1234_5600, Features::NONE).unwrap(),
    }
}

impl Both {
    /// Polls both sides until nothing happens any more. Returns the events of host and guest.
    fn settle(&mut self) -> (Vec<Event>, Vec<Event>) {
        let (mut host, mut guest) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            let (a, b) = (self.host.poll(), self.guest.poll().unwrap());
            host.extend(a.event);
            guest.extend(b.event);
            if (a.wake, b.wake) == (Wake::No, Wake::No) {
                return (host, guest);
            }
        }
        panic!("the sides never stop: {host:?}, {guest:?}");
    }

    fn attach(&mut self) -> u64 {
        assert_eq!(self.guest.attach(), Wake::Yes);
        let (host, guest) = self.settle();
        assert_eq!(host.last(), guest.last());
        match host.last() {
            Some(&Event::Attached { epoch, .. }) => epoch,
            other => panic!("{other:?}"),
        }
    }

    fn ends(&self, lane: usize) -> (Ends<Mapped>, Ends<Mapped>) {
        let guest = self.guest.ends(lane, true).unwrap().expect("attached");
        (self.host.ends(lane, true).unwrap(), guest)
    }
}

/// One record in each direction arrives, and nothing else is in the rings.
fn exchange((host, guest): &mut (Ends<Mapped>, Ends<Mapped>), n: u8) {
    let mut buf = [0; 64];
    let _ = host.producer.try_push(&[n; 40]).unwrap();
    let _ = guest.producer.try_push(&[n + 1; 24]).unwrap();
    assert_eq!(guest.consumer.pop(&mut buf), Ok(Some(40)));
    assert_eq!(buf[..40], [n; 40]);
    assert_eq!(host.consumer.pop(&mut buf), Ok(Some(24)));
    assert_eq!(buf[..24], [n + 1; 24]);
    assert_eq!(host.consumer.pop(&mut buf), Ok(None));
    assert_eq!(guest.consumer.pop(&mut buf), Ok(None));
    let _ = host.consumer.release().or(guest.consumer.release());
}

#[test]
fn every_lane_carries_records_both_ways() {
    let mut both = offered(Spec::uniform(LANES_MAX, 8192));
    assert_eq!(both.attach(), 101);
    for lane in 0..LANES_MAX {
        let mut ends = both.ends(lane);
        (0..200).for_each(|n| exchange(&mut ends, n));
    }
    assert_eq!(both.host.state(), State::Run);
}

#[test]
fn a_restarted_guest_sees_no_data_of_its_last_session() {
    let mut both = offered(spec());
    let first = both.attach();
    let mut ends = both.ends(0);
    exchange(&mut ends, 1);
    for _ in 0..5 {
        let _ = ends
            .0
            .producer
            .try_push(b"for a guest that is gone")
            .unwrap();
        let _ = ends
            .1
            .producer
            .try_push(b"from a guest that is gone")
            .unwrap();
    }
    drop(ends);
    both.guest = Guest::find(both.memory.clone(), 0x9999_0000, Features::NONE).unwrap();
    let _ = both.guest.attach();
    let (host, guest) = both.settle();
    let attached = Event::Attached {
        epoch: first + 1,
        features: Features::NONE,
    };
    assert_eq!(host, [Event::Lost(Lost::Restarted), attached]);
    assert_eq!(guest, [attached]);
    exchange(&mut both.ends(0), 3);
    exchange(&mut both.ends(1), 5);
}

#[test]
fn a_host_that_restarts_ends_the_session() {
    let mut both = offered(spec());
    both.attach();
    let mut ends = both.ends(1);
    let _ = ends
        .0
        .producer
        .try_push(b"from a host that is gone")
        .unwrap();
    both.host = Host::offer(both.memory.clone(), spec(), 5000).unwrap();
    assert_eq!(both.settle(), (vec![], vec![Event::Lost(Lost::Restarted)]));
    assert_eq!(both.attach(), 5001);
    exchange(&mut both.ends(1), 7);
}

#[test]
fn either_side_closes() {
    let mut both = offered(spec());
    both.attach();
    assert_eq!(both.guest.close(), Wake::Yes);
    assert_eq!(both.settle(), (vec![Event::Lost(Lost::Closed)], vec![]));
    assert_eq!(both.attach(), 102);
    assert_eq!(both.host.close(), Wake::Yes);
    assert_eq!(both.settle(), (vec![], vec![Event::Lost(Lost::Closed)]));
    assert_eq!(both.attach(), 103);
}

#[test]
fn either_side_poisons() {
    let mut both = offered(spec());
    both.attach();
    let _ = both.guest.poison();
    assert_eq!(both.settle(), (vec![Event::Lost(Lost::Poisoned)], vec![]));
    both.attach();
    let _ = both.host.poison();
    assert_eq!(both.settle(), (vec![], vec![Event::Lost(Lost::Poisoned)]));
    assert_eq!(both.attach(), 103);
    exchange(&mut both.ends(0), 9);
}

#[test]
fn another_layout_version_is_refused_with_its_own_error() {
    let both = offered(spec());
    let find = || Guest::find(both.memory.clone(), 1, Features::NONE).map(drop);
    let word = both.memory.load(8);
    both.memory.store(8, word + 1);
    assert_eq!(find(), Err(RegionError::Version { found: 2 }));
    assert!(RegionError::Version { found: 2 }.to_string().contains('2'));
    both.memory.store(8, word);
    both.memory.store(0, 0);
    assert_eq!(find(), Err(RegionError::Magic { found: 0 }));
}

#[test]
fn r15_features_that_were_not_offered_poison_and_later_ones_change_nothing() {
    let mut both = offered(spec());
    let _ = both.guest.attach();
    let _ = both.host.poll();
    let _ = both.guest.poll().unwrap();
    both.memory.store(GUEST_WORD + 8, 1 << 40);
    let lost = Lost::Corrupt(Corrupt {
        what: "features accepted",
        value: 1 << 40,
        limit: 0,
    });
    assert_eq!(both.host.poll().event, Some(Event::Lost(lost)));
    assert_eq!(both.settle().1, [Event::Lost(Lost::Poisoned)]);

    both.attach();
    let mut ends = both.ends(0);
    both.memory.store(GUEST_WORD + 8, u64::MAX);
    both.memory.store(24, u64::MAX);
    assert_eq!(both.settle(), (vec![], vec![]));
    exchange(&mut ends, 11);
    // A second handshake is a new session with a new number.
    let request = both.memory.load(GUEST_WORD) >> 8;
    both.memory
        .store(GUEST_WORD, (request + 9) << 8 | State::Want as u64);
    assert_eq!(both.host.poll().event, Some(Event::Lost(Lost::Restarted)));
}

/// The head is the host's page; what the host writes there during a session has no effect.
#[test]
fn geometry_is_read_once() {
    let mut both = offered(spec());
    both.attach();
    let mut ends = both.ends(1);
    (0..4096)
        .step_by(8)
        .for_each(|at| both.memory.store(at, u64::MAX));
    exchange(&mut ends, 13);
    assert_eq!(both.settle(), (vec![], vec![]));
    assert_eq!(both.guest.region().map(Region::epoch), Some(101));
}

fn word(request: u64, state: u64) -> u64 {
    request << 8 | state
}

/// R7, R8: every state word in every state of this side gives a result and never a panic. Only a RUN that both agreed
/// on starts a session.
#[test]
fn r07_the_host_answers_every_word_in_every_state() {
    for own in [
        State::Offered,
        State::Ready,
        State::Run,
        State::Poisoned,
        State::Closed,
    ] {
        for said in 0..=255 {
            for (request, same) in [(0, false), (77, true), (78, false), (u64::MAX >> 8, false)] {
                let mut both = offered(spec());
                reach(&mut both, own);
                assert_eq!(both.host.state(), own);
                both.memory.store(GUEST_WORD, word(request, said));
                let event = both.host.poll().event;
                let ran = matches!(event, Some(Event::Attached { .. }));
                let runs = own == State::Ready && same && said == State::Run as u64;
                assert_eq!(ran, runs, "{own:?}, guest says {said} of {request}");
                if said > State::Closed as u64 {
                    assert_eq!(both.host.state(), State::Poisoned);
                }
                let wants = said == State::Want as u64 && !same && request != 0;
                if wants {
                    let _ = both.host.poll();
                    assert_eq!(both.host.state(), State::Ready, "{own:?} of {request}");
                }
            }
        }
    }
}

fn reach(both: &mut Both, own: State) {
    let say = |both: &Both, state: State| both.memory.store(GUEST_WORD, word(77, state as u64));
    match own {
        State::Offered => return,
        State::Ready | State::Run | State::Poisoned | State::Closed => say(both, State::Want),
        State::Nothing | State::Want => unreachable!("a host never is"),
    }
    let _ = both.host.poll();
    if own == State::Run {
        say(both, State::Run);
        let _ = both.host.poll();
    }
    let _ = match own {
        State::Poisoned => both.host.poison(),
        State::Closed => both.host.close(),
        _ => Wake::No,
    };
}

#[test]
fn r07_the_guest_answers_every_word_in_every_state() {
    for own in [State::Closed, State::Want, State::Run, State::Poisoned] {
        for said in 0..=255 {
            for near in [true, false] {
                let mut both = offered(spec());
                match own {
                    State::Want => drop(both.guest.attach()),
                    State::Run => drop(both.attach()),
                    State::Poisoned => drop(both.guest.poison()),
                    _ => {}
                }
                assert_eq!(both.guest.state(), own);
                let request = both.memory.load(GUEST_WORD) >> 8;
                let request = if near { request } else { request + 1 };
                both.memory.store(HOST_WORD, word(request, said));
                let event = both.guest.poll().unwrap().event;
                let ran = matches!(event, Some(Event::Attached { .. }));
                assert_eq!(
                    ran,
                    own == State::Want && near && said == State::Ready as u64
                );
                // A word that no host writes ends a running session. Before a session it may be left over from
                // earlier.
                if said > State::Closed as u64 {
                    let ended = own == State::Run;
                    let after = if ended { State::Poisoned } else { own };
                    assert_eq!(both.guest.state(), after);
                }
            }
        }
    }
}

/// A guest that attaches again finds an invalid word that an earlier guest wrote.
#[test]
fn an_invalid_word_is_ignored_until_the_host_answers() {
    let mut both = offered(spec());
    both.attach();
    both.memory.store(HOST_WORD, u64::MAX);
    let _ = both.guest.poll().unwrap();
    assert_eq!(both.guest.state(), State::Poisoned);
    let _ = both.guest.attach();
    // The guest polls several times before the host does.
    for _ in 0..3 {
        assert_eq!(both.guest.poll().unwrap().event, None);
    }
    both.attach();
}

/// Something in the guest's VM overwrites the guest's request before the host has seen it. In every state the host
/// signals the doorbell, and the guest then repeats its request.
#[test]
fn an_overwritten_request_is_repeated() {
    for own in [State::Offered, State::Poisoned, State::Closed] {
        let mut both = offered(spec());
        if own != State::Offered {
            both.attach();
            let _ = match own {
                State::Poisoned => both.host.poison(),
                _ => both.host.close(),
            };
            let _ = both.guest.poll().unwrap();
        }
        assert_eq!(both.host.state(), own);
        for _ in 0..3 {
            let _ = both.guest.attach();
            both.memory.store(GUEST_WORD, u64::MAX);
            assert_eq!(both.host.poll().wake, Wake::Yes);
        }
        both.memory.store(GUEST_WORD, u64::MAX);
        let (host, _) = both.settle();
        let attached = matches!(host.last(), Some(Event::Attached { .. }));
        assert!(attached && both.guest.state() == State::Run, "{own:?}");
    }
}

/// A host that writes invalid ranges into the region just before the guest uses it.
#[test]
fn r16_ranges_that_overlap_overflow_or_end_outside_are_refused() {
    let mut both = offered(spec());
    for entry in (64..192).step_by(8) {
        for lie in [
            0,
            1,
            4095,
            4096 * 5,
            1 << 31,
            1 << 62,
            u64::MAX,
            u64::MAX - 4095,
        ] {
            let _ = both.guest.attach();
            let _ = both.host.poll();
            let was = both.memory.load(entry);
            if was == lie {
                continue;
            }
            both.memory.store(entry, lie);
            assert!(both.guest.poll().is_err(), "{lie:#x} at {entry}");
            assert_eq!(both.guest.state(), State::Poisoned);
            both.memory.store(entry, was);
        }
    }
    both.attach();
    exchange(&mut both.ends(0), 15);
}

#[test]
fn records_cross_the_end_of_the_ring_where_both_map_it_twice() {
    let mut spec = spec();
    spec.features = Features::WRAP;
    let region = Region::new(spec, 1).unwrap();
    let (flat, fd) = Mapped::memfd(spec.bytes()).unwrap();
    let twice = |fd: &std::os::fd::OwnedFd| {
        Mapped::mirrored(fd.try_clone().unwrap(), spec.bytes(), region.rings()).unwrap()
    };
    for guest_wraps in [true, false] {
        let (memory, can) = if guest_wraps {
            (twice(&fd), Features::WRAP)
        } else {
            (flat.clone(), Features::NONE)
        };
        let mut both = Both {
            memory: flat.clone(),
            host: Host::offer(twice(&fd), spec, 1 + u64::from(guest_wraps)).unwrap(),
            guest: Guest::find(memory, 3, can).unwrap(),
        };
        both.attach();
        for lane in 0..2 {
            let wraps = both
                .host
                .region()
                .geometry(lane, Side::Guest, true, guest_wraps);
            assert_eq!(wraps.wraps, guest_wraps);
            let (host, guest) = both.ends(lane);
            let (mut from, mut to) = (host.producer, guest.consumer);
            let (mut buf, mut pads) = ([0; 2048], 0);
            for n in 0..3000usize {
                let record: Vec<u8> = (0..n % 1777).map(|i| (i * 31 + n) as u8).collect();
                let _ = from.try_push(&record).unwrap();
                assert_eq!(to.pop(&mut buf), Ok(Some(record.len())));
                assert_eq!(buf[..record.len()], record);
                pads += to.unreleased() - (record.len() + 8).next_multiple_of(8);
                let _ = to.release();
            }
            assert_eq!(pads == 0, guest_wraps, "{pads} bytes of pads");
        }
    }
}

#[test]
fn guest_memory_holds_a_region() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    let regions = [(GuestAddress(0), 1 << 16), (GuestAddress(1 << 20), 1 << 20)];
    let memory = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
    let at = GuestAddress((1 << 20) + 8192);
    let bytes = spec().bytes();
    let mapped = Mapped::guest_range(&memory, at, bytes).unwrap();
    let mut both = Both {
        memory: mapped.clone(),
        host: Host::offer(mapped.clone(), spec(), 1).unwrap(),
        guest: Guest::find(mapped, 1, Features::NONE).unwrap(),
    };
    both.attach();
    exchange(&mut both.ends(0), 17);
    let magic: u64 = memory.read_obj(at).unwrap();
    assert_eq!(magic, adit_ringbuf::region::MAGIC);
    for (at, bytes) in [
        (1 << 16, 4096),
        ((1 << 16) - 4096, 8192),
        ((1 << 20) + 1, 4096),
        ((2 << 20) - 4096, 8192),
        (u64::MAX, 4096),
    ] {
        assert!(Mapped::guest_range(&memory, GuestAddress(at), bytes).is_err());
    }
}
