//! The loop of a port process: one shard with one port, and `aditd` on the other end of the control socket.
//!
//! ```text
//! Connect ─► asked ─ Dialed ─► a tunnel: independent of aditd
//!              └── DialFailed, or Cancel, or aditd gone ─► reset
//! ```
//! Rules:
//! - `aditd` may disconnect and connect again. Tunnels continue; dials that were not answered are given up, so that a client
//!   is never answered twice; what the guest dials meanwhile is refused, and the guest tries again.
//! - A newer connection replaces the older one. A frame that breaks the protocol ends the connection, not the VM.
//! - What a successor needs goes to `aditd` as soon as it changes, and to every new `aditd` after its first status.
//! - Frames that the socket does not accept wait in an outbox of at most [`OUTBOX_MAX`]. One more ends the connection.
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use adit_channel::carrier::Carrier;
use adit_channel::dial::DialError;
use adit_channel::either::Either;
use adit_channel::hello::HostKey;
use adit_channel::live::LiveFile;
use adit_channel::port::Notice;
use adit_channel::ring::Dock;
use adit_channel::shard::{News, PortIndex, Shard};
use adit_channel::sink::Sink;
use adit_engine::{EngineConfig, StreamId, Tick};
use adit_names::VmId;
use adit_print::with_causes;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, accept4, socketpair};

use crate::auto::Ways;
use crate::control::{DIALS_MAX, Incoming, RING_PEER_PORT, Status, Way};
use crate::control_io::{ControlError, Message, receive, send_all};
use crate::door::Offers;
use crate::keep::Keeping;
use crate::rings::{RingInbox, RingInfo, RingNews};
use bell::Bell;
use dials::{Dials, Terms};
use pace::Pace;

/// Most frames that wait for `aditd`.
pub const OUTBOX_MAX: usize = 4 * DIALS_MAX;
/// Most frames that are read from `aditd` in one turn.
const FRAMES_A_TURN: usize = 64;
/// How often `aditd` is told how many streams there are, if nothing else changes.
const STREAMS_EVERY: Duration = Duration::from_millis(100);
/// How often it is told how tunnels have ended, unless many have.
const ENDS_EVERY: Duration = Duration::from_millis(20);

mod bell;
mod dial_table;
mod dials;
mod ends;
mod pace;
mod rates;
mod ring;
mod say;
mod tunnels;

const KEY_LISTENER: u32 = 1;
const KEY_CONTROL: u32 = 2;
const KEY_STOP: u32 = 3;
const KEY_KEEP: u32 = 4;
const KEY_RINGS: u32 = 5;
const KEY_BELL: u32 = 6;

/// Parameters of a port process.
#[derive(Debug)]
pub struct Options {
    /// The VM's name.
    pub vm: VmId,
    /// The VM's CID.
    pub cid: u64,
    /// Host ports that the guest may dial.
    pub serve_ports: Vec<u32>,
    /// How long to poll before sleeping (`Shard::busy_poll`). Zero: only while packets follow each other quickly.
    pub busy_poll: Duration,
    /// Must be unpredictable for the guest.
    pub seed: u64,
    /// Drawn once per process.
    pub boot_nonce: [u8; 16],
    /// This process runs the VM itself.
    pub vmm: bool,
}

/// A port process.
pub struct Process<C: Carrier> {
    options: Options,
    /// One port for the VM's vsock, and one for its ring if it can have one.
    shard: Shard<Either<C, Dock>>,
    port: PortIndex,
    rings: Option<Rings>,
    tunnels: tunnels::Table<At>,
    ends: ends::Ends<At>,
    rates: rates::Rates,
    /// Of the hellos, where others can dial the guest too.
    key: Option<HostKey>,
    /// Hellos with its MAC, or that of an earlier one: each has another number.
    keyed: u64,
    /// Where streams go that `aditd` has accepted of the guest; none: the guest's come by another way.
    offers: Option<Offers>,
    /// Which way to the guest was chosen, where that is this process' matter.
    ways: Option<Ways>,
    /// Its number.
    way: u8,
    said_way: Option<Way>,
    listener: OwnedFd,
    /// A reserve descriptor. It is closed to accept `aditd`'s next connection when tunnels use all others.
    spare: Option<OwnedFd>,
    stop: OwnedFd,
    aditd: Option<Aditd>,
    said: Option<Status>,
    said_ring: Option<crate::control::Ring>,
    status_pace: Pace,
    ring_pace: Pace,
    ends_pace: Pace,
    /// Of both ports, when they were looked at last.
    faults: u64,
    /// What a successor needs. `said_seq` and `said_stuck` are what this `aditd` was last sent of it.
    keeping: Keeping,
    said_seq: u64,
    said_stuck: Option<String>,
    last_epoch: u64,
    done: bool,
}

