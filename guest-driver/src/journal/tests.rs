//! The journal's promises: an id starts once, results wait for their acknowledgement, what is dropped cannot return.

use super::*;

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
    assert_eq!(open().floor(b"k").unwrap(), Some((7, [7; 32])));
}

#[test]
fn the_floor_of_a_key_never_falls() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    journal.received(&id(1), &origin(9)).unwrap();
    journal.received(&id(2), &origin(3)).unwrap();
    assert_eq!(journal.floor(b"k").unwrap(), Some((9, [9; 32])));
    assert_eq!(journal.floor(b"other").unwrap(), None);
}

#[test]
fn r85_only_what_the_floor_refuses_is_ever_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path()).unwrap();
    // Fill it in one transaction; every entry is of the key's highest sequence.
    journal
        .with(|db| {
            let tx = db.begin_write().map_err(any)?;
            {
                let mut tasks = tx.open_table(TASKS).map_err(any)?;
                let mut order = tx.open_table(ORDER).map_err(any)?;
                for n in 0..JOURNAL_MAX {
                    let phase = Phase::Acked(Outcome::Done);
                    let entry = Entry {
                        order: n,
                        key: b"k".to_vec(),
                        seq: 5,
                        phase,
                    };
                    tasks
                        .insert(&id(n), encode(&entry)?.as_slice())
                        .map_err(any)?;
                    order.insert(n, &id(n)).map_err(any)?;
                }
                let mut floors = tx.open_table(FLOORS).map_err(any)?;
                floors
                    .insert(b"k".as_slice(), encode(&(5u64, [5u8; 32]))?.as_slice())
                    .map_err(any)?;
            }
            Ok(tx.commit().map_err(any)?)
        })
        .unwrap();
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
    for table in ["tasks", "floors"] {
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
                    let mut floors = tx.open_table(FLOORS).map_err(any)?;
                    let old = longer(floors.get(&b"k"[..]).map_err(any)?.unwrap().value());
                    floors.insert(&b"k"[..], old.as_slice()).map_err(any)?;
                }
                Ok(tx.commit().map_err(any)?)
            })
            .unwrap();
        let corrupt = |e| matches!(e, JournalError::Corrupt(_));
        match table {
            "tasks" => assert!(journal.phase(&id(1)).is_err_and(corrupt)),
            _ => assert!(journal.floor(b"k").is_err_and(corrupt)),
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
