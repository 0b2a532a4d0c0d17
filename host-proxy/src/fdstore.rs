//! Keeps the handovers of port processes over the end of aditd, where systemd holds descriptors (`FileDescriptorStoreMax=`):
//! a port process that is killed while no aditd runs then has a successor, too.
//!
//! ```text
//! aditd ── Handover + descriptors ─► [ socket pair of the VM ] ── read only by aditd itself, or the next one
//!                                       ▲ systemd's store has duplicates of both ends
//! ```
//! A packet that waits in a socket keeps its descriptors open. So systemd is told once for each VM, and a newer handover
//! only replaces the packet: the new one is written before the old one is read. The last packet is the latest.
//!
//! Source: sd_notify(3) `FDSTORE`, sd_listen_fds(3).

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, PoisonError};

use adit_passed::{Closer, Passed};
use adit_port::control::Handover;
use adit_port::control_io::{ControlError, Message, receive_passed, send_all};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
};

/// Handovers of one VM that may have been left in its socket: the new one and the old.
const LEFT_MAX: usize = 2;

/// The store, and what in it no VM has asked for yet.
#[derive(Debug, Default)]
pub struct FdStore {
    /// There is a service manager that may have a store.
    on: bool,
    left: Mutex<BTreeMap<String, OwnedFd>>,
}

/// One VM's place in the store.
#[derive(Debug)]
pub struct Slot {
    names: [String; 2],
    send: OwnedFd,
    /// A handover is in it.
    receive: Passed,
    closer: Closer,
    full: bool,
}

/// A handover that an earlier aditd kept.
pub type Left = (Handover, Vec<Passed>);

fn names(vm: &str) -> [String; 2] {
    [format!("adit.{vm}.send"), format!("adit.{vm}.receive")]
}

impl FdStore {
    /// Takes over what systemd passed on, by name.
    pub fn new(passed: Vec<(String, OwnedFd)>) -> Self {
        let ours = passed
            .into_iter()
            .filter(|(name, _)| name.starts_with("adit."));
        Self {
            on: std::env::var_os("NOTIFY_SOCKET").is_some(),
            left: Mutex::new(ours.collect()),
        }
    }

    /// Returns a VM's place, made if need be, and what an earlier aditd left there. `None`: there is no store.
    ///
    /// # Errors
    /// The service manager cannot be told, or no socket can be made: nothing is kept over the end of this aditd.
    pub fn slot(&self, vm: &str, closer: &Closer) -> io::Result<Option<(Slot, Option<Left>)>> {
        let names = names(vm);
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let (send, receive) = (left.remove(&names[0]), left.remove(&names[1]));
        drop(left);
        if let (Some(send), Some(receive)) = (send, receive) {
            // What we set is not always what systemd hands back.
            for end in [&send, &receive] {
                fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            }
            let mut slot = Slot {
                names,
                send,
                receive: Passed::new(receive, closer),
                closer: closer.clone(),
                full: false,
            };
            let found = slot.drain();
            if let Some((handover, fds)) = &found {
                slot.put(handover, fds).map_err(io::Error::other)?;
            }
            return Ok(Some((slot, found)));
        }
        if !self.on {
            return Ok(None);
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (send, receive) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        for (name, end) in names.iter().zip([&send, &receive]) {
            // Whatever has the name is of no use without its other end.
            notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None)?;
            notify(&format!("FDSTORE=1\nFDNAME={name}\n"), Some(end.as_fd()))?;
        }
        let slot = Slot {
            names,
            send,
            receive: Passed::new(receive, closer),
            closer: closer.clone(),
            full: false,
        };
        Ok(Some((slot, None)))
    }

    /// Closes what belongs to VMs that no longer exist. To be called once all VMs have a place.
    pub fn forget_others(&self) {
        let left = std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner));
        for (name, fd) in left {
            tracing::info!(name, "closed a descriptor of a VM that no longer exists");
            remove(&name);
            drop(Passed::from(fd));
        }
    }
}

impl Slot {
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

    /// Gives the place up: the VM was removed.
    pub fn remove(self) {
        self.names.iter().for_each(|name| remove(name));
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
                    tracing::warn!(error = %e, "cannot read what an earlier aditd kept")
                }
            }
        }
        last
    }
}

fn remove(name: &str) {
    if let Err(e) = notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None) {
        tracing::warn!(error = %e, name, "cannot tell the service manager");
    }
}

/// Tells the service manager something, if there is one.
fn notify(text: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => UnixAddr::new_abstract(name)?,
        path => UnixAddr::new(path)?,
    };
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
    sendmsg(
        UnixDatagram::unbound()?.as_raw_fd(),
        &[IoSlice::new(text.as_bytes())],
        rights.as_slice(),
        MsgFlags::MSG_NOSIGNAL,
        Some(&address),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// Both ends as systemd has them, under their names.
    fn stored(slot: &Slot) -> Vec<(String, OwnedFd)> {
        let ends = [slot.send.as_fd(), slot.receive.as_fd()];
        let ends = ends.map(|fd| fd.try_clone_to_owned().unwrap());
        slot.names.clone().into_iter().zip(ends).collect()
    }

    fn slot(closer: &Closer) -> Slot {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kind = SockType::SeqPacket;
        let (send, receive) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        Slot {
            names: names("web-1"),
            send,
            receive: receive.into(),
            closer: closer.clone(),
            full: false,
        }
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
            let store = FdStore::new(passed);
            let (slot, left) = store.slot("web-1", &closer).unwrap().unwrap();
            let (handover, fds) = left.unwrap();
            assert_eq!((handover.seq, fds.len()), (300, 1));
            passed = stored(&slot);
        }
        wait_for_room(&closer);
        // Killed between the new packet and the old one's end.
        let store = FdStore::new(passed);
        let (slot, _) = store.slot("web-1", &closer).unwrap().unwrap();
        let (newer, fds) = handover(301);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_all(&slot.send, &Message::Handover(newer), &fds).unwrap();
        let store = FdStore::new(stored(&slot));
        let (mut slot, left) = store.slot("web-1", &closer).unwrap().unwrap();
        assert_eq!(left.unwrap().0.seq, 301);
        slot.clear();
        let store = FdStore::new(stored(&slot));
        assert!(store.slot("web-1", &closer).unwrap().unwrap().1.is_none());
        // Another VM has nothing there, and without a service manager there is no store.
        assert!(store.slot("web-2", &closer).unwrap().is_none());
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
                    slot.send.as_raw_fd(),
                    &[IoSlice::new(&packet)],
                    rights.as_slice(),
                    MsgFlags::empty(),
                    None,
                )
                .unwrap();
                let store = FdStore::new(stored(&slot));
                let (mut slot, left) = store.slot("web-1", &closer).unwrap().unwrap();
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
                let store = FdStore::new(stored(&slot));
                let (_, left) = store.slot("web-1", &closer).unwrap().unwrap();
                assert_eq!(left.unwrap().0.seq, 8);
            }
        }
    }
}
