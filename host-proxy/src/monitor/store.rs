//! The descriptor store: a socket pair for each VM, in which the last handover of its port process waits
//! ([`fdstore`](crate::fdstore)). The monitor keeps both ends for the next worker, and where systemd holds descriptors
//! (`FileDescriptorStoreMax=`) it has duplicates for the next monitor.
//!
//! Nothing is ever received here: what waits in a pair may be any descriptor. Both ends are closed by their VM's closer.
//!
//! The listener for guests of the host's kernel ([`guests`](crate::guests)) is there, too: what they dial while a monitor is started again
//! waits in it, and is not refused. Unlike sockets with a path, or those of systemd's own units, it could not be found again.
//!
//! Source: sd_notify(3) `FDSTORE`, sd_listen_fds(3).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, PoisonError};

use adit_passed::{Closer, Passed};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, getsockopt, sendmsg,
    socketpair, sockopt::AcceptConn,
};

/// Name of the listener for guests. No VM's: its name would have another part.
const GUESTS: &str = "adit.guests";

/// The store of systemd, and what in it no VM has asked for yet.
#[derive(Debug, Default)]
pub struct Store {
    /// The service manager, which may have a store.
    manager: Option<Manager>,
    left: Mutex<BTreeMap<String, OwnedFd>>,
}

/// One VM's socket pair.
#[derive(Debug)]
pub struct Pair {
    /// Its names in systemd's store.
    names: [String; 2],
    /// Where packets go in, and where they come out.
    ends: [Passed; 2],
    /// Who holds duplicates.
    manager: Option<Manager>,
}

/// The socket of the service manager.
#[derive(Clone, Debug)]
struct Manager(OsString);

fn names(vm: &str) -> [String; 2] {
    [format!("adit.{vm}.send"), format!("adit.{vm}.receive")]
}

impl Store {
    /// Takes over what systemd passed on, by name.
    pub fn new(passed: Vec<(String, OwnedFd)>) -> Self {
        let ours = passed
            .into_iter()
            .filter(|(name, _)| name.starts_with("adit."));
        Self {
            manager: std::env::var_os("NOTIFY_SOCKET").map(Manager),
            left: Mutex::new(ours.collect()),
        }
    }

