//! How two sides start to use a region, as often as they like. Each start of either side is a new epoch, and nothing
//! of the previous epoch counts.
//!
//! Each side has one state word, `request << 8 | state`. The guest counts its requests. The host repeats the number of
//! the request that it answers.
//!
//! ```text
//! host              guest
//! OFFERED  ──────►            created, or created again: any earlier session is over
//!          ◄──────  WANT n    one more than the last number; the first number is random
//! READY n  ──────►            new epoch; the host's words and the first headers of its rings are zero
//!          ◄──────  RUN n     it has read the head once, zeroed its words, and written the accepted features
//! RUN n                       both use the lanes
//!
//! POISONED: this side saw the other side break the protocol. CLOSED: this side is done. Both end the session with that
//! number. The guest may ask again with the next number. Only the host can offer again.
//! ```
//! The caller polls its side whenever the doorbell was signalled, and signals the peer's doorbell when [`Turn::wake`]
//! says so. A poll costs two loads when nothing changed. Ends of lanes ([`Ends`]) that belong to a lost session still
//! read and write the rings of that session: drop them before you attach again.

use crate::layout::HEADER;
use crate::region::{ACCEPTED, Features, GUEST_WORD, HOST_WORD, Region, RegionError, Side, Spec};
use crate::{Consumer, Corrupt, Geometry, GeometryError, Producer, RingMem, Wake};

/// The state that a side shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Fresh memory: no state yet.
    Nothing = 0,
    /// Host: the guest may ask for a session.
    Offered = 1,
    /// Guest: asks for a session.
    Want = 2,
    /// Host: its side of the region is zeroed.
    Ready = 3,
    /// The session is in use.
    Run = 4,
    /// The other side broke the protocol.
    Poisoned = 5,
    /// This side is done.
    Closed = 6,
}

/// A parsed state word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    request: u64,
    state: State,
}

impl Word {
    const fn encode(self) -> u64 {
        self.request << 8 | self.state as u64
    }

    fn parse(word: u64) -> Option<Self> {
        let state = match word & 0xff {
            0 => State::Nothing,
            1 => State::Offered,
            2 => State::Want,
            3 => State::Ready,
            4 => State::Run,
            5 => State::Poisoned,
            6 => State::Closed,
            _ => return None,
        };
        let request = word >> 8;
        Some(Self { request, state })
    }
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The other side started again.
    Restarted,
    /// The other side closed the session.
    Closed,
    /// The other side says that this side broke the protocol.
    Poisoned,
    /// The other side wrote a value that is never allowed.
    Corrupt(Corrupt),
}

/// An event of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Both sides use the lanes from now on.
    Attached {
        /// Number of this attachment.
        epoch: u64,
        /// Features that both sides use.
        features: Features,
    },
    /// The session is over.
    Lost(Lost),
}

/// The result of a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Turn {
    /// The event, if there was one.
    pub event: Option<Event>,
    /// Whether to wake the other side through its doorbell.
    pub wake: Wake,
}

impl Turn {
    const NOTHING: Self = Self {
        event: None,
        wake: Wake::No,
    };

    fn of(event: Option<Event>) -> Self {
        let wake = Wake::Yes;
        Self { event, wake }
    }
}

/// One side's two ends of a lane.
#[derive(Debug)]
pub struct Ends<M> {
    /// Writes records to the other side.
    pub producer: Producer<M>,
    /// Reads records of the other side.
    pub consumer: Consumer<M>,
}

fn corrupt(what: &'static str, value: u64, limit: u64) -> Lost {
    Lost::Corrupt(Corrupt { what, value, limit })
}

/// How one side maps and uses a region.
#[derive(Clone, Copy)]
struct View {
    side: Side,
    /// Its memory maps each ring twice in a row.
    twice: bool,
    /// Both sides map each ring twice, and records use it.
    wraps: bool,
}

impl View {
    fn new(side: Side, own: Features, both: Features) -> Self {
        Self {
            side,
            twice: own.contains(Features::WRAP),
            wraps: both.contains(Features::WRAP),
        }
    }

    /// The two rings of a lane: first the one that this side writes, then the one that it reads.
    fn geometry(self, region: &Region, lane: usize) -> (Geometry, Geometry) {
        let of = |towards| region.geometry(lane, towards, self.twice, self.wraps);
        match self.side {
            Side::Host => (of(Side::Guest), of(Side::Host)),
            Side::Guest => (of(Side::Host), of(Side::Guest)),
        }
    }
}

/// Zeroes what a side owns: its words of every lane, and the first header that it will write.
fn clean<M: RingMem>(mem: &M, region: &Region, view: View) {
    for lane in 0..region.spec().lanes().len() {
        let (produced, consumed) = view.geometry(region, lane);
        mem.store(consumed.cons, 0);
        mem.store(consumed.data_wake_at, 0);
        mem.store(produced.space_wake_at, 0);
        mem.zero(produced.data, HEADER);
    }
}

