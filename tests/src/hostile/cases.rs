//! The cases of a hostile guest. Each returns what it observed; after each, the device must serve a well-behaved driver.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use adit_channel::hello::PORT;
use anyhow::ensure;

use crate::driver::{
    AVAIL, CREDIT_REQUEST, CREDIT_UPDATE, Driver, HEADER, INDIRECT, NEXT, REQUEST, RESPONSE, RST,
    RW, RX, SHUTDOWN, SIZE, TABLES, TX, TX_BUFFERS, USED, WRITE, wait,
};
use crate::memory::Dma;

type Case = fn(&mut Driver) -> anyhow::Result<String>;

/// The cases by name.
pub const CASES: [(&str, Case); 16] = [
    ("descriptor-loops", descriptor_loops),
    ("heads-outside", heads_outside),
    ("index-jumps", index_jumps),
    ("addresses-outside", addresses_outside),
    ("indirect-tables", indirect_tables),
    ("directions", directions),
    ("header-lies", header_lies),
    ("foreign-cids", foreign_cids),
    ("op-storm", op_storm),
    ("request-flood", request_flood),
    ("credit-lies", credit_lies),
    ("stale-streams", stale_streams),
    ("kick-storm", kick_storm),
    ("rewritten-rings", rewritten_rings),
    ("rings-as-buffers", rings_as_buffers),
    ("reset-storm", reset_storm),
];

/// Pseudo-random numbers from a seed (Knuth's MMIX generator).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 29
    }
}

fn started(d: &mut Driver) -> anyhow::Result<()> {
    d.start()?;
    d.post_rx();
    Ok(())
}

/// A complete, valid packet at the start of the TX area, for chains with other errors.
fn packet(d: &mut Driver) -> u64 {
    let port = d.fresh_port();
    d.dma
        .write(TX_BUFFERS, &d.header(port, PORT, REQUEST).bytes());
    d.dma.addr(TX_BUFFERS)
}

/// R18: chains that never end.
fn descriptor_loops(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let at = packet(d);
    d.desc(TX, 0, at, 44, NEXT, 0);
    d.offer(TX, 0);
    d.given_back(TX, "a descriptor that follows itself")?;
    for i in 0..SIZE {
        d.desc(TX, i, at, 44, NEXT, (i + 1) % SIZE);
    }
    for head in 0..SIZE {
        d.offer(TX, head);
    }
    d.given_back(TX, "a ring of all descriptors")?;
    d.exchange()?;
    Ok(format!("{} chains given back", 1 + SIZE))
}

/// R22: heads outside of the descriptor table.
fn heads_outside(d: &mut Driver) -> anyhow::Result<String> {
    for head in [SIZE, SIZE + 1, 0x8000, u16::MAX] {
        for queue in [TX, RX] {
            d.start()?;
            d.offer(queue, head);
            d.kick(queue);
            let request = d.header(7000, PORT, REQUEST);
            d.send(&request, &[])?;
            d.honest()?;
        }
    }
    Ok("8 sessions torn, each followed by a whole one".into())
}

/// R22: available indices ahead of the queue.
fn index_jumps(d: &mut Driver) -> anyhow::Result<String> {
    for by in [SIZE + 1, 0x4000, 0x8000, u16::MAX] {
        for queue in [TX, RX] {
            d.start()?;
            d.jump(queue, by);
            d.kick(queue);
            d.honest()?;
        }
    }
    Ok("8 sessions torn, each followed by a whole one".into())
}

/// R23: buffers outside of memory, or that wrap around.
fn addresses_outside(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let at = packet(d);
    let bad = [
        (u64::MAX - 10, 44),
        (u64::MAX, u32::MAX),
        (1 << 40, 4096),
        (0xfee0_0000, 64),
        (0, u32::MAX),
        (at, u32::MAX),
        (at, 0),
    ];
    for (addr, len) in bad {
        d.desc(TX, 0, addr, len, 0, 0);
        d.offer(TX, 0);
        d.given_back(TX, "an address outside")?;
        // As payload after a valid header.
        d.desc(TX, 1, at, 44, NEXT, 2);
        d.desc(TX, 2, addr, len, 0, 0);
        d.offer(TX, 1);
        d.given_back(TX, "a payload outside")?;
    }
    d.exchange()?;
    // In the other direction the buffers must be skipped or returned, never written.
    d.start()?;
    for (i, (addr, len)) in (0..).zip(bad) {
        d.desc(RX, i, addr, len, WRITE, 0);
        d.offer(RX, i);
    }
    d.kick(RX);
    let request = d.header(7001, PORT, REQUEST);
    d.send(&request, &[])?;
    d.given_back(TX, "a request")?;
    Ok(format!("{} chains given back", 2 * bad.len()))
}

