//! Service names. Each service has exactly one spelling: there are no variants by case, Unicode, prefixes or NUL
//! bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name is empty.
    #[error("the name is empty")]
    Empty,
    /// The name is longer than the limit.
    #[error("the name has {len} bytes, but at most {max} are allowed")]
    TooLong {
        /// Length in bytes.
        len: usize,
        /// Maximum length in bytes.
        max: usize,
    },
    /// A byte that is not in the alphabet, or not allowed at its position.
    #[error("byte {byte:#04x} at {at} is not allowed: use {alphabet}")]
    BadByte {
        /// The byte.
        byte: u8,
        /// Its offset.
        at: usize,
        /// The allowed characters.
        alphabet: &'static str,
    },
}

/// The name of a service on the well-known port: `tcp:80`, `tasks`, … The one spelling is `[a-z0-9:._-]`, 1 to 64
/// bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

impl FromStr for ServiceName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        if s.is_empty() {
            return Err(NameError::Empty);
        }
        if s.len() > Self::MAX {
            return Err(NameError::TooLong {
                len: s.len(),
                max: Self::MAX,
            });
        }
        let ok = |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b':' | b'.' | b'_' | b'-');
        match s.bytes().enumerate().find(|&(_, b)| !ok(b)) {
            Some((at, byte)) => Err(NameError::BadByte {
                byte,
                at,
                alphabet: "a-z 0-9 : . _ -",
            }),
            None => Ok(Self(s.to_owned())),
        }
    }
}
impl TryFrom<String> for ServiceName {
    type Error = NameError;
    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}
impl From<ServiceName> for String {
    fn from(n: ServiceName) -> String {
        n.0
    }
}
impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl ServiceName {
    /// Maximum length of a name in bytes.
    pub const MAX: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The service name for a TCP port on the guest's loopback.
    pub fn tcp(port: u16) -> Self {
        Self(format!("tcp:{port}"))
    }

    /// The TCP port of a `tcp:PORT` service, in its one spelling (no sign, no leading zero, not 0).
    pub fn tcp_port(&self) -> Option<u16> {
        let digits = self.0.strip_prefix("tcp:")?;
        let port: u16 = digits.parse().ok()?;
        (port != 0 && port.to_string() == digits).then_some(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_service_has_one_spelling() {
        assert_eq!(ServiceName::tcp(80).tcp_port(), Some(80));
        for bad in [
            "tcp:080",
            "tcp:+80",
            "tcp:0",
            "tcp:65536",
            "tcp:",
            "tcp:80 ",
            "udp:80",
            "tcp:-1",
        ] {
            assert_eq!(
                bad.parse::<ServiceName>().ok().and_then(|s| s.tcp_port()),
                None,
                "{bad}"
            );
        }
    }
}
