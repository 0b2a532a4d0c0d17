//! A bit that flips on the disk: the journal is refused, or says the same as before. A goal that was forgotten stays so.

use adit_tasks::window::Place;

use super::*;

const KEY: &[u8; 16] = b"key-of-16-bytes.";

/// A journal that has forgotten goals 3 and 5, and their tasks. Returns its window.
fn forgetful(dir: &Path) -> Window {
    let mut journal = Journal::open(dir).unwrap();
    for seq in [3, 5, 7, 9] {
        let goal = Origin {
            key: KEY.to_vec(),
            ..origin(seq)
        };
        journal.received(&id(seq), &goal).unwrap();
        journal.started(&id(seq), 5).unwrap();
        journal.result(&report(seq, Outcome::Done)).unwrap();
        journal.acked(&id(seq)).unwrap();
    }
    let mut window = journal.window(KEY).unwrap();
    window.forget(5);
    journal
        .with(|db| {
            let tx = db.begin_write().map_err(any)?;
            {
                let mut tasks = tx.open_table(TASKS).map_err(any)?;
                let mut order = tx.open_table(ORDER).map_err(any)?;
                for (at, seq) in [(0, 3), (1, 5)] {
                    tasks.remove(&id(seq)).map_err(any)?;
                    order.remove(at).map_err(any)?;
                }
                let mut windows = tx.open_table(WINDOWS).map_err(any)?;
                windows::write(&mut windows, KEY, &window)?;
            }
            Ok(tx.commit().map_err(any)?)
        })
        .unwrap();
    window
}

#[test]
fn r85_a_bit_that_flips_on_the_disk_makes_no_goal_new() {
    let dir = tempfile::tempdir().unwrap();
    let window = forgetful(dir.path());
    check(dir.path()).unwrap();
    let file = dir.path().join(FILE);
    let whole = std::fs::read(&file).unwrap();
    // What the window is found by, and the window.
    let value = encode(&window).unwrap();
    for words in [b"windows-v1", &KEY[..], &value] {
        let places = whole.windows(words.len()).enumerate();
        let places: Vec<usize> = places
            .filter(|(_, w)| *w == words)
            .map(|(n, _)| n)
            .collect();
        assert!(!places.is_empty());
        for at in 0..words.len() {
            let mut damaged = whole.clone();
            for place in &places {
                damaged[place + at] ^= 1;
            }
            std::fs::write(&file, &damaged).unwrap();
            if let Err(e) = check(dir.path()) {
                assert!(matches!(e, JournalError::Corrupt(_)), "{e}");
                // The check has repaired nothing: the next agent refuses it too.
                assert_eq!(std::fs::read(&file).unwrap(), damaged);
                continue;
            }
            let mut journal = Journal::open(dir.path()).unwrap();
            for seq in [3, 5] {
                let place = journal.window(KEY).unwrap().place(seq, &[seq as u8; 32]);
                let forgotten = Place::Forgotten { floor: 5 };
                assert_eq!(place, forgotten, "byte {at} of {words:?}");
            }
        }
    }
}

#[test]
fn what_is_written_over_a_file_is_read_again_and_the_file_stays_as_it_is() {
    use redb::StorageBackend;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let bytes: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    let open = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path);
    let over = overlay::Overlay::over(open.unwrap()).unwrap();
    // A plain buffer is what it must be equal to.
    let mut want = bytes.clone();
    let mut random = 1u64;
    for _ in 0..2000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (at, len) = ((random % 12_000) as usize, (random >> 20) as usize % 9000);
        match (random >> 50) % 8 {
            0 => {
                over.set_len(at as u64).unwrap();
                want.resize(at, 0);
            }
            1..4 if at + len <= want.len() => {
                let data = vec![random as u8; len];
                over.write(at as u64, &data).unwrap();
                want[at..at + len].copy_from_slice(&data);
            }
            _ => {}
        }
        let mut got = vec![0; want.len()];
        over.read(0, &mut got).unwrap();
        assert!(got == want && over.len().unwrap() == want.len() as u64);
    }
    assert!(over.read(want.len() as u64, &mut [0]).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}
