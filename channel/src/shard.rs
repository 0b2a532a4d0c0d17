//! A shard: one epoll set, and the [`Port`]s whose descriptors are in it. The data path uses no lock and no other
//! thread.
//!
//! ```text
//! other threads ── Handle (queue + eventfd) ──► Shard ── poll, by turns ──► Port, Port, …
//!                                                 │ epoll: kicks, sinks, commands, the owner's own descriptors
//! owner ◄── poll_news(): Notice, Ready ───────────┘
//! ```
//! - The owner calls [`Shard::turn`] in its own loop (a thread, a VMM's event loop that watches the shard's
//!   descriptor, a port process), or runs the shard on a thread with [`Shard::spawn`].
//! - Each `Port` has a budget per turn, and they take turns.
//! - Before it sleeps the shard may poll for a while ([`Shard::busy_poll`]). By default it does so only while packets
//!   follow each other quickly, for at most 60 microseconds and the time of the work before, and gives the core to whoever
//!   else wants it.
//! - There is no periodic tick: the epoll timeout is the earliest deadline of any `Port`, and infinite if there is
//!   none.

mod commands;
mod thread;
mod wait;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_engine::{EngineConfig, Tick};
use nix::sys::epoll::{EpollFlags, EpollTimeout};

use crate::backlog::{Backlog, Offered};
use crate::carrier::Carrier;
use crate::inbox::Inbox;
use crate::polling::Polling;
use crate::port::watch::{Token, Watch};
use crate::port::{Budget, Notice, Port, Turn};

pub use crate::inbox::Handle;
pub use thread::ShardThread;

/// Maximum number of `Port`s in a shard.
pub const PORTS_MAX: usize = 4095;
/// Largest key of a descriptor of the owner: it must fit into an epoll token.
pub const KEY_MAX: u32 = crate::port::watch::LOW as u32;
/// System calls of a shard that has devices in its own process, after they are active. A VMM's seccomp filter must
/// allow them on the shard's thread. The allocator uses the second half. The libc may use either form of epoll wait.
pub const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_ctl,
    // For eventfds and sockets.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    // For a device that starts or stops, whose descriptors are registered again.
    libc::SYS_fcntl,
    libc::SYS_close,
    libc::SYS_clock_gettime,
    // Between two looks for work.
    libc::SYS_sched_yield,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
];

/// Index of a `Port` in its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortIndex(pub(crate) u16);

/// An event for the owner of a shard, from [`Shard::poll_news`].
#[derive(Debug)]
pub enum News {
    /// A descriptor registered with [`Shard::watch`] is readable, hung up, or (on request) writable.
    Ready {
        /// Key of the descriptor.
        key: u32,
    },
    /// A notice of a `Port`.
    Notice(PortIndex, Notice),
}

/// Several `Port`s on one epoll set.
pub struct Shard<C: Carrier> {
    watch: Watch,
    inbox: Arc<Inbox>,
    ports: Vec<Port<C>>,
    /// `Port`s to poll: they had an event or a command, or have more to do.
    dirty: Vec<bool>,
    deadlines: Vec<Option<Tick>>,
    listeners: Listeners,
    news: VecDeque<News>,
    budget: Budget,
    polling: Polling,
    /// When the last sleep ended.
    woke: Instant,
    stopped: bool,
    wakeups: u64,
}

