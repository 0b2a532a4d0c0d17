//! Both sides of a copy on a pair of sockets: what is copied is the same, and a hostile side gets nothing out of its place.
//!
//! Tests whose names begin with a tool's are of faults that such tools have had, and name where.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use adit_files::tree::{Fault, Root, Sink, Source, Stream, Target, Watch, receive, send};
use adit_files::{Begin, End, Entry, Kind, Message, Place, Skipped, Totals, refusal};

#[derive(Default)]
struct Seen(Mutex<Vec<(String, String)>>);

impl Watch for Seen {
    fn moved(&self, _: u64) {}
    fn entry(&self, _: &[u8]) {}
    fn skipped(&self, path: &[u8], why: &str) {
        let path = String::from_utf8_lossy(path).into_owned();
        self.0.lock().unwrap().push((path, why.to_owned()));
    }
}

impl Seen {
    fn paths(&self) -> Vec<String> {
        let mut paths: Vec<_> = self.0.lock().unwrap().iter().map(|s| s.0.clone()).collect();
        paths.sort();
        paths
    }
}

fn pair() -> (Stream, Stream) {
    let (a, b) = UnixStream::pair().unwrap();
    let stream = |s: UnixStream| Stream::new(OwnedFd::from(s)).unwrap();
    (stream(a), stream(b))
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn begin(name: &str) -> Begin {
    Begin {
        name: name.into(),
        ..Begin::default()
    }
}

fn target(to: &Path, begin: &Begin) -> Result<Sink, Fault> {
    Target::find(&Root::own().unwrap(), &bytes(to), begin).map(Sink::Target)
}

type Both = (Result<Totals, Fault>, Result<Totals, Fault>, Seen);

/// Copies; what both sides say.
fn both(from: &Path, to: &Path, begin: &Begin) -> Both {
    let (mut a, mut b) = pair();
    let source = Source::find(&Root::own().unwrap(), &bytes(from)).unwrap();
    let sink = target(to, begin).unwrap();
    let seen = Seen::default();
    let (sent, got) = std::thread::scope(|scope| {
        let got = scope.spawn(|| {
            let got = receive(&mut b, sink, begin, &(), true);
            b.end(
                got.as_ref()
                    .err()
                    .and_then(Fault::refusal)
                    .map(Message::Refused)
                    .as_ref(),
            );
            got
        });
        let sent = send(&mut a, source, begin, &seen);
        drop(a);
        (sent, got.join().unwrap())
    });
    (sent, got, seen)
}

fn copy(from: &Path, to: &Path, begin: &Begin) -> (Totals, Vec<String>) {
    let (sent, got, seen) = both(from, to, begin);
    let (sent, got) = (sent.unwrap(), got.unwrap());
    assert_eq!(sent.entries, got.entries);
    (sent, seen.paths())
}

/// Mode, time, and what is in it.
type Content = (u32, (i64, i64), Vec<u8>);

/// All that is below, with what is to be the same.
fn tree(at: &Path) -> BTreeMap<PathBuf, Content> {
    fn walk(at: &Path, top: &Path, all: &mut BTreeMap<PathBuf, Content>) {
        let meta = at.symlink_metadata().unwrap();
        let content = if meta.is_symlink() {
            bytes(&fs::read_link(at).unwrap())
        } else if meta.is_file() {
            fs::read(at).unwrap()
        } else {
            Vec::new()
        };
        let name = at.strip_prefix(top).unwrap().to_owned();
        let time = (meta.mtime(), meta.mtime_nsec());
        all.insert(name, (meta.mode(), time, content));
        if meta.is_dir() {
            for entry in fs::read_dir(at).unwrap() {
                walk(&entry.unwrap().path(), top, all);
            }
        }
    }
    let mut all = BTreeMap::new();
    walk(at, at, &mut all);
    all
}

fn old(at: &Path) {
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    File::open(at).unwrap().set_modified(time).unwrap();
}

fn scene(at: &Path) {
    fs::create_dir_all(at.join("a/b/c")).unwrap();
    fs::write(at.join("empty"), "").unwrap();
    fs::write(at.join("a/small"), "small").unwrap();
    fs::write(at.join("a/b/big"), vec![7; 1_000_000]).unwrap();
    fs::write(at.join("a/run"), "#!/bin/sh").unwrap();
    fs::set_permissions(at.join("a/run"), Permissions::from_mode(0o755)).unwrap();
    fs::write(at.join("a/b/secret"), "x").unwrap();
    fs::set_permissions(at.join("a/b/secret"), Permissions::from_mode(0o600)).unwrap();
    fs::write(
        at.join(std::ffi::OsStr::from_bytes(b"a/\xff\n-rf *")),
        "odd",
    )
    .unwrap();
    symlink("small", at.join("a/link")).unwrap();
    symlink("/etc/passwd", at.join("a/absolute")).unwrap();
    symlink("nowhere", at.join("dangling")).unwrap();
    old(&at.join("a/small"));
    old(&at.join("a/b"));
    fs::set_permissions(at.join("a/b/c"), Permissions::from_mode(0o555)).unwrap();
    old(&at.join("a/b/c"));
}

#[test]
fn a_tree_is_the_same_on_the_other_side() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    scene(&from);
    // Where nothing is it is the tree itself; where a directory is, the tree goes into it.
    let (totals, skipped) = copy(&from, &to, &begin("from"));
    assert_eq!((totals.skipped, skipped.len()), (0, 0));
    assert_eq!(totals.entries, 13);
    assert!(tree(&from) == tree(&to));
    copy(&from, &to, &begin("inner"));
    assert!(tree(&from) == tree(&to.join("inner")));
    // What is in it goes there: a second time over what is there already.
    let flat = dir.path().join("flat");
    fs::create_dir(&flat).unwrap();
    for _ in 0..2 {
        copy(&from, &flat, &begin(""));
        let (mut a, mut b) = (tree(&from), tree(&flat));
        a.remove(Path::new(""));
        b.remove(Path::new(""));
        // Directories that were there keep their times.
        let same = |(path, what): (&PathBuf, &Content)| b[path].2 == what.2 && b[path].0 == what.0;
        assert!(a.len() == b.len() && a.iter().all(same));
    }
    // A file, under its name and under another.
    copy(&from.join("a/run"), &dir.path().join("x"), &begin("run"));
    copy(&from.join("a/run"), &flat, &begin("run"));
    let mode = |at: PathBuf| at.metadata().unwrap().mode() & 0o7777;
    assert_eq!(
        (mode(dir.path().join("x")), mode(flat.join("run"))),
        (0o755, 0o755)
    );
    // Nothing half is left anywhere.
    let is_part = |path: &PathBuf| path.to_string_lossy().ends_with(".adit-part");
    assert!(!tree(dir.path()).keys().any(is_part));
}

