//! Attacks of a guest and of a client on streams: R10, R26, R38, R44, R45, R49, R50, R52, R54-R56.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use adit_channel::device::{HOST_CID, WireHeader};
use adit_engine::{Op, PacketHeader, ResetReason};
use adit_testkit::stream::GuestStream;
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use crate::common::{CID, pattern};
use crate::world::{HOST_PORT, SEND, World};

/// Endless kicks without packets, on either queue. Only some are handled per second. Packets that are kicked for now
/// and then are still delivered.
#[test]
fn r10_endless_kicks_cause_few_wakeups_a_second() {
    for queue in [0, 1] {
        let mut world = World::new();
        let at = world.open();
        // Each read takes one kick, and there are more kicks than a test lasts.
        let endless = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC | EFD_SEMAPHORE).expect("an eventfd");
        endless.write(1 << 60).expect("room");
        let set = world.vm.frontend.set_vring_kick(queue, &endless);
        set.expect("a kick of its own");
        let (begin, before) = (Instant::now(), world.shard.wakeups());
        while begin.elapsed() < Duration::from_secs(1) {
            let turned = world.shard.turn(Some(Duration::from_secs(1)));
            turned.expect("a turn");
            while world.shard.poll_news().is_some() {}
        }
        let woke = world.shard.wakeups() - before;
        let counters = world.shard.port(world.port).counters();
        assert!(woke < 200, "{woke} wake-ups in a second, {counters:?}");
        assert!(counters.mutes > 0, "{counters:?}");
        let bytes = pattern(100_000, 3);
        let (mut sent, mut got) = (0, Vec::new());
        world.until(|w| {
            sent += w.guest_writes(at, &bytes[sent..]);
            w.client_reads(at, &mut got);
            got.len() == bytes.len()
        });
        assert!(got == bytes);
    }
}

#[test]
fn r26_a_guest_that_never_takes_used_buffers_is_bounded() {
    let mut world = World::new();
    let at = world.open();
    world.stingy = true;
    let before = world
        .shard
        .port(world.port)
        .carrier()
        .counters()
        .packets_to_guest;
    let bytes = pattern(4 << 20, 1);
    let mut said = 0;
    for _ in 0..2000 {
        said += world.client_writes(at, &bytes[said..]);
        world.turn();
    }
    let sent = world
        .shard
        .port(world.port)
        .carrier()
        .counters()
        .packets_to_guest
        - before;
    assert!(sent <= 128, "{sent} packets into 128 buffers");
    assert!(said < bytes.len(), "the client waits");
    assert_eq!(
        world.shard.port(world.port).counters().bytes_copied,
        0,
        "no bytes are held for the client"
    );
    // When the guest looks, all bytes are there.
    world.stingy = false;
    world.until(|w| {
        said += if said < bytes.len() {
            w.client_writes(at, &bytes[said..])
        } else {
            0
        };
        w.streams[at].got.len() == bytes.len()
    });
    assert!(world.streams[at].got == bytes);
}

#[test]
fn r38_empty_packets_use_no_memory() {
    let mut world = World::new();
    let at = world.open();
    for _ in 0..20_000 {
        let h = world.streams[at].guest.payload(0);
        world.send(&h, &[]);
    }
    world.turns(10);
    assert_eq!(world.shard.port(world.port).counters().bytes_copied, 0);
    world.exchange(at, 10_000);
}

#[test]
fn r44_a_guest_cannot_use_another_cid() {
    let mut world = World::new();
    let wrong = [0, 1, 2, 4, 5, u64::from(u32::MAX), CID | 1 << 32, u64::MAX];
    let mut sent = 0;
    for (src, dst) in wrong
        .map(|c| (c, HOST_CID))
        .into_iter()
        .chain(wrong.map(|c| (CID, c)))
    {
        if (src, dst) == (CID, HOST_CID) {
            continue;
        }
        for op in [Op::Request, Op::Rw, Op::Rst] {
            let h = GuestStream::new(9, HOST_PORT).header(op);
            assert!(
                world
                    .vm
                    .driver
                    .send_wire(&WireHeader::new(src, dst, &h), 0, 1)
            );
            sent += 1;
        }
        world.turns(3);
    }
    assert_eq!(
        world
            .shard
            .port(world.port)
            .carrier()
            .counters()
            .dropped_cid,
        sent
    );
    assert_eq!(world.shard.port(world.port).streams(), 0);
    assert!(world.strays.is_empty(), "answered: {:?}", world.strays);
    world.assert_works();
}

#[test]
fn r45_a_reset_is_not_answered_and_a_reused_pair_works() {
    let mut world = World::new();
    for port in 0..50 {
        let h = GuestStream::new(port, HOST_PORT).header(Op::Rst);
        world.send(&h, &[]);
    }
    world.turns(10);
    assert!(world.strays.is_empty(), "answered: {:?}", world.strays);
    for _ in 0..50 {
        // Both sides reset at the same time, and the guest requests a stream from the same port right after that.
        let at = world.open_from(77);
        let (id, now) = (world.streams[at].id, world.shard.now());
        world
            .shard
            .port_mut(world.port)
            .reset(now, id, ResetReason::Local);
        world.send_op(at, Op::Rst, 0);
        let again = world.open_from(77);
        world.exchange(again, 500);
        assert!(
            !world.streams[again].reset,
            "the reset of the earlier stream ended the new one"
        );
        world.send_op(again, Op::Rst, 0);
        world.until(|w| w.shard.port(w.port).streams() == 0);
    }
}

