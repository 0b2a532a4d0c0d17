//! Two processes pinned to two processors, and messages between them: the work of every contender in the ring bench.
//!
//! A contender is set up before the fork, and each process gets one end. A contender that lives in one heap (rtrb) runs in two
//! threads instead, which is no disadvantage. Every message is copied in, and copied out into another buffer. Its number is at
//! both ends of it and is checked.
#![allow(unsafe_code)] // fork

use std::io::{Read, Write, pipe};
use std::time::Instant;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

/// Bytes of a ring, ours or a contender's.
pub const RING: usize = 1 << 20;
/// Bytes that one measurement of a bulk size moves.
const BULK: usize = 64 << 20;
/// Most messages of one measurement.
const MESSAGES: usize = 500_000;
/// Longest time of one cell.
const SECONDS_MAX: u32 = 10;
/// Round trips of one measurement.
const TRIPS: usize = 20_000;

/// Sends whole messages; waits for room in its own way.
pub trait Send1: Send {
    /// Copies a message in.
    fn send(&mut self, message: &[u8]);
    /// Publishes messages that were held back.
    fn finish(&mut self) {}
    /// How many doorbells it sent per message, if it counts them.
    fn rings(&self) -> f64 {
        0.0
    }
}

/// Receives whole messages of a size that is known.
pub trait Receive1: Send {
    /// Copies the next message out.
    fn receive(&mut self, message: &mut [u8]);
    /// Copies messages out that are there, at least one, and passes each to `take`.
    fn receive_some(&mut self, message: &mut [u8], take: &mut dyn FnMut(&[u8])) {
        self.receive(message);
        take(message);
    }
}

impl<S: Send1 + ?Sized> Send1 for Box<S> {
    fn send(&mut self, message: &[u8]) {
        (**self).send(message);
    }
    fn finish(&mut self) {
        (**self).finish();
    }
    fn rings(&self) -> f64 {
        (**self).rings()
    }
}

impl<R: Receive1 + ?Sized> Receive1 for Box<R> {
    fn receive(&mut self, message: &mut [u8]) {
        (**self).receive(message);
    }
    fn receive_some(&mut self, message: &mut [u8], take: &mut dyn FnMut(&[u8])) {
        (**self).receive_some(message, take);
    }
}

/// Both ends of a contender's channel.
pub type Ends = (Box<dyn Send1>, Box<dyn Receive1>);

/// Where the ends of a contender run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// Each in its own process.
    Processes,
    /// Each in its own thread.
    Threads,
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    // Fails if this processor is not in our set. Then the figures of all contenders are equally worse.
    let _ = set.set(cpu);
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// Runs `near` on processor 0 and `far` on processor 1. Returns their results.
///
/// # Panics
/// One of them fails.
pub fn run(
    home: Home,
    near: impl FnOnce() -> Vec<f64>,
    far: impl FnOnce() -> Vec<f64> + Send,
) -> (Vec<f64>, Vec<f64>) {
    match home {
        Home::Processes => processes(near, far),
        Home::Threads => std::thread::scope(|scope| {
            let far = scope.spawn(|| {
                pin(1);
                far()
            });
            pin(0);
            let said = near();
            (said, far.join().expect("the far side"))
        }),
    }
}

fn processes(
    near: impl FnOnce() -> Vec<f64>,
    far: impl FnOnce() -> Vec<f64>,
) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut back) = pipe().expect("a pipe");
    nix::unistd::alarm::set(SECONDS_MAX);
    // SAFETY: the bench has one thread, so the child may do everything that its parent may.
    match unsafe { fork() }.expect("a process") {
        ForkResult::Child => {
            // Without a limit, each side would poll for ever once the other one is gone.
            nix::unistd::alarm::set(SECONDS_MAX);
            let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
            drop(out);
            pin(1);
            let said: Vec<u8> = far().iter().flat_map(|v| v.to_le_bytes()).collect();
            let told = back.write_all(&said);
            std::process::exit(i32::from(told.is_err()));
        }
        ForkResult::Parent { child } => {
            drop(back);
            pin(0);
            let said = near();
            let mut bytes = Vec::new();
            out.read_to_end(&mut bytes).expect("what the far side says");
            let status = waitpid(child, None).expect("our child");
            assert!(
                matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)),
                "the far side failed: {status:?}"
            );
            let far = bytes.chunks_exact(8).map(|b| {
                let bytes: [u8; 8] = std::array::from_fn(|n| b[n]);
                f64::from_le_bytes(bytes)
            });
            (said, far.collect())
        }
    }
}

