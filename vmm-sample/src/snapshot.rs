//! A held machine on disk: `DIR/state` and `DIR/memory`.
//!
//! `state`: magic `ADITVMMS`, version (u32), length of the body (u64), SHA-256 of the body, body (postcard). `memory`: the
//! guest's memory from address 0 on, without its gaps; pages of zeroes are holes. A file that was cut or altered by accident
//! is refused. One that was altered on purpose can do what a guest can: nothing in it is an address of this process.
//!
//! The memory of a restored machine is a private mapping of the file: it starts at once, and as many machines as one likes
//! start from the same snapshot.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::console::LineState;
use crate::cpu_state::{ChipState, CpuState};
use crate::memory;
use crate::virtio::mmio::TransportState;

const MAGIC: [u8; 8] = *b"ADITVMMS";
const VERSION: u32 = 3;
/// Bytes of a state's body at most.
const BODY_MAX: u64 = 16 << 20;
const PAGE: usize = 4096;

/// All but the memory.
#[derive(Serialize, Deserialize)]
pub struct State {
    pub memory: u64,
    pub cpus: Vec<CpuState>,
    pub chips: ChipState,
    pub line: LineState,
    /// Its function; the ring itself is another in each life.
    pub ring: Option<Vec<u8>>,
    pub devices: Vec<TransportState>,
}

fn create(path: &Path) -> anyhow::Result<File> {
    // A guest's memory is its owner's business. A snapshot in use is not written over: machines may be running from it.
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

/// Writes a snapshot.
///
/// # Errors
/// There is one in `dir`, or no room.
pub fn write(dir: &Path, state: &State, memory: &GuestMemoryMmap) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut file = create(&dir.join("memory"))?;
    let mut page = [0; PAGE];
    let mut at = 0;
    for region in memory.iter() {
        for offset in (0..region.len()).step_by(PAGE) {
            memory.read_slice(
                &mut page,
                vm_memory::GuestAddress(region.start_addr().0 + offset),
            )?;
            if page.iter().any(|&b| b != 0) {
                file.seek(SeekFrom::Start(at + offset))?;
                file.write_all(&page)?;
            }
        }
        at += region.len();
    }
    file.set_len(at)?;
    file.sync_all()?;
    let body = postcard::to_stdvec(state)?;
    let mut file = create(&dir.join("state"))?;
    file.write_all(&MAGIC)?;
    file.write_all(&VERSION.to_le_bytes())?;
    file.write_all(&(body.len() as u64).to_le_bytes())?;
    file.write_all(&Sha256::digest(&body))?;
    file.write_all(&body)?;
    // Written last: a snapshot with a state is whole.
    Ok(file.sync_all()?)
}

/// Reads a snapshot's state.
///
/// # Errors
/// It is not there, cut, altered, or of another version.
pub fn read(dir: &Path) -> anyhow::Result<State> {
    let path = dir.join("state");
    let mut file = File::open(&path).with_context(|| {
        format!("no snapshot in {dir:?} (its API writes one): cannot open state")
    })?;
    let (mut magic, mut version, mut len) = ([0; 8], [0; 4], [0; 8]);
    let mut digest = [0; 32];
    let mut head = || -> std::io::Result<()> {
        file.read_exact(&mut magic)?;
        file.read_exact(&mut version)?;
        file.read_exact(&mut len)?;
        file.read_exact(&mut digest)
    };
    head().with_context(|| format!("{} is cut", path.display()))?;
    if magic != MAGIC || u32::from_le_bytes(version) != VERSION {
        bail!(
            "{} is no snapshot of version {VERSION}: it was written by another adit-vmm",
            path.display()
        );
    }
    let len = u64::from_le_bytes(len);
    let mut body = Vec::new();
    file.take(BODY_MAX).read_to_end(&mut body)?;
    ensure!(
        body.len() as u64 == len && Sha256::digest(&body)[..] == digest,
        "{} is cut or altered",
        path.display()
    );
    let (state, rest) = postcard::take_from_bytes(&body)
        .with_context(|| format!("{} is no state", path.display()))?;
    let extra = rest.len();
    ensure!(
        extra == 0,
        "{} has {extra} bytes behind its state",
        path.display()
    );
    Ok(state)
}

/// Maps a snapshot's memory.
///
/// # Errors
/// The file is not there, or has not the length that the state says.
pub fn map(dir: &Path, state: &State) -> anyhow::Result<GuestMemoryMmap> {
    memory::check(state.memory)?;
    let path = dir.join("memory");
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(
        file.metadata()?.len() == state.memory,
        "{} is cut: it should have {} bytes",
        path.display(),
        state.memory
    );
    let (mut regions, mut at) = (Vec::new(), 0);
    for (start, len) in memory::ranges(state.memory) {
        let offset = FileOffset::new(file.try_clone()?, at);
        let (read, write) = (libc::PROT_READ, libc::PROT_WRITE);
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapping = MmapRegion::build(Some(offset), len, read | write, flags)?;
        let region =
            GuestRegionMmap::new(mapping, start).context("memory ends behind the last address")?;
        regions.push(region);
        at += len as u64;
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}
