//! The doorkeeper: one thread that waits for dials, for guests that dial, and for changes of the directory of the VMM's socket.
//!
//! | found at the VMM's path | said |
//! |---|---|
//! | a socket of root, of this process' user or of the directory's owner | it is there |
//! | a socket of somebody else, a link, another file | why it is not used (R127) |
//! | nothing, or nobody listens | why, and the directory is watched |
//!
//! A directory that others may write in is not used at all: whoever can write there can plant a socket. What was checked is
//! what is connected to: the descriptor, not the path. Sockets for the guest's dials belong to the VMM's user, and only that user,
//! root and this process' own may connect to them: who the guest is, the path says and nothing else.
//!
//! A VMM makes its socket, and listens on it a moment later, which nobody is told. So a dial that is refused soon after a change
//! of the directory is no reason to give up: the socket counts as there again after a while, a few times (`again.rs`).

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use adit_channel::foreign::connect;
use adit_channel::socket_path;
use adit_print::with_causes;
use clap::Parser;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{MsgFlags, getsockopt, send, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use super::again::{AGAIN_FIRST, Again};
use super::confine::{Confined, confine};
use super::wire::{Asked, Wire};
use super::{DIALED, FAILED, OFFERED, is_pause, kernel};

/// First argument of a process that is a doorkeeper.
pub const COMMAND: &str = "door";

/// The directory is looked at again when one of these happens in it.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);

/// Opens the sockets between a port process and its VMM. Only a port process starts it.
#[derive(Debug, Parser)]
#[command(name = "adit-port door")]
pub struct Args {
    /// The VMM's socket.
    #[arg(long, required_unless_present = "cid")]
    socket: Option<PathBuf>,
    /// The directory of the VMM's socket stays as long as this process.
    #[arg(long)]
    stays: bool,
    /// CID of a VM whose streams the host's kernel carries.
    #[arg(long, conflicts_with = "socket")]
    cid: Option<u32>,
    /// Where nobody can see whether the VM is there it counts as not there.
    #[arg(long)]
    only_seen: bool,
    /// Host port that the guest may dial; repeat for more.
    #[arg(long = "serve-port", value_name = "PORT")]
    serve_ports: Vec<u32>,
}

impl Args {
    /// Reads the command line of a doorkeeper.
    ///
    /// # Errors
    /// It is none.
    pub fn of_this_process() -> io::Result<Self> {
        // In the list of processes it would have the name of the link by which it was started.
        let _ = nix::sys::prctl::set_name(c"adit-door");
        Self::try_parse_from(std::env::args_os().skip(1)).map_err(io::Error::other)
    }
}

/// Where the guest's dials to one port arrive.
struct Served {
    port: u32,
    path: PathBuf,
    /// The listener, and the device and inode of its socket.
    listener: Option<(UnixListener, (u64, u64))>,
}

/// Who may connect to the sockets for the guest's dials, besides root and this process' user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    uid: u32,
    gid: u32,
}

struct Keeper {
    path: PathBuf,
    dir: PathBuf,
    served: Vec<Served>,
    wire: Wire,
    inotify: OwnedFd,
    /// The directory that is watched.
    watch: Option<i32>,
    /// The last dial was refused.
    refused: bool,
    again: Again,
    owner: Option<Owner>,
    confined: Confined,
}

/// Serves until the port process ends. `control` is its end of the door.
///
/// # Errors
/// The kernel refuses to wait, or the path has no directory.
pub fn run(args: Args, control: OwnedFd) -> io::Result<()> {
    let served = match (args.cid, args.socket) {
        (Some(cid), _) => kernel::run(cid, args.only_seen, control),
        (None, Some(socket)) => serve(socket, args.stays, &args.serve_ports, control),
        (None, None) => Err(io::Error::other("neither a socket nor a CID")),
    };
    match served {
        // The port process has ended while something was said.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        served => served,
    }
}

fn serve(path: PathBuf, stays: bool, serve_ports: &[u32], control: OwnedFd) -> io::Result<()> {
    // What is made here is the VMM's and nobody else's, from the first moment on.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let dir = path.parent().map(Path::to_owned);
    let dir = dir.ok_or_else(|| io::Error::other("the VMM's socket has no directory"))?;
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let confined = confine(&dir, stays)?;
    let served = serve_ports.iter().map(|&port| {
        let mut at = path.clone().into_os_string();
        at.push(format!("_{port}"));
        Served {
            port,
            path: at.into(),
            listener: None,
        }
    });
    let mut keeper = Keeper {
        served: served.collect(),
        path,
        dir,
        wire: Wire::new(control),
        inotify,
        watch: None,
        refused: false,
        again: Again::default(),
        owner: None,
        confined,
    };
    keeper.look()?;
    while keeper.turn()? {}
    Ok(())
}

