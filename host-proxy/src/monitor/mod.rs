//! The monitor: the part of aditd that is root, and parses nothing that a stranger wrote. The other part, the worker, serves
//! strangers, and has no power: see [`worker`](crate::worker).
//!
//! ```text
//!            systemd: main process of the unit, descriptor store, SIGTERM, SIGHUP
//!                │
//!  ┌─ aditd run: the monitor, root ───────────────────────────┐
//!  │ run        the lock, the listeners, the configuration    │
//!  │ privileged starts and ends port processes; users,        │
//!  │            cgroups, directories; store: a pair for each VM│
//!  │ discover   which VMMs have put sockets where             │
//!  └──────┬──────────────────────────────────────────┬────────┘
//!         │ wire: requests, answers, descriptors     │ connects to ctl.sock, asks the kernel who is there
//!  ┌─ aditd worker: its own user, sandboxed ──┐      │
//!  │ HTTP, JSON, control frames, database     │◄─────┴─ the connected socket ── adit-port web-1, …
//!  └──────────────────────────────────────────┘
//! ```
//!
//! | killed | then |
//! |---|---|
//! | the worker | the monitor starts another one, with the listeners and what waits in them, and every VM's pair |
//! | the monitor | the worker goes on; the next monitor finds it at `work.sock`, and gets listeners and pairs back |
//! | both | as when aditd was killed: port processes and systemd's store are found again |
//!
//! Where aditd is not root, both parts are one process: [`Monitor::Here`].

pub mod child;
pub mod client;
pub mod discover;
pub mod outward;
pub mod packets;
pub mod people;
pub mod port_log;
pub mod privileged;
pub mod room;
pub mod run;
pub mod server;
pub mod store;
pub mod user;
pub mod wire;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use adit_names::VmId;
use adit_passed::{Apart, Closer, Passed};

use crate::fdstore::Ends;
use client::{AskError, Client};
use privileged::{NotDone, Privileged};
use wire::{HasFound, LastWords, Message, Start, WhoIs};

use crate::access::caller::Person;

/// The monitor, as everybody else sees it.
#[derive(Clone, Debug)]
pub enum Monitor {
    /// It is this process.
    Here(Arc<Privileged>),
    /// It is another process, or there is none at the moment.
    There(Arc<Client>),
}

/// A connection to a VM's port process.
#[derive(Debug)]
pub struct Connected {
    /// The control socket.
    pub socket: OwnedFd,
    /// Its process id; 0 if it has none in this PID namespace.
    pub pid: u32,
    /// Whether aditd started it.
    pub ours: bool,
    /// Its command line, if it was there already.
    pub found: Option<Vec<u8>>,
}

/// Why a VM's port process cannot be reached.
#[derive(Debug)]
pub enum NotReached {
    /// In words.
    Failed(String),
    /// It ended at its start.
    Ended(LastWords),
}

impl From<AskError> for NotReached {
    fn from(e: AskError) -> Self {
        Self::Failed(e.to_string())
    }
}

impl From<NotDone> for AskError {
    fn from(e: NotDone) -> Self {
        Self::Refused(e.to_string())
    }
}

