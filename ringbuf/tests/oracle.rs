//! Compares the ring with a queue: every short sequence of calls on small rings, and long random sequences.

mod common;

use std::collections::VecDeque;

use adit_ringbuf::{Consumer, Geometry, Mapped, Producer, PushError, Wake};
use common::Noise;

struct Pair {
    producer: Producer<Mapped>,
    consumer: Consumer<Mapped>,
    /// Records that are published and not taken. All bytes of a record are its number.
    shown: VecDeque<Vec<u8>>,
    /// Records that are committed and not published.
    hidden: VecDeque<Vec<u8>>,
    next: u8,
    /// Records are written by `append`, and not by `reserve`, `write` and `commit`.
    appends: bool,
}

impl Pair {
    fn new(size: usize, align: usize) -> Self {
        let geometry = Geometry::alone(size, align);
        let mem = Mapped::anonymous(geometry.bytes()).unwrap();
        Self {
            producer: Producer::new(mem.clone(), geometry, true).unwrap(),
            consumer: Consumer::new(mem, geometry, true).unwrap(),
            shown: VecDeque::new(),
            hidden: VecDeque::new(),
            next: 0,
            appends: false,
        }
    }

    fn record(&mut self, len: usize) -> Vec<u8> {
        self.next = self.next.wrapping_add(1);
        (0..len).map(|i| self.next ^ i as u8).collect()
    }

    fn commit(&mut self, len: usize) -> bool {
        let bytes = self.record(len);
        let written = if self.appends {
            self.producer.append(&bytes).map(drop)
        } else {
            self.producer.reserve(len).map(|mut grant| {
                grant.write(0, &bytes);
                let _ = grant.commit();
            })
        };
        match written {
            Ok(()) => {}
            Err(PushError::Full) => return false,
            Err(e) => panic!("{e}"),
        }
        self.hidden.push_back(bytes);
        if self.producer.unpublished() == 0 {
            self.shown.append(&mut self.hidden);
        }
        true
    }

    /// Reserves as much as there is room for, and uses only the first bytes. More bytes may have been written.
    fn commit_some(&mut self, least: usize, most: usize, used: usize, spoilt: bool) -> bool {
        let bytes = self.record(used);
        // `reserve` of the least alone succeeds exactly when this call does. (A dropped grant would change the start
        // state.)
        let fits = spoilt.then(|| self.producer.reserve(least).is_ok());
        match self.producer.reserve_some(least, most) {
            Ok(mut grant) => {
                assert!((least..=most.max(least)).contains(&grant.len()));
                let used = used.min(grant.len());
                if spoilt {
                    let all = vec![0xff; grant.len()];
                    grant.write(0, &all);
                }
                grant.write(0, &bytes[..used]);
                let _ = grant.commit_first(used, spoilt);
                self.hidden.push_back(bytes[..used].to_vec());
            }
            Err(PushError::Full) => {
                assert_ne!(fits, Some(true));
                return false;
            }
            Err(e) => panic!("{e}"),
        }
        assert_ne!(fits, Some(false));
        if self.producer.unpublished() == 0 {
            self.shown.append(&mut self.hidden);
        }
        true
    }

    fn publish(&mut self) {
        let _ = self.producer.publish();
        self.shown.append(&mut self.hidden);
    }

    fn pop(&mut self) -> bool {
        let mut buf = [0; 4096];
        let got = self.consumer.pop(&mut buf).unwrap();
        let want = self.shown.pop_front();
        assert_eq!(got, want.as_ref().map(Vec::len));
        if let Some(want) = want {
            assert_eq!(buf[..want.len()], want[..]);
        }
        got.is_some()
    }

    fn drain(&mut self, limit: usize) -> usize {
        let shown = &mut self.shown;
        let expected = shown.len().min(limit);
        let take = |bytes: &[u8]| assert_eq!(shown.pop_front().as_deref(), Some(bytes));
        let (count, _) = self.consumer.drain(&mut [0; 4096], limit, take).unwrap();
        assert_eq!(count, expected);
        assert_eq!(self.consumer.unreleased(), 0);
        count
    }

    /// Whatever happened before: all records come out, and then the longest record fits.
    fn finish(mut self) {
        self.publish();
        while self.pop() {}
        let _ = self.consumer.release();
        let max = self.producer.record_max();
        assert!(
            self.commit(max),
            "the longest record fits into an empty ring"
        );
        self.publish();
        assert!(self.pop() && !self.pop());
    }
}

