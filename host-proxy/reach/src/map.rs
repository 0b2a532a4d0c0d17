//! `VmMap`: what other hosts say of where VMs are, for as long as it counts. Pure: no clock, no socket; times are milliseconds of the
//! caller's clock, and who is to be asked is a value.
//!
//! ```text
//!  look(vm) ─┬─ Known(place)                 nobody is waited for
//!            ├─ Known(place), ask(hosts)     the same, and these are asked besides: what is known gets old, or is the own VM's
//!            └─ Ask(hosts)                   these are to be asked first, then look again
//!  heard(vm, host, claim | none) · forget(vm, host)
//! ```
//! A VM that has a row in a file is where that says, and nobody is asked for it.
//!
//! A host that does not answer is no host that says no: what it said last counts until [`OLD_MS`], and then it says nothing. What is
//! kept is bounded ([`NAMES_MAX`]); the oldest makes room.

use std::collections::{BTreeMap, HashMap};

use adit_names::VmId;

use super::resolve::{Claim, Place, choose};
use super::rows::Rows;

/// How long an answer counts without another question.
pub const FRESH_MS: u64 = 5_000;
/// How long one counts at most, while its host cannot be asked.
pub const OLD_MS: u64 = 30_000;
/// How long nobody is asked again who did not answer.
pub const SILENT_MS: u64 = 1_000;
/// Names of which something is kept.
pub const NAMES_MAX: usize = 8_192;

/// What is known.
#[derive(Debug, Default)]
pub struct VmMap {
    hosts: Vec<VmId>,
    rows: Rows,
    names: HashMap<VmId, Known>,
}

#[derive(Debug, Default)]
struct Known {
    of: BTreeMap<VmId, Said>,
    /// When something of it was heard last.
    at_ms: u64,
}

#[derive(Clone, Debug)]
struct Said {
    claim: Option<Claim<VmId>>,
    /// When it was said.
    at_ms: u64,
    /// When it was asked last; it may not have answered.
    asked_ms: u64,
    has_spoken: bool,
}

/// What a look finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Where the VM is; none: these hosts are to be asked first.
    pub place: Option<Place<VmId>>,
    /// Whom to ask.
    pub ask: Vec<VmId>,
}

impl VmMap {
    /// Asks these hosts from now on. What others have said is forgotten.
    pub fn set_hosts(&mut self, hosts: Vec<VmId>) {
        self.hosts = hosts;
        self.names.clear();
    }

    /// VMs that are at these hosts, which are not asked for them.
    pub fn set_rows(&mut self, rows: Rows) {
        self.rows = rows;
    }

    /// What the file says.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// What the file says of a VM: as if its host had said it just now, of a guest that runs.
    fn row(&self, vm: &VmId) -> Option<Claim<VmId>> {
        self.rows.get(vm).map(|host| Claim {
            host: host.clone(),
            live: true,
            generation: None,
        })
    }

    /// Where a VM is. `own`: this host's claim; `at`: the only host that is meant.
    pub fn look(
        &mut self,
        vm: &VmId,
        own: Option<&Claim<VmId>>,
        at: Option<&VmId>,
        now_ms: u64,
    ) -> Look {
        if let Some((at, own)) = at.zip(own).filter(|(at, own)| own.host == **at) {
            let _ = own;
            return Look {
                place: Some(Place::At(at.clone())),
                ask: vec![],
            };
        }
        let known = self.names.get(vm);
        let mut claims: Vec<Claim<VmId>> = own.into_iter().cloned().collect();
        if let Some(row) = self.row(vm) {
            claims.push(row);
            claims.retain(|claim| at.is_none_or(|at| claim.host == *at));
            return Look {
                place: Some(choose(&claims)),
                ask: vec![],
            };
        }
        let (mut ask, mut is_first) = (vec![], false);
        for host in self
            .hosts
            .iter()
            .filter(|host| at.is_none_or(|at| at == *host))
        {
            let said = known.and_then(|known| known.of.get(host));
            let age = |since: u64| now_ms.saturating_sub(since);
            let counts = said.filter(|said| said.has_spoken && age(said.at_ms) < OLD_MS);
            let is_fresh = counts.is_some_and(|said| age(said.at_ms) < FRESH_MS);
            let is_asked = said.is_some_and(|said| age(said.asked_ms) < SILENT_MS);
            if !is_fresh && !is_asked {
                ask.push(host.clone());
                is_first |= counts.is_none();
            }
            claims.extend(counts.and_then(|said| said.claim.clone()));
        }
        if let Some(at) = at {
            claims.retain(|claim| claim.host == *at);
        }
        // Nobody waits for others where a VM of this host runs: they are asked besides.
        let waits = is_first && !own.is_some_and(|own| own.live && at.is_none());
        Look {
            place: (!waits).then(|| choose(&claims)),
            ask,
        }
    }

