//! What each end sees of a close (R117), for each way of closing, through a Unix socket, for streams that end in order
//! and for others.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use adit_engine::Op;

use crate::common::pattern;
use crate::world::{SEND, World};

const RECEIVE: u32 = 1;
const BOTH: u32 = SEND | RECEIVE;

/// What a client sees: the bytes up to the end of the stream, and whether the socket accepts another byte then.
fn found(world: &mut World, at: usize) -> (Vec<u8>, bool) {
    let mut got = Vec::new();
    world.until(|w| w.client_reads(at, &mut got));
    let taken = match world.streams[at].client.write(b"!") {
        Ok(n) => n == 1,
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::BrokenPipe);
            false
        }
    };
    (got, taken)
}

#[test]
fn r117_a_client_sees_at_once_what_the_guest_closed() {
    let bytes = pattern(3000, 1);
    // SHUTDOWN flags that the guest sends; whether its side is known to end in order; whether the client can write at
    // the end.
    for (flags, in_order, taken) in [
        (&[SEND][..], false, true),
        (&[BOTH], false, false),
        (&[SEND, BOTH], false, false),
        (&[SEND], true, true),
        (&[BOTH], true, false),
        // It has ended in order, so the client must see that, however late it looks.
        (&[SEND, BOTH], true, true),
    ] {
        let mut world = World::new();
        let at = world.open();
        if in_order {
            let id = world.streams[at].id;
            world.shard.port_mut(world.port).expect_order(id);
        }
        assert_eq!(world.guest_writes(at, &bytes), bytes.len());
        for flags in flags {
            world.send_op(at, Op::Shutdown, *flags);
        }
        if *flags != [SEND] {
            world.until(|w| w.shard.port(w.port).streams() == 0);
        }
        let (got, took) = found(&mut world, at);
        assert!(got == bytes, "{flags:?} {in_order}: all sent bytes arrive");
        assert_eq!(took, taken, "{flags:?} {in_order}");
        world.streams.clear();
        world.turns(10);
        world.assert_works();
    }
}

#[test]
fn r117_a_client_cannot_write_to_a_guest_that_reads_no_more() {
    let mut world = World::new();
    let at = world.open();
    world.send_op(at, Op::Shutdown, RECEIVE);
    world.until(|w| match w.streams[at].client.write(b"!") {
        Ok(_) => false,
        Err(e) => e.kind() == ErrorKind::BrokenPipe,
    });
    // The other direction is open.
    let bytes = pattern(3000, 2);
    assert_eq!(world.guest_writes(at, &bytes), bytes.len());
    let mut got = Vec::new();
    world.until(|w| {
        w.client_reads(at, &mut got);
        got.len() == bytes.len()
    });
    assert!(got == bytes);
}

#[test]
fn r117_a_guest_sees_a_close_with_both_flags_and_an_end_with_one() {
    for (closes, told) in [(true, BOTH), (false, SEND)] {
        let mut world = World::new();
        let at = world.open();
        // Some bytes are still in transit when the client closes.
        let bytes = pattern(6000, 3);
        world.streams[at].client.write_all(&bytes).expect("room");
        let client = world.streams[at].client.try_clone().expect("a descriptor");
        match closes {
            true => client.shutdown(Shutdown::Both).expect("open"),
            false => client.shutdown(Shutdown::Write).expect("open"),
        }
        world.until(|w| !w.streams[at].flags.is_empty());
        assert!(world.streams[at].got == bytes);
        assert_eq!(world.streams[at].flags, [told], "closes: {closes}");
        if !closes {
            // The guest's answer, and its end.
            assert_eq!(world.guest_writes(at, b"answer"), 6);
            world.send_op(at, Op::Shutdown, SEND);
            let mut got = Vec::new();
            world.until(|w| w.client_reads(at, &mut got));
            assert_eq!(got, b"answer");
            assert_eq!((&client).read(&mut [0]).expect("the end"), 0);
        }
    }
}
