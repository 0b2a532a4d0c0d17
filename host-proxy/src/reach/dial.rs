//! From a destination to a stream.
//!
//! Whoever is admitted has a share of the VM for as long as aditd works for the request. Every failure is a [`Refusal`] whose
//! text is a whole sentence about the destination; no front end words it again.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_channel::hello::Extensions;
use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_passed::Closer;
use adit_port::control::{DialFailed, Limit, Target};
use tokio_util::sync::CancellationToken;

use super::destination::Destination;
use super::find::{self, Found, ambiguous, find};
use super::resolve::listed;
use crate::access::tag::Tag;
use crate::access::{Caller, Grants, Verb};
use crate::link::{ClientEnd, ClientSocket, Link, Question, Unopened};
use crate::listen::{Room, Share};
use crate::passing::Socket;
use crate::peers::{Carried, Host};
use crate::state::State;
use crate::visit::Visit;
use crate::vm::VmEntry;

/// What somebody hears who shows what is no token here.
pub const STRANGE: &str =
    "what Proxy-Authorization shows is not one token of this host, or its time is over";

/// How long the guest may take to accept a stream.
pub const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// A request that may be carried.
pub struct Admitted {
    way: Way,
    /// The VM's, of what all clients have under way: for as long as the request needs aditd.
    pub share: Share<VmId>,
    visit: Visit,
}

enum Way {
    /// The VM is here.
    Here(Here),
    /// Another host has it, and decides for whom.
    There(Arc<Host>, Caller),
}

struct Here {
    vm: Arc<VmEntry>,
    /// By way of its port process as it is now.
    link: Arc<Link>,
    /// By which its tunnel is found when its grant is gone.
    tag: Option<Vec<u8>>,
    /// How many bytes a second it may carry.
    limits: Vec<Limit>,
    /// By which it was admitted.
    grants: Arc<Grants>,
    visit: Visit,
}

/// What became of a client that was given away.
#[derive(Debug)]
pub enum Over {
    /// It is the port process's.
    Away,
    /// Its tunnel is carried here.
    Here(Carried),
}

/// How long a stream is its caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    /// For one request; others may have it after that.
    Request,
    /// To its end, so that it ends with its grant.
    Tunnel,
}

/// Why there is no stream.
#[derive(Debug)]
pub enum NotOpened {
    /// It was refused, and nothing was said to the client.
    Refused(Refusal),
    /// Nobody knows whether the client was greeted, so nothing can be said to it any more.
    Unknown(Refusal),
}

/// Finds out who is meant, whether that is allowed, and whether there is room for it.
///
/// # Errors
/// One of these is not so. A denial comes before anything that depends on whether the VM runs.
pub async fn admit(
    state: &Arc<State>,
    caller: &Caller,
    to: &Destination,
    visit: &Visit,
) -> Result<Admitted, Refusal> {
    visit.caller(caller);
    visit.to(to);
    let vm = match find(state, caller, to).await {
        Found::Here(vm) => vm,
        Found::There(host) => {
            let share = share(state, &to.vm, 1)?;
            let way = Way::There(host, caller.clone());
            let visit = visit.clone();
            return Ok(Admitted { way, share, visit });
        }
        Found::Nowhere(why) => return Err(nowhere(state, caller, to, why)),
        Found::Several(hosts) => {
            state.denied(caller, "reach", &to.name(), &to.what(), "ambiguous");
            return Err(ambiguous(&to.vm, &hosts));
        }
    };
    if caller.shows_strange() {
        // It is written down, and counted, with the answer.
        return Err(Refusal::new(Code::NotAllowed, STRANGE));
    }
    let admitted = admit_here(state, caller, to, vm, visit);
    match admitted {
        // Whoever may not see it waits, and hears, as if it were not there.
        Err(refusal) if refusal.code() == Code::UnknownVm => {
            find::ask_as_if_unknown(state, caller, to).await;
            Err(not_found(state, caller, to))
        }
        admitted => admitted,
    }
}

