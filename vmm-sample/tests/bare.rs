//! A guest without Linux, on whatever KVM there is. `cargo xtask test` builds the image and names it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use adit_bare::abi::{REGION_UNIT, Task, Verdict};
use adit_bare::streams;
use adit_channel::dial::DialError;
use adit_channel::ring::{self, RingBells, RingCarrier};
use adit_channel::shard::{Shard, ShardThread};
use adit_channel::stream::{Dialer, Stream, Target};
use adit_engine::{EngineConfig, How};
use adit_ringbuf::region::{Lane, Region, Side, Spec};
use adit_ringbuf::session::{Ends, Event, Host};
use adit_ringbuf::{Mapped, PushError, RingMem};
use adit_vmm_sample::bare::{self, Bare};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

const REGION_BYTES: u64 = 2 * REGION_UNIT;
const LIMIT: Duration = Duration::from_secs(20);

/// The image's path, or `None` if the test cannot run; then prints why.
fn image() -> Option<PathBuf> {
    let Some(image) = std::env::var_os("ADIT_BARE_IMAGE") else {
        println!("skipped: ADIT_BARE_IMAGE is not set; `cargo xtask test` builds the image");
        return None;
    };
    if let Err(e) = File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {e}");
        return None;
    }
    Some(image.into())
}

/// A guest on a thread. The result is its verdict and its text.
type Running = thread::JoinHandle<(Verdict, String)>;

/// Makes a region and starts a guest over it on a thread. `offer` gets this side's mapping before the guest starts.
fn start(task: Task, offer: impl FnOnce(Mapped)) -> Option<Running> {
    let image = image()?;
    let (memory, fd) = Mapped::memfd(REGION_BYTES as usize).unwrap();
    offer(memory);
    let mut guest = Bare::new(&image, task, Some((File::from(fd), REGION_BYTES))).unwrap();
    Some(thread::spawn(move || guest.run().unwrap()))
}

/// A guest that echoes records, and this side's end of its ring.
struct Echo {
    memory: Mapped,
    host: Host<Mapped>,
    guest: Option<Running>,
}

impl Echo {
    fn start() -> Option<Self> {
        let lane = Lane {
            to_guest: 64 << 10,
            to_host: 64 << 10,
        };
        let mut made = None;
        let guest = start(Task::Echo, |memory| {
            let host = Host::offer(memory.clone(), Spec::new(&[lane]), 1).unwrap();
            made = Some((memory, host));
        })?;
        let (memory, host) = made?;
        Some(Self {
            memory,
            host,
            guest: Some(guest),
        })
    }

    fn attached(&mut self) -> Ends<Mapped> {
        loop {
            if let Some(Event::Attached { .. }) = self.host.poll().event {
                return self.host.ends(0, false).unwrap();
            }
            thread::yield_now();
        }
    }

    fn end(&mut self) -> (Verdict, String) {
        self.guest.take().unwrap().join().unwrap()
    }
}

#[test]
fn memory_exits_ioeventfd_and_irqfd_work() {
    if let Some(image) = image() {
        let said = bare::smoke(&image).unwrap();
        assert!(said.contains("all as they should be"), "{said}");
    }
}

#[test]
fn a_guest_in_user_mode_echoes_records() {
    let Some(mut echo) = Echo::start() else {
        return;
    };
    let mut ends = echo.attached();
    let mut record = [0; 4096];
    for n in 0..2000usize {
        let sent: Vec<u8> = (0..n % 1500).map(|i| (i * 7 + n) as u8).collect();
        while let Err(e) = ends.producer.try_push(&sent) {
            assert_eq!(e, PushError::Full);
        }
        let _ = ends.producer.publish();
        let len = loop {
            if let Some(len) = ends.consumer.pop(&mut record).unwrap() {
                break len;
            }
            thread::yield_now();
        };
        let _ = ends.consumer.release();
        assert!(record[..len] == sent, "record {n}");
    }
    let _ = echo.host.close();
    assert_eq!(echo.end(), (Verdict::Done, String::new()));
}

/// The guest checks the host as the host checks the guest.
#[test]
fn a_guest_in_user_mode_ends_when_its_host_breaks_the_ring() {
    let Some(mut echo) = Echo::start() else {
        return;
    };
    drop(echo.attached());
    let towards = echo.host.region().geometry(0, Side::Guest, false, false);
    // The record's header claims 2 GiB less one byte.
    echo.memory.store(towards.data, 0x7fff_ffff | 1 << 31);
    let (verdict, said) = echo.end();
    assert_eq!(verdict, Verdict::Ring, "{said}");
    assert!(said.contains("ring: "), "{said}");
}