/// R19: tables in tables, of length 0, of every length, and that contain themselves.
fn indirect_tables(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let at = packet(d);
    let table = d.queue(TX) + TABLES;
    let addr = d.dma.addr(table);
    let entries = 0x4000 / 16;
    for i in 0..entries {
        let next = (i + 1) % entries;
        d.desc_at(table + 16 * usize::from(i), at, 44, NEXT, next);
    }
    let mut offered = 0;
    let mut give = |d: &mut Driver, addr, len, flags, next| {
        d.desc(TX, 0, addr, len, flags, next);
        d.offer(TX, 0);
        offered += 1;
        d.given_back(TX, "an indirect table")
    };
    for len in [0, 1, 15, 17, 0x4000, 0x3ff0, u32::MAX] {
        give(d, addr, len, INDIRECT, 0)?;
        give(d, addr, len, INDIRECT | NEXT, 1)?;
        give(d, u64::MAX - 31, len, INDIRECT, 0)?;
    }
    d.desc_at(table, addr, 0x4000, INDIRECT, 0);
    give(d, addr, 16, INDIRECT, 0)?;
    d.desc_at(table, at, 44, NEXT, 9999);
    give(d, addr, 32, INDIRECT, 0)?;
    // The table is the virtqueue's own descriptor table.
    let own = d.dma.addr(d.queue(TX));
    give(d, own, 16 * u32::from(SIZE), INDIRECT, 0)?;
    d.exchange()?;
    Ok(format!("{offered} tables given back"))
}

/// Buffers that the device must write but may only read, and the other way round.
fn directions(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let at = packet(d);
    d.desc(TX, 0, at, 44, WRITE, 0);
    d.offer(TX, 0);
    d.desc(TX, 1, at, 44, NEXT, 2);
    d.desc(TX, 2, at, 44, WRITE, 0);
    d.offer(TX, 1);
    d.given_back(TX, "a writable packet")?;
    d.exchange()?;
    d.start()?;
    for i in 0..SIZE {
        d.desc(RX, i, at, 4096, 0, 0);
        d.offer(RX, i);
    }
    d.kick(RX);
    let before = d.dma.read(TX_BUFFERS, 4096);
    let request = d.header(7002, PORT, REQUEST);
    // Not in the buffers that may only be read.
    d.dma.write(TX_BUFFERS + 4096, &request.bytes());
    d.desc(TX, 1, d.dma.addr(TX_BUFFERS + 4096), 44, 0, 0);
    d.offer(TX, 1);
    d.given_back(TX, "a request")?;
    let want = SIZE;
    wait("unwritable buffers come back", || {
        Ok((d.used(RX) == want).then_some(()))
    })?;
    ensure!(
        d.dma.read(TX_BUFFERS, 4096) == before,
        "a read-only buffer was written"
    );
    Ok("read-only buffers stay as they were".into())
}

/// R28, R42: lengths that differ from those of the descriptors.
fn header_lies(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let port = d.open()?;
    let mut header = d.header(port, PORT, RW);
    let mut chains = 0;
    for len in [0, 1, 43] {
        d.dma.write(TX_BUFFERS, &header.bytes());
        d.desc(TX, 0, d.dma.addr(TX_BUFFERS), len, 0, 0);
        d.offer(TX, 0);
        d.given_back(TX, "a chain shorter than a header")?;
        chains += 1;
    }
    for len in [1, 100, 4052, 4053, 65_536, 65_537, u32::MAX] {
        header.len = len;
        d.dma.write(TX_BUFFERS, &header.bytes());
        d.desc(TX, 0, d.dma.addr(TX_BUFFERS), (HEADER + 100) as u32, 0, 0);
        d.offer(TX, 0);
        d.given_back(TX, "a length that lies")?;
        chains += 1;
    }
    // Longer than a packet may be.
    d.desc(
        TX,
        0,
        d.dma.addr(TX_BUFFERS),
        (HEADER + 65_537) as u32,
        0,
        0,
    );
    d.offer(TX, 0);
    d.given_back(TX, "a packet that is too large")?;
    d.exchange()?;
    Ok(format!("{} chains given back", chains + 1))
}

