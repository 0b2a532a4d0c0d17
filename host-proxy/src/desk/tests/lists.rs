//! Lists of the newest tasks and goals, and goals whose time is over.

use super::retention::ended;
use super::*;

#[test]
fn the_newest_come_in_pages_from_the_end_and_each_task_once() {
    let c = open();
    ended(&c, 1..9, 1);
    let all = tasks(&c, &Filter::default()).unwrap();
    let (mut got, mut before) = (Vec::new(), Some(i64::MAX));
    while let Some(at) = before {
        let (mut some, earlier) = page::newest(&c, &Filter::default(), at, 5).unwrap();
        assert!(some.len() <= 5 && !some.is_empty());
        some.extend(got);
        got = some;
        before = earlier;
    }
    assert_eq!(got, all);
}

#[test]
fn a_goal_in_a_list_counts_each_step_once_by_its_last_attempt() {
    let c = open();
    add_goal(&c, &goal(1, 1)).unwrap();
    let run = |outcome| {
        let id = lease(&c, "web-1", BEFORE).unwrap().unwrap().task_id;
        finish(&c, "web-1", &report(id, outcome), BEFORE).unwrap();
    };
    let counts = || {
        let (goals, earlier) = goals::newest(&c, None, None, i64::MAX, 10).unwrap();
        assert_eq!((goals.len(), earlier), (1, None));
        assert_eq!((goals[0].vms, goals[0].steps), (1, 2));
        (goals[0].open, goals[0].done, goals[0].failed)
    };
    assert_eq!(counts(), (2, 0, 0));
    run(Outcome::Done);
    run(Outcome::Interrupted);
    // The second step is tried again: it has not failed.
    assert_eq!(counts(), (1, 1, 0));
    run(Outcome::Done);
    assert_eq!(counts(), (0, 2, 0));
}

#[test]
fn goals_are_found_by_their_last_digits_and_come_in_pages() {
    let c = open();
    for n in 1..6 {
        change::add_goal(&c, &goal(n, n.into()), BEFORE, 99).unwrap();
    }
    let ids = |goals: &[adit_api::GoalSummary]| -> Vec<char> {
        goals
            .iter()
            .filter_map(|g| g.goal_id.chars().last())
            .collect()
    };
    let (some, earlier) = goals::newest(&c, None, None, i64::MAX, 2).unwrap();
    assert_eq!(ids(&some), ['4', '5']);
    let (some, earlier) = goals::newest(&c, None, None, earlier.unwrap(), 3).unwrap();
    assert_eq!((ids(&some), earlier), (vec!['1', '2', '3'], None));
    for (digits, found) in [("3", 1), ("0003", 1), ("00000", 0), ("%", 0), ("_3", 0)] {
        let (some, _) = goals::newest(&c, Some(digits), None, i64::MAX, 9).unwrap();
        assert_eq!(some.len(), found, "{digits}");
    }
}

#[test]
fn a_goal_whose_time_is_over_is_refused_unless_it_is_known_already() {
    let c = open();
    let late = |new: &NewGoal| change::add_goal(&c, new, AFTER, 8);
    let refused = late(&goal(1, 1));
    assert!(matches!(refused, Err(DeskError::GoalExpired { .. })));
    add_goal(&c, &goal(2, 2)).unwrap();
    assert!(late(&goal(2, 2)).unwrap().is_empty());
    // For another VM it comes too late.
    let other = NewGoal {
        vms: vec!["web-2".parse().unwrap()],
        ..goal(2, 2)
    };
    assert!(matches!(late(&other), Err(DeskError::GoalExpired { .. })));
    assert_eq!(states(&c).len(), 2);
}
