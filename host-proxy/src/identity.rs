//! Ids that guests are given when their agents first connect, so that a copy of a guest's disk is known by the id that it brings along.
//!
//! | the guest has | it is | it has from then on |
//! |---|---|---|
//! | no id | new, or sealed | a new one |
//! | this VM's | the guest that was here before | the same |
//! | another VM's of this host | a copy of that one's disk | a new one; it enrols anew |
//! | another host's | a copy, or a disk that was moved: nothing here tells them apart | a new one; it enrols anew |
//! | one of this host that is not in its database | as before: the database was lost, or the VM removed and added again | the same |
//!
//! Which host gave an id is known by the host's own, in a file beside the database: a host that has lost its database has not lost
//! that, and knows its guests again. What a guest says of its id is its word only; one that lies gets a new id, and no more.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use adit_tasks::wire::{HostGiven, Identified, Identity};
use adit_tasks::{hex, unhex};

use crate::desk::{DeskError, Whose};
use crate::state::State;
use crate::vm::VmEntry;

/// The file with the host's own id, beside the database.
pub const FILE: &str = "aditd.id";

/// The file with a number that only this host's aditd knows, by which it knows its own words again.
pub const KEY_FILE: &str = "aditd.key";

/// Reads the host's own id; draws it at the first start.
///
/// # Errors
/// The directory of the database cannot be written.
pub fn of_host(dir: &Path) -> io::Result<[u8; 16]> {
    kept(
        &dir.join(FILE),
        "guests that this database does not know enrol anew",
    )
}

/// Reads the host's own key; draws it at the first start.
///
/// # Errors
/// The directory of the database cannot be written.
pub fn key(dir: &Path) -> io::Result<[u8; 16]> {
    kept(
        &dir.join(KEY_FILE),
        "tunnels that are open have no line at their end",
    )
}

fn kept(path: &Path, if_lost: &str) -> io::Result<[u8; 16]> {
    let mut text = String::new();
    match File::open(path) {
        Ok(file) => drop(file.take(64).read_to_string(&mut text)?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    if let Some(id) = unhex(text.trim()) {
        return Ok(id);
    }
    if !text.is_empty() {
        tracing::warn!(path = %path.display(), "damaged: {if_lost}");
    }
    let id = draw()?;
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path)?;
    file.write_all(format!("{}\n", hex(&id)).as_bytes())?;
    file.sync_all()?;
    Ok(id)
}

fn draw() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(io::Error::other)?;
    Ok(id)
}

/// Answers a guest that has said which id it has.
///
/// # Errors
/// The database fails, or there are no random numbers.
pub async fn hear(state: &State, vm: &Arc<VmEntry>, said: Identity) -> io::Result<Identified> {
    let host = state.host_id;
    let guest = draw()?;
    let new = HostGiven { host, guest };
    let whose = state.desk.identify(&vm.name, said.id, new).await;
    let whose = whose.map_err(|e: DeskError| io::Error::other(e))?;
    let (id, copy_of) = match (whose, said.id) {
        (Whose::Own | Whose::Forgotten, Some(id)) => (id, String::new()),
        (Whose::Vm(other), _) => (new, format!("VM `{other}`")),
        (Whose::OtherHost, _) => (new, "a guest of another host".into()),
        _ => (new, String::new()),
    };
    vm.agent.identified(hex(&id.guest), &copy_of);
    Ok(Identified { id, copy_of })
}