#[test]
fn a_target_that_must_be_a_directory_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::write(&from, "x").unwrap();
    let into = Begin {
        place: Place::Within,
        ..begin("from")
    };
    for to in ["nowhere", "from"] {
        let refused = target(&dir.path().join(to), &into).map(|_| ()).unwrap_err();
        assert!(matches!(refused, Fault::Local(_)), "{refused:?}");
    }
    let refused = target(&dir.path().join("no/such"), &begin("from")).map(|_| ());
    let refused = refused.unwrap_err().refusal().unwrap();
    assert_eq!(refused.reason, refusal::NOT_FOUND);
    assert!(refused.text.contains("no/such"), "{}", refused.text);
}

/// What rsync does with -S alone: a sparse file stays one, and costs what is in it.
#[test]
fn rsync_sparse_files_stay_sparse_and_one_of_an_exbibyte_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let mut file = File::create(&from).unwrap();
    // As large as this file system has them.
    let len = [1 << 60, 1 << 43, 1 << 40]
        .into_iter()
        .find(|len| file.set_len(*len).is_ok())
        .unwrap();
    file.seek(SeekFrom::Start(1 << 30)).unwrap();
    file.write_all(b"in the middle").unwrap();
    let (totals, _) = copy(&from, &to, &begin("from"));
    let meta = to.metadata().unwrap();
    assert_eq!(meta.len(), len);
    assert!(
        totals.bytes < 1 << 20 && meta.blocks() * 512 < 1 << 20,
        "{totals:?}"
    );
    let mut piece = [0; 13];
    File::open(&to)
        .unwrap()
        .read_exact_at(&mut piece, 1 << 30)
        .unwrap();
    assert_eq!(&piece, b"in the middle");
}

