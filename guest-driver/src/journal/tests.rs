//! The journal's promises: an id starts once, results wait for their acknowledgement, what is dropped cannot return.

use super::*;

mod any_order;
mod damage;

/// 2026.
const NOW_MS: i64 = 1_795_219_200_000;

fn id(n: u64) -> TaskId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&n.to_le_bytes());
    id
}

fn origin(seq: u64) -> Origin {
    Origin {
        key: b"k".to_vec(),
        seq,
        digest: [seq as u8; 32],
    }
}

fn report(n: u64, outcome: Outcome) -> Report {
    Report {
        task_id: id(n),
        outcome,
        exit: Some(0),
        reason: String::new(),
        started_ms: 1,
        ended_ms: 2,
        stdout: Default::default(),
        stderr: Default::default(),
        boot_nonce: [0; 16],
    }
}

#[test]
fn a_task_passes_each_phase_once_and_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Journal::open(dir.path()).unwrap();
    open().received(&id(1), &origin(7)).unwrap();
    assert_eq!(open().phase(&id(1)).unwrap(), Some(Phase::Received));
    open().started(&id(1), 5).unwrap();
    assert!(open().started(&id(1), 6).is_err(), "started twice");
    open().received(&id(1), &origin(7)).unwrap();
    assert_eq!(open().unfinished().unwrap(), [(id(1), 5)]);
    open().result(&report(1, Outcome::Done)).unwrap();
    assert!(
        open().result(&report(1, Outcome::Failed)).is_err(),
        "two results"
    );
    assert_eq!(open().unacknowledged().unwrap(), [report(1, Outcome::Done)]);
    open().acked(&id(1)).unwrap();
    open().acked(&id(1)).unwrap();
    open().acked(&id(99)).unwrap();
    assert_eq!(
        open().phase(&id(1)).unwrap(),
        Some(Phase::Acked(Outcome::Done))
    );
    assert!(open().unacknowledged().unwrap().is_empty());
    assert_eq!(open().window(b"k").unwrap().last(), Some((7, [7; 32])));
}

#[test]
fn a_lower_number_is_admitted_after_a_higher_one_and_another_goal_of_a_number_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.received(&id(1), &origin(9)).unwrap();
    journal.received(&id(2), &origin(3)).unwrap();
    let other = Origin {
        digest: [0; 32],
        ..origin(3)
    };
    let refused = journal.received(&id(3), &other);
    assert!(matches!(refused, Err(JournalError::Replay { key_seq: 3 })));
    assert_eq!(journal.phase(&id(3)).unwrap(), None);
    drop(journal);
    let mut journal = Journal::open(dir.path()).unwrap();
    let window = journal.window(b"k").unwrap();
    assert!(window.has(3) && window.has(9) && window.floor().is_none());
    // Two keys may have the same number.
    assert_eq!(journal.window(b"other").unwrap(), Window::default());
    let other = Origin {
        key: b"other".to_vec(),
        ..other
    };
    journal.received(&id(3), &other).unwrap();
}

#[test]
fn r85_only_what_the_floor_refuses_is_ever_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    // Every entry is of the key's highest sequence.
    fill(&mut journal, b"k", 5, 0..JOURNAL_MAX);
    assert!(matches!(
        journal.received(&id(JOURNAL_MAX), &origin(5)),
        Err(JournalError::Full)
    ));
    assert_eq!(journal.phase(&id(JOURNAL_MAX)).unwrap(), None);
    // A newer goal makes the older ones refusable, and so droppable, oldest first.
    journal.received(&id(JOURNAL_MAX), &origin(6)).unwrap();
    assert_eq!(journal.phase(&id(0)).unwrap(), None);
    assert_eq!(
        journal.phase(&id(1)).unwrap(),
        Some(Phase::Acked(Outcome::Done))
    );
}