/// The connection to `aditd`, and what ends with it.
struct Aditd {
    sock: OwnedFd,
    outbox: VecDeque<(Message, Vec<OwnedFd>)>,
    blocked: bool,
    dials: Dials,
}

/// A stream of one of the ports.
type At = (PortIndex, StreamId);

/// The VM's ring.
struct Rings {
    port: PortIndex,
    inbox: RingInbox,
    bell: Bell,
    /// The current ring.
    docked: Option<(u64, RingInfo)>,
    /// Why there is no ring, for people.
    why: String,
    /// Streams that ended in this turn because the carrier failed.
    faulted: u32,
}

impl<C: Carrier> Process<C> {
    /// Makes the process around a carrier. `control` is the bound control socket. The process ends when `stop` is readable.
    ///
    /// # Errors
    /// A descriptor cannot be watched, or there are too many ports to serve.
    pub fn new(
        options: Options,
        carrier: C,
        live: Arc<LiveFile>,
        keeping: Keeping,
        control: OwnedFd,
        stop: OwnedFd,
    ) -> io::Result<Self> {
        let mut shard = Shard::new()?;
        shard.busy_poll(options.busy_poll);
        let carrier = Either::Left(carrier);
        let port = shard.add(carrier, EngineConfig::default(), options.seed)?;
        let last_epoch = live.epoch();
        shard.port_mut(port).keep_live(live);
        for &at in &options.serve_ports {
            shard.port_mut(port).listen(at).map_err(io::Error::other)?;
        }
        shard.watch(control.as_fd(), KEY_LISTENER)?;
        shard.watch(stop.as_fd(), KEY_STOP)?;
        shard.watch(keeping.news(), KEY_KEEP)?;
        Ok(Self {
            options,
            shard,
            port,
            rings: None,
            tunnels: tunnels::Table::default(),
            ends: ends::Ends::default(),
            rates: rates::Rates::default(),
            key: None,
            keyed: 0,
            offers: None,
            ways: None,
            way: 0,
            said_way: None,
            listener: control,
            spare: Some(stop.try_clone()?),
            stop,
            aditd: None,
            said: None,
            said_ring: None,
            status_pace: Pace::new(STREAMS_EVERY),
            ring_pace: Pace::new(STREAMS_EVERY),
            ends_pace: Pace::new(ENDS_EVERY),
            faults: 0,
            keeping,
            said_seq: 0,
            said_stuck: None,
            last_epoch,
            done: false,
        })
    }

    /// Takes streams that `aditd` has accepted of the guest.
    #[must_use]
    pub fn with_offers(mut self, offers: Offers) -> Self {
        self.offers = Some(offers);
        self
    }

    /// Tells `aditd` which way to the guest was chosen.
    #[must_use]
    pub fn with_ways(mut self, ways: Ways) -> Self {
        self.ways = Some(ways);
        self
    }