#[test]
fn r49_half_close_each_way_then_a_mebibyte_the_other() {
    let mut world = World::new();
    let bytes = pattern(1 << 20, 3);
    let at = world.open();
    world.send_op(at, Op::Shutdown, SEND);
    let mut nothing = Vec::new();
    world.until(|w| w.client_reads(at, &mut nothing));
    assert!(nothing.is_empty());
    let mut said = 0;
    world.until(|w| {
        said += if said < bytes.len() {
            w.client_writes(at, &bytes[said..])
        } else {
            0
        };
        w.streams[at].got.len() == bytes.len()
    });
    assert!(world.streams[at].got == bytes);

    let at = world.open();
    world.streams[at]
        .client
        .shutdown(std::net::Shutdown::Write)
        .expect("open");
    world.until(|w| w.streams[at].shut);
    let (mut sent, mut got) = (0, Vec::new());
    world.until(|w| {
        sent += w.guest_writes(at, &bytes[sent..]);
        w.client_reads(at, &mut got);
        got.len() == bytes.len()
    });
    assert!(got == bytes);
}

#[test]
fn r50_a_closed_client_and_a_guest_without_buffers_cause_no_wake_ups() {
    let mut world = World::new();
    let at = world.open();
    world.stingy = true;
    let bytes = pattern(1 << 20, 1);
    let mut said = 0;
    for _ in 0..500 {
        said += world.client_writes(at, &bytes[said..]);
        world.turn();
    }
    let stream = world.streams.remove(at);
    drop(stream.client);
    world.turns(50);
    let polls = world.shard.port(world.port).counters().polls;
    world.turns(500);
    let now = world.shard.port(world.port).counters().polls;
    assert!(now <= polls + 2, "{} fruitless polls", now - polls);
}

#[test]
fn r52_a_closed_client_ends_only_its_own_stream() {
    let mut world = World::new();
    let (gone, other) = (world.open(), world.open());
    let (dead, _) = UnixStream::pair().expect("a pair");
    drop(std::mem::replace(&mut world.streams[gone].client, dead));
    let bytes = pattern(2000, 1);
    for _ in 0..20 {
        world.guest_writes(gone, &bytes);
        world.turn();
    }
    world.until(|w| w.streams[gone].reset || w.streams[gone].shut);
    world.exchange(other, 100_000);
}

#[test]
fn r54_bytes_are_exact_in_odd_sizes_both_ways_at_once() {
    let mut world = World::new();
    for len in [1, 2, 43, 44, 45, 4051, 4052, 4095, 4097, 65_537, 3 << 20] {
        let at = world.open();
        world.exchange(at, len);
    }
}

/// A program in the guest has chosen a small buffer. A newer Linux has no more bytes in flight than that buffer has room for, and
/// never asks for credit.
#[test]
fn r54_a_guest_with_a_small_buffer_gets_credit_in_time() {
    let mut world = World::new();
    for buffer in [128, 4 << 10, 16 << 10, 100_000] {
        let at = world.open();
        world.streams[at].guest.buf_alloc = buffer;
        let bytes = pattern(20 * buffer as usize, 3);
        let (mut sent, mut got) = (0, Vec::new());
        world.until(|w| {
            sent += w.guest_writes(at, &bytes[sent..]);
            w.client_reads(at, &mut got);
            got.len() >= bytes.len()
        });
        assert!(got == bytes, "{buffer} bytes");
    }
}

#[test]
fn r55_one_stopped_reader_of_a_hundred_stops_only_itself() {
    let mut world = World::new();
    let all: Vec<usize> = (0..100).map(|_| world.open()).collect();
    let bytes = pattern(64 << 10, 5);
    let (mut sent, mut got) = (vec![0; 100], vec![Vec::new(); 100]);
    // The first client never reads. The guest always sends as much as its credit allows.
    let endless = pattern(1 << 20, 6);
    world.until(|w| {
        sent[0] += w.guest_writes(all[0], &endless[sent[0]..]);
        for i in 1..100 {
            sent[i] += w.guest_writes(all[i], &bytes[sent[i]..]);
            w.client_reads(all[i], &mut got[i]);
        }
        got[1..].iter().all(|g| g.len() == bytes.len())
    });
    assert!(got[1..].iter().all(|g| *g == bytes));
    assert!(sent[0] < endless.len(), "it stopped");
}

#[test]
fn r56_message_sockets_are_refused_in_their_own_type() {
    let mut world = World::new();
    for flags in [0, 1, 2, 3] {
        let mut guest = GuestStream::new(55, HOST_PORT);
        let h = PacketHeader {
            kind: 2,
            flags,
            ..guest.header(Op::Request)
        };
        world.send(&h, &[]);
        world.until(|w| w.strays.pop() == Some((55, Op::Rst as u16)));
        assert_eq!(world.shard.port(world.port).streams(), 0);
    }
    world.assert_works();
}
