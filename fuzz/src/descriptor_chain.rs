//! A device in use over rings and descriptors of arbitrary bytes.

use std::cell::OnceCell;
use std::sync::Arc;

use adit_benches::{VmMemory, memory};
use adit_channel::carrier::{Armed, Carrier, CarrierFault, Interest, RxPacket, TxSlot};
use adit_channel::device::{
    FEATURES, GuestCid, PAYLOAD_MAX, RX_QUEUE, Signal, TX_QUEUE, VirtQueues, VsockDevice,
};
use adit_engine::{Lane, PacketHeader};
use arbitrary::{Result, Unstructured};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u16 = 16;
const TABLE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const EVENT_IDX: u64 = 1 << 29;

struct Quiet;

impl Signal for Quiet {
    fn signal(&self, _queue: u16) {}
}

thread_local! {
    static MEMORY: OnceCell<Arc<VmMemory>> = const { OnceCell::new() };
}

pub fn run(data: &[u8]) {
    let mem = MEMORY.with(|m| m.get_or_init(memory::anonymous).clone());
    // Too few bytes: what was not written stays as the last input left it, which is as good.
    let _ = attack(&mem, &mut Unstructured::new(data));
}

fn put(mem: &VmMemory, at: u64, bytes: &[u8]) {
    mem.write_slice(bytes, GuestAddress(at)).expect("memory");
}

fn attack(mem: &Arc<VmMemory>, u: &mut Unstructured<'_>) -> Result<()> {
    let cid = GuestCid::new(3).expect("a guest's CID");
    let mut device = VsockDevice::new(cid, 1).expect("a descriptor");
    let event_idx: bool = u.arbitrary()?;
    let features = if event_idx {
        FEATURES
    } else {
        FEATURES & !EVENT_IDX
    };
    device.ack_features(features).expect("offered");
    for queue in [RX_QUEUE, TX_QUEUE] {
        let [_, avail, used] = memory::queue_addrs(queue);
        put(mem, avail, &[0; 6 + 2 * SIZE as usize]);
        put(mem, used, &[0; 6 + 8 * SIZE as usize]);
    }
    let queues = VirtQueues {
        rx: queue(RX_QUEUE).into(),
        tx: queue(TX_QUEUE).into(),
        event: None,
    };
    device
        .activate(mem.clone(), queues, Arc::new(Quiet))
        .expect("usable");
    assert!(device.take_session_change().is_some());
    for _ in 0..4 {
        for queue in [TX_QUEUE, RX_QUEUE] {
            rings(mem, u, queue)?;
        }
        if burst(&mut device).is_err() {
            device.tear();
            assert!(matches!(device.rx(), Ok(None)), "torn, and goes on");
        }
        let interest = Interest { rx: true, tx: true };
        if device.arm(interest) == Armed::WorkAppeared && burst(&mut device).is_err() {
            device.tear();
        }
        for queue in [RX_QUEUE, TX_QUEUE] {
            check_used(mem, queue);
        }
    }
    Ok(())
}

fn queue(index: u16) -> Queue {
    let [desc, avail, used] = memory::queue_addrs(index);
    let mut queue = Queue::new(SIZE).expect("a size");
    let halves = |a: u64| (Some(a as u32), Some((a >> 32) as u32));
    let (low, high) = halves(desc);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(avail);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(used);
    queue.set_used_ring_address(low, high);
    queue.set_size(SIZE);
    queue.set_ready(true);
    queue
}