/// GoogleContainerTools/kaniko#1599: a FIFO in a tree hangs the copy, and a device is read as if it were a file.
#[test]
fn kaniko_1599_special_files_are_told_and_never_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("file"), "x").unwrap();
    let fifo = from.join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
    let _socket = UnixListener::bind(from.join("socket")).unwrap();
    let (totals, skipped) = copy(&from, &to, &begin("from"));
    assert_eq!((totals.entries, totals.skipped), (2, 2));
    assert_eq!(skipped, ["fifo", "socket"]);
    assert!(Source::find(&Root::own().unwrap(), &bytes(&fifo)).is_err());
    // One that is where a file goes is replaced, not opened.
    let there = to.join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &there, mode).unwrap();
    copy(&from.join("file"), &there, &begin("file"));
    assert_eq!(fs::read(&there).unwrap(), b"x");
    // One that is where the part of a file goes, too.
    rustix::fs::mkfifoat(rustix::fs::CWD, to.join(".p.adit-part"), mode).unwrap();
    for resume in [false, true] {
        let begin = Begin {
            resume,
            ..begin("file")
        };
        copy(&from.join("file"), &to.join("p"), &begin);
        assert_eq!(fs::read(to.join("p")).unwrap(), b"x");
    }
}

/// A sender that says this, and what the receiver makes of it.
fn hostile(to: &Path, begin: &Begin, frames: &[Vec<u8>]) -> (Result<Totals, Fault>, Seen) {
    let (a, mut b) = pair();
    let sink = target(to, begin).unwrap();
    let seen = Seen::default();
    let frames: Vec<u8> = frames.concat();
    let got = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut a = a;
            for message in [frames] {
                let mut rest = &message[..];
                while let Ok(Some(message)) = Message::read(&mut rest) {
                    if a.say(&message).is_err() {
                        break;
                    }
                }
            }
            a.end(None);
        });
        let got = receive(&mut b, sink, begin, &seen, false);
        drop(b);
        got
    });
    (got, seen)
}

fn entry(path: &str, kind: Kind) -> Message {
    Message::Entry(Entry {
        path: path.into(),
        kind,
        mode: 0o7777,
        mtime: (1, 0),
        owner: Some((0, 0)),
        xattrs: vec![],
    })
}

fn file(path: &str, content: &[u8]) -> Vec<Message> {
    let len = content.len() as u64;
    vec![
        entry(path, Kind::File(Some(len))),
        Message::data(0, content),
        Message::End(End::Whole(len)),
    ]
}

fn frames(messages: Vec<Message>) -> Vec<Vec<u8>> {
    let entries = messages.iter().filter(|m| matches!(m, Message::Entry(_)));
    let all = Message::All(entries.count() as u64);
    messages.iter().chain([&all]).map(Message::encode).collect()
}

