//! What follows the service name in a hello: TLVs {type u16, length u16, value}, little-endian.
//!
//! | type | in | value | at most, bytes |
//! |---|---|---|---|
//! | 1 | refuse | text for people | [`TEXT_MAX`] |
//! | 2 | refuse | errno, u16 | 2 |
//! | 3 | open | arguments of the service | [`ARGUMENTS_MAX`] |
//! | 4 | open | who asked for the stream | [`CALLER_MAX`] |
//! | 5 | open | the trace that it belongs to (W3C `traceparent`) | [`TRACE_MAX`] |
//! | 6 | open | serial number u64, MAC by the host's key, see [`HostKey`](super::HostKey) | exactly 8 + [`MAC_LEN`] |
//!
//! Bit 15 of the type is *critical*. A type that is unknown, or that its hello does not have, is skipped without this bit and
//! refused with it. The values of 3, 4 and 5 are opaque here: whoever has the service reads them. Each is there at most once,
//! and one that is empty is not sent.

use serde::{Deserialize, Serialize};

use super::{HelloError, MAC_LEN, Mac, TAIL_MAX, TEXT_MAX};
use adit_names::ServiceName;

/// Most bytes of a service's arguments.
pub const ARGUMENTS_MAX: usize = 512;
/// Most bytes that say who asked for a stream.
pub const CALLER_MAX: usize = 256;
/// Most bytes that say which trace a stream belongs to. A `traceparent` has 55.
pub const TRACE_MAX: usize = 64;

pub(super) const TEXT: u16 = 1;
pub(super) const ERRNO: u16 = 2;
const ARGUMENTS: u16 = 3;
const CALLER: u16 = 4;
const TRACE: u16 = 5;
pub(super) const MAC: u16 = 6;
const CRITICAL: u16 = 0x8000;
const HEAD_LEN: usize = 4;
const SERIAL_LEN: usize = 8;

// An `open` with all of them, and a refusal with its two, fit into the tail.
const _: () = assert!(
    ServiceName::MAX + 4 * HEAD_LEN + ARGUMENTS_MAX + CALLER_MAX + TRACE_MAX + SERIAL_LEN + MAC_LEN
        <= TAIL_MAX
);
const _: () = assert!(TEXT_MAX + 2 * HEAD_LEN + 2 <= TAIL_MAX);

/// A value of at most `MAX` bytes, which nobody between its two ends reads. Empty: there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct Opaque<const MAX: usize>(Vec<u8>);

/// A value is too long for its extension. The caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes are too many for this extension of a hello, which has at most {max}")]
pub struct TooLong {
    /// Length of the value in bytes.
    pub len: usize,
    /// Maximum length in bytes.
    pub max: usize,
}

impl<const MAX: usize> Opaque<MAX> {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns true if there is no value.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<const MAX: usize> TryFrom<Vec<u8>> for Opaque<MAX> {
    type Error = TooLong;

    fn try_from(bytes: Vec<u8>) -> Result<Self, TooLong> {
        let (len, max) = (bytes.len(), MAX);
        match len <= max {
            true => Ok(Self(bytes)),
            false => Err(TooLong { len, max }),
        }
    }
}

impl<const MAX: usize> From<Opaque<MAX>> for Vec<u8> {
    fn from(value: Opaque<MAX>) -> Self {
        value.0
    }
}

/// What an `open` says beside the service's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extensions {
    /// Arguments of the service.
    pub arguments: Opaque<ARGUMENTS_MAX>,
    /// Who asked for the stream.
    pub caller: Opaque<CALLER_MAX>,
    /// The trace that the stream belongs to.
    pub trace: Opaque<TRACE_MAX>,
}

impl Extensions {
    pub(super) fn put_into(&self, tail: &mut Vec<u8>) {
        let all = [
            (ARGUMENTS, self.arguments.as_bytes()),
            (CALLER, self.caller.as_bytes()),
            (TRACE, self.trace.as_bytes()),
        ];
        for (kind, value) in all {
            if !value.is_empty() {
                put(tail, kind, value);
            }
        }
    }
}

/// Appends one TLV. The value is shorter than 64 KiB.
pub(super) fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(value.len() as u16).to_le_bytes());
    out.extend_from_slice(value);
}

/// The TLVs of one hello.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Tlvs {
    pub(super) text: String,
    pub(super) errno: u16,
    pub(super) extensions: Extensions,
    pub(super) mac: Option<Mac>,
}

