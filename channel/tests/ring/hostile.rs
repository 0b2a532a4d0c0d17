//! A peer that writes anything into the region (ATTACKS R1 to R11, through the carrier). The session and its streams
//! end, and the next session begins within a second. Another VM on the same shard keeps echoing all the time.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use adit_channel::dial::{DialError, DialRequest};
use adit_channel::port::Notice;
use adit_channel::shard::{News, Shard};
use adit_engine::PACKET_HEADER_BYTES;
use adit_engine::{EngineConfig, Lane, ResetReason};
use adit_ringbuf::region::Side;
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::doorbell::Doorbell;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use crate::world::{End, LONG, Region, SOON, Shared, dial, echo, pattern, serve, shard};

const PORT: u32 = 741;

/// Offsets of what the guest writes: the records of each lane to the host, and the words.
struct Places {
    /// Offset of the first record header of each lane.
    data: [usize; 2],
    /// Offset of the guest's position in the records that the host writes.
    cons: [usize; 2],
}

fn places(mem: &impl RingMem) -> Places {
    let region = adit_ringbuf::region::Region::read(mem).expect("a region");
    Places {
        data: [0, 1].map(|lane| region.geometry(lane, Side::Host, false, false).data),
        cons: [0, 1].map(|lane| region.geometry(lane, Side::Guest, false, false).cons),
    }
}

/// Breaks the region during a session. Checks that the session is torn and a new one begins.
fn broken_by(what: &str, lie: impl Fn(&Mapped, &Places)) {
    let region = Region::new();
    let shared = Shared::spawn(&region);
    let host = &shared.end;
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    let old = host.dial(PORT);
    let begin = Instant::now();
    let mem = region.map();
    lie(&mem, &places(&mem));
    // Anything that makes the host poll.
    let _ = region.bells.host_data.ring();
    let _ = region.bells.host_space.ring();
    old.set_deadline(Some(Instant::now() + LONG));
    let _ = (&old).read(&mut [0; 1]);
    let reason = old.reason();
    assert!(
        matches!(reason, Some(ResetReason::CarrierFault | ResetReason::Epoch)),
        "{what}: {reason:?}"
    );
    let stream = host.dial(PORT);
    drop(stream);
    let took = begin.elapsed();
    assert!(took < SOON, "{what}: {took:?}");
    shared.assert_other_vm_works(what);
}

/// The next record header of a lane: the first word that is zero. Records start at whole cache lines.
fn next_header(mem: &Mapped, data: usize) -> usize {
    let mut at = data;
    loop {
        let word = mem.load(at);
        if word == 0 {
            return at;
        }
        let len = (word & 0x7fff_ffff) as usize;
        at += (8 + len).next_multiple_of(64);
    }
}

const COMMITTED: u64 = 1 << 31;

#[test]
fn r6_a_record_longer_than_allowed_ends_the_session() {
    broken_by("length", |mem, at| {
        mem.store(next_header(mem, at.data[1]), COMMITTED | 0x7fff_ffff);
    });
}

#[test]
fn r6_a_record_header_with_reserved_bits_ends_the_session() {
    broken_by("bits", |mem, at| {
        mem.store(next_header(mem, at.data[1]), 1 << 50 | COMMITTED | 24);
    });
}

#[test]
fn r6_a_record_without_the_committed_bit_ends_the_session() {
    broken_by("uncommitted", |mem, at| {
        mem.store(next_header(mem, at.data[0]), 24);
    });
}

#[test]
fn r4_a_pad_with_a_wrong_end_ends_the_session() {
    broken_by("pad", |mem, at| {
        mem.store(next_header(mem, at.data[1]), 1 << 32 | COMMITTED | 64);
    });
}

#[test]
fn r5_a_record_shorter_than_a_packet_header_ends_the_session() {
    for len in [0, 1, PACKET_HEADER_BYTES as u64 - 1] {
        broken_by("short", |mem, at| {
            mem.store(next_header(mem, at.data[1]), COMMITTED | len);
        });
    }
}

#[test]
fn r7_an_invalid_state_word_ends_the_session() {
    broken_by("state", |mem, _| mem.store(2 * 4096, u64::MAX));
}

#[test]
fn r7_a_state_word_of_another_session_ends_the_session() {
    broken_by("request", |mem, _| mem.store(2 * 4096, 0x1234_5604));
}

/// Writes a wrong consumer position again and again while the host writes. The host checks it when it runs out of
/// room.
fn broken_by_position(what: &str, lie: impl Fn(u64) -> u64 + Send + 'static) {
    let region = Region::new();
    let shared = Shared::spawn(&region);
    let host = &shared.end;
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), |mut stream| {
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let old = host.dial(PORT);
    // By then the host has loaded the correct position.
    let chunk = vec![1; 1 << 16];
    (0..64).for_each(|_| (&old).write_all(&chunk).expect("room"));
    let mem = region.map();
    let at = places(&mem).cons[1];
    let over = Arc::new(AtomicBool::new(false));
    let liar = {
        let over = over.clone();
        std::thread::spawn(move || {
            while !over.load(Ordering::SeqCst) {
                mem.store(at, lie(mem.load(at)));
                std::thread::yield_now();
            }
        })
    };
    old.set_deadline(Some(Instant::now() + LONG));
    while (&old).write(&chunk).is_ok() {}
    let reason = old.reason();
    over.store(true, Ordering::SeqCst);
    liar.join().expect("no panic");
    assert!(
        matches!(reason, Some(ResetReason::CarrierFault | ResetReason::Epoch)),
        "{what}: {reason:?}"
    );
    let begin = Instant::now();
    drop(host.dial(PORT));
    assert!(begin.elapsed() < SOON, "{what}");
    shared.assert_other_vm_works(what);
}

