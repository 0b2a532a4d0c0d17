//! Message frames for services that exchange messages: a 16-byte header, then a postcard body.
//!
//! | off | size | field |
//! |---|---|---|
//! | 0 | 4 | body length, at most the kind's limit and [`LEN_MAX`] |
//! | 4 | 2 | kind |
//! | 6 | 2 | version of that kind |
//! | 8 | 4 | stream-local id that pairs request and response |
//! | 12 | 4 | flags: bit 0 last, bit 1 idempotent, bit 2 ignorable |
//!
//! (kind, version) names a struct that never changes; a change is a new version. An unknown kind with [`IGNORABLE`] is
//! skipped.

mod table;

use serde::Serialize;
use serde::de::DeserializeOwned;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Largest body in bytes.
pub const LEN_MAX: u32 = 1 << 20;
/// Size of the header in bytes.
pub const HEADER_LEN: usize = 16;
/// Flag: the last frame of this id.
pub const LAST: u32 = 1;
/// Flag: may be sent again.
pub const IDEMPOTENT: u32 = 2;
/// Flag: a receiver that does not know the kind skips it.
pub const IGNORABLE: u32 = 4;
const FLAGS_KNOWN: u32 = LAST | IDEMPOTENT | IGNORABLE;

/// Why bytes are not a valid frame. The peer's fault, except for `Encode`.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The body is longer than allowed.
    #[error("frame of kind {kind} announces {len} bytes, but at most {max} are allowed")]
    TooLong {
        /// Kind of the frame.
        kind: u16,
        /// Announced length.
        len: u32,
        /// The limit.
        max: u32,
    },
    /// A flag bit without a meaning.
    #[error("frame flags {flags:#x} contain unknown bits")]
    Flags {
        /// The flags in the frame.
        flags: u32,
    },
    /// This build does not know the kind and version.
    #[error("frame kind {kind} version {version} is unknown")]
    Unknown {
        /// The kind in the frame.
        kind: u16,
        /// The version in the frame.
        version: u16,
    },
    /// The body is not the struct that (kind, version) names.
    #[error("frame kind {kind} has a malformed body")]
    Body {
        /// Kind of the frame.
        kind: u16,
        /// Error of postcard.
        #[source]
        source: postcard::Error,
    },
    /// There are bytes after the body.
    #[error("frame kind {kind} has {extra} bytes after its body")]
    Trailing {
        /// Kind of the frame.
        kind: u16,
        /// Number of extra bytes.
        extra: usize,
    },
    /// A value of our own cannot be encoded.
    #[error("cannot encode frame kind {kind}")]
    Encode {
        /// Kind of the frame.
        kind: u16,
        /// Error of postcard.
        #[source]
        source: postcard::Error,
    },
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the body in bytes.
    pub len: u32,
    /// Kind of the body.
    pub kind: u16,
    /// Version of the body's struct.
    pub version: u16,
    /// Pairs request and response.
    pub id: u32,
    /// [`LAST`], [`IDEMPOTENT`], [`IGNORABLE`].
    pub flags: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    len: U32,
    kind: U16,
    version: U16,
    id: U32,
    flags: U32,
}
const _: () = assert!(size_of::<Raw>() == HEADER_LEN);

impl Header {
    /// Checks a header.
    ///
    /// # Errors
    /// The length is above `max` (or [`LEN_MAX`]), or a flag is unknown. Nothing was allocated.
    pub fn parse(bytes: &[u8; HEADER_LEN], max: u32) -> Result<Self, FrameError> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        let (len, kind, flags, max) = (
            raw.len.get(),
            raw.kind.get(),
            raw.flags.get(),
            max.min(LEN_MAX),
        );
        if len > max {
            return Err(FrameError::TooLong { kind, len, max });
        }
        if flags & !FLAGS_KNOWN != 0 {
            return Err(FrameError::Flags { flags });
        }
        Ok(Self {
            len,
            kind,
            version: raw.version.get(),
            id: raw.id.get(),
            flags,
        })
    }

    /// Decodes the body of this header.
    ///
    /// # Errors
    /// The body is not a `T`, or has extra bytes after it.
    pub fn decode<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, FrameError> {
        let (value, rest) = postcard::take_from_bytes(body).map_err(|source| FrameError::Body {
            kind: self.kind,
            source,
        })?;
        match rest.len() {
            0 => Ok(value),
            extra => Err(FrameError::Trailing {
                kind: self.kind,
                extra,
            }),
        }
    }
}