/// Entries of tasks that have ended and were acknowledged, in one transaction.
fn fill(journal: &mut Journal, key: &[u8], seq: u64, tasks: std::ops::Range<u64>) {
    journal
        .with(|db| {
            let tx = db.begin_write().map_err(any)?;
            {
                let mut table = tx.open_table(TASKS).map_err(any)?;
                let mut order = tx.open_table(ORDER).map_err(any)?;
                let first = order.last().map_err(any)?.map_or(0, |(k, _)| k.value() + 1);
                for (at, n) in (first..).zip(tasks) {
                    let entry = Entry {
                        order: at,
                        key: key.to_vec(),
                        seq,
                        phase: Phase::Acked(Outcome::Done),
                    };
                    table
                        .insert(&id(n), encode(&entry)?.as_slice())
                        .map_err(any)?;
                    order.insert(at, &id(n)).map_err(any)?;
                }
                let goal = Origin {
                    key: key.to_vec(),
                    ..origin(seq)
                };
                windows::admit(&tx, &goal)?;
            }
            windows::set_mark(&tx)?;
            Ok(tx.commit().map_err(any)?)
        })
        .unwrap();
}

#[test]
fn a_task_that_was_dropped_is_refused_as_a_replay_and_a_result_that_nobody_has_is_never_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let private = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
    let public = adit_tasks::PublicKey::of(&private, "test");
    let key = public.id().0;
    let mut trusted = adit_tasks::TrustStore::default();
    trusted.add(public).unwrap();
    let me = "web-1".parse().unwrap();
    let order = |seq: u64| {
        let goal = serde_json::json!({
            "goal_id": "01990000-0000-7000-8000-000000000001", "key_seq": seq, "audience": {"vms": ["web-1"]},
            "not_before": "2020-01-01T00:00:00Z", "not_after": "2120-01-01T00:00:00Z", "min_planner": 1,
            "steps": [{"id": "it", "script": {"interpreter": "/bin/sh", "script": "true"}}]
        });
        let envelope = adit_tasks::dsse::sign(goal.to_string().as_bytes(), &private).into_bytes();
        let digest = adit_tasks::dsse::Envelope::parse(&envelope)
            .unwrap()
            .digest();
        let task_id = adit_tasks::task_id(&digest, &me, "it", 1);
        let origin = Origin {
            key: key.to_vec(),
            seq,
            digest,
        };
        let step_id = "it".to_owned();
        (
            adit_tasks::wire::Task {
                task_id,
                envelope,
                step_id,
                attempt: 1,
            },
            origin,
        )
    };
    // The first ran and the host has it; of the second the host has nothing yet. Their goals do not expire for a century.
    for (seq, acked) in [(1, true), (2, false)] {
        let (task, origin) = order(seq);
        crate::verify::verify(&task, &trusted, &me, NOW_MS, &mut journal, None).unwrap();
        journal.received(&task.task_id, &origin).unwrap();
        journal.started(&task.task_id, 1).unwrap();
        let ended = Report {
            task_id: task.task_id,
            ..report(0, Outcome::Done)
        };
        journal.result(&ended).unwrap();
        if acked {
            journal.acked(&task.task_id).unwrap();
        }
    }
    fill(&mut journal, &key, 3, 2..JOURNAL_MAX);
    journal
        .received(
            &id(JOURNAL_MAX),
            &Origin {
                key: key.to_vec(),
                seq: 4,
                digest: [4; 32],
            },
        )
        .unwrap();
    let ((dropped, _), (kept, _)) = (order(1), order(2));
    assert_eq!(journal.phase(&dropped.task_id).unwrap(), None);
    let denied = crate::verify::verify(&dropped, &trusted, &me, NOW_MS, &mut journal, None);
    let crate::verify::Denied::Refused(why) = denied.unwrap_err() else {
        panic!("held")
    };
    assert!(why.starts_with("replay: "), "{why}");
    assert!(matches!(
        journal.phase(&kept.task_id).unwrap(),
        Some(Phase::Result(_))
    ));
    // Of the others the oldest go.
    assert_eq!(
        journal.phase(&id(2)).unwrap(),
        Some(Phase::Acked(Outcome::Done))
    );
    journal
        .received(
            &id(JOURNAL_MAX + 1),
            &Origin {
                key: key.to_vec(),
                seq: 4,
                digest: [4; 32],
            },
        )
        .unwrap();
    assert_eq!(journal.phase(&id(2)).unwrap(), None);
    assert!(matches!(
        journal.phase(&kept.task_id).unwrap(),
        Some(Phase::Result(_))
    ));
}

#[test]
fn r100_a_file_that_is_no_journal_is_named_as_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE), vec![0xa5; 8192]).unwrap();
    assert!(matches!(
        Journal::open(dir.path()),
        Err(JournalError::Corrupt(_))
    ));
}

