//! A driver that does what a case tells it, valid or not. It writes the virtqueues by hand and uses no interrupts: it polls.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Common, Hello, Open};
use adit_channel::refusal::Code;
use anyhow::{bail, ensure};

use crate::memory::Dma;
use crate::pci::Function;
use crate::registers::{Register, Registers};
use crate::window::Window;

/// Descriptors of each queue.
pub const SIZE: u16 = 128;
/// Queue to the guest.
pub const RX: u16 = 0;
/// Queue from the guest.
pub const TX: u16 = 1;
/// Bytes of a header.
pub const HEADER: usize = 44;
/// Offset of the available ring in a queue's part of the page.
pub const AVAIL: usize = 0x1000;
/// Offset of the used ring.
pub const USED: usize = 0x2000;
/// Offset of the indirect tables, which have 16 KiB.
pub const TABLES: usize = 0x4000;
/// Flags of a descriptor.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;
/// Operations (virtio 1.3 §5.10.6).
pub const REQUEST: u16 = 1;
/// See [`REQUEST`].
pub const RESPONSE: u16 = 2;
/// See [`REQUEST`].
pub const RST: u16 = 3;
/// See [`REQUEST`].
pub const SHUTDOWN: u16 = 4;
/// See [`REQUEST`].
pub const RW: u16 = 5;
/// See [`REQUEST`].
pub const CREDIT_UPDATE: u16 = 6;
/// See [`REQUEST`].
pub const CREDIT_REQUEST: u16 = 7;

const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
/// Bytes of a receive buffer, as newer kernels post them.
const RX_BUFFER: usize = 0x1000;
const RX_BUFFERS: usize = 0x2_0000;
/// Offset of the packets to the host, one page each.
pub const TX_BUFFERS: usize = 0x10_0000;
const QUEUE_PART: usize = 0x8000;
const PATIENCE: Duration = Duration::from_secs(20);
const BREATH: Duration = Duration::from_millis(10);
/// A short sleep between polls, so that others can use the processor.
const POLL: Duration = Duration::from_micros(100);

/// A packet header with any value in any field.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Little-endian, as on the wire.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        b[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        b[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        b[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        b[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        b[24..28].copy_from_slice(&self.len.to_le_bytes());
        b[28..30].copy_from_slice(&self.kind.to_le_bytes());
        b[30..32].copy_from_slice(&self.op.to_le_bytes());
        b[32..36].copy_from_slice(&self.flags.to_le_bytes());
        b[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        b[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        b
    }
}

/// A packet from the host.
#[derive(Debug)]
pub struct Packet {
    pub dst_port: u32,
    pub op: u16,
    pub payload: Vec<u8>,
}

/// Waits for a condition.
pub fn wait<T>(
    what: &str,
    mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        if let Some(found) = ask()? {
            return Ok(found);
        }
        thread::sleep(POLL);
    }
    bail!("{what}: not after {} s", PATIENCE.as_secs())
}

/// The device and the state of its driver.
pub struct Driver {
    pub dma: Arc<Dma>,
    regs: Box<dyn Registers>,
    pub cid: u64,
    /// Storms are smaller by this factor.
    part: u32,
    /// Ports that got packets for which nobody waited.
    pub strays: BTreeSet<u32>,
    avail: [u16; 3],
    rx_seen: u16,
    port: u32,
}

impl Driver {
    /// Takes the device from the kernel, without starting it.
    pub fn new(part: u32) -> anyhow::Result<Self> {
        let regs: Box<dyn Registers> = match Function::take()? {
            Some(function) => Box::new(function),
            None => Box::new(Window::take()?),
        };
        let cid = regs.guest_cid();
        Ok(Self {
            dma: Arc::new(Dma::new()?),
            strays: BTreeSet::new(),
            regs,
            cid,
            part: part.max(1),
            avail: [0; 3],
            rx_seen: 0,
            port: 5000,
        })
    }

    /// The size of a storm on this machine.
    pub fn storm(&self, full: u32) -> u32 {
        full / self.part
    }

    /// The offset of a queue's part.
    pub fn queue(&self, queue: u16) -> usize {
        usize::from(queue) * QUEUE_PART
    }