/// kubernetes/kubernetes#75037 (CVE-2019-1002101), #76788 (CVE-2019-11246) and #82143 (CVE-2019-11251): a link, and then something through
/// it. #61297: names with `..` are none of the protocol (`wire`).
#[test]
fn r122_kubectl_cves_nothing_is_written_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "before").unwrap();
    let out = outside.to_str().unwrap().as_bytes().to_vec();
    let begin = begin("x");
    for (nth, messages) in [
        // Through one that came before.
        [
            vec![entry("l", Kind::Link(out.clone()))],
            file("l/file", b"bad"),
        ]
        .concat(),
        [
            vec![entry("l", Kind::Link(b"../outside".to_vec()))],
            file("l/file", b"bad"),
        ]
        .concat(),
        // As a directory.
        [
            vec![entry("l", Kind::Link(out.clone())), entry("l", Kind::Dir)],
            file("l/file", b"bad"),
        ]
        .concat(),
        // In two steps, and back.
        [
            vec![
                entry("d", Kind::Dir),
                entry("d/l", Kind::Link(b"..".to_vec())),
                entry("m", Kind::Link(b"d/l/../outside".to_vec())),
            ],
            file("m/file", b"bad"),
            file("d/l/outside/file", b"bad"),
        ]
        .concat(),
        // Over one: the link is replaced.
        [
            vec![entry("l", Kind::Link([&out[..], b"/file"].concat()))],
            file("l", b"bad"),
        ]
        .concat(),
        // A directory that becomes one while it is open.
        [
            vec![entry("d", Kind::Dir)],
            file("d/a", b"good"),
            vec![entry("d", Kind::Link(out.clone()))],
            file("d/file", b"bad"),
        ]
        .concat(),
    ]
    .into_iter()
    .enumerate()
    {
        let to = dir.path().join(format!("to-{nth}"));
        let (_, _) = hostile(
            &to,
            &begin,
            &frames([vec![entry("", Kind::Dir)], messages].concat()),
        );
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"before", "{nth}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{nth}");
        // No right that nobody has given.
        for (path, (mode, ..)) in tree(&to) {
            let kind = mode & 0o170_000;
            assert!(kind == 0o120_000 || mode & 0o7000 == 0, "{path:?} {mode:o}");
        }
    }
    // A link that is there already.
    let to = dir.path().join("to-there");
    fs::create_dir(&to).unwrap();
    symlink(&outside, to.join("l")).unwrap();
    let messages = [
        vec![entry("", Kind::Dir), entry("l", Kind::Dir)],
        file("l/file", b"bad"),
        file("good", b"good"),
    ];
    let begin = adit_files::Begin::default();
    let (done, seen) = hostile(&to, &begin, &frames(messages.concat()));
    assert_eq!(done.unwrap().skipped, 2);
    assert_eq!(seen.paths(), ["l", "l/file"]);
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"before");
    assert_eq!(fs::read(to.join("good")).unwrap(), b"good");
}

#[test]
fn r122_a_sender_that_lies_ends_the_copy_and_leaves_nothing_half() {
    let dir = tempfile::tempdir().unwrap();
    let top = || entry("", Kind::Dir);
    let f = |len| entry("f", Kind::File(len));
    let data = |at: u64| Message::data(at, b"12345");
    let whole = |len| Message::End(End::Whole(len));
    let lies: Vec<Vec<Message>> = vec![
        // No top, another top, two of them, something below a file.
        vec![f(Some(1))],
        vec![top(), top()],
        vec![entry("", Kind::File(Some(0))), whole(0), f(Some(0))],
        vec![entry("", Kind::Link(b"x".to_vec())), f(Some(0))],
        // Sizes.
        vec![top(), f(Some(4)), data(0)],
        vec![top(), f(Some(9)), data(0), whole(8)],
        vec![top(), f(Some(9)), data(0), whole(5)],
        vec![top(), f(None), data(0), whole(4)],
        vec![top(), f(Some(u64::MAX >> 1)), data(u64::MAX - 2)],
        vec![top(), f(Some(9)), data(0), data(1)],
        // What is not due.
        vec![top(), data(0)],
        vec![top(), whole(0)],
        vec![top(), f(Some(9)), f(Some(9))],
        vec![top(), f(Some(9)), Message::From(5)],
        vec![top(), Message::Ready(Place::Auto)],
        vec![top(), Message::All(7)],
        vec![Message::All(3)],
    ];
    for (nth, messages) in lies.into_iter().enumerate() {
        let to = dir.path().join(format!("to-{nth}"));
        let frames: Vec<_> = messages.iter().map(Message::encode).collect();
        let (done, _) = hostile(&to, &begin("x"), &frames);
        assert!(matches!(done, Err(Fault::Violation(_))), "{nth}: {done:?}");
        let is_part = |path: &PathBuf| path.to_string_lossy().ends_with(".adit-part");
        assert!(!to.exists() || !tree(&to).keys().any(is_part), "{nth}");
    }
}

