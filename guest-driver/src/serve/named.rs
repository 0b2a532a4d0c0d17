//! `svc:NAME`: what the configuration has a name for, a Unix socket or a local TCP port.
//!
//! A client asks for a name, and only the guest's owner says what is behind it. A service that is not named is refused as one that is forbidden.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use adit_channel::hello::Open;
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::services::{Run, Service};
use super::shares::Shares;
use super::tcp;
use crate::config::{NamedService, Place};
use crate::conn::Conn;

/// The services.
pub struct Named {
    all: RwLock<Vec<NamedService>>,
    shares: Shares,
}

impl Named {
    /// None yet.
    pub fn new(shares: Shares) -> Self {
        Self {
            all: RwLock::default(),
            shares,
        }
    }

    /// Serves these instead, from the next stream on. Streams that are open go on.
    pub fn offer(&self, all: Vec<NamedService>) {
        *self.all.write().unwrap_or_else(PoisonError::into_inner) = all;
    }
}

/// Why the configuration forbids a service, if it is one that needs a name there.
pub fn unnamed(service: &ServiceName, all: &[NamedService]) -> Option<String> {
    let name = service.name()?;
    let text = || format!("no [[service]] of the guest is named `{name}`");
    (!all.iter().any(|one| one.name.as_str() == name)).then(text)
}

impl Service for Named {
    fn form(&self) -> &'static str {
        "svc:NAME"
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.name().is_some()
    }

    fn open(&self, open: &Open) -> Result<Run, Refusal> {
        let place = {
            let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
            let name = open.service.name();
            let found = all.iter().find(|one| Some(one.name.as_str()) == name);
            match found {
                Some(service) => service.to.clone(),
                None => {
                    let text = unnamed(&open.service, &all).unwrap_or_default();
                    return Err(Refusal::new(Code::Denied, text));
                }
            }
        };
        let local = tcp::opened(open, |limit| match &place {
            Place::Unix(path) => dial(path, limit),
            Place::Tcp(port) => tcp::dial(*port, limit),
        });
        let local = local.map_err(|e| Refusal::of_io(&place, &e))?;
        tcp::relayed(local, &self.shares)
    }
}

/// Connects to a Unix socket. Where its backlog is full, that takes as long as a read or write may.
fn dial(path: &Path, limit: Duration) -> io::Result<Conn> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let conn = Conn::from(fd);
    conn.set_timeout(Some(limit))?;
    let address = UnixAddr::new(path)?;
    let fd = OwnedFd::from(conn);
    connect(fd.as_raw_fd(), &address).map_err(|e| match e {
        nix::Error::EAGAIN => io::ErrorKind::TimedOut.into(),
        e => io::Error::from(e),
    })?;
    let conn = Conn::from(fd);
    conn.set_timeout(None)?;
    Ok(conn)
}
