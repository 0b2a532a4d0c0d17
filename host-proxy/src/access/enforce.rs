//! Ends tunnels whose grant is gone.
//!
//! A tunnel is with its VM's port process, which knows no grant. So the tag of each is judged again whenever grants, tokens or
//! labels change, when the time of one, or of a card, is over, and when a port process is found: grants may have changed while there was no
//! `aditd`. A change that comes while this is done is judged after it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use adit_api::HostEventKind;
use adit_names::VmId;
use adit_port::control::{LIMITED_MAX, Limit, TUNNELS_MAX};

use super::tag::Tag;
use super::{Caller, Subject};
use crate::link::Link;
use crate::state::State;
use crate::vm::VmEntry;

/// How long until what could not be judged is judged again: the user database, or a port process, did not answer.
const AGAIN: Duration = Duration::from_secs(5);
/// Longest sleep, for a clock that is set meanwhile.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// Judgements of one VM: one at a time, and one more that waits. That one sees what every later one would.
#[derive(Debug, Default)]
struct Turn {
    one: tokio::sync::Mutex<()>,
    waits: AtomicBool,
}

/// Judges until told to stop.
pub async fn keep(state: Arc<State>) {
    let (mut judged_ms, mut judged) = (state.now_ms(), Instant::now());
    let mut known = HashMap::<VmId, (Weak<Link>, Arc<Turn>)>::new();
    loop {
        let changed = tokio::select! {
            () = state.access_changed.notified() => true,
            () = tokio::time::sleep(until_an_end(&state, judged_ms, judged)) => false,
        };
        let (now_ms, now) = (state.now_ms(), Instant::now());
        let over = ends(&state).any(|end| judged_ms < end && end <= now_ms);
        let faded = || card_ends(&state).any(|end| judged < end && end <= now);
        if changed || over || faded() {
            known.retain(|_, (link, _)| link.strong_count() > 0);
            for vm in state.registry.all() {
                if let Some(link) = vm.channel.link() {
                    let turn = turn_of(&mut known, &vm.name, &link);
                    spawn_judgement(state.clone(), vm, link, turn);
                }
            }
        }
        (judged_ms, judged) = (now_ms, now);
    }
}

fn turn_of(
    known: &mut HashMap<VmId, (Weak<Link>, Arc<Turn>)>,
    vm: &VmId,
    link: &Arc<Link>,
) -> Arc<Turn> {
    match known.get(vm) {
        Some((of, turn)) if std::ptr::eq(of.as_ptr(), Arc::as_ptr(link)) => turn.clone(),
        _ => {
            let turn = Arc::<Turn>::default();
            known.insert(vm.clone(), (Arc::downgrade(link), turn.clone()));
            turn
        }
    }
}

/// One port process that does not answer holds up no other VM.
fn spawn_judgement(state: Arc<State>, vm: Arc<VmEntry>, link: Arc<Link>, turn: Arc<Turn>) {
    if turn.waits.swap(true, Ordering::AcqRel) {
        return;
    }
    tokio::spawn(async move {
        let _one = turn.one.lock().await;
        turn.waits.store(false, Ordering::Release);
        judge(&state, &vm, &link).await;
    });
}

/// When grants and tokens end, Unix time.
fn ends(state: &State) -> impl Iterator<Item = i64> {
    let grants = state.grants();
    let of_grants: Vec<_> = grants
        .all()
        .iter()
        .filter_map(|grant| grant.until_ms)
        .collect();
    let of_tokens: Vec<_> = state.callers.tokens().ends().collect();
    of_grants.into_iter().chain(of_tokens)
}

/// When cards end whose labels may count, by a clock that nobody sets.
fn card_ends(state: &State) -> impl Iterator<Item = Instant> {
    let vms = match state.grants().has_labels() {
        true => state.registry.all(),
        false => Vec::new(),
    };
    vms.into_iter().filter_map(|vm| vm.agent.card_until())
}

