//! Files for VMs: kept beside the database until they are no longer used, and sent into guests; and orders to agents that go by
//! one of them.
//!
//! ```text
//! PUT, piece by piece ─► store ─► Transfer, a task ─► reach: service `blob` of the guest ─► the guest's own store
//!                                    └ asked how far it is, and how it ended
//! ```
//! A guest is hostile: it says how much it has, reads as slowly as it likes, and may end at any moment. A transfer holds one
//! descriptor of the store, one stream and two buffers, a VM has one, and there are [`TRANSFERS_MAX`]; one that does not get on
//! for 30 s is given up.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_api::Transfer;
use adit_blob::wire::{self, Ended, Have, Kind, Want};
use adit_blob::{Digest, Limits, Reading, Store};
use adit_channel::frame::{self, Header};
use adit_channel::hello::{Extensions, Opaque};
use adit_channel::refusal::{Code, Refusal};
use adit_names::VmId;
use adit_port::control::Target;
use adit_tasks::order::{self, Answer};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::access::Caller;
use crate::api::ApiError;
use crate::passing::Socket;
use crate::reach::{self, Destination};
use crate::state::State;
use crate::vm::VmEntry;

/// Most bytes of one file.
pub const BLOB_MAX: u64 = 1 << 30;
/// Most bytes of all files that are kept.
pub const ALL_MAX: u64 = 4 << 30;
/// Bytes of the disk that no file takes: the database needs them.
pub const SPARE: u64 = 256 << 20;
/// Most files on their way at the same time.
pub const TRANSFERS_MAX: usize = 8;
/// How long a guest may read nothing, or say nothing.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest may take to check the file that it has, and to bring it to its disk.
const CHECK_LIMIT: Duration = Duration::from_secs(300);
/// Bytes that are read of a file at a time.
const CHUNK: usize = 256 << 10;
/// Bytes that a guest must read within [`STALL_LIMIT`].
const PIECE: usize = 16 << 10;

/// The files, and those on their way.
#[derive(Debug)]
pub struct Blobs {
    /// The files.
    pub store: Arc<Store>,
    sending: Mutex<HashMap<VmId, Arc<Sending>>>,
}

/// A file on its way.
#[derive(Debug)]
struct Sending {
    digest: Digest,
    size: u64,
    sent: AtomicU64,
    ended: Mutex<Option<Result<(), Refusal>>>,
    /// Its VM was: then nobody asks how it ended, and another VM may have the name.
    removed: CancellationToken,
}

impl Blobs {
    /// Keeps files in this directory.
    pub fn new(dir: &Path) -> Self {
        let limits = Limits {
            blob: BLOB_MAX,
            all: ALL_MAX,
            spare: SPARE,
        };
        // A name as the database's files have: whoever hands the directory over knows that it is aditd's.
        Self {
            store: Store::new(dir, "aditd.blob-", limits),
            sending: Mutex::default(),
        }
    }

    fn sending(&self) -> MutexGuard<'_, HashMap<VmId, Arc<Sending>>> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sending {
    fn ended(&self) -> MutexGuard<'_, Option<Result<(), Refusal>>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, kept: bool) -> Transfer {
        Transfer {
            sha256: self.digest.to_string(),
            sent: match kept {
                true => self.size,
                false => self.sent.load(Ordering::Relaxed).min(self.size),
            },
            size: self.size,
            kept,
        }
    }
}