#[test]
fn r122_names_of_one_another_and_a_hundred_thousand_of_them_stay_inside() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    // Twice, by case, by normal form: whatever the file system makes of them, each is whole.
    let messages = [
        vec![
            entry("", Kind::Dir),
            entry("d", Kind::Dir),
            entry("d", Kind::Dir),
        ],
        file("d/a", b"1"),
        file("d/a", b"2"),
        file("d/A", b"3"),
        file("d/\u{e9}", b"4"),
        file("d/e\u{301}", b"5"),
    ];
    let (done, _) = hostile(&to, &begin("x"), &frames(messages.concat()));
    assert_eq!(done.unwrap().entries, 8);
    assert_eq!(fs::read(to.join("d/a")).unwrap(), b"2");
    // As many as it likes: nothing is kept of them.
    let many = (0..100_000).map(|n| entry(&format!("d/{}", n % 100), Kind::Link(b"x".to_vec())));
    let messages: Vec<_> = [entry("", Kind::Dir), entry("d", Kind::Dir)]
        .into_iter()
        .chain(many)
        .collect();
    let many = dir.path().join("many");
    let (done, _) = hostile(&many, &begin("x"), &frames(messages));
    assert_eq!(done.unwrap().entries, 100_002);
    assert_eq!(fs::read_dir(many.join("d")).unwrap().count(), 100);
}

/// As rsync's "file has vanished": what changes while it is read is an error, never a mixture.
#[test]
fn rsync_a_source_that_changes_is_broken_and_the_rest_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("a"), vec![1; 8 << 20]).unwrap();
    fs::write(from.join("other"), "other").unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(to.join("a"), "before").unwrap();
    struct Changes(PathBuf, Seen);
    impl Watch for Changes {
        fn moved(&self, _: u64) {
            let file = File::options().write(true).open(&self.0).unwrap();
            file.write_all_at(b"2", 0).unwrap();
        }
        fn entry(&self, _: &[u8]) {}
        fn skipped(&self, path: &[u8], why: &str) {
            self.1.skipped(path, why);
        }
    }
    let watch = Changes(from.join("a"), Seen::default());
    let (mut a, mut b) = pair();
    let begin = Begin::default();
    let source = Source::find(&Root::own().unwrap(), &bytes(&from)).unwrap();
    let sink = target(&to, &begin).unwrap();
    let totals = std::thread::scope(|scope| {
        scope.spawn(|| receive(&mut b, sink, &begin, &(), true).unwrap());
        send(&mut a, source, &begin, &watch).unwrap()
    });
    assert_eq!(totals.skipped, 1);
    assert_eq!(watch.1.paths(), ["a"]);
    assert_eq!(fs::read(to.join("a")).unwrap(), b"before");
    assert_eq!(fs::read(to.join("other")).unwrap(), b"other");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 2);
}

/// A copy is cut off after so many bytes that the sender has sent.
fn cut(from: &Path, to: &Path, begin: &Begin, after: usize) {
    let (mut a, relay_a) = UnixStream::pair()
        .map(|(a, b)| (Stream::new(a.into()).unwrap(), b))
        .unwrap();
    let (relay_b, mut b) = UnixStream::pair()
        .map(|(a, b)| (a, Stream::new(b.into()).unwrap()))
        .unwrap();
    let source = Source::find(&Root::own().unwrap(), &bytes(from)).unwrap();
    let sink = target(to, begin).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut left = after;
            let mut piece = [0; 4096];
            while left > 0 {
                let most = left.min(4096);
                match std::io::Read::read(&mut &relay_a, &mut piece[..most]) {
                    Ok(n) if n > 0 => {
                        (&relay_b).write_all(&piece[..n]).unwrap();
                        left -= n;
                    }
                    _ => break,
                }
            }
        });
        scope.spawn(|| {
            let got = receive(&mut b, sink, begin, &(), true);
            assert!(matches!(got, Err(Fault::Cut(_))), "{got:?}");
        });
        let sent = send(&mut a, source, begin, &());
        assert!(matches!(sent, Err(Fault::Cut(_))), "{sent:?}");
    });
}

