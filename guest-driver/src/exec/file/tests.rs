//! The table of paths that must not be written (R89), and what a good write leaves.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use adit_tasks::wire::Outcome;

use super::*;

fn step(path: &Path) -> FileStep {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    FileStep {
        path: path.to_str().unwrap().into(),
        content: Some("new".into()),
        content_base64: None,
        mode: "0640".into(),
        owner: uid.to_string(),
        group: gid.to_string(),
    }
}

fn room() -> (tempfile::TempDir, PathBuf, FilePolicy) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::create_dir_all(root.join("agent")).unwrap();
    fs::create_dir(dir.path().join("outside")).unwrap();
    fs::write(dir.path().join("outside/canary"), "old").unwrap();
    let policy = FilePolicy {
        of_policy: None,
        roots: vec![root.clone()],
        protected: vec![root.join("agent")],
    };
    (dir, root, policy)
}

#[test]
fn a_file_is_written_with_its_mode_and_then_left_alone() {
    let (_dir, root, policy) = room();
    let path = root.join("sub/f");
    let said = |e: Executed| String::from_utf8(e.stdout.head).unwrap();
    assert!(said(write(&step(&path), &policy)).ends_with(": written\n"));
    let first = fs::metadata(&path).unwrap();
    assert_eq!(first.permissions().mode() & 0o7777, 0o640);
    assert!(said(write(&step(&path), &policy)).ends_with(": unchanged\n"));
    assert_eq!(fs::metadata(&path).unwrap().ino(), first.ino());
    let wider = FileStep {
        mode: "4755".into(),
        ..step(&path)
    };
    assert_eq!(write(&wider, &policy).outcome, Outcome::Done);
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
        0o4755
    );
    assert_eq!(
        fs::read_dir(root.join("sub")).unwrap().count(),
        1,
        "a temporary file is left"
    );
}

#[test]
fn r89_every_way_out_of_the_root_is_denied_and_nothing_is_written() {
    let (dir, root, policy) = room();
    let outside = dir.path().join("outside");
    symlink(&outside, root.join("link")).unwrap();
    symlink("../outside", root.join("sub/up")).unwrap();
    symlink(outside.join("canary"), root.join("final")).unwrap();
    symlink("/proc/self/root/tmp", root.join("magic")).unwrap();
    let at = |p: &str| PathBuf::from(format!("{}{p}", root.display()));
    for path in [
        at("/../outside/canary"),
        at("/sub/../../outside/canary"),
        at("/./f"),
        at("//f"),
        at("/sub/"),
        at("/f\0x"),
        at("/link/canary"),
        at("/link/new"),
        at("/sub/up/canary"),
        at("/final"),
        at("/magic/f"),
        at("/agent/journal.redb"),
        at("/sub"),
        at(""),
        at("evil"),
        outside.join("canary"),
        "/etc/passwd".into(),
        "root/f".into(),
        "".into(),
    ] {
        let got = write(&step(&path), &policy);
        assert_eq!(got.outcome, Outcome::Refused, "{path:?}: {}", got.reason);
        assert!(got.reason.starts_with("path-denied: "), "{}", got.reason);
    }
    assert_eq!(fs::read_to_string(outside.join("canary")).unwrap(), "old");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(fs::read_dir(root.join("sub")).unwrap().count(), 1);
}

