//! What a killed process leaves for its successor: a memfd with the port pairs that were in use, and with the progress
//! of the frontend's last message. A process that has a duplicate of the descriptor can start a successor with it.
//!
//! | offset | size | field | writer |
//! |---|---|---|---|
//! | 0 | 8 | magic `ADITLIV` and version 1 | creator |
//! | 8 | 8 | epoch of the last session | shard |
//! | 16 | 8 | changes of state that the frontend has made so far | frontend's thread |
//! | 24 | 8 | progress of the current message (`Step`) | frontend's thread |
//! | 32 | 8 | offset of the reply in this file | frontend's thread |
//! | 40 | 8 | length of the reply, bytes | frontend's thread |
//! | 48 | 8 | number of pair entries that were ever used: nothing is written after them | shard |
//! | 4,096 | 12,288 | replies, used as a circular buffer | frontend's thread |
//! | 16,384 | 8 × [`PAIRS_MAX`] | pairs: our port in the upper half, the guest's in the lower; 0 = free | shard |
//!
//! Rules:
//! - Every field is one aligned 8-byte store, so after a kill it has either the old or the new value.
//! - A pair is entered before anything of it is published to the guest, and removed after the last of it was
//!   published. So the file may list a pair too many (an unnecessary reset), but never one too few.
//! - The file is sealed to its size. A successor checks all content that it uses, because the guest may have
//!   controlled the dead process.

// Without vhost-user the functions for the frontend's thread are unused.
#![cfg_attr(not(feature = "vhost-user"), allow(dead_code))]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use adit_engine::{PairChange, STREAMS_MAX};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Number of pairs in a file: those of one process, and as many inherited ones that were not reset yet.
pub const PAIRS_MAX: usize = 2 * STREAMS_MAX as usize;

const MAGIC: u64 = u64::from_le_bytes(*b"ADITLIV\x01");
const AT_EPOCH: usize = 8;
const AT_CHANGES: usize = 16;
const AT_STEP: usize = 24;
const AT_REPLY: usize = 32;
const AT_REPLY_LEN: usize = 40;
const AT_USED: usize = 48;
const REPLIES: usize = 4096;
const PAIRS: usize = 16384;
const FILE_BYTES: usize = PAIRS + 8 * PAIRS_MAX;

/// Longest reply in bytes.
pub const REPLY_MAX: usize = 4096;
/// No process can reach this number of epochs or changes. Larger values in a file are invalid, so the counters cannot
/// overflow.
pub(crate) const COUNT_END: u64 = 1 << 48;

/// Why a descriptor is not a live file: the fault of the process that passed it.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The descriptor cannot be examined or mapped.
    #[error("the live file cannot be used")]
    Io(#[from] io::Error),
    /// The file could shrink while it is mapped.
    #[error("the live file is not sealed to its size")]
    NotSealed,
    /// The size is wrong.
    #[error("the live file has {found} bytes, but it must have {FILE_BYTES}")]
    Size {
        /// Actual size in bytes.
        found: i64,
    },
    /// It is another file, or one of a newer build.
    #[error("the live file starts with {found:#x}: it is another file, or of another version")]
    Magic {
        /// The first word of the file.
        found: u64,
    },
    /// The epoch is impossibly high.
    #[error("the live file has the impossible epoch {found}")]
    Epoch {
        /// The epoch in the file.
        found: u64,
    },
}

/// The progress of a process with the frontend's current message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The message, if there is one, is still in the socket.
    Idle,
    /// The message was handled. It is being taken from the socket; after that the reply, if there is one, is sent.
    Taking,
    /// The message was taken, and its reply is being sent.
    Replying,
    /// The message arrived in pieces, and some were taken before it was complete.
    Pieces,
}

/// The reply that a process was sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) at: u64,
    pub(crate) len: u64,
}

/// The mapped file.
#[derive(Debug)]
pub struct LiveFile {
    file: Arc<File>,
    map: MmapRegion<()>,
}

