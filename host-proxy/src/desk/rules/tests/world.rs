//! A host, its guests and a watcher in virtual time: goals come, streams break, everything is killed, clocks are set.

use std::collections::BTreeMap;

use adit_api::TaskState;
use adit_tasks::wire::{Outcome, TaskId};
use adit_tasks::{Goal, task_id};
use jiff::Timestamp;

use super::OUTCOMES;
use super::model::Books;
use crate::desk::NewGoal;
use crate::desk::rules::ATTEMPTS_MAX;

/// Reproducible numbers (SplitMix64).
pub(in crate::desk) struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

const VMS: [&str; 2] = ["a", "b"];
pub(super) const HOUR_MS: u64 = 3_600_000;
const BEGIN_MS: i64 = 1_795_219_200_000;

/// What a guest's journal says of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Runs,
    Ended(Outcome),
}

/// A guest that checks what an honest one checks.
#[derive(Default)]
struct Guest {
    journal: BTreeMap<TaskId, Phase>,
    /// Not acknowledged.
    reports: Vec<(TaskId, Outcome)>,
    /// The highest number that was admitted, by key.
    last: BTreeMap<String, u64>,
    removed: bool,
}

/// The step of a goal for a VM.
#[derive(Clone, Copy)]
pub(super) struct Which {
    pub(super) goal: usize,
    step: usize,
}

pub(in crate::desk) struct World<B> {
    pub(super) seed: u64,
    rng: Rng,
    pub(super) now: i64,
    was_set_back: bool,
    pub(super) overtake: bool,
    pub(super) books: B,
    pub(super) goals: Vec<NewGoal>,
    /// Every task that there may be, with the place of its VM.
    known: BTreeMap<TaskId, (usize, Which)>,
    guests: [Guest; 2],
    /// What a watcher knows.
    pub(super) told: BTreeMap<TaskId, TaskState>,
}

impl<B: Books> World<B> {
    pub(in crate::desk) fn new(seed: u64, books: B) -> Self {
        let mut rng = Rng(seed);
        Self {
            seed,
            overtake: rng.one_in(2),
            rng,
            now: BEGIN_MS,
            was_set_back: false,
            books,
            goals: Vec::new(),
            known: BTreeMap::new(),
            guests: Default::default(),
            told: BTreeMap::new(),
        }
    }

    /// Lives for so many events, and then until nothing is open.
    pub(in crate::desk) fn run(mut self, events: u32) {
        for _ in 0..events {
            let vm = self.rng.below(2) as usize;
            match self.rng.below(100) {
                0..8 => self.goal_comes(),
                8..14 => self.time_passes(),
                14..18 => self.expires(),
                18..22 => self.host_is_killed(),
                22..24 => self.guest_is_rebooted(vm),
                24..28 => self.stray_report(vm),
                28 if self.rng.one_in(10) => self.vm_is_removed(vm),
                29..55 => self.pulls(vm),
                55..75 => self.says_begun(vm),
                75..88 => self.step_ends(vm),
                _ => self.reports(vm),
            }
            self.watcher_agrees();
        }
        self.drain();
    }

