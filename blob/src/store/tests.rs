//! A store in a directory of its own.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use super::*;

const LIMITS: Limits = Limits {
    blob: 1000,
    all: 2500,
    spare: 0,
};

struct Fixture {
    dir: tempfile::TempDir,
    store: Arc<Store>,
}

impl Fixture {
    fn new(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("blobs"), "b-", limits);
        Self { dir, store }
    }

    /// Bytes of a size, another for each seed, and their digest.
    fn bytes(seed: u8, len: usize) -> (Vec<u8>, Digest) {
        let bytes = vec![seed; len];
        let digest = Digest::of(&bytes);
        (bytes, digest)
    }

    fn begin(&self, digest: Digest, size: u64) -> Writing {
        match self.store.begin(digest, size).unwrap() {
            Begun::Writing(writing) => writing,
            Begun::Whole(_) => panic!("it is there"),
        }
    }

    fn put(&self, seed: u8, len: usize) -> Digest {
        let (bytes, digest) = Self::bytes(seed, len);
        let mut writing = self.begin(digest, len as u64);
        writing.write(&bytes).unwrap();
        writing.finish().unwrap();
        self.age(digest, seed);
        digest
    }

    /// Seeds are ages: the lower, the longer not used.
    fn age(&self, digest: Digest, seed: u8) {
        let file = File::open(self.store.path(&digest, None)).unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seed.into());
        file.set_modified(at).unwrap();
    }

    fn has(&self, digest: Digest) -> bool {
        matches!(self.store.present(&digest), Ok(Present::Whole { .. }))
    }
}

#[test]
fn a_blob_is_under_its_name_only_when_all_of_it_is_there_and_right() {
    let f = Fixture::new(LIMITS);
    let (bytes, digest) = Fixture::bytes(1, 100);
    let mut writing = f.begin(digest, 100);
    writing.write(&bytes[..60]).unwrap();
    let part = Present::Part {
        bytes: 60,
        size: 100,
    };
    assert_eq!(f.store.present(&digest).unwrap(), part);
    assert!(matches!(f.store.open(digest), Err(BlobError::Unknown(_))));
    assert!(matches!(f.store.begin(digest, 100), Err(BlobError::Busy)));
    drop(writing);
    // The next one goes on.
    let mut writing = f.begin(digest, 100);
    assert_eq!((writing.at(), writing.missing()), (60, 40));
    assert!(matches!(
        writing.write(&[0; 41]),
        Err(BlobError::Mismatch(_))
    ));
    writing.write(&bytes[60..]).unwrap();
    writing.finish().unwrap();
    let (mut read, mut end) = (Vec::new(), [0; 10]);
    let mut reading = f.store.open(digest).unwrap();
    assert_eq!(reading.read_at(&mut end, 95).unwrap(), 5);
    reading.read_to_end(&mut read).unwrap();
    assert_eq!((&read, &end[..5]), (&bytes, &bytes[95..]));
    assert!(matches!(f.store.begin(digest, 100), Ok(Begun::Whole(_))));
    assert!(matches!(
        f.store.begin(digest, 99),
        Err(BlobError::Mismatch(_))
    ));
    let modes = [&f.dir.path().join("blobs"), &f.store.path(&digest, None)]
        .map(|p| fs::metadata(p).unwrap().mode() & 0o777);
    assert_eq!(modes, [0o700, 0o600]);
}

#[test]
fn what_has_another_digest_is_removed_and_may_come_again() {
    let f = Fixture::new(LIMITS);
    let (bytes, digest) = Fixture::bytes(1, 100);
    let mut writing = f.begin(digest, 100);
    writing.write(&[9; 100]).unwrap();
    assert!(matches!(writing.finish(), Err(BlobError::Mismatch(_))));
    assert_eq!(f.store.present(&digest).unwrap(), Present::Nothing);
    let mut writing = f.begin(digest, 100);
    assert_eq!(writing.at(), 0);
    writing.write(&bytes).unwrap();
    writing.finish().unwrap();
    assert!(f.has(digest));
}

#[test]
fn one_that_is_announced_with_another_size_begins_anew() {
    let f = Fixture::new(LIMITS);
    let (_, digest) = Fixture::bytes(1, 100);
    f.begin(digest, 100).write(&[1; 50]).unwrap();
    assert_eq!(f.begin(digest, 200).at(), 0);
    assert_eq!(f.store.entries().unwrap().len(), 1);
}

#[test]
fn the_one_that_was_used_least_recently_goes_and_one_in_use_never() {
    let f = Fixture::new(LIMITS);
    let all: Vec<_> = (1..=2).map(|seed| f.put(seed, 1000)).collect();
    let reading = f.store.open(all[0]).unwrap();
    f.age(all[0], 1);
    let third = f.put(3, 1000);
    assert!(f.has(all[0]) && !f.has(all[1]) && f.has(third));
    // What is read, and what is written, stays; for more there is no room, and nothing changes.
    let (_, fourth) = Fixture::bytes(4, 1000);
    let writing = f.begin(fourth, 1000);
    assert!(f.has(all[0]) && !f.has(third));
    let (_, fifth) = Fixture::bytes(5, 501);
    let refused = f.store.begin(fifth, 501);
    assert!(matches!(refused, Err(BlobError::NoSpace { size: 501, .. })));
    assert!(f.has(all[0]));
    drop((reading, writing));
    f.put(5, 501);
    assert!(!f.has(all[0]));
}

