//! Finds the host that has a VM: this one, or another that is asked for it.

use std::sync::Arc;
use std::time::Duration;

use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use futures_util::future::join_all;
use tokio::time::timeout;

use super::destination::Destination;
use super::resolve::{Claim, Place, listed};
use crate::access::{Caller, Verb, VmView};
use crate::peers::{Host, asked};
use crate::state::State;
use crate::vm::VmEntry;

/// How long other hosts are waited for.
const LIMIT: Duration = Duration::from_secs(2);

/// So many names are asked for one by one.
const FEW: usize = 4;

/// The host that has a VM.
#[derive(Debug)]
pub enum Found {
    /// This one.
    Here(Arc<VmEntry>),
    /// Another one.
    There(Arc<Host>),
    /// None; or the caller is not to know.
    Nowhere(&'static str),
    /// Several, and the caller may know them.
    Several(Vec<VmId>),
}

/// Finds it. Who comes by way of another host gets VMs of this one only: there is one hop (R126).
pub async fn find(state: &Arc<State>, caller: &Caller, to: &Destination) -> Found {
    let own = state.registry.get(&to.vm);
    let host = state.host();
    let is_own_meant = to.host.is_none() || to.host.as_ref() == host;
    if caller.via().is_some() {
        return match own.filter(|_| is_own_meant) {
            Some(vm) => Found::Here(vm),
            None => Found::Nowhere("not-here"),
        };
    }
    let Some(host) = host else {
        // Nobody could say which is whose.
        return match own.filter(|_| is_own_meant) {
            Some(vm) => Found::Here(vm),
            None => others(state, caller, to, None).await,
        };
    };
    let claim = own.map(|vm| {
        let at = asked::at(state, &vm);
        let claim = Claim {
            host: host.clone(),
            live: at.live,
            generation: at.generation,
        };
        (vm, claim)
    });
    others(state, caller, to, claim).await
}

/// Finds many. Of more than some, each other host is asked once for all that it has.
pub async fn find_all(state: &Arc<State>, caller: &Caller, to: &[Destination]) -> Vec<Found> {
    if to.len() > FEW && caller.via().is_none() {
        ask_for_all(state, to).await;
    }
    join_all(to.iter().map(|to| find(state, caller, to))).await
}

async fn ask_for_all(state: &Arc<State>, to: &[Destination]) {
    let peers = &state.peers;
    let hosts = peers.all();
    let hosts = hosts.iter().filter(|host| host.is_asked());
    let _asks: Vec<_> = to.iter().map(|to| peers.asks(&to.vm)).collect();
    join_all(hosts.map(|host| async move {
        let name = &host.config.name;
        let now_ms = peers.now_ms();
        for to in to {
            peers.map().asked(&to.vm, name, now_ms);
        }
        // Whoever does not answer in time says nothing.
        let Ok(Ok(said)) = timeout(LIMIT, host.claims(state)).await else {
            return;
        };
        let now_ms = peers.now_ms();
        for to in to {
            let claim = said.get(&to.vm).cloned();
            peers.map().heard(&to.vm, name, claim, now_ms);
        }
    }))
    .await;
}

type Own = Option<(Arc<VmEntry>, Claim<VmId>)>;

async fn others(state: &Arc<State>, caller: &Caller, to: &Destination, own: Own) -> Found {
    let claim = own.as_ref().map(|(_, claim)| claim);
    let peers = &state.peers;
    let look = || {
        peers
            .map()
            .look(&to.vm, claim, to.host.as_ref(), peers.now_ms())
    };
    let mut found = look();
    if !found.ask.is_empty() {
        let asked = tokio::spawn(ask(state.clone(), to.vm.clone(), found.ask));
        if found.place.is_none() {
            // Whoever does not answer in time says nothing.
            let _ = timeout(LIMIT, asked).await;
            found = look();
        }
    } else if !matches!(found.place, Some(Place::At(_))) {
        // They are asked already, and nobody has answered yet.
        let _ = timeout(LIMIT, peers.asked(&to.vm)).await;
        found = look();
    }
    match found.place {
        Some(Place::At(host)) => match own {
            Some((vm, claim)) if claim.host == host => Found::Here(vm),
            _ => match peers.get(&host) {
                Some(host) => Found::There(host),
                None => Found::Nowhere("unknown-vm"),
            },
        },
        Some(Place::Ambiguous(hosts))
            if may_know(state, caller, to, own.as_ref().map(|(vm, _)| &**vm)) =>
        {
            Found::Several(hosts)
        }
        Some(Place::Ambiguous(_)) => Found::Nowhere("ambiguous"),
        Some(Place::Unknown) | None => Found::Nowhere("unknown-vm"),
    }
}

/// Whether a caller may see a VM, as far as that is known here: of one that is elsewhere, only its name is.
pub fn may_know(state: &State, caller: &Caller, to: &Destination, own: Option<&VmEntry>) -> bool {
    let (grants, now_ms) = (state.grants(), state.now_ms());
    let sees = |vm: VmView<'_>| grants.granted(caller, Verb::See, vm, now_ms).is_ok();
    match own {
        Some(vm) => vm.viewed(sees),
        None => sees(VmView::of_name(to.vm.as_str())),
    }
}

/// Hosts that may have a VM and have not said whether they do.
pub fn silent(state: &State, caller: &Caller, to: &Destination) -> Vec<VmId> {
    if caller.via().is_some() {
        return vec![];
    }
    let peers = &state.peers;
    let mut hosts = peers.map().unheard(&to.vm, peers.now_ms());
    hosts.retain(|host| {
        let may_claim = |host: Arc<Host>| host.config.may_claim(&to.vm);
        to.host.as_ref().is_none_or(|at| at == host) && peers.get(host).is_some_and(may_claim)
    });
    hosts
}

/// Asks as for a name that this host does not have, so that a VM that is here and not to be seen takes as long as one that is nowhere.
pub async fn ask_as_if_unknown(state: &Arc<State>, caller: &Caller, to: &Destination) {
    if caller.via().is_none() {
        others(state, caller, to, None).await;
    }
}

/// Asks hosts for a VM, all at the same time.
pub async fn ask(state: Arc<State>, vm: VmId, hosts: Vec<VmId>) {
    let peers = &state.peers;
    let now_ms = peers.now_ms();
    let hosts: Vec<_> = hosts.iter().filter_map(|host| peers.get(host)).collect();
    let _asks = peers.asks(&vm);
    for host in &hosts {
        peers.map().asked(&vm, &host.config.name, now_ms);
    }
    join_all(hosts.iter().map(|host| async {
        let Ok(_question) = peers.questions.try_acquire() else {
            return;
        };
        match host.claim(&state, &vm).await {
            Ok(claim) => {
                let now_ms = peers.now_ms();
                peers.map().heard(&vm, &host.config.name, claim, now_ms);
            }
            Err(e) => {
                let error = adit_names::escape(&e.to_string()).to_string();
                tracing::warn!(host = %host.config.name, error, "another host does not say whether it has a VM");
            }
        }
    }))
    .await;
}

/// A name that several hosts have.
pub fn ambiguous(vm: &VmId, hosts: &[VmId]) -> Refusal {
    let example = hosts.first().map(|host| format!("{vm}.{host}"));
    let text = format!(
        "VM `{vm}` is on the hosts {} at the same time, and nothing says which is meant: write `{}`",
        listed(hosts),
        example.unwrap_or_default(),
    );
    Refusal::new(Code::Ambiguous, text)
}