    /// Takes the listener for guests that an earlier aditd kept. `None`: there is none.
    pub fn guests(&self) -> Option<OwnedFd> {
        let found = self.left().remove(GUESTS)?;
        let is_listener = getsockopt(&found, AcceptConn).unwrap_or(false);
        // What we set is not always what systemd hands back.
        let nonblocking = fcntl(&found, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        if is_listener && nonblocking.is_ok() {
            return Some(found);
        }
        tracing::warn!(
            name = GUESTS,
            "what systemd kept under this name does not listen"
        );
        if let Some(manager) = &self.manager {
            manager.remove(GUESTS);
        }
        None
    }

    /// Keeps the listener for guests over the end of this process, if there is a service manager.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn keep_guests(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        match &self.manager {
            Some(manager) => manager.keep(GUESTS, listener),
            None => Ok(()),
        }
    }

    /// Whether what is put there outlives this process.
    pub fn is_on(&self) -> bool {
        self.manager.is_some() || !self.left().is_empty()
    }

    /// Returns a VM's pair: the one of an earlier aditd, or a new one, of which systemd is told.
    ///
    /// # Errors
    /// No socket can be made.
    pub fn pair(&self, vm: &str, closer: &Closer) -> io::Result<Pair> {
        let names = names(vm);
        let left = {
            let mut left = self.left();
            (left.remove(&names[0]), left.remove(&names[1]))
        };
        if let (Some(send), Some(receive)) = left {
            // What we set is not always what systemd hands back.
            for end in [&send, &receive] {
                fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            }
            let ends = [send, receive].map(|end| Passed::new(end, closer));
            let manager = self.manager.clone();
            return Ok(Pair {
                names,
                ends,
                manager,
            });
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (send, receive) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        self.keep(vm, [send, receive].map(|end| Passed::new(end, closer)))
    }

    /// Keeps a pair that a worker has; systemd is told of it.
    ///
    /// # Errors
    /// The service manager cannot be told.
    pub fn keep(&self, vm: &str, ends: [Passed; 2]) -> io::Result<Pair> {
        let names = names(vm);
        if let Some(manager) = &self.manager {
            for (name, end) in names.iter().zip(&ends) {
                manager.keep(name, end.as_fd())?;
            }
        }
        let manager = self.manager.clone();
        Ok(Pair {
            names,
            ends,
            manager,
        })
    }

    /// Whether an earlier aditd left a pair for this VM that is not taken yet.
    pub fn has_left(&self, vm: &str) -> bool {
        self.left().contains_key(&names(vm)[0])
    }

    /// Closes what belongs to VMs that no longer exist. To be called once all VMs have a place.
    pub fn forget_others(&self) {
        for (name, fd) in std::mem::take(&mut *self.left()) {
            tracing::info!(name, "closed a descriptor of a VM that no longer exists");
            if let Some(manager) = &self.manager {
                manager.remove(&name);
            }
            drop(Passed::from(fd));
        }
    }

    fn left(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pair {
    /// Where packets go in, and where they come out.
    pub fn ends(&self) -> [BorrowedFd<'_>; 2] {
        [self.ends[0].as_fd(), self.ends[1].as_fd()]
    }
}

impl Pair {
    /// Gives it up: the VM was removed.
    pub fn remove(self) {
        if let Some(manager) = &self.manager {
            self.names.iter().for_each(|name| manager.remove(name));
        }
    }
}

impl Manager {
    /// Has it keep a duplicate. Whatever had the name before is dropped.
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None)?;
        self.tell(&format!("FDSTORE=1\nFDNAME={name}\n"), Some(fd))
    }

    fn remove(&self, name: &str) {
        if let Err(e) = self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None) {
            tracing::warn!(error = %e, name, "cannot tell the service manager");
        }
    }

    fn tell(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let address = match self.0.as_bytes() {
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
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use adit_passed::receive;
    use rustix::net::RecvFlags;

    use super::*;

    /// What the service manager was told, and what was passed along.
    fn told(manager: &UnixDatagram) -> (String, Option<OwnedFd>) {
        let mut bytes = [0; 200];
        let got = receive(manager, &mut bytes, RecvFlags::DONTWAIT, &Closer::shared()).unwrap();
        let fd = got.fds.into_iter().next().and_then(Passed::trust);
        (String::from_utf8_lossy(&bytes[..got.bytes]).into(), fd)
    }

    /// Stands in for AF_VSOCK, of which no test makes a socket on the machine itself.
    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    #[test]
    fn the_listener_for_guests_is_kept_and_who_dialled_meanwhile_is_found_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let store = Store {
            manager: Some(Manager(path.into())),
            ..Store::default()
        };
        assert!(store.guests().is_none());
        let made = listener();
        let at = made.local_addr().unwrap();
        store.keep_guests(made.as_fd()).unwrap();
        let (text, fd) = told(&manager);
        assert_eq!(text, "FDSTOREREMOVE=1\nFDNAME=adit.guests\n");
        assert!(fd.is_none());
        let (text, fd) = told(&manager);
        assert_eq!(text, "FDSTORE=1\nFDNAME=adit.guests\n");
        // The monitor ends, and a guest dials.
        drop((made, store));
        let _guest = TcpStream::connect(at).unwrap();
        let kept = vec![("adit.guests".to_owned(), fd.unwrap())];
        let store = Store {
            manager: None,
            left: Mutex::new(kept.into_iter().collect()),
        };
        let found = TcpListener::from(store.guests().unwrap());
        found.accept().unwrap();
        // It is nonblocking, whatever systemd has made of it.
        assert_eq!(
            found.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert!(store.guests().is_none() && store.left().is_empty());
    }

    #[test]
    fn what_does_not_listen_is_not_taken_for_the_listener() {
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for other in [OwnedFd::from(socket), file.into()] {
            let store = Store::new(vec![("adit.guests".into(), other)]);
            assert!(store.guests().is_none() && store.left().is_empty());
        }
    }
}