#[test]
fn a_blob_above_the_limit_is_refused_and_nothing_goes_for_it() {
    let f = Fixture::new(LIMITS);
    let kept = f.put(1, 1000);
    let (_, digest) = Fixture::bytes(2, 1001);
    for size in [1001, u64::MAX] {
        let refused = f.store.begin(digest, size);
        assert!(matches!(
            refused,
            Err(BlobError::TooLarge { max: 1000, .. })
        ));
    }
    assert!(f.has(kept));
}

#[test]
fn r100_a_full_disk_is_refused_before_anything_goes() {
    let f = Fixture::new(LIMITS);
    let kept = f.put(1, 1000);
    let full = Limits {
        spare: u64::MAX / 2,
        ..LIMITS
    };
    let store = Store::new(&f.dir.path().join("blobs"), "b-", full);
    let (_, digest) = Fixture::bytes(2, 10);
    let refused = store.begin(digest, 10);
    assert!(matches!(refused, Err(BlobError::NoSpace { size: 10, .. })));
    assert!(f.has(kept));
}

/// What one upload is still to write is not free for the next.
#[test]
fn r100_two_files_at_once_are_not_both_promised_the_same_room() {
    let large = Limits {
        blob: u64::MAX / 4,
        all: u64::MAX / 2,
        spare: 0,
    };
    let f = Fixture::new(large);
    let most = disk::free(f.dir.path()).unwrap() / 3 * 2;
    let (one, other) = (Fixture::bytes(1, 1).1, Fixture::bytes(2, 1).1);
    let writing = f.begin(one, most);
    let refused = f.store.begin(other, most);
    assert!(matches!(refused, Err(BlobError::NoSpace { .. })));
    drop(writing);
    // Nobody writes it any more.
    f.begin(other, most);
}

#[test]
fn there_are_so_many_files_and_no_more() {
    let f = Fixture::new(LIMITS);
    let first = f.put(0, 1);
    for n in 1..COUNT_MAX as u32 + 10 {
        let bytes = n.to_le_bytes();
        let mut writing = f.begin(Digest::of(&bytes), 4);
        writing.write(&bytes).unwrap();
        writing.finish().unwrap();
    }
    assert_eq!(f.store.entries().unwrap().len(), COUNT_MAX);
    assert!(!f.has(first));
}

#[test]
fn r99_what_others_planted_is_not_read_written_or_counted() {
    let f = Fixture::new(LIMITS);
    let (bytes, digest) = Fixture::bytes(1, 100);
    f.put(9, 10);
    let victim = f.dir.path().join("victim");
    fs::write(&victim, "whole").unwrap();
    for name in [format!("b-{digest}-100.part"), format!("b-{digest}")] {
        let planted = f.dir.path().join("blobs").join(name);
        symlink(&victim, &planted).unwrap();
        assert!(f.store.begin(digest, 100).is_err() && f.store.open(digest).is_err());
        fs::remove_file(&planted).unwrap();
        fs::hard_link(&victim, &planted).unwrap();
        assert!(f.store.begin(digest, 100).is_err() && f.store.open(digest).is_err());
        fs::remove_file(&planted).unwrap();
    }
    assert_eq!(fs::read(&victim).unwrap(), b"whole");
    for odd in ["b-", "x", "b-00", "b-00.part", "b-.part"] {
        fs::write(f.dir.path().join("blobs").join(odd), "").unwrap();
    }
    let spelt = format!("b-{digest}-0100.part");
    fs::write(f.dir.path().join("blobs").join(&spelt), "").unwrap();
    assert_eq!(f.store.entries().unwrap().len(), 1);
    let mut writing = f.begin(digest, 100);
    writing.write(&bytes).unwrap();
    writing.finish().unwrap();
    fs::set_permissions(
        f.dir.path().join("blobs"),
        fs::Permissions::from_mode(0o777),
    )
    .unwrap();
    assert!(matches!(f.store.begin(digest, 100), Err(BlobError::Io(_))));
}

#[test]
fn a_blob_is_removed_unless_somebody_reads_it() {
    let f = Fixture::new(LIMITS);
    let digest = f.put(1, 100);
    let reading = f.store.open(digest).unwrap();
    assert!(matches!(f.store.remove(&digest), Err(BlobError::Busy)));
    drop(reading);
    f.store.remove(&digest).unwrap();
    assert_eq!(f.store.present(&digest).unwrap(), Present::Nothing);
}

/// They are dropped on threads that others wait for: aditd's runtime has one.
#[test]
fn r110_who_is_done_with_a_blob_waits_for_nobodys_disk() {
    let f = Fixture::new(LIMITS);
    let read = f.store.open(f.put(1, 100)).unwrap();
    let written = f.begin(Fixture::bytes(2, 100).1, 100);
    let turn = f.store.turn();
    drop((read, written));
    drop(turn);
    assert!(f.store.held().is_empty());
}
