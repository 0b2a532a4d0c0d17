//! Target `descriptor_chain`: a virtqueue whose every descriptor the input chooses, over memory with a seam, a hole and an
//! end. The device's walk is compared with [`Model`], which follows the specification and knows nothing of the device.
//!
//! | guest address | what |
//! |---|---|
//! | 0x1000..0x4000 | region A: the queue (descriptors +0, available +0x200, used +0x300), the table at 0x1400, a header at 0x2000 |
//! | 0x4000..0x6000 | region B, which touches A |
//! | 0x6000..0x8000 | nothing |
//! | 0x8000..0x9000 | region C |

use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use adit_channel::carrier::{Carrier, RxPacket, TxSlot};
use adit_channel::device::{
    FEATURES, GuestCid, HEADER_BYTES, HOST_CID, PAYLOAD_MAX, Signal, VirtQueues, VsockDevice,
    WireHeader,
};
use adit_engine::{Lane, PacketHeader, ResetReason};
use nix::sys::mman::ProtFlags;
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::input::Input;

const CID: u64 = 3;
const REGIONS: [(u64, u64); 3] = [(0x1000, 0x3000), (0x4000, 0x2000), (0x8000, 0x1000)];
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x1200;
const USED: u64 = 0x1300;
const TABLE: u64 = 0x1400;
const HEADER: u64 = 0x2000;
/// The other queue, which stays empty.
const IDLE: u64 = 0x3000;
const USED_RINGS: [(u64, u64); 2] = [(USED, 0x100), (IDLE + 0x300, 0x100)];
/// Everything that the device looks at by itself.
const RINGS: [(u64, u64); 2] = [(DESC, 0x500), (IDLE, 0x400)];
const TABLE_ENTRIES: u16 = 16;
/// Bytes that one bit of the dirty bitmap stands for.
const DIRTY_BYTES: NonZeroUsize = NonZeroUsize::new(16).unwrap();

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Feature bit of indirect descriptors.
const F_INDIRECT: u64 = 1 << 28;

/// What memory holds before a case.
static PATTERN: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
    let byte = |at: u32| (at >> 8) as u8 ^ (at as u8).wrapping_mul(31);
    (0..0x9000).map(byte).collect()
});

type Memory = GuestMemoryMmap<AtomicBitmap>;

struct Quiet;
impl Signal for Quiet {
    fn signal(&self, _queue: u16) {}
}

/// What survives from one input to the next.
struct Fixture {
    mem: Arc<Memory>,
    device: VsockDevice<Arc<Memory>>,
    sockets: (UnixStream, UnixStream),
}

thread_local! {
    static FIXTURE: std::cell::RefCell<Option<Fixture>> = const { std::cell::RefCell::new(None) };
}

