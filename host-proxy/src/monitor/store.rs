//! The descriptor store: a socket pair for each VM, in which the last handover of its port process waits
//! ([`fdstore`](crate::fdstore)). The monitor keeps both ends for the next worker, and where systemd holds descriptors
//! (`FileDescriptorStoreMax=`) it has duplicates for the next monitor.
//!
//! Nothing is ever received here: what waits in a pair may be any descriptor. Both ends are closed by their VM's closer.
//!
//! Source: sd_notify(3) `FDSTORE`, sd_listen_fds(3).

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, PoisonError};

use adit_passed::{Closer, Passed};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair,
};

/// The store of systemd, and what in it no VM has asked for yet.
#[derive(Debug, Default)]
pub struct Store {
    /// There is a service manager that may have a store.
    on: bool,
    left: Mutex<BTreeMap<String, OwnedFd>>,
}

/// One VM's socket pair.
#[derive(Debug)]
pub struct Pair {
    /// Its names in systemd's store.
    names: [String; 2],
    /// Where packets go in, and where they come out.
    ends: [Passed; 2],
    stored: bool,
}

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
            on: std::env::var_os("NOTIFY_SOCKET").is_some(),
            left: Mutex::new(ours.collect()),
        }
    }

    /// Whether what is put there outlives this process.
    pub fn is_on(&self) -> bool {
        self.on || !self.left().is_empty()
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
            let stored = true;
            return Ok(Pair {
                names,
                ends,
                stored,
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
        if self.on {
            for (name, end) in names.iter().zip(&ends) {
                // Whatever has the name is of no use without its other end.
                notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None)?;
                notify(&format!("FDSTORE=1\nFDNAME={name}\n"), Some(end.as_fd()))?;
            }
        }
        let stored = self.on;
        Ok(Pair {
            names,
            ends,
            stored,
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
            remove(&name);
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
        if self.stored {
            self.names.iter().for_each(|name| remove(name));
        }
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
