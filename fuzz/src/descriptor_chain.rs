//! Target `descriptor_chain`: a virtqueue whose every descriptor the input chooses, over memory with a seam, a hole and an
//! end. The device's walk is compared with [`Model`], which follows the specification and is independent of the device.
//!
//! | guest address | what |
//! |---|---|
//! | 0x1000..0x4000 | region A: the queue (descriptors +0, available +0x200, used +0x300), the table at 0x1400, a header at 0x2000 |
//! | 0x4000..0x6000 | region B, which touches A |
//! | 0x6000..0x8000 | a hole |
//! | 0x8000..0x9000 | region C |

mod check;
mod model;

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
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use crate::input::Input;
use check::{Touched, overlap};
use model::{Desc, Image, Model};

const CID: u64 = 3;
const REGIONS: [(u64, u64); 3] = [(0x1000, 0x3000), (0x4000, 0x2000), (0x8000, 0x1000)];
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x1200;
const USED: u64 = 0x1300;
const TABLE: u64 = 0x1400;
const HEADER: u64 = 0x2000;
/// The other queue, which is always empty.
const IDLE: u64 = 0x3000;
const USED_RINGS: [(u64, u64); 2] = [(USED, 0x100), (IDLE + 0x300, 0x100)];
/// Everything that the device reads by itself.
const RINGS: [(u64, u64); 2] = [(DESC, 0x500), (IDLE, 0x400)];
const TABLE_ENTRIES: u16 = 16;
/// Bytes for each bit of the dirty bitmap.
const DIRTY_BYTES: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// Feature bit of indirect descriptors.
const F_INDIRECT: u64 = 1 << 28;

/// The content of memory before a case.
static PATTERN: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
    let byte = |at: u32| (at >> 8) as u8 ^ (at as u8).wrapping_mul(31);
    (0..0x9000).map(byte).collect()
});

type Memory = GuestMemoryMmap<AtomicBitmap>;

struct Quiet;
impl Signal for Quiet {
    fn signal(&self, _queue: u16) {}
}

/// Reused from one input to the next.
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
            // Finer than pages, so that each copy is visible on its own.
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
        // Taken out while it is used: after a panic it is not reused.
        let mut fixture = kept.take().unwrap_or_else(Fixture::new);
        Case::new(&mut fixture, &mut Input(data)).run();
        *kept = Some(fixture);
    });
}

/// One input, decoded.
struct Case<'f> {
    fixture: &'f mut Fixture,
    size: u16,
    indirect: bool,
    to_guest: bool,
    through_fd: bool,
    base: u16,
    /// How far the driver advanced the available index.
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
        // The rest of the input is data where a buffer may be.
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

    /// The heads that the device sees before it finds a fault, and whether it finds one.
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

    /// Receives all packets. Returns the expected used elements, the bytes that may have changed, and whether there was a fault.
    fn packets(&mut self, before: &Image) -> Outcome {
        let (heads, fault) = self.good_heads();
        let mut model = self.model(before);
        let (mut expected, mut aliased) = (Vec::new(), false);
        for &head in &heads {
            if let Some(buffers) = model.walk(head) {
                // A buffer inside a used ring changes while packets are received.
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
                // If the device writes to a table, that table changes.
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
            // If the driver's rings or tables are overwritten, its view is undefined: only bounds are checked then.
            wild = overlap(&buffers, &RINGS);
            used.push((head, 44 + n as u32));
            touched.push(Touched { buffers, bytes });
        }
        let rest = heads.map(|head| (head, 0));
        used.extend(rest);
        (if wild { None } else { Some(used) }, touched, fault)
    }
}

/// Expected used elements (`None`: the driver's own rings were overwritten), writes, and whether there was a fault.
type Outcome = (Option<Vec<(u16, u32)>>, Vec<Touched>, bool);
