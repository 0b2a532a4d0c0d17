use super::*;

fn entry(path: &str, kind: Kind) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o644,
        mtime: (1, 5),
        owner: None,
        xattrs: Vec::new(),
    }
}

fn round(bytes: &[u8]) -> io::Result<Option<Message>> {
    let mut from = bytes;
    let message = Message::read(&mut from)?;
    assert!(from.is_empty());
    Ok(message)
}

#[test]
fn frames_have_golden_bytes() {
    for (message, bytes) in [
        (
            Message::Begin(Begin {
                name: b"a".to_vec(),
                place: Place::Within,
                resume: false,
                xattrs: true,
                owners: false,
                sync: true,
            }),
            &b"\x07\0\0\0\x01\0\x01\0\0\0\0\0\0\0\0\0\x01a\x01\0\x01\0\x01"[..],
        ),
        (
            Message::Entry(entry("", Kind::Dir)),
            b"\x08\0\0\0\x10\0\x01\0\0\0\0\0\0\0\0\0\0\0\xa4\x03\x02\x05\0\0",
        ),
        (
            Message::Entry(Entry {
                owner: Some((1, 2)),
                xattrs: vec![(b"user.x".to_vec(), b"y".to_vec())],
                ..entry("b", Kind::File(Some(300)))
            }),
            b"\x17\0\0\0\x10\0\x01\0\0\0\0\0\0\0\0\0\x01b\x01\x01\xac\x02\xa4\x03\x02\x05\x01\x01\x02\x01\x06user.x\x01y",
        ),
        (
            Message::Entry(entry("c", Kind::Link(b"b".to_vec()))),
            b"\x0b\0\0\0\x10\0\x01\0\0\0\0\0\0\0\0\0\x01c\x02\x01b\xa4\x03\x02\x05\0\0",
        ),
        (
            Message::data(258, b"hi"),
            b"\x0a\0\0\0\x11\0\x01\0\0\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0hi",
        ),
        (
            Message::End(End::Whole(300)),
            b"\x03\0\0\0\x12\0\x01\0\0\0\0\0\0\0\0\0\0\xac\x02",
        ),
        (
            Message::End(End::Broken(refusal::CHANGED, "no".into())),
            b"\x05\0\0\0\x12\0\x01\0\0\0\0\0\0\0\0\0\x01\x0d\x02no",
        ),
        (
            Message::Skipped(Skipped {
                path: b"a".to_vec(),
                text: "no".into(),
            }),
            b"\x05\0\0\0\x13\0\x01\0\0\0\0\0\0\0\0\0\x01a\x02no",
        ),
        (Message::All(3), b"\x01\0\0\0\x14\0\x01\0\0\0\0\0\0\0\0\0\x03"),
        (
            Message::From(300),
            b"\x02\0\0\0\x15\0\x01\0\0\0\0\0\0\0\0\0\xac\x02",
        ),
        (
            Message::Have(Have {
                offset: 1,
                digest: [7; 32],
            }),
            b"\x21\0\0\0\x20\0\x01\0\0\0\0\0\0\0\0\0\x01\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07\x07",
        ),
        (
            Message::Totals(Totals {
                entries: 1,
                bytes: 300,
                skipped: 0,
            }),
            b"\x04\0\0\0\x21\0\x01\0\0\0\0\0\0\0\0\0\x01\xac\x02\0",
        ),
        (
            Message::Ready(Place::Itself),
            b"\x01\0\0\0\x30\0\x01\0\0\0\0\0\0\0\0\0\x02",
        ),
        (
            Message::Refused(Refused::new(refusal::DENIED, "no")),
            b"\x04\0\0\0\x31\0\x01\0\0\0\0\0\0\0\0\0\x01\x02no",
        ),
        (
            Message::Rows(vec![Row {
                name: b"a".to_vec(),
                kind: 'l',
                size: 1,
                mode: 0o777,
                mtime: (-1, 0),
                uid: 0,
                gid: 300,
                target: b"b".to_vec(),
            }]),
            b"\x0f\0\0\0\x32\0\x01\0\0\0\0\0\0\0\0\0\x01\x01a\x01l\x01\xff\x03\x01\0\0\xac\x02\x01b",
        ),
        (Message::Done, b"\0\0\0\0\x33\0\x01\0\0\0\0\0\0\0\0\0"),
    ] {
        assert_eq!(message.encode(), bytes, "{message:?}");
        assert_eq!(round(bytes).unwrap(), Some(message));
    }
}