impl LiveFile {
    /// Creates an empty live file.
    ///
    /// # Errors
    /// The system has no memory or no descriptors left.
    pub fn create() -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("adit-live", flags)?);
        file.set_len(FILE_BYTES as u64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let live = Self::map(file)?;
        live.store(0, MAGIC);
        Ok(live)
    }

    /// Takes over the live file of a predecessor.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn open(fd: OwnedFd) -> Result<Self, LiveError> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)
            .map(SealFlag::from_bits_truncate)
            .unwrap_or(SealFlag::empty());
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(LiveError::NotSealed);
        }
        let found = nix::sys::stat::fstat(&fd).map_err(io::Error::from)?.st_size;
        if usize::try_from(found) != Ok(FILE_BYTES) {
            return Err(LiveError::Size { found });
        }
        let live = Self::map(fd.into())?;
        match (live.load(0), live.epoch()) {
            (MAGIC, ..COUNT_END) => Ok(live),
            (MAGIC, found) => Err(LiveError::Epoch { found }),
            (found, _) => Err(LiveError::Magic { found }),
        }
    }

    fn map(file: File) -> io::Result<Self> {
        let file = Arc::new(file);
        let offset = FileOffset::from_arc(file.clone(), 0);
        let map = MmapRegion::from_file(offset, FILE_BYTES).map_err(io::Error::other)?;
        Ok(Self { file, map })
    }

    /// Epoch of the last session; 0 if there was none.
    pub fn epoch(&self) -> u64 {
        self.load(AT_EPOCH)
    }

    fn load(&self, at: usize) -> u64 {
        let loaded = self.map.as_volatile_slice().load(at, Ordering::Acquire);
        // Every offset is aligned, and is a constant or the offset of an entry below PAIRS_MAX.
        loaded.map_or(0, u64::from_le)
    }

    fn store(&self, at: usize, value: u64) {
        let slice = self.map.as_volatile_slice();
        let stored = slice.store(value.to_le(), at, Ordering::Release);
        debug_assert!(stored.is_ok());
    }

    pub(crate) fn changes(&self) -> u64 {
        self.load(AT_CHANGES)
    }

    pub(crate) fn set_changes(&self, n: u64) {
        self.store(AT_CHANGES, n);
    }

    /// Returns `None` if this build never writes that value.
    pub(crate) fn step(&self) -> Option<Step> {
        match self.load(AT_STEP) {
            0 => Some(Step::Idle),
            1 => Some(Step::Taking),
            2 => Some(Step::Replying),
            3 => Some(Step::Pieces),
            _ => None,
        }
    }

    pub(crate) fn set_step(&self, step: Step) {
        let step = match step {
            Step::Idle => 0,
            Step::Taking => 1,
            Step::Replying => 2,
            Step::Pieces => 3,
        };
        self.store(AT_STEP, step);
    }

    /// The position of the last reply. Returns `None` if there was none, or the position is invalid.
    pub(crate) fn reply(&self) -> Option<Reply> {
        let (at, len) = (self.load(AT_REPLY), self.load(AT_REPLY_LEN));
        let end = at.checked_add(len)?;
        (len > 0 && at >= REPLIES as u64 && end <= PAIRS as u64).then_some(Reply { at, len })
    }

    /// Writes a reply after the last one, because the kernel may still refer to the page of the last one.
    pub(crate) fn write_reply(&self, bytes: &[u8]) -> io::Result<Option<Reply>> {
        if bytes.is_empty() || bytes.len() > REPLY_MAX {
            self.store(AT_REPLY_LEN, 0);
            return Ok(None);
        }
        let len = bytes.len() as u64;
        let next = self
            .reply()
            .map_or(REPLIES as u64, |last| last.at + last.len);
        let at = if next + len > PAIRS as u64 {
            REPLIES as u64
        } else {
            next
        };
        self.store(AT_REPLY_LEN, 0);
        self.map
            .as_volatile_slice()
            .write_slice(bytes, at as usize)
            .map_err(io::Error::other)?;
        self.store(AT_REPLY, at);
        self.store(AT_REPLY_LEN, len);
        Ok(Some(Reply { at, len }))
    }

    fn pair(&self, index: u32) -> u64 {
        self.load(PAIRS + 8 * index as usize)
    }

    fn set_pair(&self, index: u32, pair: u64) {
        self.store(PAIRS + 8 * index as usize, pair);
    }
}

