//! Messages of the service `agent`, which the host dials in a guest: the order to become another program.
//!
//! ```text
//! host                                  guest
//!   Order{envelope} ──────────────────────▶   its program is among the guest's blobs already
//!   ◀──────────────────────────── Answer       it is on the guest's disk and is begun next; or why not
//! ```
//! Each is the postcard body of one frame, as in `wire`. An order has no content of its own: what is signed says all.

use serde::{Deserialize, Serialize};

/// Name of the service.
pub const SERVICE: &str = "agent";
/// Version of both frames.
pub const VERSION: u16 = 1;
/// Most bytes of a frame's body.
pub const BODY_MAX: u32 = 4096;

/// Frame kinds. The number is wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// [`Order`].
    Order = 1,
    /// [`Answer`].
    Answer = 2,
}

/// Which program the agent is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The exact bytes of the signed package's envelope.
    pub envelope: Vec<u8>,
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Stable word for why it is refused, such as `agent-below-floor`; empty: it is not.
    pub refused: String,
    /// Why, and what to do, for people.
    pub text: String,
    /// It is that program already, and nothing happens.
    pub already: bool,
    /// A task runs, and its end is waited for.
    pub waits: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_messages_have_golden_bytes() {
        let envelope = b"{}".to_vec();
        let order = postcard::to_stdvec(&Order { envelope }).unwrap();
        assert_eq!(order, [2, b'{', b'}']);
        let answer = Answer {
            refused: "a".into(),
            text: "b".into(),
            already: false,
            waits: true,
        };
        let answer = postcard::to_stdvec(&answer).unwrap();
        assert_eq!(answer, [1, b'a', 1, b'b', 0, 1]);
        assert_eq!([Kind::Order, Kind::Answer].map(|k| k as u16), [1, 2]);
    }
}
