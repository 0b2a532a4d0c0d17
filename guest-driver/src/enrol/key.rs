//! The guest's own key: made when it first starts, in the state directory, and never sent. The host learns the public half.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use adit_tasks::PublicKey;
use adit_tasks::key::{format_private, parse_private};
use ed25519_dalek::SigningKey;
use zeroize::Zeroizing;

use super::kept::replace;

pub(super) const FILE: &str = "guest.key";
/// Most keys that are set aside.
const BEFORE_MAX: usize = 8;

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
        Ok(private(state_dir)?.map(|private| Self::of(&private)))
    }

    /// The private half as one that streams are sealed to: the same key on Curve25519's other form, as its public half is there. So what
    /// pins the guest pins this, too; nothing else is to be kept, signed or revoked, and a copy that enrols anew has another.
    ///
    /// # Errors
    /// It is there, and cannot be read.
    pub fn exchange(state_dir: &Path) -> io::Result<Option<Zeroizing<[u8; 32]>>> {
        let private = private(state_dir)?;
        Ok(private.map(|key| Zeroizing::new(key.to_scalar_bytes())))
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

    /// Makes a key in the place of another guest's. The first ones of those are set aside: a host which says again and again that
    /// this is another guest ends no key that was there before it began to. Of those that were made since, it ends each.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn anew(state_dir: &Path) -> io::Result<Self> {
        for aside in set_aside(state_dir) {
            if fs::exists(&aside)? {
                continue;
            }
            match fs::rename(state_dir.join(FILE), aside) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => break,
            }
        }
        Self::make(state_dir)
    }

    fn of(private: &SigningKey) -> Self {
        let public = PublicKey::of(private, "");
        Self { public }
    }
}

fn private(state_dir: &Path) -> io::Result<Option<SigningKey>> {
    let text = match fs::read_to_string(state_dir.join(FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => Zeroizing::new(text?),
    };
    let private = parse_private(&text).map_err(io::Error::other)?;
    Ok(Some(private))
}

/// Where the keys are that the guests had whose disks this one's is a copy of. Only somebody who knows better takes one out of there.
pub(super) fn set_aside(state_dir: &Path) -> impl Iterator<Item = PathBuf> {
    (1..=BEFORE_MAX).map(move |n| {
        state_dir.join(match n {
            1 => format!("{FILE}.before"),
            n => format!("{FILE}.before-{n}"),
        })
    })
}
