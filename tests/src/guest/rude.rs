//! `ring-rude CASE`: a guest's root that rewrites its ring's region while the host uses it. The verdict stands on the
//! serial line: afterwards an honest session carries a stream again.

use std::io::Write;
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Common, Hello, Open, Status};
use adit_guest_driver::ring::{self, Device};
use adit_guest_driver::transport::Transport;
use adit_guest_driver::transport::ring::{RingEnd, carrier};
use adit_ringbuf::region::Features;
use adit_ringbuf::session::{Event, Guest};
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::doorbell::Doorbell;
use anyhow::{Context, bail, ensure};

/// How long each attack lasts, and how often it begins anew.
const ATTACK: Duration = Duration::from_millis(400);
const ROUNDS: usize = 8;
const LIMIT: Duration = Duration::from_secs(20);
const PAGE: usize = 4096;

type Attack = fn(&Device, &mut Guest<Mapped>, &mut Random) -> anyhow::Result<()>;

/// What is rewritten, while both sides are attached.
const CASES: [(&str, Attack); 8] = [
    ("head", |d, _, r| words(d, r, 0..PAGE)),
    ("host-words", |d, _, r| words(d, r, PAGE..2 * PAGE)),
    ("guest-words", |d, _, r| words(d, r, 2 * PAGE..3 * PAGE)),
    ("records", |d, _, r| words(d, r, 3 * PAGE..d.memory.len())),
    ("everything", |d, _, r| words(d, r, 0..d.memory.len())),
    ("frames", frames),
    ("states", states),
    ("doorbells", doorbells),
];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }

    /// Any number, and often one that is near to something.
    fn word(&mut self) -> u64 {
        let n = self.next();
        match n % 4 {
            0 => n >> 8,
            1 => 1 << (n >> 8 & 63),
            2 => (n >> 8 & 0xffff) | 1 << 31,
            _ => u64::MAX - (n >> 8 & 0xff),
        }
    }
}

pub fn list() {
    CASES.iter().for_each(|(name, _)| println!("{name}"));
}

pub fn rude(name: &str) -> anyhow::Result<()> {
    match run(name) {
        Ok(seen) => println!("HOSTILE-OK {name}: {seen}"),
        Err(e) => println!("HOSTILE-FAILED {name}: {e:#}"),
    }
    Ok(())
}

fn run(name: &str) -> anyhow::Result<String> {
    let case = CASES.iter().find(|(n, _)| *n == name);
    let (_, attack) = case.with_context(|| format!("no case `{name}`"))?;
    let find = || ring::find(&mut String::new()).context("no ring");
    let device = find()?;
    let mut head = vec![0; PAGE];
    device.memory.read(0, &mut head);
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ u64::from(std::process::id()));
    honest(find()?, &mut random).context("before the attack")?;
    let mut attached = 0;
    for _ in 0..ROUNDS {
        // What was rewritten of the head is this guest's own loss.
        device.memory.write(0, &head);
        let Ok(mut guest) = attach(&device, &mut random) else {
            continue;
        };
        attached += 1;
        attack(&device, &mut guest, &mut random)?;
    }
    device.memory.write(0, &head);
    device.memory.zero(2 * PAGE, PAGE);
    honest(find()?, &mut random).context("after the attack")?;
    ensure!(
        attached > ROUNDS / 2,
        "{attached} of {ROUNDS} attacks met a session"
    );
    Ok(format!("{attached} sessions attacked"))
}

/// A session of the layer below, which the attacks ride on.
fn attach(device: &Device, random: &mut Random) -> anyhow::Result<Guest<Mapped>> {
    let mut guest = Guest::find(device.memory.clone(), random.next(), Features::NONE)?;
    let _ = guest.attach();
    let begin = Instant::now();
    while begin.elapsed() < LIMIT {
        device.data.ring()?;
        if let Some(Event::Attached { .. }) = guest.poll()?.event {
            device.data.ring()?;
            return Ok(guest);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("the host does not answer")
}

/// A stream to the host, and its answer.
fn honest(device: Device, random: &mut Random) -> anyhow::Result<()> {
    let begin = Instant::now();
    let (memory, bells, _kept) = device.split();
    let end = RingEnd::start(carrier(memory, bells)?)?;
    let stream = loop {
        match end.dial_host() {
            Ok(stream) => break stream,
            Err(_) if begin.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(5)),
            Err(e) => return Err(e.into()),
        }
    };
    stream.set_timeout(Some(LIMIT))?;
    let common = Common {
        epoch: random.next(),
        ..Common::default()
    };
    let open = Open::new("none".parse()?, common);
    (&stream).write_all(&Hello::Open(open).encode())?;
    match hello::read(&mut &stream)? {
        Hello::Refuse(refuse) if refuse.status == Status::UnknownService => Ok(()),
        other => bail!("{other:?}"),
    }
}

/// Random words at random places, and the doorbells rung all the while.
fn words(device: &Device, random: &mut Random, at: std::ops::Range<usize>) -> anyhow::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < ATTACK {
        for _ in 0..256 {
            let place = at.start + 8 * random.below((at.end - at.start) / 8);
            device.memory.store(place, random.word());
        }
        device.data.ring()?;
        device.space.ring()?;
    }
    Ok(())
}

/// Records in order with frames that are not: any port, length, type and operation.
fn frames(device: &Device, guest: &mut Guest<Mapped>, random: &mut Random) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut lanes = Vec::new();
    for lane in 0..2 {
        lanes.extend(guest.ends(lane, true)?);
    }
    let mut buf = vec![0; 64 << 10];
    while begin.elapsed() < ATTACK {
        for ends in &mut lanes {
            let len = random.below(200);
            let mut record: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            if len >= 24 && random.below(4) > 0 {
                // Ports and operations that are near to right.
                record[4..8].copy_from_slice(&741u32.to_le_bytes());
                record[22] = 1;
                record[23] = 1 + random.below(8) as u8;
            }
            // Full, or the session is over: both are what comes of it.
            let _ = ends.producer.try_push(&record);
            let _ = ends.producer.publish();
            let _ = ends.consumer.pop(&mut buf);
            let _ = ends.consumer.release();
        }
        device.data.ring()?;
    }
    Ok(())
}

/// The state word through all that it may be, and may not.
fn states(device: &Device, _: &mut Guest<Mapped>, random: &mut Random) -> anyhow::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < ATTACK {
        let word = random.next() << 8 | random.below(9) as u64;
        device.memory.store(2 * PAGE, word);
        device.data.ring()?;
    }
    Ok(())
}

/// Doorbells, and nothing else.
fn doorbells(device: &Device, _: &mut Guest<Mapped>, _: &mut Random) -> anyhow::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < ATTACK {
        device.data.ring()?;
        device.space.ring()?;
    }
    Ok(())
}
