//! A peer that writes anything, at any time.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use adit_ringbuf::{Consumer, Geometry, Mapped, MemfdError, Producer, PushError, RingMem};
use common::{Noise, Watched};

type Lie = Box<dyn FnMut(usize) -> Option<u64>>;

fn watched(size: usize) -> (Watched<Lie>, Geometry) {
    let geometry = Geometry::alone(size, 8);
    (Watched::new(geometry.bytes()), geometry)
}

/// Each call loads each shared word at most once, so a value that changes between loads has no effect.
#[test]
fn r01_each_call_loads_each_shared_word_at_most_once() {
    let (mem, geometry) = watched(256);
    let mut producer = Producer::new(&mem, geometry, true).unwrap();
    let mut consumer = Consumer::new(&mem, geometry, true).unwrap();
    let once = |what: &str| {
        let mut loads = mem.loads.take();
        let all = loads.len();
        loads.sort_unstable();
        loads.dedup();
        assert_eq!(loads.len(), all, "{what} fetched a word twice");
    };
    for round in 0..200 {
        let _ = producer.try_push(&[round; 40]);
        once("try_push");
        let _ = producer.append(&[round; 3]);
        once("append");
        let _ = producer.reserve(100).map(drop);
        once("reserve");
        let mut buf = [0; 64];
        let _ = consumer.pop(&mut buf).unwrap();
        once("pop");
        let _ = consumer.release();
        once("release");
        if round % 5 == 0 {
            let _ = consumer.drain(&mut buf, 9, |_| {}).unwrap();
            once("drain");
        }
        if round % 7 == 0 {
            while consumer.pop(&mut buf).unwrap().is_some() {}
            mem.loads.take();
            let _ = consumer.arm_data().unwrap();
            // The wake-up word is the caller's own. The header is loaded a second time on purpose.
            once("arm_data");
            let _ = producer.arm_space(50).unwrap();
            once("arm_space");
        }
    }
    // The header changes with every load; the value that was checked is the value that is used.
    let _ = producer.try_push(b"abcdefgh").unwrap();
    let mut fetches = 0;
    let good = 1 << 31 | 8;
    let lie: Lie = Box::new(move |_| {
        fetches += 1;
        Some(if fetches == 1 { good } else { u64::MAX })
    });
    while consumer.pop(&mut [0; 64]).unwrap().is_some() {}
    let _ = producer.try_push(b"abcdefgh").unwrap();
    mem.lie.set(Some(lie));
    let record = consumer.peek().unwrap().unwrap();
    assert_eq!(record.len(), 8);
    let mut buf = [0; 64];
    assert_eq!(record.copy_out(0, &mut buf), 8);
}

/// Pushes until the ring returns an error.
fn fill(producer: &mut Producer<&Watched<Lie>>) -> PushError {
    loop {
        if let Err(e) = producer.try_push(&[2; 60]) {
            return e;
        }
    }
}

#[test]
fn r02_a_consumer_ahead_of_the_published_position_ends_the_ring() {
    for ahead in [
        1,
        8,
        255,
        256,
        257,
        1 << 31,
        u64::from(u32::MAX),
        u64::MAX / 2,
    ] {
        let (mem, geometry) = watched(256);
        let mut producer = Producer::new(&mem, geometry, false).unwrap();
        assert_eq!(fill(&mut producer), PushError::Full);
        // Three records of 72 bytes fit into 256 bytes.
        mem.set(geometry.cons, 3 * 72 + ahead);
        let before = mem.bytes.borrow().clone();
        let end = fill(&mut producer);
        assert!(matches!(end, PushError::Corrupt(_)), "{ahead}: {end}");
        assert_eq!(*mem.bytes.borrow(), before, "nothing more is written");
        // The ring stays broken.
        mem.set(geometry.cons, 72);
        assert_eq!(fill(&mut producer), end);
    }
}