impl Tlvs {
    /// Parses what follows the name in `tail`, from offset `from`. `is_open`: the hello is an `open`.
    pub(super) fn parse(tail: &[u8], from: usize, is_open: bool) -> Result<Self, HelloError> {
        let malformed = |at| HelloError::Tail {
            len: tail.len(),
            at,
        };
        let mut found = Self::default();
        let mut rest = tail.get(from..).ok_or(malformed(0))?;
        while !rest.is_empty() {
            let at = tail.len() - rest.len();
            let (head, after) = rest.split_at_checked(HEAD_LEN).ok_or(malformed(at))?;
            let tlv = u16::from_le_bytes([head[0], head[1]]);
            let (value, after) = after
                .split_at_checked(u16::from_le_bytes([head[2], head[3]]).into())
                .ok_or(malformed(at))?;
            let extensions = &mut found.extensions;
            match (tlv & !CRITICAL, value) {
                (TEXT, _) => found.text = String::from_utf8_lossy(value).into_owned(),
                (ERRNO, &[a, b]) => found.errno = u16::from_le_bytes([a, b]),
                (ARGUMENTS, _) if is_open => {
                    set(
                        "arguments length",
                        &mut extensions.arguments,
                        value,
                        malformed(at),
                    )?;
                }
                (CALLER, _) if is_open => {
                    set(
                        "caller length",
                        &mut extensions.caller,
                        value,
                        malformed(at),
                    )?;
                }
                (TRACE, _) if is_open => {
                    set("trace length", &mut extensions.trace, value, malformed(at))?;
                }
                (MAC, _) if is_open => {
                    let mac = mac(value).ok_or(HelloError::Field {
                        field: "MAC length",
                        value: value.len() as u64,
                        limit: (SERIAL_LEN + MAC_LEN) as u64,
                    })?;
                    if found.mac.replace(mac).is_some() {
                        return Err(malformed(at));
                    }
                }
                _ if tlv & CRITICAL != 0 => return Err(HelloError::Critical { tlv }),
                _ => {}
            }
            rest = after;
        }
        Ok(found)
    }
}

fn set<const MAX: usize>(
    field: &'static str,
    to: &mut Opaque<MAX>,
    value: &[u8],
    twice: HelloError,
) -> Result<(), HelloError> {
    if !to.is_empty() {
        return Err(twice);
    }
    *to = Opaque::try_from(value.to_vec()).map_err(|e| HelloError::Field {
        field,
        value: e.len as u64,
        limit: e.max as u64,
    })?;
    Ok(())
}