impl Fixture {
    fn new() -> Self {
        let regions = REGIONS.map(|(at, len)| {
            // Finer than pages, so that each copy is seen by itself.
            let bitmap = AtomicBitmap::new(len as usize, DIRTY_BYTES);
            let region = MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
                .with_mmap_prot((ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).bits())
                .build();
            GuestRegionMmap::new(region.expect("memory"), GuestAddress(at)).expect("no wrap")
        });
        let cid = GuestCid::new(CID).expect("a guest's CID");
        let sockets = UnixStream::pair().expect("sockets");
        sockets.0.set_nonblocking(true).expect("a flag");
        sockets.1.set_nonblocking(true).expect("a flag");
        Self {
            mem: Arc::new(Memory::from_regions(regions.into()).expect("memory")),
            device: VsockDevice::new(cid, 1).expect("a descriptor"),
            sockets,
        }
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    FIXTURE.with_borrow_mut(|kept| {
        // Taken out while it is used: what a panic leaves behind is not used again.
        let mut fixture = kept.take().unwrap_or_else(Fixture::new);
        Case::new(&mut fixture, &mut Input(data)).run();
        *kept = Some(fixture);
    });
}

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    fn take(input: &mut Input<'_>) -> Self {
        let kind = input.u8();
        let small = u64::from(input.u16());
        let addr = match kind % 16 {
            0..=3 => HEADER + 44,
            4 | 5 => HEADER,
            6 => 0x1000 + small % 0x3000,
            7 => 0x4000 + small % 0x2000,
            8 => 0x8000 + small % 0x1000,
            9 => 0x4000 - small % 64,
            10 => 0x6000 - small % 64,
            11 => 0x9000 - small % 64,
            12 => u64::MAX - small % 0x2000,
            13 => 0x1000 - small % 64,
            14 => TABLE + small % 0x100,
            _ => input.u64(),
        };
        let len = match kind >> 5 {
            0 => 44,
            1 => 0,
            2..=4 => u32::from(input.u8()),
            5 => 16 * u32::from(input.u8()),
            6 => u32::from(input.u16()),
            _ => input.edge32(),
        };
        let bits = input.u8();
        // Mostly one of the flags that exist; all sixteen bits at times.
        let flags = if bits & 0xc0 == 0xc0 {
            input.u16()
        } else {
            u16::from(bits & 7)
        };
        let next = u16::from(bits >> 3 & 7)
            + if bits & 0xc0 == 0x80 {
                u16::from(input.u8())
            } else {
                0
            };
        Self {
            addr,
            len,
            flags,
            next,
        }
    }

    fn bytes(&self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.addr.to_le_bytes());
        b[8..12].copy_from_slice(&self.len.to_le_bytes());
        b[12..14].copy_from_slice(&self.flags.to_le_bytes());
        b[14..].copy_from_slice(&self.next.to_le_bytes());
        b
    }
}

/// Guest memory as bytes, for the model.
#[derive(Clone)]
struct Image(Vec<u8>);

impl Image {
    fn of(mem: &Memory) -> Self {
        let mut bytes = vec![0; 0x9000];
        for (at, len) in REGIONS {
            let piece = &mut bytes[at as usize..(at + len) as usize];
            mem.read_slice(piece, GuestAddress(at)).expect("memory");
        }
        Self(bytes)
    }

    /// The bytes at an address, if they are all memory.
    fn get(&self, addr: u64, len: u64) -> Option<&[u8]> {
        let end = addr.checked_add(len)?;
        let inside = (0x1000..=0x6000).contains(&addr) && end <= 0x6000
            || (0x8000..=0x9000).contains(&addr) && end <= 0x9000;
        inside.then(|| &self.0[addr as usize..end as usize])
    }

    fn desc(&self, table: u64, index: u16) -> Option<Desc> {
        let b = self.get(table.checked_add(16 * u64::from(index))?, 16)?;
        let word = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        Some(Desc {
            addr: u64::from_le_bytes(*b.first_chunk()?),
            len: u32::from(word(8)) | u32::from(word(10)) << 16,
            flags: word(12),
            next: word(14),
        })
    }
}

/// The specification's walk of a chain, over a copy of memory.
struct Model<'a> {
    image: &'a Image,
    size: u16,
    indirect: bool,
    writable: bool,
    /// Indirect tables that were looked at.
    tables: Vec<(u64, u64)>,
}