#[test]
fn r03_a_consumer_that_goes_back_ends_the_ring() {
    for back in [1, 8, 72, 1 << 20] {
        let (mem, geometry) = watched(256);
        let mut producer = Producer::new(&mem, geometry, false).unwrap();
        let mut consumer = Consumer::new(&mem, geometry, false).unwrap();
        for _ in 0..20 {
            let _ = producer.try_push(&[1; 60]).unwrap();
            let _ = consumer.pop(&mut [0; 60]).unwrap();
            let _ = consumer.release();
        }
        // The ring is full, so the producer has now loaded the consumer's position.
        assert_eq!(fill(&mut producer), PushError::Full);
        let at = mem.word(geometry.cons);
        mem.set(geometry.cons, at.wrapping_sub(back));
        assert!(
            matches!(fill(&mut producer), PushError::Corrupt(_)),
            "{back}"
        );
        // The consumer's own position is private, so another value in shared memory changes nothing for it.
        assert_eq!(consumer.pop(&mut [0; 60]), Ok(Some(60)));
    }
}

/// Every header value around every limit, at every position of a small ring (R5, R6).
#[test]
fn r06_only_valid_headers_are_accepted() {
    let geometry = Geometry::alone(128, 8);
    let max = geometry.record_max as u64;
    for steps in 0..16u64 {
        for base in [
            0,
            1 << 31,
            1 << 32 | 1 << 31,
            2 << 32 | 1 << 31,
            1 << 40 | 1 << 31,
        ] {
            let lens = (0..=300).chain([max, max + 1, (1 << 31) - 1, (1 << 30) + 8]);
            for len in lens {
                let mem: Watched<Lie> = Watched::new(geometry.bytes());
                let mut producer = Producer::new(&mem, geometry, false).unwrap();
                let mut consumer = Consumer::new(&mem, geometry, false).unwrap();
                for _ in 0..steps {
                    let _ = producer.try_push(&[]).unwrap();
                    let _ = consumer.pop(&mut []).unwrap();
                    let _ = consumer.release();
                }
                let (at, to_end) = (geometry.data + (8 * steps) as usize, 128 - 8 * steps);
                let word = base | len;
                mem.set(at, word);
                let mut buf = [0; 256];
                // `drain` has a check of its own.
                let said = if len % 2 == 0 {
                    consumer.pop(&mut buf)
                } else {
                    let mut found = None;
                    let drained = consumer.drain(&mut buf, 1, |bytes| found = Some(bytes.len()));
                    drained.map(|_| found)
                };
                let data = base == 1 << 31 && len <= max && 8 + len <= to_end;
                if base == 3 << 31 && len + 8 == to_end {
                    // A valid pad: the next record starts at the beginning of the ring.
                    continue;
                }
                match said {
                    Ok(Some(n)) => assert!(data && n as u64 == len, "{word:#x} at {steps}"),
                    Ok(None) => assert!(word == 0, "{word:#x} at {steps}"),
                    Err(_) => assert!(!data && word != 0, "{word:#x} at {steps}"),
                }
            }
        }
    }
}

#[test]
fn r13_memory_that_can_shrink_is_refused() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(c"unsealed", flags).unwrap();
    nix::unistd::ftruncate(&fd, 1 << 20).unwrap();
    let refused = Mapped::from_memfd(fd, 1 << 20);
    assert!(matches!(refused, Err(MemfdError::NotSealed)));
    let (_, fd) = Mapped::memfd(4096).unwrap();
    assert!(matches!(
        Mapped::from_memfd(fd, 8192),
        Err(MemfdError::Short {
            bytes: 4096,
            wanted: 8192
        })
    ));
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    assert!(matches!(
        Mapped::from_memfd(file.into(), 4096),
        Err(MemfdError::NotSealed)
    ));
}