/// How long until the first end behind that time.
fn until_an_end(state: &State, judged_ms: i64, judged: Instant) -> Duration {
    let next = ends(state).filter(|end| *end > judged_ms).min();
    let left = next.map(|end| end.saturating_sub(state.now_ms()));
    let left = left.map(|ms| Duration::from_millis(u64::try_from(ms).unwrap_or(0)));
    let card = card_ends(state).filter(|end| *end > judged).min();
    let of_card = card.map(|end| end.saturating_duration_since(Instant::now()));
    let next = left.into_iter().chain(of_card).min();
    next.unwrap_or(SLEEP_MAX).min(SLEEP_MAX)
}

/// Judges the tunnels of one VM.
async fn judge(state: &Arc<State>, vm: &VmEntry, link: &Link) {
    if !link.lists_tunnels() {
        return;
    }
    let (mut after, mut is_unknown) = (0, false);
    loop {
        let Some(page) = link.tunnels(after).await else {
            let is_there = |now: Arc<Link>| std::ptr::eq(Arc::as_ptr(&now), link);
            is_unknown = vm.channel.link().is_some_and(is_there);
            break;
        };
        let (mut gone, mut limited) = (Vec::new(), Vec::new());
        for (number, tag) in &page.tunnels {
            after = after.max(*number);
            let Some(tag) = Tag::read(tag) else { continue };
            match judged(state, vm, &tag).await {
                Judged::GoesOn(limits) => limited.push((*number, limits)),
                Judged::Ends => gone.push(*number),
                Judged::Unknown => is_unknown = true,
            }
        }
        if !gone.is_empty() {
            let name = Some(vm.name.as_str());
            let cut = gone.len() as u64;
            state.events.count(HostEventKind::TunnelsCut, name, cut);
        }
        // Also those that have none any more.
        for limited in limited.chunks(LIMITED_MAX).filter(|_| link.limits()) {
            link.set_limits(limited.to_vec()).await;
        }
        let is_over = page.last || page.tunnels.is_empty();
        for gone in gone.chunks(TUNNELS_MAX) {
            tracing::info!(vm = %vm.name, tunnels = gone.len(), "broken off: their grant is gone");
            link.end_tunnels(gone.to_vec()).await;
        }
        if is_over {
            break;
        }
    }
    if is_unknown {
        let state = state.clone();
        tokio::spawn(async move {
            tokio::time::sleep(AGAIN).await;
            state.access_changed.notify_one();
        });
    }
}

/// What becomes of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Judged {
    /// With so many bytes a second from now on.
    GoesOn(Vec<Limit>),
    Ends,
    /// What decides is not known yet: its user's groups, where the user database does not answer, or the labels of a card, where the
    /// agent has not come back to this `aditd`. It goes on until that is known.
    Unknown,
}

async fn judged(state: &State, vm: &VmEntry, tag: &Tag) -> Judged {
    let (tokens, now_ms) = (state.callers.tokens(), state.now_ms());
    let mut caller = tag.caller(|name| match name {
        Subject::Token(token) => tokens.has(token, now_ms),
        Subject::User(_) | Subject::Group(_) => {
            let via = tag.via();
            via.is_none_or(|host| state.peers.still_vouches(host, name))
        }
        _ => true,
    });
    // The VM's own lists are about new streams.
    let granted = |caller: &Caller| state.limits(caller, tag.verb(), vm);
    let without_groups = granted(&caller);
    // A group may bring a grant by which more bytes go.
    if let Some(limits) = without_groups.as_ref().filter(|limits| limits.is_empty()) {
        return Judged::GoesOn(limits.clone());
    }
    if let Some(uid) = tag.uid() {
        match state.callers.look_up(uid).await {
            Some(person) => {
                caller = caller.with_groups(&person);
                if let Some(limits) = granted(&caller) {
                    return Judged::GoesOn(limits);
                }
            }
            None => return Judged::Unknown,
        }
    }
    if let Some(limits) = without_groups {
        return Judged::GoesOn(limits);
    }
    let (word, target) = tag.verb().words();
    let may_have_label = || {
        let grants = state.grants();
        vm.viewed(|vm| grants.by_some_label(&caller, tag.verb(), vm, now_ms))
    };
    if !vm.agent.was_heard() && state.waits_for_agents() && may_have_label() {
        return Judged::Unknown;
    }
    // By the name that it had then.
    let caller = tag.caller(|_| true);
    state.denied(&caller, word, vm.name.as_str(), &target, "grant-gone");
    Judged::Ends
}
