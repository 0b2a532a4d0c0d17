//! Target `succession`: what a process that its guest controlled leaves for its successor: the record of its frontend, the live
//! file, and the unread bytes in the frontend's socket. The successor continues or reports that it cannot; nothing else.
//!
//! Input: number of descriptors, step, changes, place and length of the reply (8 bytes each), number of pairs, pairs, number
//! of unread bytes, those, record.

use std::cell::Cell;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use adit_channel::device::GuestCid;
use adit_channel::live::LiveFile;
use adit_channel::shard::Shard;
use adit_channel::vhost_user::{Handover, Keeper, VhostUserCarrier, VhostUserConfig};
use adit_engine::EngineConfig;
use adit_passed::Closer;
use adit_testkit::memory;
use arbitrary::{Result, Unstructured};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Offsets in the live file (adit-channel, `live.rs`).
const AT_CHANGES: u64 = 16;
const AT_PAIRS: u64 = 16384;
const PATIENCE: Duration = Duration::from_secs(10);
const SLACK: usize = 16;

thread_local! {
    /// Number of inputs so far, and number of descriptors after the first.
    static RUNS: Cell<(u64, usize)> = const { Cell::new((0, 0)) };
}

#[derive(Debug)]
struct Verdict;

struct Reporter(Sender<Verdict>);

impl Keeper for Reporter {
    fn keep(&mut self, _: Option<Handover>) {
        let _ = self.0.send(Verdict);
    }
    fn stuck(&mut self, _: String) {
        let _ = self.0.send(Verdict);
    }
    fn released(&mut self) {}
}

pub fn run(data: &[u8]) {
    let _ = attack(&mut Unstructured::new(data));
    let (runs, open) = RUNS.get();
    // Another thread closes the descriptors that were passed: wait for it.
    while runs.is_multiple_of(256) && Closer::shared().pending() > 0 {
        std::thread::yield_now();
    }
    let now = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    if runs.is_multiple_of(256) {
        assert!(
            runs == 0 || now <= open + SLACK,
            "{now} descriptors, {open} at first"
        );
    }
    RUNS.set((runs + 1, if runs == 0 { now } else { open }));
}

fn attack(u: &mut Unstructured<'_>) -> Result<()> {
    let count = usize::from(u.arbitrary::<u8>()? % 12);
    let step = u64::from(u.arbitrary::<u8>()?);
    let live = LiveFile::create().expect("a memfd");
    let file = std::fs::File::from(live.as_fd().try_clone_to_owned().expect("a descriptor"));
    let put = |at: u64, word: u64| {
        let written = file.write_all_at(&word.to_le_bytes(), at);
        written.expect("inside the file");
    };
    put(AT_CHANGES, u.arbitrary()?);
    put(AT_CHANGES + 8, step);
    put(AT_CHANGES + 16, u.arbitrary()?);
    put(AT_CHANGES + 24, u.arbitrary()?);
    let pairs = u64::from(u.arbitrary::<u8>()?);
    put(AT_CHANGES + 32, pairs * 3);
    for i in 0..pairs {
        put(AT_PAIRS + 8 * i, u.arbitrary()?);
    }
    let (mut frontend, theirs) = UnixStream::pair().expect("a socket");
    let unread = usize::from(u.arbitrary::<u8>()?);
    let unread = unread.min(u.len());
    frontend.write_all(u.bytes(unread)?).expect("room");
    let left = u.len();
    let record = u.bytes(left)?.to_vec();
    succeed(live, record, descriptors(theirs, count), frontend);
    Ok(())
}

fn descriptors(socket: UnixStream, count: usize) -> Vec<OwnedFd> {
    let memory = || OwnedFd::from(memory::memfd().1);
    let event = || OwnedFd::from(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd"));
    let usual = [OwnedFd::from(socket), memory()];
    let events = (2..count).map(|_| event());
    usual.into_iter().take(count).chain(events).collect()
}

fn succeed(live: LiveFile, bytes: Vec<u8>, fds: Vec<OwnedFd>, frontend: UnixStream) {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(dir.path().join("v")).expect("a socket");
    let cid = GuestCid::new(3).expect("a guest's CID");
    let (sender, told) = mpsc::channel();
    let live = Arc::new(live);
    let mut config = VhostUserConfig::new(listener, cid, "fuzz");
    config.live = Some(live.clone());
    config.keeper = Some(Box::new(Reporter(sender)));
    config.resume = Some(Handover { bytes, fds });
    let carrier = VhostUserCarrier::new(config).expect("a backend");
    let mut shard = Shard::new().expect("a shard");
    let port = shard
        .add(carrier, EngineConfig::default(), 1)
        .expect("a port");
    shard.port_mut(port).keep_live(live);
    verdict(&mut shard, &told);
    // The unread bytes are a message, or an incomplete one at the end of the connection.
    let _ = frontend.shutdown(std::net::Shutdown::Write);
    for _ in 0..4 {
        turn(&mut shard);
    }
}

fn turn(shard: &mut Shard<VhostUserCarrier>) {
    shard.turn(Some(Duration::ZERO)).expect("it can wait");
    while shard.poll_news().is_some() {}
}

fn verdict(shard: &mut Shard<VhostUserCarrier>, told: &Receiver<Verdict>) {
    let end = Instant::now() + PATIENCE;
    loop {
        match told.recv_timeout(Duration::from_micros(50)) {
            Ok(Verdict) => return,
            Err(RecvTimeoutError::Disconnected) => panic!("the frontend's thread has ended"),
            // The frontend's thread may be waiting for the shard.
            Err(RecvTimeoutError::Timeout) => turn(shard),
        }
        assert!(Instant::now() < end, "no verdict");
    }
}
