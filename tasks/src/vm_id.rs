//! The identity of a VM: one spelling, checked before anything is looked up by it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why text is not a VM id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmIdError {
    /// No byte at all.
    #[error("empty vm id")]
    Empty,
    /// Longer than [`VmId::MAX`].
    #[error("vm id of {len} bytes, at most {max} are allowed", max = VmId::MAX)]
    TooLong {
        /// Bytes given.
        len: usize,
    },
    /// A byte that is not allowed there.
    #[error("vm id has the byte {byte:#04x} at {at}; allowed are a-z, 0-9 and inner '-'")]
    BadByte {
        /// The byte.
        byte: u8,
        /// Its offset.
        at: usize,
    },
}

/// A VM's id and name: a lower-case DNS label (`[a-z0-9]`, inner `-`), 1 to 63 bytes.
///
/// Every other spelling (upper case, Unicode, dots, a trailing dot, NUL) is refused, not folded, so that no two
/// texts mean one VM and one text never means two.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(String);

impl VmId {
    /// Most bytes of an id.
    pub const MAX: usize = 63;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmId {
    type Err = VmIdError;
    fn from_str(s: &str) -> Result<Self, VmIdError> {
        if s.is_empty() {
            return Err(VmIdError::Empty);
        }
        if s.len() > Self::MAX {
            return Err(VmIdError::TooLong { len: s.len() });
        }
        let last = s.len() - 1;
        let ok = |at: usize, b: u8| match b {
            b'a'..=b'z' | b'0'..=b'9' => true,
            b'-' => at != 0 && at != last,
            _ => false,
        };
        match s.bytes().enumerate().find(|&(at, b)| !ok(at, b)) {
            Some((at, byte)) => Err(VmIdError::BadByte { byte, at }),
            None => Ok(Self(s.to_owned())),
        }
    }
}
impl TryFrom<String> for VmId {
    type Error = VmIdError;
    fn try_from(s: String) -> Result<Self, VmIdError> {
        s.parse()
    }
}
impl From<VmId> for String {
    fn from(id: VmId) -> String {
        id.0
    }
}
impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r62_one_canonical_form() {
        for good in ["web-1", "a", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<VmId>().map(String::from).as_deref(), Ok(good));
        }
        let long = "x".repeat(1 << 20);
        for bad in [
            "", "Web-1", "wéb", "web-1.", "web_1", "..", "a/b", "web\0", " web", "web ", "-a",
            "a-", "%41", "ａ", &long,
        ] {
            assert!(bad.parse::<VmId>().is_err(), "{bad:.40}");
        }
    }
}