/// kubernetes/kubernetes#60140, kubernetes/kubectl#1361 and #1425, canonical/multipass#3093, docker/sbx-releases#142: a large file that
/// is cut off is an error, never a short file under its name; and the copy goes on.
#[test]
fn a_copy_that_was_cut_off_goes_on_where_it_was_and_sends_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir_all(from.join("done")).unwrap();
    for n in 0..20 {
        fs::write(from.join(format!("done/{n}")), vec![n; 5000]).unwrap();
    }
    let content: Vec<u8> = (0..6_000_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 9) as u8)
        .collect();
    fs::write(from.join("large"), &content).unwrap();
    let again = Begin {
        resume: true,
        ..begin("from")
    };
    cut(&from.join("large"), &to, &begin("large"), 3_000_000);
    assert!(!to.exists());
    let part = dir.path().join(".to.adit-part");
    let had = part.metadata().unwrap().len();
    assert!(had > 2_000_000, "{had}");
    let (totals, _) = copy(&from.join("large"), &to, &again);
    assert_eq!(totals.bytes, 6_000_000 - had);
    assert!(fs::read(&to).unwrap() == content && !part.exists());
    // What is whole is not sent a second time, unless it is not the same: here with the same size and time.
    let (totals, _) = copy(&from.join("large"), &to, &again);
    assert_eq!(totals.bytes, 0);
    let mtime = to.metadata().unwrap().modified().unwrap();
    let file = File::options().write(true).open(&to).unwrap();
    file.write_all_at(b"other", 77).unwrap();
    file.set_modified(mtime).unwrap();
    let (totals, _) = copy(&from.join("large"), &to, &again);
    assert_eq!(totals.bytes, 6_000_000);
    assert!(fs::read(&to).unwrap() == content);
    // A part that is of something else counts for nothing.
    fs::remove_file(&to).unwrap();
    fs::write(&part, vec![3; 1000]).unwrap();
    let (totals, _) = copy(&from.join("large"), &to, &again);
    assert_eq!(totals.bytes, 6_000_000);
    assert!(fs::read(&to).unwrap() == content);
    // A tree.
    let tree_to = dir.path().join("tree");
    cut(&from, &tree_to, &begin("from"), 2_000_000);
    let place = Place::Itself;
    let (totals, _) = copy(&from, &tree_to, &Begin { place, ..again });
    assert!(
        totals.bytes < 6_100_000 && totals.skipped == 0,
        "{totals:?}"
    );
    assert!(tree(&from) == tree(&tree_to));
}

#[test]
fn two_copies_to_one_place_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    let begin = begin("x");
    let (mut a, mut b) = pair();
    let sink = target(&to, &begin).unwrap();
    std::thread::scope(|scope| {
        let got = scope.spawn(|| receive(&mut b, sink, &begin, &(), true));
        a.say(&entry("", Kind::File(None))).unwrap();
        a.say(&Message::data(0, b"first")).unwrap();
        a.flush().unwrap();
        while !dir.path().join(".to.adit-part").exists() {
            std::thread::yield_now();
        }
        // It is not the other's to take.
        std::thread::sleep(Duration::from_millis(50));
        let from = dir.path().join("from");
        fs::write(&from, "second").unwrap();
        let (sent, second, _) = both(&from, &to, &begin);
        let refused = second.unwrap_err().refusal().unwrap();
        assert_eq!(refused.reason, refusal::BUSY);
        assert!(matches!(sent, Err(Fault::Refused(_))));
        a.say(&Message::End(End::Whole(5))).unwrap();
        a.say(&Message::All(1)).unwrap();
        a.flush().unwrap();
        got.join().unwrap().unwrap();
    });
    assert_eq!(fs::read(&to).unwrap(), b"first");
}

