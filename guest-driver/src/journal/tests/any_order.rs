//! A simulation in virtual time: a hostile host hands out any step of any goal in any order, the agent is killed between any two
//! writes, the clock jumps, and the journal is full, so that it forgets. An oracle that forgets nothing watches.
//!
//! It asserts: nothing runs twice; nothing runs of a goal that was forgotten; whatever is new, in time and in its turn, runs,
//! whatever numbers were admitted before it.

use std::collections::{BTreeMap, BTreeSet};

use adit_tasks::dsse::{Envelope, sign};
use adit_tasks::window::GOALS_MAX;
use adit_tasks::wire::Task;
use adit_tasks::{PublicKey, TrustStore, task_id};
use ed25519_dalek::SigningKey;
use jiff::Timestamp;

use super::*;
use crate::verify::{Denied, verify};

/// Steps of each simulated goal: both must run in their order.
const STEPS: [&str; 2] = ["one", "two"];
const ROUNDS: u64 = 1000;
const HOUR_MS: i64 = 3_600_000;

/// xorshift64: a failure is repeated by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

struct Goal {
    key: Vec<u8>,
    seq: u64,
    digest: [u8; 32],
    envelope: Vec<u8>,
    from_ms: i64,
    to_ms: i64,
}

impl Goal {
    fn task(&self, step: usize) -> Task {
        Task {
            task_id: task_id(&self.digest, &"web-1".parse().unwrap(), STEPS[step], 1),
            envelope: self.envelope.clone(),
            step_id: STEPS[step].into(),
            attempt: 1,
        }
    }

    fn origin(&self) -> Origin {
        Origin {
            key: self.key.clone(),
            seq: self.seq,
            digest: self.digest,
        }
    }
}

/// Goals of two keys, which use the same numbers, some of them twice.
fn goals(random: &mut Random) -> (Vec<Goal>, TrustStore) {
    let mut trusted = TrustStore::default();
    let mut goals = Vec::new();
    for seed in [1, 2] {
        let private = SigningKey::from_bytes(&[seed; 32]);
        let public = PublicKey::of(&private, "");
        let key = public.id().0.to_vec();
        trusted.add(public).unwrap();
        for n in 0..120 {
            let seq = match random.below(40) {
                0 => u64::MAX,
                _ => 1000 + random.below(400),
            };
            let from_ms = NOW_MS + (random.below(8) as i64 - 6) * HOUR_MS;
            let to_ms = NOW_MS + (random.below(8) as i64 + 2) * HOUR_MS;
            let time = |ms| Timestamp::from_millisecond(ms).unwrap().to_string();
            let steps = STEPS.map(|id| {
                serde_json::json!({"id": id, "script": {"interpreter": "/bin/sh", "script": n.to_string()}})
            });
            let goal = serde_json::json!({
                "goal_id": "01990000-0000-7000-8000-000000000001", "key_seq": seq, "audience": {"vms": ["web-1"]},
                "not_before": time(from_ms), "not_after": time(to_ms), "min_planner": 1, "steps": steps
            });
            let envelope = sign(goal.to_string().as_bytes(), &private).into_bytes();
            goals.push(Goal {
                key: key.clone(),
                seq,
                digest: Envelope::parse(&envelope).unwrap().digest(),
                envelope,
                from_ms,
                to_ms,
            });
        }
    }
    (goals, trusted)
}

/// Everything that ever happened.
#[derive(Default)]
struct Oracle {
    ran: BTreeMap<TaskId, u32>,
    done: BTreeSet<TaskId>,
    begun: BTreeSet<TaskId>,
    /// Admitted goals of a key: number to digest.
    admitted: BTreeMap<Vec<u8>, BTreeMap<u64, [u8; 32]>>,
    /// Numbers that the guest was seen to have forgotten.
    forgotten: BTreeMap<Vec<u8>, BTreeSet<u64>>,
}

impl Oracle {
    fn watch(&mut self, journal: &mut Journal) {
        for (key, admitted) in &self.admitted {
            let window = journal.window(key).unwrap();
            let forgotten = self.forgotten.entry(key.clone()).or_default();
            for &seq in admitted.keys() {
                match window.has(seq) {
                    true => assert!(!forgotten.contains(&seq), "{seq} came back"),
                    false => drop(forgotten.insert(seq)),
                }
            }
        }
    }

