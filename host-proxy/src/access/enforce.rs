//! Ends tunnels whose grant is gone.
//!
//! A tunnel is with its VM's port process, which knows no grant. So the tag of each is judged again whenever grants, tokens or
//! labels change, when the time of one is over, and when a port process is found: grants may have changed while there was no
//! `aditd`. A change that comes while this is done is judged after it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use adit_names::VmId;
use adit_port::control::TUNNELS_MAX;

use super::decide::Verb;
use super::tag::Tag;
use super::{Caller, Subject};
use crate::link::Link;
use crate::state::State;
use crate::vm::VmEntry;

/// How long it takes at most until it is looked whether the time of a grant or a token is over.
const LOOK: Duration = Duration::from_millis(500);

/// How long until tunnels of users of whom the user database says nothing are judged again.
const AGAIN: Duration = Duration::from_secs(5);

/// Judges until told to stop.
pub async fn keep(state: Arc<State>) {
    let mut judged_ms = state.now_ms();
    let mut known = HashMap::<VmId, Weak<Link>>::new();
    loop {
        let changed = tokio::select! {
            () = state.access_changed.notified() => true,
            () = tokio::time::sleep(LOOK) => false,
        };
        let now_ms = state.now_ms();
        let changed = changed || ended_between(&state, judged_ms, now_ms);
        known.retain(|_, link| link.strong_count() > 0);
        for vm in state.registry.all() {
            let Some(link) = vm.channel.link() else {
                continue;
            };
            let is_known = |known: &Weak<Link>| std::ptr::eq(known.as_ptr(), Arc::as_ptr(&link));
            if known.get(&vm.name).is_some_and(is_known) && !changed {
                continue;
            }
            known.insert(vm.name.clone(), Arc::downgrade(&link));
            // One port process that does not answer holds up no other VM.
            let state = state.clone();
            tokio::spawn(async move { judge(&state, &vm, &link).await });
        }
        judged_ms = now_ms;
    }
}

/// Whether the time of a grant or a token ended in this time. A clock that was set back ends nothing twice.
fn ended_between(state: &State, from_ms: i64, to_ms: i64) -> bool {
    let is_between = |until: i64| from_ms < until && until <= to_ms;
    let grants = state.grants();
    let mut ends = grants.all().iter().filter_map(|grant| grant.until_ms);
    ends.any(is_between) || state.callers.tokens().ends().any(is_between)
}

/// Judges the tunnels of one VM.
async fn judge(state: &State, vm: &VmEntry, link: &Link) {
    let (mut after, mut is_unknown) = (0, false);
    while let Some(page) = link.tunnels(after).await {
        let mut gone = Vec::new();
        for (number, tag) in &page.tunnels {
            after = after.max(*number);
            let Some(tag) = Tag::read(tag) else { continue };
            match judged(state, vm, &tag).await {
                Judged::GoesOn => {}
                Judged::Ends => gone.push(*number),
                Judged::Unknown => is_unknown = true,
            }
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
        tokio::time::sleep(AGAIN).await;
        state.access_changed.notify_one();
    }
}

/// What becomes of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judged {
    GoesOn,
    Ends,
    /// Its user's groups may decide, and the user database does not answer: it goes on until that does.
    Unknown,
}

async fn judged(state: &State, vm: &VmEntry, tag: &Tag) -> Judged {
    let (tokens, now_ms) = (state.callers.tokens(), state.now_ms());
    let caller = tag.caller(|name| match name {
        Subject::Token(token) => tokens.has(token, now_ms),
        _ => true,
    });
    let (verb, grants) = (Verb::Reach(tag.target()), state.grants());
    // The VM's own lists are about new streams.
    let is_granted =
        |caller: &Caller| vm.viewed(|vm| grants.granted(caller, verb, vm, now_ms).is_ok());
    if is_granted(&caller) {
        return Judged::GoesOn;
    }
    if let Some(uid) = tag.uid() {
        match state.callers.look_up(uid).await {
            Some(person) if is_granted(&caller.with_groups(&person)) => return Judged::GoesOn,
            Some(_) => {}
            None => return Judged::Unknown,
        }
    }
    let (word, target) = verb.words();
    // By the name that it had then.
    let caller = tag.caller(|_| true);
    state.denied(&caller, word, vm.name.as_str(), &target, "grant-gone");
    Judged::Ends
}