    /// A host is asked. Until it answers, or [`SILENT_MS`] are over, it is not asked again.
    pub fn asked(&mut self, vm: &VmId, host: &VmId, now_ms: u64) {
        let said = self.entry(vm, host, now_ms);
        said.asked_ms = now_ms;
    }

    /// A host has said that it has a VM, or that it has none of that name.
    pub fn heard(&mut self, vm: &VmId, host: &VmId, claim: Option<Claim<VmId>>, now_ms: u64) {
        if !self.hosts.contains(host) {
            return;
        }
        let said = self.entry(vm, host, now_ms);
        (said.claim, said.at_ms, said.has_spoken) = (claim, now_ms, true);
    }

    /// The host that was to have a VM has said otherwise: it is asked again before it is believed.
    pub fn forget(&mut self, vm: &VmId, host: &VmId) {
        if let Some(known) = self.names.get_mut(vm) {
            known.of.remove(host);
        }
    }

    /// What others claim of a VM, as far as it counts.
    pub fn claims(&self, vm: &VmId, now_ms: u64) -> Vec<Claim<VmId>> {
        if let Some(row) = self.row(vm) {
            return vec![row];
        }
        let said = self
            .names
            .get(vm)
            .into_iter()
            .flat_map(|known| known.of.values());
        let counts =
            said.filter(|said| said.has_spoken && now_ms.saturating_sub(said.at_ms) < OLD_MS);
        counts.filter_map(|said| said.claim.clone()).collect()
    }

    /// Hosts of which nothing counts that they said of a VM.
    pub fn unheard(&self, vm: &VmId, now_ms: u64) -> Vec<VmId> {
        if self.rows.contains_key(vm) {
            return vec![];
        }
        let known = self.names.get(vm);
        let counts = |host: &&VmId| {
            let said = known.and_then(|known| known.of.get(*host));
            said.is_some_and(|said| said.has_spoken && now_ms.saturating_sub(said.at_ms) < OLD_MS)
        };
        let hosts = self.hosts.iter().filter(|host| !counts(host));
        hosts.cloned().collect()
    }

