//! Hello: the first bytes of every stream on the well-known port, in both directions (format 1, frozen).
//!
//! ```text
//! dialer ── open {service, versions, features, epoch, nonce} ──▶ listener
//!        ◀─ accept {chosen version, features} ─ or ─ refuse {status, text} ──
//!        ◀═══════════════ the service's bytes ═══════════════▶
//! ```
//!
//! | off | size | field | notes |
//! |---|---|---|---|
//! | 0 | 8 | magic `41 44 49 54 0D 0A 1A 0A` | distinguishes text protocols and foreign listeners |
//! | 8 | 1 | hello format = 1 | |
//! | 9 | 1 | kind: 1 open, 2 accept, 3 refuse | |
//! | 10 | 2 | tail length, at most 1024 | service name and TLVs |
//! | 12 | 2 | version min | accept: the chosen one |
//! | 14 | 2 | version max | accept: the chosen one |
//! | 16 | 8 | features offered, or the chosen subset | |
//! | 24 | 8 | epoch: the host's; a guest repeats the last one it saw, 0 = none | |
//! | 32 | 16 | boot nonce of the sender | |
//! | 48 | 2 | number of a refusal | [`refusal`](mod@crate::refusal) says what it means |
//! | 50 | 1 | service name length, at most 64 | |
//! | 51 | 1 | lane | |
//! | 52 | 4 | deadline, ms, 0 = none | |
//! | 56 | 8 | reserved, zero | |
//! | 64 | … | service name, then TLVs {type u16, len u16, value}; type bit 15 = critical | [`Extensions`] in an open |
//!
//! All fields are little-endian. [`Prefix::parse`] reads the fixed 64 bytes and returns the length of the tail, so a
//! reader never takes a byte that belongs to the service.

use adit_names::{NameError, ServiceName};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::refusal::{self, Refusal};
use tlv::Tlvs;

#[cfg(feature = "key")]
mod key;
mod tlv;

#[cfg(feature = "key")]
pub use key::{HostKey, KEY_LEN};
pub use tlv::{ARGUMENTS_MAX, CALLER_MAX, Extensions, Opaque, TRACE_MAX, TooLong};

/// The well-known port of both sides.
pub const PORT: u32 = 741;
/// The protocol version of this build.
pub const VERSION: u16 = 1;
/// Number of bytes before the tail.
pub const PREFIX_LEN: usize = 64;
/// Maximum length of the tail in bytes.
pub const TAIL_MAX: usize = 1024;
/// Maximum length of the explanation in a refusal, in bytes.
pub const TEXT_MAX: usize = 512;
/// Bit of the features of a hello that the host dials: the bytes behind the hello are [chunks](crate::chunk), in both directions.
/// Offered where the carrier does not keep half-closes; in the accept of an agent that knows them.
pub const CHUNKS: u64 = 1;
/// Bytes of a MAC.
pub const MAC_LEN: usize = 32;

const MAGIC: [u8; 8] = *b"ADIT\r\n\x1a\n";
const FORMAT: u8 = 1;

/// Why bytes are not a hello. Always the peer's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// The peer is another program.
    #[error("the peer does not use the adit protocol: it started with {found:02x?} ({guess})")]
    Foreign {
        /// The first eight bytes.
        found: [u8; 8],
        /// A guess which program it is.
        guess: &'static str,
    },
    /// The format number of the hello is unknown.
    #[error("hello format {found} is unknown; this build knows only format {FORMAT}")]
    Format {
        /// The format number in the hello.
        found: u8,
    },
    /// A field has a value that is not allowed.
    #[error("hello field {field} is {value}, limit {limit}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: u64,
        /// Limit of the field.
        limit: u64,
    },
    /// The tail is truncated, or has bytes that belong to nothing.
    #[error("hello tail of {len} bytes is malformed at {at}")]
    Tail {
        /// Length of the tail in bytes.
        len: usize,
        /// Offset at which parsing failed.
        at: usize,
    },
    /// A critical TLV that this build does not know.
    #[error("hello needs extension {tlv:#06x}, which this version does not know")]
    Critical {
        /// Type of the TLV.
        tlv: u16,
    },
    /// The service name is invalid.
    #[error("hello has an invalid service name")]
    Service(#[from] NameError),
}

