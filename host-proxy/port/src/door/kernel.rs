//! The doorkeeper of a VM whose streams the host's kernel carries (`vhost_vsock`): it makes AF_VSOCK sockets, and passes those that are
//! connected.
//!
//! | the kernel says | what follows |
//! |---|---|
//! | connected | the stream is open |
//! | ENODEV: no VM has this CID | there is no VMM, and the dial ends with that |
//! | ECONNRESET: nothing listens on that port of the guest | the dial fails |
//! | ETIMEDOUT, which it says after two seconds: the guest does not answer | it is asked again, [`TRIES_MAX`] times at most. The dial's own deadline is shorter |
//!
//! Nobody is told that a VM has come. Its VMM opens `/dev/vhost-vsock`, and closes it at its end, so the device is watched (inotify), and
//! what follows is looked at: a stream to a port that nobody has is begun, and not waited for. The VMM says the CID a moment after it
//! has opened the device, and the kernel forgets it a moment after the device is closed, so it is looked again, a few times (`again.rs`). Where the
//! device is not in this process' `/dev`, nobody can tell whether there is a VM: then it counts as there, and each dial says what it finds.
//! Where other ways are looked at, too (`carrier = "auto"`), it counts as not there.
//!
//! It parses nothing and has no file, so it is confined to these sockets before it serves ([`confine`](super::confine)).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, VsockAddr, connect, getsockopt, socket, sockopt::SocketError,
};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use super::again::Again;
use super::confine::confine_to_vsock;
use super::wire::{Asked, Wire};
use super::{FAILED, GONE, OPENED};

/// Dials that are under way at most: as many as the port process has streams.
const PENDING_MAX: usize = adit_channel::foreign::LINKS_MAX;
/// How often a guest that does not answer is asked.
const TRIES_MAX: u32 = 6;
/// The first looks that are left out where the VM seems to be there still.
const LOOKS_SPARED: u32 = 3;
/// A port that nothing listens on: the last one that there is.
const NOBODYS_PORT: u32 = u32::MAX - 1;

/// What a VMM does with the device, and what becomes of the device itself.
const CHANGES: WatchFlags = WatchFlags::OPEN
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::CLOSE_NOWRITE)
    .union(WatchFlags::DELETE_SELF);

/// Where streams come from.
pub(super) trait Streams {
    /// What must be there before there can be any: the driver. Why not, and what to do.
    fn missing(&self) -> Option<String>;
    /// The device that VMMs open.
    fn device(&self) -> &Path;
    /// Begins a stream to a port of the guest. It is open when the socket is writable without an error.
    fn begin(&mut self, port: u32) -> Result<OwnedFd, Errno>;
}

/// The host's kernel.
struct VhostVsock {
    cid: u32,
}

/// Of the driver, whoever made the device's file.
const DRIVER: &str = "/sys/class/misc/vhost-vsock";
const DEVICE: &str = "/dev/vhost-vsock";

impl Streams for VhostVsock {
    fn missing(&self) -> Option<String> {
        // Without it the kernel would send a stream to this machine's own host, if this machine is a guest.
        let is_there = Path::new(DRIVER).exists();
        (!is_there).then(|| {
            "the host's kernel has no vhost_vsock: `modprobe vhost_vsock`, and name it in /etc/modules-load.d".into()
        })
    }

    fn device(&self) -> &Path {
        Path::new(DEVICE)
    }

    fn begin(&mut self, port: u32) -> Result<OwnedFd, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        match connect(socket.as_raw_fd(), &VsockAddr::new(self.cid, port)) {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
            Err(e) => Err(e),
        }
    }
}

/// A dial under way.
struct Pending {
    ticket: u32,
    port: u32,
    socket: OwnedFd,
    tries: u32,
}

struct Keeper<S> {
    streams: S,
    cid: u32,
    wire: Wire,
    inotify: OwnedFd,
    /// What is watched: the device, or the directory in which it will be.
    watch: Option<i32>,
    /// The device is one of those.
    sees_device: bool,
    /// Where it is not, the VM counts as not there.
    only_seen: bool,
    pending: Vec<Pending>,
    /// A VMM has closed the device lately: perhaps this one.
    closed: bool,
    again: Again,
}

/// Serves until the port process ends. `control` is its end of the door.
pub(super) fn run(cid: u32, only_seen: bool, control: OwnedFd) -> io::Result<()> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    confine_to_vsock()?;
    serve(VhostVsock { cid }, (cid, only_seen), control, inotify)
}

fn serve(
    streams: impl Streams,
    (cid, only_seen): (u32, bool),
    control: OwnedFd,
    inotify: OwnedFd,
) -> io::Result<()> {
    let mut keeper = Keeper {
        streams,
        cid,
        wire: Wire::new(control),
        inotify,
        watch: None,
        sees_device: false,
        only_seen,
        pending: Vec::new(),
        closed: false,
        again: Again::default(),
    };
    keeper.look()?;
    while keeper.turn()? {}
    Ok(())
}