#[test]
fn r122_names_that_lead_elsewhere_are_none_of_the_protocol() {
    for path in [
        "..", "../x", "a/../b", "/x", "a//b", "a/", ".", "a/.", "a/./b", "/", "a\0b",
    ] {
        assert!(check_path(path.as_bytes()).is_err(), "{path:?}");
        let frame = Message::Entry(entry(path, Kind::Dir)).encode();
        assert!(round(&frame).is_err(), "{path:?}");
    }
    for name in ["a/b", "..", "."] {
        let name = name.into();
        let begin = Begin {
            name,
            ..Begin::default()
        };
        assert!(round(&Message::Begin(begin).encode()).is_err());
    }
    assert_eq!(check_path(&[b'x'; NAME_MAX + 1]), Err(NameError::Long));
    let deep = vec!["a"; DEPTH_MAX + 1].join("/");
    assert_eq!(check_path(deep.as_bytes()), Err(NameError::Long));
    let long = vec!["x".repeat(200); 20].join("/");
    assert_eq!(check_path(long.as_bytes()), Err(NameError::Long));
    // What is odd, and a name all the same.
    for path in [
        "...",
        "-rf",
        "a\nb",
        "~",
        "*",
        "a b",
        "\u{202e}x",
        "\u{1b}[2J",
    ] {
        assert_eq!(check_path(path.as_bytes()), Ok(()), "{path:?}");
    }
    assert_eq!(check_path(b"\xff/\xfe"), Ok(()));
}

#[test]
fn r122_attributes_that_give_rights_and_sizes_that_nobody_has_are_refused() {
    let refused = |change: &dyn Fn(&mut Entry)| {
        let mut entry = entry("a", Kind::File(Some(1)));
        change(&mut entry);
        round(&Message::Entry(entry).encode()).is_err()
    };
    assert!(!refused(&|_| {}));
    for name in [
        "security.capability",
        "system.posix_acl_access",
        "trusted.x",
        "user.\0",
    ] {
        assert!(refused(&|e| e.xattrs.push((name.into(), b"x".to_vec()))));
    }
    assert!(refused(
        &|e| e.xattrs = vec![(b"user.a".to_vec(), vec![]); 65]
    ));
    assert!(refused(&|e| e.kind = Kind::File(Some(u64::MAX))));
    assert!(refused(&|e| e.kind = Kind::Link(Vec::new())));
    assert!(refused(&|e| e.kind = Kind::Link(b"a\0b".to_vec())));
    assert!(refused(&|e| e.kind = Kind::Link(vec![b'x'; LINK_MAX + 1])));
    assert!(refused(&|e| e.mtime.1 = 1_000_000_000));
    assert!(round(&Message::End(End::Whole(u64::MAX)).encode()).is_err());
    assert!(round(&Message::data(0, &[]).encode()).is_err());
    let long = vec![0; DATA_MAX + 1];
    assert!(round(&Message::data(0, &long).encode()).is_err());
    let many = vec![Row::default(); ROWS_MAX + 1];
    assert!(round(&Message::Rows(many).encode()).is_err());
}

#[test]
fn the_largest_of_each_fits_a_frame() {
    let (_, bytes) = XATTRS_MAX;
    let largest = Entry {
        path: vec![vec![b'x'; 250]; 12].join(&b'/'),
        kind: Kind::Link(vec![b'x'; LINK_MAX]),
        mode: u32::MAX,
        mtime: (i64::MIN, 999_999_999),
        owner: Some((u32::MAX, u32::MAX)),
        xattrs: vec![(b"user.a".to_vec(), vec![0; bytes - 6])],
    };
    assert!(round(&Message::Entry(largest).encode()).unwrap().is_some());
    let row = Row {
        name: vec![b'x'; NAME_MAX],
        target: vec![b'x'; LINK_MAX],
        ..Row::default()
    };
    let rows = Message::Rows(vec![row; ROWS_MAX]);
    assert!(round(&rows.encode()).unwrap().is_some());
}
