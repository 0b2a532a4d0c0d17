//! Descriptors that another process passed, until it is known what they are.
//!
//! Any file may lie in a file system in user space (FUSE), whose server answers when it likes, or never. Then whoever asks
//! for the file's size waits, and so does whoever closes its descriptor, for a close asks the file system too, and no
//! signal ends that. So nothing is asked here that the kernel does not answer by itself:
//!
//! | what came | how it is known | let go |
//! |---|---|---|
//! | memory | it has seals, as nothing else has | at once |
//! | a doorbell | it has no type of file, by what is known of it without asking (`AT_STATX_DONT_SYNC`) | at once |
//! | a pipe, a socket | its type | at once |
//! | anything else | | by a thread that may wait for ever |
//!
//! While more than [`PENDING_MAX`] of the last kind wait, nobody is listened to: the kernel closes what was never taken
//! out of a socket, and asks nobody about it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use adit_ringbuf::{Mapped, MemfdError};
use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, statx};
use vmm_sys_util::eventfd::EventFd;

use crate::doorbell;

/// Descriptors that wait to be closed at most, but for those that came in one packet with the last of them.
pub const PENDING_MAX: usize = 256;
/// How long those who come next wait for files that are closed in order, only many at once.
const PATIENCE: Duration = Duration::from_millis(200);

static PENDING: AtomicUsize = AtomicUsize::new(0);
static CLOSER: OnceLock<Option<Sender<OwnedFd>>> = OnceLock::new();

/// Starts the thread that closes what may keep it waiting. A process that is going to have no more threads calls this
/// before; elsewhere the first such descriptor does.
pub fn prepare() {
    let _ = closer();
}

fn closer() -> Option<&'static Sender<OwnedFd>> {
    let start = || {
        let (to, queue) = channel::<OwnedFd>();
        let close = move || {
            for fd in queue {
                drop(fd);
                PENDING.fetch_sub(1, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new().name("closer".into());
        thread.spawn(close).ok().map(|_| to)
    };
    CLOSER.get_or_init(start).as_ref()
}

/// Whether so many wait to be closed, and go on waiting, that no more can be taken.
pub(crate) fn overfull() -> bool {
    let begin = Instant::now();
    while PENDING.load(Ordering::Relaxed) >= PENDING_MAX {
        if begin.elapsed() >= PATIENCE {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// A descriptor of which nothing is known.
#[derive(Debug)]
pub(crate) struct Passed(Option<OwnedFd>);

impl From<OwnedFd> for Passed {
    fn from(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }
}

impl Passed {
    /// Takes it for a region's memory.
    pub(crate) fn memory(mut self, bytes: usize) -> Result<Mapped, MemfdError> {
        match self.0.take_if(|fd| has_seals(fd.as_fd())) {
            Some(fd) => Mapped::from_memfd(fd, bytes),
            None => Err(MemfdError::NotSealed),
        }
    }

    /// Takes it for a doorbell.
    pub(crate) fn doorbell(mut self) -> io::Result<EventFd> {
        match self
            .0
            .take_if(|fd| kind(fd.as_fd()) == Some(FileType::Unknown))
        {
            Some(fd) => doorbell::from_nameless(fd),
            None => Err(doorbell::no_eventfd()),
        }
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        let Some(fd) = self.0.take() else { return };
        let at_once = matches!(
            kind(fd.as_fd()),
            Some(FileType::Unknown | FileType::Socket | FileType::Fifo)
        );
        if at_once || has_seals(fd.as_fd()) {
            return;
        }
        let Some(closer) = closer() else { return };
        PENDING.fetch_add(1, Ordering::Relaxed);
        // It is there for as long as the process is.
        let _ = closer.send(fd);
    }
}

/// What the kernel knows of its type by itself.
fn kind(fd: BorrowedFd<'_>) -> Option<FileType> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(fd, c"", flags, StatxFlags::TYPE).ok()?;
    Some(FileType::from_raw_mode(found.stx_mode.into()))
}

fn has_seals(fd: BorrowedFd<'_>) -> bool {
    fcntl_get_seals(fd).is_ok()
}
