//! A separate process rewrites a whole region many times a second, at any moment of a session. Meanwhile the same host
//! serves an honest channel. The test runs for one second; set `ADIT_HOSTILE_SECONDS=30` for longer.

use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use adit_ringbuf::region::{Features, HOST_WORD, Spec};
use adit_ringbuf::session::{Event, Guest, Host, State};
use adit_ringbuf::{Geometry, Mapped, Producer, PushError, RingMem};
use adit_ringbuf_io::Spin;
use adit_ringbuf_io::attach::Bells;
use adit_ringbuf_io::blocking::{Receiver, Sender};

const REGION: &str = "ADIT_HOSTILE_REGION";
/// How long the hostile peer waits for its host, in the turns in which it waits.
const PATIENCE: Duration = Duration::from_millis(20);

fn spec() -> Spec {
    Spec::uniform(2, 4096)
}

struct Noise(u64);

impl Noise {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % n
    }

    fn word(&mut self) -> u64 {
        let any = (self.below(1 << 31) as u64) << 33 | self.below(1 << 31) as u64;
        // Mostly a value that is nearly valid.
        match self.below(6) {
            0 => any,
            1 => any % 4096,
            2 => (1 << 31) | (any % 4096),
            3 => (3 << 31) | (any % 4096),
            4 => (any % 8) | ((any % 4) << 8),
            _ => 0,
        }
    }
}

/// The hostile process. As a test it does nothing, unless the other test started it.
#[test]
fn peer() {
    let Some(path) = std::env::var_os(REGION) else {
        return;
    };
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let memory = Mapped::from_memfd(file.into(), spec().bytes()).unwrap();
    let mut noise = Noise(7);
    loop {
        // It attaches correctly, works for a moment, and then overwrites everything.
        if let Ok(mut guest) = Guest::find(memory.clone(), noise.word() << 8, Features::NONE) {
            let _ = guest.attach();
            // Every second time it gives the host time to run.
            let hurries = noise.below(2) == 0;
            let (begin, turns) = (Instant::now(), noise.below(200));
            for n in 0.. {
                let _ = guest.poll();
                let run = memory.load(HOST_WORD) & 0xff == State::Run as u64;
                if run || n >= turns && (hurries || begin.elapsed() > PATIENCE) {
                    break;
                }
                std::thread::yield_now();
            }
            if let Ok(Some(mut ends)) = guest.ends(noise.below(2), true) {
                for _ in 0..noise.below(50) {
                    let _ = ends.producer.try_push(&[1; 300][..noise.below(300)]);
                    let _ = ends.consumer.pop(&mut [0; 300]);
                }
            }
        }
        for _ in 0..noise.below(3000) {
            let at = 8 * noise.below(spec().bytes() / 8);
            memory.store(at, noise.word());
        }
    }
}

#[test]
fn a_process_that_rewrites_the_region_ends_its_own_sessions_and_nothing_else() {
    let seconds = std::env::var("ADIT_HOSTILE_SECONDS");
    let seconds = seconds.ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let until = Instant::now() + Duration::from_secs(seconds);
    let stop = AtomicBool::new(false);
    let (sessions, lies, honest) = std::thread::scope(|scope| {
        let honest = scope.spawn(|| honest(&stop));
        let said = attacked(until);
        stop.store(true, Ordering::Relaxed);
        (said.0, said.1, honest.join().unwrap())
    });
    println!("{sessions} sessions, {lies} lies found, {honest} honest records");
    assert!(
        sessions > 20 && lies > 10,
        "{sessions} sessions, {lies} lies"
    );
    assert!(honest > 1000, "{honest}");
}

/// Serves the guest at the region. Returns the number of sessions, and how many of them ended because of an invalid
/// value.
fn attacked(until: Instant) -> (u64, u64) {
    let (memory, fd) = Mapped::memfd(spec().bytes()).unwrap();
    let mut epoch = 1;
    let mut host = Host::offer(memory.clone(), spec(), epoch).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "peer"])
        .env(
            REGION,
            format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()),
        )
        // It would look like one more file of tests.
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let (mut sessions, mut lies) = (0, 0);
    let mut offered = Instant::now();
    let mut buf = [0; 4096];
    // On a busy machine the peer rarely runs, so the test waits longer for it.
    let patience = until + Duration::from_secs(60);
    while Instant::now() < until || ((sessions <= 20 || lies <= 10) && Instant::now() < patience) {
        match host.poll().event {
            Some(Event::Attached { .. }) => sessions += 1,
            Some(Event::Lost(_)) | None => {}
        }
        if host.state() != State::Run {
            // The head may be destroyed for good, so the host offers again, as for a guest that never comes back.
            if offered.elapsed() > Duration::from_millis(2) {
                epoch += 1000;
                offered = Instant::now();
                host = Host::offer(memory.clone(), spec(), epoch).unwrap();
            }
            std::thread::yield_now();
            continue;
        }
        let lane = (sessions % 2) as usize;
        let mut ends = host.ends(lane, true).unwrap();
        for n in 0..2000usize {
            let pushed = ends.producer.try_push(&buf[..n % 400]);
            let popped = ends.consumer.pop(&mut buf);
            let armed = ends.consumer.arm_data().map(drop);
            let lie = matches!(pushed, Err(PushError::Corrupt(_)));
            if lie || popped.is_err() || armed.is_err() {
                lies += 1;
                let _ = host.poison();
                break;
            }
            if host.poll().event.is_some() {
                break;
            }
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    (sessions, lies)
}

/// An honest channel that sleeps and wakes until `stop` is set. It counts and compares every record.
fn honest(stop: &AtomicBool) -> u64 {
    let geometry = Geometry::alone(4096, 8);
    let (near, fd) = Mapped::memfd(geometry.bytes()).unwrap();
    let far = Mapped::from_memfd(fd, geometry.bytes()).unwrap();
    let bells = Bells::new().unwrap();
    let theirs = bells.try_clone().unwrap();
    let spin = Spin::new(Duration::ZERO);
    let producer = Producer::new(near, geometry, true).unwrap();
    let consumer = adit_ringbuf::Consumer::new(far, geometry, true).unwrap();
    let mut sender = Sender::new(producer, bells.guest_data, bells.host_space, spin);
    let mut receiver = Receiver::new(consumer, theirs.host_space, theirs.guest_data, spin);
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                sender.send(&n.to_le_bytes()).unwrap();
                // The honest channel must not use up the processor that the attack needs.
                if n.is_multiple_of(256) {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            sender.send(&0u64.to_le_bytes()).unwrap();
            n
        });
        let mut last = 0u64;
        let mut buf = [0; 8];
        loop {
            assert_eq!(receiver.recv(&mut buf).unwrap(), 8);
            match u64::from_le_bytes(buf) {
                0 => break,
                n => assert_eq!(n, last + 1),
            }
            last += 1;
        }
        assert_eq!(sending.join().unwrap(), last, "nothing is lost");
        last
    })
}
