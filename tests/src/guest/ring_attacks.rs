//! `ring-attack BOOT`, or a single case: root in the guest overwrites its ring's region while the host uses it, with the cases of
//! [`adit_bare::attacks`] one after the other, and with some that need an operating system or a peer ([`ring_unhelpful`]). The
//! verdict is printed on the serial line: after each case a well-behaved session must carry a stream again.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use adit_bare::attacks::{Attack, cases};
use adit_channel::hello::{self, Common, Hello, Open};
use adit_channel::refusal::Code;
use adit_engine::Tick;
use adit_guest_driver::ring::{self, Device, Registers};
use adit_guest_driver::transport::ring::{RingEnd, carrier};
use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;
use adit_ringbuf::session::Guest;
use adit_ringbuf_io::doorbell::Doorbell;
use anyhow::{Context, bail, ensure};

use super::ring_unhelpful;

/// How long each case lasts at first.
const ATTACK: Duration = Duration::from_millis(300);
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// Peers of an ivshmem doorbell, and vectors of each.
const PEERS: u32 = 1 << 16;
/// The offset of that doorbell in BAR0.
const DOORBELL: usize = 12;

/// The cases for each boot.
const BOOTS: [(&str, &[&str]); 6] = [
    (
        "positions",
        &[
            ring_unhelpful::BETWEEN,
            "r01-fetched-twice",
            "r02-positions-ahead",
            "r03-positions-back",
        ],
    ),
    ("records", &["r04-pads", "r05-borders", "r06-headers"]),
    ("messages", &["r07-messages", "r08-ids"]),
    ("handshakes", &["r15-handshakes", "r16-ranges"]),
    (
        "doorbells",
        &[
            "r10-doorbells",
            FOREIGN,
            ring_unhelpful::POLLS,
            ring_unhelpful::MUTE,
        ],
    ),
    ("everything", &["everything"]),
];
/// Doorbells of every peer that could exist: if another VM's region could be reached from here, one of them would be its.
const FOREIGN: &str = "foreign-peers";
/// Cases that must end no session: the host ignores what they send.
const HARMLESS: [&str; 2] = ["r08-ids", "r10-doorbells"];
/// Cases in which the host must end a session. On a slow machine a case may need more time until it does.
const REFUSED: [&str; 6] = [
    "r02-positions-ahead",
    "r04-pads",
    "r05-borders",
    "r06-headers",
    "r07-messages",
    "r15-handshakes",
];

pub fn list() {
    BOOTS.iter().for_each(|(name, _)| println!("{name}"));
}

pub fn attack_ring(name: &str) -> anyhow::Result<()> {
    match run(name) {
        Ok(seen) => println!("HOSTILE-OK {name}: {seen}"),
        Err(e) => println!("HOSTILE-FAILED {name}: {e:#}"),
    }
    Ok(())
}

pub(super) fn find() -> anyhow::Result<Device> {
    ring::find(&mut String::new()).context("no ring")
}

fn run(name: &str) -> anyhow::Result<String> {
    let boot = BOOTS.iter().find(|(n, _)| *n == name);
    let names: &[&str] = boot.map_or(std::slice::from_ref(&name), |(_, names)| names);
    let device = find()?;
    let seed = u64::from(std::process::id()) << 32 | 0x9e37_79b9;
    honest(find()?).context("before the attack")?;
    let mut seen = Vec::new();
    for name in names {
        if *name == FOREIGN {
            seen.push(format!("{name} {} doorbells", foreign_peers(&device)?));
            continue;
        }
        if let Some(case) = ring_unhelpful::case(name) {
            seen.push(format!("{name} {}", case()?));
            honest(find()?).with_context(|| format!("after {name}"))?;
            continue;
        }
        let (begin, refused) = (Instant::now(), REFUSED.contains(name));
        let (mut sessions, mut lost, mut lasts) = (0, 0, ATTACK);
        while sessions == 0 || refused && lost == 0 {
            ensure!(begin.elapsed() < LIMIT, "nothing of {name} was refused");
            let (met, ended) = attack(&device, name, seed, lasts)?;
            // Its effect may need one long session.
            lasts *= 2;
            (sessions, lost) = (sessions + met, lost + ended);
        }
        ensure!(
            !HARMLESS.contains(name) || lost == 0,
            "{name} ended {lost} sessions"
        );
        honest(find()?).with_context(|| format!("after {name}"))?;
        seen.push(format!(
            "{name} {sessions} sessions, {lost} ended by the host"
        ));
    }
    Ok(seen.join("; "))
}

/// Runs a case. Returns how many sessions there were, and how many of them the host ended.
fn attack(device: &Device, name: &str, seed: u64, lasts: Duration) -> anyhow::Result<(u32, u32)> {
    let memory = device.memory.clone();
    // Its requests must differ from those of guests before it.
    let guest = Guest::find(memory.clone(), seed ^ nanos(), Features::NONE)?;
    let begin = Instant::now();
    let now = || Tick(begin.elapsed().as_nanos() as u64);
    let ring = || {
        // A store to a register cannot fail.
        let _ = device.data.ring();
        let _ = device.space.ring();
    };
    let case = cases::<Mapped>().into_iter().find(|(n, _)| *n == name);
    let (_, case) = case.with_context(|| format!("no case `{name}`"))?;
    let mut attack = Attack::new(memory, guest, seed, &ring, &now, lasts.as_nanos() as u64);
    attack.run(case);
    Ok((attack.sessions, attack.lost))
}

/// Stores every possible peer and vector to the function's doorbell register.
fn foreign_peers(device: &Device) -> anyhow::Result<u32> {
    const AT_ONCE: usize = 256;
    let registers = format!("/sys/bus/pci/devices/{}/resource0", device.function);
    let file = File::options().read(true).write(true).open(registers)?;
    let len = usize::try_from(file.metadata()?.len())?;
    let registers = Registers::map(file.as_fd(), 0, len)?;
    let mut rung = 0;
    for first in (0..2 * PEERS).step_by(AT_ONCE) {
        let values: [u32; AT_ONCE] = std::array::from_fn(|n| {
            let n = first + n as u32;
            ((n % PEERS) << 16) | (n / PEERS)
        });
        for register in registers.doorbells(DOORBELL, values)? {
            register.ring()?;
            rung += 1;
        }
    }
    Ok(rung)
}

pub(super) fn nanos() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |since| since.as_nanos() as u64)
}

/// Opens a stream to the host and waits for its answer. The first one may fail while the host still detects the attack.
fn honest(device: Device) -> anyhow::Result<()> {
    let begin = Instant::now();
    let (memory, bells, _kept) = device.split();
    let end = RingEnd::start(carrier(memory, bells)?)?;
    loop {
        match asked(&end) {
            Err(_) if begin.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(5)),
            done => return done,
        }
    }
}

fn asked(end: &RingEnd) -> anyhow::Result<()> {
    ask(end, "none")
}

/// Asks the host for an unknown service, and waits for its answer.
pub(super) fn ask(end: &RingEnd, service: &str) -> anyhow::Result<()> {
    let stream = end.dial_host()?;
    stream.set_timeout(Some(LIMIT))?;
    let common = Common {
        epoch: nanos(),
        ..Common::default()
    };
    let open = Open::new(service.parse()?, common);
    (&stream).write_all(&Hello::Open(open).encode())?;
    match hello::read(&mut &stream)? {
        Hello::Refuse(refuse) if refuse.refusal.code() == Code::UnknownService => Ok(()),
        other => bail!("{other:?}"),
    }
}