/// Fields that every hello has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Common {
    /// Feature bits: offered in open, chosen in accept.
    pub features: u64,
    /// The host's epoch. A guest repeats the last one that it saw.
    pub epoch: u64,
    /// Random number, drawn at each boot (or process start) of the sender.
    pub boot_nonce: [u8; 16],
}

/// The dialer's hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Features, epoch, nonce.
    pub common: Common,
    /// Lowest version that the dialler supports.
    pub version_min: u16,
    /// Highest version that the dialler supports.
    pub version_max: u16,
    /// The requested service.
    pub service: ServiceName,
    /// 0 for control, 1 for bulk.
    pub lane: u8,
    /// Time that the dialler waits for the answer, in milliseconds; 0 = no limit.
    pub deadline_ms: u32,
    /// What the service is told beside its name.
    pub extensions: Extensions,
    /// That it is the host's, where others can dial, too: see [`HostKey`].
    pub mac: Option<Mac>,
}

/// What only a holder of a [`HostKey`] can say of a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac {
    /// Above 0, and no two hellos with one key have the same: whoever has seen one cannot use it again.
    pub serial: u64,
    /// It covers the serial number, too.
    pub bytes: [u8; MAC_LEN],
}

impl Open {
    /// Makes a request for a service with this build's version.
    pub fn new(service: ServiceName, common: Common) -> Self {
        Self {
            common,
            version_min: VERSION,
            version_max: VERSION,
            service,
            lane: 1,
            deadline_ms: 0,
            extensions: Extensions::default(),
            mac: None,
        }
    }
}

/// The listener's accept. The service's bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accept {
    /// Features, epoch, nonce.
    pub common: Common,
    /// The version that both sides use.
    pub version: u16,
}

/// The listener's refusal. The stream ends after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuse {
    /// Features, epoch, nonce.
    pub common: Common,
    /// Why. Of its text, at most [`TEXT_MAX`] bytes are sent.
    pub refusal: Refusal,
}

/// A hello of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// From the dialer.
    Open(Open),
    /// From the listener.
    Accept(Accept),
    /// From the listener.
    Refuse(Refuse),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    format: u8,
    kind: u8,
    tail_len: U16,
    version_min: U16,
    version_max: U16,
    features: U64,
    epoch: U64,
    boot_nonce: [u8; 16],
    status: U16,
    name_len: u8,
    lane: u8,
    deadline_ms: U32,
    reserved: U64,
}
const _: () = assert!(size_of::<Raw>() == PREFIX_LEN);

/// The checked fixed part. [`Prefix::finish`] parses the tail.
pub struct Prefix(Raw);

impl Prefix {
    /// Checks the first 64 bytes.
    ///
    /// # Errors
    /// The bytes are foreign, the format is unknown, or a field is out of range.
    pub fn parse(bytes: &[u8; PREFIX_LEN]) -> Result<Self, HelloError> {
        let raw = Raw::read_from_bytes(bytes).map_err(|_| HelloError::Tail { len: 0, at: 0 })?;
        if raw.magic != MAGIC {
            return Err(HelloError::Foreign {
                found: raw.magic,
                guess: guess(&raw.magic),
            });
        }
        if raw.format != FORMAT {
            return Err(HelloError::Format { found: raw.format });
        }
        let field = |field, value: u64, limit: u64| match value > limit {
            true => Err(HelloError::Field {
                field,
                value,
                limit,
            }),
            false => Ok(()),
        };
        field("tail length", raw.tail_len.get().into(), TAIL_MAX as u64)?;
        field(
            "service name length",
            raw.name_len.into(),
            ServiceName::MAX as u64,
        )?;
        field(
            "service name length",
            raw.name_len.into(),
            raw.tail_len.get().into(),
        )?;
        field("lane", raw.lane.into(), 1)?;
        field("reserved", raw.reserved.get(), 0)?;
        field(
            "version min",
            raw.version_min.get().into(),
            raw.version_max.get().into(),
        )?;
        match raw.kind {
            1..=3 => Ok(Self(raw)),
            kind => Err(HelloError::Field {
                field: "kind",
                value: kind.into(),
                limit: 3,
            }),
        }
    }