/// R44: CIDs of other VMs, and CIDs of nobody.
fn foreign_cids(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let others = [0, 1, 2, 3, 5, 0xffff_ffff, 0x1_0000_0004, u64::MAX];
    let mut sent = 0;
    for op in [REQUEST, RW, RST] {
        let own = d.cid;
        for cid in others.into_iter().filter(|&c| c != own) {
            let mut header = d.header(7777, PORT, op);
            header.src_cid = cid;
            d.put(&header, &[])?;
            sent += 1;
            if cid != 2 {
                let mut header = d.header(7777, PORT, op);
                header.dst_cid = cid;
                d.put(&header, &[])?;
                sent += 1;
            }
        }
    }
    d.given_back(TX, "foreign packets")?;
    d.exchange()?;
    ensure!(!d.strays.contains(&7777), "an answer to a packet of others");
    Ok(format!("{sent} packets without an answer"))
}

/// R43, R48: every operation, type and flag, to open and closed streams, without a buffer for an answer.
fn op_storm(d: &mut Driver) -> anyhow::Result<String> {
    let mut noise = Noise(43);
    d.start()?;
    for _ in 0..20_000 {
        let r = noise.next();
        let mut header = d.header((r >> 8) as u32 % 64, PORT, (r % 12) as u16);
        header.kind = [1, 1, 1, 2, 0, 77][(r >> 40) as usize % 6];
        header.flags = if r & 1 << 50 == 0 {
            0
        } else {
            noise.next() as u32
        };
        header.buf_alloc = noise.next() as u32;
        header.fwd_cnt = noise.next() as u32;
        header.len = (r >> 32) as u32 % 3;
        d.put(&header, &[7; 2][..header.len as usize])?;
    }
    d.given_back(TX, "packets while nothing can be answered")?;
    Ok("20000 packets drained without a receive buffer".into())
}

/// R46, R47: more streams than the host allows.
fn request_flood(d: &mut Driver) -> anyhow::Result<String> {
    d.start()?;
    let requests = d.storm(50_000);
    for n in 0..requests {
        let header = d.header(10_000 + n, PORT, REQUEST);
        d.put(&header, &[])?;
    }
    d.given_back(TX, "requests while nothing can be answered")?;
    d.post_rx();
    let mut answers = 0;
    for n in 0..requests {
        let header = d.header(100_000 + n, PORT, REQUEST);
        d.put(&header, &[])?;
        while d.receive()?.is_some() {
            answers += 1;
        }
    }
    d.given_back(TX, "requests")?;
    Ok(format!(
        "{} requests drained, {answers} answers taken meanwhile",
        2 * requests
    ))
}

/// R45-R47: credit that was never given, and credit that is taken back.
fn credit_lies(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    // Bytes that the host never sent are reported as read.
    let port = d.open()?;
    let mut lie = d.header(port, PORT, CREDIT_UPDATE);
    (lie.fwd_cnt, lie.buf_alloc) = (1 << 31, u32::MAX);
    d.send(&lie, &[])?;
    d.expect(port, RST)?;
    // More bytes than the host's window. They are noise, so they are no hello either.
    let port = d.open()?;
    for _ in 0..256 {
        let mut rw = d.header(port, PORT, RW);
        rw.len = 4000;
        d.put(&rw, &[0xa5; 4000])?;
    }
    d.given_back(TX, "bytes beyond the window")?;
    d.expect(port, RST)?;
    // No window for the answer.
    let port = d.fresh_port();
    let mut request = d.header(port, PORT, REQUEST);
    request.buf_alloc = 0;
    d.send(&request, &[])?;
    d.expect(port, RESPONSE)?;
    for _ in 0..5_000 {
        let ask = d.header(port, PORT, CREDIT_REQUEST);
        d.put(&ask, &[])?;
        while d.receive()?.is_some() {}
    }
    d.given_back(TX, "credit requests")?;
    d.exchange()?;
    Ok("two streams reset, one without a window left alone".into())
}

/// R45: packets of streams that never existed. A reset must never be answered with a reset.
fn stale_streams(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let packets = d.storm(20_000);
    for n in 0..packets {
        let op = [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST][n as usize % 5];
        let header = d.header(20_000 + n, PORT, op);
        d.put(&header, &[])?;
        while d.receive()?.is_some() {}
    }
    d.given_back(TX, "packets of no stream")?;
    d.exchange()?;
    for n in 0..packets {
        let header = d.header(50_000 + n, PORT, RST);
        d.put(&header, &[])?;
    }
    d.given_back(TX, "resets")?;
    d.exchange()?;
    let answered = d.strays.range(50_000..70_000).count();
    ensure!(answered == 0, "{answered} answers to resets");
    Ok("resets are not answered".into())
}

