//! The ways on which a card, or a trust document, reaches a guest, each read without IO. It is carried as its envelope's JSON text, or
//! as the base64 of that text where quotes and commas would have to be written otherwise (QEMU's options, a kernel's command line).
//!
//! | way | form |
//! |---|---|
//! | file, systemd credential, fw_cfg | [`from_text`]: one of the two, with white space around it |
//! | SMBIOS, type 11 | [`from_smbios`]: a string `io.adit.card=…` in the table of structures |
//! | kernel command line | [`from_fields`]: a word `adit.card=…` |
//!
//! Whoever writes them is the platform, which is not trusted to say who a guest is: what comes out is [`check`](super::check)ed.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::dsse::{CARD_MAX, Type};

/// Most bytes of a carried card: base64 of the longest one.
pub const TEXT_MAX: usize = CARD_MAX.div_ceil(3) * 4;
/// Most bytes of an envelope of this type as it is carried.
pub fn text_max(of: Type) -> usize {
    of.max().div_ceil(3) * 4
}

/// Bytes of the head of an SMBIOS structure (SMBIOS 3.7, 6.1.2), before which no string can begin.
const SMBIOS_MIN: usize = 4;
/// Type of a structure with strings of whoever made the machine (7.12).
const OEM_STRINGS: u8 = 11;
/// Type of the last structure (7.45).
const END_OF_TABLE: u8 = 127;

/// Why nothing usable is carried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CarriedError {
    /// There is nothing in the place.
    #[error("it is damaged: its place is empty")]
    Empty,
    /// Longer than any card.
    #[error("it is damaged: {len} bytes, at most {max} are allowed")]
    TooLong {
        /// Bytes there.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// Neither JSON nor base64.
    #[error("it is damaged: it is neither JSON nor base64")]
    Encoding,
    /// Two in one place: which of them is meant is not known.
    #[error("it is doubled: there are {count} in this one place")]
    Doubled {
        /// How many.
        count: usize,
    },
}

/// A card as one word: base64 of its envelope.
pub fn as_text(envelope: &[u8]) -> String {
    BASE64.encode(envelope)
}

/// The envelope of a card in a carried text.
///
/// # Errors
/// There is none.
pub fn from_text(text: &[u8]) -> Result<Vec<u8>, CarriedError> {
    from_text_as(Type::Card, text)
}

/// The envelope of this type in a carried text.
///
/// # Errors
/// There is none.
pub fn from_text_as(of: Type, text: &[u8]) -> Result<Vec<u8>, CarriedError> {
    // A place of a fixed size is filled up with zeros.
    let end = text.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    let text = text[..end].trim_ascii();
    match text {
        [] => Err(CarriedError::Empty),
        _ if text.len() > text_max(of) => Err(CarriedError::TooLong {
            len: text.len(),
            max: text_max(of),
        }),
        [b'{', ..] => Ok(text.to_vec()),
        _ => BASE64.decode(text).map_err(|_| CarriedError::Encoding),
    }
}

/// What is carried among words with white space between them; none if no word begins with `key`, which ends with `=`.
///
/// # Errors
/// What is there cannot be used.
pub fn from_fields(of: Type, text: &[u8], key: &str) -> Result<Option<Vec<u8>>, CarriedError> {
    let words = text.split(u8::is_ascii_whitespace);
    one(
        of,
        words.filter_map(|word| word.strip_prefix(key.as_bytes())),
    )
}

/// What is carried among the strings of type 11 in a table of SMBIOS structures; none if there is none that begins with `key`.
///
/// # Errors
/// What is there cannot be used.
pub fn from_smbios(of: Type, table: &[u8], key: &str) -> Result<Option<Vec<u8>>, CarriedError> {
    let (mut rest, mut found) = (table, Vec::new());
    while let [kind, len, ..] = *rest {
        // Its own length is part of the structure. Its strings end with a zero each, and the last one with two.
        let Some(strings) = rest.get(usize::from(len).max(SMBIOS_MIN)..) else {
            break;
        };
        let end = strings.windows(2).position(|two| two == [0, 0]);
        let end = end.unwrap_or(strings.len());
        if kind == OEM_STRINGS {
            let texts = strings[..end].split(|b| *b == 0);
            found.extend(texts.filter_map(|text| text.strip_prefix(key.as_bytes())));
        }
        if kind == END_OF_TABLE {
            break;
        }
        rest = strings.get(end + 2..).unwrap_or_default();
    }
    one(of, found.into_iter())
}

fn one<'a>(
    of: Type,
    found: impl Iterator<Item = &'a [u8]>,
) -> Result<Option<Vec<u8>>, CarriedError> {
    let mut found = found.peekable();
    let Some(first) = found.next() else {
        return Ok(None);
    };
    match found.count() {
        0 => from_text_as(of, first).map(Some),
        more => Err(CarriedError::Doubled { count: more + 1 }),
    }
}
