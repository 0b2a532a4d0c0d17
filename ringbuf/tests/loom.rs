//! Every interleaving of small rings, as far as loom models memory orderings. (loom does not explore load buffering,
//! so a review must check that peer words are loaded with Acquire.) Twins with a planted bug must fail.

use adit_ringbuf::{Armed, Consumer, Geometry, Producer, PushError, RingMem, Wake};
use loom::sync::Arc;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicU64, Ordering, fence};

const GEOMETRY: Geometry = Geometry {
    data: 32,
    size: 64,
    align: 8,
    cons: 0,
    data_wake_at: 8,
    space_wake_at: 16,
    record_max: 16,
    wraps: false,
};

/// The bug that is planted in the memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// Headers and positions are stored without Release.
    RelaxedPublish,
    /// The fence before the check "does the other side sleep?" is missing.
    NoFence,
}

/// A ring in which one record of 8 bytes is less than the batch that is published at once.
const LARGE: Geometry = Geometry {
    size: 128,
    ..GEOMETRY
};

struct Memory {
    words: Vec<AtomicU64>,
    planted: Planted,
}

#[derive(Clone)]
struct Shared(Arc<Memory>);

impl Shared {
    fn new(planted: Planted, bytes: usize) -> Self {
        let words = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Memory { words, planted }))
    }
}

impl RingMem for Shared {
    fn len(&self) -> usize {
        8 * self.0.words.len()
    }
    fn load(&self, at: usize) -> u64 {
        self.0.words[at / 8].load(Ordering::Acquire)
    }
    fn store(&self, at: usize, word: u64) {
        let order = match self.0.planted {
            Planted::RelaxedPublish => Ordering::Relaxed,
            _ => Ordering::Release,
        };
        self.0.words[at / 8].store(word, order);
    }
    fn store_relaxed(&self, at: usize, word: u64) {
        self.0.words[at / 8].store(word, Ordering::Relaxed);
    }
    fn fence(&self) {
        if self.0.planted != Planted::NoFence {
            fence(Ordering::SeqCst);
        }
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        self.store_relaxed(at, u64::from_le_bytes(word));
    }
    fn zero(&self, at: usize, len: usize) {
        (at..at + len)
            .step_by(8)
            .for_each(|at| self.store_relaxed(at, 0));
    }
    fn read(&self, at: usize, bytes: &mut [u8]) {
        let word = self.0.words[at / 8].load(Ordering::Relaxed).to_le_bytes();
        bytes.copy_from_slice(&word[..bytes.len()]);
    }
}

/// Explores all interleavings. Returns their number, or an error if one of them failed.
fn explore(model: impl Fn() + Sync + Send + 'static) -> Result<usize, ()> {
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = count.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    let run = std::panic::AssertUnwindSafe(|| {
        builder.check(move || {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            model();
        });
    });
    std::panic::catch_unwind(run).map_err(drop)?;
    Ok(count.load(std::sync::atomic::Ordering::Relaxed))
}

fn ends(planted: Planted) -> (Producer<Shared>, Consumer<Shared>) {
    ends_of(planted, GEOMETRY)
}

fn ends_of(planted: Planted, geometry: Geometry) -> (Producer<Shared>, Consumer<Shared>) {
    let mem = Shared::new(planted, geometry.bytes());
    let producer = Producer::new(mem.clone(), geometry, true).unwrap();
    (producer, Consumer::new(mem, geometry, true).unwrap())
}

/// Two records, published in two ways; the reader sees them whole and in order.
fn publish(planted: Planted, batch: bool) {
    let (mut producer, mut consumer) = ends(planted);
    let thread = loom::thread::spawn(move || {
        for n in 1..=2u64 {
            let mut grant = producer.reserve(8).unwrap();
            grant.write(0, &n.to_le_bytes());
            let _ = grant.commit();
            if !batch {
                let _ = producer.publish();
            }
        }
        let _ = producer.publish();
    });
    let mut next = 1u64;
    while next <= 2 {
        let mut buf = [0; 8];
        match consumer.pop(&mut buf).unwrap() {
            None => loom::thread::yield_now(),
            Some(len) => {
                assert_eq!((len, u64::from_le_bytes(buf)), (8, next));
                next += 1;
            }
        }
    }
    thread.join().unwrap();
}

/// As `publish`, with the calls for many records: a batch that is written by `append`, and taken by `drain`.
fn batch(planted: Planted) {
    let (mut producer, mut consumer) = ends_of(planted, LARGE);
    let thread = loom::thread::spawn(move || {
        for n in 1..=2u64 {
            let _ = producer.append(&n.to_le_bytes()).unwrap();
            assert_eq!(producer.unpublished() > 0, n == 1);
        }
        let _ = producer.publish();
    });
    let mut next = 1u64;
    while next <= 2 {
        let (count, _) = consumer
            .drain(&mut [0; 8], 2, |bytes| {
                assert_eq!(bytes, next.to_le_bytes());
                next += 1;
            })
            .unwrap();
        if count == 0 {
            loom::thread::yield_now();
        }
    }
    thread.join().unwrap();
}

