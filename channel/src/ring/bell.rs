//! The bell stream. It signals a guest that a ring cannot interrupt, and on it every guest tells how it is signalled.
//!
//! The guest dials the host's vsock port [`BELL_PORT`] from a privileged port and sends one byte: how it is signalled.
//! With [`Hears::Stream`], every byte from the host is a doorbell, for data and for space. The stream stays open as
//! long as the guest wants the ring's session. Nothing else is sent on it.

/// The host's vsock port for the bell stream: privileged, and next to the well-known port.
pub const BELL_PORT: u32 = 742;

/// A service of every agent that echoes its input, so that carriers can be compared.
pub const PING: &str = "ping";

/// How a guest is signalled by its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Hears {
    /// By interrupts.
    Interrupts = 1,
    /// By bytes on this stream.
    Stream = 2,
    /// Not at all: it polls.
    Nothing = 3,
}

impl Hears {
    /// Parses the byte that a guest sends.
    pub fn parse(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Interrupts,
            2 => Self::Stream,
            3 => Self::Nothing,
            _ => return None,
        })
    }
}