fn ends<M: RingMem + Clone>(
    mem: &M,
    region: &Region,
    lane: usize,
    view: View,
    events: bool,
) -> Result<Ends<M>, GeometryError> {
    let (produced, consumed) = view.geometry(region, lane);
    Ok(Ends {
        producer: Producer::new(mem.clone(), produced, events)?,
        consumer: Consumer::new(mem.clone(), consumed, events)?,
    })
}

/// The side that makes the region.
#[derive(Debug)]
pub struct Host<M> {
    mem: M,
    region: Region,
    at: Word,
    features: Features,
}

impl<M: RingMem + Clone> Host<M> {
    /// Creates a region in the memory and offers it. `epoch` must be higher than every epoch that this memory had
    /// before; the time is good enough. Use memory that maps each ring twice in a row only together with
    /// [`Features::WRAP`].
    ///
    /// # Errors
    /// The memory is too small, or the specification is out of range.
    pub fn offer(mem: M, spec: Spec, epoch: u64) -> Result<Self, RegionError> {
        let region = Region::new(spec, epoch)?;
        let at = Word {
            request: 0,
            state: State::Offered,
        };
        // A guest that still uses the memory sees that its session is over before anything else changes.
        mem.store(HOST_WORD, at.encode());
        mem.fence();
        region.write(&mem)?;
        Ok(Self {
            mem,
            region,
            at,
            features: Features::NONE,
        })
    }

    /// The region.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The state that this side shows.
    pub fn state(&self) -> State {
        self.at.state
    }

    /// Reads the guest's state word and acts on it.
    pub fn poll(&mut self) -> Turn {
        let word = self.mem.load(GUEST_WORD);
        let Some(guest) = Word::parse(word) else {
            return self.refuse(corrupt("guest's state", word & 0xff, State::Closed as u64));
        };
        let same = guest.request == self.at.request;
        match (self.at.state, guest.state) {
            (State::Run, State::Run) | (State::Ready, State::Want) if same => Turn::NOTHING,
            (State::Ready, State::Run) if same => self.run(),
            // The guest must learn that its session is lost before its lanes are zeroed.
            (State::Run, State::Want) if !same => self.lose(Lost::Restarted),
            (_, State::Want) if !same => {
                self.prepare(guest.request);
                Turn::of(None)
            }
            (State::Run, State::Closed) if same => self.lose(Lost::Closed),
            (State::Run, State::Poisoned) if same => self.lose(Lost::Poisoned),
            (State::Run, _) => self.refuse(corrupt("guest's request", word, self.at.encode())),
            _ => Turn::NOTHING,
        }
    }

    fn prepare(&mut self, request: u64) {
        self.region.next_epoch();
        // Set the words and headers to what the guest expects. The Release store of the state word publishes them.
        let own = self.region.spec().features;
        clean(&self.mem, &self.region, View::new(Side::Host, own, own));
        let written = self.region.write(&self.mem);
        debug_assert!(written.is_ok(), "the region fitted when it was offered");
        self.set_state(request, State::Ready);
    }

    fn run(&mut self) -> Turn {
        let accepted = Features(self.mem.load(ACCEPTED));
        let offered = self.region.spec().features;
        if !offered.contains(accepted) {
            return self.refuse(corrupt("features accepted", accepted.0, offered.0));
        }
        self.features = accepted;
        self.set_state(self.at.request, State::Run);
        let epoch = self.region.epoch();
        Turn::of(Some(Event::Attached {
            epoch,
            features: accepted,
        }))
    }

    fn set_state(&mut self, request: u64, state: State) {
        self.at = Word { request, state };
        self.mem.store(HOST_WORD, self.at.encode());
    }

    fn lose(&mut self, lost: Lost) -> Turn {
        self.set_state(self.at.request, State::Closed);
        Turn::of(Some(Event::Lost(lost)))
    }

    fn refuse(&mut self, lost: Lost) -> Turn {
        if self.at.state == State::Poisoned {
            // The invalid word may have overwritten a request that this side never saw. Wake the guest, so that it
            // checks its word.
            return Turn::of(None);
        }
        self.set_state(self.at.request, State::Poisoned);
        Turn::of(Some(Event::Lost(lost)))
    }

    /// Ends the session because the guest broke one of its rings.
    pub fn poison(&mut self) -> Wake {
        self.set_state(self.at.request, State::Poisoned);
        Wake::Yes
    }

    /// Ends the session.
    pub fn close(&mut self) -> Wake {
        self.set_state(self.at.request, State::Closed);
        Wake::Yes
    }

    /// Makes this side's ends of a lane, with positions at zero. Call it once per session and lane. `events` is true
    /// if both sides sleep and use doorbells.
    ///
    /// # Errors
    /// The memory does not map what the region needs.
    ///
    /// # Panics
    /// There is no such lane.
    pub fn ends(&self, lane: usize, events: bool) -> Result<Ends<M>, GeometryError> {
        let own = self.region.spec().features;
        let view = View::new(Side::Host, own, self.features);
        ends(&self.mem, &self.region, lane, view, events)
    }
}

