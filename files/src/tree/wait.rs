//! Waiting until something is there: told by the kernel (inotify), by whom every directory on the way is watched.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use super::beneath::{DIR, Root};
use super::link::{Fault, Stream};
use super::list::stat;
use crate::wire::{Row, Violation, refusal};

/// How often it is looked at without being told: of a mount, of another machine's change, and in a directory that the user may not read
/// the kernel tells nothing.
const AGAIN: Duration = Duration::from_secs(2);
const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);

/// Waits until something is at a path, and says what; none: whoever waited has gone.
///
/// # Errors
/// It cannot be there, or may not be seen; or the other side says something.
pub fn wait(root: &Root, path: &[u8], stream: &Stream) -> Result<Option<Row>, Fault> {
    let failed = |e: Errno| Fault::local("wait for", path, e);
    loop {
        // Anew each time, so that no watch is of what has been moved away meanwhile.
        let told = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(failed)?;
        watch(root, path, &told);
        // After that: what comes before it is seen here, and what comes behind it is told.
        match stat(root, path) {
            Err(Fault::Local(why)) if why.reason == refusal::NOT_FOUND => {}
            found => return found.map(Some),
        }
        let again = Timespec::try_from(AGAIN).ok();
        let mut fds = [
            PollFd::new(&told, PollFlags::IN),
            PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, again.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(failed(e)),
        }
        if !fds[1].revents().is_empty() {
            return match stream.is_at_end() {
                true => Ok(None),
                false => Err(Fault::Violation(Violation::NotDue)),
            };
        }
    }
}

/// Watches each directory of a path that there is. What cannot be watched is looked at again.
fn watch(root: &Root, path: &[u8], told: &OwnedFd) {
    let ends = path.iter().enumerate().filter(|(_, b)| **b == b'/');
    let ends = std::iter::once(0).chain(ends.map(|(at, _)| at));
    for end in ends {
        let Ok(dir) = root.open(&path[..end], DIR) else {
            return;
        };
        let by = format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd());
        let _ = inotify::add_watch(told, by, EVENTS);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Instant;

    use super::*;

    type Got = Result<Option<Row>, Fault>;

    fn waits(root: &Path, path: &'static str) -> (Receiver<Got>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (tell, told) = channel();
        let root = root.to_str().unwrap().to_owned();
        std::thread::spawn(move || {
            let stream = Stream::new(theirs.into()).unwrap();
            let whole = format!("{root}/{path}");
            let (root, path) = Root::of(&root, &whole).unwrap();
            tell.send(wait(&root, path, &stream))
        });
        (told, ours)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn it_is_told_when_a_file_comes_however_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let at = |path: &str| root.join(path);
        fs::create_dir(at("a")).unwrap();
        // It is there already.
        fs::write(at("a/there"), "x").unwrap();
        let (told, _stream) = waits(&root, "a/there");
        let row = told.recv_timeout(LONG).unwrap().unwrap().unwrap();
        assert_eq!((row.kind, row.size), ('-', 1));
        // It is made; its directories are made; all of it is moved there; a directory above is swapped for another one.
        type Step = (&'static str, fn(&Path));
        let steps: [Step; 4] = [
            ("a/made", |at| fs::write(at.join("a/made"), "").unwrap()),
            ("b/c/d/e", |at| {
                fs::create_dir_all(at.join("b/c/d")).unwrap();
                fs::write(at.join("b/c/d/e"), "").unwrap();
            }),
            ("m/n", |at| {
                fs::create_dir(at.join("m-")).unwrap();
                fs::write(at.join("m-/n"), "").unwrap();
                fs::rename(at.join("m-"), at.join("m")).unwrap();
            }),
            ("a/x/y", |at| {
                fs::create_dir(at.join("a/x")).unwrap();
                fs::rename(at.join("a"), at.join("old")).unwrap();
                fs::create_dir_all(at.join("a/x")).unwrap();
                fs::write(at.join("a/x/y"), "").unwrap();
            }),
        ];
        for (path, step) in steps {
            let (told, _stream) = waits(&root, path);
            assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
            let begin = Instant::now();
            step(&root);
            let row = told.recv_timeout(LONG).unwrap().unwrap();
            assert_eq!(row.unwrap().kind, '-', "{path}");
            // Told, and not found by looking again.
            assert!(begin.elapsed() < AGAIN / 2, "{path}: {:?}", begin.elapsed());
        }
    }

    #[test]
    fn it_ends_with_whoever_waits_and_where_nothing_can_come() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (told, stream) = waits(&root, "never");
        drop(stream);
        assert!(matches!(told.recv_timeout(LONG).unwrap(), Ok(None)));
        let (told, stream) = waits(&root, "never");
        std::io::Write::write_all(&mut &stream, b"x").unwrap();
        let got = told.recv_timeout(LONG).unwrap();
        assert!(matches!(got, Err(Fault::Violation(_))), "{got:?}");
        fs::write(root.join("file"), "").unwrap();
        std::os::unix::fs::symlink("..", root.join("out")).unwrap();
        for path in ["file/below", "out/x"] {
            let (told, _stream) = waits(&root, path);
            let got = told.recv_timeout(LONG).unwrap();
            assert!(matches!(got, Err(Fault::Local(_))), "{path}: {got:?}");
        }
    }
}
