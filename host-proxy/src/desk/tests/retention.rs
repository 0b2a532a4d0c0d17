//! What has ended is kept within its limits, and listed in pages.

use super::*;

/// Lets a VM's goals end, each with so many bytes of output.
pub(super) fn ended(c: &Connection, n: std::ops::Range<u8>, bytes: usize) {
    for n in n {
        change::add_goal(c, &goal(n, n.into()), BEFORE, 1000).unwrap();
        for _ in 0..2 {
            let id = lease(c, "web-1", BEFORE).unwrap().unwrap().task_id;
            let mut report = report(id, Outcome::Done);
            report.stdout.head = vec![b'x'; bytes];
            finish(c, "web-1", &report, BEFORE + i64::from(n)).unwrap();
        }
    }
}

fn count(c: &Connection, table: &str) -> u32 {
    c.query_row(&format!("SELECT count(*) FROM {table}"), [], |r| r.get(0))
        .unwrap()
}

#[test]
fn r112_a_vm_keeps_its_newest_tasks_within_its_quota_of_number_and_bytes() {
    let keep = Keep {
        age_ms: 1000,
        tasks: 10,
        bytes: 5000,
    };
    let c = open();
    ended(&c, 1..9, 1);
    let (gone, of_another) = (
        trim(&c, "web-1", &keep).unwrap(),
        trim(&c, "web-2", &keep).unwrap(),
    );
    assert_eq!((gone, of_another), (6, 0));
    // A goal is gone with its last task.
    assert_eq!((count(&c, "tasks"), count(&c, "goals")), (10, 5));
    let c = open();
    ended(&c, 1..4, 1000);
    assert_eq!(trim(&c, "web-1", &keep).unwrap(), 1);
    // The newest one stays, however much it is.
    let little = Keep { bytes: 1, ..keep };
    assert_eq!(
        (trim(&c, "web-1", &little).unwrap(), count(&c, "tasks")),
        (4, 1)
    );
}

#[test]
fn r112_what_ended_long_ago_is_forgotten_and_what_is_open_never() {
    let keep = Keep {
        age_ms: 1000,
        tasks: 1,
        bytes: 0,
    };
    let c = open();
    ended(&c, 1..3, 1);
    // The first step of the third has ended, and its second is open.
    add_goal(&c, &goal(3, 3)).unwrap();
    let id = lease(&c, "web-1", BEFORE).unwrap().unwrap().task_id;
    finish(&c, "web-1", &report(id, Outcome::Done), BEFORE).unwrap();
    let (gone, next) = retire(&c, &keep, BEFORE + 1000).unwrap();
    assert_eq!((gone, next.is_some()), (0, true));
    let (gone, _) = retire(&c, &keep, BEFORE + 1_000_000).unwrap();
    assert_eq!((gone, count(&c, "goals")), (4, 1));
    assert_eq!(trim(&c, "web-1", &keep).unwrap(), 0);
    assert_eq!(states(&c).len(), 2);
}

#[test]
fn r112_a_list_comes_in_pages_and_each_task_once() {
    let c = open();
    ended(&c, 1..9, 1);
    let all = tasks(&c, &Filter::default()).unwrap();
    let (mut got, mut after) = (Vec::new(), Some(0));
    while let Some(at) = after {
        let (some, next) = page(&c, &Filter::default(), at, 5).unwrap();
        assert!(some.len() <= 5 && !some.is_empty());
        got.extend(some);
        after = next;
    }
    assert_eq!(got, all);
    let id = all[3].task_id.clone();
    let by_id = |digits: &str| {
        let filter = Filter {
            id: page::id_range(digits),
            ..Filter::default()
        };
        tasks(&c, &filter).unwrap()
    };
    assert_eq!(by_id(&id)[0], all[3]);
    assert!(by_id(&id[..7]).contains(&all[3]));
    for wrong in ["x", "0g", &format!("{id}0")] {
        assert!(page::id_range(wrong).is_none(), "{wrong}");
    }
}