impl Keeper {
    /// Waits once. Returns false when the port process has ended.
    fn turn(&mut self) -> io::Result<bool> {
        let mut fds = vec![
            PollFd::new(self.wire.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
        ];
        let listeners = self.served.iter().map(|s| s.listener.as_ref());
        let listening: Vec<_> = listeners
            .enumerate()
            .filter_map(|(i, l)| Some((i, l?)))
            .collect();
        for (_, (listener, _)) in &listening {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, self.again.limit()) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let dialled: Vec<_> = listening
            .iter()
            .zip(&ready[2..])
            .filter_map(|((i, _), ready)| ready.then_some(*i))
            .collect();
        if ready[1] {
            self.drain_events();
            self.again.changed();
            self.refused = false;
            self.look()?;
        } else if self.again.is_due() {
            self.refused = false;
            self.look()?;
        }
        for index in dialled {
            self.accept(index)?;
        }
        if ready[0] {
            return self.dials();
        }
        Ok(true)
    }

    fn drain_events(&self) {
        let mut events = [0; 4096];
        while rustix::io::read(&self.inotify, &mut events).is_ok_and(|n| n > 0) {}
    }

    // ---- the directory

    /// Looks at the directory and everything in it, and says what was found if that is news.
    fn look(&mut self) -> io::Result<()> {
        if !self.confined.is_current() {
            let text = "the directory above the VMM's was replaced, and this process may make sockets in the old one only";
            return Err(io::Error::other(text));
        }
        // Watched first: what changes while it is looked at is looked at again.
        self.watch_dir();
        let found = self.check().and_then(|(_, owner)| {
            self.owner = Some(owner);
            if let Err(why) = self.listen(owner) {
                self.again.later();
                return Err(why);
            }
            match self.refused {
                true => Err(format!("nothing listens at {}", self.path.display())),
                false => Ok(()),
            }
        });
        self.wire.say_state(found)
    }

    /// Watches the directory, or the closest one above it that there is.
    fn watch_dir(&mut self) {
        let watched = self
            .dir
            .ancestors()
            .find_map(|dir| inotify::add_watch(&self.inotify, dir, CHANGES).ok());
        // The same directory has the same number.
        if watched != self.watch
            && let Some(old) = std::mem::replace(&mut self.watch, watched)
        {
            // It is gone already where its directory was removed.
            let _ = inotify::remove_watch(&self.inotify, old);
        }
    }

    /// The directory's owner.
    fn dir_owner(&self) -> Result<Owner, String> {
        let shown = self.dir.display();
        let dir = fs::metadata(&self.dir).map_err(|e| format!("cannot look at {shown}: {e}"))?;
        if !dir.is_dir() {
            return Err(format!("{shown} is no directory"));
        }
        if dir.mode() & 0o002 != 0 {
            return Err(format!(
                "{shown} may be written by everybody, who could plant a socket there: `chmod o-w` it"
            ));
        }
        Ok(owner_of(&dir))
    }

    /// Finds the VMM's socket. The descriptor names it, whatever is at its path later.
    fn check(&self) -> Result<(File, Owner), String> {
        let dir = self.dir_owner()?;
        let shown = self.path.display();
        let socket = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&self.path);
        let socket = match socket {
            Ok(socket) => socket,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(format!("the VMM has not made {shown} yet"));
            }
            Err(e) => return Err(format!("cannot look at {shown}: {e}")),
        };
        let found = socket
            .metadata()
            .map_err(|e| format!("cannot look at {shown}: {e}"))?;
        if !found.file_type().is_socket() {
            return Err(format!("{shown} is not a socket"));
        }
        let owner = owner_of(&found);
        if ![0, geteuid().as_raw(), dir.uid].contains(&owner.uid) {
            return Err(format!(
                "{shown} belongs to user {}, and its directory to user {}: somebody else may have put it there",
                owner.uid, dir.uid
            ));
        }
        Ok((socket, owner))
    }

    /// Listens for the guest's dials, once the VMM's socket is there.
    fn listen(&mut self, owner: Owner) -> Result<(), String> {
        let mut removed = false;
        for served in &mut self.served {
            let place = fs::symlink_metadata(&served.path).ok();
            let at = place.as_ref().map(|m| (m.dev(), m.ino()));
            let is_there = served.listener.as_ref().is_some_and(|l| Some(l.1) == at);
            if !is_there {
                if served.listener.take().is_some() && place.is_none() {
                    // Perhaps the whole directory is being removed, and a new socket would be in the way.
                    removed = true;
                    continue;
                }
                let listener = socket_path::listen(&served.path).map_err(|e| with_causes(&e))?;
                let made = listener
                    .set_nonblocking(true)
                    .and_then(|()| fs::symlink_metadata(&served.path));
                let made = made.map_err(|e| e.to_string())?;
                served.listener = Some((listener, (made.dev(), made.ino())));
            }
            let failed = |e: io::Error| format!("cannot prepare {}: {e}", served.path.display());
            let now = fs::symlink_metadata(&served.path).map_err(failed)?;
            if owner_of(&now) != owner && geteuid().is_root() {
                lchown(&served.path, Some(owner.uid), Some(owner.gid)).map_err(failed)?;
            }
            if now.mode() & 0o777 != 0o600 {
                fs::set_permissions(&served.path, Permissions::from_mode(0o600)).map_err(failed)?;
            }
        }
        if removed {
            self.again.later();
        }
        Ok(())
    }

    // ---- streams

    /// Serves the dials that wait. Returns false when the port process has ended.
    fn dials(&mut self) -> io::Result<bool> {
        loop {
            let (ticket, port) = match self.wire.next()? {
                Asked::Dial(ticket, port) => (ticket, port),
                Asked::Nothing => return Ok(true),
                Asked::Over => return Ok(false),
            };
            let socket = match self.dial(port) {
                Ok(socket) => socket,
                Err(why) => {
                    tracing::debug!(why, port, "dial failed");
                    self.wire.say(FAILED, ticket, None)?;
                    continue;
                }
            };
            self.wire.say(DIALED, ticket, Some(socket.as_fd()))?;
        }
    }

    fn dial(&mut self, port: u32) -> Result<UnixStream, String> {
        let (checked, _) = self.check()?;
        // The socket that was checked, and no other that came to its path since.
        let by_fd = PathBuf::from(format!("/proc/self/fd/{}", checked.as_raw_fd()));
        let socket = match socket_path::connect_now(&by_fd) {
            Ok(socket) => socket,
            Err(e) => {
                if e.kind() == io::ErrorKind::ConnectionRefused {
                    self.refused = true;
                    self.again.later();
                    self.look().map_err(|e| e.to_string())?;
                }
                // A full backlog is one of these: only this stream fails (R119).
                return Err(format!("cannot connect to {}: {e}", self.path.display()));
            }
        };
        self.again.over();
        // Whole, and before anybody else has the socket: a Cloud Hypervisor that finds the end of a stream before the end of
        // this line ends the VM. An empty socket has room for it.
        let line = connect::request(port);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(socket.as_raw_fd(), line.as_bytes(), flags) {
            Ok(n) if n == line.len() => Ok(socket),
            Ok(_) => Err("the VMM's socket has no room for a line".into()),
            Err(e) => Err(e.to_string()),
        }
    }

    fn accept(&mut self, index: usize) -> io::Result<()> {
        loop {
            let Some(served) = self.served.get(index) else {
                return Ok(());
            };
            let Some((listener, _)) = &served.listener else {
                return Ok(());
            };
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(e) => {
                    let pause = e
                        .raw_os_error()
                        .is_some_and(|e| is_pause(Errno::from_raw(e)));
                    if !pause {
                        tracing::warn!(error = %e, "cannot accept what the guest dials");
                        // It stays readable: not so soon again.
                        std::thread::sleep(AGAIN_FIRST);
                    }
                    return Ok(());
                }
            };
            let peer = getsockopt(&socket, PeerCredentials).map(|peer| peer.uid());
            let own = [0, geteuid().as_raw(), self.owner.map_or(0, |o| o.uid)];
            if !peer.is_ok_and(|uid| own.contains(&uid)) {
                tracing::warn!(?peer, path = %served.path.display(), "a process of a user who is not the VMM's was refused");
                continue;
            }
            let port = served.port;
            if socket.set_nonblocking(true).is_ok() {
                self.wire.say(OFFERED, port, Some(socket.as_fd()))?;
            }
        }
    }
}

fn owner_of(of: &Metadata) -> Owner {
    let (uid, gid) = (of.uid(), of.gid());
    Owner { uid, gid }
}
