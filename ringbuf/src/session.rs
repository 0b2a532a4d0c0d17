//! How two sides come to use a region, again and again: every start of either of them is a new epoch, and nothing of the
//! last one counts.
//!
//! Each side has one state word, `request << 8 | state`; the guest counts requests, the host repeats the number that it
//! answers.
//!
//! ```text
//! host              guest
//! OFFERED  ──────►            made, or made anew: whatever was before is over
//!          ◄──────  WANT n    one more than ever before, from a random start
//! READY n  ──────►            new epoch; its own words and its rings' first headers are zero
//!          ◄──────  RUN n     it read the head once; its own likewise; the features that it takes
//! RUN n                       both use the lanes
//!
//! POISONED: that side found the other's lie. CLOSED: that side is done. Both end the session of that number; the guest
//! may ask again with the next one, and only the host offers anew.
//! ```
//! A caller polls its side whenever the doorbell rang, and rings when it is told to ([`Turn::wake`]). A turn costs two loads
//! when nothing changed. Ends of lanes ([`Ends`]) that were made before a session was lost read and write a session that
//! is over: drop them first.

use crate::layout::HEADER;
use crate::region::{ACCEPTED, Features, GUEST_WORD, HOST_WORD, Region, RegionError, Side, Spec};
use crate::{Consumer, Corrupt, Geometry, GeometryError, Producer, RingMem, Wake};

/// What a side says it is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Nothing yet: fresh memory.
    Nothing = 0,
    /// Host: come.
    Offered = 1,
    /// Guest: let me in.
    Want = 2,
    /// Host: my side is clean.
    Ready = 3,
    /// In use.
    Run = 4,
    /// The other side lied.
    Poisoned = 5,
    /// Done.
    Closed = 6,
}

/// A state word, taken apart.
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
    /// The other side begins anew.
    Restarted,
    /// The other side is done.
    Closed,
    /// The other side says that we lied.
    Poisoned,
    /// The other side wrote what nobody may.
    Corrupt(Corrupt),
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Both use the lanes from now on.
    Attached {
        /// Which time this is.
        epoch: u64,
        /// What both can do.
        features: Features,
    },
    /// The session is over.
    Lost(Lost),
}

/// What a poll brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Turn {
    /// What happened, if anything did.
    pub event: Option<Event>,
    /// Whether the other side is to look: ring its doorbell.
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

/// One side's ends of a lane.
#[derive(Debug)]
pub struct Ends<M> {
    /// Writes records to the other side.
    pub producer: Producer<M>,
    /// Reads its records.
    pub consumer: Consumer<M>,
}

fn corrupt(what: &'static str, value: u64, limit: u64) -> Lost {
    Lost::Corrupt(Corrupt { what, value, limit })
}

/// How a side looks at a region.
#[derive(Clone, Copy)]
struct View {
    side: Side,
    /// Its memory maps each ring twice in a row.
    twice: bool,
    /// Both sides' does, and records make use of it.
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