/// Encodes header and body.
///
/// # Errors
/// The body does not serialise, or is longer than [`LEN_MAX`].
pub fn encode<T: Serialize>(
    kind: u16,
    version: u16,
    id: u32,
    flags: u32,
    body: &T,
) -> Result<Vec<u8>, FrameError> {
    let mut out = postcard::to_extend(body, vec![0; HEADER_LEN])
        .map_err(|source| FrameError::Encode { kind, source })?;
    let len = out.len() - HEADER_LEN;
    let len = u32::try_from(len)
        .ok()
        .filter(|&l| l <= LEN_MAX)
        .ok_or(FrameError::TooLong {
            kind,
            len: u32::try_from(len).unwrap_or(u32::MAX),
            max: LEN_MAX,
        })?;
    let raw = Raw {
        len: len.into(),
        kind: kind.into(),
        version: version.into(),
        id: id.into(),
        flags: flags.into(),
    };
    out[..HEADER_LEN].copy_from_slice(raw.as_bytes());
    Ok(out)
}

/// Reads one frame from a blocking stream. Returns `None` if the stream ends between two frames.
///
/// # Errors
/// The stream fails or ends inside a frame, or the header is refused (`InvalidData` with a [`FrameError`] inside).
pub fn read(from: &mut impl std::io::Read, max: u32) -> std::io::Result<Option<(Header, Vec<u8>)>> {
    let mut head = [0; HEADER_LEN];
    let mut got = 0;
    while got < HEADER_LEN {
        match from.read(&mut head[got..]) {
            Ok(0) if got == 0 => return Ok(None),
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let header = Header::parse(&head, max).map_err(invalid)?;
    let mut body = vec![0; header.len as usize];
    from.read_exact(&mut body)?;
    Ok(Some((header, body)))
}

/// As [`read`], from a tokio stream.
///
/// # Errors
/// As [`read`].
#[cfg(feature = "tokio")]
pub async fn read_async(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    max: u32,
) -> std::io::Result<Option<(Header, Vec<u8>)>> {
    use tokio::io::AsyncReadExt;
    let mut head = [0; HEADER_LEN];
    let mut got = 0;
    while got < HEADER_LEN {
        match from.read(&mut head[got..]).await? {
            0 if got == 0 => return Ok(None),
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => got += n,
        }
    }
    let header = Header::parse(&head, max).map_err(invalid)?;
    let mut body = vec![0; header.len as usize];
    from.read_exact(&mut body).await?;
    Ok(Some((header, body)))
}

fn invalid(e: FrameError) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_has_golden_bytes_and_round_trips() {
        let bytes = encode(3, 1, 9, LAST, &(5u8, "ab")).unwrap();
        assert_eq!(
            bytes,
            [
                4, 0, 0, 0, 3, 0, 1, 0, 9, 0, 0, 0, 1, 0, 0, 0, 5, 2, b'a', b'b'
            ]
        );
        let (h, body) = read(&mut &bytes[..], LEN_MAX).unwrap().unwrap();
        assert_eq!(h.decode::<(u8, String)>(&body).unwrap(), (5, "ab".into()));
        assert!(read(&mut &[][..], LEN_MAX).unwrap().is_none());
    }

    #[test]
    fn length_is_checked_before_anything_is_allocated() {
        let mut head = [0; HEADER_LEN];
        head[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            Header::parse(&head, u32::MAX),
            Err(FrameError::TooLong { max: LEN_MAX, .. })
        ));
    }

    #[test]
    fn bytes_after_the_body_are_refused() {
        let h = Header {
            len: 2,
            kind: 1,
            version: 1,
            id: 0,
            flags: 0,
        };
        assert!(matches!(
            h.decode::<u8>(&[1, 2]),
            Err(FrameError::Trailing { extra: 1, .. })
        ));
    }

    #[test]
    fn a_truncated_frame_is_an_error_and_not_an_end() {
        let bytes = encode(1, 1, 0, 0, &7u32).unwrap();
        for cut in 1..bytes.len() {
            assert!(read(&mut &bytes[..cut], LEN_MAX).is_err());
        }
    }
}