/// Says how far a file is on its way into a VM; begins, if it is not on its way.
///
/// # Errors
/// It ended without being there: said once, and the next call begins anew. Or it cannot begin.
pub async fn send(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    digest: Digest,
) -> Result<Transfer, ApiError> {
    if let Some(known) = known(&mut state.blobs.sending(), &vm.name, digest)? {
        return Ok(known);
    }
    let store = state.blobs.store.clone();
    let opened = tokio::task::spawn_blocking(move || store.open(digest)).await;
    let internal = |e: tokio::task::JoinError| Refusal::new(Code::Internal, e.to_string());
    let reading = opened.map_err(internal)??;
    let begun = Arc::new(Sending {
        digest,
        size: reading.size(),
        sent: AtomicU64::new(0),
        ended: Mutex::default(),
        removed: vm.removed.clone(),
    });
    {
        let mut sending = state.blobs.sending();
        // Another request may have begun it meanwhile.
        if let Some(known) = known(&mut sending, &vm.name, digest)? {
            return Ok(known);
        }
        // Those that have ended stay until somebody has asked: one a VM.
        let on_their_way = sending.values().filter(|s| s.ended().is_none());
        if on_their_way.count() >= TRANSFERS_MAX {
            let text = format!("{TRANSFERS_MAX} files are on their way to VMs already");
            return Err(Refusal::busy(text).into());
        }
        sending.insert(vm.name.clone(), begun.clone());
    }
    let (state, vm, sending) = (state.clone(), vm.clone(), begun.clone());
    tokio::spawn(async move {
        let removed = vm.removed.clone();
        let ended = tokio::select! {
            ended = carry(&state, &vm, &sending, Arc::new(reading)) => ended,
            () = removed.cancelled() => Err(Refusal::new(Code::UnknownVm, "the VM was removed")),
        };
        match &ended {
            Ok(()) => tracing::info!(vm = %vm.name, blob = %digest, "file sent"),
            Err(why) => {
                tracing::warn!(vm = %vm.name, blob = %digest, %why, "file not sent");
            }
        }
        *sending.ended() = Some(ended);
    });
    Ok(begun.show(false))
}

/// What is known of a transfer; one that has ended is forgotten by this.
fn known(
    all: &mut HashMap<VmId, Arc<Sending>>,
    vm: &VmId,
    digest: Digest,
) -> Result<Option<Transfer>, Refusal> {
    all.retain(|_, sending| !sending.removed.is_cancelled());
    let Some(sending) = all.get(vm).cloned() else {
        return Ok(None);
    };
    let ended = sending.ended().clone();
    if sending.digest != digest {
        return match ended {
            // Nobody has asked how it ended.
            Some(_) => Ok(None),
            None => Err(Refusal::busy(format!(
                "VM `{vm}` is sent another file: {}",
                sending.digest
            ))),
        };
    }
    let shown = sending.show(ended.is_some());
    match ended {
        None => Ok(Some(shown)),
        Some(ended) => {
            all.remove(vm);
            ended.map(|()| Some(shown))
        }
    }
}

/// Sends a file; once more from its start if the guest says that what it had of it was something else.
async fn carry(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    sending: &Sending,
    file: Arc<Reading>,
) -> Result<(), Refusal> {
    let mut had = 0;
    let first = once(state, vm, sending, &file, &mut had).await;
    match first {
        Err(e) if e.code() == Code::Mismatch && had > 0 => {
            once(state, vm, sending, &file, &mut had).await
        }
        done => done,
    }
}

/// `had`: how much of it the guest says to have.
async fn once(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    sending: &Sending,
    file: &Arc<Reading>,
    had: &mut u64,
) -> Result<(), Refusal> {
    let want = Want {
        digest: sending.digest,
        size: sending.size,
    };
    let stream = dial(state, vm, wire::SERVICE, want.encode()).await?;
    let (reader, writer) = tokio::io::split(stream);
    let done = speak(sending, file, reader, writer, had).await;
    done.unwrap_or_else(|e| {
        let text = format!("VM `{}`: the stream ended: {e}", vm.name);
        Err(Refusal::new(Code::Reset, text))
    })
}