    /// Whether a step must run, if there is room for it.
    fn wants(&self, goal: &Goal, step: usize, now_ms: i64) -> bool {
        let none = BTreeMap::new();
        let admitted = self.admitted.get(&goal.key).unwrap_or(&none);
        let forgotten = self.forgotten.get(&goal.key);
        let ok = match admitted.get(&goal.seq) {
            Some(digest) => {
                *digest == goal.digest && !forgotten.is_some_and(|f| f.contains(&goal.seq))
            }
            None => {
                let floor = forgotten.and_then(|f| f.last());
                floor.is_none_or(|f| goal.seq > *f)
                    && admitted.range(goal.seq..).count() < GOALS_MAX
            }
        };
        let id = |step| goal.task(step).task_id;
        let turn = match step {
            0 => !self.begun.contains(&id(1)),
            _ => self.done.contains(&id(0)),
        };
        let in_time = (goal.from_ms..=goal.to_ms).contains(&now_ms);
        ok && turn && in_time && !self.begun.contains(&id(step))
    }
}

fn simulate(seed: u64) {
    let mut random = Random(seed);
    let (goals, trusted) = goals(&mut random);
    let me = "web-1".parse().unwrap();
    // In memory where there is such a place: it is written some thousand times.
    let shm = std::path::Path::new("/dev/shm");
    let dir = tempfile::tempdir_in(if shm.is_dir() { shm } else { "/tmp".as_ref() }).unwrap();
    std::fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    let open = || Journal::open(dir.path()).unwrap();
    let mut journal = open();
    let mut oracle = Oracle::default();
    // One key's window and the journal are all but full.
    let bulk = goals[0].key.clone();
    for n in 0..GOALS_MAX as u64 - 60 {
        let seq = 1200 - n;
        fill(&mut journal, &bulk, seq, n * 20..n * 20 + 20);
        let admitted = oracle.admitted.entry(bulk.clone()).or_default();
        admitted.insert(seq, [seq as u8; 32]);
    }
    let filled = (GOALS_MAX as u64 - 60) * 20;
    fill(&mut journal, b"third", 1, filled..JOURNAL_MAX - 20);
    let (mut now_ms, mut runs, mut refused) = (NOW_MS, 0, 0);
    for round in 0..ROUNDS {
        oracle.watch(&mut journal);
        if random.below(10) == 0 {
            now_ms = NOW_MS + (random.below(20) as i64 - 8) * HOUR_MS;
        }
        let goal = &goals[random.below(goals.len() as u64) as usize];
        let step = random.below(2) as usize;
        let task = goal.task(step);
        let id = task.task_id;
        let wants = oracle.wants(goal, step, now_ms);
        let context = format!("seed {seed}, round {round}: number {}", goal.seq);
        // As the runner does.
        if !matches!(journal.phase(&id).unwrap(), None | Some(Phase::Received)) {
            assert!(!wants, "{context}: known, and not begun");
            continue;
        }
        match verify(&task, &trusted, &me, now_ms, &mut journal, None) {
            Err(Denied::Refused(why)) => {
                assert!(!wants, "{context}: {why}");
                refused += u32::from(why.starts_with("replay: "));
                continue;
            }
            Err(Denied::NotYet { .. }) => {
                assert!(!wants, "{context}: held");
                continue;
            }
            Ok(_) => assert!(wants, "{context}: admitted"),
        }
        match journal.received(&id, &goal.origin()) {
            Ok(()) => {}
            Err(JournalError::Full) => continue,
            Err(e) => panic!("{context}: {e}"),
        }
        let admitted = oracle.admitted.entry(goal.key.clone()).or_default();
        admitted.insert(goal.seq, goal.digest);
        let killed_at = random.below(12);
        if killed_at == 0 {
            journal.db = None;
            journal = open();
            continue;
        }
        journal.started(&id, 1).unwrap();
        oracle.begun.insert(id);
        if killed_at != 1 {
            runs += 1;
            let ran = oracle.ran.entry(id).or_default();
            *ran += 1;
            assert_eq!(*ran, 1, "{context}: ran twice");
        }
        let ended = |outcome| Report {
            task_id: id,
            ..super::report(0, outcome)
        };
        if killed_at <= 2 {
            journal.db = None;
            journal = open();
            assert_eq!(journal.unfinished().unwrap(), [(id, 1)]);
            journal.result(&ended(Outcome::Interrupted)).unwrap();
        } else {
            journal.result(&ended(Outcome::Done)).unwrap();
            oracle.done.insert(id);
        }
        if random.below(8) > 0 {
            journal.acked(&id).unwrap();
        }
    }
    let forgotten: usize = oracle.forgotten.values().map(BTreeSet::len).sum();
    assert!(
        runs > 50 && refused > 20 && forgotten > 2,
        "{runs} {refused} {forgotten}"
    );
}

#[test]
fn r85_in_any_order_with_kills_and_a_clock_that_jumps_nothing_runs_twice_and_nothing_new_is_lost() {
    for seed in [1, 0x9e37_79b9_7f4a_7c15, 77] {
        simulate(seed);
    }
}
