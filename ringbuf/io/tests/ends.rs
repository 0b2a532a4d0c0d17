//! Ends that sleep: no record is lost, no wake-up is missed, and a peer that does nothing costs little.

use std::time::{Duration, Instant};

use adit_ringbuf::region::{Features, Spec};
use adit_ringbuf::session::{Ends, Event, Guest, Host};
use adit_ringbuf::{Mapped, Wake};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::attach::Bells;
use adit_ringbuf_io::blocking::{Error, Receiver, Sender};
use adit_ringbuf_io::doorbell::{Doorbell, Polled, Waiter, event_fd};

/// Two attached sides, each with its own mapping; one lane.
fn attached(size: usize) -> (Ends<Mapped>, Ends<Mapped>) {
    let spec = Spec::uniform(1, size);
    let (near, fd) = Mapped::memfd(spec.bytes()).unwrap();
    let far = Mapped::from_memfd(fd, spec.bytes()).unwrap();
    let mut host = Host::offer(near, spec, 1).unwrap();
    let mut guest = Guest::find(far, 1, Features::NONE).unwrap();
    assert_eq!(guest.attach(), Wake::Yes);
    let _ = host.poll();
    assert!(matches!(
        guest.poll().unwrap().event,
        Some(Event::Attached { .. })
    ));
    assert!(matches!(host.poll().event, Some(Event::Attached { .. })));
    let there = guest.ends(0, true).unwrap().unwrap();
    (host.ends(0, true).unwrap(), there)
}

fn spins() -> [Spin; 2] {
    [Spin::new(Duration::ZERO), Spin::default()]
}

#[test]
fn a_stream_of_records_of_all_lengths_arrives_whole() {
    for spin in spins() {
        let (host, guest) = attached(16 << 10);
        let bells = Bells::new().unwrap();
        let theirs = bells.try_clone().unwrap();
        let mut sender = Sender::new(host.producer, bells.guest_data, bells.host_space, spin);
        let mut receiver =
            Receiver::new(guest.consumer, theirs.host_space, theirs.guest_data, spin);
        let count = 200_000usize;
        let record = |n: usize| [n as u8; 1500][..n * 7 % 1500].to_vec();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for n in 0..count {
                    // Alternates between single records and batches.
                    match n / 1000 % 2 {
                        0 => sender.send(&record(n)).unwrap(),
                        _ => sender.queue(&record(n)).unwrap(),
                    }
                    if n % 32 == 0 {
                        sender.flush().unwrap();
                    }
                }
                sender.flush().unwrap();
            });
            let (mut buf, mut n) = ([0; 1500], 0);
            while n < count {
                // Alternates between single records and as many as there are.
                if n / 100 % 2 == 0 {
                    let len = receiver.recv(&mut buf).unwrap();
                    assert_eq!(buf[..len], record(n), "record {n}");
                    n += 1;
                    continue;
                }
                let (limit, first) = ((1 + n % 40).min(count - n), n);
                let drained = receiver.drain(&mut buf, limit, |bytes| {
                    assert_eq!(bytes, record(n), "record {n}");
                    n += 1;
                });
                assert_eq!(drained.unwrap(), n - first);
                assert!((1..=limit).contains(&(n - first)));
            }
            assert_eq!(receiver.try_drain(&mut buf, 9, |_| {}).unwrap(), 0);
            assert_eq!(receiver.drain(&mut buf, 0, |_| {}).unwrap(), 0);
        });
    }
}

#[test]
fn a_ping_pong_that_sleeps_never_hangs() {
    for spin in spins() {
        let (host, guest) = attached(4096);
        let bells = Bells::new().unwrap();
        let theirs = bells.try_clone().unwrap();
        let mut to = Sender::new(host.producer, bells.guest_data, bells.host_space, spin);
        let mut from = Receiver::new(host.consumer, bells.guest_space, bells.host_data, spin);
        let mut there = Receiver::new(guest.consumer, theirs.host_space, theirs.guest_data, spin);
        let mut back = Sender::new(guest.producer, theirs.host_data, theirs.guest_space, spin);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut buf = [0; 8];
                for _ in 0..20_000 {
                    let len = there.recv(&mut buf).unwrap();
                    back.send(&buf[..len]).unwrap();
                }
            });
            for n in 0..20_000u64 {
                to.send(&n.to_le_bytes()).unwrap();
                let mut buf = [0; 8];
                assert_eq!(from.recv(&mut buf).unwrap(), 8);
                assert_eq!(u64::from_le_bytes(buf), n);
            }
        });
    }
}

#[test]
fn r11_a_peer_that_never_signals_costs_a_timeout_and_little_processor_time() {
    let (host, guest) = attached(4096);
    let [data, space, quiet] = [(); 3].map(|()| event_fd().unwrap());
    let spin = Spin::default();
    let mut sender = Sender::new(host.producer, data, space, spin);
    while sender
        .send_within(&[1; 100], Duration::from_millis(20))
        .is_ok()
    {}
    let limit = Duration::from_millis(300);
    let before = processor_time();
    let begin = Instant::now();
    for _ in 0..3 {
        let full = sender.send_within(&[1; 100], limit);
        assert!(matches!(full, Err(Error::TimedOut)), "{full:?}");
    }
    let mut receiver = Receiver::new(host.consumer, event_fd().unwrap(), quiet, spin);
    let none = receiver.recv_within(&mut [0; 8], limit);
    assert!(matches!(none, Err(Error::TimedOut)), "{none:?}");
    assert!(begin.elapsed() >= 4 * limit);
    let spent = processor_time() - before;
    assert!(spent < limit, "{spent:?} of processor in {:?}", 4 * limit);
    drop(guest);
}

