//! Our ring as a contender: polling and sleeping; alone, in batches, with several lanes.

use std::time::{Duration, Instant};

use adit_benches::duel::{self, Ends, Home, RING, Receive1, Send1, check, stamp};
use adit_ringbuf::region::{Features, Spec};
use adit_ringbuf::session::{self, Event, Guest, Host};
use adit_ringbuf::{Consumer, Geometry, Mapped, Pace, Policy, Producer, Unchecked, Validated};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::attach::Bells;
use adit_ringbuf_io::blocking::{Receiver, Sender};

/// Two mappings of the same memory, one for each side.
fn mappings(bytes: usize) -> [Mapped; 2] {
    let (near, fd) = Mapped::memfd(bytes).expect("memory");
    [near, Mapped::from_memfd(fd, bytes).expect("memory")]
}

struct Polling<P> {
    producer: Producer<Mapped, P>,
    batch: usize,
    waiting: usize,
}

impl<P: Policy> Send1 for Polling<P> {
    fn send(&mut self, message: &[u8]) {
        loop {
            if self.producer.append(message).is_ok() {
                break;
            }
            let _ = self.producer.publish();
            std::hint::spin_loop();
        }
        self.waiting += 1;
        if self.waiting >= self.batch {
            self.finish();
        }
    }

    fn finish(&mut self) {
        self.waiting = 0;
        let _ = self.producer.publish();
    }
}

struct PollingBack<P> {
    consumer: Consumer<Mapped, P>,
    pace: Pace,
}

impl<P: Policy> Receive1 for PollingBack<P> {
    fn receive(&mut self, message: &mut [u8]) {
        loop {
            if let Some(len) = self.consumer.pop(message).expect("an honest producer") {
                assert_eq!(len, message.len());
                self.pace.came(len);
                if self.consumer.wants_release() {
                    let _ = self.consumer.release();
                }
                return;
            }
            let _ = self.consumer.release();
            self.pace.missed();
        }
    }
}

/// Takes up to 32 messages in one call.
struct Drained(PollingBack<Validated>);

impl Receive1 for Drained {
    fn receive(&mut self, message: &mut [u8]) {
        self.0.receive(message);
    }

    fn receive_some(&mut self, message: &mut [u8], take: &mut dyn FnMut(&[u8])) {
        let PollingBack { consumer, pace } = &mut self.0;
        loop {
            let (count, _) = consumer
                .drain(message, 32, &mut *take)
                .expect("an honest producer");
            if count > 0 {
                return pace.came_many(count, count * message.len());
            }
            pace.missed();
        }
    }
}

fn polling_with<P: Policy>(
    size: usize,
    batch: usize,
    align: usize,
) -> (Polling<P>, PollingBack<P>) {
    let geometry = Geometry::alone(size, align);
    let [near, far] = mappings(geometry.bytes());
    let sender = Polling::<P> {
        producer: Producer::with_policy(near, geometry, false).expect("a ring"),
        batch,
        waiting: 0,
    };
    let receiver = PollingBack::<P> {
        consumer: Consumer::with_policy(far, geometry, false).expect("a ring"),
        pace: Pace::default(),
    };
    (sender, receiver)
}

/// Ends that poll all the time.
pub fn polling(size: usize, batch: usize, align: usize) -> Ends {
    let (sender, receiver) = polling_with::<Validated>(size, batch, align);
    (Box::new(sender), Box::new(receiver))
}

/// The same, with a receiver that drains.
pub fn drained(batch: usize) -> Ends {
    let (sender, receiver) = polling_with::<Validated>(RING, batch, 8);
    (Box::new(sender), Box::new(Drained(receiver)))
}

/// The same, without the checks of what the peer wrote.
pub fn unchecked() -> Ends {
    let (sender, receiver) = polling_with::<Unchecked>(RING, 1, 8);
    (Box::new(sender), Box::new(receiver))
}

struct Waiting<T>(T);

impl Send1 for Waiting<Sender<Mapped>> {
    fn send(&mut self, message: &[u8]) {
        self.0.send(message).expect("room in the end");
    }
    fn rings(&self) -> f64 {
        self.0.rings() as f64
    }
}

impl Receive1 for Waiting<Receiver<Mapped>> {
    fn receive(&mut self, message: &mut [u8]) {
        let len = self.0.recv(message).expect("a message in the end");
        assert_eq!(len, message.len());
    }
}

/// Ends that poll for a while, and then sleep.
pub fn waiting(size: usize, align: usize, spin: Spin) -> Ends {
    let geometry = Geometry::alone(size, align);
    let [near, far] = mappings(geometry.bytes());
    let producer = Producer::new(near, geometry, true).expect("a ring");
    let consumer = Consumer::new(far, geometry, true).expect("a ring");
    let bells = Bells::new().expect("doorbells");
    let theirs = bells.try_clone().expect("doorbells");
    let sender = Sender::new(producer, bells.guest_data, bells.host_space, spin);
    let receiver = Receiver::new(consumer, theirs.host_space, theirs.guest_data, spin);
    (Box::new(Waiting(sender)), Box::new(Waiting(receiver)))
}

