//! Where sessions are found: a directory of run_dir, with a socket for each. Only the agent's user may look into it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

/// Most sessions at a time, also those that have ended and wait for somebody to hear of it.
pub const SESSIONS_MAX: usize = 128;
/// Hex digits of an id.
pub const ID_LEN: usize = 12;
/// Name of the directory.
const DIR: &str = "exec";

/// The directory.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

impl Place {
    /// That of an agent with this run_dir.
    pub fn of(run_dir: &Path) -> Self {
        Self(run_dir.join(DIR))
    }

    /// Makes it.
    ///
    /// # Errors
    /// It cannot be made, or others may look into it.
    pub fn prepare(&self) -> io::Result<()> {
        let dir = &self.0;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)?;
        let meta = fs::symlink_metadata(dir)?;
        if !meta.is_dir() || meta.uid() != Uid::effective().as_raw() || meta.mode() & 0o077 != 0 {
            let text = format!("{} is not a directory of our own", dir.display());
            return Err(io::Error::other(text));
        }
        Ok(())
    }

    /// The socket of a session; none: this is no id.
    pub fn socket(&self, id: &str) -> Option<PathBuf> {
        let is_id =
            id.len() == ID_LEN && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        is_id.then(|| self.0.join(id))
    }

    /// All ids that there are sockets of.
    pub fn ids(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut ids: Vec<_> = names.filter(|name| self.socket(name).is_some()).collect();
        ids.sort();
        ids
    }
}

/// A new id.
///
/// # Errors
/// There are no random numbers.
pub fn new_id() -> io::Result<String> {
    let random = getrandom::u64().map_err(io::Error::other)?;
    Ok(format!("{:0ID_LEN$x}", random >> (64 - 4 * ID_LEN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_no_path() {
        let place = Place::of(Path::new("/run/x"));
        let id = new_id().unwrap();
        assert!(place.socket(&id).is_some(), "{id}");
        for id in [
            "",
            "..",
            "../../../etc",
            "0123456789aB",
            "0123456789ab0",
            "/123456789ab",
        ] {
            assert_eq!(place.socket(id), None, "{id}");
        }
    }

    #[test]
    fn a_place_that_others_may_look_into_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let place = Place::of(dir.path());
        place.prepare().unwrap();
        place.prepare().unwrap();
        assert_eq!(place.ids(), Vec::<String>::new());
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(dir.path().join(DIR), mode).unwrap();
        assert!(place.prepare().is_err());
    }
}
