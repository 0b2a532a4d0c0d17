//! `blob`: takes a file of any size from the host, by its digest, and keeps it for whoever needs it here.
//!
//! What is said is in `adit_blob::wire`, what is kept in `adit_blob::store`. A file does nothing by being here: whoever uses one
//! asks for its digest, which a trusted key has signed. So any host may send any file, within these limits: of a slow or
//! silent one the part stays, and a thread for 30 s; a full disk it cannot make.

use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use adit_blob::wire::{Ended, Have, Kind, SERVICE, TEXT_MAX, VERSION, Want};
use adit_blob::{Begun, BlobError, Limits, Store, Writing};
use adit_channel::frame;
use adit_channel::hello::Open;
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;
use serde::Serialize;

use super::services::{Run, Service};
use super::shares::busy;
use crate::log;
use crate::transport::HostStream;

/// Name of the directory.
pub const DIR: &str = "blobs";
/// Most bytes of one file.
pub const BLOB_MAX: u64 = 1 << 30;
/// Most bytes of all files that are kept.
pub const ALL_MAX: u64 = 2 << 30;
/// Bytes of the guest's disk that no file takes.
pub const SPARE: u64 = 16 << 20;
/// Most files that come at the same time.
pub const STREAMS_MAX: usize = 2;
/// How long the host may send nothing, or read nothing.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long, and how much at most, the host goes on sending after it was told that this is of no use.
const DRAIN: (Duration, u64) = (Duration::from_secs(2), 64 << 20);
/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// Where the agent keeps files that the host sends.
pub fn store(state_dir: &Path) -> Arc<Store> {
    let limits = Limits {
        blob: BLOB_MAX,
        all: ALL_MAX,
        spare: SPARE,
    };
    Store::new(&state_dir.join(DIR), "", limits)
}

/// The service.
pub struct Blob {
    store: Arc<Store>,
    streams: Arc<AtomicUsize>,
}

/// Counts a stream for as long as it lives.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Blob {
    /// Keeps files there.
    pub fn new(store: Arc<Store>) -> Self {
        let streams = Arc::default();
        Self { store, streams }
    }

    fn slot(&self) -> Result<Slot, Refusal> {
        let slot = Slot(self.streams.clone());
        match self.streams.fetch_add(1, Ordering::Relaxed) {
            n if n < STREAMS_MAX => Ok(slot),
            _ => Err(busy(format_args!("{STREAMS_MAX} files are coming already"))),
        }
    }
}

impl Service for Blob {
    fn form(&self) -> &'static str {
        SERVICE
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str() == SERVICE
    }

    fn open(&self, open: &Open) -> Result<Run, Refusal> {
        let want = Want::parse(open.extensions.arguments.as_bytes());
        let want = want
            .ok_or_else(|| Refusal::new(Code::Denied, "the arguments are no digest with a size"))?;
        let slot = self.slot()?;
        let begun = self.store.begin(want.digest, want.size);
        let begun = begun.map_err(|e| refusal(&e))?;
        Ok(Box::new(move |stream| {
            let taken = take(&*stream, begun, want);
            drop(slot);
            taken
        }))
    }
}

/// What the host hears of it.
pub fn refusal(e: &BlobError) -> Refusal {
    let code = match e {
        BlobError::TooLarge { .. } => Code::TooLarge,
        BlobError::NoSpace { .. } => Code::NoSpace,
        BlobError::Busy => Code::Busy,
        BlobError::Mismatch(_) => Code::Mismatch,
        BlobError::Unknown(_) | BlobError::Io(_) => Code::DialFailed,
    };
    Refusal::new(code, e.to_string())
}

fn take(stream: &dyn HostStream, begun: Begun, want: Want) -> io::Result<()> {
    stream.set_timeout(Some(STALL_LIMIT))?;
    let Begun::Writing(writing) = begun else {
        let bytes = want.size;
        say(stream, Kind::Have, &Have { bytes })?;
        return ended(stream, Ok(()));
    };
    let bytes = writing.at();
    say(stream, Kind::Have, &Have { bytes })?;
    let Some(taken) = receive(stream, writing)? else {
        // The host has ended it. The next stream goes on from here.
        return Ok(());
    };
    match &taken {
        Ok(()) => log::event("blob", &[("digest", &want.digest), ("bytes", &want.size)]),
        Err(e) => log::event("blob-refused", &[("digest", &want.digest), ("why", e)]),
    }
    let refused = taken.is_err();
    ended(stream, taken)?;
    if refused {
        drain(stream);
    }
    Ok(())
}

/// Reads to the stream's end: some carriers forget what was said last when a stream is closed on bytes that nobody has read.
fn drain(stream: &dyn HostStream) {
    let (limit, most) = DRAIN;
    let _ = stream.set_timeout(Some(limit));
    let _ = io::copy(&mut stream.io().take(most), &mut io::sink());
}

/// Writes what comes; none if the stream ends before all of it is there.
fn receive(
    stream: &dyn HostStream,
    mut writing: Writing,
) -> io::Result<Option<Result<(), BlobError>>> {
    let (mut io, mut chunk) = (stream.io(), vec![0; CHUNK]);
    while writing.missing() > 0 {
        let wanted = usize::try_from(writing.missing()).map_or(CHUNK, |n| n.min(CHUNK));
        match io.read(&mut chunk[..wanted]) {
            Ok(0) => return Ok(None),
            Ok(n) => {
                if let Err(e) = writing.write(&chunk[..n]) {
                    return Ok(Some(Err(e)));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Some(writing.finish()))
}

fn ended(stream: &dyn HostStream, taken: Result<(), BlobError>) -> io::Result<()> {
    let refused = taken.err().map(|e| refusal(&e));
    let mut text = refused.as_ref().map_or("", |r| r.text()).to_owned();
    text.truncate(text.floor_char_boundary(TEXT_MAX));
    let ended = Ended {
        refusal: refused.map_or(0, |r| r.code().hello_number()),
        text,
    };
    say(stream, Kind::Ended, &ended)?;
    stream.end_sending()
}

fn say(stream: &dyn HostStream, kind: Kind, body: &impl Serialize) -> io::Result<()> {
    let bytes = frame::encode(kind as u16, VERSION, 0, 0, body).map_err(io::Error::other)?;
    stream.io().write_all(&bytes)
}
