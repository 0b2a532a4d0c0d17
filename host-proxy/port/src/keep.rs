//! Sends what a successor of this process needs from the frontend's thread to `aditd`. Also writes a note about the connected
//! VMM, for the case that this process is killed while no `aditd` keeps anything.
//!
//! ```text
//! frontend's thread ── keep ─► latest ── loop ─► Handover ─► aditd
//!         │ waits, at most KEEP_LIMIT             Kept ◄─────┘
//!         └─► answers the frontend
//! ```
//! Without an `aditd` the thread does not wait: the next `aditd` gets the latest state when it connects. If this process is
//! killed before that, its successor finds the note, sees that the VMM still runs, and reports that it is stuck.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use adit_channel::live::LiveFile;
use adit_channel::vhost_user::{self, Keeper, Releaser};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::control::{HANDOVER_FDS_MAX, Handover, RING_FDS};

const _: () = assert!(HANDOVER_FDS_MAX == 1 + adit_channel::vhost_user::DESCRIPTORS_MAX + RING_FDS);

/// How long a frontend waits for an `aditd` that is connected but does not answer.
pub const KEEP_LIMIT: Duration = Duration::from_secs(1);
/// Name of the note in the VM's directory.
pub const NOTE: &str = crate::control::VMM_NOTE;
/// The note is overwritten, never truncated: `PID\n`, padded with spaces.
const NOTE_BYTES: usize = 16;

/// The latest state and its number.
#[derive(Debug, Default)]
pub struct Latest {
    /// Counts from 1; 0: there is no state yet.
    pub seq: u64,
    /// `None`: no frontend.
    pub handover: Option<vhost_user::Handover>,
    /// [`RING_FDS`] descriptors of the ring, or none.
    pub ring: Vec<OwnedFd>,
}

struct State {
    latest: Latest,
    acked: u64,
    /// An `aditd` is connected, and answers.
    keeping: bool,
    stuck: Option<String>,
    /// Why the last frontend was disconnected.
    refused: Option<String>,
    released: bool,
}

struct Shared {
    state: Mutex<State>,
    acked: Condvar,
    /// Readable when the loop must look at the state.
    news: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then it is readable.
        let _ = self.news.write(1);
    }
}

/// The end that belongs to the loop.
pub struct Keeping {
    shared: Arc<Shared>,
    live: Arc<LiveFile>,
    releaser: Option<Releaser>,
}

/// The end that belongs to the frontend's thread.
pub struct ThreadKeeper {
    shared: Arc<Shared>,
    note: Note,
}

impl Keeping {
    /// Makes both ends. `stuck`: why a VMM that is still connected to a predecessor cannot be served.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(
        live: Arc<LiveFile>,
        note: Note,
        stuck: Option<String>,
    ) -> io::Result<(Self, ThreadKeeper)> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                latest: Latest::default(),
                acked: 0,
                keeping: false,
                stuck,
                refused: None,
                released: false,
            }),
            acked: Condvar::new(),
            news: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        });
        let keeper = ThreadKeeper {
            shared: shared.clone(),
            note,
        };
        let keeping = Self {
            shared,
            live,
            releaser: None,
        };
        Ok((keeping, keeper))
    }

    /// Sets what asks the frontend's thread to release its frontend.
    pub fn set_releaser(&mut self, releaser: Releaser) {
        self.releaser = Some(releaser);
    }

    /// Readable when the loop must look at the state.
    pub fn news(&self) -> BorrowedFd<'_> {
        self.shared.news.as_fd()
    }

    /// Clears [`news`](Self::news).
    pub fn clear_news(&self) {
        let _ = self.shared.news.read();
    }

    /// `aditd` connected or disconnected.
    pub fn set_connected(&self, connected: bool) {
        self.shared.lock().keeping = connected;
        self.shared.acked.notify_all();
        if connected {
            self.shared.wake();
        }
    }

    /// `aditd` keeps the state with this number.
    pub fn kept(&self, seq: u64) {
        let mut state = self.shared.lock();
        state.acked = state.acked.max(seq.min(state.latest.seq));
        // It answers, even if late.
        state.keeping = true;
        self.shared.acked.notify_all();
    }

    /// Returns the state if it is newer than `said`: the frame, and duplicates of the descriptors.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn newer_than(&self, said: u64) -> io::Result<Option<(Handover, Vec<OwnedFd>)>> {
        let state = self.shared.lock();
        let Latest {
            seq,
            handover,
            ring,
        } = &state.latest;
        if *seq <= said {
            return Ok(None);
        }
        let mut fds = vec![self.live.as_fd().try_clone_to_owned()?];
        let mut record = Vec::new();
        if let Some(handover) = handover {
            record.clone_from(&handover.bytes);
            for fd in &handover.fds {
                fds.push(fd.try_clone()?);
            }
        }
        for fd in ring {
            fds.push(fd.try_clone()?);
        }
        let (seq, ring) = (*seq, ring.len() as u8);
        Ok(Some((Handover { seq, record, ring }, fds)))
    }

    /// Keeps these descriptors of a ring from now on. Empty: there is no ring.
    pub fn set_ring(&self, fds: Vec<OwnedFd>) {
        debug_assert!(fds.is_empty() || fds.len() == RING_FDS);
        let mut state = self.shared.lock();
        state.latest.seq += 1;
        state.latest.ring = fds;
        drop(state);
        self.shared.wake();
    }

    /// Why the VMM that is connected to a predecessor cannot be served, if there is one.
    pub fn stuck(&self) -> Option<String> {
        self.shared.lock().stuck.clone()
    }

    /// Why the last frontend was disconnected, unless a session began since.
    pub fn refused(&self) -> Option<String> {
        self.shared.lock().refused.clone()
    }

    /// A session began: forgets why the last frontend was disconnected.
    pub fn accepted(&self) {
        self.shared.lock().refused = None;
    }

    /// Asks the frontend's thread to release its frontend.
    pub fn release(&self) {
        match &self.releaser {
            Some(releaser) => releaser.release(),
            None => {
                self.shared.lock().released = true;
                self.shared.wake();
            }
        }
    }

    /// Tells whether the frontend was released.
    pub fn released(&self) -> bool {
        self.shared.lock().released
    }
}