/// A batch is written over records of the round before while the consumer drains. It takes each record once.
fn again(planted: Planted) {
    let (mut producer, mut consumer) = ends(planted);
    let _ = producer.try_push(&[9; 8]).unwrap();
    let thread = loom::thread::spawn(move || {
        let mut n = 1u64;
        while n <= 4 {
            match producer.append(&n.to_le_bytes()) {
                Ok(_) => n += 1,
                Err(PushError::Full) => {
                    let _ = producer.publish();
                    loom::thread::yield_now();
                }
                Err(e) => panic!("{e}"),
            }
        }
        let _ = producer.publish();
    });
    let mut next = 0u64;
    while next <= 4 {
        let (count, _) = consumer
            .drain(&mut [0; 8], 4, |bytes| {
                let expected = if next == 0 {
                    [9; 8]
                } else {
                    next.to_le_bytes()
                };
                assert_eq!(bytes, expected);
                next += 1;
            })
            .unwrap();
        if count == 0 {
            loom::thread::yield_now();
        }
    }
    thread.join().unwrap();
}

/// The consumer sleeps when the ring is empty. loom reports a sleeper that nobody wakes as a deadlock.
fn empty(planted: Planted) {
    let (mut producer, mut consumer) = ends(planted);
    let bell = Arc::new(Notify::new());
    let rings = bell.clone();
    let thread = loom::thread::spawn(move || {
        if producer.try_push(&[7; 8]).unwrap() == Wake::Yes {
            rings.notify();
        }
    });
    let mut buf = [0; 8];
    while consumer.pop(&mut buf).unwrap().is_none() {
        if consumer.arm_data().unwrap().0 == Armed::Sleep {
            bell.wait();
        }
    }
    thread.join().unwrap();
}

/// The producer sleeps when its record does not fit.
fn full(planted: Planted) {
    let (mut producer, mut consumer) = ends(planted);
    while producer.try_push(&[7; 8]).is_ok() {}
    let bell = Arc::new(Notify::new());
    let rings = bell.clone();
    let thread = loom::thread::spawn(move || {
        for _ in 0..2 {
            assert_eq!(consumer.pop(&mut [0; 8]), Ok(Some(8)));
            if consumer.release() == Wake::Yes {
                rings.notify();
            }
        }
    });
    while producer.try_push(&[8; 8]) == Err(PushError::Full) {
        if producer.arm_space(8).unwrap().0 == Armed::Sleep {
            bell.wait();
        }
    }
    thread.join().unwrap();
}

#[test]
fn published_records_are_whole_and_in_order() {
    for batch in [false, true] {
        let count = explore(move || publish(Planted::Nothing, batch)).unwrap();
        assert!(count > 30, "{count} interleavings");
        let found = explore(move || publish(Planted::RelaxedPublish, batch));
        assert!(found.is_err(), "a relaxed publish went unnoticed");
    }
}

#[test]
fn a_drained_batch_is_whole_and_in_order() {
    for model in [batch, again] {
        let count = explore(move || model(Planted::Nothing)).unwrap();
        assert!(count > 10, "{count} interleavings");
        let found = explore(move || model(Planted::RelaxedPublish));
        assert!(found.is_err(), "a relaxed publish went unnoticed");
    }
}

#[test]
fn r09_no_consumer_sleeps_while_a_record_is_there() {
    let count = explore(|| empty(Planted::Nothing)).unwrap();
    assert!(count > 30, "{count} interleavings");
    assert!(
        explore(|| empty(Planted::NoFence)).is_err(),
        "a missing fence went unnoticed"
    );
}

#[test]
fn r09_no_producer_sleeps_while_there_is_space() {
    let count = explore(|| full(Planted::Nothing)).unwrap();
    assert!(count > 30, "{count} interleavings");
    assert!(
        explore(|| full(Planted::NoFence)).is_err(),
        "a missing fence went unnoticed"
    );
}

/// The head, the words and the starts of the rings of a region with one lane. Nothing else of the region is accessed.
mod region {
    use std::collections::BTreeMap;

    use adit_ringbuf::region::{Features, Region, Side, Spec};
    use adit_ringbuf::session::{Event, Guest, Host, Lost, State};

    use super::*;

    const HOST_WORD: usize = 4096;
    const GUEST_WORD: usize = 8192;