/// The host's side of the engine, on a shard's thread, and a guest over the same region.
fn engines(task: Task) -> Option<(Running, Dialer, ShardThread)> {
    let mut carrier = None;
    let guest = start(task, |memory| {
        let spec = ring::spec(REGION_BYTES as usize).unwrap();
        carrier = Some(RingCarrier::host(memory, spec, 1, RingBells::polled()).unwrap());
    })?;
    let mut shard = Shard::new().unwrap();
    let port = shard.add(carrier?, EngineConfig::default(), 7).unwrap();
    let dialer = shard.handle(port).dialer();
    Some((guest, dialer, shard.spawn("ring").unwrap()))
}

/// Dials until there is a session, and then once.
fn dial(dialer: &Dialer, port: u32, limit: Duration) -> Result<Stream, DialError> {
    let target = Target { port, hello: None };
    loop {
        match dialer.dial(&target, limit) {
            Err(DialError::NoSession) => thread::sleep(Duration::from_millis(1)),
            other => return other,
        }
    }
}

/// Both sides run the engine: a guest without an operating system, and a shard. Neither has a doorbell, so both poll.
#[test]
fn r17_a_guest_in_user_mode_serves_streams() {
    let Some((guest, dialer, thread)) = engines(Task::Streams) else {
        return;
    };
    for len in [1usize, 63, 4096, 65_537, 1 << 20] {
        let stream = dial(&dialer, streams::PORT, LIMIT).unwrap();
        let sent: Vec<u8> = (0..len).map(|n| (n * 31 + n / 251) as u8).collect();
        let mut back = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                (&stream).write_all(&sent).unwrap();
                stream.shutdown(How::Send).unwrap();
            });
            (&stream).read_to_end(&mut back).unwrap();
        });
        assert!(back == sent, "{len} bytes came back as {}", back.len());
    }
    assert!(
        dial(&dialer, streams::PORT + 1, LIMIT).is_err(),
        "nobody listens there"
    );
    drop((dialer, thread));
    assert_eq!(guest.join().unwrap(), (Verdict::Done, String::new()));
}

/// The hostile guest: R1 to R8, R10, R15 and R16 of the attack catalogue, one after the other. Meanwhile another VM on the
/// same shard echoes. Afterwards the region still serves a well-behaved guest.
#[test]
fn r01_to_r16_a_guest_in_user_mode_that_breaks_every_rule_harms_only_itself() {
    let Some(image) = image() else { return };
    let (memory, fd) = Mapped::memfd(REGION_BYTES as usize).unwrap();
    let guest_of = |task| {
        let region = (File::from(fd.try_clone().unwrap()), REGION_BYTES);
        let mut guest = Bare::new(&image, task, Some(region)).unwrap();
        thread::spawn(move || guest.run().unwrap())
    };
    let spec = ring::spec(REGION_BYTES as usize).unwrap();
    let attacked = RingCarrier::host(memory, spec, 1, RingBells::polled()).unwrap();
    let (other, _) = Mapped::memfd(REGION_BYTES as usize).unwrap();
    let beside = RingCarrier::host(other.clone(), spec, 1, RingBells::polled()).unwrap();
    let mut shard = Shard::new().unwrap();
    let config = EngineConfig::default();
    let [attacked, beside] =
        [attacked, beside].map(|carrier| shard.add(carrier, config, 7).unwrap());
    let [attacked, beside] = [attacked, beside].map(|port| shard.handle(port).dialer());
    let host = shard.spawn("ring").unwrap();
    let neighbour = thread::spawn(move || streams::serve(other, || adit_engine::Tick(0)));
    let mut echo = dial(&beside, streams::PORT, LIMIT).unwrap();

    let hostile = guest_of(Task::Attacks);
    let mut echoes = 0;
    while !hostile.is_finished() {
        echo.set_deadline(Some(std::time::Instant::now() + LIMIT));
        echo.write_all(b"undisturbed").unwrap();
        echo.read_exact(&mut [0; 11]).unwrap();
        echoes += 1;
    }
    let (verdict, said) = hostile.join().unwrap();
    println!("{said}{echoes} echoes of the other VM meanwhile");
    assert_eq!(verdict, Verdict::Done, "{said}");
    assert!(echoes > 100, "{echoes} echoes");
    let cases = adit_bare::attacks::cases::<Mapped>();
    assert_eq!(said.lines().count(), cases.len(), "{said}");
    for (name, _) in cases {
        let line = said.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(!line.contains(" 0 sessions"), "{line}");
        // Packets of unknown streams, and doorbells (there are none here), end no session.
        if ["r08-ids", "r10-doorbells"].contains(&name) {
            assert!(line.ends_with(" 0 ended"), "{line}");
        }
    }

    let honest = guest_of(Task::Streams);
    let mut stream = dial(&attacked, streams::PORT, LIMIT).unwrap();
    stream.write_all(&[3; 10_000]).unwrap();
    stream.read_exact(&mut [0; 10_000]).unwrap();
    drop((echo, stream, attacked, beside, host));
    assert_eq!(honest.join().unwrap(), (Verdict::Done, String::new()));
    neighbour.join().unwrap().unwrap();
}