/// The same, for a VM of this host.
///
/// # Errors
/// As [`admit`].
pub fn admit_here(
    state: &State,
    caller: &Caller,
    to: &Destination,
    vm: Arc<VmEntry>,
    visit: &Visit,
) -> Result<Admitted, Refusal> {
    let grants = state.grants();
    let mut limits = Vec::new();
    match state.allow(caller, Verb::Reach(&to.target), &vm) {
        Ok(by) => {
            let by = match state.has_rate(&vm) {
                true => state
                    .rated(caller, Verb::Reach(&to.target), &vm)?
                    .map(|(by, bytes)| {
                        limits = bytes;
                        by
                    }),
                false => by,
            };
            visit.allowed(by.as_deref());
        }
        Err(denial) if denial.is_hidden => return Err(unknown(to, caller)),
        Err(denial) => {
            let text = denial.reason.text(Verb::Reach(&to.target), &to.vm, caller);
            return Err(Refusal::new(Code::NotAllowed, text));
        }
    }
    if vm.lock.is_on() {
        return Err(locked(state, caller, to, &vm));
    }
    let Some(link) = vm.channel.link() else {
        let text = format!("VM `{}`: its port process does not run", to.vm);
        return Err(Refusal::new(Code::NoPortProcess, text));
    };
    let share = share(state, &to.vm, vm.weight())?;
    let outlives = state.config.limits.tunnels_outlive_grants;
    let tag = Tag::of(caller, Verb::Reach(&to.target)).filter(|_| !outlives);
    let way = Way::Here(Here {
        vm,
        link,
        tag,
        limits,
        grants,
        visit: visit.clone(),
    });
    let visit = visit.clone();
    Ok(Admitted { way, share, visit })
}

/// Nothing new goes there. It is written down as every denial is.
fn locked(state: &State, caller: &Caller, to: &Destination, vm: &VmEntry) -> Refusal {
    state.denied(caller, "reach", to.vm.as_str(), &to.what(), "locked");
    let locked = vm.lock.locked();
    let reason = locked.as_ref().map_or("", |locked| locked.reason.as_str());
    let text = match reason {
        "" => format!("VM `{}` is locked", to.vm),
        reason => format!("VM `{}` is locked: {reason}", to.vm),
    };
    Refusal::new(Code::Locked, text)
}

/// `weight`: how many of the shares that each VM has.
pub fn share(state: &State, vm: &VmId, weight: usize) -> Result<Share<VmId>, Refusal> {
    let max = state.vm_shares.max().saturating_mul(weight);
    state
        .vm_shares
        .take_of(vm.clone(), max)
        .ok_or_else(|| Refusal::busy(format!("VM `{vm}` has {max} requests under way already")))
}

/// No host that answers has the VM.
fn nowhere(state: &State, caller: &Caller, to: &Destination, why: &'static str) -> Refusal {
    let refusal = not_found(state, caller, to);
    let why = match refusal.code() {
        Code::SilentHost => "silent-host",
        _ => why,
    };
    // With the host that was meant, if one was.
    state.denied(caller, "reach", &to.name(), &to.what(), why);
    refusal
}

/// What whoever asks for a VM hears that is not found: as long as a host that may have it does not answer, that it may be there.
fn not_found(state: &State, caller: &Caller, to: &Destination) -> Refusal {
    let silent = find::silent(state, caller, to);
    // Who says nothing of themselves may have to do that first.
    let must_log_in = caller.is_anonymous() && !state.callers.tokens().is_empty();
    if silent.is_empty() || (must_log_in && caller.shown().is_none()) {
        return unknown(to, caller);
    }
    let which = match find::may_know(state, caller, to, None) {
        true => format!("of {}, which may have it,", listed(&silent)),
        false => "of a host that may have it,".to_owned(),
    };
    let text = format!(
        "no host that answers has a VM named `{}`, and {which} there is no answer",
        to.name()
    );
    Refusal::new(Code::SilentHost, text)
}