impl Monitor {
    /// Whether there is none at the moment.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::There(client) if client.is_absent())
    }

    /// Waits until there is one.
    pub async fn is_there(&self) {
        if let Self::There(client) = self {
            client.is_there().await;
        }
    }

    /// Returns both ends of a VM's place in the descriptor store; `None`: there is no store.
    ///
    /// # Errors
    /// There is no monitor, or it says no.
    pub async fn slot(&self, vm: &VmId) -> Result<Option<Ends>, AskError> {
        let client = match self {
            Self::Here(privileged) => return Ok(privileged.slot(vm)?),
            Self::There(client) => client,
        };
        let ask = Message::Slot(wire::Slot { vm: vm.clone() });
        match client.ask(&ask, &[]).await? {
            (Message::HasSlot(_), fds) => {
                let ends: Vec<_> = fds.into_iter().filter_map(Passed::trust).collect();
                Ok(ends.try_into().ok())
            }
            (Message::Done(_), _) => Ok(None),
            _ => Err(AskError::Other),
        }
    }

    /// Forgets what is kept for VMs whose [`slot`](Self::slot) nobody has asked for.
    pub async fn forget_others(&self) {
        match self {
            Self::Here(privileged) => privileged.forget_others(),
            Self::There(client) => {
                let ask = Message::ForgetOthers(wire::ForgetOthers {});
                said("forget_others", client.ask(&ask, &[]).await.map(drop));
            }
        }
    }

    /// Connects to a VM's port process: to the one that is there, or to a new one, whose standard input is `left`. Dropped, it
    /// goes on: [`leave`](Self::leave) ends it.
    ///
    /// # Errors
    /// There is none, and why.
    pub async fn reach(
        &self,
        vm: &VmId,
        start: Start,
        left: Option<OwnedFd>,
        closer: &Closer,
    ) -> Result<Connected, NotReached> {
        let left = left.map(|left| Apart::new(left, closer));
        let client = match self {
            Self::Here(privileged) => {
                let reach = privileged.clone().reach(vm.clone(), start, left);
                let reached = tokio::spawn(reach).await;
                let reached = reached.map_err(|e| NotReached::Failed(e.to_string()))?;
                return reached.map_err(NotReached::from).and_then(Connected::new);
            }
            Self::There(client) => client,
        };
        let ask = Message::Reach(wire::Reach {
            vm: vm.clone(),
            start,
        });
        let fds: Vec<_> = left.iter().map(AsFd::as_fd).collect();
        let (answer, mut fds) = client.ask(&ask, &fds).await?;
        match (answer, fds.pop()) {
            (Message::Reached(reached), Some(socket)) => Connected::new(privileged::Connected {
                socket,
                pid: reached.pid,
                ours: reached.ours,
                found: reached.found,
            }),
            (Message::NotReached(not), _) => Err(not.into()),
            _ => Err(AskError::Other.into()),
        }
    }

    /// How the port process that was started last has ended; waits for it a while. None: it has not, or there was none.
    pub async fn ended(&self, vm: &VmId) -> Option<LastWords> {
        let client = match self {
            Self::Here(privileged) => return privileged.ended(vm).await.ok().flatten(),
            Self::There(client) => client,
        };
        let ask = Message::Ended(wire::Ended { vm: vm.clone() });
        match client.ask(&ask, &[]).await {
            Ok((Message::HasEnded(ended), _)) => ended.words,
            _ => None,
        }
    }

    /// Sees to it that a VM's port process ends, if it is this one and aditd's own.
    pub async fn end(&self, vm: &VmId, pid: u32, within: Duration) {
        let done = match self {
            Self::Here(privileged) => privileged.end(vm, pid, within).await.map_err(Into::into),
            Self::There(client) => {
                let within_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
                let vm = vm.clone();
                let ask = Message::End(wire::End { vm, pid, within_ms });
                client.ask(&ask, &[]).await.map(drop)
            }
        };
        said("end", done);
    }

    /// Cuts the log of a VM's port process if it is too long.
    ///
    /// # Errors
    /// There is no monitor, or the file system refuses.
    pub async fn shorten(&self, vm: &VmId) -> Result<(), AskError> {
        match self {
            Self::Here(privileged) => Ok(privileged.shorten(vm)?),
            Self::There(client) => {
                let ask = Message::Shorten(wire::Shorten { vm: vm.clone() });
                client.ask(&ask, &[]).await.map(drop)
            }
        }
    }

    /// Says that a VM's port process has gone.
    pub async fn gone(&self, vm: &VmId) {
        match self {
            Self::Here(privileged) => privileged.gone(vm),
            Self::There(client) => {
                let ask = Message::Gone(wire::Gone { vm: vm.clone() });
                said("gone", client.ask(&ask, &[]).await.map(drop));
            }
        }
    }

    /// Says that a VM was removed: whoever listens in its directory is told to end, and nothing is kept for it.
    pub async fn leave(&self, vm: &VmId) {
        let done = match self {
            Self::Here(privileged) => privileged.leave(vm).await.map_err(Into::into),
            Self::There(client) => {
                let ask = Message::Leave(wire::Leave { vm: vm.clone() });
                client.ask(&ask, &[]).await.map(drop)
            }
        };
        said("leave", done);
    }

    /// Removes the directory of a VM that was removed.
    ///
    /// # Errors
    /// It stays, or some of it.
    pub async fn remove_dir(&self, vm: &VmId) -> Result<(), AskError> {
        match self {
            Self::Here(privileged) => Ok(privileged.remove_dir(vm).await?),
            Self::There(client) => {
                let ask = Message::RemoveDir(wire::RemoveDir { vm: vm.clone() });
                client.ask(&ask, &[]).await.map(drop)
            }
        }
    }

    /// What the host's user database says of a user; without a name where it knows none.
    ///
    /// # Errors
    /// There is no monitor.
    pub async fn person(&self, uid: u32) -> Result<Person, AskError> {
        let found = self.who_is(WhoIs::Uid(uid)).await?;
        Ok(found.unwrap_or(Person {
            uid,
            ..Person::default()
        }))
    }

    /// The same by name; none: there is no such user.
    ///
    /// # Errors
    /// There is no monitor.
    pub async fn person_named(&self, name: &str) -> Result<Option<Person>, AskError> {
        self.who_is(WhoIs::Name(name.into())).await
    }

    async fn who_is(&self, ask: WhoIs) -> Result<Option<Person>, AskError> {
        let is = match self {
            Self::Here(_) => {
                let looked = tokio::task::spawn_blocking(move || people::look(&ask)).await;
                looked.map_err(|_| AskError::Other)?
            }
            Self::There(client) => match client.ask(&Message::WhoIs(ask), &[]).await? {
                (Message::Is(is), _) => is,
                _ => return Err(AskError::Other),
            },
        };
        Ok(is.user.map(|(uid, name, groups)| Person {
            uid,
            name: Some(name),
            groups,
        }))
    }

    /// Connects to another host of the configuration.
    ///
    /// # Errors
    /// There is no monitor, or no such host, or it does not accept.
    pub async fn peer(&self, host: &VmId) -> Result<OwnedFd, AskError> {
        let client = match self {
            Self::Here(privileged) => return Ok(privileged.outward.connect(host).await?),
            Self::There(client) => client,
        };
        let host = host.clone();
        match client.ask(&Message::Peer(wire::Peer { host }), &[]).await? {
            (Message::HasPeer(_), mut fds) => {
                let socket = fds.pop().and_then(Passed::trust);
                socket.ok_or(AskError::Other)
            }
            _ => Err(AskError::Other),
        }
    }

    /// What is found in a directory of the configuration, once that is another version than `seen`.
    ///
    /// # Errors
    /// There is no monitor, or no such directory in its configuration.
    pub async fn discover(&self, key: u64, seen: u64) -> Result<HasFound, AskError> {
        let client = match self {
            Self::Here(privileged) => return Ok(privileged.discover.next(key, seen).await?),
            Self::There(client) => client,
        };
        let ask = Message::Discover(wire::Discover { key, seen });
        match client.ask(&ask, &[]).await? {
            (Message::HasFound(found), _) => Ok(found),
            _ => Err(AskError::Other),
        }
    }

    /// Returns the listener that guests reach through the host's kernel.
    ///
    /// # Errors
    /// There is no monitor, or there can be no such listener, and why.
    pub async fn guests(&self) -> Result<OwnedFd, AskError> {
        let client = match self {
            Self::Here(privileged) => return Ok(privileged.guests()?),
            Self::There(client) => client,
        };
        match client.ask(&Message::Guests(wire::Guests {}), &[]).await? {
            (Message::HasGuests(_), mut fds) => {
                let socket = fds.pop().and_then(Passed::trust);
                socket.ok_or(AskError::Other)
            }
            _ => Err(AskError::Other),
        }
    }

    /// Has the configuration read again, as SIGHUP does.
    ///
    /// # Errors
    /// There is no monitor.
    pub async fn reread(&self) -> Result<(), AskError> {
        match self {
            Self::Here(_) => {
                let raised = nix::sys::signal::raise(nix::sys::signal::Signal::SIGHUP);
                raised.map_err(|e| AskError::Refused(e.to_string()))
            }
            Self::There(client) => client.say(&Message::Reread(wire::Reread {}), &[]).await,
        }
    }

    /// Tells the service manager how things are.
    pub async fn status(&self, text: String) {
        match self {
            Self::Here(_) => {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&text)]);
            }
            Self::There(client) => {
                let say = Message::Status(wire::Status { text });
                said("status", client.say(&say, &[]).await);
            }
        }
    }
}

/// A monitor that has gone has forgotten everything that it was not told to forget.
fn said(what: &str, done: Result<(), AskError>) {
    match done {
        Ok(()) | Err(AskError::Absent) => {}
        Err(e) => tracing::warn!(what, error = %e, "the monitor does not do it"),
    }
}

impl Connected {
    fn new(connected: privileged::Connected) -> Result<Self, NotReached> {
        let socket = connected.socket.trust();
        Ok(Self {
            socket: socket.ok_or(AskError::Other)?,
            pid: connected.pid,
            ours: connected.ours,
            found: connected.found,
        })
    }
}

impl From<wire::NotReached> for NotReached {
    fn from(not: wire::NotReached) -> Self {
        match not.ended {
            Some(words) => Self::Ended(words),
            None => Self::Failed(not.text),
        }
    }
}