/// How many messages of this size one measurement sends.
pub fn count(size: usize) -> usize {
    (BULK / size).clamp(400, MESSAGES)
}

/// Puts a message's number at both ends of it.
pub fn stamp(message: &mut [u8], n: usize) {
    let end = message.len() - 8;
    message[..8].copy_from_slice(&n.to_le_bytes());
    message[end..].copy_from_slice(&n.to_le_bytes());
}

/// Checks the number at both ends of a message.
///
/// # Panics
/// It is another message.
pub fn check(message: &[u8], n: usize) {
    let end = message.len() - 8;
    let right = message[..8] == n.to_le_bytes() && message[end..] == n.to_le_bytes();
    assert!(right, "message {n} is another one");
}

/// Messages per second after a warm-up, and doorbells per message.
pub fn stream(home: Home, (mut s, mut r): Ends, size: usize) -> [f64; 2] {
    let count = count(size);
    let warm = count / 8;
    let (near, far) = run(
        home,
        || {
            let mut message = vec![7; size];
            for n in 0..count {
                stamp(&mut message, n);
                s.send(&message);
            }
            s.finish();
            vec![s.rings() / count as f64]
        },
        || {
            let mut message = vec![0; size];
            let mut begin = Instant::now();
            let mut n = 0;
            while n < count {
                r.receive_some(&mut message, &mut |message| {
                    check(message, n);
                    if n == warm {
                        begin = Instant::now();
                    }
                    n += 1;
                });
            }
            vec![(count - warm - 1) as f64 / begin.elapsed().as_secs_f64()]
        },
    );
    [far[0], near[0]]
}

/// Median and 99th percentile of a round trip, ns, one clock read in each.
pub fn round_trip(home: Home, there: Ends, back: Ends, size: usize) -> [f64; 2] {
    let ((mut to, mut arrives), (mut answer, mut from)) = (there, back);
    let (near, _) = run(
        home,
        || {
            let mut message = vec![9; size];
            trips(|n| {
                stamp(&mut message, n);
                to.send(&message);
                to.finish();
                from.receive(&mut message);
                check(&message, n);
            })
        },
        || {
            let mut message = vec![0; size];
            for _ in 0..TRIPS {
                arrives.receive(&mut message);
                answer.send(&message);
                answer.finish();
            }
            Vec::new()
        },
    );
    [near[0], near[1]]
}

/// The number of round trips, for a far side that runs by itself.
pub const fn trip_count() -> usize {
    TRIPS
}

/// Makes the round trips. Returns median and 99th percentile, ns.
pub fn trips(mut trip: impl FnMut(usize)) -> Vec<f64> {
    let mut last = Instant::now();
    let mut times: Vec<f64> = (0..TRIPS)
        .map(|n| {
            trip(n);
            let now = Instant::now();
            let took = now - last;
            last = now;
            took.as_nanos() as f64
        })
        .collect();
    warm(&mut times)
}

/// Median and 99th percentile of the second half of the times. In the first half, pages are touched for the first time, and the
/// far side may not be there yet.
pub fn warm(times: &mut [f64]) -> Vec<f64> {
    let half = times.len() / 2;
    let warm = &mut times[half..];
    warm.sort_by(f64::total_cmp);
    vec![warm[warm.len() / 2], warm[warm.len() * 99 / 100]]
}
