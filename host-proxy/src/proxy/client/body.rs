//! Where the body of a request ends.
//!
//! hyper decodes the body; this follows the same bytes to know where the next request begins, and refuses what hyper forgives
//! or leaves without a limit. Accepted here is a part of what hyper accepts (`tests.rs` holds the two against each other).
//!
//! ```text
//!  Length:  n bytes
//!  Chunked: Size ─► Space ─► Extension ─► SizeLf ─► Data ─► DataCr ─► DataLf ─► Size …      a chunk
//!                                           └─ 0 ─► Trailer ─► Over                        the last one
//! ```

use super::super::problem::Problem;
use super::lines::Lines;

/// Digits of a chunk's size at most.
const SIZE_DIGITS_MAX: u8 = 16;
/// Bytes of chunk extensions in a body at most; hyper refuses 16 KiB of them with an error of the body only.
pub(super) const EXTENSIONS_MAX: usize = 8 << 10;
/// Bytes of a trailer section at most.
pub(super) const TRAILER_MAX: usize = 8 << 10;
/// Trailer fields at most.
const TRAILER_FIELDS_MAX: usize = 64;

/// The rest of a body.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    /// As many bytes; 0: it is over.
    Length(u64),
    /// Chunks.
    Chunked(Chunks),
}

/// A chunked body, as far as it has come.
#[derive(Clone, Debug)]
pub(crate) struct Chunks {
    at: At,
    extensions: usize,
    trailer: Vec<u8>,
}

#[derive(Clone, Debug)]
enum At {
    /// In the digits of a chunk's size.
    Size { size: u64, digits: u8 },
    /// In spaces behind them.
    Space { size: u64 },
    /// In an extension.
    Extension { size: u64 },
    /// Behind the CR of the size's line.
    SizeLf { size: u64 },
    /// In the data; not 0.
    Data { left: u64 },
    /// Behind the data.
    DataCr,
    /// Behind the CR that is behind the data.
    DataLf,
    /// Behind the last chunk.
    Trailer(Lines),
    /// Behind the body.
    Over,
}

const SIZE: At = At::Size { size: 0, digits: 0 };

impl Body {
    /// A chunked body, at its beginning.
    pub(crate) fn chunked() -> Self {
        Self::Chunked(Chunks {
            at: SIZE,
            extensions: 0,
            trailer: Vec::new(),
        })
    }

    /// Whether nothing of it is to come.
    pub(crate) fn is_over(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunks) => matches!(chunks.at, At::Over),
        }
    }

    /// Takes what is its own of these bytes, and tells how many they are.
    ///
    /// # Errors
    /// It is no chunked body.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<usize, Problem> {
        match self {
            Self::Length(left) => {
                let own = bytes
                    .len()
                    .min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= own as u64;
                Ok(own)
            }
            Self::Chunked(chunks) => chunks.take(bytes),
        }
    }
}

impl Chunks {
    fn take(&mut self, bytes: &[u8]) -> Result<usize, Problem> {
        let mut at = 0;
        while at < bytes.len() && !matches!(self.at, At::Over) {
            if let At::Data { left } = &mut self.at {
                let rest = bytes.len() - at;
                let own = rest.min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= own as u64;
                at += own;
                if *left == 0 {
                    self.at = At::DataCr;
                }
            } else {
                self.step(bytes[at])?;
                at += 1;
            }
        }
        Ok(at)
    }

    /// Takes a byte that is none of the data.
    fn step(&mut self, byte: u8) -> Result<(), Problem> {
        let bad = |why: &str| {
            Err(Problem::malformed(format!(
                "the chunked body is wrong: {why}"
            )))
        };
        let next = match (&mut self.at, byte) {
            (At::Size { size, digits }, b) if b.is_ascii_hexdigit() => {
                *digits += 1;
                if *digits > SIZE_DIGITS_MAX {
                    return bad("a chunk's size has too many digits");
                }
                let digit = char::from(b).to_digit(16).unwrap_or_default();
                *size = *size << 4 | u64::from(digit);
                return Ok(());
            }
            (At::Size { digits: 0, .. }, _) => return bad("a chunk has no size"),
            (At::Size { size, .. } | At::Space { size }, b'\r') => At::SizeLf { size: *size },
            (At::Size { size, .. } | At::Space { size }, b' ' | b'\t') => {
                let size = *size;
                self.count()?;
                At::Space { size }
            }
            (At::Size { size, .. } | At::Space { size }, b';') => {
                let size = *size;
                self.count()?;
                At::Extension { size }
            }
            (At::Extension { size }, b'\r') => At::SizeLf { size: *size },
            (At::Extension { .. }, b'\t' | b' '..=b'~' | 0x80..) => return self.count(),
            (At::SizeLf { size: 0 }, b'\n') => At::Trailer(Lines::new()),
            (At::SizeLf { size }, b'\n') => At::Data { left: *size },
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => SIZE,
            (At::DataCr | At::DataLf, _) => return bad("a chunk is longer than its size"),
            (At::Trailer(lines), byte) => {
                let ends = lines.take(byte)?;
                self.trailer.push(byte);
                if self.trailer.len() > TRAILER_MAX {
                    return bad("its trailer is too long");
                }
                if !ends {
                    return Ok(());
                }
                let mut fields = [httparse::EMPTY_HEADER; TRAILER_FIELDS_MAX];
                if httparse::parse_headers(&self.trailer, &mut fields).is_err() {
                    return bad("its trailer has a line that is no field");
                }
                self.trailer = Vec::new();
                At::Over
            }
            (At::Size { .. } | At::Space { .. } | At::Extension { .. } | At::SizeLf { .. }, _) => {
                return bad("the line of a chunk's size is none");
            }
            // `take` hands none of their bytes here.
            (At::Data { .. } | At::Over, _) => return Ok(()),
        };
        self.at = next;
        Ok(())
    }

    fn count(&mut self) -> Result<(), Problem> {
        self.extensions += 1;
        if self.extensions > EXTENSIONS_MAX {
            return Err(Problem::malformed(format!(
                "the body has more than {EXTENSIONS_MAX} bytes of chunk extensions"
            )));
        }
        Ok(())
    }
}
