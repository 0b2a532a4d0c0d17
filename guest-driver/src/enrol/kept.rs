//! What is kept of an enrolment in the state directory: `enrolment.json`, so that a card that was replaced is not believed again, and a copy
//! of the disk notices that it is one. There are two of it: where one is damaged, the other has the same.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use adit_blob::disk;
use adit_names::VmId;
use adit_tasks::wire::HostGiven;
use serde::{Deserialize, Serialize};

pub(super) const FILE: &str = "enrolment.json";
pub(super) const COPY: &str = "enrolment.copy.json";

/// Most VMs whose generations are kept.
const VMS_MAX: usize = 64;

/// What was believed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Who the guest was last.
    pub vm_id: VmId,
    /// Of each VM that it was, the highest generation of a card. All of them: else a platform that hands over another VM's card
    /// in between could go back.
    pub generations: BTreeMap<VmId, u64>,
    /// The machine that it ran on, as its SMBIOS says.
    #[serde(default)]
    pub machine: Option<String>,
    /// The id that its host gave it.
    #[serde(default)]
    pub id: Option<HostGiven>,
}

/// Why a guest is not the one that it was: its disk was copied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Anew {
    /// It has another name.
    #[error("this guest was {was}")]
    Vm {
        /// Its name then.
        was: VmId,
    },
    /// It runs on another machine.
    #[error("this guest ran on the machine {was}")]
    Machine {
        /// That one's UUID.
        was: String,
    },
}

impl Kept {
    /// What is to be kept of a guest that goes by a card of this generation (0: by none), and why it begins anew, if it does.
    pub fn next(
        before: Option<&Self>,
        vm_id: &VmId,
        generation: u64,
        machine: Option<String>,
    ) -> (Self, Option<Anew>) {
        let mut generations = before.map(|k| k.generations.clone()).unwrap_or_default();
        if generations.len() >= VMS_MAX && !generations.contains_key(vm_id) {
            generations.pop_first();
        }
        let highest = generations.entry(vm_id.clone()).or_default();
        *highest = generation.max(*highest);
        let anew = before.and_then(|k| match (&k.machine, &machine) {
            _ if k.vm_id != *vm_id => Some(Anew::Vm {
                was: k.vm_id.clone(),
            }),
            (Some(was), Some(is)) if was != is => Some(Anew::Machine { was: was.clone() }),
            _ => None,
        });
        // A kernel without SMBIOS, for once, is no other machine.
        let machine = machine.or_else(|| before.and_then(|k| k.machine.clone()));
        let vm_id = vm_id.clone();
        let kept = Self {
            vm_id,
            generations,
            machine,
            // What is copied is the other one's.
            id: before.and_then(|k| k.id).filter(|_| anew.is_none()),
        };
        (kept, anew)
    }
}

/// The UUID that the machine's SMBIOS has; none where there is none, or only root may see it.
pub fn machine() -> Option<String> {
    let uuid = fs::read_to_string("/sys/class/dmi/id/product_uuid").ok()?;
    let uuid = uuid.trim();
    let is_none = uuid.is_empty() || uuid.bytes().all(|b| matches!(b, b'0' | b'-'));
    (!is_none && uuid.len() <= 64).then(|| uuid.to_owned())
}

/// Reads it; none if nothing was kept.
///
/// # Errors
/// It is there, and neither it nor its copy can be read.
pub fn read(state_dir: &Path) -> io::Result<Option<Kept>> {
    match read_one(&state_dir.join(FILE)) {
        Err(e) => match read_one(&state_dir.join(COPY)) {
            Ok(Some(kept)) => Ok(Some(kept)),
            _ => Err(e),
        },
        found => found,
    }
}

fn read_one(file: &Path) -> io::Result<Option<Kept>> {
    match fs::read(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        bytes => Ok(Some(serde_json::from_slice(&bytes?)?)),
    }
}

/// Keeps it, on disk when this returns.
///
/// # Errors
/// The state directory cannot be written.
pub fn write(state_dir: &Path, kept: &Kept) -> io::Result<()> {
    let text = serde_json::to_vec(kept)?;
    replace(&state_dir.join(COPY), &text)?;
    replace(&state_dir.join(FILE), &text)
}

/// Puts this content into a file of mode 0600, on disk when this returns. Its directory is made, with mode 0700.
///
/// # Errors
/// It cannot be written; the old one is there then.
pub(crate) fn replace(file: &Path, content: &[u8]) -> io::Result<()> {
    let mut dir = fs::DirBuilder::new();
    dir.recursive(true)
        .mode(0o700)
        .create(file.parent().unwrap_or(Path::new("/")))?;
    disk::replace(file, content)
}
