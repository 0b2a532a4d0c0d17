//! `ring-rude BOOT`, or a case: a guest's root that rewrites its ring's region while the host uses it, one case of
//! [`adit_bare::attacks`] after the other, and some that need a system, or somebody at the other end ([`dull`]).
//! The verdict stands on the serial line: afterwards an honest session carries a stream again.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use adit_bare::attacks::{Attack, cases};
use adit_channel::hello::{self, Common, Hello, Open, Status};
use adit_engine::Tick;
use adit_guest_driver::ring::{self, Device, Registers};
use adit_guest_driver::transport::Transport;
use adit_guest_driver::transport::ring::{RingEnd, carrier};
use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;
use adit_ringbuf::session::Guest;
use adit_ringbuf_io::doorbell::Doorbell;
use anyhow::{Context, bail, ensure};

use super::dull;

/// How long each case lasts at first.
const ATTACK: Duration = Duration::from_millis(300);
pub(super) const LIMIT: Duration = Duration::from_secs(20);
/// Peers of an ivshmem doorbell, and vectors of each.
const PEERS: u32 = 1 << 16;
/// Where that doorbell is in BAR0.
const DOORBELL: usize = 12;

/// Cases of a boot.
const BOOTS: [(&str, &[&str]); 6] = [
    (
        "positions",
        &[
            dull::BETWEEN,
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
        &["r10-doorbells", FOREIGN, dull::POLLS, dull::MUTE],
    ),
    ("everything", &["everything"]),
];
/// Doorbells of every peer that there could be: another VM's, if its region could be reached from here.
const FOREIGN: &str = "foreign-peers";
/// Cases that no session may end of: what they send is nobody's.
const HARMLESS: [&str; 2] = ["r08-ids", "r10-doorbells"];
/// Cases that the host cannot but end sessions of; on a slow machine it takes its time to get so far.
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

pub fn rude(name: &str) -> anyhow::Result<()> {
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
            seen.push(format!("{name} {} rung", foreign_peers(&device)?));
            continue;
        }
        if let Some(case) = dull::case(name) {
            seen.push(format!("{name} {}", case()?));
            honest(find()?).with_context(|| format!("after {name}"))?;
            continue;
        }
        let (begin, refused) = (Instant::now(), REFUSED.contains(name));
        let (mut sessions, mut lost, mut lasts) = (0, 0, ATTACK);
        while sessions == 0 || refused && lost == 0 {
            ensure!(begin.elapsed() < LIMIT, "nothing of {name} was refused");
            let (met, ended) = attack(&device, name, seed, lasts)?;
            // What it does may take one long session.
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

/// Returns how many sessions there were, and how many of them the host ended.
fn attack(device: &Device, name: &str, seed: u64, lasts: Duration) -> anyhow::Result<(u32, u32)> {
    let memory = device.memory.clone();
    // Its own requests are no one's that was here before.
    let guest = Guest::find(memory.clone(), seed ^ nanos(), Features::NONE)?;
    let begin = Instant::now();
    let now = || Tick(begin.elapsed().as_nanos() as u64);
    let ring = || {
        // A store to a register does not fail.
        let _ = device.data.ring();
        let _ = device.space.ring();
    };
    let case = cases::<Mapped>().into_iter().find(|(n, _)| *n == name);
    let (_, case) = case.with_context(|| format!("no case `{name}`"))?;
    let mut attack = Attack::new(memory, guest, seed, &ring, &now, lasts.as_nanos() as u64);
    attack.run(case);
    Ok((attack.sessions, attack.lost))
}

/// Stores every peer and vector that there could be to the function's doorbell register.
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

/// A stream to the host, and its answer. The first may fall to what the host still finds out about the attack.
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

/// Asks the host for a service that there is not, and has its answer.
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
        Hello::Refuse(refuse) if refuse.status == Status::UnknownService => Ok(()),
        other => bail!("{other:?}"),
    }
}