impl AsFd for LiveFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The users of a pair, and its entry in the file.
#[derive(Clone, Copy, Debug)]
struct Place {
    index: u32,
    /// Number of users: a stream of this process, a pending reset for a predecessor's stream, or both.
    users: u32,
}

/// The pairs of a `Port`, stored in the file.
#[derive(Debug)]
pub(crate) struct LiveTable {
    file: Arc<LiveFile>,
    places: HashMap<u64, Place>,
    free: Vec<u32>,
    /// Entries from this index on were never used.
    fresh: u32,
    /// Pairs without users. They are removed when the burst is published.
    leaving: Vec<u64>,
}

fn key(local_port: u32, peer_port: u32) -> u64 {
    u64::from(local_port) << 32 | u64::from(peer_port)
}

impl LiveTable {
    /// Reads the pairs that a predecessor left and returns them. Each must be reset and then be
    /// [`closed`](Self::closed).
    pub(crate) fn new(file: Arc<LiveFile>) -> (Self, Vec<(u32, u32)>) {
        let mut table = Self {
            file,
            places: HashMap::new(),
            free: Vec::new(),
            fresh: 0,
            leaving: Vec::new(),
        };
        let mut inherited = Vec::new();
        let used = table.file.load(AT_USED).min(PAIRS_MAX as u64) as u32;
        for index in 0..used {
            let pair = table.file.pair(index);
            if pair == 0 {
                continue;
            }
            // Only this process's free list tracks the free entries below.
            table.free.extend(table.fresh..index);
            table.fresh = index + 1;
            let place = Place { index, users: 1 };
            if table.places.insert(pair, place).is_some() {
                // A duplicate, which no correct process writes. The later entry counts for both.
                continue;
            }
            inherited.push(((pair >> 32) as u32, pair as u32));
        }
        (table, inherited)
    }

    pub(crate) fn set_epoch(&self, epoch: u64) {
        self.file.store(AT_EPOCH, epoch);
    }

    pub(crate) fn apply(&mut self, change: PairChange) {
        match change {
            PairChange::Opened {
                local_port,
                peer_port,
            } => self.opened(local_port, peer_port),
            PairChange::Closed {
                local_port,
                peer_port,
            } => self.closed(local_port, peer_port),
        }
    }

    fn opened(&mut self, local_port: u32, peer_port: u32) {
        let pair = key(local_port, peer_port);
        if let Some(place) = self.places.get_mut(&pair) {
            place.users += 1;
            return;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None if (self.fresh as usize) < PAIRS_MAX => {
                self.fresh += 1;
                let used = u64::from(self.fresh).max(self.file.load(AT_USED));
                self.file.store(AT_USED, used);
                self.fresh - 1
            }
            // There are as many streams and inherited pairs as possible. After a kill the guest would not learn that
            // this stream is gone.
            None => return tracing::warn!("the live file is full"),
        };
        self.file.set_pair(index, pair);
        self.places.insert(pair, Place { index, users: 1 });
    }

    /// A user of the pair is gone: a stream ended, or the reset for a predecessor's stream is in a slot.
    pub(crate) fn closed(&mut self, local_port: u32, peer_port: u32) {
        let pair = key(local_port, peer_port);
        if let Some(place) = self.places.get_mut(&pair) {
            place.users = place.users.saturating_sub(1);
            if place.users == 0 {
                self.leaving.push(pair);
            }
        }
    }