/// Processor time that this thread used.
fn processor_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

/// R10: endless doorbell signals without any data. Each costs one check.
#[test]
fn r10_a_storm_of_doorbells_over_an_empty_ring_is_merged_into_one() {
    let (host, _guest) = attached(4096);
    let bells = Bells::new().unwrap();
    let storm = bells.host_data.try_clone().unwrap();
    for _ in 0..1_000_000 {
        storm.ring().unwrap();
    }
    let mut receiver = Receiver::new(
        host.consumer,
        bells.guest_space,
        bells.host_data,
        Spin::new(Duration::ZERO),
    );
    let none = receiver.recv_within(&mut [0; 8], Duration::from_millis(50));
    assert!(matches!(none, Err(Error::TimedOut)));
    // All signals were merged into one, which was taken.
    assert_eq!(
        storm.read().map_err(|e| e.kind()),
        Err(std::io::ErrorKind::WouldBlock)
    );
    // Signalling a counter at its maximum succeeds and does not block.
    storm.write(u64::MAX - 1).unwrap();
    storm.ring().unwrap();
    storm.clear().unwrap();
}

/// R17: a peer that never sets a wake-up position, because it does not support it. The other side must poll for space.
#[test]
fn r17_without_doorbells_both_sides_poll() {
    let (host, guest) = attached(4096);
    let mut sender = Sender::new(host.producer, Polled, Polled, Spin::default());
    let mut receiver = Receiver::new(guest.consumer, Polled, Polled, Spin::default());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for n in 0..10_000u64 {
                sender.send(&n.to_le_bytes()).unwrap();
            }
        });
        let mut buf = [0; 8];
        for n in 0..10_000u64 {
            assert_eq!(receiver.recv(&mut buf).unwrap(), 8);
            assert_eq!(u64::from_le_bytes(buf), n);
        }
    });
}

#[test]
fn streaming_signals_the_doorbell_rarely() {
    let (host, guest) = attached(1 << 20);
    let bells = Bells::new().unwrap();
    let theirs = bells.try_clone().unwrap();
    let spin = Spin::default();
    let mut sender = Sender::new(host.producer, bells.guest_data, bells.host_space, spin);
    let mut receiver = Receiver::new(guest.consumer, theirs.host_space, theirs.guest_data, spin);
    // All records are written before any is read, so the number of signals does not depend on speed.
    for n in 0..10_000u64 {
        sender.send(&n.to_le_bytes()).unwrap();
    }
    let mut buf = [0; 8];
    for _ in 0..10_000 {
        assert_eq!(receiver.recv(&mut buf).unwrap(), 8);
    }
    assert_eq!((sender.rings(), receiver.rings()), (0, 0), "nobody slept");
}

#[cfg(feature = "tokio")]
mod tokio_ends {
    use super::*;
    use adit_ringbuf_io::asynchronous;

    #[tokio::test]
    async fn tasks_exchange_records_and_sleep() {
        let (host, guest) = attached(4096);
        let bells = Bells::new().unwrap();
        let theirs = bells.try_clone().unwrap();
        let producer = host.producer;
        let mut to =
            asynchronous::Sender::new(producer, bells.guest_data, bells.host_space).unwrap();
        let mut from =
            asynchronous::Receiver::new(guest.consumer, theirs.host_space, theirs.guest_data)
                .unwrap();
        let sending = async {
            for n in 0..50_000u64 {
                to.send(&n.to_le_bytes()).await.unwrap();
                if n % 1000 == 0 {
                    tokio::task::yield_now().await;
                }
            }
        };
        let receiving = async {
            let mut buf = [0; 8];
            let mut n = 0u64;
            while n < 50_000 {
                if n.is_multiple_of(3) {
                    assert_eq!(from.recv(&mut buf).await.unwrap(), 8);
                    assert_eq!(u64::from_le_bytes(buf), n);
                    n += 1;
                    continue;
                }
                let (limit, first) = (50_000 - n as usize, n);
                let drained = from.drain(&mut buf, limit, |bytes| {
                    assert_eq!(bytes, n.to_le_bytes());
                    n += 1;
                });
                let count = drained.await.unwrap();
                assert!(count > 0 && count as u64 == n - first);
            }
            assert_eq!(from.drain(&mut buf, 0, |_| {}).await.unwrap(), 0);
            // The cancelled receive took no record.
            let idle = tokio::time::timeout(Duration::from_millis(10), from.recv(&mut buf));
            assert!(idle.await.is_err());
            let drain = from.drain(&mut buf, 9, |_| panic!("a record"));
            let idle = tokio::time::timeout(Duration::from_millis(10), drain);
            assert!(idle.await.is_err());
        };
        tokio::join!(sending, receiving);
    }
}