/// The side that finds the region.
#[derive(Debug)]
pub struct Guest<M> {
    mem: M,
    /// Features that this side supports.
    can: Features,
    at: Word,
    region: Option<Region>,
    features: Features,
}

impl<M: RingMem + Clone> Guest<M> {
    /// Looks for a region in the memory. `start` is the first request number. It must be random, so that requests of
    /// an earlier guest in the same memory are not mistaken for this one's. `can` are the features that this side
    /// supports.
    ///
    /// # Errors
    /// There is no region, or none that this side knows.
    pub fn find(mem: M, start: u64, can: Features) -> Result<Self, RegionError> {
        Region::read(&mem)?;
        let at = Word {
            request: start >> 8 | 1,
            state: State::Closed,
        };
        Ok(Self {
            mem,
            can,
            at,
            region: None,
            features: Features::NONE,
        })
    }

    /// The state that this side shows.
    pub fn state(&self) -> State {
        self.at.state
    }

    /// The region of the current session.
    pub fn region(&self) -> Option<&Region> {
        self.region.as_ref()
    }

    /// Asks for a new session. The old session ends.
    pub fn attach(&mut self) -> Wake {
        let next = (self.at.request + 1) & (u64::MAX >> 8);
        self.region = None;
        self.set_state(next.max(1), State::Want);
        Wake::Yes
    }

    /// Reads the host's state word and acts on it.
    ///
    /// # Errors
    /// The host is ready with a region that this side cannot use. The host was told so by POISONED.
    pub fn poll(&mut self) -> Result<Turn, RegionError> {
        let word = self.mem.load(HOST_WORD);
        let Some(host) = Word::parse(word) else {
            // Until the host has answered, the word may be left over from earlier, perhaps from this guest. The answer
            // will overwrite it.
            return Ok(match self.at.state {
                State::Run => {
                    self.refuse(corrupt("host's state", word & 0xff, State::Closed as u64))
                }
                _ => Turn::NOTHING,
            });
        };
        let same = host.request == self.at.request;
        Ok(match (self.at.state, host.state) {
            (State::Want, State::Ready) if same => self.run()?,
            (State::Run, State::Ready | State::Run) if same => Turn::NOTHING,
            (State::Run, State::Offered) => self.lose(Lost::Restarted),
            (State::Run, State::Closed) if same => self.lose(Lost::Closed),
            (State::Run | State::Want, State::Poisoned) if same => self.lose(Lost::Poisoned),
            (State::Run, _) => self.refuse(corrupt("host's answer", word, self.at.encode())),
            // Something in this guest overwrote the request before the host saw it. Without a repetition the host
            // would never see it.
            (State::Want, _) if self.mem.load(GUEST_WORD) != self.at.encode() => {
                self.set_state(self.at.request, State::Want);
                Turn::of(None)
            }
            _ => Turn::NOTHING,
        })
    }

    fn run(&mut self) -> Result<Turn, RegionError> {
        let region = Region::read(&self.mem).inspect_err(|_| {
            self.set_state(self.at.request, State::Poisoned);
        })?;
        let features = region.spec().features.both(self.can);
        let view = View::new(Side::Guest, self.can, features);
        clean(&self.mem, &region, view);
        self.mem.store_relaxed(ACCEPTED, features.0);
        (self.region, self.features) = (Some(region), features);
        self.set_state(self.at.request, State::Run);
        let epoch = region.epoch();
        Ok(Turn::of(Some(Event::Attached { epoch, features })))
    }

    fn set_state(&mut self, request: u64, state: State) {
        self.at = Word { request, state };
        self.mem.store(GUEST_WORD, self.at.encode());
    }

    fn lose(&mut self, lost: Lost) -> Turn {
        self.set_state(self.at.request, State::Closed);
        self.region = None;
        Turn::of(Some(Event::Lost(lost)))
    }

    fn refuse(&mut self, lost: Lost) -> Turn {
        if self.at.state == State::Poisoned {
            return Turn::NOTHING;
        }
        self.set_state(self.at.request, State::Poisoned);
        self.region = None;
        Turn::of(Some(Event::Lost(lost)))
    }

    /// Ends the session because the host broke one of its rings.
    pub fn poison(&mut self) -> Wake {
        self.region = None;
        self.set_state(self.at.request, State::Poisoned);
        Wake::Yes
    }

    /// Ends the session.
    pub fn close(&mut self) -> Wake {
        self.region = None;
        self.set_state(self.at.request, State::Closed);
        Wake::Yes
    }

    /// Makes this side's ends of a lane, as [`Host::ends`]; `None` if it is not attached.
    ///
    /// # Errors
    /// The memory does not map what the region needs.
    ///
    /// # Panics
    /// There is no such lane.
    pub fn ends(&self, lane: usize, events: bool) -> Result<Option<Ends<M>>, GeometryError> {
        let view = View::new(Side::Guest, self.can, self.features);
        let made = self.region.as_ref();
        made.map(|region| ends(&self.mem, region, lane, view, events))
            .transpose()
    }
}