#[test]
fn r102_a_journal_of_a_newer_agent_is_named_so_and_not_taken_for_an_empty_one() {
    let has_table = |name: &str| {
        let dir = tempfile::tempdir().unwrap();
        drop(Journal::open(dir.path()).unwrap());
        let db = Database::open(dir.path().join(FILE)).unwrap();
        let tx = db.begin_write().unwrap();
        tx.open_table(TableDefinition::<u64, u64>::new(name))
            .unwrap();
        tx.commit().unwrap();
        drop(db);
        (check(dir.path()), Journal::open(dir.path()), dir)
    };
    for table in TABLES {
        let newer = table.replace("-v1", "-v2");
        let (checked, opened, dir) = has_table(&newer);
        assert!(matches!(checked, Err(JournalError::Newer(_))), "{newer}");
        let e = opened.err().expect("it is newer");
        assert!(e.to_string().starts_with("journal-newer: ") && e.to_string().contains(&newer));
        let remedy = e.remedy(dir.path());
        assert!(remedy.contains("install that agent again"), "{remedy}");
    }
    // What an agent only adds does not keep those before it from going on.
    let (checked, opened, _dir) = has_table("sessions-v3");
    assert!(checked.is_ok() && opened.is_ok());
}

#[test]
fn every_table_is_in_the_list_of_what_may_be_newer() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let mut names = Vec::new();
    journal
        .with(|db| {
            let tx = db.begin_read().map_err(any)?;
            names.extend(tx.list_tables().map_err(any)?.map(|t| t.name().to_owned()));
            Ok(())
        })
        .unwrap();
    names.sort();
    let mut known = TABLES;
    known.sort_unstable();
    assert_eq!(names, known);
}

#[test]
fn r100_a_place_that_cannot_be_a_directory_is_unavailable() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), "").unwrap();
    assert!(matches!(
        Journal::open(&dir.path().join("f")),
        Err(JournalError::Unavailable(_))
    ));
}

#[test]
fn r100_an_entry_with_bytes_behind_its_end_is_named_as_corrupt() {
    for table in ["tasks", "floors", "windows"] {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.received(&id(1), &origin(7)).unwrap();
        let longer = |bytes: &[u8]| [bytes, &[0]].concat();
        journal
            .with(|db| {
                let tx = db.begin_write().map_err(any)?;
                if table == "tasks" {
                    let mut tasks = tx.open_table(TASKS).map_err(any)?;
                    let old = longer(tasks.get(&id(1)).map_err(any)?.unwrap().value());
                    tasks.insert(&id(1), old.as_slice()).map_err(any)?;
                } else {
                    let table = if table == "floors" { FLOORS } else { WINDOWS };
                    let mut floors = tx.open_table(table).map_err(any)?;
                    let old = longer(floors.get(&b"k"[..]).map_err(any)?.unwrap().value());
                    floors.insert(&b"k"[..], old.as_slice()).map_err(any)?;
                }
                Ok(tx.commit().map_err(any)?)
            })
            .unwrap();
        let corrupt = |e| matches!(e, JournalError::Corrupt(_));
        match table {
            "tasks" => assert!(journal.phase(&id(1)).is_err_and(corrupt)),
            "floors" => {}
            _ => assert!(journal.window(b"k").is_err_and(corrupt)),
        }
        drop(journal);
        assert!(check(dir.path()).is_err_and(corrupt), "{table}");
    }
}

#[test]
fn a_directory_that_others_may_write_is_no_place_for_a_journal() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let set = |mode| std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode));
    set(0o777).unwrap();
    let opened = Journal::open(dir.path());
    assert!(matches!(opened, Err(JournalError::Unavailable(_))));
    set(0o755).unwrap();
    assert!(Journal::open(dir.path()).is_ok());
}

#[test]
fn a_reserve_has_its_space_whatever_was_in_its_place() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join(RESERVE_FILE);
    let (other, reserve) = (dir.path().join("other"), Reserve::at(at.clone()));
    std::fs::write(&other, "kept").unwrap();
    let sparse = || {
        let file = std::fs::File::create(&at).unwrap();
        file.set_len(reserve::RESERVE_BYTES.into()).unwrap();
    };
    let fifo = || nix::unistd::mkfifo(&at, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let link = || symlink(&other, &at).unwrap();
    for put in [&sparse as &dyn Fn(), &fifo, &link] {
        put();
        reserve.hold().unwrap();
        let meta = std::fs::symlink_metadata(&at).unwrap();
        assert!(meta.is_file());
        assert!(meta.blocks() * 512 >= u64::from(reserve::RESERVE_BYTES));
        // It is kept as it is.
        reserve.hold().unwrap();
        assert_eq!(std::fs::symlink_metadata(&at).unwrap().ino(), meta.ino());
        std::fs::remove_file(&at).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "kept");
}