#[test]
fn pipes_go_both_ways_and_one_that_breaks_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("to");
    let (mut a, mut b) = pair();
    let begin = begin("");
    let content = vec![9; 700_000];
    let source = Source::Pipe(Box::new(std::io::Cursor::new(content.clone())));
    let sink = target(&to, &begin).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| send(&mut a, source, &begin, &()).unwrap());
        receive(&mut b, sink, &begin, &(), false).unwrap();
    });
    assert_eq!(fs::read(&to).unwrap(), content);
    // Back, with a hole.
    let file = File::create(&to).unwrap();
    file.set_len(200_000).unwrap();
    file.write_all_at(b"x", 100_000).unwrap();
    let (mut a, mut b) = pair();
    let source = Source::find(&Root::own().unwrap(), &bytes(&to)).unwrap();
    let (got, put) = UnixStream::pair().unwrap();
    let sink = Sink::Pipe(Box::new(put));
    let read = std::thread::scope(|scope| {
        scope.spawn(|| send(&mut a, source, &begin, &()).unwrap());
        scope.spawn(|| receive(&mut b, sink, &begin, &(), false).unwrap());
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut &got, &mut all).unwrap();
        all
    });
    assert_eq!(read, fs::read(&to).unwrap());
    // A directory is no file.
    let (mut a, mut b) = pair();
    let source = Source::find(&Root::own().unwrap(), &bytes(dir.path())).unwrap();
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| send(&mut a, source, &begin, &()).map(|_| ()).unwrap_err());
        let got = receive(&mut b, Sink::Pipe(Box::new(Vec::new())), &begin, &(), false);
        b.end(
            got.as_ref()
                .err()
                .and_then(Fault::refusal)
                .map(Message::Refused)
                .as_ref(),
        );
        got.unwrap_err().refusal().unwrap()
    });
    assert_eq!(refused.reason, refusal::KIND);
}

#[test]
fn r106_warnings_without_end_stop_nobody_and_are_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::write(&from, vec![1; 4 << 20]).unwrap();
    let (mut a, mut b) = pair();
    let source = Source::find(&Root::own().unwrap(), &bytes(&from)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // It reads nothing for a while, and says more than any buffer has.
            let text = "x".repeat(500);
            for n in 0..20_000 {
                let path = format!("{n}").into_bytes();
                let text = text.clone();
                b.say(&Message::Skipped(Skipped { path, text })).unwrap();
            }
            b.flush().unwrap();
            while !matches!(b.hear().unwrap(), Message::All(_)) {}
            b.say(&Message::Totals(Totals::default())).unwrap();
            b.flush().unwrap();
        });
        let seen = Seen::default();
        send(&mut a, source, &Begin::default(), &seen).unwrap();
        assert_eq!(seen.paths().len(), 20_000);
    });
}

/// kubernetes/kubernetes#78211: a target in a directory that a link leads to. #52465: a file with a slash behind it, what is not there, an
/// empty directory, and a link that becomes an empty file. kubernetes/kubectl#1375: links, and names that begin with two dots.
#[test]
fn kubectl_78211_52465_1375_links_and_odd_names_are_copied_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("from/..2023/empty")).unwrap();
    fs::write(at("from/..2023/token"), "x").unwrap();
    symlink("..2023", at("from/..data")).unwrap();
    symlink("..data/token", at("from/token")).unwrap();
    fs::create_dir(at("directory")).unwrap();
    symlink(at("directory"), at("link")).unwrap();
    copy(&at("from"), &at("link/to"), &begin("from"));
    assert!(tree(&at("from")) == tree(&at("directory/to")));
    assert_eq!(fs::read(at("directory/to/token")).unwrap(), b"x");
    // Into the directory that it leads to.
    copy(&at("from/..2023/token"), &at("link"), &begin("token"));
    assert_eq!(fs::read(at("directory/token")).unwrap(), b"x");
    // A source that is a link is what it leads to.
    copy(&at("from/token"), &at("plain"), &begin("token"));
    assert!(at("plain").symlink_metadata().unwrap().is_file());
    for path in ["from/..2023/token/", "no-such", "from/token/x"] {
        let found = Source::find(&Root::own().unwrap(), &bytes(&at(path)));
        assert!(found.is_err(), "{path}");
    }
}

#[test]
fn attributes_of_users_are_copied_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, "x").unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    if let Err(e) = rustix::fs::setxattr(&from, "user.note", b"kept", flags) {
        println!("skipped: this file system has no attributes of users: {e}");
        return;
    }
    let value = |at: &Path| {
        let mut value = [0; 16];
        rustix::fs::getxattr(at, "user.note", &mut value[..]).map(|n| value[..n].to_vec())
    };
    copy(&from, &to, &begin("x"));
    assert!(value(&to).is_err());
    let with = Begin {
        xattrs: true,
        sync: true,
        ..begin("x")
    };
    copy(&from, &to, &with);
    assert_eq!(value(&to).unwrap(), b"kept");
}