impl<S: Streams> Keeper<S> {
    /// Waits once. Returns false when the port process has ended.
    fn turn(&mut self) -> io::Result<bool> {
        let mut fds = vec![
            PollFd::new(self.wire.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
        ];
        for dial in &self.pending {
            fds.push(PollFd::new(dial.socket.as_fd(), PollFlags::POLLOUT));
        }
        match poll(&mut fds, self.again.limit()) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        drop(fds);
        // From behind, so that what takes the place of one that is removed was looked at.
        for index in (0..self.pending.len()).rev() {
            if ready[2 + index] {
                self.answered(index)?;
            }
        }
        if ready[1] {
            self.closed |= self.drain_events();
            self.again.changed();
            self.look()?;
        } else if self.again.is_due() {
            self.look()?;
        }
        match ready[0] {
            true => self.dials(),
            false => Ok(true),
        }
    }

    /// Takes all events. Returns whether the device was closed.
    fn drain_events(&self) -> bool {
        let mut room = [const { MaybeUninit::uninit() }; 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut room);
        let closes = ReadFlags::CLOSE_WRITE | ReadFlags::CLOSE_NOWRITE;
        let mut closed = false;
        while let Ok(event) = events.next() {
            closed |= event.events().intersects(closes);
        }
        closed
    }

    // ---- the VM

    /// Looks whether there is a VM, and says so if that is news.
    fn look(&mut self) -> io::Result<()> {
        // Watched first: what changes while it is looked at is looked at again.
        self.watch();
        let found = match self.streams.missing() {
            Some(why) => Err(why),
            None if !self.sees_device && self.only_seen => Err(format!(
                "aditd does not see {}, so nobody can tell whether a VM has the CID: say `vsock`, or let its unit see the device",
                self.streams.device().display()
            )),
            None if !self.sees_device => Ok(()),
            None => match self.streams.begin(NOBODYS_PORT) {
                // Closed at once, whatever becomes of it.
                Ok(_) => Ok(()),
                Err(e) => Err(self.why(e)),
            },
        };
        self.say_state(found)
    }

    fn say_state(&mut self, state: Result<(), String>) -> io::Result<()> {
        match state {
            Ok(()) if self.closed => {
                // It may be another VM's. Each look is a packet to the guest, so there are fewer.
                self.again.spare(LOOKS_SPARED);
                self.closed = self.again.later();
            }
            Ok(()) => self.again.over(),
            Err(_) => {
                self.closed = false;
                self.again.later();
            }
        }
        self.wire.say_state(state)
    }

    /// Watches the device, or the directory in which it will be.
    fn watch(&mut self) {
        let device = self.streams.device();
        let of_device = inotify::add_watch(&self.inotify, device, CHANGES).ok();
        let dir = device.parent().unwrap_or(Path::new("/"));
        let of_dir = || inotify::add_watch(&self.inotify, dir, WatchFlags::CREATE).ok();
        let watched = of_device.or_else(of_dir);
        self.sees_device = of_device.is_some();
        // The same file has the same number.
        if watched != self.watch
            && let Some(old) = std::mem::replace(&mut self.watch, watched)
        {
            // It is gone already where the device was removed.
            let _ = inotify::remove_watch(&self.inotify, old);
        }
    }

    /// Why there is no stream, and what to do.
    fn why(&self, e: Errno) -> String {
        let cid = self.cid;
        match e {
            Errno::ENODEV => format!(
                "no VM of this host has CID {cid} now: start it with `-device vhost-vsock-pci,guest-cid={cid}`"
            ),
            Errno::EAFNOSUPPORT => {
                "this process may make no AF_VSOCK socket: the kernel has none (`modprobe vhost_vsock`), or aditd's unit forbids it \
                 (`RestrictAddressFamilies`)"
                    .into()
            }
            e => format!("the kernel begins no stream to CID {cid}: {}", e.desc()),
        }
    }

    // ---- streams

    /// Serves the dials that wait. Returns false when the port process has ended.
    fn dials(&mut self) -> io::Result<bool> {
        loop {
            match self.wire.next()? {
                Asked::Dial(ticket, port) => self.dial(ticket, port, 1)?,
                Asked::Nothing => return Ok(true),
                Asked::Over => return Ok(false),
            }
        }
    }

    fn dial(&mut self, ticket: u32, port: u32, tries: u32) -> io::Result<()> {
        let begun = match self.streams.missing() {
            Some(_) => Err(Errno::ENODEV),
            None if self.pending.len() >= PENDING_MAX => Err(Errno::EAGAIN),
            None => self.streams.begin(port),
        };
        match begun {
            Ok(socket) => {
                self.pending.push(Pending {
                    ticket,
                    port,
                    socket,
                    tries,
                });
                Ok(())
            }
            Err(e) => {
                tracing::debug!(port, why = self.why(e), "dial failed");
                if e != Errno::ENODEV || !self.sees_device {
                    return self.wire.say(FAILED, ticket, None);
                }
                // Ahead of the dial's end, which is said with it.
                let why = self.streams.missing().unwrap_or_else(|| self.why(e));
                self.say_state(Err(why))?;
                self.wire.say(GONE, ticket, None)
            }
        }
    }

    /// A dial has its answer.
    fn answered(&mut self, index: usize) -> io::Result<()> {
        let Pending {
            ticket,
            port,
            socket,
            tries,
        } = self.pending.swap_remove(index);
        let error = getsockopt(&socket, SocketError).unwrap_or(Errno::EBADF as i32);
        match Errno::from_raw(error) {
            Errno::UnknownErrno if error == 0 => {
                self.wire.say(OPENED, ticket, Some(socket.as_fd()))
            }
            Errno::ETIMEDOUT if tries < TRIES_MAX => {
                drop(socket);
                self.dial(ticket, port, tries + 1)
            }
            e => {
                tracing::debug!(port, tries, error = e.desc(), "dial failed");
                self.wire.say(FAILED, ticket, None)
            }
        }
    }
}

#[cfg(test)]
mod tests;