    /// Length of the tail in bytes.
    pub fn tail_len(&self) -> usize {
        self.0.tail_len.get().into()
    }

    /// Checks the tail and returns the hello.
    ///
    /// # Errors
    /// The tail has a wrong length or structure, a critical extension is unknown, or a name is invalid.
    pub fn finish(self, tail: &[u8]) -> Result<Hello, HelloError> {
        let raw = self.0;
        let malformed = |at| HelloError::Tail {
            len: tail.len(),
            at,
        };
        if tail.len() != usize::from(raw.tail_len.get()) {
            return Err(malformed(tail.len()));
        }
        let name_len = usize::from(raw.name_len);
        let name = tail.get(..name_len).ok_or(malformed(0))?;
        let Tlvs {
            text,
            errno,
            extensions,
            mac,
        } = Tlvs::parse(tail, name_len, raw.kind == 1)?;
        let common = Common {
            features: raw.features.get(),
            epoch: raw.epoch.get(),
            boot_nonce: raw.boot_nonce,
        };
        Ok(match raw.kind {
            1 => Hello::Open(Open {
                common,
                version_min: raw.version_min.get(),
                version_max: raw.version_max.get(),
                service: std::str::from_utf8(name)
                    .map_err(|e| malformed(e.valid_up_to()))?
                    .parse()?,
                lane: raw.lane,
                deadline_ms: raw.deadline_ms.get(),
                extensions,
                mac,
            }),
            2 => Hello::Accept(Accept {
                common,
                version: raw.version_max.get(),
            }),
            _ => Hello::Refuse(Refuse {
                common,
                refusal: Refusal::of_hello(raw.status.get(), errno, text),
            }),
        })
    }
}

fn guess(first: &[u8; 8]) -> &'static str {
    match first {
        b if b.starts_with(b"SSH-") => "an SSH server",
        b if b.starts_with(b"HTTP/") => "an HTTP server",
        b if b.starts_with(b"GET ") || b.starts_with(b"POST ") => "an HTTP client",
        b if b.starts_with(b"CONNECT ") => "a hybrid-vsock client",
        b if b[0] == 0x16 && b[1] == 3 => "TLS",
        _ => "another program uses this port",
    }
}

impl Hello {
    /// Encodes prefix and tail.
    pub fn encode(&self) -> Vec<u8> {
        let (mut kind, mut name, mut lane, mut deadline, mut status) = (2, "", 0, 0, 0);
        let (mut versions, mut tail) = ((VERSION, VERSION), Vec::new());
        let common = match self {
            Self::Open(o) => {
                (kind, name, lane, deadline) = (1, o.service.as_str(), o.lane, o.deadline_ms);
                versions = (o.version_min, o.version_max);
                o.extensions.put_into(&mut tail);
                if let Some(mac) = &o.mac {
                    let value = [&mac.serial.to_le_bytes()[..], &mac.bytes].concat();
                    tlv::put(&mut tail, tlv::MAC, &value);
                }
                &o.common
            }
            Self::Accept(a) => {
                versions = (a.version, a.version);
                &a.common
            }
            Self::Refuse(r) => {
                (kind, status) = (3, r.refusal.code().hello_number());
                let (text, errno) = (r.refusal.text(), r.refusal.errno());
                let text = refusal::prefix(text, TEXT_MAX);
                tlv::put(&mut tail, tlv::TEXT, text.as_bytes());
                if errno != 0 {
                    tlv::put(&mut tail, tlv::ERRNO, &errno.to_le_bytes());
                }
                &r.common
            }
        };
        let raw = Raw {
            magic: MAGIC,
            format: FORMAT,
            kind,
            // Both lengths fit: a name has at most 64 bytes, and `tlv` checks the sum of all others.
            tail_len: U16::new((name.len() + tail.len()) as u16),
            version_min: U16::new(versions.0),
            version_max: U16::new(versions.1),
            features: U64::new(common.features),
            epoch: U64::new(common.epoch),
            boot_nonce: common.boot_nonce,
            status: U16::new(status),
            name_len: name.len() as u8,
            lane,
            deadline_ms: U32::new(deadline),
            reserved: U64::ZERO,
        };
        [raw.as_bytes(), name.as_bytes(), &tail].concat()
    }
}