#[test]
fn r2_a_consumer_position_beyond_what_was_written_ends_the_session() {
    broken_by_position("ahead", |_| u64::MAX / 2);
}

#[test]
fn r3_a_consumer_position_that_decreases_ends_the_session() {
    broken_by_position("back", |_| 8);
}

/// Endless doorbell signals without work. Another VM on the same shard keeps making progress.
#[test]
fn r10_a_doorbell_storm_does_not_stop_another_vm() {
    let (quiet, loud) = (Region::new(), Region::new());
    let mut shard = Shard::new().expect("an epoll set");
    let config = EngineConfig::default();
    let one = shard.add(quiet.host(), config, 1).expect("a port");
    let other = shard.add(loud.host(), config, 2).expect("a port");
    let (one, _other) = (shard.handle(one), shard.handle(other));
    let _thread = shard.spawn("both").expect("a thread");
    let guests = [&quiet, &loud].map(|region| End::spawn(region.guest()));
    serve(guests[0].listen(PORT), echo);
    let over = Arc::new(AtomicBool::new(false));
    let storm = {
        let over = over.clone();
        std::thread::spawn(move || {
            let mut rung = 0u64;
            while !over.load(Ordering::SeqCst) {
                let _ = loud.bells.host_data.ring();
                let _ = loud.bells.host_space.ring();
                rung += 1;
            }
            rung
        })
    };
    let stream = dial(&one, PORT);
    let begin = Instant::now();
    let mut echoes = 0;
    while begin.elapsed() < Duration::from_secs(1) {
        (&stream).write_all(b"on").expect("room");
        (&stream).read_exact(&mut [0; 2]).expect("an answer");
        echoes += 1;
    }
    over.store(true, Ordering::SeqCst);
    let rung = storm.join().expect("no panic");
    assert!(rung > 1000 && echoes > 200, "{echoes} echoes, {rung} rings");
}

/// A doorbell that is always signalled is handled only some times per second after it was fruitless. Records that
/// arrive meanwhile are delivered.
#[test]
fn r10_an_always_signalled_doorbell_causes_few_wakeups_a_second() {
    let mut region = Region::new();
    // Each read takes one signal, and there are more signals than a test lasts.
    let endless = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC | EFD_SEMAPHORE).expect("an eventfd");
    region.bells.host_space = endless;
    let (mut host, at) = shard(region.host());
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    while host.port(at).epoch().is_none() {
        host.turn(Some(LONG)).expect("a turn");
    }
    region.bells.host_space.write(1 << 60).expect("room");
    let awake = |host: &mut Shard<_>| {
        let (begin, before) = (Instant::now(), host.wakeups());
        while begin.elapsed() < Duration::from_secs(1) {
            host.turn(Some(Duration::from_secs(1))).expect("a turn");
            while host.poll_news().is_some() {}
        }
        host.wakeups() - before
    };
    // Some wake-ups at the start, and then two per pause: its end, and the next signal.
    let woke = awake(&mut host);
    let counters = host.port(at).counters();
    assert!(woke < 200, "{woke} wake-ups in a second, {counters:?}");
    assert!(counters.mutes > 0, "{counters:?}");
    // A whole stream passes in spite of the endless signals.
    let handle = host.handle(at);
    let _thread = host.spawn("loud").expect("a thread");
    let stream = dial(&handle, PORT);
    stream.set_deadline(Some(Instant::now() + LONG));
    let sent = pattern(3 << 20, 1);
    let mut got = vec![0; sent.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&sent).expect("room"));
        (&stream).read_exact(&mut got).expect("an answer");
    });
    assert!(got == sent);
}

/// A guest that signals because it has data is handled each time, with any pattern: single messages between which both
/// sides sleep, and as many as the ring takes.
#[test]
fn r10_a_correct_guest_is_never_muted() {
    let region = Region::new();
    let (mut host, at) = shard(region.host());
    let handle = host.handle(at);
    let over = Arc::new(AtomicBool::new(false));
    let ends = over.clone();
    let turning = std::thread::spawn(move || {
        while !ends.load(Ordering::SeqCst) {
            host.turn(Some(Duration::from_millis(10))).expect("a turn");
            while host.poll_news().is_some() {}
        }
        host.port(at).counters()
    });
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    let stream = dial(&handle, PORT);
    stream.set_deadline(Some(Instant::now() + 3 * LONG));
    for n in 0..1000u64 {
        (&stream).write_all(&n.to_le_bytes()).expect("room");
        (&stream).read_exact(&mut [0; 8]).expect("an answer");
        // The first messages follow each other without a pause.
        std::thread::sleep(Duration::from_micros(n.saturating_sub(500) * 37 % 300));
    }
    let sent = pattern(16 << 20, 1);
    let mut got = vec![0; sent.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&sent).expect("room"));
        (&stream).read_exact(&mut got).expect("an answer");
    });
    assert!(got == sent);
    over.store(true, Ordering::SeqCst);
    let counters = turning.join().expect("no panic");
    println!("{counters:?}");
    assert_eq!(counters.mutes, 0, "{counters:?}");
}