impl<C: Carrier> Shard<C> {
    /// Makes a shard without `Port`s.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new() -> io::Result<Self> {
        let (watch, inbox) = (Watch::new()?, Inbox::new()?);
        watch.add_level(inbox.as_fd(), Token::Commands)?;
        Ok(Self {
            watch,
            inbox: Arc::new(inbox),
            ports: Vec::new(),
            dirty: Vec::new(),
            deadlines: Vec::new(),
            listeners: BTreeMap::new(),
            news: VecDeque::new(),
            budget: Budget::default(),
            polling: Polling::default(),
            woke: Instant::now(),
            stopped: false,
            wakeups: 0,
        })
    }

    /// Adds a `Port`. The seed should be unpredictable for the guest.
    ///
    /// # Errors
    /// The shard has too many `Port`s, or the carrier's descriptors cannot be watched.
    pub fn add(&mut self, carrier: C, config: EngineConfig, seed: u64) -> io::Result<PortIndex> {
        let index = u16::try_from(self.ports.len())
            .ok()
            .filter(|&i| usize::from(i) < PORTS_MAX)
            .ok_or_else(|| io::Error::other(format!("a shard has at most {PORTS_MAX} ports")))?;
        let port = Port::new(carrier, config, seed, self.watch.of_port(index))?;
        self.ports.push(port);
        self.dirty.push(true);
        self.deadlines.push(None);
        Ok(PortIndex(index))
    }

    /// Returns a `Port` for reading.
    pub fn port(&self, index: PortIndex) -> &Port<C> {
        &self.ports[usize::from(index.0)]
    }

    /// Returns a `Port` for commands. The next turn polls it.
    pub fn port_mut(&mut self, index: PortIndex) -> &mut Port<C> {
        self.dirty[usize::from(index.0)] = true;
        &mut self.ports[usize::from(index.0)]
    }

    /// Returns a handle on a `Port`, for other threads.
    pub fn handle(&self, index: PortIndex) -> Handle {
        Handle {
            inbox: self.inbox.clone(),
            port: index.0,
        }
    }

    /// The time on the shard's clock.
    pub fn now(&self) -> Tick {
        self.inbox.tick(Instant::now())
    }

    /// Makes the shard poll for up to `limit` (at most [`BUSY_POLL_MAX`](crate::polling::BUSY_POLL_MAX)) after the
    /// last work, before it sleeps. A wake-up costs tens of microseconds, a poll a fraction of one. With zero, the
    /// default, it sleeps at once, except that it looks for some microseconds while packets follow each other quickly
    /// and looking finds them; a process with one CPU always sleeps at once. Leave it at zero if the guests' vCPUs share
    /// the shard's CPUs, because polling delays them, though it gives way to them.
    pub fn busy_poll(&mut self, limit: Duration) {
        self.polling = Polling::new(limit);
    }

    /// How often the shard returned from waiting in the kernel.
    pub fn wakeups(&self) -> u64 {
        self.wakeups
    }

    /// Returns true if a handle has asked the shard to stop.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Watches a descriptor of the owner, level-triggered, for reading.
    ///
    /// # Errors
    /// It cannot be watched, or the key is above [`KEY_MAX`].
    pub fn watch(&self, fd: BorrowedFd<'_>, key: u32) -> io::Result<()> {
        if key > KEY_MAX {
            // A truncated key would be the key of another descriptor.
            let why = format!("key {key} of a descriptor is above {KEY_MAX}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        self.watch.add_level(fd, Token::Extra(key))
    }

    /// Also watches a descriptor for room to write, or stops doing so. The key is that of [`watch`](Self::watch).
    ///
    /// # Errors
    /// The descriptor is not being watched.
    pub fn watch_writable(&self, fd: BorrowedFd<'_>, key: u32, on: bool) -> io::Result<()> {
        self.watch.set_writable(fd, Token::Extra(key), on)
    }

    /// Ends [`watch`](Self::watch). Call it before the descriptor is closed.
    pub fn unwatch(&self, fd: BorrowedFd<'_>) {
        self.watch.remove(fd);
    }

    /// Takes the next event for the owner.
    #[must_use]
    pub fn poll_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// Waits for at most `timeout`, then handles events until there is news or nothing more to do now.
    ///
    /// # Errors
    /// The kernel refuses to wait. The shard cannot be used any more.
    pub fn turn(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        // First handle the owner's commands since the last turn.
        self.poll_ports();
        let mut wait = match self.news.is_empty() {
            true => self.timeout(timeout),
            false => EpollTimeout::ZERO,
        };
        if wait != EpollTimeout::ZERO {
            self.polling.worked(self.woke.elapsed());
        }
        if wait != EpollTimeout::ZERO && self.polling.is_on() {
            self.poll_before_sleep(timeout)?;
            if !self.news.is_empty() || self.stopped {
                return Ok(());
            }
            wait = self.timeout(timeout);
        }
        self.events(wait)?;
        self.wakeups += 1;
        self.poll_ports();
        Ok(())
    }

    fn ready(&mut self, now: Tick, port: u16, token: Token, flags: EpollFlags) {
        match token {
            Token::Commands => {
                for command in self.inbox.take() {
                    self.command(now, command);
                }
            }
            Token::Extra(key) => self.news.push_back(News::Ready { key }),
            Token::Waker(_) | Token::Sink { .. } | Token::Linger(_) => {
                if let Some(p) = self.ports.get_mut(usize::from(port)) {
                    p.ready(now, token, flags);
                    self.dirty[usize::from(port)] = true;
                }
            }
        }
    }

    /// Time until something must be done if no descriptor becomes ready. A VMM's own event loop sets its timer to it
    /// after each turn. `None` means forever.
    pub fn wait_limit(&self) -> Option<Duration> {
        if self.dirty.contains(&true) || !self.news.is_empty() {
            return Some(Duration::ZERO);
        }
        let now = self.now();
        let deadline = self.deadlines.iter().flatten().min();
        deadline.map(|t| Duration::from_nanos(t.0.saturating_sub(now.0)))
    }

    fn poll_ports(&mut self) {
        let now = self.now();
        for (i, port) in self.ports.iter_mut().enumerate() {
            if !self.dirty[i] && self.deadlines[i].is_none_or(|t| t > now) {
                continue;
            }
            match port.poll(now, self.budget) {
                Turn::Again => self.dirty[i] = true,
                Turn::Idle { deadline } => {
                    self.dirty[i] = false;
                    self.deadlines[i] = deadline;
                }
            }
            while let Some(notice) = port.poll_notice() {
                // At most 4,095, so it fits.
                let index = i as u16;
                match offered(&self.listeners, index, &notice) {
                    None => self.news.push_back(News::Notice(PortIndex(index), notice)),
                    Some((backlog, offered)) => {
                        if !backlog.offer(offered) {
                            port.refuse(now, offered.stream);
                            self.dirty[i] = true;
                        }
                    }
                }
            }
        }
    }
}

impl<C: Carrier> AsFd for Shard<C> {
    /// Readable when a turn has something to do. For a VMM's own event loop, which must also use
    /// [`wait_limit`](Shard::wait_limit).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

type Listeners = BTreeMap<(u16, u32), Arc<Backlog>>;

/// The stream that a notice offers, if somebody listens for it.
fn offered<'a>(
    listeners: &'a Listeners,
    index: u16,
    notice: &Notice,
) -> Option<(&'a Arc<Backlog>, Offered)> {
    let &Notice::Incoming {
        stream,
        local_port,
        peer_port,
    } = notice
    else {
        return None;
    };
    let offered = Offered {
        stream,
        local_port,
        peer_port,
    };
    Some((listeners.get(&(index, local_port))?, offered))
}