/// There is no such VM, or none that the caller may see: nothing tells these two apart.
pub fn unknown(to: &Destination, caller: &Caller) -> Refusal {
    let vm = to.name();
    let text = match caller.is_owner() {
        true => format!("no VM is named `{vm}` on this host"),
        false => format!("no VM is named `{vm}` on this host, or no grant lets {caller} have it"),
    };
    Refusal::new(Code::UnknownVm, text)
}

impl Admitted {
    /// What closes descriptors that the port process has, or has had; none: there is none.
    pub fn closer(&self) -> Option<&Closer> {
        match &self.way {
            Way::Here(here) => Some(here.link.closer()),
            Way::There(..) => None,
        }
    }

    /// The VM, and the way to it, if both are here.
    pub fn here(&self) -> Option<(&Arc<VmEntry>, &Arc<Link>)> {
        match &self.way {
            Way::Here(here) => Some((&here.vm, &here.link)),
            Way::There(..) => None,
        }
    }

    /// How many bytes a second it may carry, if the VM is here.
    pub fn limits(&self) -> &[Limit] {
        match &self.way {
            Way::Here(here) => &here.limits,
            Way::There(..) => &[],
        }
    }

    /// The other host that has the VM.
    pub fn host(&self) -> Option<&VmId> {
        match &self.way {
            Way::Here(_) => None,
            Way::There(host, _) => Some(&host.config.name),
        }
    }

    /// Cancelled when the VM is removed from this host.
    pub fn removed(&self) -> CancellationToken {
        let vm = self.here().map(|(vm, _)| vm.removed.clone());
        vm.unwrap_or_default()
    }

    /// Dials for a client whose own socket is the other end. From then on aditd is not needed.
    ///
    /// # Errors
    /// As the guest, its channel or its port process says.
    pub async fn hand_over(
        &self,
        state: &State,
        to: &Destination,
        client: ClientSocket,
    ) -> Result<Over, NotOpened> {
        let here = match &self.way {
            Way::Here(here) => here,
            Way::There(host, caller) => {
                let there = (to, &self.visit);
                let carried = host.hand_over(state, caller, there, client).await;
                let carried = carried
                    .map_err(|e| NotOpened::Refused(of_other(state, host, to, caller, e)))?;
                self.visit.answered(200, "");
                return Ok(Over::Here(carried));
            }
        };
        let end = ClientEnd::Socket(client);
        let note = self.visit.note().filter(|_| here.link.tells_ends());
        let is_noted = note.is_some();
        let opened = here.open(to, self.visit.extensions(), end, here.tag.clone(), note);
        let opened = opened.await.map_err(|e| match e {
            Unopened::Failed(failed) => NotOpened::Refused(refusal(to, &failed)),
            Unopened::Unknown(failed) => NotOpened::Unknown(failed.refusal(&to.target)),
        });
        if opened.is_ok() {
            self.visit.handed(is_noted);
        }
        here.judge_again(state);
        opened.map(|()| Over::Away)
    }

    /// Dials for a client whose bytes need aditd on the way: the other end is a socket of aditd's.
    ///
    /// # Errors
    /// There are too few; or as the guest, its channel or its port process says.
    pub async fn relayed(
        &self,
        state: &State,
        to: &Destination,
        lasts: Lasts,
    ) -> Result<Socket, Refusal> {
        let here = match &self.way {
            Way::Here(here) => here,
            Way::There(host, caller) => {
                let relayed = host.relayed(state, caller, (to, &self.visit)).await;
                return relayed.map_err(|e| of_other(state, host, to, caller, e));
            }
        };
        let tag = match lasts {
            Lasts::Request => None,
            Lasts::Tunnel => here.tag.clone(),
        };
        let short = || state.pool.clear();
        let paired = here.pair(to, self.visit.extensions(), tag, state.room, short);
        let paired = paired.await;
        here.judge_again(state);
        paired
    }

