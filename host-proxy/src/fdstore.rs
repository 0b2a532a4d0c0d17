//! Keeps the last handover of a VM's port process over the end of the worker, and of aditd: a port process that is killed at the
//! same moment then has a successor, too.
//!
//! ```text
//! worker ── Handover + descriptors ─► [ socket pair of the VM ] ── read only by the worker itself, or the next one
//!                                       ▲ the monitor has duplicates of both ends, and so has systemd's store
//! ```
//! A packet that waits in a socket keeps its descriptors open. So the pair is stored once ([`monitor`](crate::monitor)), and a
//! newer handover only replaces the packet: the new one is written before the old one is read. The last packet is the latest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use adit_passed::{Closer, Passed};
use adit_port::control::Handover;
use adit_port::control_io::{ControlError, Message, receive_passed, send_all};

/// Handovers of one VM that may have been left in its socket: the new one and the old.
const LEFT_MAX: usize = 2;

/// Both ends of a VM's socket pair: where packets go in, and where they come out.
pub type Ends = [OwnedFd; 2];

/// One VM's place in the store.
#[derive(Debug)]
pub struct Slot {
    send: Passed,
    /// A handover is in it.
    receive: Passed,
    closer: Closer,
    full: bool,
}

/// A handover that an earlier worker kept.
pub type Left = (Handover, Vec<Passed>);

impl Slot {
    /// Takes a VM's place, and what an earlier worker left there, which stays.
    ///
    /// # Errors
    /// What was there cannot be put back.
    pub fn open(
        [send, receive]: Ends,
        closer: &Closer,
    ) -> Result<(Self, Option<Left>), ControlError> {
        let mut slot = Self {
            send: Passed::new(send, closer),
            receive: Passed::new(receive, closer),
            closer: closer.clone(),
            full: false,
        };
        let found = slot.drain();
        if let Some((handover, fds)) = &found {
            slot.put(handover, fds)?;
        }
        Ok((slot, found))
    }

    /// Both ends.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.send.as_fd(), self.receive.as_fd()]
    }

    /// Puts a handover in place of the last one.
    ///
    /// # Errors
    /// It cannot be sent: the last one stays.
    pub fn put(&mut self, handover: &Handover, fds: &[impl AsFd]) -> Result<(), ControlError> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_all(&self.send, &Message::Handover(handover.clone()), &fds)?;
        if std::mem::replace(&mut self.full, true) {
            receive_passed(&self.receive, &self.closer)?;
        }
        Ok(())
    }

    /// Takes out what is there.
    pub fn clear(&mut self) {
        self.drain();
    }

    fn drain(&mut self) -> Option<Left> {
        self.full = false;
        let mut last = None;
        for _ in 0..LEFT_MAX {
            match receive_passed(&self.receive, &self.closer) {
                Ok(Some((Message::Handover(handover), fds))) => last = Some((handover, fds)),
                Ok(_) => {}
                Err(e) if e.would_block() => break,
                Err(e) => {
                    tracing::warn!(error = %e, "cannot read what an earlier worker kept")
                }
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
    };
    use std::io::IoSlice;
    use std::os::fd::AsRawFd;

    fn handover(seq: u64) -> (Handover, Vec<OwnedFd>) {
        let record = vec![seq as u8; 9];
        let fd = std::fs::File::open("/dev/null").unwrap();
        (
            Handover {
                seq,
                record,
                ring: 0,
            },
            vec![fd.into()],
        )
    }

    /// Both ends as the monitor has them.
    fn stored(slot: &Slot) -> Ends {
        slot.ends().map(|fd| fd.try_clone_to_owned().unwrap())
    }

    fn slot(closer: &Closer) -> Slot {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kind = SockType::SeqPacket;
        let (send, receive) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let (slot, left) = Slot::open([send, receive], closer).unwrap();
        assert!(left.is_none());
        slot
    }

    /// Waits until its thread has closed all that the test left: on a busy machine the test is faster.
    fn wait_for_room(closer: &Closer) {
        while closer.pending() > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_last_handover_is_found_again_and_again() {
        // Its own: tests that run at the same time would fill each other's.
        let closer = Closer::default();
        let mut slot = slot(&closer);
        for seq in 1..=300 {
            wait_for_room(&closer);
            let (handover, fds) = handover(seq);
            slot.put(&handover, &fds).unwrap();
        }
        let mut passed = stored(&slot);
        drop(slot);
        for _ in 0..3 {
            wait_for_room(&closer);
            let (slot, left) = Slot::open(passed, &closer).unwrap();
            let (handover, fds) = left.unwrap();
            assert_eq!((handover.seq, fds.len()), (300, 1));
            passed = stored(&slot);
        }
        wait_for_room(&closer);
        // Killed between the new packet and the old one's end.
        let (slot, _) = Slot::open(passed, &closer).unwrap();
        let (newer, fds) = handover(301);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_all(&slot.send, &Message::Handover(newer), &fds).unwrap();
        let (mut slot, left) = Slot::open(stored(&slot), &closer).unwrap();
        assert_eq!(left.unwrap().0.seq, 301);
        slot.clear();
        assert!(Slot::open(stored(&slot), &closer).unwrap().1.is_none());
    }

    #[test]
    fn r35_packets_that_are_no_handover_are_not_kept_and_hide_none() {
        let closer = Closer::default();
        let (good, fds) = handover(7);
        let bytes = Message::Handover(good.clone()).encode().unwrap();
        let kept = Message::Kept(adit_port::control::Kept { seq: 1 });
        let kept = kept.encode().unwrap();
        let flipped = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x81;
            bytes
        };
        let mut wrong: Vec<(Vec<u8>, usize)> = (1..bytes.len())
            .map(|cut| (bytes[..cut].to_vec(), 1))
            .chain((0..16).map(|at| (flipped(at), 1)))
            .collect();
        wrong.push((kept, 0));
        // Without descriptors, with more than there are of it, and with bytes behind it.
        wrong.push((bytes.clone(), 0));
        wrong.push((bytes.clone(), adit_port::control::HANDOVER_FDS_MAX + 1));
        wrong.push(([&bytes[..], &[0]].concat(), 1));
        wrong.push((vec![0; 4096], 1));
        for (packet, count) in wrong {
            for with_a_good_one in [false, true] {
                wait_for_room(&closer);
                let mut slot = slot(&closer);
                if with_a_good_one {
                    slot.put(&good, &fds).unwrap();
                }
                let raw = vec![fds[0].as_raw_fd(); count];
                let rights = (count > 0).then(|| ControlMessage::ScmRights(&raw));
                sendmsg::<UnixAddr>(
                    slot.send.as_fd().as_raw_fd(),
                    &[IoSlice::new(&packet)],
                    rights.as_slice(),
                    MsgFlags::empty(),
                    None,
                )
                .unwrap();
                let (mut slot, left) = Slot::open(stored(&slot), &closer).unwrap();
                let seq = left.map(|(handover, _)| handover.seq);
                // One that says other bytes in the right form cannot be told: its record is checked by who goes on with it.
                let right = Message::decode(&packet).ok().flatten();
                let right = right.filter(|m| matches!(m, Message::Handover(_)) && count == 1);
                if right.is_none() {
                    assert_eq!(seq, with_a_good_one.then_some(7), "{packet:x?} {count}");
                }
                wait_for_room(&closer);
                // And the place is of use.
                slot.put(&handover(8).0, &fds).unwrap();
                let (_, left) = Slot::open(stored(&slot), &closer).unwrap();
                assert_eq!(left.unwrap().0.seq, 8);
            }
        }
    }
}