    fn goal_comes(&mut self) {
        let n = self.goals.len();
        if n == 12 {
            return;
        }
        let signer = ["k", "l"][self.rng.below(2) as usize];
        let from = self.now + self.rng.below(3 * HOUR_MS) as i64 - 2 * HOUR_MS as i64;
        let until = from + (HOUR_MS + self.rng.below(6 * HOUR_MS)) as i64;
        let time = |ms| Timestamp::from_millisecond(ms).unwrap().to_string();
        let steps = 1 + self.rng.below(3);
        let steps: Vec<_> = (0..steps)
            .map(|step| {
                let (idempotent, go_on) = (self.rng.one_in(2), self.rng.one_in(3));
                serde_json::json!({"id": format!("s{step}"), "idempotent": idempotent, "continue_on_error": go_on,
                    "script": {"interpreter": "/bin/sh", "script": "x"}})
            })
            .collect();
        let vms = &VMS[..1 + self.rng.below(2) as usize];
        let text = serde_json::json!({
            "goal_id": format!("01937b5e-0000-7000-8000-{n:012x}"), "key_seq": n + 1, "audience": {"vms": vms},
            "not_before": time(from), "not_after": time(until), "min_planner": 1, "steps": steps,
        });
        let mut digest = [n as u8; 32];
        // Goals of one number are in the order of their digests, which is not that in which they came.
        digest[0] = self.rng.next() as u8;
        self.goals.push(NewGoal {
            goal: Goal::parse_unverified(text.to_string().as_bytes()).unwrap(),
            digest,
            envelope: Vec::new(),
            signer: signer.into(),
            vms: vms.iter().map(|vm| vm.parse().unwrap()).collect(),
        });
        for (vm, step, attempt) in (0..18).map(|i| (i % 2, i / 6, 1 + i / 2 % 3)) {
            if step < self.goals[n].goal.steps.len() {
                let id = self.id(vm, n, step, attempt as u32);
                self.known.insert(id, (vm, Which { goal: n, step }));
            }
        }
        let new = &mut self.goals[n];
        new.vms
            .retain(|vm| !self.guests[usize::from(vm.as_str() == "b")].removed);
        let said = self.books.add_goal(&self.goals[n], self.now);
        self.hear(said);
        // Handed over again it changes nothing.
        let again = self.books.add_goal(&self.goals[n], self.now);
        assert!(again.is_empty(), "seed {}", self.seed);
    }

    /// In some worlds somebody sets the clock back.
    fn time_passes(&mut self) {
        let by = self.rng.below(HOUR_MS) as i64;
        if self.seed % 4 == 3 && self.rng.one_in(8) {
            self.was_set_back = true;
            self.now -= by;
        } else {
            self.now += by;
        }
    }

    fn expires(&mut self) {
        let (_, said) = self.books.expire(self.now);
        self.hear(said);
    }

    fn host_is_killed(&mut self) {
        self.books.killed();
        let now = self.books.states();
        for (id, state) in &now {
            let before = self.told[id];
            let in_memory = before == TaskState::Started && *state == TaskState::Leased;
            assert!(
                before == *state || in_memory,
                "seed {}: {before:?} {state:?}",
                self.seed
            );
        }
        assert_eq!(now.len(), self.told.len(), "seed {}", self.seed);
        self.told = now;
        // What runs is said again by each agent, before it says anything else.
        for vm in 0..2 {
            self.says_begun(vm);
        }
        for vm in 0..2 {
            let running = self.running(vm);
            let shown = running.map(|id| self.told[&id]);
            let open = shown.filter(|state| !state.is_terminal());
            assert!(
                open.is_none_or(|s| s == TaskState::Started),
                "seed {}: {open:?}",
                self.seed
            );
        }
    }

    fn guest_is_rebooted(&mut self, vm: usize) {
        if let Some(id) = self.running(vm) {
            self.end(vm, id, Outcome::Interrupted);
        }
    }

    fn vm_is_removed(&mut self, vm: usize) {
        self.guests[vm].removed = true;
        let said = self.books.remove_vm(VMS[vm], self.now);
        self.hear(said);
        let of_it = self
            .told
            .iter()
            .filter(|(id, _)| self.which(vm, id).is_some());
        for (_, state) in of_it {
            assert!(state.is_terminal(), "seed {}: {state:?}", self.seed);
        }
    }

    /// A guest reports a task that it never got, or another VM's.
    fn stray_report(&mut self, vm: usize) {
        let ids: Vec<TaskId> = self.told.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[self.rng.below(ids.len() as u64) as usize];
        let is_its_own = self.which(vm, &id).is_some();
        if !is_its_own || self.told[&id] == TaskState::Queued {
            assert!(self.books.begun(VMS[vm], id, self.now).is_empty());
            let taken = self.books.report(VMS[vm], id, Outcome::Done, self.now);
            assert_eq!(taken, None, "seed {}", self.seed);
        } else if self.told[&id].is_terminal() {
            let taken = self.books.report(VMS[vm], id, Outcome::Failed, self.now);
            assert_eq!(taken, Some(Vec::new()), "seed {}", self.seed);
        }
    }