/// A guest that attaches and then does nothing: a dial to it fails in time, and no thread spins.
#[test]
fn r11_a_guest_that_never_takes_a_record_causes_no_hang_and_no_spin() {
    let region = Region::new();
    let (mut host, at) = shard(region.host());
    let guest = region.guest();
    let (mut there, _) = shard(guest);
    for _ in 0..20 {
        host.turn(Some(Duration::ZERO)).expect("a turn");
        there.turn(Some(Duration::ZERO)).expect("a turn");
    }
    while host.poll_news().is_some() {}
    assert!(host.port(at).epoch().is_some());
    let request = DialRequest {
        port: PORT,
        hello: None,
        deadline: None,
        lane: Lane::Control,
    };
    let now = host.now();
    let dialled = host
        .port_mut(at)
        .dial(now, request, None)
        .expect("a session");
    let (begin, before) = (Instant::now(), host.wakeups());
    let error = loop {
        host.turn(None).expect("a turn");
        match host.poll_news() {
            Some(News::Notice(_, Notice::DialFailed { stream, error })) if stream == dialled => {
                break error;
            }
            _ => assert!(begin.elapsed() < LONG, "it hangs"),
        }
    };
    assert_eq!(error, DialError::Timeout);
    let woke = host.wakeups() - before;
    assert!(woke < 20, "{woke} wake-ups in {:?}", begin.elapsed());
}

/// For a while random words are written over everything that the guest may write. No panic, no hang, and then a new
/// session.
#[test]
fn r1_a_guest_that_rewrites_everything_ends_only_its_session() {
    let region = Region::new();
    let shared = Shared::spawn(&region);
    let host = &shared.end;
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    drop(host.dial(PORT));
    let mem = region.map();
    let at = places(&mem);
    let until = Instant::now() + Duration::from_secs(1);
    let storm = std::thread::spawn(move || {
        let mut noise = 1u64;
        while Instant::now() < until {
            for _ in 0..64 {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let word = noise >> 33;
                let place = match word % 5 {
                    0 => 2 * 4096,
                    1 => 2 * 4096 + 8 * ((word >> 8) as usize % 500),
                    2 => at.data[1] + 8 * ((word >> 8) as usize % 1000),
                    3 => at.data[0] + 8 * ((word >> 8) as usize % 1000),
                    _ => at.cons[0],
                };
                let value = if word & 64 == 0 {
                    word
                } else {
                    COMMITTED | (word % 100)
                };
                mem.store(place, value);
            }
            let _ = region.bells.host_data.ring();
            std::thread::sleep(Duration::from_micros(50));
        }
        region
    });
    while !storm.is_finished() {
        if let Ok(stream) = host.try_dial(PORT) {
            let _ = (&stream).write(&[1; 4096]);
        }
    }
    let region = storm.join().expect("no panic");
    // Random words also changed the memory of the guest's own end, so start it again.
    drop(guest);
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    let mut stream = host.dial(PORT);
    stream.write_all(b"well?").expect("room");
    let mut buf = [0; 5];
    stream.read_exact(&mut buf).expect("an answer");
    shared.assert_other_vm_works("rewritten");
}

/// What a sleeping guest has asked is taken away with the pages of both sides. It hears the next dial all the same.
#[test]
fn r13_a_guest_whose_wish_to_be_woken_is_taken_away_hears_the_next_dial() {
    let region = Region::new();
    let shared = Shared::spawn(&region);
    let host = &shared.end;
    let guest = End::spawn(region.guest());
    serve(guest.listen(PORT), echo);
    let mut old = host.dial(PORT);
    old.write_all(b"on").expect("room");
    old.read_exact(&mut [0; 2]).expect("an answer");
    let mem = region.map();
    let wishes = [0, 1].map(|lane| 2 * 4096 + 128 * (3 + 3 * lane));
    let until = Instant::now() + LONG;
    while wishes.iter().any(|&at| mem.load(at) == 0) {
        assert!(Instant::now() < until, "it does not sleep");
        std::thread::yield_now();
    }
    (4096..3 * 4096).step_by(8).for_each(|at| mem.store(at, 0));
    let begin = Instant::now();
    drop(host.dial(PORT));
    assert!(begin.elapsed() < LONG);
    old.set_deadline(Some(Instant::now() + LONG));
    old.read_exact(&mut [0]).expect_err("its session is over");
    shared.assert_other_vm_works("pages taken away");
}