    /// Runs until it is told to quit.
    ///
    /// # Errors
    /// Waiting fails.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.done {
            self.turn(None)?;
        }
        Ok(())
    }

    /// Waits once, and handles what happened.
    ///
    /// # Errors
    /// Waiting fails.
    pub fn turn(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.shard.turn(self.until_due(timeout))?;
        // Turns that only move bytes have nothing to tell aditd.
        let mut tells = self.is_due() | self.new_faults();
        while let Some(news) = self.shard.poll_news() {
            tells = true;
            match news {
                News::Ready { key: KEY_LISTENER } => self.accept(),
                News::Ready { key: KEY_CONTROL } => self.control_ready(),
                News::Ready { key: KEY_RINGS } => self.rings_changed(),
                News::Ready { key: KEY_BELL } => self.bell_ready(),
                News::Ready { key: KEY_KEEP } => {
                    self.keeping.clear_news();
                    self.done |= self.keeping.released();
                }
                News::Ready { .. } => {
                    tracing::info!("told to stop");
                    self.shard.unwatch(self.stop.as_fd());
                    self.keeping.release();
                }
                News::Notice(port, notice) => self.notice(port, notice),
            }
        }
        if !tells {
            return Ok(());
        }
        self.log_faulted();
        self.say_status();
        self.say_way();
        self.say_ring();
        self.say_kept();
        self.say_ends();
        Ok(())
    }

    /// At most so long, and not beyond what is due.
    fn until_due(&self, timeout: Option<Duration>) -> Option<Duration> {
        let now = self.shard.now();
        let until = |due: Tick| Duration::from_nanos(due.0.saturating_sub(now.0));
        self.due().map(until).into_iter().chain(timeout).min()
    }

    fn is_due(&self) -> bool {
        self.due().is_some_and(|due| due <= self.shard.now())
    }

    fn due(&self) -> Option<Tick> {
        // What waits to be sent comes first, and its socket tells when.
        self.aditd.as_ref().filter(|a| a.outbox.is_empty())?;
        let paces = [&self.status_pace, &self.ring_pace, &self.ends_pace];
        paces.into_iter().filter_map(Pace::due).min()
    }

    /// Whether a port has had a fault since the last turn.
    fn new_faults(&mut self) -> bool {
        let of_ring = self.rings.as_ref().map(|rings| rings.port);
        let ports = [Some(self.port), of_ring].into_iter().flatten();
        let faults = ports.map(|port| self.shard.port(port).counters().faults);
        let faults = faults.sum();
        std::mem::replace(&mut self.faults, faults) != faults
    }

    // ---- the connection

    fn accept(&mut self) {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let sock = match accept4(self.listener.as_raw_fd(), flags) {
            Ok(fd) => own(fd),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => return,
            // Free a descriptor: otherwise the connection would stay in the backlog, and epoll would report it without end.
            Err(Errno::EMFILE | Errno::ENFILE) if self.spare.take().is_some() => {
                return self.accept();
            }
            Err(e) => {
                tracing::warn!(error = %e, "cannot accept a control connection");
                // Close the current connection: the next one can then use its descriptor.
                return self.disconnect("a newer connection needs its descriptor");
            }
        };
        // Handle the frames that the previous connection sent before it ended.
        self.control_ready();
        self.disconnect("replaced by a newer connection");
        if let Err(e) = self.shard.watch(sock.as_fd(), KEY_CONTROL) {
            tracing::warn!(error = %e, "cannot watch a control connection");
            return;
        }
        tracing::info!("aditd connected");
        self.said = None;
        self.said_ring = None;
        self.said_way = None;
        for pace in [
            &mut self.status_pace,
            &mut self.ring_pace,
            &mut self.ends_pace,
        ] {
            pace.settled();
        }
        self.said_seq = 0;
        self.said_stuck = None;
        self.ends.renew();
        self.keeping.set_connected(true);
        self.aditd = Some(Aditd {
            sock,
            outbox: VecDeque::new(),
            blocked: false,
            dials: Dials::new(DIALS_MAX),
        });
    }

    fn disconnect(&mut self, why: &str) {
        let Some(aditd) = self.aditd.take() else {
            // The reserve was used, but no connection came.
            self.spare = self.spare.take().or_else(|| self.stop.try_clone().ok());
            return;
        };
        self.keeping.set_connected(false);
        tracing::info!(why, unanswered = aditd.dials.len(), "aditd disconnected");
        self.shard.unwatch(aditd.sock.as_fd());
        // Before aditd can see the end of the connection: then it answers their clients.
        self.abandon(aditd.dials);
        // Makes a new reserve from its descriptor.
        drop(aditd.sock);
        self.spare = self.spare.take().or_else(|| self.stop.try_clone().ok());
    }

    fn control_ready(&mut self) {
        self.flush();
        for _ in 0..FRAMES_A_TURN {
            let Some(aditd) = &self.aditd else {
                return;
            };
            match receive(&aditd.sock) {
                Ok(Some((message, fd))) => {
                    if let Err(why) = self.message(message, fd) {
                        return self.disconnect(why);
                    }
                }
                Ok(None) => return self.disconnect("it closed the connection"),
                // Only this tunnel fails; the connection continues.
                Err(ControlError::NoDescriptors { message }) => {
                    tracing::warn!("no descriptor left for a tunnel");
                    match *message {
                        Message::Attach(attach) => self.cancel(attach.id),
                        Message::Connect(connect) => self.say_failed(connect.id, &DialError::Busy),
                        Message::ConnectAs(as_whom) => {
                            self.say_failed(as_whom.connect.id, &DialError::Busy);
                        }
                        Message::ConnectNoted(noted) => {
                            self.say_failed(noted.connect.id, &DialError::Busy);
                        }
                        Message::ConnectLimited(limited) => {
                            self.say_failed(limited.connect.id, &DialError::Busy);
                        }
                        _ => {}
                    }
                }
                Err(e) if e.would_block() => return,
                // The peer closed without reading our frames. The kernel reports that once, before the frames that the peer sent.
                Err(ControlError::Io(e)) if e.kind() == io::ErrorKind::ConnectionReset => {}
                Err(e) => return self.disconnect(&with_causes(&e)),
            }
        }
    }

    fn say(&mut self, message: Message, fds: Vec<OwnedFd>) {
        let Some(aditd) = &mut self.aditd else {
            return;
        };
        if aditd.outbox.len() >= OUTBOX_MAX {
            return self.disconnect("it does not read");
        }
        aditd.outbox.push_back((message, fds));
        if !aditd.blocked {
            self.flush();
        }
    }

    fn flush(&mut self) {
        while let Some(aditd) = &mut self.aditd
            && let Some((message, fds)) = aditd.outbox.front()
        {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match send_all(&aditd.sock, message, &fds) {
                Ok(()) => {
                    if let Some((Message::Dialed(dialed), _)) = aditd.outbox.pop_front() {
                        self.dialed_is_said(dialed.id);
                    }
                }
                Err(e) if e.would_block() => break,
                Err(ControlError::Io(e)) => {
                    // The peer is gone. Frames that it sent before can still be read; the end of the connection comes after them.
                    tracing::debug!(error = %e, "cannot send to aditd any more");
                    aditd.outbox.clear();
                }
                Err(e) => {
                    // Our own fault, so sending again would not help.
                    tracing::error!(error = %with_causes(&e), "frame not sent");
                    aditd.outbox.pop_front();
                }
            }
        }
        let Some(aditd) = &mut self.aditd else {
            return;
        };
        let blocked = !aditd.outbox.is_empty();
        if blocked != aditd.blocked {
            aditd.blocked = blocked;
            let watched = self
                .shard
                .watch_writable(aditd.sock.as_fd(), KEY_CONTROL, blocked);
            if let Err(e) = watched {
                self.disconnect(&e.to_string());
            }
        }
    }

    // ---- frames from aditd

    fn message(&mut self, message: Message, fd: Option<OwnedFd>) -> Result<(), &'static str> {
        match message {
            Message::Connect(connect) => self.connect(connect, Terms::default(), fd),
            Message::ConnectAs(connect) => self.connect_as(connect, fd),
            Message::ConnectNoted(connect) => self.connect_noted(connect, fd),
            Message::ConnectLimited(connect) => self.connect_limited(connect, fd),
            Message::SetLimits(limits) => self.set_limits(&limits),
            Message::EndsTaken(taken) => {
                self.ends.taken(taken.seq);
                Ok(())
            }
            Message::Key(key) => {
                self.key = key.key.map(HostKey::new);
                Ok(())
            }
            Message::Accepted(accepted) => {
                let offers = self.offers.as_ref();
                let offers =
                    offers.ok_or("it accepted a stream of a guest that does not come to it")?;
                let ports = &self.options.serve_ports;
                // Without a descriptor left for it the guest sees its end, and tries again.
                if let (Some(fd), true) = (fd, ports.contains(&accepted.port)) {
                    offers.put(accepted.port, accepted.guest_port, fd);
                }
                Ok(())
            }
            Message::BegunAnew(anew) => {
                let offers = self.offers.as_ref();
                let offers =
                    offers.ok_or("it names a stream of a guest that does not come to it")?;
                offers.begun_anew(anew.port, anew.guest_port);
                Ok(())
            }
            Message::ListTunnels(ask) => {
                self.list_tunnels(&ask);
                Ok(())
            }
            Message::EndTunnels(end) => self.end_tunnels(&end),
            Message::Ask(ask) => self.ask_client(ask),
            Message::Dial(dial) => self.dial(dial),
            Message::Attach(attach) => self.attach(attach, fd),
            Message::Cancel(cancel) => {
                self.cancel(cancel.id);
                Ok(())
            }
            Message::Quit(_) => {
                tracing::info!("told to quit");
                self.done = true;
                Ok(())
            }
            Message::Kept(kept) => {
                self.keeping.kept(kept.seq);
                Ok(())
            }
            Message::Release(_) => {
                tracing::info!("told to make room for a successor");
                self.keeping.release();
                Ok(())
            }
            Message::Status(_)
            | Message::Dialed(_)
            | Message::DialFailed(_)
            | Message::Handover(_)
            | Message::Stuck(_)
            | Message::Ring(_)
            | Message::Way(_)
            | Message::Held(_)
            | Message::Features(_)
            | Message::Tunnels(_)
            | Message::Ends(_)
            | Message::Incoming(_) => Err("it sent a frame that only a port process sends"),
        }
    }

    // ---- notices of the ports

    fn notice(&mut self, port: PortIndex, notice: Notice) {
        if self.bell_notice(port, &notice) {
            return;
        }
        match notice {
            Notice::Incoming {
                stream,
                local_port,
                peer_port,
            } => self.incoming((port, stream), local_port, peer_port),
            Notice::Dialed { stream, accept } => self.dialed((port, stream), accept),
            Notice::DialFailed { stream, error } => self.dial_failed((port, stream), &error),
            Notice::Closed {
                stream,
                reason,
                totals,
            } => {
                self.ring_stream_closed(port, reason);
                let now = self.shard.now();
                self.ends
                    .ended((port, stream), now, totals, reason.is_some());
                self.stream_closed((port, stream));
            }
            // The status says it.
            Notice::Obstacle => self.say_way(),
            Notice::Session { epoch } if port != self.port => self.ring_session(epoch),
            Notice::Session { epoch } => {
                tracing::info!(
                    epoch,
                    "session {}",
                    if epoch.is_some() { "on" } else { "off" }
                );
                self.last_epoch = epoch.unwrap_or(self.last_epoch);
                // Ahead of what the guest dials.
                self.say_way();
                if epoch.is_some() {
                    self.keeping.accepted();
                }
            }
        }
    }

    fn incoming(&mut self, (over, stream): At, port: u32, peer_port: u32) {
        let peer_port = match over == self.port {
            true => peer_port,
            false => RING_PEER_PORT,
        };
        let now = self.shard.now();
        let flags = SockFlag::SOCK_CLOEXEC;
        let pair = match self.aditd {
            Some(_) => socketpair(AddressFamily::Unix, SockType::Stream, None, flags),
            None => return self.shard.port_mut(over).refuse(now, stream),
        };
        match pair {
            Ok((ours, theirs)) => {
                let sink = Some(Sink::Fd(ours));
                self.shard.port_mut(over).accept(now, stream, sink);
                self.say(
                    Message::Incoming(Incoming { port, peer_port }),
                    vec![theirs],
                );
            }
            Err(e) => {
                tracing::warn!(error = %e, "guest's dial refused");
                self.shard.port_mut(over).refuse(now, stream);
            }
        }
    }
}

#[allow(unsafe_code)] // nix returns a number
fn own(fd: i32) -> OwnedFd {
    // SAFETY: `accept4` has just returned this descriptor; nothing else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