/// R27: doorbells without new buffers.
fn kick_storm(d: &mut Driver) -> anyhow::Result<String> {
    started(d)?;
    let kicks = d.storm(150_000);
    for n in 0..kicks {
        d.kick((n % 3) as u16);
    }
    d.exchange()?;
    Ok(format!("{kicks} empty kicks"))
}

/// Overwrites virtqueues and headers while the device reads them.
fn scribble(dma: &Dma, stop: &AtomicBool) {
    let mut noise = Noise(u64::from(std::process::id()));
    while !stop.load(Ordering::Relaxed) {
        let (r, value) = (noise.next(), noise.next());
        let queue = (r as usize & 1) * 0x8000;
        match r >> 60 {
            0..6 => dma.put(
                queue + (r >> 1) as usize % 0x800 / 8 * 8,
                value >> (r >> 8 & 63),
            ),
            6..9 => dma.put(
                queue + AVAIL + 4 + (r >> 1) as usize % 128 * 2,
                value as u16 % 160,
            ),
            9 => dma.put(queue + AVAIL + 2, value as u16 % 512),
            10 => dma.put(
                queue + USED + (r >> 1) as usize % 0x400 / 4 * 4,
                value as u32,
            ),
            _ => dma.put(
                TX_BUFFERS + (r >> 1) as usize % 0x8000 / 4 * 4,
                value as u32,
            ),
        }
    }
}

/// R21-R24: memory changes after the device has checked it.
fn rewritten_rings(d: &mut Driver) -> anyhow::Result<String> {
    // At least one without and one with EVENT_IDX.
    let (stop, sessions) = (AtomicBool::new(false), d.storm(40).max(2));
    let dma = Arc::clone(&d.dma);
    std::thread::scope(|scope| {
        scope.spawn(|| scribble(&dma, &stop));
        let done = (0..sessions).try_for_each(|round| {
            if round % 2 == 0 {
                d.start()
            } else {
                d.start_event_idx()
            }?;
            d.post_rx();
            for n in 0..500u16 {
                let slot = n % (SIZE - 1);
                let at = d.dma.addr(TX_BUFFERS + usize::from(slot) * 256);
                d.desc(TX, slot, at, 44, NEXT, slot + 1);
                d.desc(TX, slot + 1, at + 44, 64, 0, 0);
                d.offer(TX, slot);
                d.kick(TX);
            }
            anyhow::Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        done
    })?;
    Ok(format!("{sessions} sessions over rings that change"))
}

/// Receive buffers inside the virtqueues: what the host writes there becomes its own next input.
fn rings_as_buffers(d: &mut Driver) -> anyhow::Result<String> {
    for target in [TX, RX] {
        for part in [0, AVAIL, USED] {
            d.start()?;
            let at = d.dma.addr(d.queue(target) + part);
            for i in 0..SIZE {
                d.desc(RX, i, at + u64::from(i % 8), 0x800, WRITE, 0);
                d.offer(RX, i);
            }
            d.kick(RX);
            for n in 0..64 {
                let request = d.header(60_000 + n, PORT, REQUEST);
                // The used index is meaningless here, because the virtqueues are being overwritten.
                d.dma.write(TX_BUFFERS, &request.bytes());
                d.desc(TX, 0, d.dma.addr(TX_BUFFERS), 44, 0, 0);
                d.offer(TX, 0);
                d.kick(TX);
            }
            d.honest()?;
        }
    }
    Ok("6 sessions with overwritten rings".into())
}

/// R34: a reset at any moment.
fn reset_storm(d: &mut Driver) -> anyhow::Result<String> {
    // Enough sessions that some end with packets in flight, even on a slow machine.
    let sessions = d.storm(60).max(12);
    for n in 0..sessions {
        started(d)?;
        for i in 0..n % 32 {
            let header = d.header(70_000 + i, PORT, if i % 3 == 2 { RW } else { REQUEST });
            d.put(&header, &[])?;
        }
        d.kick(TX);
    }
    d.honest()?;
    Ok(format!("{sessions} sessions reset with packets in flight"))
}
