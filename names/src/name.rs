//! The check of a name, and why one is refused.

/// Why a text is not a name.
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

/// Checks that `text` has 1 to `max` bytes, each of which is `allowed` at its offset.
pub(crate) fn check(
    text: &str,
    max: usize,
    alphabet: &'static str,
    allowed: impl Fn(usize, u8) -> bool,
) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    let len = text.len();
    if len > max {
        return Err(NameError::TooLong { len, max });
    }
    match text
        .bytes()
        .enumerate()
        .find(|&(at, byte)| !allowed(at, byte))
    {
        Some((at, byte)) => Err(NameError::BadByte { byte, at, alphabet }),
        None => Ok(()),
    }
}