#[test]
fn r90_a_directory_swapped_for_a_link_never_leads_outside() {
    let (dir, root, policy) = room();
    let outside = dir.path().join("outside");
    let (real, spare) = (root.join("race"), root.join("spare"));
    fs::create_dir(&real).unwrap();
    symlink(&outside, &spare).unwrap();
    let swaps = std::thread::spawn({
        let (real, spare, hold) = (real.clone(), spare.clone(), root.join("hold"));
        move || {
            for _ in 0..20_000 {
                fs::rename(&real, &hold).unwrap();
                fs::rename(&spare, &real).unwrap();
                fs::rename(&hold, &spare).unwrap();
            }
        }
    });
    let mut denied = 0;
    while !swaps.is_finished() {
        denied +=
            u32::from(write(&step(&real.join("canary")), &policy).outcome == Outcome::Refused);
    }
    swaps.join().unwrap();
    assert!(denied > 0, "the race was never met");
    assert_eq!(fs::read_to_string(outside.join("canary")).unwrap(), "old");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn a_planted_temporary_file_is_replaced_not_opened() {
    let (dir, root, policy) = room();
    let temp = format!(".adit-{:x}.tmp", u64::from_be_bytes(digest8("f")));
    symlink(dir.path().join("outside/canary"), root.join(&temp)).unwrap();
    assert_eq!(
        write(&step(&root.join("f")), &policy).outcome,
        Outcome::Done
    );
    assert_eq!(
        fs::read_to_string(dir.path().join("outside/canary")).unwrap(),
        "old"
    );
}

#[test]
fn a_missing_directory_or_owner_fails_by_name() {
    let (_dir, root, policy) = room();
    let got = write(&step(&root.join("no/f")), &policy);
    assert!(
        got.outcome == Outcome::Failed && got.reason.contains("/no"),
        "{}",
        got.reason
    );
    let got = write(
        &FileStep {
            owner: "no-such-user".into(),
            ..step(&root.join("f"))
        },
        &policy,
    );
    assert!(
        got.outcome == Outcome::Failed && got.reason.contains("no-such-user"),
        "{}",
        got.reason
    );
    assert!(!root.join("f").exists());
}

#[test]
fn r113_a_replaced_file_keeps_its_attributes_but_not_those_of_its_content() {
    let (_dir, root, policy) = room();
    let path = root.join("f");
    fs::write(&path, "old").unwrap();
    let set = |name: &str, value: &[u8]| {
        rustix::fs::setxattr(&path, name, value, XattrFlags::empty()).map_err(io::Error::from)
    };
    // An access list: user 1 may read, as any program of this user's may say of its own file.
    let acl = [
        &[2, 0, 0, 0][..],
        &[1, 0, 6, 0, 255, 255, 255, 255],
        &[2, 0, 4, 0, 1, 0, 0, 0],
        &[4, 0, 4, 0, 255, 255, 255, 255],
        &[16, 0, 4, 0, 255, 255, 255, 255],
        &[32, 0, 0, 0, 255, 255, 255, 255],
    ]
    .concat();
    let mut kept = vec![("user.adit", b"label".to_vec())];
    if let Err(e) = set("user.adit", b"label") {
        eprintln!("skipped: this file system keeps no attributes: {e}");
        return;
    }
    match set("system.posix_acl_access", &acl) {
        Ok(()) => kept.push(("system.posix_acl_access", acl)),
        Err(e) => eprintln!("skipped: access lists: {e}"),
    }
    // A file capability (version 2, none in it); only root may.
    let capability = [&[0, 0, 0, 2][..], &[0; 16]].concat();
    if let Err(e) = set("security.capability", &capability) {
        eprintln!("skipped: capabilities: {e}");
    }
    let got = write(&step(&path), &policy);
    assert_eq!(got.outcome, Outcome::Done, "{}", got.reason);
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    let get = |name: &str| {
        let mut value = vec![0; 1024];
        let n = rustix::fs::getxattr(&path, name, &mut value[..])?;
        value.truncate(n);
        Ok::<_, rustix::io::Errno>(value)
    };
    for (name, value) in kept {
        assert_eq!(get(name).unwrap(), value, "{name}");
    }
    assert_eq!(get("security.capability"), Err(rustix::io::Errno::NODATA));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640, "the declared mode holds");
}

#[test]
fn r113_other_names_of_a_replaced_file_are_told() {
    let (_dir, root, policy) = room();
    let path = root.join("f");
    fs::write(&path, "old").unwrap();
    for other in ["second", "third"] {
        fs::hard_link(&path, root.join(other)).unwrap();
    }
    let said = |e: Executed| String::from_utf8(e.stdout.head).unwrap();
    let first = said(write(&step(&path), &policy));
    assert!(first.contains("2 other names"), "{first}");
    assert_eq!(fs::read_to_string(root.join("second")).unwrap(), "old");
    let other = FileStep {
        content: Some("newer".into()),
        ..step(&path)
    };
    assert!(said(write(&other, &policy)).ends_with("/f: written\n"));
}

#[test]
fn r113_an_owner_that_is_no_number_or_means_nobody_is_not_taken_for_one() {
    let (_dir, root, policy) = room();
    let path = root.join("f");
    for bad in ["4294967295", "+0", "-1", "", "4294967296"] {
        for owner in [true, false] {
            let mut step = step(&path);
            *(if owner {
                &mut step.owner
            } else {
                &mut step.group
            }) = bad.into();
            let got = write(&step, &policy);
            assert_eq!(got.outcome, Outcome::Failed, "{bad}: {}", got.reason);
            assert!(!path.exists(), "{bad}");
        }
    }
}

/// The old file's readers must not have the new content, not even for a moment.
#[test]
fn r113_an_access_list_gives_no_more_than_the_mode() {
    let entry = |tag: u16, rights: u16, id: u32| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes
    };
    let list = |entries: &[Vec<u8>]| [&2u32.to_le_bytes()[..], &entries.concat()].concat();
    let (owner, user, group, mask, others) = (1, 2, 4, 0x10, 0x20);
    let mut full = list(&[
        entry(owner, 6, 0),
        entry(user, 4, 1000),
        entry(group, 4, 0),
        entry(mask, 4, 0),
        entry(others, 4, 0),
    ]);
    limit_access(&mut full, Mode::from_bits_truncate(0o600));
    let expected = list(&[
        entry(owner, 6, 0),
        entry(user, 4, 1000),
        entry(group, 4, 0),
        // What a named user has counts only as far as the mask goes.
        entry(mask, 0, 0),
        entry(others, 0, 0),
    ]);
    assert_eq!(full, expected);
    // Without a mask the group's entry is the mode's.
    let mut small = list(&[entry(owner, 7, 0), entry(group, 7, 0), entry(others, 7, 0)]);
    limit_access(&mut small, Mode::from_bits_truncate(0o640));
    let expected = list(&[entry(owner, 6, 0), entry(group, 4, 0), entry(others, 0, 0)]);
    assert_eq!(small, expected);
    for len in 0..20 {
        limit_access(&mut vec![0xff; len], Mode::from_bits_truncate(0o777));
    }
}
