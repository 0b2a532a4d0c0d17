//! The identity of a VM: one spelling, checked before anything is looked up by it.

use std::fmt;
use std::str::FromStr;

use crate::name::{NameError, check};

/// A VM's id and name: a lower-case DNS label (`[a-z0-9]`, inner `-`), 1 to 63 bytes. It is never a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let last = text.len().saturating_sub(1);
        check(
            text,
            Self::MAX,
            "a-z, 0-9 and inner '-'",
            |at, byte| match byte {
                b'a'..=b'z' | b'0'..=b'9' => true,
                b'-' => at != 0 && at != last,
                _ => false,
            },
        )?;
        Ok(Self(text.to_owned()))
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

crate::serde_by_text!(VmId);

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
