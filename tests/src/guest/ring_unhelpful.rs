//! Guests that break no rule of a ring, but do not help their host either: R11, R14, R17 of the attack catalogue.

use std::time::{Duration, Instant};

use adit_channel::ring::RingBells;
use adit_guest_driver::transport::ring::{RingEnd, carrier};
use adit_ringbuf::region::{Features, Region, Side};
use adit_ringbuf::session::{Guest, State};
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::doorbell::{Doorbell, Polled};
use anyhow::{Context, ensure};

use super::ring_attacks::{LIMIT, ask, find, nanos};

/// R11: it attaches, reads no record and sends no doorbell. Prints `RING-MUTE`: then the host dials it.
pub const MUTE: &str = "r11-mute";
/// R14: it reads the bytes between the host's records, and behind the last of them.
pub const BETWEEN: &str = "r14-between-records";
/// R17: it polls, and never asks for a doorbell.
pub const POLLS: &str = "r17-no-hints";

/// Questions in a case, each with a longer name than the one before.
const QUESTIONS: usize = 40;

type Case = fn() -> anyhow::Result<String>;

pub fn case(name: &str) -> Option<Case> {
    match name {
        MUTE => Some(mute),
        BETWEEN => Some(between_records),
        POLLS => Some(polls),
        _ => None,
    }
}

/// Asks the host for services that it does not have, with names of all lengths.
fn questions(end: &RingEnd) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut n = 0;
    while n < QUESTIONS {
        // The first ones may come before the session has begun.
        match ask(end, &"n".repeat(n + 1)) {
            Err(_) if n == 0 && begin.elapsed() < LIMIT => {
                std::thread::sleep(Duration::from_millis(5));
            }
            asked => {
                asked.with_context(|| format!("question {n}"))?;
                n += 1;
            }
        }
    }
    Ok(())
}

/// The records that the host has written since the session began, for each lane: where each ends, and where the next begins.
fn records(memory: &Mapped) -> anyhow::Result<[Vec<[usize; 2]>; 2]> {
    let region = Region::read(memory)?;
    Ok([0, 1].map(|lane| {
        let ring = region.geometry(lane, Side::Guest, false, false);
        let (mut records, mut at) = (Vec::new(), 0);
        while at < ring.size {
            let word = memory.load(ring.data + at);
            if word == 0 {
                break;
            }
            let end = at + 8 + (word & 0x7fff_ffff) as usize;
            at = end.next_multiple_of(ring.align);
            records.push([end, at]);
        }
        records
    }))
}

/// The bytes of the rings that the host writes.
fn written(memory: &Mapped) -> anyhow::Result<[Vec<u8>; 2]> {
    let region = Region::read(memory)?;
    Ok([0, 1].map(|lane| {
        let ring = region.geometry(lane, Side::Guest, false, false);
        let mut bytes = vec![0; ring.size];
        memory.read(ring.data, &mut bytes);
        bytes
    }))
}

fn between_records() -> anyhow::Result<String> {
    let device = find()?;
    let memory = device.memory.clone();
    // Bytes from earlier sessions do not count: they were sent to this guest.
    let before = written(&memory)?;
    let (own, bells, _kept) = device.split();
    let end = RingEnd::start(carrier(own, bells)?)?;
    questions(&end)?;
    drop(end);
    let (after, lanes) = (written(&memory)?, records(&memory)?);
    for (lane, records) in lanes.iter().enumerate() {
        let nothing = |from: usize, to: usize| {
            let (before, after) = (&before[lane][from..to], &after[lane][from..to]);
            let known = |at: usize| [0, before[at]].contains(&after[at]);
            // Compare all at once first: they are almost always equal, and byte by byte would be slow.
            let new = match before == after {
                true => None,
                false => (0..after.len()).find(|&at| !known(at)),
            };
            ensure!(new.is_none(), "lane {lane}: something at {from} + {new:?}");
            Ok(())
        };
        for &[end, next] in records {
            nothing(end, next)?;
        }
        nothing(
            records.last().map_or(0, |&[_, next]| next),
            after[lane].len(),
        )?;
    }
    let records: usize = lanes.iter().map(Vec::len).sum();
    ensure!(records >= 2 * QUESTIONS, "{records} records");
    Ok(format!("nothing between {records} records"))
}

fn polls() -> anyhow::Result<String> {
    let (memory, bells, _kept) = find()?.split();
    let bells = RingBells {
        data_heard: Box::new(Polled),
        space_heard: Box::new(Polled),
        ..bells
    };
    let end = RingEnd::start(carrier(memory, bells)?)?;
    questions(&end)?;
    Ok(format!("{QUESTIONS} answers"))
}

fn mute() -> anyhow::Result<String> {
    let device = find()?;
    let mut guest = Guest::find(device.memory.clone(), nanos(), Features::NONE)?;
    let _ = guest.attach();
    let begin = Instant::now();
    while guest.state() != State::Run {
        ensure!(begin.elapsed() < LIMIT, "no session");
        device.data.ring()?;
        let _ = guest.poll()?;
    }
    device.data.ring()?;
    println!("RING-MUTE");
    // Wait until the host has dialled and given up: a client's dial, and its own measurement.
    while records(&device.memory)?[1].len() < 4 {
        ensure!(begin.elapsed() < LIMIT, "the host does not give up");
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(guest.poll()?.event.is_none(), "the session ended");
    let _ = guest.close();
    device.data.ring()?;
    Ok("the host gave up".to_owned())
}