#[test]
fn a_journal_that_goes_missing_while_the_agent_runs_is_not_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.received(&id(1), &origin(7)).unwrap();
    journal.started(&id(1), 5).unwrap();
    // As after a write that failed, on a file system that is then unmounted.
    journal.db = None;
    let (at, away) = (dir.path().join(FILE), dir.path().join("away"));
    std::fs::rename(&at, &away).unwrap();
    let gone = |e| matches!(e, JournalError::Unavailable(_));
    assert!(journal.phase(&id(1)).is_err_and(gone));
    assert!(journal.received(&id(1), &origin(7)).is_err_and(gone));
    std::fs::rename(&away, &at).unwrap();
    assert_eq!(journal.unfinished().unwrap(), [(id(1), 5)]);
}

#[test]
fn entries_have_golden_bytes_that_every_version_reads() {
    let ended = Report {
        stdout: adit_tasks::wire::Captured {
            total: 2,
            head: b"hi".to_vec(),
            tail: Vec::new(),
        },
        ..report(1, Outcome::Failed)
    };
    let mut result = vec![1, 1, b'k', 7, 2];
    result.extend(id(1));
    // Outcome, exit status, reason, times; head, tail and total of both outputs; the boot.
    result.extend([1, 1, 0, 0, 1, 2, 2, b'h', b'i', 0, 2, 0, 0, 0]);
    result.extend([0; 16]);
    for (phase, bytes) in [
        (Phase::Received, vec![1, 1, b'k', 7, 0]),
        (Phase::Started { at_ms: 5 }, vec![1, 1, b'k', 7, 1, 5]),
        (Phase::Result(Box::new(ended)), result),
        (Phase::Acked(Outcome::Done), vec![1, 1, b'k', 7, 3, 0]),
    ] {
        let entry = Entry {
            order: 1,
            key: b"k".to_vec(),
            seq: 7,
            phase: phase.clone(),
        };
        assert_eq!(encode(&entry).unwrap(), bytes);
        assert_eq!(decode::<Entry>(&bytes).unwrap().phase, phase);
    }
}

#[test]
fn a_key_more_than_can_be_remembered_is_refused_for_that() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let by = |key: u64| Origin {
        key: key.to_le_bytes().to_vec(),
        ..origin(7)
    };
    for key in 0..KEYS_MAX {
        fill(&mut journal, &by(key).key, 7, 0..0);
    }
    let refused = journal.received(&id(1), &by(KEYS_MAX));
    assert!(matches!(refused, Err(JournalError::TooManyKeys)));
    journal.received(&id(1), &by(0)).unwrap();
}

/// What an agent of the version before does when it accepts a task: it knows neither windows nor marks.
fn as_before(journal: &mut Journal, n: u64, origin: &Origin, drop: Option<u64>) {
    journal
        .with(|db| {
            let tx = db.begin_write().map_err(any)?;
            {
                let mut floors = tx.open_table(FLOORS).map_err(any)?;
                let old = floors.get(origin.key.as_slice()).map_err(any)?;
                let old: Option<Floor> = old.map(|f| decode(f.value())).transpose()?;
                if old.is_none_or(|(seq, _)| seq < origin.seq) {
                    let floor = encode(&(origin.seq, origin.digest))?;
                    floors
                        .insert(origin.key.as_slice(), floor.as_slice())
                        .map_err(any)?;
                }
                let mut order = tx.open_table(ORDER).map_err(any)?;
                let mut tasks = tx.open_table(TASKS).map_err(any)?;
                if let Some(at) = drop {
                    let id = *order.remove(at).map_err(any)?.unwrap().value();
                    tasks.remove(&id).map_err(any)?;
                }
            }
            insert(&tx, &id(n), origin)?;
            Ok(tx.commit().map_err(any)?)
        })
        .unwrap();
}