    /// The same, for a service that is told more than its name. `short` is called if there are few descriptors left for it.
    ///
    /// # Errors
    /// As [`relayed`](Self::relayed).
    pub async fn relayed_with(
        &self,
        to: &Destination,
        extensions: Extensions,
        room: Room,
        short: impl FnOnce(),
    ) -> Result<Socket, Refusal> {
        match &self.way {
            Way::Here(here) => here.pair(to, extensions, None, room, short).await,
            Way::There(..) => Err(Refusal::new(Code::Internal, "the VM is another host's")),
        }
    }
}

/// What another host's refusal is to whoever asked here. Whoever may not see a VM there hears what they would of one that is nowhere.
fn of_other(
    state: &State,
    host: &Host,
    to: &Destination,
    caller: &Caller,
    refusal: Refusal,
) -> Refusal {
    if refusal.code() != Code::UnknownVm {
        return refusal;
    }
    let unknown = not_found(state, caller, to);
    // Its word counts: it is asked again before anybody is sent there.
    state.peers.map().forget(&to.vm, &host.config.name);
    unknown
}

impl Here {
    /// Has the tunnels judged again, if this one was not there yet when grants changed.
    fn judge_again(&self, state: &State) {
        if !Arc::ptr_eq(&self.grants, &state.grants()) {
            state.access_changed.notify_one();
        }
    }

    async fn pair(
        &self,
        to: &Destination,
        extensions: Extensions,
        tag: Option<Vec<u8>>,
        room: Room,
        short: impl FnOnce(),
    ) -> Result<Socket, Refusal> {
        let internal = |e| Refusal::new(Code::Internal, format!("no socket: {e}"));
        let (ours, theirs) = UnixStream::pair().map_err(internal)?;
        if !room.spares(&ours) || !room.spares(&theirs) {
            short();
            return Err(Refusal::busy("aditd has few descriptors left"));
        }
        let ours = Socket::new(ours, self.link.closer()).map_err(internal)?;
        let end = ClientEnd::Relayed(theirs.into());
        let opened = self.open(to, extensions, end, tag, None).await;
        opened.map_err(|e| refusal(to, &e.into_reason()))?;
        Ok(ours)
    }

    async fn open(
        &self,
        to: &Destination,
        extensions: Extensions,
        end: ClientEnd,
        tag: Option<Vec<u8>>,
        note: Option<Vec<u8>>,
    ) -> Result<(), Unopened> {
        let question = Question {
            to: to.target.clone(),
            extensions,
            deadline: DIAL_LIMIT,
            tag,
            note,
            limits: self.limits.clone(),
        };
        let (dial, since) = (self.vm.dials.begin(&to.target), Instant::now());
        let opened = self.link.open(question, end).await;
        self.visit.dialed(since.elapsed());
        dial.ended(opened.as_ref().err().map(Unopened::reason));
        opened
    }
}

/// What a failed dial means to whoever asked.
pub fn refusal(to: &Destination, failed: &DialFailed) -> Refusal {
    let refusal = failed.refusal(&to.target);
    let vm = &to.vm;
    let text = match refusal.code() {
        Code::NoSession => format!("VM `{vm}`: its guest is not up (no driver, or no VMM)"),
        Code::NoAgent => {
            format!("VM `{vm}`: no agent listens in the guest: is adit-guest running?")
        }
        Code::NoListener => format!("{to}: nobody listens there"),
        _ if refusal.text().is_empty() => format!("{to}: dial failed"),
        _ => format!("{to}: {}", refusal.text()),
    };
    refusal.with_text(text)
}

/// Whether a target's listener ends its streams so that an end can be told from a break. Nobody knows that of a listener without
/// an agent: most programs just close.
pub fn ends_in_order(target: &Target) -> bool {
    matches!(target, Target::Service(_))
}