impl Model<'_> {
    /// The buffers of a chain; `None` if a driver must not post it.
    fn walk(&mut self, head: u16) -> Option<Vec<(u64, u64)>> {
        let limit: u64 = if self.writable {
            u64::from(u32::MAX)
        } else {
            44 + u64::from(PAYLOAD_MAX)
        };
        let mut buffers = Vec::new();
        let (mut table, mut entries, mut nested) = (DESC, self.size, false);
        let (mut index, mut seen) = (head, vec![false; usize::from(self.size)]);
        loop {
            let been = seen.get_mut(usize::from(index))?;
            if std::mem::replace(been, true) {
                return None;
            }
            let desc = self.image.desc(table, index)?;
            if desc.flags & INDIRECT != 0 {
                let good = !nested
                    && self.indirect
                    && desc.flags & NEXT == 0
                    && desc.len > 0
                    && desc.len % 16 == 0
                    && desc.len <= 16 * 1024;
                if !good {
                    return None;
                }
                entries = (desc.len / 16) as u16;
                self.tables.push((desc.addr, u64::from(desc.len)));
                (table, index, nested) = (desc.addr, 0, true);
                seen = vec![false; usize::from(entries)];
                continue;
            }
            if (desc.flags & WRITE != 0) != self.writable {
                return None;
            }
            if desc.len > 0 {
                self.image.get(desc.addr, u64::from(desc.len))?;
                buffers.push((desc.addr, u64::from(desc.len)));
                if buffers.iter().map(|b| b.1).sum::<u64>() > limit {
                    return None;
                }
            }
            if desc.flags & NEXT == 0 {
                break;
            }
            index = desc.next;
            if index >= entries {
                return None;
            }
        }
        (buffers.iter().map(|b| b.1).sum::<u64>() >= 44).then_some(buffers)
    }

    fn bytes(&self, buffers: &[(u64, u64)]) -> Vec<u8> {
        let pieces = buffers
            .iter()
            .map(|&(at, len)| self.image.get(at, len).expect("checked"));
        pieces.flatten().copied().collect()
    }
}

/// What one input says.
struct Case<'f> {
    fixture: &'f mut Fixture,
    size: u16,
    indirect: bool,
    to_guest: bool,
    through_fd: bool,
    base: u16,
    /// What the driver added to the available index.
    added: u16,
    heads: Vec<u16>,
    /// Bytes that the host writes into each slot.
    piece: usize,
}

impl<'f> Case<'f> {
    fn new(fixture: &'f mut Fixture, input: &mut Input<'_>) -> Self {
        let shape = input.u8();
        let size = 1 << (shape & 3) << (shape >> 2 & 1);
        let (to_guest, through_fd) = (shape & 0x10 != 0, shape & 0x20 != 0);
        let (event_idx, indirect) = (shape & 0x40 == 0, shape & 0x80 == 0);
        let base = if input.flag() { input.u16() } else { 0 };
        let added = match input.u8() {
            jump @ 0xf0.. => u16::from(jump - 0xf0) << 12 | input.u16(),
            n => u16::from(n) % (size + 1),
        };
        let heads = (0..size).map(|_| u16::from(input.u8() % 32)).collect();
        let piece = usize::from(input.u8()) * 17;
        let mut case = Self {
            fixture,
            size,
            indirect,
            to_guest,
            through_fd,
            base,
            added,
            heads,
            piece,
        };
        case.fill(input);
        case.activate(event_idx);
        case
    }

