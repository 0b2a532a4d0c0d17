//! What is said of the service `freeze`, which the host dials in a guest: its file systems stand still for a while.
//!
//! ```text
//! host: hello {freeze, arguments: what, and for how long} ─► guest: hooks, then each file system ─► State or Refused
//! ```
//! Arguments of the hello: version 1, one byte; what, one byte: 1 freeze, 2 thaw, 3 say how it is; for how long, ms, u32 little-endian.
//! The answer is one frame of `adit_channel::frame`, its body postcard of [`Answer`].

use serde::{Deserialize, Serialize};

/// Name of the service.
pub const SERVICE: &str = "freeze";
/// Version of the arguments, and of the frame.
pub const VERSION: u8 = 1;
/// Kind of the frame.
pub const ANSWER: u16 = 1;
/// Most bytes of the frame's body.
pub const BODY_MAX: u32 = 16 << 10;
/// For how long, ms, at least and at most.
pub const LEASE_MS: std::ops::RangeInclusive<u32> = 1000..=300_000;
/// Most file systems that are named.
pub const NAMED_MAX: usize = 32;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// All stand still from now on, for so long, ms; those that do so already for so long from now.
    Freeze(u32),
    /// They go on.
    Thaw,
    /// Nothing: how it is.
    Show,
}

impl Asked {
    /// As the arguments of a hello.
    pub fn encode(self) -> Vec<u8> {
        let (what, ms) = match self {
            Self::Freeze(ms) => (1, ms),
            Self::Thaw => (2, 0),
            Self::Show => (3, 0),
        };
        let mut bytes = vec![VERSION, what];
        bytes.extend(ms.to_le_bytes());
        bytes
    }

    /// Reads them; none: they are none of these.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let [VERSION, what, ms @ ..] = bytes else {
            return None;
        };
        let ms = u32::from_le_bytes(ms.try_into().ok()?);
        match what {
            1 => LEASE_MS.contains(&ms).then_some(Self::Freeze(ms)),
            2 if ms == 0 => Some(Self::Thaw),
            3 if ms == 0 => Some(Self::Show),
            _ => None,
        }
    }
}

/// What has become of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// These stand still, and for so long, ms; none: all go on.
    State {
        /// Where they are mounted, at most [`NAMED_MAX`].
        frozen: Vec<String>,
        /// How many there are.
        count: u32,
        /// Until they go on by themselves.
        left_ms: u32,
    },
    /// It was not done, and all go on. Why, for people.
    Refused(String),
}

impl Answer {
    /// Nothing stands still.
    pub const NOTHING: Self = Self::State {
        frozen: Vec::new(),
        count: 0,
        left_ms: 0,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_have_golden_bytes_and_nothing_else_is_read() {
        for (asked, bytes) in [
            (Asked::Freeze(30_000), [1, 1, 0x30, 0x75, 0, 0]),
            (Asked::Thaw, [1, 2, 0, 0, 0, 0]),
            (Asked::Show, [1, 3, 0, 0, 0, 0]),
        ] {
            assert_eq!(asked.encode(), bytes);
            assert_eq!(Asked::parse(&bytes), Some(asked));
        }
        for bytes in [
            &[][..],
            &[1, 1],
            &[2, 1, 0x30, 0x75, 0, 0],
            &[1, 4, 0, 0, 0, 0],
            &[1, 2, 1, 0, 0, 0],
            &[1, 1, 0, 0, 0, 0],
            &[1, 1, 0xff, 0xff, 0xff, 0xff],
            &[1, 1, 0x30, 0x75, 0, 0, 0],
        ] {
            assert_eq!(Asked::parse(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn answers_have_golden_bytes() {
        let bytes = |answer: &Answer| crate::hex(&postcard::to_stdvec(answer).unwrap());
        let state = Answer::State {
            frozen: vec!["/".into()],
            count: 1,
            left_ms: 300,
        };
        assert_eq!(bytes(&state), "0001012f01ac02");
        assert_eq!(bytes(&Answer::NOTHING), "00000000");
        assert_eq!(bytes(&Answer::Refused("a".into())), "010161");
    }
}
