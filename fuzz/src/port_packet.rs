//! Target `port_packet`: a guest with well-framed packets of any content, and a port that echoes.

use std::cell::OnceCell;
use std::sync::Arc;

use adit_channel::device::{GuestCid, HOST_CID, WireHeader};
use adit_channel::port::Notice;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::Sink;
use adit_engine::{EngineConfig, PacketHeader};
use adit_testkit::service::Echo;
use adit_testkit::session::{Device, active_device};
use adit_testkit::{Driver, DriverConfig, VmMemory, memory};
use arbitrary::{Result, Unstructured};
use vm_memory::{Bytes, GuestAddress};

thread_local! {
    static MEMORY: OnceCell<Arc<VmMemory>> = const { OnceCell::new() };
}

const HOST_PORT: u32 = 741;
const PACKETS_MAX: usize = 200;
const STREAMS: u32 = 16;

pub fn run(data: &[u8]) {
    let mut u = Unstructured::new(data);
    let config = [DriverConfig::LINUX_6_1, DriverConfig::LINUX_6_12]
        [usize::from(u.arbitrary().unwrap_or(false))];
    let cid = GuestCid::new(3).expect("a guest's CID");
    let mem = MEMORY.with(|m| m.get_or_init(memory::anonymous).clone());
    for queue in 0..2 {
        for part in memory::queue_addrs(queue) {
            mem.write_slice(&[0; 4096], GuestAddress(part))
                .expect("memory");
        }
    }
    let mut driver = Driver::new(mem, cid, config);
    let mut shard: Shard<Device> = Shard::new().expect("an epoll set");
    let cfg = EngineConfig {
        max_streams: STREAMS,
        ..EngineConfig::default()
    };
    let port = shard
        .add(active_device(&driver, cid), cfg, 1)
        .expect("a port");
    shard.port_mut(port).listen(HOST_PORT).expect("free");
    turn(&mut shard, port);
    let mut payload = Vec::new();
    for _ in 0..PACKETS_MAX {
        if u.is_empty() || send(&mut u, &mut driver).is_err() {
            break;
        }
        if u.ratio(1, 3).unwrap_or(true) {
            driver.tx.publish();
            turn(&mut shard, port);
            driver.reap_tx();
        }
        if u.ratio(1, 3).unwrap_or(true) {
            while driver.receive(&mut payload).is_some() {}
            driver.rx.publish();
        }
        assert!(shard.port(port).streams() <= STREAMS as usize);
    }
    driver.tx.publish();
    turn(&mut shard, port);
    assert_eq!(shard.port(port).counters().faults, 0, "well-framed packets");
}

fn send(u: &mut Unstructured<'_>, driver: &mut Driver) -> Result<()> {
    let len = u.int_in_range(0..=300usize)?;
    let h = PacketHeader {
        src_port: u32::from(u.int_in_range(0..=20u8)?),
        dst_port: if u.ratio(1, 16)? {
            u.arbitrary()?
        } else {
            HOST_PORT
        },
        len: if u.ratio(1, 8)? {
            u.arbitrary()?
        } else {
            len as u32
        },
        kind: if u.ratio(1, 16)? { u.arbitrary()? } else { 1 },
        op: if u.ratio(1, 16)? {
            u.arbitrary()?
        } else {
            u.int_in_range(1..=7)?
        },
        flags: if u.ratio(1, 4)? {
            u.int_in_range(0..=5)?
        } else {
            0
        },
        buf_alloc: if u.ratio(1, 4)? { u.arbitrary()? } else { 4096 },
        fwd_cnt: if u.ratio(1, 4)? { u.arbitrary()? } else { 0 },
    };
    let src = if u.ratio(1, 32)? { u.arbitrary()? } else { 3 };
    let dst = if u.ratio(1, 32)? {
        u.arbitrary()?
    } else {
        HOST_CID
    };
    let piece = u.int_in_range(1..=400usize)?;
    driver.send_wire(&WireHeader::new(src, dst, &h), len, piece.max(len / 16 + 1));
    Ok(())
}

fn turn(shard: &mut Shard<Device>, port: PortIndex) {
    for _ in 0..2 {
        shard.port_mut(port);
        shard.turn(Some(std::time::Duration::ZERO)).expect("a turn");
        while let Some(news) = shard.poll_news() {
            if let News::Notice(
                _,
                Notice::Incoming {
                    stream, peer_port, ..
                },
            ) = news
            {
                let now = shard.now();
                if peer_port % 5 == 4 {
                    shard.port_mut(port).refuse(now, stream);
                } else {
                    let sink = Some(Sink::Inline(Box::new(Echo)));
                    shard.port_mut(port).accept(now, stream, sink);
                }
            }
        }
    }
}