/// No private data of this process is in the padding: the peer sees only zeroes and the records.
#[test]
fn r14_padding_holds_no_private_data() {
    let geometry = Geometry::alone(4096, 64);
    let mem = Mapped::anonymous(geometry.bytes()).unwrap();
    let mut producer = Producer::new(mem.clone(), geometry, false).unwrap();
    for len in 0..50 {
        let _ = producer.try_push(&vec![0xaa; len]);
    }
    let mut bytes = vec![0; geometry.size];
    mem.read(geometry.data, &mut bytes);
    let known = |b: &u8| [0, 0xaa, 0x80].contains(b) || *b < 50;
    assert!(bytes.iter().all(known));
}

/// R5: offsets and lengths at their limits, in every pair. The geometry is refused or correct; no arithmetic
/// overflows.
#[test]
fn r05_offsets_and_lengths_at_their_limits_are_refused_or_exact() {
    let memory = Mapped::anonymous(1 << 16).unwrap();
    let borders = [
        0,
        1,
        2,
        7,
        8,
        9,
        24,
        63,
        64,
        4095,
        4096,
        65_535,
        65_536,
        1 << 30,
        usize::MAX / 8,
        usize::MAX - 7,
        usize::MAX,
    ];
    for data in borders {
        for size in borders {
            for word in borders {
                for wraps in [false, true] {
                    let geometry = Geometry {
                        data,
                        size,
                        cons: word,
                        record_max: 0,
                        wraps,
                        ..Geometry::alone(4096, 8)
                    };
                    let mapped = if wraps { 2 } else { 1 };
                    let fits = size
                        .checked_mul(mapped)
                        .and_then(|n| n.checked_add(data))
                        .is_some_and(|end| end <= 1 << 16);
                    let made = Consumer::new(&memory, geometry, false);
                    assert!(made.is_err() || fits, "{geometry:?}");
                    if let Ok(mut consumer) = made {
                        assert_eq!(consumer.pop(&mut []), Ok(None));
                    }
                }
            }
        }
    }
}

/// R8: every word of the region gets random values, one at a time, for every reader of it. The reader reports an error
/// or continues.
#[test]
fn r08_random_words_give_an_error_or_are_ignored() {
    use adit_ringbuf::region::{Features, Region, Spec};
    use adit_ringbuf::session::{Guest, Host};
    let spec = Spec::uniform(1, 4096);
    let memory = Mapped::anonymous(spec.bytes()).unwrap();
    let mut noise = Noise(3);
    for at in (0..3 * 4096 + 64).step_by(8) {
        for _ in 0..4 {
            let mut host = Host::offer(&memory, spec, 1).unwrap();
            let mut guest = Guest::find(&memory, 9 << 8, Features::NONE).unwrap();
            let _ = guest.attach();
            let _ = host.poll();
            let turn = noise.below(3);
            let word = noise.below(u64::MAX) >> noise.below(64);
            let lie = |now| {
                if now == turn {
                    memory.store(at, word);
                }
            };
            lie(0);
            let _ = Region::read(&memory);
            let _ = guest.poll();
            lie(1);
            let _ = host.poll();
            lie(2);
            let _ = host.poll();
            let _ = guest.poll();
            for mut ends in host
                .ends(0, true)
                .into_iter()
                .chain(guest.ends(0, true).unwrap())
            {
                let _ = ends.producer.try_push(&[1; 9]);
                let _ = ends.consumer.pop(&mut [0; 99]);
                let _ = ends.consumer.arm_data();
                let _ = ends.producer.arm_space(99);
            }
        }
    }
}