/// Returns the highest version that both sides support, if any. It is the answer in an accept.
pub fn choose_version(open: &Open) -> Option<u16> {
    (open.version_min..=open.version_max)
        .contains(&VERSION)
        .then_some(VERSION)
}

/// Reads one hello from a blocking stream, and no byte after it.
///
/// # Errors
/// The stream fails or ends (`UnexpectedEof`), or the bytes are not a hello (`InvalidData` with a [`HelloError`]
/// inside).
pub fn read(from: &mut impl std::io::Read) -> std::io::Result<Hello> {
    let mut prefix = [0; PREFIX_LEN];
    from.read_exact(&mut prefix)?;
    let prefix = Prefix::parse(&prefix).map_err(invalid)?;
    let mut tail = [0; TAIL_MAX];
    let tail = &mut tail[..prefix.tail_len()];
    from.read_exact(tail)?;
    prefix.finish(tail).map_err(invalid)
}

/// As [`read`], from a tokio stream.
///
/// # Errors
/// As [`read`].
#[cfg(feature = "tokio")]
pub async fn read_async(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> std::io::Result<Hello> {
    use tokio::io::AsyncReadExt;
    let mut prefix = [0; PREFIX_LEN];
    from.read_exact(&mut prefix).await?;
    let prefix = Prefix::parse(&prefix).map_err(invalid)?;
    let mut tail = vec![0; prefix.tail_len()];
    from.read_exact(&mut tail).await?;
    prefix.finish(&tail).map_err(invalid)
}

fn invalid(e: HelloError) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, e)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Hello, HelloError> {
        let (head, tail) = bytes.split_first_chunk().unwrap();
        Prefix::parse(head)?.finish(tail)
    }

    fn open() -> Hello {
        let common = Common {
            features: 0x0102,
            epoch: 7,
            boot_nonce: [0xab; 16],
        };
        Hello::Open(Open {
            deadline_ms: 5000,
            ..Open::new("tcp:80".parse().unwrap(), common)
        })
    }

    #[test]
    fn open_has_golden_bytes() {
        let bytes = open().encode();
        let want = "414449540d0a1a0a0101060001000100020100000000000007000000000000\
                    00abababababababababababababababab0000060188130000000000000000\
                    00007463703a3830"
            .replace(char::is_whitespace, "");
        assert_eq!(
            bytes.iter().map(|b| format!("{b:02x}")).collect::<String>(),
            want
        );
        assert_eq!(parse(&bytes), Ok(open()));
    }

    #[test]
    fn accept_and_refuse_round_trip() {
        let common = Common {
            boot_nonce: [1; 16],
            ..Common::default()
        };
        for h in [
            Hello::Accept(Accept { common, version: 1 }),
            Hello::Refuse(Refuse {
                common,
                refusal: Refusal::of_hello(4, 111, "connection refused"),
            }),
        ] {
            assert_eq!(parse(&h.encode()), Ok(h));
        }
    }

    #[test]
    fn answers_have_golden_bytes() {
        let common = Common {
            boot_nonce: [0xab; 16],
            ..Common::default()
        };
        let refuse = |number, errno| {
            let refusal = Refusal::of_hello(number, errno, "no");
            Hello::Refuse(Refuse { common, refusal })
        };
        let fixed = |kind, tail: u8, status| {
            let mut bytes = MAGIC.to_vec();
            bytes.extend([1, kind, tail, 0, 1, 0, 1, 0]);
            bytes.extend([0; 16]);
            bytes.extend([0xab; 16]);
            bytes.extend([status, 0, 0, 0]);
            bytes.extend([0; 12]);
            bytes
        };
        let text = [1, 0, 2, 0, b'n', b'o'];
        let errno = [2, 0, 2, 0, 111, 0];
        let accept = Hello::Accept(Accept { common, version: 1 });
        let mut golden = vec![
            (accept, fixed(2, 0, 0)),
            (
                refuse(4, 111),
                [fixed(3, 12, 4), text.to_vec(), errno.to_vec()].concat(),
            ),
        ];
        for number in 1..=6_u8 {
            let bytes = [fixed(3, 6, number), text.to_vec()].concat();
            golden.push((refuse(number.into(), 0), bytes));
        }
        for (hello, bytes) in golden {
            assert_eq!(hello.encode(), bytes, "{hello:?}");
            assert_eq!(parse(&bytes), Ok(hello));
        }
    }

    #[test]
    fn a_refusal_of_a_newer_listener_is_a_refusal() {
        let common = Common::default();
        for number in [0, 7, 999, u16::MAX] {
            let refusal = Refusal::of_hello(number, 9, "new");
            let hello = Hello::Refuse(Refuse { common, refusal });
            assert_eq!(parse(&hello.encode()), Ok(hello));
        }
    }

    #[test]
    fn a_refusals_text_is_cut_to_what_fits() {
        let refusal = Refusal::of_hello(3, u16::MAX, "é\r\n".repeat(16 << 10));
        let common = Common::default();
        let bytes = Hello::Refuse(Refuse { common, refusal }).encode();
        assert!(bytes.len() <= PREFIX_LEN + TAIL_MAX);
        let Ok(Hello::Refuse(parsed)) = parse(&bytes) else {
            panic!("not a refusal")
        };
        assert_eq!(parsed.refusal.text(), "é\r\n".repeat(TEXT_MAX / 4));
        // Text that is not UTF-8 grows when it is made UTF-8: it stays within its bound.
        let mut bytes = bytes;
        bytes[PREFIX_LEN + 4..PREFIX_LEN + 4 + TEXT_MAX].fill(0xff);
        assert!(parse(&bytes).is_ok());
    }

    #[test]
    fn foreign_listeners_are_recognised() {
        let mut bytes = [b' '; PREFIX_LEN];
        bytes[..8].copy_from_slice(b"SSH-2.0-");
        assert!(matches!(
            Prefix::parse(&bytes),
            Err(HelloError::Foreign {
                guess: "an SSH server",
                ..
            })
        ));
    }

    #[test]
    fn every_flipped_byte_is_a_hello_or_an_error() {
        let good = open().encode();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << bit;
                let _ = parse(&bytes); // must not panic
            }
        }
        for cut in PREFIX_LEN..good.len() {
            assert!(parse(&good[..cut]).is_err());
        }
    }

    #[test]
    fn unknown_critical_extension_is_refused_and_others_skipped() {
        let mut bytes = open().encode();
        bytes.extend_from_slice(&[0x33, 0x00, 1, 0, 9]);
        bytes[10] += 5;
        assert_eq!(parse(&bytes), Ok(open()));
        let at = bytes.len() - 4;
        bytes[at] = 0x80;
        assert!(matches!(parse(&bytes), Err(HelloError::Critical { .. })));
    }
}
