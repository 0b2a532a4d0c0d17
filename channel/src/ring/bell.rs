//! The bell port: how a guest that a ring cannot interrupt is rung, and how every guest says what it hears by.
//!
//! The guest dials the host's vsock port [`BELL_PORT`] from a privileged port, and says one byte: how it hears. Where that
//! is [`Hears::Stream`], every byte from the host is a doorbell, for data and space alike; the stream lives as long as the
//! ring's session is wanted. Nothing else is said on it.

/// The host's vsock port for it: privileged, and beside the well-known one.
pub const BELL_PORT: u32 = 742;

/// A service of every agent: it sends back what comes, so that carriers can be compared.
pub const PING: &str = "ping";

/// How a guest hears its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Hears {
    /// By interrupts.
    Interrupts = 1,
    /// By bytes on this stream.
    Stream = 2,
    /// Not at all: it looks on.
    Nothing = 3,
}

impl Hears {
    /// Parses the byte that a guest says.
    pub fn parse(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Interrupts,
            2 => Self::Stream,
            3 => Self::Nothing,
            _ => return None,
        })
    }
}
