//! The handler of a successor: vrings continue at the used index in guest memory, the last message may be repeated,
//! and a record from a process that the guest controlled does no harm.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::*;
use crate::vhost_user::handover::{DESCRIPTORS_MAX, Handover, Parts};

fn hand_over(rig: &Rig) -> Handover {
    let (frontend, _) = UnixStream::pair().expect("a socket");
    let handover = rig.handler.handover(3, frontend.as_fd());
    handover.expect("descriptors")
}

/// Simulates that the device has used this many buffers of each vring.
fn advance(parts: &Parts, used: [u16; 2]) {
    for (index, used) in (1..).zip(used) {
        let at = 0x1_0000 * index + 0x2000 + 2;
        let memory = File::from(
            parts.memory[0]
                .as_fd()
                .try_clone_to_owned()
                .expect("one more"),
        );
        let written = memory.write_all_at(&used.to_le_bytes(), at);
        written.expect("guest memory");
    }
}

fn successor(parts: Parts) -> Rig {
    let mut rig = Rig::new();
    rig.handler.set_features(ALL).expect("as before");
    rig.handler.resume(parts).expect("a good record");
    rig
}

fn starts(rig: &Rig) -> Vec<[u16; 2]> {
    let start = |asked: &Received| match asked {
        Received::Start { bases, .. } => Some(*bases),
        _ => None,
    };
    rig.received().iter().filter_map(start).collect()
}

#[test]
fn vrings_continue_at_their_used_index() {
    let parts = hand_over(&Rig::running()).parse().expect("ours");
    assert_eq!(parts.record.changes, 3);
    advance(&parts, [57, 65_535]);
    let rig = successor(parts);
    assert_eq!(starts(&rig), [[57, 65_535]]);
    // The same holds for the successor's successor.
    let parts = hand_over(&rig).parse().expect("ours");
    advance(&parts, [58, 2]);
    assert_eq!(starts(&successor(parts)), [[58, 2]]);
}

#[test]
fn vrings_whose_start_was_not_handed_over_continue_too() {
    let mut rig = Rig::new();
    rig.all_but_last_enable().expect("good messages");
    let parts = hand_over(&rig).parse().expect("ours");
    // The predecessor had handled the last message and run the vrings, but had not handed that over.
    advance(&parts, [4, 9]);
    let mut rig = successor(parts);
    assert_eq!(starts(&rig), [[0; 2]; 0]);
    rig.handler.set_vring_enable(1, true).expect("again");
    assert_eq!(starts(&rig), [[4, 9]]);
}

#[test]
fn only_the_message_that_started_the_vrings_may_be_repeated() {
    type Say = fn(&mut Handler) -> Result<()>;
    let says: [Say; 6] = [
        |h| h.set_vring_num(0, 128),
        |h| h.set_vring_base(0, 0),
        |h| h.set_vring_enable(1, true),
        |h| h.set_vring_kick(0, Some(event(0))),
        |h| h.set_vring_call(0, Some(event(0))),
        |h| h.set_features(ALL),
    ];
    for say in says {
        let parts = hand_over(&Rig::running()).parse().expect("ours");
        advance(&parts, [1, 1]);
        let mut rig = successor(parts);
        say(&mut rig.handler).expect("it may be the predecessor's last message");
        rig.handler.handled();
        assert_eq!(starts(&rig), [[1, 1]]);
        // After that a running vring cannot be changed.
        assert!(rig.handler.set_vring_base(0, 0).is_err());
        assert!(rig.handler.set_vring_num(0, 64).is_err());
    }
}

#[test]
fn a_record_with_any_content_is_refused_or_harmless() {
    let rig = Rig::running();
    let good = hand_over(&rig).bytes;
    let mut resumed = 0;
    for at in 0..good.len() {
        for value in [0, 1, 2, 0x7f, 0x80, 0xff] {
            let mut handover = hand_over(&rig);
            handover.bytes[at] = value;
            let Ok(parts) = handover.parse() else {
                continue;
            };
            let mut rig = Rig::new();
            rig.handler.set_features(ALL).expect("good");
            // Whatever the record contains, memory and vrings are checked as if the frontend had sent them.
            resumed += usize::from(rig.handler.resume(parts).is_ok());
        }
    }
    // The flips that change nothing, or only values that may be chosen freely.
    assert!(resumed > 0 && resumed < 6 * good.len());
    assert!(hand_over(&rig).fds.len() <= DESCRIPTORS_MAX);
}
