//! A journal that is looked at and not written: what the database writes stays in memory.
//!
//! A check of the database repairs what it can, and a repair may go back to an earlier state, in which a task that ran has not
//! run yet. So the check must not leave one behind.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::sync::{Mutex, PoisonError};

use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

const BLOCK: u64 = 4096;

/// A file below, and the blocks that were written since.
#[derive(Debug)]
pub(super) struct Overlay {
    below: FileBackend,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    len: u64,
    /// Of what is below, so much still counts: a file that was cut and grew again has zeros there.
    len_below: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Overlay {
    /// Looks at a file.
    pub(super) fn over(file: File) -> Result<Self, DatabaseError> {
        let below = FileBackend::new(file)?;
        let len = below.len().map_err(redb::StorageError::from)?;
        let written = Mutex::new(Written {
            len,
            len_below: len,
            blocks: BTreeMap::new(),
        });
        Ok(Self { below, written })
    }

    fn block(&self, written: &Written, at: u64) -> io::Result<Vec<u8>> {
        if let Some(block) = written.blocks.get(&at) {
            return Ok(block.clone());
        }
        let mut block = vec![0; BLOCK as usize];
        let have = written.len_below.saturating_sub(at * BLOCK).min(BLOCK);
        if have > 0 {
            self.below.read(at * BLOCK, &mut block[..have as usize])?;
        }
        Ok(block)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parts of a range, by block: its number, where the part begins in it, and how long it is.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset.saturating_add(len as u64);
    let mut at = offset;
    std::iter::from_fn(move || {
        let begin = at % BLOCK;
        let part = (BLOCK - begin).min(end - at);
        let block = at / BLOCK;
        at += part;
        (part > 0).then_some((block, begin as usize, part as usize))
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.lock();
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > written.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        for (at, begin, part) in parts(offset, out.len()) {
            let block = self.block(&written, at)?;
            out[done..done + part].copy_from_slice(&block[begin..begin + part]);
            done += part;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut written = self.lock();
        if len < written.len {
            written.len_below = written.len_below.min(len);
            written.blocks.split_off(&len.div_ceil(BLOCK));
            if let Some(last) = written.blocks.get_mut(&(len / BLOCK)) {
                last[(len % BLOCK) as usize..].fill(0);
            }
        }
        written.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.lock();
        let mut done = 0;
        for (at, begin, part) in parts(offset, data.len()) {
            let mut block = self.block(&written, at)?;
            block[begin..begin + part].copy_from_slice(&data[done..done + part]);
            written.blocks.insert(at, block);
            done += part;
        }
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        self.below.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.below.try_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.below.unlock_range(start, end)
    }
}