/// Every sequence of five calls on rings of two sizes, with both alignments (R4, R6).
#[test]
fn r04_every_short_sequence_equals_a_queue() {
    for (size, align) in [(64, 8), (128, 8), (256, 64), (512, 64)] {
        let max = Geometry::alone(size, align).record_max;
        let lens = [0, 1, max / 2 + 1, max];
        const CALLS: u32 = 7;
        for sequence in 0..2 * u64::from(CALLS).pow(5) {
            let (mut pair, mut rest) = (Pair::new(size, align), sequence / 2);
            pair.appends = sequence % 2 == 1;
            for _ in 0..5 {
                let call = rest % u64::from(CALLS);
                rest /= u64::from(CALLS);
                match call {
                    0..4 => drop(pair.commit(lens[call as usize])),
                    4 => pair.publish(),
                    5 => drop(pair.pop()),
                    _ => drop(pair.consumer.release()),
                }
            }
            pair.finish();
        }
    }
}

#[test]
fn long_random_runs_equal_a_queue() {
    for seed in 0..40 {
        let mut noise = Noise(seed);
        let align = [8, 64][noise.below(2) as usize];
        let size = (align * 4) << noise.below(6);
        let mut pair = Pair::new(size, align);
        let max = pair.producer.record_max() as u64;
        let (mut pushed, mut popped) = (0, 0);
        for _ in 0..20_000 {
            pair.appends = noise.below(2) == 0;
            match noise.below(9) {
                0..2 => pushed += u32::from(pair.commit(noise.below(max + 1) as usize)),
                2..4 => {
                    let [least, most, used] = [(); 3].map(|()| noise.below(max + 1) as usize);
                    let spoilt = noise.below(4) == 0;
                    pushed += u32::from(pair.commit_some(least, most, used, spoilt));
                }
                4 => pair.publish(),
                5 | 6 => popped += u32::from(pair.pop()),
                7 => popped += pair.drain(noise.below(5) as usize) as u32,
                _ => drop(pair.consumer.release()),
            }
        }
        assert!(
            pushed > 500 && popped > 500,
            "seed {seed}: {pushed} {popped}"
        );
        pair.finish();
    }
}

/// A batch is written over the records of an earlier round. None of those is mistaken for a record of the batch, or for
/// one after it.
#[test]
fn nothing_of_an_earlier_round_follows_a_batch() {
    let geometry = Geometry::alone(4096, 8);
    let memory = Mapped::anonymous(geometry.bytes()).unwrap();
    let mut producer = Producer::new(&memory, geometry, false).unwrap();
    let mut consumer = Consumer::new(&memory, geometry, false).unwrap();
    // Every word of every body is a valid header of a record of 8 bytes.
    let body = [8, 0, 0, 0x80, 0, 0, 0, 0].repeat(9);
    let mut noise = Noise(11);
    for round in 0..2000 {
        let records = 1 + noise.below(8) as usize;
        let lens: Vec<_> = (0..records).map(|_| noise.below(72) as usize).collect();
        for &len in &lens {
            let _ = producer.append(&body[..len]).unwrap();
            assert_eq!(consumer.pop(&mut []), Ok(None), "not published yet");
        }
        let _ = producer.publish();
        let mut taken = Vec::new();
        let drained = consumer.drain(&mut [0; 72], 99, |bytes| taken.push(bytes.len()));
        assert_eq!(drained, Ok((records, Wake::No)), "round {round}");
        assert_eq!(taken, lens);
    }
}

/// Bytes that were written and not committed may be where the header after a shorter record will be.
#[test]
fn a_grant_that_is_dropped_leaves_nothing_behind() {
    let geometry = Geometry::alone(4096, 8);
    let memory = Mapped::anonymous(geometry.bytes()).unwrap();
    let mut producer = Producer::new(&memory, geometry, false).unwrap();
    let mut consumer = Consumer::new(&memory, geometry, false).unwrap();
    let mut buf = [0; 64];
    for n in 0..1000usize {
        producer.reserve(200).unwrap().write(0, &[0xff; 200]);
        let _ = producer.try_push(&[7; 64][..n % 64]).unwrap();
        assert_eq!(consumer.pop(&mut buf), Ok(Some(n % 64)));
        assert_eq!(consumer.pop(&mut buf), Ok(None), "after {n}");
        let _ = consumer.release();
    }
}

#[test]
fn a_drain_takes_all_records_and_releases_once() {
    let geometry = Geometry::alone(4096, 8);
    let memory = Mapped::anonymous(geometry.bytes()).unwrap();
    let mut producer = Producer::new(&memory, geometry, false).unwrap();
    let mut consumer = Consumer::new(&memory, geometry, false).unwrap();
    for n in 0..10u8 {
        let _ = producer.try_push(&[n; 100]).unwrap();
    }
    let (mut buf, mut seen) = ([0; 8], Vec::new());
    let mut take = |bytes: &[u8]| seen.push(bytes.to_vec());
    assert_eq!(consumer.drain(&mut buf, 4, &mut take), Ok((4, Wake::No)));
    assert_eq!(consumer.unreleased(), 0);
    assert_eq!(consumer.drain(&mut buf, 99, &mut take), Ok((6, Wake::No)));
    let expected: Vec<_> = (0..10u8).map(|n| vec![n; 8]).collect();
    assert_eq!(seen, expected, "cut to the buffer");
}
