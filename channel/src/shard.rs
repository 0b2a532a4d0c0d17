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
//! - Before it sleeps the shard may poll for a while ([`Shard::busy_poll`]). This is off by default.
//! - There is no periodic tick: the epoll timeout is the earliest deadline of any `Port`, and infinite if there is
//!   none.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use adit_engine::{EngineConfig, ResetReason, StreamId, Tick};
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::carrier::Carrier;
use crate::dial::{DialError, DialRequest};
use crate::polling::Polling;
use crate::port::watch::{Token, Watch};
use crate::port::{Budget, Notice, Port, Turn};
use crate::sink::{LocalEnd, Sink};
use crate::stream::{Accepting, Incoming, ListenError};

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
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
];

/// Number of spins after a round that found something: about a microsecond.
const BACK_OFF: u32 = 20;
/// Number of cheap checks (`glance`) per polling round, if all carriers support them.
const GLANCES: u32 = 256;
/// The kernel is polled once per this many rounds, if cheap checks find the work.
const LOOKS: u32 = 8;
/// Payload bytes per polling round in each direction: a quarter of the largest window.
const LOOK_BYTES: u64 = 128 << 10;
/// Number of events that are taken from the kernel at a time.
const EVENTS: usize = 64;

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

/// A command of another thread to a shard.
pub(crate) enum Command {
    Dial(u16, DialRequest, LocalEnd),
    Listen(u16, u32, Arc<Accepting>),
    Accept(u16, StreamId, LocalEnd),
    Refuse(u16, StreamId),
    Changed(u16, StreamId),
    Reset(u16, StreamId, ResetReason),
    Attach(u16, StreamId, Sink),
    Stop,
}

/// The command queue of a shard, for other threads.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// `None` after the shard has ended.
    commands: Mutex<Option<Vec<Command>>>,
    event: EventFd,
    start: Instant,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

impl Inbox {
    /// Returns false if the shard has ended. The command is dropped then.
    pub(crate) fn send(&self, command: Command) -> bool {
        let mut commands = self.lock();
        let Some(queue) = commands.as_mut() else {
            return false;
        };
        queue.push(command);
        let first = queue.len() == 1;
        drop(commands);
        if first {
            // The write fails only when the counter is full, and then the eventfd is readable anyway.
            let _ = self.event.write(1);
        }
        true
    }

