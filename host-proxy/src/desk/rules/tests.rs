//! Each answer of the rules by itself, and all of them together in virtual time.

mod checks;
pub(in crate::desk) mod model;
pub(in crate::desk) mod world;

use super::*;
use model::Model;
use world::World;

const OUTCOMES: [Outcome; 5] = [
    Outcome::Done,
    Outcome::Failed,
    Outcome::TimedOut,
    Outcome::Interrupted,
    Outcome::Refused,
];

fn events() -> Vec<Event> {
    let times = [0, 99, 100, 101, SILENCE_MAX_MS + 101].map(|now_ms| Event::Time {
        now_ms,
        not_after_ms: 100,
    });
    let others = [
        Event::HandedOut,
        Event::Begun,
        Event::EarlierFailed,
        Event::VmRemoved,
    ];
    let reports = OUTCOMES.map(Event::Reported);
    [&times[..], &others, &reports].concat()
}

#[test]
fn a_task_only_goes_forward_and_a_terminal_state_stays() {
    let place = |state| TaskState::ALL.iter().position(|s| *s == state);
    for state in TaskState::ALL {
        for event in events() {
            match step(state, event) {
                Step::To(next) => {
                    assert!(!state.is_terminal(), "{state:?} {event:?}");
                    assert!(place(next) > place(state), "{state:?} {event:?}: {next:?}");
                }
                Step::Stays => {}
                Step::NotHandedOut => assert_eq!(state, TaskState::Queued, "{event:?}"),
            }
        }
        assert_eq!(due(state, 0).is_none(), state.is_terminal(), "{state:?}");
    }
}

#[test]
fn time_ends_a_task_in_the_millisecond_after_it_is_due() {
    for (state, end) in [
        (TaskState::Queued, TaskState::Expired),
        (TaskState::Leased, TaskState::LostContact),
        (TaskState::Started, TaskState::LostContact),
    ] {
        let not_after_ms = 100;
        let due = due(state, not_after_ms).unwrap();
        let at = |now_ms| {
            let time = Event::Time {
                now_ms,
                not_after_ms,
            };
            step(state, time)
        };
        assert_eq!((at(due), at(due + 1)), (Step::Stays, Step::To(end)));
        assert!(!why(end).is_empty());
    }
}

#[test]
fn only_an_interrupted_idempotent_step_runs_again_and_only_so_often() {
    for outcome in OUTCOMES {
        for attempt in 1..=ATTEMPTS_MAX + 1 {
            for (idempotent, go_on) in [(false, false), (false, true), (true, false), (true, true)]
            {
                let again = outcome == Outcome::Interrupted && idempotent && attempt < ATTEMPTS_MAX;
                let want = match outcome {
                    _ if again => After::Again(attempt + 1),
                    Outcome::Done => After::GoOn,
                    _ if go_on => After::GoOn,
                    _ => After::SkipRest,
                };
                assert_eq!(after(outcome, attempt, idempotent, go_on), want);
            }
        }
    }
}

fn candidate(goal: u8, key_seq: i64, state: TaskState, not_before_ms: i64) -> Candidate {
    Candidate {
        digest: [goal; 32],
        signer: "k".into(),
        key_seq,
        state,
        not_before_ms,
        not_after_ms: 100,
    }
}

#[test]
fn a_held_goal_holds_later_goals_of_its_key_only_for_a_guest_that_keeps_their_order() {
    let held = candidate(1, 5, TaskState::Queued, 50);
    let later = candidate(2, 6, TaskState::Queued, 0);
    let of_another_key = Candidate {
        signer: "other".into(),
        ..candidate(3, 7, TaskState::Queued, 0)
    };
    let takes = |overtake| {
        let mut choice = Choice::new(10, overtake, false);
        [&held, &later, &of_another_key].map(|task| choice.takes(task))
    };
    assert_eq!(takes(false), [false, false, true]);
    assert_eq!(takes(true), [false, true, true]);
}

#[test]
fn a_later_step_waits_for_an_earlier_one_that_is_passed_over() {
    // Its clock was set back: the goal is held again, and one step of it is still queued.
    let mut choice = Choice::new(10, true, false);
    let first = candidate(1, 5, TaskState::Queued, 50);
    assert!(!choice.takes(&first));
    let second = Candidate {
        not_before_ms: 0,
        ..first
    };
    assert!(!choice.takes(&second));
}

#[test]
fn a_locked_vm_gets_what_it_was_handed_and_nothing_new() {
    let mut choice = Choice::new(10, true, true);
    let queued = candidate(1, 5, TaskState::Queued, 0);
    let leased = candidate(1, 5, TaskState::Leased, 0);
    let started = candidate(2, 6, TaskState::Started, 0);
    let takes = [&queued, &leased, &started].map(|task| choice.takes(task));
    assert_eq!(takes, [false, true, true]);
}

#[test]
fn thousands_of_histories_in_virtual_time_keep_the_rules() {
    for seed in 0..4000 {
        World::new(seed, Model::default()).run(150);
    }
}

/// The worlds above notice a fault: with each of these the same seeds fail.
#[test]
fn planted_faults_are_found() {
    for fault in model::Fault::ALL {
        let found = (0..300).any(|seed| {
            let run = move || World::new(seed, Model::with(fault)).run(150);
            std::panic::catch_unwind(run).is_err()
        });
        assert!(found, "{fault:?}");
    }
}