impl Keeper for ThreadKeeper {
    fn keep(&mut self, handover: Option<vhost_user::Handover>) {
        self.note.write(handover.as_ref());
        let mut state = self.shared.lock();
        if handover.is_some() {
            state.stuck = None;
        }
        state.latest.seq += 1;
        state.latest.handover = handover;
        let seq = state.latest.seq;
        self.shared.wake();
        let end = Instant::now() + KEEP_LIMIT;
        while state.keeping && state.acked < seq {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(
                    "aditd does not confirm that it keeps the state: the frontend waits no longer"
                );
                state.keeping = false;
                return;
            }
            let waited = self.shared.acked.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn stuck(&mut self, why: String) {
        self.shared.lock().stuck = Some(why);
        self.shared.wake();
    }

    fn refused(&mut self, why: String) {
        self.shared.lock().refused = Some(why);
        self.shared.wake();
    }

    fn released(&mut self) {
        self.shared.lock().released = true;
        self.shared.wake();
    }
}

/// A file with the pid of the connected VMM.
#[derive(Debug)]
pub struct Note {
    file: File,
    /// The file's content.
    pid: Option<i32>,
}

impl Note {
    /// Opens the note of a VM's directory.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(dir.join(NOTE))?;
        let pid = read_pid(&file);
        Ok(Self { file, pid })
    }

    /// Returns the process that was connected to a predecessor when that was killed, if it still runs. 0 is a process of
    /// another PID namespace.
    pub fn orphan(&self) -> Option<i32> {
        let pid = self.pid?;
        let written = self.file.metadata().and_then(|m| m.modified()).ok()?;
        (pid == 0 || runs_since_before(pid, written)).then_some(pid)
    }

    /// Empties the note: the VMM that a predecessor left was taken over or is gone.
    pub fn clear(&mut self) {
        self.set(None);
    }

    fn write(&mut self, handover: Option<&vhost_user::Handover>) {
        let pid = handover.and_then(|h| h.fds.first()).map(peer_pid);
        if pid != self.pid {
            self.set(pid);
        }
    }

    fn set(&mut self, pid: Option<i32>) {
        let mut text = pid
            .map_or_else(String::new, |pid| format!("{pid}\n"))
            .into_bytes();
        text.resize(NOTE_BYTES, b' ');
        let write = |mut file: &File| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&text)
        };
        match write(&self.file) {
            Ok(()) => self.pid = pid,
            Err(e) => tracing::warn!(error = %e, "cannot write the note about the VMM"),
        }
    }
}

fn read_pid(mut file: &File) -> Option<i32> {
    let mut text = [0; NOTE_BYTES];
    let n = file.read(&mut text).ok()?;
    let pid = std::str::from_utf8(&text[..n]).ok()?.trim().parse().ok()?;
    (pid >= 0).then_some(pid)
}

