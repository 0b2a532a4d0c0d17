//! The guest's own key: made when it first starts, in the state directory, and never sent. The host learns the public half.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use adit_tasks::PublicKey;
use adit_tasks::key::{format_private, parse_private};
use ed25519_dalek::SigningKey;
use zeroize::Zeroizing;

use super::kept::replace;

pub(super) const FILE: &str = "guest.key";
/// The key of the guest whose disk this one's is a copy of. Only somebody who knows better takes it out of here.
pub(super) const BEFORE: &str = "guest.key.before";

/// The key.
#[derive(Clone)]
pub struct GuestKey {
    public: PublicKey,
}

impl fmt::Debug for GuestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GuestKey").field(&self.public.id()).finish()
    }
}

impl GuestKey {
    /// The public half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// Reads the key; none if there is none yet.
    ///
    /// # Errors
    /// It is there, and cannot be read.
    pub fn read(state_dir: &Path) -> io::Result<Option<Self>> {
        let text = match fs::read_to_string(state_dir.join(FILE)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => Zeroizing::new(text?),
        };
        let private = parse_private(&text).map_err(io::Error::other)?;
        Ok(Some(Self::of(&private)))
    }

    /// Makes a key, on disk when this returns.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn make(state_dir: &Path) -> io::Result<Self> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(seed.as_mut()).map_err(io::Error::other)?;
        let private = SigningKey::from_bytes(&seed);
        let text = Zeroizing::new(format_private(&private));
        replace(&state_dir.join(FILE), text.as_bytes())?;
        Ok(Self::of(&private))
    }

    /// Makes a key in the place of another guest's. The first one of those is set aside, so that a host which says again and again
    /// that this is another guest ends no key that the disk came with; of those that were made since, it ends each.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn anew(state_dir: &Path) -> io::Result<Self> {
        let (own, aside) = (state_dir.join(FILE), state_dir.join(BEFORE));
        if !fs::exists(&aside)? {
            match fs::rename(own, aside) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Self::make(state_dir)
    }

    fn of(private: &SigningKey) -> Self {
        let public = PublicKey::of(private, "");
        Self { public }
    }
}