    /// Resets the device, and starts it with empty queues.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.start_with(F_VERSION_1 | F_INDIRECT)
    }

    /// As `start`, with notifications by index.
    pub fn start_event_idx(&mut self) -> anyhow::Result<()> {
        self.start_with(F_VERSION_1 | F_INDIRECT | F_EVENT_IDX)
    }

    /// Resets the device.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.regs.write(Register::Status, 0);
        wait("reset", || Ok((self.regs.status() == 0).then_some(())))?;
        self.avail = [0; 3];
        self.rx_seen = 0;
        Ok(())
    }

    fn start_with(&mut self, features: u64) -> anyhow::Result<()> {
        self.reset()?;
        let set = |register, value| self.regs.write(register, value);
        set(Register::Status, 3);
        for half in 0..2u32 {
            set(Register::FeaturesSelect, half);
            set(Register::Features, (features >> (32 * half)) as u32);
        }
        set(Register::Status, 11);
        ensure!(self.regs.status() & 8 != 0, "features are refused");
        for queue in 0..3u16 {
            let base = self.queue(queue);
            self.dma.write(base, &[0; QUEUE_PART]);
            // Without EVENT_IDX: asks for no interrupts.
            self.dma.put(base + AVAIL, 1u16);
            set(Register::QueueSelect, queue.into());
            set(Register::QueueSize, SIZE.into());
            for (n, part) in [0, AVAIL, USED].into_iter().enumerate() {
                let addr = self.dma.addr(base + part);
                set(Register::QueueAddress(2 * n), addr as u32);
                set(Register::QueueAddress(2 * n + 1), (addr >> 32) as u32);
            }
            set(Register::QueueEnable, 1);
        }
        set(Register::Status, 15);
        Ok(())
    }

    /// Writes a descriptor.
    pub fn desc(&self, queue: u16, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.queue(queue) + 16 * usize::from(index);
        self.desc_at(at, addr, len, flags, next);
    }

    /// Writes a descriptor anywhere in the page.
    pub fn desc_at(&self, at: usize, addr: u64, len: u32, flags: u16, next: u16) {
        self.dma.put(at, addr);
        self.dma.put(at + 8, len);
        self.dma.put(at + 12, flags);
        self.dma.put(at + 14, next);
    }

    /// Makes a chain available without a kick.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let (base, index) = (self.queue(queue), &mut self.avail[usize::from(queue)]);
        let entry = base + AVAIL + 4 + 2 * usize::from(*index % SIZE);
        self.dma.put(entry, head);
        *index = index.wrapping_add(1);
        self.dma.put(base + AVAIL + 2, *index);
    }

    /// Stores any available index.
    pub fn jump(&mut self, queue: u16, by: u16) {
        let index = &mut self.avail[usize::from(queue)];
        *index = index.wrapping_add(by);
        self.dma
            .put(usize::from(queue) * QUEUE_PART + AVAIL + 2, *index);
    }

    /// Kicks the queue.
    pub fn kick(&self, queue: u16) {
        self.regs.kick(queue);
    }

    /// The used index.
    pub fn used(&self, queue: u16) -> u16 {
        self.dma.get(self.queue(queue) + USED + 2)
    }

    /// Kicks, and waits until everything available was used.
    pub fn given_back(&self, queue: u16, what: &str) -> anyhow::Result<()> {
        self.kick(queue);
        let want = self.avail[usize::from(queue)];
        wait(what, || Ok((self.used(queue) == want).then_some(())))
    }

    /// Posts every receive buffer.
    pub fn post_rx(&mut self) {
        for i in 0..SIZE {
            let at = RX_BUFFERS + usize::from(i) * RX_BUFFER;
            self.desc(RX, i, self.dma.addr(at), RX_BUFFER as u32, WRITE, 0);
            self.offer(RX, i);
        }
        self.kick(RX);
    }

    /// A header of a packet to the host.
    pub fn header(&self, src_port: u32, dst_port: u32, op: u16) -> Header {
        Header {
            src_cid: self.cid,
            dst_cid: 2,
            src_port,
            dst_port,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 64 << 10,
            fwd_cnt: 0,
        }
    }

    /// Sends a packet of at most a page once there is room. The caller must kick.
    pub fn put(&mut self, header: &Header, payload: &[u8]) -> anyhow::Result<()> {
        let index = self.avail[usize::from(TX)];
        if index.wrapping_sub(self.used(TX)) >= SIZE {
            self.kick(TX);
            wait("room to send", || {
                Ok((index.wrapping_sub(self.used(TX)) < SIZE).then_some(()))
            })?;
        }
        let slot = index % SIZE;
        let at = TX_BUFFERS + usize::from(slot) * 4096;
        self.dma.write(at, &header.bytes());
        self.dma.write(at + HEADER, payload);
        let len = (HEADER + payload.len()) as u32;
        self.desc(TX, slot, self.dma.addr(at), len, 0, 0);
        self.offer(TX, slot);
        Ok(())
    }

    /// Sends one packet, with a kick.
    pub fn send(&mut self, header: &Header, payload: &[u8]) -> anyhow::Result<()> {
        let mut header = *header;
        header.len = payload.len() as u32;
        self.put(&header, payload)?;
        self.kick(TX);
        Ok(())
    }

    /// Receives the next packet from the host, and posts its buffer again.
    pub fn receive(&mut self) -> anyhow::Result<Option<Packet>> {
        if self.used(RX) == self.rx_seen {
            return Ok(None);
        }
        let base = self.queue(RX) + USED + 4 + 8 * usize::from(self.rx_seen % SIZE);
        let (id, len): (u32, u32) = (self.dma.get(base), self.dma.get(base + 4));
        self.rx_seen = self.rx_seen.wrapping_add(1);
        let len = len as usize;
        ensure!(id < u32::from(SIZE), "used id {id}");
        ensure!(len <= RX_BUFFER, "{len} bytes in a buffer of {RX_BUFFER}");
        if len < HEADER {
            return Ok(None);
        }
        let bytes = self.dma.read(RX_BUFFERS + id as usize * RX_BUFFER, len);
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        self.offer(RX, id as u16);
        self.kick(RX);
        Ok(Some(Packet {
            dst_port: word(20),
            op: u16::from_le_bytes([bytes[30], bytes[31]]),
            payload: bytes[HEADER..].to_vec(),
        }))
    }

    /// Waits for a packet to a port of ours. Drops packets to other ports.
    pub fn expect(&mut self, port: u32, op: u16) -> anyhow::Result<Packet> {
        let mut strays = BTreeSet::new();
        let found = wait(&format!("packet with op {op}"), || {
            loop {
                match self.receive()? {
                    None => return Ok(None),
                    Some(p) if p.dst_port == port && p.op == op => return Ok(Some(p)),
                    Some(p) if p.dst_port == port && p.op == RST => bail!("reset"),
                    Some(p) => drop(strays.insert(p.dst_port)),
                }
            }
        });
        self.strays.append(&mut strays);
        found
    }

    /// A port that was not used before.
    pub fn fresh_port(&mut self) -> u32 {
        self.port += 1;
        self.port
    }

    /// Opens a stream to the host's well-known port.
    pub fn open(&mut self) -> anyhow::Result<u32> {
        let port = self.fresh_port();
        let request = self.header(port, hello::PORT, REQUEST);
        self.send(&request, &[])?;
        self.expect(port, RESPONSE)?;
        Ok(port)
    }

    /// Does what a well-behaved driver does: opens a stream, sends a hello and waits for the host's answer.
    pub fn exchange(&mut self) -> anyhow::Result<()> {
        let port = self.open()?;
        let open = Open::new("none".parse()?, Common::default());
        let rw = self.header(port, hello::PORT, RW);
        self.send(&rw, &Hello::Open(open).encode())?;
        let answer = self.expect(port, RW)?;
        match hello::read(&mut &answer.payload[..])? {
            Hello::Refuse(r) if r.refusal.code() == Code::UnknownService => {}
            other => bail!("answer to a hello: {other:?}"),
        }
        let rst = self.header(port, hello::PORT, RST);
        self.send(&rst, &[])
    }

    /// Resets the device and checks that it serves a well-behaved driver. After a storm of streams the host may still be busy, and
    /// refuse one for a moment.
    pub fn honest(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            self.start()?;
            self.post_rx();
            match self.exchange() {
                Err(_) if begin.elapsed() < PATIENCE => thread::sleep(BREATH),
                done => return done,
            }
        }
    }
}