    fn take(&self) -> Vec<Command> {
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Command>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shard's clock.
    pub(crate) fn tick(&self, at: Instant) -> Tick {
        let ns = at.saturating_duration_since(self.start).as_nanos();
        Tick(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

/// Sends commands to one `Port` of a shard, from any thread.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) port: u16,
}

/// Several `Port`s on one epoll set.
pub struct Shard<C: Carrier> {
    watch: Watch,
    inbox: Arc<Inbox>,
    ports: Vec<Port<C>>,
    /// `Port`s to poll: they had an event or a command, or have more to do.
    dirty: Vec<bool>,
    deadlines: Vec<Option<Tick>>,
    listeners: BTreeMap<(u16, u32), Arc<Accepting>>,
    news: VecDeque<News>,
    budget: Budget,
    polling: Polling,
    stopped: bool,
    wakeups: u64,
}

impl<C: Carrier> Shard<C> {
    /// Makes a shard without `Port`s.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new() -> io::Result<Self> {
        let watch = Watch::new()?;
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        watch.add_level(event.as_fd(), Token::Commands)?;
        Ok(Self {
            watch,
            inbox: Arc::new(Inbox {
                commands: Mutex::new(Some(Vec::new())),
                event,
                start: Instant::now(),
            }),
            ports: Vec::new(),
            dirty: Vec::new(),
            deadlines: Vec::new(),
            listeners: BTreeMap::new(),
            news: VecDeque::new(),
            budget: Budget::default(),
            polling: Polling::default(),
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
    /// default, it sleeps at once; so does a process with one CPU. Leave it off if the guests' vCPUs share the shard's
    /// CPUs, because polling would take the time that they need to answer.
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
        if wait != EpollTimeout::ZERO && self.polling.is_on() {
            self.poll_before_sleep(timeout)?;
            if !self.news.is_empty() || self.stopped {
                return Ok(());
            }
            wait = self.timeout(timeout);
        }
        let began = (wait != EpollTimeout::ZERO && self.polling.is_on()).then(Instant::now);
        self.events(wait)?;
        self.wakeups += 1;
        if let Some(began) = began {
            self.polling.slept(began.elapsed());
        }
        self.poll_ports();
        Ok(())
    }

    /// Handles the events that the kernel has. Returns true if there were any.
    fn events(&mut self, wait: EpollTimeout) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let n = match self.watch.epoll().wait(&mut events, wait) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let now = self.now();
        for event in &events[..n] {
            let (port, token) = Token::unpack(event.data());
            self.ready(now, port, token, event.events());
        }
        Ok(n > 0)
    }

    /// Polls the `Port`s and the kernel until nothing has arrived for a while, or there is news. Meanwhile the `Port`s
    /// do not ask for notifications, so guests need not kick. Afterwards they ask again.
    fn poll_before_sleep(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let begin = Instant::now();
        let until = begin + self.polling.run(timeout);
        let (mut last, mut came) = (begin, false);
        // A small budget: the peer's sender gets credit before it runs out of window.
        let small_budget = Budget {
            bytes: self.budget.bytes.min(LOOK_BYTES),
            ..self.budget
        };
        // The last cheap check found something, so the next round handles it first.
        let (mut instant, mut looks, mut found_by_glance) = (begin, 0, false);
        loop {
            let mut moved = false;
            if looks == 0 || !found_by_glance {
                moved = self.events(EpollTimeout::ZERO)?;
                looks = LOOKS;
            }
            looks -= 1;
            // Use the time of the last clock read. The clock is read below, after the packets were handled.
            let now = self.inbox.tick(instant);
            let mut all_glance = true;
            for (i, port) in self.ports.iter_mut().enumerate() {
                moved |= port.poll_unarmed(now, small_budget);
                all_glance &= port.glance().is_some();
                self.dirty[i] = true;
            }
            instant = Instant::now();
            let has_notice = self.ports.iter().any(Port::has_notice);
            if moved {
                (last, came) = (instant, true);
                // A pause while a stream flows. Without it each round would find only single packets.
                let pauses = if all_glance { 0 } else { BACK_OFF };
                (0..pauses).for_each(|_| std::hint::spin_loop());
            }
            let over = instant >= until || instant - last >= self.polling.window();
            if has_notice || over || self.stopped || !self.news.is_empty() {
                break;
            }
            let ports = &mut self.ports;
            let mut glance = || ports.iter_mut().any(|p| p.glance() != Some(false));
            found_by_glance = all_glance && (0..GLANCES).any(|_| glance());
        }
        self.polling.polled(came);
        self.poll_ports();
        Ok(())
    }

    fn ready(&mut self, now: Tick, port: u16, token: Token, flags: EpollFlags) {
        match token {
            Token::Commands => {
                let _ = self.inbox.event.read();
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

    /// The epoll timeout. It is rounded up, so that the deadline has passed when it ends.
    fn timeout(&self, limit: Option<Duration>) -> EpollTimeout {
        match [self.wait_limit(), limit].into_iter().flatten().min() {
            None => EpollTimeout::NONE,
            Some(wait) => {
                let ms = wait.as_nanos().div_ceil(1_000_000);
                EpollTimeout::try_from(i32::try_from(ms).unwrap_or(i32::MAX))
                    .unwrap_or(EpollTimeout::MAX)
            }
        }
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
                let listener = match &notice {
                    Notice::Incoming { local_port, .. } => {
                        self.listeners.get(&(index, *local_port))
                    }
                    _ => None,
                };
                let (
                    Some(accepting),
                    Notice::Incoming {
                        stream,
                        local_port,
                        peer_port,
                    },
                ) = (listener, &notice)
                else {
                    self.news.push_back(News::Notice(PortIndex(index), notice));
                    continue;
                };
                let handle = Handle {
                    inbox: self.inbox.clone(),
                    port: index,
                };
                let incoming = Incoming::new(handle, *stream, *local_port, *peer_port);
                if !accepting.offer(incoming) {
                    port.refuse(now, *stream);
                    self.dirty[i] = true;
                }
            }
        }
    }

    fn command(&mut self, now: Tick, command: Command) {
        match command {
            Command::Dial(p, request, end) => {
                let mut state = end.0.lock();
                if state.abandoned {
                    return;
                }
                match self
                    .port_mut(PortIndex(p))
                    .dial(now, request, Some(Sink::Local(end.clone())))
                {
                    Ok(stream) => state.stream = Some(stream),
                    Err(e) => {
                        drop(state);
                        end.fail(e);
                    }
                }
            }
            Command::Listen(p, at, accepting) => {
                // A listener that was dropped may be replaced.
                let taken = self.listeners.get(&(p, at)).is_some_and(|l| l.is_open());
                let listened = match taken {
                    true => Err(ListenError::Taken { port: at }),
                    false => (self.port_mut(PortIndex(p)).listen(at)).map_err(Into::into),
                };
                if listened.is_ok() {
                    self.listeners.insert((p, at), accepting.clone());
                }
                accepting.listening(listened);
            }
            Command::Accept(p, stream, end) => {
                self.port_mut(PortIndex(p))
                    .accept(now, stream, Some(Sink::Local(end.clone())));
                if !end.0.lock().open {
                    end.fail(DialError::Reset);
                }
            }
            Command::Refuse(p, stream) => self.port_mut(PortIndex(p)).refuse(now, stream),
            Command::Changed(p, stream) => self.port_mut(PortIndex(p)).local_changed(now, stream),
            Command::Reset(p, stream, why) => self.port_mut(PortIndex(p)).reset(now, stream, why),
            Command::Attach(p, stream, sink) => {
                let port = self.port_mut(PortIndex(p));
                // Only an agent splices, so the other end is a port process, which ends in order.
                port.expect_order(stream);
                port.attach(now, stream, sink, &[]);
            }
            Command::Stop => self.stopped = true,
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

impl<C: Carrier> Drop for Shard<C> {
    fn drop(&mut self) {
        let commands = self.inbox.lock().take();
        for command in commands.into_iter().flatten() {
            if let Command::Listen(_, _, accepting) = &command {
                accepting.close();
            }
            if let Command::Dial(_, _, end) | Command::Accept(_, _, end) = command {
                end.fail(DialError::Cancelled);
            }
        }
        for accepting in self.listeners.values() {
            accepting.close();
        }
    }
}

/// A shard on its own thread. Dropping it stops the shard.
#[derive(Debug)]
pub struct ShardThread {
    inbox: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
}

impl<C: Carrier + Send + 'static> Shard<C> {
    /// Runs the shard on a thread. News for an owner are dropped, and guest requests without a listener are refused.
    /// Use handles to talk to the shard.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub fn spawn(mut self, name: &str) -> io::Result<ShardThread> {
        let inbox = self.inbox.clone();
        let run = move || {
            while !self.stopped {
                if let Err(e) = self.turn(None) {
                    tracing::error!(error = %e, "shard ends");
                    return;
                }
                while let Some(news) = self.poll_news() {
                    if let News::Notice(port, Notice::Incoming { stream, .. }) = news {
                        let now = self.now();
                        self.port_mut(port).refuse(now, stream);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(run)?;
        Ok(ShardThread {
            inbox,
            thread: Some(thread),
        })
    }
}

impl Drop for ShardThread {
    fn drop(&mut self) {
        self.inbox.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // If it panicked there is nothing left to clean up.
            let _ = thread.join();
        }
    }
}