#[test]
fn r102_where_the_version_before_has_written_only_its_highest_goal_is_known_and_nothing_below_runs()
{
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.received(&id(1), &origin(5)).unwrap();
    journal.received(&id(2), &origin(9)).unwrap();
    drop(journal);
    let mut journal = Journal::open(dir.path()).unwrap();
    let window = journal.window(b"k").unwrap();
    assert!(window.has(5) && window.has(9) && window.floor().is_none());
    // It drops the task of goal 5, which it would refuse, for another of goal 9.
    as_before(&mut journal, 3, &origin(9), Some(0));
    drop(journal);
    let mut journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.phase(&id(1)).unwrap(), None);
    let again = journal.received(&id(1), &origin(5));
    assert!(matches!(again, Err(JournalError::Replay { key_seq: 5 })));
    assert_eq!(journal.window(b"k").unwrap(), Window::of_last(9, [9; 32]));
    // The last entry dropped and another in its place is seen as well.
    as_before(&mut journal, 4, &origin(12), Some(2));
    drop(journal);
    let mut journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.window(b"k").unwrap(), Window::of_last(12, [12; 32]));
    journal.received(&id(5), &origin(13)).unwrap();
    drop(journal);
    let mut journal = Journal::open(dir.path()).unwrap();
    let window = journal.window(b"k").unwrap();
    assert!(window.has(12) && window.has(13), "this version wrote last");
}

#[test]
fn r85_a_full_journal_forgets_the_lowest_goal_of_the_key_that_has_the_most_and_never_a_highest() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    // The highest number came first.
    fill(&mut journal, b"k", u64::MAX, 0..1);
    fill(&mut journal, b"k", 6, 1..2000);
    fill(&mut journal, b"k", 4, 2000..4000);
    fill(&mut journal, b"few", 1, 4000..4001);
    fill(&mut journal, b"few", 2, 4001..JOURNAL_MAX);
    let few = Origin {
        key: b"few".to_vec(),
        ..origin(3)
    };
    let mut next = JOURNAL_MAX;
    let mut receive = |journal: &mut Journal, origin: &Origin| {
        next += 1;
        journal.received(&id(next), origin)
    };
    receive(&mut journal, &few).unwrap();
    let window = journal.window(b"k").unwrap();
    assert_eq!((window.floor(), window.has(6)), (Some(4), true));
    assert!(window.has(u64::MAX));
    assert_eq!(journal.phase(&id(2000)).unwrap(), None);
    assert!(journal.phase(&id(1)).unwrap().is_some());
    // Its other tasks go first from now on, oldest first.
    receive(&mut journal, &few).unwrap();
    assert_eq!(journal.phase(&id(2001)).unwrap(), None);
    assert!(journal.window(b"few").unwrap().has(1));
    // A number below makes no room by goals above it, and its refusal changes nothing.
    let mut journal = {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        fill(&mut journal, b"k", 6, 0..JOURNAL_MAX);
        journal
    };
    let before = journal.window(b"k").unwrap();
    let refused = receive(&mut journal, &origin(5));
    assert!(matches!(refused, Err(JournalError::Full)));
    assert_eq!(journal.window(b"k").unwrap(), before);
}

#[test]
fn every_key_may_have_a_full_window_and_the_file_stays_small() {
    use adit_tasks::window::{GOALS_MAX, Place};
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    let key = |n: u64| [n.to_le_bytes(); 2].concat();
    // Numbers and ids as long as they get; the lowest goal falls out.
    let first = u64::MAX - GOALS_MAX as u64;
    let mut window = Window::default();
    for n in first..=u64::MAX {
        assert_eq!(window.admit(n, [7; 32]), Place::New);
    }
    assert_eq!((window.has(first), window.has(first + 1)), (false, true));
    for k in 0..KEYS_MAX {
        journal
            .with(|db| {
                let tx = db.begin_write().map_err(any)?;
                let goal = Origin {
                    key: key(k),
                    ..origin(1)
                };
                windows::admit(&tx, &goal)?;
                {
                    let mut windows = tx.open_table(WINDOWS).map_err(any)?;
                    windows::write(&mut windows, &key(k), &window)?;
                }
                Ok(tx.commit().map_err(any)?)
            })
            .unwrap();
    }
    drop(journal);
    let len = std::fs::metadata(dir.path().join(FILE)).unwrap().len();
    assert!(len < 16 << 20, "{len} bytes");
    check(dir.path()).unwrap();
}
