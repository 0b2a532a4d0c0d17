//! What host and guest say while a blob is carried into the guest: the service `blob`, which the host dials.
//!
//! ```text
//! host                                      guest
//!   open `blob`, arguments: Want ─────────────▶   too large, no room: refused in the hello
//!   ◀──────────────────────────────── accept
//!   ◀────────────────────────── Have{bytes}      so much of it is here
//!   the bytes from there to its end ──────────▶
//!   ◀──────────────────────────────── Ended      it is kept, or why not; before its end too
//! ```
//! `Have` and `Ended` are message frames (postcard). The host's bytes have no frame: their number is known. What came before a
//! stream ended is kept, and the next one goes on from there.
//!
//! The arguments have a fixed layout:
//!
//! | off | size | field |
//! |---|---|---|
//! | 0 | 32 | sha256 |
//! | 32 | 8 | size in bytes, little-endian |

use serde::{Deserialize, Serialize};

use crate::Digest;

/// Name of the service.
pub const SERVICE: &str = "blob";
/// Version of both frames.
pub const VERSION: u16 = 1;
/// Most bytes of a frame's body.
pub const BODY_MAX: u32 = 2048;
/// Most bytes of the text in [`Ended`].
pub const TEXT_MAX: usize = 512;

/// Frame kinds. The number is wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// [`Have`].
    Have = 1,
    /// [`Ended`].
    Ended = 2,
}

/// What is to be carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Its name.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

impl Want {
    /// As the arguments of a hello.
    pub fn encode(&self) -> Vec<u8> {
        [&self.digest.0[..], &self.size.to_le_bytes()].concat()
    }

    /// Reads the arguments of a hello; none if they are not these.
    pub fn parse(arguments: &[u8]) -> Option<Self> {
        let (digest, size) = arguments.split_first_chunk()?;
        Some(Self {
            digest: Digest(*digest),
            size: u64::from_le_bytes(size.try_into().ok()?),
        })
    }
}

/// How much of it the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Have {
    /// Bytes from its start. Its size: the guest has it, and nothing is to be sent.
    pub bytes: u64,
}

/// The end, and the last message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Number of a refusal, as in a hello; 0: the guest has all of it, on disk.
    pub refusal: u16,
    /// Why, for people; at most [`TEXT_MAX`] bytes.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_and_frames_have_golden_bytes() {
        let want = Want {
            digest: Digest([0xab; 32]),
            size: 0x0102,
        };
        let bytes = [&[0xab; 32][..], &[2, 1, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(want.encode(), bytes);
        assert_eq!(Want::parse(&bytes), Some(want));
        for bad in [&bytes[1..], &[&bytes[..], &[0]].concat(), &[]] {
            assert_eq!(Want::parse(bad), None);
        }
        let have = Have { bytes: 300 };
        assert_eq!(postcard::to_stdvec(&have).unwrap(), [0xac, 2]);
        let ended = Ended {
            refusal: 8,
            text: "no".into(),
        };
        assert_eq!(postcard::to_stdvec(&ended).unwrap(), [8, 2, b'n', b'o']);
        assert_eq!([Kind::Have, Kind::Ended].map(|k| k as u16), [1, 2]);
    }
}