/// A peer writes random values everywhere while both ends work. The ends fail only with typed errors.
#[test]
fn a_region_that_is_rewritten_at_random_ends_the_ring_and_nothing_else() {
    let geometry = Geometry::alone(4096, 8);
    let mem = Mapped::anonymous(geometry.bytes()).unwrap();
    let stop = AtomicBool::new(false);
    let mut ends = [0u32; 2];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut noise = Noise(1);
            while !stop.load(Ordering::Relaxed) {
                let at = 8 * noise.below(geometry.bytes() as u64 / 8) as usize;
                let word = noise.below(u64::MAX);
                // Mostly a value that is nearly valid.
                let words = [
                    word,
                    word % 4096,
                    (1 << 31) | (word % 4096),
                    (3 << 31) | (word % 4096),
                    0,
                ];
                mem.store(at, words[noise.below(5) as usize]);
            }
        });
        let mut buf = vec![0; 4096];
        for round in 0..1_000_000u32 {
            if ends[0] > 20 && ends[0] + ends[1] > 500 {
                break;
            }
            let mut producer = Producer::new(mem.clone(), geometry, round % 2 == 0).unwrap();
            let mut consumer = Consumer::new(mem.clone(), geometry, round % 2 == 0).unwrap();
            for i in 0..200 {
                if let Err(PushError::Corrupt(_)) = producer.try_push(&buf[..i % 300]) {
                    ends[0] += 1;
                    break;
                }
                let taken = match i % 2 {
                    0 => consumer.pop(&mut buf).map(drop),
                    _ => consumer.drain(&mut buf, 3, |_| {}).map(drop),
                };
                let end = taken.and_then(|()| {
                    let _ = consumer.release();
                    consumer.arm_data()
                });
                if end.is_err() {
                    ends[1] += 1;
                    break;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        ends[0] > 20 && ends[0] + ends[1] > 500,
        "{ends:?}: the peer did too little"
    );
}

/// Two honest ends on two mappings of the same memory, in two threads that sleep and use the wake-up words.
#[test]
fn a_million_records_arrive_in_order_and_no_wake_up_is_missed() {
    use std::sync::mpsc::sync_channel;
    let geometry = Geometry::alone(1 << 14, 8);
    let (ours, fd) = Mapped::memfd(geometry.bytes()).unwrap();
    let theirs = Mapped::from_memfd(fd, geometry.bytes()).unwrap();
    // The doorbells: two signals count as one.
    let (ring_data, data) = sync_channel::<()>(1);
    let (ring_space, space) = sync_channel::<()>(1);
    const RECORDS: u64 = 1_000_000;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut producer = Producer::new(ours, geometry, true).unwrap();
            let mut noise = Noise(5);
            for n in 0..RECORDS {
                let len = 8 + noise.below(90) as usize;
                let mut bytes = [n as u8; 100];
                bytes[..8].copy_from_slice(&n.to_le_bytes());
                loop {
                    match producer.try_push(&bytes[..len]) {
                        Ok(wake) => {
                            if wake == adit_ringbuf::Wake::Yes {
                                let _ = ring_data.try_send(());
                            }
                            break;
                        }
                        Err(PushError::Full) => {
                            let (armed, wake) = producer.arm_space(len).unwrap();
                            if wake == adit_ringbuf::Wake::Yes {
                                let _ = ring_data.try_send(());
                            }
                            if armed == adit_ringbuf::Armed::Sleep {
                                space.recv().unwrap();
                            }
                        }
                        Err(e) => panic!("{e}"),
                    }
                }
            }
        });
        let mut consumer = Consumer::new(theirs, geometry, true).unwrap();
        let mut noise = Noise(5);
        let mut buf = [0; 100];
        let mut n = 0;
        while n < RECORDS {
            let Some(len) = consumer.pop(&mut buf).unwrap() else {
                let (armed, wake) = consumer.arm_data().unwrap();
                if wake == adit_ringbuf::Wake::Yes {
                    let _ = ring_space.try_send(());
                }
                if armed == adit_ringbuf::Armed::Sleep {
                    data.recv().unwrap();
                }
                continue;
            };
            assert_eq!(len, 8 + noise.below(90) as usize);
            assert_eq!(buf[..8], n.to_le_bytes());
            assert!(buf[8..len].iter().all(|&b| b == n as u8));
            n += 1;
            if n % 16 == 0 && consumer.release() == adit_ringbuf::Wake::Yes {
                let _ = ring_space.try_send(());
            }
        }
    });
}