    fn entry(&mut self, vm: &VmId, host: &VmId, now_ms: u64) -> &mut Said {
        if self.names.len() >= NAMES_MAX && !self.names.contains_key(vm) {
            // In pieces, so that a flood of names does not look at all of them each time.
            let mut ages: Vec<_> = self.names.values().map(|known| known.at_ms).collect();
            let nth = ages.len() / 8;
            let (_, oldest, _) = ages.select_nth_unstable(nth);
            let oldest = *oldest;
            let mut left = nth + 1;
            self.names.retain(|_, known| {
                let goes = known.at_ms <= oldest && left > 0;
                left -= usize::from(goes);
                !goes
            });
        }
        let known = self.names.entry(vm.clone()).or_default();
        known.at_ms = now_ms;
        known.of.entry(host.clone()).or_insert(Said {
            claim: None,
            at_ms: now_ms,
            asked_ms: now_ms,
            has_spoken: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> VmId {
        text.parse().unwrap()
    }

    fn claim(host: &str, live: bool) -> Claim<VmId> {
        Claim {
            host: name(host),
            live,
            generation: None,
        }
    }

    fn map() -> VmMap {
        let mut map = VmMap::default();
        map.set_hosts(vec![name("beta"), name("gamma")]);
        map
    }

    /// Asks those who are to be asked, of whom each says this.
    fn ask(map: &mut VmMap, vm: &VmId, has: &[&str], now: u64) -> Look {
        let look = map.look(vm, None, None, now);
        for host in &look.ask {
            map.asked(vm, host, now);
            let claim = has
                .contains(&host.as_str())
                .then(|| claim(host.as_str(), true));
            map.heard(vm, host, claim, now);
        }
        look
    }

    #[test]
    fn an_answer_counts_for_a_while_also_one_that_says_no() {
        let (mut map, vm) = (map(), name("web-9"));
        let look = ask(&mut map, &vm, &["beta"], 0);
        assert_eq!((look.place, look.ask.len()), (None, 2));
        let look = map.look(&vm, None, None, FRESH_MS - 1);
        assert_eq!(
            (look.place, look.ask.len()),
            (Some(Place::At(name("beta"))), 0)
        );
        // Then both are asked again, and meanwhile it is where it was.
        let look = map.look(&vm, None, None, FRESH_MS);
        assert_eq!(
            (look.place, look.ask.len()),
            (Some(Place::At(name("beta"))), 2)
        );
        assert_eq!(map.look(&vm, None, None, OLD_MS).place, None);
        let look = ask(&mut map, &vm, &[], OLD_MS);
        assert_eq!(look.ask.len(), 2);
        assert_eq!(
            map.look(&vm, None, None, OLD_MS + 1).place,
            Some(Place::Unknown)
        );
    }

    #[test]
    fn r126_what_the_owner_takes_back_is_asked_again_and_a_silent_host_is_not_waited_for_twice() {
        let (mut map, vm) = (map(), name("web-9"));
        ask(&mut map, &vm, &["beta"], 0);
        map.forget(&vm, &name("beta"));
        let look = map.look(&vm, None, None, 1);
        assert_eq!((look.place, look.ask), (None, vec![name("beta")]));
        map.asked(&vm, &name("beta"), 1);
        let look = map.look(&vm, None, None, 2);
        assert_eq!((look.place, look.ask), (Some(Place::Unknown), vec![]));
        let look = map.look(&vm, None, None, 1 + SILENT_MS);
        assert_eq!((look.place, look.ask), (None, vec![name("beta")]));
    }

    #[test]
    fn a_vm_that_runs_here_waits_for_nobody_and_others_who_claim_it_are_heard() {
        let (mut map, vm, own) = (map(), name("web-1"), claim("alpha", true));
        let look = map.look(&vm, Some(&own), None, 0);
        assert_eq!(
            (look.place, look.ask.len()),
            (Some(Place::At(name("alpha"))), 2)
        );
        map.heard(&vm, &name("beta"), Some(claim("beta", true)), 0);
        let look = map.look(&vm, Some(&own), None, 1);
        let both = Place::Ambiguous(vec![name("alpha"), name("beta")]);
        assert_eq!(look.place, Some(both));
        for host in ["alpha", "beta"] {
            let look = map.look(&vm, Some(&own), Some(&name(host)), 1);
            assert_eq!(
                (look.place, look.ask.len()),
                (Some(Place::At(name(host))), 0),
                "{host}"
            );
        }
        // Its own entry is dead: the other one has it.
        let dead = claim("alpha", false);
        map.heard(&vm, &name("gamma"), None, 1);
        let look = map.look(&vm, Some(&dead), None, 1);
        assert_eq!(look.place, Some(Place::At(name("beta"))));
        assert_eq!(map.claims(&vm, 1), [claim("beta", true)]);
        // A host that is no peer, or no longer.
        map.set_hosts(vec![name("gamma")]);
        map.heard(&vm, &name("beta"), Some(claim("beta", true)), 2);
        assert!(map.claims(&vm, 2).is_empty());
        let look = map.look(&vm, None, Some(&name("beta")), 2);
        assert_eq!((look.place, look.ask), (Some(Place::Unknown), vec![]));
    }

    #[test]
    fn who_has_said_nothing_of_a_vm_is_known() {
        let (mut map, vm) = (map(), name("web-9"));
        assert_eq!(map.unheard(&vm, 0), [name("beta"), name("gamma")]);
        map.asked(&vm, &name("beta"), 0);
        map.heard(&vm, &name("gamma"), None, 0);
        assert_eq!(map.unheard(&vm, 1), [name("beta")]);
        assert_eq!(map.unheard(&vm, OLD_MS), [name("beta"), name("gamma")]);
    }

    #[test]
    fn a_vm_with_a_row_is_where_that_says_and_nobody_is_asked_for_it() {
        let (mut map, vm, beta) = (map(), name("web-9"), name("beta"));
        map.set_rows([(vm.clone(), beta.clone())].into());
        map.heard(&vm, &name("gamma"), Some(claim("gamma", true)), 0);
        map.forget(&vm, &beta);
        let mut place = |own: Option<&Claim<VmId>>, at: Option<&str>| {
            let look = map.look(&vm, own, at.map(name).as_ref(), OLD_MS);
            assert!(look.ask.is_empty());
            look.place.unwrap()
        };
        assert_eq!(place(None, None), Place::At(beta.clone()));
        assert_eq!(place(None, Some("beta")), Place::At(beta.clone()));
        assert_eq!(place(None, Some("gamma")), Place::Unknown);
        // This host has it too.
        let (dead, live) = (claim("alpha", false), claim("alpha", true));
        assert_eq!(place(Some(&dead), None), Place::At(beta.clone()));
        let both = Place::Ambiguous(vec![name("alpha"), beta.clone()]);
        assert_eq!(place(Some(&live), None), both);
        assert_eq!(place(Some(&live), Some("alpha")), Place::At(name("alpha")));
        assert!(map.unheard(&vm, OLD_MS).is_empty());
        assert_eq!(map.claims(&vm, OLD_MS), [claim("beta", true)]);
        let look = map.look(&name("web-8"), None, None, 0);
        assert_eq!((look.place, look.ask.len()), (None, 2));
    }

    #[test]
    fn a_host_that_has_not_answered_has_not_said_no() {
        let (mut map, vm) = (map(), name("web-9"));
        let (beta, gamma) = (name("beta"), name("gamma"));
        map.asked(&vm, &gamma, 0);
        map.heard(&vm, &beta, None, 0);
        assert!(map.unheard(&vm, 0).iter().eq([&gamma]));
        map.heard(&vm, &gamma, None, 0);
        assert!(map.unheard(&vm, OLD_MS - 1).is_empty());
        assert_eq!(map.unheard(&vm, OLD_MS).len(), 2);
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_makes_room() {
        let mut map = map();
        for n in 0..3 * NAMES_MAX as u64 {
            map.heard(&name(&format!("x{n}")), &name("beta"), None, n);
            assert!(map.names.len() <= NAMES_MAX);
        }
        assert!(
            map.names
                .contains_key(&name(&format!("x{}", 3 * NAMES_MAX - 1)))
        );
        // All at the same time.
        for n in 0..NAMES_MAX {
            map.heard(&name(&format!("y{n}")), &name("beta"), None, 9);
            assert!(map.names.len() <= NAMES_MAX);
        }
    }

    proptest! {
        #[test]
        fn a_look_after_the_answers_needs_nobody(
            has in proptest::collection::vec(any::<(bool, bool)>(), 2),
            own in proptest::option::of(any::<bool>()),
        ) {
            let (mut map, vm) = (map(), name("a"));
            let own = own.map(|live| claim("alpha", live));
            for (host, (has, live)) in ["beta", "gamma"].into_iter().zip(has) {
                map.asked(&vm, &name(host), 7);
                map.heard(&vm, &name(host), has.then(|| claim(host, live)), 7);
            }
            let look = map.look(&vm, own.as_ref(), None, 8);
            prop_assert!(look.place.is_some() && look.ask.is_empty());
            prop_assert_eq!(&map.look(&vm, own.as_ref(), None, 9), &look);
        }
    }
}
