//! Which host has what a question is about, as far as the network that asks may know.
//!
//! Who may not `see` a VM hears what it would hear of one that is not there, as soon, and no other host is asked for it.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use adit_names::VmId;
use adit_port::control::Target;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::zone::{Found, Named};
use crate::access::rate::Buckets;
use crate::access::{Caller, Verb, VmView};
use crate::reach::Destination;
use crate::reach::find;
use crate::state::State;

/// Questions to other hosts that names of DNS have under way: half of all there may be, so that clients of the proxy have the rest.
const QUESTIONS_MAX: u32 = 32;
/// Names a second for which other hosts are asked, and those of one client. Anybody can make names up.
const NAMES_PER_S: u32 = 200;
const NAMES_OF_CLIENT_PER_S: u32 = 20;

/// What asking other hosts is bounded by.
#[derive(Debug)]
pub struct Asks {
    questions: Semaphore,
    rates: Mutex<Buckets>,
    began: Instant,
}

impl Default for Asks {
    fn default() -> Self {
        Self {
            questions: Semaphore::new(QUESTIONS_MAX as usize),
            rates: Mutex::default(),
            began: Instant::now(),
        }
    }
}

impl Asks {
    /// Lets so many hosts be asked for one more name, for a client. None: not now.
    fn admit(&self, client: &str, hosts: usize) -> Option<SemaphorePermit<'_>> {
        let hosts = u32::try_from(hosts).unwrap_or(u32::MAX);
        let under_way = self
            .questions
            .try_acquire_many(hosts.clamp(1, QUESTIONS_MAX))
            .ok()?;
        let now_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let may = rates.take(client, NAMES_OF_CLIENT_PER_S, now_ms)
            && rates.take("", NAMES_PER_S, now_ms);
        may.then_some(under_way)
    }
}

/// Who asks, and what they are told.
#[derive(Debug)]
pub struct Asker<'a> {
    /// The network.
    pub caller: &'a Caller,
    /// The client in it, as others cannot be taken for it.
    pub client: &'a str,
    /// This host's addresses.
    pub own: &'a [IpAddr],
    /// What asking other hosts is bounded by.
    pub asks: &'a Asks,
}

/// Finds what is asked about.
pub async fn look(state: &Arc<State>, asker: Asker<'_>, name: &Named) -> Found {
    match name {
        Named::Apex => Found::At(asker.own.to_vec()),
        Named::Empty => Found::Empty,
        Named::Nothing => Found::Nowhere,
        Named::Vm(to) => named(state, asker, to).await,
        Named::Above(to) => match named(state, asker, to).await {
            Found::At(_) => Found::Empty,
            other => other,
        },
    }
}

async fn named(state: &Arc<State>, asker: Asker<'_>, to: &Destination) -> Found {
    let Asker { caller, own, .. } = asker;
    let (grants, now_ms) = (state.grants(), state.now_ms());
    let host = host(state, own, &to.vm).filter(|_| to.host.is_none());
    if let Some(addresses) = host {
        let is_plain = matches!(&to.target, Target::Service(of) if of.tcp_port().is_some());
        return match (grants.sees_any(caller, now_ms), is_plain) {
            (false, _) => Found::Nowhere,
            (true, true) => Found::At(addresses),
            // Services of its VMs have names below.
            (true, false) => Found::Empty,
        };
    }
    let sees = |vm: VmView<'_>| grants.granted(caller, Verb::See, vm, now_ms).is_ok();
    // Of a VM elsewhere nothing but its name is known here.
    let sees_name = sees(VmView::of_name(to.vm.as_str()));
    let vm = state.registry.get(&to.vm);
    let sees_own = vm.as_ref().is_some_and(|vm| vm.viewed(sees));
    if !sees_name && !sees_own {
        if let Some(vm) = vm {
            // It is written down.
            state.decide(caller, Verb::See, &vm);
        }
        return Found::Nowhere;
    }
    let peers = &state.peers;
    let (at, hosts) = (to.host.as_ref(), peers.all().len());
    let known = |vm| peers.map().look(vm, None, at, peers.now_ms()).place;
    let mut _under_way = None;
    if vm.is_none() && known(&to.vm).is_none() {
        _under_way = match asker.asks.admit(asker.client, hosts) {
            None => return Found::Unknown,
            under_way => under_way,
        };
    }
    match find::find(state, caller, to).await {
        find::Found::Here(_) if sees_own => Found::At(own.to_vec()),
        find::Found::There(host) if sees_name => Found::At(vec![host.config.address.ip()]),
        // The name with each host in it has an address.
        find::Found::Several(_) => Found::Empty,
        find::Found::Here(_) | find::Found::There(_) => Found::Nowhere,
        find::Found::Nowhere(_) => {
            let have_said = find::silent(state, caller, to).is_empty();
            match have_said || !sees_name {
                true => Found::Nowhere,
                // A host that does not answer may have it.
                false => Found::Unknown,
            }
        }
    }
}

/// Addresses of a host; none: no host is called so.
fn host(state: &State, own: &[IpAddr], name: &VmId) -> Option<Vec<IpAddr>> {
    if state.host() == Some(name) {
        return Some(own.to_vec());
    }
    let host = state.peers.get(name)?;
    Some(vec![host.config.address.ip()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r110_names_that_a_client_makes_up_leave_questions_to_others() {
        let asks = Asks::default();
        let of = |client: &str| (0..100).filter(|_| asks.admit(client, 1).is_some()).count();
        // The clock may give one more meanwhile.
        let first = of("a");
        assert!((20..100).contains(&first), "{first}");
        assert!(of("b") >= 20);
        let held: Vec<_> = (0..32)
            .map_while(|n| asks.admit(&format!("c{n}"), 8))
            .collect();
        assert_eq!(held.len(), 4, "of 8 questions each");
    }
}