    /// The bug that is planted in the memory.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Bug {
        Nothing,
        /// State words are stored without Release.
        RelaxedStates,
        /// The host's word never becomes CLOSED.
        CloseNotStored,
    }

    struct Words {
        words: BTreeMap<usize, AtomicU64>,
        bug: Bug,
    }

    #[derive(Clone)]
    struct Sparse(Arc<Words>);

    impl Sparse {
        /// Memory as an earlier session left it: words of that session, and a record that nobody sent in this one.
        fn used(bug: Bug) -> Self {
            let region = Region::new(spec(), 1).unwrap();
            let mut at: Vec<usize> = (0..256).step_by(8).collect();
            at.extend([HOST_WORD, GUEST_WORD, GUEST_WORD + 8]);
            let mut dirty = Vec::new();
            for side in [Side::Guest, Side::Host] {
                let g = region.geometry(0, side, false, false);
                dirty.extend([g.cons, g.data_wake_at, g.space_wake_at, g.data]);
                at.extend([g.data + 8, g.data + 16]);
            }
            let word = |at, value| (at, AtomicU64::new(value));
            let clean = at.into_iter().map(|at| word(at, 0));
            let words = clean.chain(dirty.into_iter().map(|at| word(at, 0x8000_0003)));
            let words = words.collect();
            Self(Arc::new(Words { words, bug }))
        }

        fn word(&self, at: usize) -> &AtomicU64 {
            &self.0.words[&at]
        }
    }

    impl RingMem for Sparse {
        fn len(&self) -> usize {
            spec().bytes()
        }
        fn load(&self, at: usize) -> u64 {
            self.word(at).load(Ordering::Acquire)
        }
        fn store(&self, at: usize, word: u64) {
            let state = at == HOST_WORD || at == GUEST_WORD;
            if self.0.bug == Bug::CloseNotStored && at == HOST_WORD && word & 0xff == 6 {
                return;
            }
            // Only state words publish anything, so only they use Release and Acquire. loom records every store.
            let order = match (state, self.0.bug) {
                (true, Bug::RelaxedStates) => Ordering::Relaxed,
                (true, _) => Ordering::Release,
                (false, _) => Ordering::Relaxed,
            };
            self.word(at).store(word, order);
        }
        fn store_relaxed(&self, at: usize, word: u64) {
            self.word(at).store(word, Ordering::Relaxed);
        }
        fn fence(&self) {
            fence(Ordering::SeqCst);
        }
        fn write(&self, at: usize, bytes: &[u8]) {
            let word = u64::from_le_bytes(bytes.try_into().unwrap());
            self.store_relaxed(at, word);
        }
        fn zero(&self, at: usize, _: usize) {
            self.store_relaxed(at, 0);
        }
        fn read(&self, _: usize, _: &mut [u8]) {}
    }

    fn spec() -> Spec {
        Spec::uniform(1, 4096)
    }

    /// The guest asks while the host offers. Then each finds the other's ring empty, without data of the earlier
    /// session.
    fn attach(bug: Bug) {
        let mem = Sparse::used(bug);
        let mut host = Host::offer(mem.clone(), spec(), 1).unwrap();
        let thread = loom::thread::spawn(move || {
            while !matches!(host.poll().event, Some(Event::Attached { epoch: 2, .. })) {
                loom::thread::yield_now();
            }
            let mut ends = host.ends(0, false).unwrap();
            assert_eq!(ends.consumer.peek().map(|r| r.is_some()), Ok(false));
        });
        let mut guest = Guest::find(mem, 9 << 8, Features::NONE).unwrap();
        let _ = guest.attach();
        while guest.poll().unwrap().event.is_none() {
            loom::thread::yield_now();
        }
        assert_eq!(guest.region().map(Region::epoch), Some(2));
        let mut ends = guest.ends(0, false).unwrap().unwrap();
        assert_eq!(ends.consumer.peek().map(|r| r.is_some()), Ok(false));
        thread.join().unwrap();
    }

    /// Both sides close at once, or one of them does. Both learn of it, each at most once.
    fn close(bug: Bug) {
        let mem = Sparse::used(bug);
        let mut host = Host::offer(mem.clone(), spec(), 1).unwrap();
        let mut guest = Guest::find(mem, 9 << 8, Features::NONE).unwrap();
        let _ = guest.attach();
        let _ = host.poll();
        let _ = guest.poll().unwrap();
        let _ = host.poll();
        assert_eq!((host.state(), guest.state()), (State::Run, State::Run));
        let thread = loom::thread::spawn(move || {
            let _ = host.close();
            assert_eq!(host.poll().event, None);
            host
        });
        let lost = loop {
            if let Some(event) = guest.poll().unwrap().event {
                break event;
            }
            loom::thread::yield_now();
        };
        assert_eq!(lost, Event::Lost(Lost::Closed));
        assert_eq!(guest.poll().unwrap().event, None);
        let mut host = thread.join().unwrap();
        assert_eq!(host.poll().event, None);
        assert_eq!(
            (host.state(), guest.state()),
            (State::Closed, State::Closed)
        );
    }

    #[test]
    fn a_session_starts_without_data_of_the_last_one() {
        let count = explore(|| attach(Bug::Nothing)).unwrap();
        assert!(count > 10, "{count} interleavings");
        assert!(
            explore(|| attach(Bug::RelaxedStates)).is_err(),
            "relaxed states went unnoticed"
        );
    }

    #[test]
    fn a_session_ends_on_both_sides() {
        let count = explore(|| close(Bug::Nothing)).unwrap();
        assert!(count > 5, "{count} interleavings");
        assert!(
            explore(|| close(Bug::CloseNotStored)).is_err(),
            "a missing CLOSED went unnoticed"
        );
    }
}
