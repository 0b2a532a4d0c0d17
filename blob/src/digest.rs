//! The name of a blob: its sha256, in 64 lower-case hex digits and in no other spelling.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use adit_names::{hex, unhex};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// A sha256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

/// Text is no digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a sha256 has 64 digits of 0-9 and a-f")]
pub struct DigestError;

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest of all that there is to read, and how many bytes that were; in bounded memory.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of_reader(mut from: impl Read) -> io::Result<(Self, u64)> {
        let (mut hash, mut len, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
        loop {
            match from.read(&mut chunk) {
                Ok(0) => return Ok((Self(hash.finalize().into()), len)),
                Ok(n) => {
                    hash.update(&chunk[..n]);
                    len += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        unhex(text).map(Self).ok_or(DigestError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_has_one_spelling() {
        let of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), of_nothing);
        assert_eq!(of_nothing.parse(), Ok(Digest::of(b"")));
        let upper = of_nothing.to_uppercase();
        let long = format!("{of_nothing}0");
        for bad in [
            "",
            &of_nothing[1..],
            &upper,
            &long,
            &"ü".repeat(32),
            "../..",
        ] {
            assert_eq!(bad.parse::<Digest>(), Err(DigestError), "{bad}");
        }
    }

    #[test]
    fn what_is_read_piece_by_piece_has_the_digest_of_the_whole() {
        let bytes: Vec<u8> = (0..CHUNK * 2 + 7).map(|i| i as u8).collect();
        let read = Digest::of_reader(&bytes[..]).unwrap();
        assert_eq!(read, (Digest::of(&bytes), bytes.len() as u64));
    }
}