    /// The burst is published: remove the pairs without users.
    pub(crate) fn published(&mut self) {
        for pair in self.leaving.drain(..) {
            if let Some(place) = self.places.get(&pair)
                && place.users == 0
            {
                self.file.set_pair(place.index, 0);
                self.free.push(place.index);
                self.places.remove(&pair);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(file: &LiveFile) -> Vec<u64> {
        let all = (0..PAIRS_MAX as u32).map(|i| file.pair(i));
        all.filter(|&p| p != 0).collect()
    }

    #[test]
    fn pairs_stay_until_their_end_is_published() {
        let file = Arc::new(LiveFile::create().unwrap());
        let (mut table, inherited) = LiveTable::new(file.clone());
        assert!(inherited.is_empty());
        table.opened(741, 5);
        table.opened(1 << 30, 22);
        assert_eq!(written(&file), [key(741, 5), key(1 << 30, 22)]);
        table.closed(741, 5);
        assert_eq!(written(&file).len(), 2);
        table.published();
        assert_eq!(written(&file), [key(1 << 30, 22)]);
        // A pair that is closed and opened again within one burst stays in the file.
        table.closed(1 << 30, 22);
        table.opened(1 << 30, 22);
        table.published();
        assert_eq!(written(&file), [key(1 << 30, 22)]);
    }

    #[test]
    fn a_successor_finds_the_pairs_and_keeps_those_that_it_uses() {
        let file = Arc::new(LiveFile::create().unwrap());
        let (mut table, _) = LiveTable::new(file.clone());
        for peer in 1..=3 {
            table.opened(741, peer);
        }
        table.closed(741, 2);
        table.published();
        drop(table);
        let again = LiveFile::open(file.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let again = Arc::new(again);
        let (mut table, inherited) = LiveTable::new(again.clone());
        assert_eq!(inherited, [(741, 1), (741, 3)]);
        // The guest opens a new stream from a port whose reset is not sent yet.
        table.opened(741, 3);
        for (local, peer) in inherited {
            table.closed(local, peer);
        }
        table.published();
        assert_eq!(written(&again), [key(741, 3)]);
    }

    #[test]
    fn r35_a_hostile_file_costs_no_more_than_its_size() {
        let file = Arc::new(LiveFile::create().unwrap());
        for index in 0..PAIRS_MAX as u32 {
            file.set_pair(index, u64::from(index % 1000) + 1);
        }
        file.store(AT_USED, u64::MAX);
        let (mut table, inherited) = LiveTable::new(file);
        assert_eq!(inherited.len(), 1000);
        table.opened(9, 9); // no room: a log line, and no other effect
        for (local, peer) in inherited {
            table.closed(local, peer);
        }
        table.published();
    }

    #[test]
    fn r35_other_files_are_refused() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let make = |len, seals| {
            let file = File::from(memfd_create("x", flags).unwrap());
            file.set_len(len).unwrap();
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            LiveFile::open(file.into())
        };
        let shrink = SealFlag::F_SEAL_SHRINK;
        let whole = FILE_BYTES as u64;
        assert!(matches!(
            make(whole, SealFlag::empty()),
            Err(LiveError::NotSealed)
        ));
        assert!(matches!(
            make(whole + 1, shrink),
            Err(LiveError::Size { .. })
        ));
        assert!(matches!(
            make(whole, shrink),
            Err(LiveError::Magic { found: 0 })
        ));
        for found in [COUNT_END, u64::MAX] {
            let file = LiveFile::create().unwrap();
            file.store(AT_EPOCH, found);
            let again = LiveFile::open(file.as_fd().try_clone_to_owned().unwrap());
            assert!(matches!(again, Err(LiveError::Epoch { found: f }) if f == found));
        }
    }

    #[test]
    fn r35_replies_wrap_around_and_an_invalid_position_is_no_reply() {
        let file = LiveFile::create().unwrap();
        assert_eq!(file.reply(), None);
        let mut last = 0;
        for n in 0..5000u64 {
            let reply = file.write_reply(&[7; 20]).unwrap().unwrap();
            assert!(reply.at >= REPLIES as u64 && reply.at + 20 <= PAIRS as u64);
            assert!(n == 0 || reply.at != last);
            assert_eq!(file.reply(), Some(reply));
            last = reply.at;
        }
        file.store(AT_REPLY_LEN, u64::MAX);
        assert_eq!(file.reply(), None);
        file.store(AT_STEP, 17);
        assert_eq!(file.step(), None);
    }
}