fn descriptor(u: &mut Unstructured<'_>, queue: u16) -> Result<[u8; 16]> {
    let addr: u64 = match u.int_in_range(0..=7u8)? {
        0 => u.arbitrary()?,
        1 => TABLE + u64::from(u.int_in_range(0..=64u8)?) * 16,
        2 => memory::queue_addrs(queue)[0],
        3 => memory::MEMORY_BYTES as u64 - u64::from(u.arbitrary::<u8>()?),
        _ => DATA + u64::from(u.int_in_range(0..=4095u16)?),
    };
    let len: u32 = match u.int_in_range(0..=7u8)? {
        0 => u.arbitrary()?,
        1 => 44,
        2 => 16 * u32::from(u.int_in_range(0..=20u8)?),
        3 => PAYLOAD_MAX + 44,
        _ => u32::from(u.int_in_range(0..=2000u16)?),
    };
    let own = if queue == RX_QUEUE { 2 } else { 0 };
    let flags: u16 = if u.ratio(1, 4)? {
        u.arbitrary()?
    } else {
        own | u16::from(u.arbitrary::<bool>()?)
    };
    let next: u16 = if u.ratio(1, 16)? {
        u.arbitrary()?
    } else {
        u.int_in_range(0..=SIZE)?
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    Ok(bytes)
}

/// Rewrites descriptors, tables, headers and the available ring.
fn rings(mem: &VmMemory, u: &mut Unstructured<'_>, queue: u16) -> Result<()> {
    let [desc, avail, _] = memory::queue_addrs(queue);
    for _ in 0..u.int_in_range(0..=20u8)? {
        let table = if u.ratio(1, 3)? { TABLE } else { desc };
        let at = table + 16 * u64::from(u.int_in_range(0..=SIZE - 1)?);
        put(mem, at, &descriptor(u, queue)?);
    }
    // A header that is the guest's own: what it says is the engine's business.
    let ids = [3u64.to_le_bytes(), 2u64.to_le_bytes()].concat();
    put(mem, DATA, &ids);
    for i in 0..u.int_in_range(0..=SIZE)? {
        let head: u16 = if u.ratio(1, 16)? {
            u.arbitrary()?
        } else {
            u.int_in_range(0..=SIZE - 1)?
        };
        put(mem, avail + 4 + 2 * u64::from(i), &head.to_le_bytes());
    }
    let idx: u16 = if u.ratio(1, 16)? {
        u.arbitrary()?
    } else {
        u.int_in_range(0..=4 * SIZE)?
    };
    put(mem, avail + 2, &idx.to_le_bytes());
    put(mem, avail, &u.arbitrary::<u16>()?.to_le_bytes());
    Ok(())
}

/// Takes and sends what there is; more than a queue's worth in one go is a loop.
fn burst(device: &mut VsockDevice<Arc<VmMemory>>) -> std::result::Result<(), CarrierFault> {
    device.begin();
    let mut packets = 0;
    let mut bytes = vec![0; 1500];
    while let Some(mut packet) = device.rx()? {
        packets += 1;
        assert!(packets <= 4 * u32::from(SIZE), "packets without end");
        let said = packet.remaining();
        assert!(said <= PAYLOAD_MAX, "{said} bytes of payload");
        let n = packet.read(&mut bytes)?;
        assert_eq!(packet.remaining(), said - n as u32);
    }
    let mut slots = 0;
    while let Some(mut slot) = device.tx(Lane::Bulk, 1000)? {
        slots += 1;
        assert!(slots <= 4 * u32::from(SIZE), "slots without end");
        let capacity = slot.capacity();
        assert!(capacity <= PAYLOAD_MAX);
        let n = slot.write(&bytes[..1000])?;
        assert!(n <= capacity as usize);
        if slots % 5 == 4 {
            // Given back unused: it is there again.
            break;
        }
        slot.commit(&PacketHeader {
            len: n as u32,
            ..header()
        });
    }
    device.flush();
    Ok(())
}

fn header() -> PacketHeader {
    PacketHeader {
        src_port: 1,
        dst_port: 2,
        len: 0,
        kind: 1,
        op: 5,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}

/// The used ring holds heads of the queue only, and nothing was written that is longer than a packet.
fn check_used(mem: &VmMemory, queue: u16) {
    let [_, _, used] = memory::queue_addrs(queue);
    let idx: u16 = mem.read_obj(GuestAddress(used + 2)).expect("memory");
    for i in 0..idx.min(SIZE) {
        let at = used + 4 + 8 * u64::from(i);
        let id: u32 = mem.read_obj(GuestAddress(at)).expect("memory");
        let len: u32 = mem.read_obj(GuestAddress(at + 4)).expect("memory");
        // The guest's own buffers may lie over the ring; then it reads what it had written.
        if id >= u32::from(SIZE) || len > PAYLOAD_MAX + 44 {
            assert_overwritten(mem, queue);
        }
    }
}

fn assert_overwritten(mem: &VmMemory, queue: u16) {
    let ring = memory::queue_addrs(queue);
    let near = |addr: u64, len: u64| {
        let (start, end) = (ring[0], ring[2] + 6 + 8 * u64::from(SIZE));
        addr < end && addr.saturating_add(len) > start
    };
    let tables = [
        memory::queue_addrs(RX_QUEUE)[0],
        memory::queue_addrs(TX_QUEUE)[0],
        TABLE,
    ];
    let mut over = false;
    for table in tables {
        for i in 0..u64::from(SIZE) {
            let at = GuestAddress(table + 16 * i);
            let addr: u64 = mem.read_obj(at).expect("memory");
            let len: u32 = mem.read_obj(GuestAddress(at.0 + 8)).expect("memory");
            over |= near(addr, u64::from(len));
        }
    }
    assert!(over, "a used element that no chain explains");
}
