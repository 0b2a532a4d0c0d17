//! A paused machine on disk: `DIR/state` and `DIR/memory`.
//!
//! `state`: magic `ADITVMMS`, version (u32), length of the body (u64), SHA-256 of the body, body (postcard). `memory`: the
//! guest's memory from address 0 on, without the gaps; pages of zeroes are holes. A file that was cut off or changed by accident
//! is refused. A file that was changed on purpose can do what a guest can: nothing in it is an address of this process.
//!
//! A restored machine maps the memory file privately. So it starts at once, and many machines can start from the same
//! snapshot.

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
/// Longest body of a state file, bytes.
const BODY_MAX: u64 = 16 << 20;
const PAGE: usize = 4096;

/// Everything except the memory.
#[derive(Serialize, Deserialize)]
pub struct State {
    pub memory: u64,
    pub cpus: Vec<CpuState>,
    pub chips: ChipState,
    pub line: LineState,
    /// The ring's PCI function. The ring itself is made new.
    pub ring: Option<Vec<u8>>,
    pub devices: Vec<TransportState>,
}

fn create(path: &Path) -> anyhow::Result<File> {
    // Only the owner may read a guest's memory. An existing snapshot is never overwritten: machines may be running from it.
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))
}

/// Writes a snapshot.
///
/// # Errors
/// The directory has a snapshot already, or the disk is full.
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
    // Written last, so a snapshot that has a state is complete.
    Ok(file.sync_all()?)
}

/// Reads a snapshot's state.
///
/// # Errors
/// The file is missing, cut off, changed, or of another version.
pub fn read(dir: &Path) -> anyhow::Result<State> {
    let path = dir.join("state");
    let mut file = File::open(&path).with_context(|| {
        format!("cannot open the snapshot in {dir:?} (PUT /snapshot of a VM's API writes one)")
    })?;
    let (mut magic, mut version, mut len) = ([0; 8], [0; 4], [0; 8]);
    let mut digest = [0; 32];
    let mut head = || -> std::io::Result<()> {
        file.read_exact(&mut magic)?;
        file.read_exact(&mut version)?;
        file.read_exact(&mut len)?;
        file.read_exact(&mut digest)
    };
    head().with_context(|| format!("{} is cut off", path.display()))?;
    if magic != MAGIC || u32::from_le_bytes(version) != VERSION {
        bail!(
            "{} is not a snapshot of version {VERSION}: another version of adit-vmm wrote it",
            path.display()
        );
    }
    let len = u64::from_le_bytes(len);
    let mut body = Vec::new();
    file.take(BODY_MAX).read_to_end(&mut body)?;
    ensure!(
        body.len() as u64 == len && Sha256::digest(&body)[..] == digest,
        "{} is cut off or changed",
        path.display()
    );
    let (state, rest) = postcard::take_from_bytes(&body)
        .with_context(|| format!("{} is not a valid state", path.display()))?;
    let extra = rest.len();
    ensure!(
        extra == 0,
        "{} has {extra} bytes after its state",
        path.display()
    );
    Ok(state)
}

/// Maps a snapshot's memory.
///
/// # Errors
/// The file is missing, or its length is not the one in the state.
pub fn map(dir: &Path, state: &State) -> anyhow::Result<GuestMemoryMmap> {
    memory::check(state.memory)?;
    let path = dir.join("memory");
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    ensure!(
        file.metadata()?.len() == state.memory,
        "{} has the wrong length: it should have {} bytes",
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
            GuestRegionMmap::new(mapping, start).context("the memory exceeds the address space")?;
        regions.push(region);
        at += len as u64;
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}