    /// The rings of a lane: the one that it writes, the one that it reads.
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
    /// Makes the memory a region and offers it. `epoch`: above every one that this memory had; the time will do. Memory
    /// that maps each ring twice in a row is one for [`Features::WRAP`], and for nothing else.
    ///
    /// # Errors
    /// The memory is too small, or the specification is out of range.
    pub fn offer(mem: M, spec: Spec, epoch: u64) -> Result<Self, RegionError> {
        let region = Region::new(spec, epoch)?;
        let at = Word {
            request: 0,
            state: State::Offered,
        };
        // Whoever still uses it sees that it is over before anything else changes.
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

    /// What this side says it is at.
    pub fn state(&self) -> State {
        self.at.state
    }

    /// Looks at the guest's word.
    pub fn poll(&mut self) -> Turn {
        let word = self.mem.load(GUEST_WORD);
        let Some(guest) = Word::parse(word) else {
            return self.refuse(corrupt("guest's state", word & 0xff, State::Closed as u64));
        };
        let same = guest.request == self.at.request;
        match (self.at.state, guest.state) {
            (State::Run, State::Run) | (State::Ready, State::Want) if same => Turn::NOTHING,
            (State::Ready, State::Run) if same => self.run(),
            // Whose session this is must know before it is cleaned away.
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
        // Words and headers as the guest will find them; the word that says so is the Release store behind all.
        let own = self.region.spec().features;
        clean(&self.mem, &self.region, View::new(Side::Host, own, own));
        let written = self.region.write(&self.mem);
        debug_assert!(written.is_ok(), "it fitted when it was offered");
        self.say(request, State::Ready);
    }

    fn run(&mut self) -> Turn {
        let accepted = Features(self.mem.load(ACCEPTED));
        let offered = self.region.spec().features;
        if !offered.contains(accepted) {
            return self.refuse(corrupt("features accepted", accepted.0, offered.0));
        }
        self.features = accepted;
        self.say(self.at.request, State::Run);
        let epoch = self.region.epoch();
        Turn::of(Some(Event::Attached {
            epoch,
            features: accepted,
        }))
    }

    fn say(&mut self, request: u64, state: State) {
        self.at = Word { request, state };
        self.mem.store(HOST_WORD, self.at.encode());
    }

    fn lose(&mut self, lost: Lost) -> Turn {
        self.say(self.at.request, State::Closed);
        Turn::of(Some(Event::Lost(lost)))
    }

    fn refuse(&mut self, lost: Lost) -> Turn {
        if self.at.state == State::Poisoned {
            // What stands there may stand in place of a request that this side has never seen: its guest is to look.
            return Turn::of(None);
        }
        self.say(self.at.request, State::Poisoned);
        Turn::of(Some(Event::Lost(lost)))
    }

    /// Ends the session, for the guest broke a ring of it.
    pub fn poison(&mut self) -> Wake {
        self.say(self.at.request, State::Poisoned);
        Wake::Yes
    }

    /// Ends the session.
    pub fn close(&mut self) -> Wake {
        self.say(self.at.request, State::Closed);
        Wake::Yes
    }

    /// This side's ends of a lane, positions at zero: to be made once a session. `events`: both sides sleep, and ring.
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

/// The side that finds a region.
#[derive(Debug)]
pub struct Guest<M> {
    mem: M,
    /// What this side can do.
    can: Features,
    at: Word,
    region: Option<Region>,
    features: Features,
}

impl<M: RingMem + Clone> Guest<M> {
    /// Looks for a region. `start`: where it begins to count its requests, random, so that those of one that was here
    /// before are not taken for its own. `can`: what it is able to do.
    ///
    /// # Errors
    /// There is none, or none that this side knows.
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

    /// What this side says it is at.
    pub fn state(&self) -> State {
        self.at.state
    }

    /// The region as of this session.
    pub fn region(&self) -> Option<&Region> {
        self.region.as_ref()
    }

    /// Asks for a session; an old one ends.
    pub fn attach(&mut self) -> Wake {
        let next = (self.at.request + 1) & (u64::MAX >> 8);
        self.region = None;
        self.say(next.max(1), State::Want);
        Wake::Yes
    }

    /// Looks at the host's word.
    ///
    /// # Errors
    /// The host is ready with a region that this side cannot use: it was told so.
    pub fn poll(&mut self) -> Result<Turn, RegionError> {
        let word = self.mem.load(HOST_WORD);
        let Some(host) = Word::parse(word) else {
            // Before the host has answered, it is what somebody left there, this guest perhaps: the answer overwrites it.
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
            // Something in this guest wrote over the request before the host saw it: nobody else would ever say it again.
            (State::Want, _) if self.mem.load(GUEST_WORD) != self.at.encode() => {
                self.say(self.at.request, State::Want);
                Turn::of(None)
            }
            _ => Turn::NOTHING,
        })
    }

    fn run(&mut self) -> Result<Turn, RegionError> {
        let region = Region::read(&self.mem).inspect_err(|_| {
            self.say(self.at.request, State::Poisoned);
        })?;
        let features = region.spec().features.both(self.can);
        let view = View::new(Side::Guest, self.can, features);
        clean(&self.mem, &region, view);
        self.mem.store_relaxed(ACCEPTED, features.0);
        (self.region, self.features) = (Some(region), features);
        self.say(self.at.request, State::Run);
        let epoch = region.epoch();
        Ok(Turn::of(Some(Event::Attached { epoch, features })))
    }

    fn say(&mut self, request: u64, state: State) {
        self.at = Word { request, state };
        self.mem.store(GUEST_WORD, self.at.encode());
    }

    fn lose(&mut self, lost: Lost) -> Turn {
        self.say(self.at.request, State::Closed);
        self.region = None;
        Turn::of(Some(Event::Lost(lost)))
    }

    fn refuse(&mut self, lost: Lost) -> Turn {
        if self.at.state == State::Poisoned {
            return Turn::NOTHING;
        }
        self.say(self.at.request, State::Poisoned);
        self.region = None;
        Turn::of(Some(Event::Lost(lost)))
    }

    /// Ends the session, for the host broke a ring of it.
    pub fn poison(&mut self) -> Wake {
        self.region = None;
        self.say(self.at.request, State::Poisoned);
        Wake::Yes
    }

    /// Ends the session.
    pub fn close(&mut self) -> Wake {
        self.region = None;
        self.say(self.at.request, State::Closed);
        Wake::Yes
    }

    /// This side's ends of a lane, as [`Host::ends`]; `None`: it is not attached.
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