fn mac(value: &[u8]) -> Option<Mac> {
    let (serial, bytes) = value.split_first_chunk::<SERIAL_LEN>()?;
    Some(Mac {
        serial: u64::from_le_bytes(*serial),
        bytes: bytes.try_into().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::{Common, Hello, Open, PREFIX_LEN, Prefix};

    fn extensions(arguments: &[u8], caller: &[u8], trace: &[u8]) -> Extensions {
        Extensions {
            arguments: arguments.to_vec().try_into().unwrap(),
            caller: caller.to_vec().try_into().unwrap(),
            trace: trace.to_vec().try_into().unwrap(),
        }
    }

    fn open(extensions: Extensions) -> Hello {
        Hello::Open(Open {
            extensions,
            ..Open::new("tcp:80".parse().unwrap(), Common::default())
        })
    }

    fn parse(bytes: &[u8]) -> Result<Hello, HelloError> {
        let (head, tail) = bytes.split_first_chunk().unwrap();
        Prefix::parse(head)?.finish(tail)
    }

    #[test]
    fn each_extension_has_golden_bytes() {
        for (extensions, want) in [
            (extensions(b"-x", b"", b""), &b"\x03\0\x02\0-x"[..]),
            (extensions(b"", b"me", b""), b"\x04\0\x02\0me"),
            (extensions(b"", b"", b"00-1"), b"\x05\0\x04\x0000-1"),
            (
                extensions(b"-x", b"me", b"00-1"),
                b"\x03\0\x02\0-x\x04\0\x02\0me\x05\0\x04\x0000-1",
            ),
            (Extensions::default(), b""),
        ] {
            let hello = open(extensions);
            let bytes = hello.encode();
            assert_eq!(bytes[PREFIX_LEN..], [b"tcp:80", want].concat());
            assert_eq!(usize::from(bytes[10]), 6 + want.len());
            assert_eq!(parse(&bytes), Ok(hello));
        }
    }

    #[test]
    fn the_longest_extensions_fit_and_longer_ones_are_no_extensions() {
        let name = "x".repeat(ServiceName::MAX);
        let longest = Hello::Open(Open {
            mac: Some(Mac {
                serial: u64::MAX,
                bytes: [4; MAC_LEN],
            }),
            extensions: extensions(&[1; ARGUMENTS_MAX], &[2; CALLER_MAX], &[3; TRACE_MAX]),
            ..Open::new(name.parse().unwrap(), Common::default())
        });
        assert_eq!(parse(&longest.encode()), Ok(longest));
        let long = Opaque::<TRACE_MAX>::try_from(vec![0; TRACE_MAX + 1]);
        assert_eq!(long, Err(TooLong { len: 65, max: 64 }));
    }

    #[test]
    fn a_peers_extension_that_is_too_long_or_there_twice_is_refused() {
        let mut tail = b"tcp:80".to_vec();
        put(&mut tail, TRACE, &[0; TRACE_MAX + 1]);
        let long = Tlvs::parse(&tail, 6, true);
        assert!(matches!(
            long,
            Err(HelloError::Field {
                value: 65,
                limit: 64,
                ..
            })
        ));
        let mut tail = b"tcp:80".to_vec();
        put(&mut tail, CALLER, b"me");
        put(&mut tail, CALLER, b"you");
        let twice = Tlvs::parse(&tail, 6, true);
        assert_eq!(twice, Err(HelloError::Tail { len: 19, at: 12 }));
    }

    #[test]
    fn a_mac_has_golden_bytes_one_length_and_is_there_once() {
        let hello = Hello::Open(Open {
            mac: Some(Mac {
                serial: 0x0102,
                bytes: [7; MAC_LEN],
            }),
            ..Open::new("tcp:80".parse().unwrap(), Common::default())
        });
        let bytes = hello.encode();
        let want = [
            &b"tcp:80\x06\0\x28\0\x02\x01\0\0\0\0\0\0"[..],
            &[7; MAC_LEN],
        ]
        .concat();
        assert_eq!(bytes[PREFIX_LEN..], want);
        assert_eq!(parse(&bytes), Ok(hello));
        for len in [0, MAC_LEN, MAC_LEN + 7, MAC_LEN + 9] {
            let mut tail = Vec::new();
            put(&mut tail, MAC, &vec![7; len]);
            assert!(matches!(
                Tlvs::parse(&tail, 0, true),
                Err(HelloError::Field { .. })
            ));
        }
        let mut tail = Vec::new();
        put(&mut tail, MAC, &[7; MAC_LEN + 8]);
        put(&mut tail, MAC, &[7; MAC_LEN + 8]);
        assert!(matches!(
            Tlvs::parse(&tail, 0, true),
            Err(HelloError::Tail { .. })
        ));
    }

    #[test]
    fn an_extension_of_an_open_is_unknown_in_an_answer() {
        let mut tail = Vec::new();
        put(&mut tail, CALLER, &[b'x'; 900]);
        assert_eq!(Tlvs::parse(&tail, 0, false), Ok(Tlvs::default()));
        tail[1] = 0x80;
        let critical = Tlvs::parse(&tail, 0, false);
        assert_eq!(critical, Err(HelloError::Critical { tlv: 0x8004 }));
        // In an open it is known, critical or not.
        let mut tail = Vec::new();
        put(&mut tail, CALLER | CRITICAL, b"me");
        let known = Tlvs::parse(&tail, 0, true).unwrap();
        assert_eq!(known.extensions.caller.as_bytes(), b"me");
    }

    #[test]
    fn a_value_that_is_too_long_is_refused_by_whoever_decodes_it() {
        let bytes = postcard::to_allocvec(&vec![0u8; TRACE_MAX + 1]).unwrap();
        assert!(postcard::from_bytes::<Opaque<TRACE_MAX>>(&bytes).is_err());
        let bytes = postcard::to_allocvec(&vec![0u8; TRACE_MAX]).unwrap();
        assert!(postcard::from_bytes::<Opaque<TRACE_MAX>>(&bytes).is_ok());
    }
}