/// Gives an agent an order, and waits until it has followed it so far that its program is on the guest's disk.
///
/// # Errors
/// The guest is not reached, or says nothing.
pub async fn order(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    envelope: Vec<u8>,
) -> Result<Answer, Refusal> {
    let mut stream = dial(state, vm, order::SERVICE, Vec::new()).await?;
    let said = async {
        let body = order::Order { envelope };
        let bytes = frame::encode(order::Kind::Order as u16, order::VERSION, 1, 0, &body);
        stream.write_all(&bytes.map_err(io::Error::other)?).await?;
        let next = frame::read_async(&mut stream, order::BODY_MAX).await?;
        let (header, body) = next.ok_or(io::ErrorKind::UnexpectedEof)?;
        if (header.kind, header.version) != (order::Kind::Answer as u16, order::VERSION) {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        header.decode(&body).map_err(io::Error::other)
    };
    let said = timeout(CHECK_LIMIT, said).await;
    let said = said.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    said.map_err(|e| {
        let text = format!(
            "VM `{}`: the stream ended before an answer: {e}; the guest may have followed the order",
            vm.name
        );
        Refusal::new(Code::Reset, text)
    })
}

pub(crate) async fn dial(
    state: &Arc<State>,
    vm: &Arc<VmEntry>,
    service: &str,
    arguments: Vec<u8>,
) -> Result<Socket, Refusal> {
    let internal = |e: String| Refusal::new(Code::Internal, e);
    let service = service.parse();
    let service = service.map_err(|e: adit_names::NameError| internal(e.to_string()))?;
    let to = Destination::of(vm.name.clone(), Target::Service(service));
    let arguments = Opaque::try_from(arguments).map_err(|e| internal(e.to_string()))?;
    let extensions = Extensions {
        arguments,
        ..Extensions::default()
    };
    let visit = state.visits.begin("", "blob", None, state.now_ms());
    let visit = visit.unwritten();
    let admitted = reach::dial::admit_here(state, &Caller::owner(), &to, vm.clone(), &visit)?;
    admitted
        .relayed_with(&to, extensions, state.room, || state.pool.clear())
        .await
}

/// The host's half of `adit_blob::wire`. The outer error: the stream failed.
async fn speak(
    sending: &Sending,
    file: &Arc<Reading>,
    mut reader: ReadHalf<Socket>,
    mut writer: WriteHalf<Socket>,
    had: &mut u64,
) -> io::Result<Result<(), Refusal>> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let next = timeout(STALL_LIMIT, frame::read_async(&mut reader, wire::BODY_MAX));
    let (header, body) = next
        .await
        .map_err(late)??
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    let have: Have = match kind(&header)? {
        Kind::Have => header.decode(&body).map_err(io::Error::other)?,
        Kind::Ended => return end(&header, &body),
    };
    if have.bytes > sending.size {
        let text = "the guest says that it has more than there is";
        return Ok(Err(Refusal::new(Code::Foreign, text)));
    }
    *had = have.bytes;
    // One future for both directions: a guest that refuses says so while bytes are on their way to it.
    let said = async {
        let next = frame::read_async(&mut reader, wire::BODY_MAX).await?;
        next.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    tokio::pin!(said);
    let write = write(sending, file, &mut writer, have.bytes);
    tokio::pin!(write);
    let (header, body) = tokio::select! {
        biased;
        said = &mut said => said?,
        written = &mut write => match written {
            Ok(()) => timeout(CHECK_LIMIT, said).await.map_err(late)??,
            // Why it does not read any more it may have said. Else it was this side.
            Err(e) => match timeout(STALL_LIMIT, said).await {
                Ok(Ok(said)) => said,
                _ => return Err(e),
            },
        }
    };
    end(&header, &body)
}

fn kind(header: &Header) -> io::Result<Kind> {
    match (header.kind, header.version) {
        (k, wire::VERSION) if k == Kind::Have as u16 => Ok(Kind::Have),
        (k, wire::VERSION) if k == Kind::Ended as u16 => Ok(Kind::Ended),
        (kind, version) => {
            let unknown = frame::FrameError::Unknown { kind, version };
            Err(io::Error::new(io::ErrorKind::InvalidData, unknown))
        }
    }
}

fn end(header: &Header, body: &[u8]) -> io::Result<Result<(), Refusal>> {
    if kind(header)? != Kind::Ended {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let ended: Ended = header.decode(body).map_err(io::Error::other)?;
    Ok(match ended.refusal {
        0 => Ok(()),
        number => Err(Refusal::of_hello(number, 0, ended.text)),
    })
}

async fn write(
    sending: &Sending,
    file: &Arc<Reading>,
    writer: &mut WriteHalf<Socket>,
    from: u64,
) -> io::Result<()> {
    let (mut at, mut chunk) = (from, vec![0; CHUNK]);
    sending.sent.store(at, Ordering::Relaxed);
    while at < sending.size {
        let file = file.clone();
        // On a thread that nobody else waits for.
        let read = tokio::task::spawn_blocking(move || {
            let read = file.read_at(&mut chunk, at);
            (chunk, read)
        });
        let read = read.await.map_err(io::Error::other)?;
        chunk = read.0;
        let read = read.1?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Small ones: a guest that is slow does not stall.
        for piece in chunk[..read].chunks(PIECE) {
            let written = timeout(STALL_LIMIT, writer.write_all(piece)).await;
            written.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            at += piece.len() as u64;
            sending.sent.store(at, Ordering::Relaxed);
        }
    }
    Ok(())
}