    fn pulls(&mut self, vm: usize) {
        // An agent that runs a task, or has a report left, does not pull.
        if self.running(vm).is_some() || !self.guests[vm].reports.is_empty() {
            return;
        }
        let (next, said) = self.books.hand_out(VMS[vm], self.now, self.overtake);
        let is_first = !said.is_empty();
        self.hear(said);
        let Some(id) = next else {
            return self.nothing_could_go(vm);
        };
        let which = self.which(vm, &id).expect("a task of this VM");
        let new = &self.goals[which.goal];
        if is_first {
            let (from, until) = (new.goal.not_before, new.goal.not_after);
            let valid = from.as_millisecond()..=until.as_millisecond();
            assert!(valid.contains(&self.now), "seed {}", self.seed);
        }
        match self.guests[vm].journal.get(&id) {
            Some(Phase::Ended(outcome)) => {
                let report = (id, *outcome);
                self.guests[vm].reports.push(report);
            }
            Some(Phase::Runs) => unreachable!("it does not pull then"),
            // The stream may break on the way to the guest.
            None if self.rng.one_in(8) => {}
            None => self.admits(vm, id, which),
        }
    }

    /// The guest checks order and sequence, and never has to refuse.
    fn admits(&mut self, vm: usize, id: TaskId, which: Which) {
        let new = &self.goals[which.goal];
        let seq = new.goal.key_seq;
        let last = self.guests[vm].last.entry(new.signer.clone()).or_insert(0);
        if *last > seq && !self.overtake {
            // A goal was over, the next one of its key began, and then the clock was set back.
            assert!(self.was_set_back, "seed {}: a replay", self.seed);
            self.guests[vm].reports.push((id, Outcome::Refused));
            return;
        }
        *last = seq.max(*last);
        for step in 0..which.step {
            let ended = (1..=ATTEMPTS_MAX)
                .filter_map(|attempt| {
                    let id = self.id(vm, which.goal, step, attempt);
                    self.guests[vm].journal.get(&id)
                })
                .next_back();
            let go_on = new.goal.steps[step].continue_on_error;
            match ended {
                Some(Phase::Ended(Outcome::Done)) => {}
                Some(Phase::Ended(_)) if go_on => {}
                other => panic!("seed {}: out of order after {other:?}", self.seed),
            }
        }
        self.guests[vm].journal.insert(id, Phase::Runs);
    }

    fn says_begun(&mut self, vm: usize) {
        if let Some(id) = self.running(vm) {
            let said = self.books.begun(VMS[vm], id, self.now);
            self.hear(said);
        }
    }

    fn step_ends(&mut self, vm: usize) {
        if let Some(id) = self.running(vm) {
            let outcome = match self.rng.one_in(2) {
                true => Outcome::Done,
                false => OUTCOMES[self.rng.below(5) as usize],
            };
            self.end(vm, id, outcome);
        }
    }

    fn end(&mut self, vm: usize, id: TaskId, outcome: Outcome) {
        let guest = &mut self.guests[vm];
        guest.journal.insert(id, Phase::Ended(outcome));
        guest.reports.push((id, outcome));
    }

    fn reports(&mut self, vm: usize) {
        let Some(&(id, outcome)) = self.guests[vm].reports.first() else {
            return;
        };
        let said = self.books.report(VMS[vm], id, outcome, self.now);
        self.hear(said.expect("it was handed out"));
        assert!(self.told[&id].is_terminal(), "seed {}", self.seed);
        // The acknowledgement may be lost.
        if !self.rng.one_in(8) {
            self.guests[vm].reports.remove(0);
        }
    }

    fn running(&self, vm: usize) -> Option<TaskId> {
        let mut journal = self.guests[vm].journal.iter();
        journal.find_map(|(id, phase)| (*phase == Phase::Runs).then_some(*id))
    }

    pub(super) fn id(&self, vm: usize, goal: usize, step: usize, attempt: u32) -> TaskId {
        let new = &self.goals[goal];
        task_id(
            &new.digest,
            &VMS[vm].parse().unwrap(),
            &new.goal.steps[step].id,
            attempt,
        )
    }

    pub(super) fn which(&self, vm: usize, id: &TaskId) -> Option<Which> {
        let known = self.known.get(id).filter(|(of, _)| *of == vm);
        known.map(|(_, which)| *which)
    }
}