/// A guest that echoes records and never reads lane bulk: a dial on that lane fails after its limit.
#[test]
fn r11_a_dial_to_a_guest_in_user_mode_that_never_reads_fails_in_time() {
    let Some((guest, dialer, thread)) = engines(Task::Echo) else {
        return;
    };
    let dialled = dial(&dialer, streams::PORT, Duration::from_millis(500));
    assert_eq!(dialled.map(drop), Err(DialError::Timeout));
    drop((dialer, thread));
    assert_eq!(guest.join().unwrap(), (Verdict::Done, String::new()));
}

/// The bytes between the host's records are zero. Then the region's pages are removed under both sides: the pages read as zero,
/// which breaks the session and nothing else.
#[test]
fn r13_r14_removed_pages_end_the_session_only_and_bytes_between_records_are_zero() {
    let Some(image) = image() else { return };
    let (memory, fd) = Mapped::memfd(REGION_BYTES as usize).unwrap();
    let spec = ring::spec(REGION_BYTES as usize).unwrap();
    let carrier = RingCarrier::host(memory.clone(), spec, 1, RingBells::polled()).unwrap();
    let region = (File::from(fd.try_clone().unwrap()), REGION_BYTES);
    let mut guest = Bare::new(&image, Task::Streams, Some(region)).unwrap();
    let guest = thread::spawn(move || guest.run().unwrap());
    let mut shard = Shard::new().unwrap();
    let port = shard.add(carrier, EngineConfig::default(), 7).unwrap();
    let dialer = shard.handle(port).dialer();
    let thread = shard.spawn("ring").unwrap();
    let mut stream = dial(&dialer, streams::PORT, LIMIT).unwrap();
    let mut sent = 0;
    for n in 0..200usize {
        let len = n * 37 % 1500 + 1;
        sent += len;
        stream.write_all(&vec![0xc5; len]).unwrap();
        stream.read_exact(&mut vec![0; len]).unwrap();
    }
    let read = Region::read(&memory).unwrap();
    let mut found = 0;
    for lane in 0..2 {
        let ring = read.geometry(lane, Side::Guest, false, false);
        let (mut at, mut bytes) = (0, vec![0; ring.size]);
        memory.read(ring.data, &mut bytes);
        loop {
            let word = memory.load(ring.data + at);
            if word == 0 {
                break;
            }
            let end = at + 8 + (word & 0x7fff_ffff) as usize;
            found += bytes[at + 8..end].iter().filter(|&&b| b == 0xc5).count();
            at = end.next_multiple_of(ring.align);
            assert!(bytes[end..at].iter().all(|&b| b == 0), "padding");
        }
        assert!(
            bytes[at..].iter().all(|&b| b == 0),
            "behind the last record"
        );
    }
    assert!(found >= sent, "{found} of {sent} bytes were found");

    assert!(
        File::from(fd.try_clone().unwrap()).set_len(4096).is_err(),
        "cut"
    );
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&fd, hole, 0, REGION_BYTES as i64).unwrap();
    // Host or guest detects the damage, and the other one learns of it by the region's words; neither gets a signal.
    stream.set_deadline(Some(std::time::Instant::now() + LIMIT));
    while stream.write_all(&[1; 1 << 16]).is_ok() {
        fallocate(&fd, hole, 0, REGION_BYTES as i64).unwrap();
    }
    drop((stream, dialer, thread));
    let (verdict, said) = guest.join().unwrap();
    assert!(
        [Verdict::Ring, Verdict::Done].contains(&verdict),
        "{verdict:?}: {said}"
    );
}

/// Runs the command that prints the figures of ring and engine, or why there are none.
fn figures() {
    let Some(image) = std::env::var_os("ADIT_BARE_IMAGE") else {
        println!("skipped: ADIT_BARE_IMAGE is not set; `cargo xtask test` builds the image");
        return;
    };
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_adit-vmm"))
        .args(["bare", "--ring"])
        .arg(image)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}{errors}");
    print!("{said}");
    let skipped = said.starts_with("skipped: ") && !std::path::Path::new("/dev/kvm").exists();
    assert!(
        skipped || said.contains("64 B there and back") && said.contains("MiB/s"),
        "{said}"
    );
}

#[test]
fn bare_ring_prints_figures_or_why_there_are_none() {
    figures();
}

/// As on a busy machine: while one side polls, the other one cannot run, so a round trip takes a millisecond.
#[test]
fn bare_ring_prints_figures_also_when_both_sides_share_one_processor() {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpu = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap());
    let mut one = CpuSet::new();
    one.set(cpu.unwrap()).unwrap();
    // Of this thread, which no other test uses, and of the process that it starts.
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
    figures();
}

#[test]
fn a_file_that_is_not_an_image_is_named() {
    let Some(_) = image() else { return };
    for (path, why) in [
        ("/nonexistent/image", "No such file"),
        ("/etc/passwd", "not an image"),
    ] {
        let e = bare::smoke(path.as_ref()).unwrap_err();
        let said = format!("{e:#}");
        assert!(said.contains(path) && said.contains(why), "{said}");
    }
}