    fn fill(&mut self, input: &mut Input<'_>) {
        let mem = &self.fixture.mem;
        let write =
            |at: u64, bytes: &[u8]| mem.write_slice(bytes, GuestAddress(at)).expect("memory");
        for (at, len) in REGIONS {
            write(at, &PATTERN[at as usize..(at + len) as usize]);
        }
        for at in [DESC, IDLE] {
            write(at, &[0; 0x400]);
        }
        let h = PacketHeader {
            src_port: 1,
            dst_port: 2,
            kind: 1,
            op: 5,
            ..PacketHeader::default()
        };
        write(HEADER, &WireHeader::new(CID, HOST_CID, &h).to_bytes());
        for i in 0..self.size {
            write(DESC + 16 * u64::from(i), &Desc::take(input).bytes());
        }
        for i in 0..TABLE_ENTRIES {
            write(TABLE + 16 * u64::from(i), &Desc::take(input).bytes());
        }
        write(USED + 2, &self.base.to_le_bytes());
        write(AVAIL + 2, &self.base.wrapping_add(self.added).to_le_bytes());
        for (i, head) in self.heads.iter().enumerate() {
            let slot = self.base.wrapping_add(i as u16) % self.size;
            write(AVAIL + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        }
        // The rest of the input lies where a buffer may be.
        write(0x2100, input.bytes(256));
    }

    fn activate(&mut self, event_idx: bool) {
        let queue = |at: u64, size: u16, base: u16| {
            let mut queue = Queue::new(1024).expect("a power of two");
            queue.set_size(size);
            queue.set_desc_table_address(Some(at as u32), Some(0));
            queue.set_avail_ring_address(Some(at as u32 + 0x200), Some(0));
            queue.set_used_ring_address(Some(at as u32 + 0x300), Some(0));
            queue.set_next_avail(base);
            queue.set_next_used(base);
            queue.set_ready(true);
            queue
        };
        let (hostile, idle) = (queue(DESC, self.size, self.base), queue(IDLE, 1, 0));
        let (rx, tx) = if self.to_guest {
            (hostile, idle)
        } else {
            (idle, hostile)
        };
        let queues = VirtQueues {
            rx: rx.into(),
            tx: tx.into(),
            event: None,
        };
        let mut features = FEATURES;
        if !self.indirect {
            features &= !F_INDIRECT;
        }
        if !event_idx {
            features &= !(1 << 29);
        }
        let device = &mut self.fixture.device;
        device.reset(ResetReason::Epoch);
        device.ack_features(features).expect("offered");
        let mem = self.fixture.mem.clone();
        device
            .activate(mem, queues, Arc::new(Quiet))
            .expect("a usable queue");
        let _ = device.take_session_change();
        for region in self.fixture.mem.iter() {
            MmapRegion::bitmap(region).reset();
        }
    }

    fn run(mut self) {
        let before = Image::of(&self.fixture.mem);
        self.fixture.device.begin();
        // `begin` may write the flags of both used rings.
        let (used, touched, fault) = if self.to_guest {
            self.slots(&before)
        } else {
            self.packets(&before)
        };
        self.fixture.device.flush();
        let after = Image::of(&self.fixture.mem);
        if fault {
            self.fixture.device.tear();
            self.fixture.device.begin();
            assert!(matches!(self.fixture.device.rx(), Ok(None)), "torn");
        }
        match used {
            Some(used) => {
                self.check_used(&after, &used);
                self.check_writes(&before, &after, &touched);
            }
            None if self.to_guest => {}
            None => self.check_writes(&before, &after, &[]),
        }
    }

    /// Heads that the device sees before it finds a fault; whether it finds one.
    fn good_heads(&self) -> (Vec<u16>, bool) {
        if self.added > self.size {
            return (vec![], true);
        }
        let heads: Vec<u16> = self.heads[..usize::from(self.added)].to_vec();
        match heads.iter().position(|&h| h >= self.size) {
            Some(bad) => (heads[..bad].to_vec(), true),
            None => (heads, false),
        }
    }

    fn model<'a>(&self, image: &'a Image) -> Model<'a> {
        Model {
            image,
            size: self.size,
            indirect: self.indirect,
            writable: self.to_guest,
            tables: vec![],
        }
    }

    /// Takes all packets; returns the used elements to expect, the bytes that may have changed, whether a fault came.
    fn packets(&mut self, before: &Image) -> Outcome {
        let (heads, fault) = self.good_heads();
        let mut model = self.model(before);
        let (mut expected, mut aliased) = (Vec::new(), false);
        for &head in &heads {
            if let Some(buffers) = model.walk(head) {
                // What lies in a used ring changes while packets are taken.
                aliased |= overlap(&buffers, &USED_RINGS);
                let bytes = model.bytes(&buffers);
                let wire = WireHeader::from_bytes(bytes.first_chunk().expect("44 bytes"));
                if wire.src_cid() == CID && wire.dst_cid() == HOST_CID {
                    expected.push((wire.header(), bytes[HEADER_BYTES..].to_vec()));
                }
            }
        }
        aliased |= overlap(&model.tables, &USED_RINGS);
        let mut expected = expected.into_iter();
        loop {
            let mut packet = match self.fixture.device.rx() {
                Ok(Some(packet)) => packet,
                Ok(None) => break assert!(!fault, "a fault was overlooked"),
                Err(e) => break assert!(fault, "{e}"),
            };
            let header = *packet.header();
            let len = packet.remaining() as usize;
            let mut got = vec![0; len];
            if self.through_fd && len > 0 {
                let (near, far) = &mut self.fixture.sockets;
                let mut n = 0;
                while n < len {
                    packet
                        .write_to(near.as_fd(), (self.piece + 1) as u32)
                        .expect("room");
                    n += far.read(&mut got[n..]).expect("bytes");
                }
            } else {
                assert_eq!(packet.read(&mut got).expect("readable"), len);
            }
            assert_eq!(packet.remaining(), 0);
            drop(packet);
            if aliased {
                continue;
            }
            let (h, body) = expected.next().expect("a packet that nobody sent");
            assert_eq!(header, h);
            assert!(got == body, "payload differs");
        }
        if !aliased {
            assert_eq!(expected.len(), 0, "packets were dropped");
        }
        let used = heads.iter().map(|&head| (head, 0)).collect();
        (if aliased { None } else { Some(used) }, vec![], fault)
    }

    /// Fills every slot.
    fn slots(&mut self, before: &Image) -> Outcome {
        let (heads, fault) = self.good_heads();
        let mut heads = heads.into_iter();
        let (mut used, mut touched) = (Vec::new(), Vec::new());
        let mut wild = false;
        let mut turn = 0u8;
        loop {
            turn = turn.wrapping_add(1);
            let mut slot = match self.fixture.device.tx(Lane::Bulk, 4096) {
                Ok(Some(slot)) => slot,
                Ok(None) => break assert!(wild || !fault, "a fault was overlooked"),
                Err(e) => break assert!(wild || fault, "{e}"),
            };
            if wild {
                slot.commit(&PacketHeader::default());
                continue;
            }
            let mut model = Model {
                image: before,
                size: self.size,
                indirect: self.indirect,
                writable: true,
                tables: vec![],
            };
            let chain = loop {
                let Some(head) = heads.next() else { break None };
                let chain = model.walk(head);
                // A table that the device writes over is another table from then on.
                wild |= overlap(&model.tables, &USED_RINGS)
                    || touched
                        .iter()
                        .any(|t: &Touched| overlap(&t.buffers, &model.tables));
                match chain {
                    Some(buffers) => break Some((head, buffers)),
                    None => used.push((head, 0)),
                }
            };
            if wild {
                slot.commit(&PacketHeader::default());
                continue;
            }
            let (head, buffers) = chain.expect("a slot that nobody posted");
            let total: u64 = buffers.iter().map(|b| b.1).sum();
            let capacity = (total - 44).min(u64::from(PAYLOAD_MAX));
            assert_eq!(u64::from(slot.capacity()), capacity);
            let n = self.piece.min(capacity as usize);
            let payload = vec![turn | 0x80; n];
            if self.through_fd && n > 0 {
                let (near, far) = &mut self.fixture.sockets;
                near.write_all(&payload).expect("room");
                let mut done = 0;
                while done < n {
                    done += slot.read_from(far.as_fd(), n as u32).expect("bytes");
                }
            } else {
                assert_eq!(slot.write(&payload).expect("writable"), n);
            }
            let h = PacketHeader {
                src_port: 7,
                op: 5,
                kind: 1,
                ..PacketHeader::default()
            };
            slot.commit(&h);
            let h = PacketHeader { len: n as u32, ..h };
            let mut bytes = WireHeader::new(HOST_CID, CID, &h).to_bytes().to_vec();
            bytes.extend(&payload);
            // A driver that has its rings or tables overwritten sees whatever it sees: only bounds are checked then.
            wild = overlap(&buffers, &RINGS);
            used.push((head, 44 + n as u32));
            touched.push(Touched { buffers, bytes });
        }
        let rest = heads.map(|head| (head, 0));
        used.extend(rest);
        (if wild { None } else { Some(used) }, touched, fault)
    }

    fn check_used(&self, after: &Image, used: &[(u16, u32)]) {
        let idx = after.get(USED + 2, 2).expect("memory");
        let idx = u16::from_le_bytes([idx[0], idx[1]]);
        assert_eq!(idx.wrapping_sub(self.base), used.len() as u16, "used index");
        for (i, &(head, len)) in used.iter().enumerate() {
            let slot = self.base.wrapping_add(i as u16) % self.size;
            let e = after
                .get(USED + 4 + 8 * u64::from(slot), 8)
                .expect("memory");
            let (id, n) = e.split_at(4);
            assert_eq!(id, u32::from(head).to_le_bytes(), "used element {i}");
            assert_eq!(n, len.to_le_bytes(), "used element {i}");
        }
    }

    /// Nothing changed that was not to, what was to did, and all of it is marked.
    fn check_writes(&self, before: &Image, after: &Image, touched: &[Touched]) {
        let mut expected = before.clone();
        for t in touched {
            t.apply(&mut expected);
        }
        let written: Vec<_> = touched
            .iter()
            .flat_map(|t| &t.buffers)
            .chain(&USED_RINGS)
            .collect();
        let allowed = |at: u64| {
            written
                .iter()
                .any(|&&(start, len)| at >= start && at - start < len)
        };
        // By the line, since most lines did not change.
        for line in (0..0x9000usize).step_by(256) {
            let range = line..line + 256;
            if before.0[range.clone()] == after.0[range.clone()] {
                continue;
            }
            for at in range.filter(|&at| before.0[at] != after.0[at]) {
                assert!(allowed(at as u64), "{at:#x} was written");
                assert!(self.dirty(at as u64), "{at:#x} is not marked dirty");
            }
        }
        // What two buffers share is whichever came last, and rings are the device's.
        let mut buffers: Vec<_> = touched.iter().flat_map(|t| &t.buffers).copied().collect();
        buffers.sort_unstable();
        let shared = buffers.windows(2).any(|w| w[0].0 + w[0].1 > w[1].0);
        if !shared && !overlap(&buffers, &RINGS) {
            for &(at, len) in &buffers {
                let range = at as usize..(at + len) as usize;
                assert!(
                    after.0[range.clone()] == expected.0[range],
                    "{at:#x}+{len:#x}"
                );
            }
        }
    }

    fn dirty(&self, addr: u64) -> bool {
        let region = self
            .fixture
            .mem
            .find_region(GuestAddress(addr))
            .expect("memory");
        let offset = addr - region.start_addr().0;
        region.bitmap().dirty_at(offset as usize)
    }
}

/// Used elements to expect (`None`: the driver had its own rings overwritten), writes, whether a fault came.
type Outcome = (Option<Vec<(u16, u32)>>, Vec<Touched>, bool);

/// What the host wrote into a chain.
struct Touched {
    buffers: Vec<(u64, u64)>,
    bytes: Vec<u8>,
}

impl Touched {
    fn apply(&self, image: &mut Image) {
        let mut bytes = self.bytes.iter();
        for &(at, len) in &self.buffers {
            let place = &mut image.0[at as usize..(at + len) as usize];
            place
                .iter_mut()
                .zip(&mut bytes)
                .for_each(|(to, from)| *to = *from);
        }
    }
}

fn overlap(a: &[(u64, u64)], b: &[(u64, u64)]) -> bool {
    // An end may lie behind the last address only where nothing is.
    let apart = |x: &(u64, u64), y: &(u64, u64)| x.0.saturating_add(x.1) <= y.0;
    a.iter()
        .any(|x| b.iter().any(|y| !apart(x, y) && !apart(y, x)))
}