fn peer_pid(socket: &OwnedFd) -> i32 {
    getsockopt(socket, PeerCredentials).map_or(0, |c| c.pid())
}

/// Tells whether the process with this pid started before the note was written. If not, it is another process with the same pid.
fn runs_since_before(pid: i32, written: SystemTime) -> bool {
    let Some(age) = age_of(pid) else { return false };
    let since_note = SystemTime::now().duration_since(written);
    // One second of tolerance, because the two clocks differ in their resolution.
    age + Duration::from_secs(1) >= since_note.unwrap_or_default()
}

/// Time since a process started. `None`: it does not run, or /proc does not say.
fn age_of(pid: i32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Fields 3 and 22. Count from behind the process's name, which may contain anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    let started: f64 = fields.nth(18)?.parse().ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split(' ').next()?.parse().ok()?;
    // The kernel reports ticks of 1/100 s (USER_HZ), whatever it uses itself.
    Duration::try_from_secs_f64((uptime - started / 100.0).max(0.0)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn handover(peer: UnixStream) -> vhost_user::Handover {
        vhost_user::Handover {
            bytes: vec![1, 0],
            fds: vec![peer.into()],
        }
    }

    fn rig() -> (Keeping, ThreadKeeper, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let live = Arc::new(LiveFile::create().unwrap());
        let note = Note::open(dir.path()).unwrap();
        let (keeping, keeper) = Keeping::new(live, note, None).unwrap();
        (keeping, keeper, dir)
    }

    #[test]
    fn the_note_names_a_vmm_that_still_runs_and_no_other() {
        let (_, mut keeper, dir) = rig();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        keeper.keep(Some(handover(ours)));
        let note = Note::open(dir.path()).unwrap();
        assert_eq!(note.orphan(), i32::try_from(std::process::id()).ok());
        // The pid belongs to a process that started long after the note was written.
        let long_ago = SystemTime::now() - Duration::from_secs(100_000_000);
        note.file.set_modified(long_ago).unwrap();
        assert_eq!(note.orphan(), None);
        keeper.keep(None);
        assert_eq!(Note::open(dir.path()).unwrap().orphan(), None);
    }

    #[test]
    fn a_ring_is_kept_beside_the_frontend_and_without_it() {
        let (keeping, mut keeper, _dir) = rig();
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        keeping.set_ring((0..RING_FDS).map(|_| null()).collect());
        let (alone, fds) = keeping.newer_than(0).unwrap().unwrap();
        assert_eq!((alone.seq, alone.record.len()), (1, 0));
        assert_eq!(
            (usize::from(alone.ring), fds.len()),
            (RING_FDS, 1 + RING_FDS)
        );
        let (ours, _theirs) = UnixStream::pair().unwrap();
        keeper.keep(Some(handover(ours)));
        let (both, fds) = keeping.newer_than(1).unwrap().unwrap();
        assert_eq!(
            (usize::from(both.ring), fds.len()),
            (RING_FDS, 2 + RING_FDS)
        );
        keeping.set_ring(vec![]);
        let (without, fds) = keeping.newer_than(2).unwrap().unwrap();
        assert_eq!((without.seq, without.ring, fds.len()), (3, 0, 2));
    }

    #[test]
    fn a_frontend_waits_for_an_aditd_that_answers_and_for_no_other() {
        let (keeping, mut keeper, _dir) = rig();
        keeper.keep(None); // no aditd is connected
        keeping.set_connected(true);
        let thread = std::thread::spawn(move || {
            let (ours, _theirs) = UnixStream::pair().unwrap();
            keeper.keep(Some(handover(ours)));
            keeper
        });
        let (handover, fds) = loop {
            if let Some(newer) = keeping.newer_than(1).unwrap() {
                break newer;
            }
        };
        assert_eq!((handover.seq, fds.len()), (2, 2));
        assert_eq!(handover.record, [1, 0]);
        keeping.kept(1);
        assert!(!thread.is_finished());
        keeping.kept(2);
        let mut keeper = thread.join().unwrap();
        // aditd disconnects while the thread waits for it.
        let thread = std::thread::spawn(move || keeper.keep(None));
        keeping.set_connected(false);
        thread.join().unwrap();
        assert!(keeping.newer_than(2).unwrap().is_some());
        assert!(keeping.newer_than(3).unwrap().is_none());
    }
}