/// Time that this process spent on a processor.
fn processor_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    let spent = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID);
    spent.expect("a clock").into()
}

/// A message each millisecond, answered at once. Returns the share of a processor that the more expensive side uses, percent.
pub fn rate() -> Vec<f64> {
    const MESSAGES: u32 = 300;
    let spin = Spin::default();
    let ((mut to, mut there), (mut back, mut from)) =
        (waiting(RING, 64, spin), waiting(RING, 64, spin));
    let share = |begin: Instant, before: Duration| {
        (processor_time() - before).as_secs_f64() / begin.elapsed().as_secs_f64() * 100.0
    };
    let (near, far) = duel::run(
        Home::Processes,
        || {
            let (begin, before) = (Instant::now(), processor_time());
            let mut message = [0; 64];
            for n in 0..MESSAGES {
                let due = begin + Duration::from_millis(1) * n;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                to.send(&message);
                from.receive(&mut message);
            }
            vec![share(begin, before)]
        },
        || {
            let (begin, before) = (Instant::now(), processor_time());
            let mut message = [0; 64];
            for _ in 0..MESSAGES {
                there.receive(&mut message);
                back.send(&message);
            }
            vec![share(begin, before)]
        },
    );
    vec![near[0].max(far[0])]
}

/// A region with two lanes and a session. Returns each side's ends of every lane.
fn attached(size: usize) -> [[session::Ends<Mapped>; 2]; 2] {
    let spec = Spec::uniform(2, size);
    let [near, far] = mappings(spec.bytes());
    let mut host = Host::offer(near, spec, 1).expect("a region");
    let mut guest = Guest::find(far, 1, Features::NONE).expect("a region");
    let _ = guest.attach();
    let _ = host.poll();
    let _ = guest.poll().expect("a region");
    let turn = host.poll();
    assert!(matches!(turn.event, Some(Event::Attached { .. })));
    let guest = [0, 1].map(|lane| guest.ends(lane, false).expect("a lane").expect("attached"));
    [
        [0, 1].map(|lane| host.ends(lane, false).expect("a lane")),
        guest,
    ]
}

/// Round trips of 64 bytes on lane 0, while lane 1 is full in both directions and both sides try to send on it, or while lane 1
/// is empty. Median, ns.
pub fn lanes(full: bool) -> Vec<f64> {
    let [[mut to, mut bulk], [mut there, mut stuck]] = attached(RING);
    if full {
        while bulk.producer.try_push(&[1; 4000]).is_ok() {}
        while stuck.producer.try_push(&[1; 4000]).is_ok() {}
    }
    let take = |ends: &mut session::Ends<Mapped>, buf: &mut [u8; 64]| {
        while ends
            .consumer
            .pop(buf)
            .expect("an honest producer")
            .is_none()
        {
            std::hint::spin_loop();
        }
        let _ = ends.consumer.release();
    };
    let (near, _) = duel::run(
        Home::Processes,
        || {
            let mut buf = [0; 64];
            duel::trips(|n| {
                stamp(&mut buf, n);
                let _ = to.producer.try_push(&buf).expect("room");
                if full {
                    assert!(bulk.producer.try_push(&[1; 4000]).is_err());
                }
                take(&mut to, &mut buf);
                check(&buf, n);
            })
        },
        || {
            let mut buf = [0; 64];
            for _ in 0..duel::trip_count() {
                take(&mut there, &mut buf);
                let _ = there.producer.try_push(&buf).expect("room");
                if full {
                    assert!(stuck.producer.try_push(&[1; 4000]).is_err());
                }
            }
            Vec::new()
        },
    );
    near
}

/// Both directions at once; each side sends and receives in turn. Messages per second, of both directions.
pub fn duplex(size: usize) -> Vec<f64> {
    let [[a, _], [b, _]] = attached(RING);
    let side = |mut ends: session::Ends<Mapped>| {
        let count = duel::count(size);
        let (mut sent, mut received) = (0, 0);
        let (mut out, mut inn) = (vec![7; size], vec![0; size]);
        let begin = Instant::now();
        while sent < count || received < count {
            if sent < count {
                stamp(&mut out, sent);
                sent += usize::from(ends.producer.try_push(&out).is_ok());
            }
            match ends.consumer.pop(&mut inn).expect("an honest producer") {
                Some(_) => {
                    check(&inn, received);
                    received += 1;
                    if ends.consumer.wants_release() {
                        let _ = ends.consumer.release();
                    }
                }
                None => {
                    let _ = ends.consumer.release();
                    std::hint::spin_loop();
                }
            }
        }
        vec![count as f64 / begin.elapsed().as_secs_f64()]
    };
    let (near, far) = duel::run(Home::Processes, || side(a), || side(b));
    vec![near[0] + far[0]]
}
