//! Keys: ed25519, and their text forms.
//!
//! | what | text |
//! |---|---|
//! | public | `adit-ed25519 BASE64(32 bytes) comment` on one line; with the roles of a trust anchor: see `anchor` |
//! | private | `ADIT-PRIVATE-KEY-1`, newline, `BASE64(32 bytes of seed)`, newline: a file of mode 0600 |

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{SigningKey, VerifyingKey};
use sha2::{Digest, Sha256};

const PUBLIC_TAG: &str = "adit-ed25519";
const PRIVATE_TAG: &str = "ADIT-PRIVATE-KEY-1";

/// Why text is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The first word is another.
    #[error("not an adit key: expected a line that begins with `{expected}`")]
    Tag {
        /// What it should begin with.
        expected: &'static str,
    },
    /// Not base64 of 32 bytes.
    #[error("key is not base64 of 32 bytes")]
    Base64,
    /// No id of a key.
    #[error("the id of a key is 32 hex digits, as `adit-guest status` shows it")]
    Id,
    /// 32 bytes that are no point of the curve, or one of small order, whose signatures verify for many messages.
    #[error("key is not a strong ed25519 point")]
    Weak,
}

/// First 16 bytes of the sha256 of a public key: how an envelope names its signer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 16]);

impl FromStr for KeyId {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        crate::unhex(text).map(Self).ok_or(KeyError::Id)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::hex(&self.0))
    }
}

/// A manager's public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    comment: String,
}

impl PublicKey {
    /// The public half of a private key.
    pub fn of(private: &SigningKey, comment: &str) -> Self {
        Self {
            key: private.verifying_key(),
            comment: self::comment(comment),
        }
    }

    /// Parses one line.
    ///
    /// # Errors
    /// It is no key of this kind, or a weak one.
    pub fn parse(line: &str) -> Result<Self, KeyError> {
        let mut words = line.trim().splitn(3, ' ');
        if words.next() != Some(PUBLIC_TAG) {
            return Err(KeyError::Tag {
                expected: PUBLIC_TAG,
            });
        }
        let bytes = decode(words.next().unwrap_or_default())?;
        let comment = comment(words.next().unwrap_or_default());
        Ok(Self {
            comment,
            ..Self::from_bytes(&bytes)?
        })
    }

    /// How envelopes name it.
    pub fn id(&self) -> KeyId {
        key_id(&self.key)
    }

    /// The same key, with no comment.
    pub fn without_comment(self) -> Self {
        let comment = String::new();
        Self { comment, ..self }
    }

    /// The comment that its owner gave it.
    pub fn comment(&self) -> &str {
        &self.comment
    }

    /// Its 32 bytes.
    pub fn to_bytes(&self) -> [u8; 32] {
        self.key.to_bytes()
    }

    /// The same key on Curve25519's other form, as one that a stream is sealed to (RFC 7748).
    pub fn exchange(&self) -> [u8; 32] {
        self.key.to_montgomery().to_bytes()
    }

    /// The key of these bytes.
    ///
    /// # Errors
    /// They are none, or a weak one.
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_bytes(bytes).map_err(|_| KeyError::Weak)?;
        // A point has one encoding here: a second one would be the same key under another id.
        if key.is_weak() || key.to_edwards().compress().as_bytes() != bytes {
            return Err(KeyError::Weak);
        }
        let comment = String::new();
        Ok(Self { key, comment })
    }

    pub(crate) fn verifying(&self) -> &VerifyingKey {
        &self.key
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = BASE64.encode(self.key.as_bytes());
        let line = format!("{PUBLIC_TAG} {key} {}", self.comment);
        f.write_str(line.trim_end())
    }
}

pub(crate) fn key_id(key: &VerifyingKey) -> KeyId {
    let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    KeyId(id)
}

/// Comments are printed, and part of a file: nothing unsafe, limited length.
fn comment(text: &str) -> String {
    let plain = text.chars().filter(|&c| !adit_names::is_unsafe(c));
    plain.take(64).collect()
}

fn decode(text: &str) -> Result<[u8; 32], KeyError> {
    let bytes = BASE64.decode(text).map_err(|_| KeyError::Base64)?;
    bytes.try_into().map_err(|_| KeyError::Base64)
}

/// Writes the text of a private key file.
pub fn format_private(key: &SigningKey) -> String {
    format!("{PRIVATE_TAG}\n{}\n", BASE64.encode(key.to_bytes()))
}

/// Parses the text of a private key file.
///
/// # Errors
/// It is none.
pub fn parse_private(text: &str) -> Result<SigningKey, KeyError> {
    let rest = text.strip_prefix(PRIVATE_TAG).ok_or(KeyError::Tag {
        expected: PRIVATE_TAG,
    })?;
    Ok(SigningKey::from_bytes(&decode(rest.trim())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip() {
        let private = SigningKey::from_bytes(&[7; 32]);
        let public = PublicKey::of(&private, "fleet\u{1b} 2027");
        let line = public.to_string();
        assert_eq!(
            line,
            "adit-ed25519 6kpsY+KcUgq+9VB7Ey7F+ZVHdq6+vnuSQh7qaRRG0iw= fleet 2027"
        );
        assert_eq!(PublicKey::parse(&line), Ok(public));
        assert_eq!(
            parse_private(&format_private(&private)).map(|k| k.to_bytes()),
            Ok([7; 32])
        );
    }

    #[test]
    fn r86_small_order_keys_are_refused() {
        // The identity, and points of order 2, 4 and 8, canonical and not.
        for hex in [
            "0100000000000000000000000000000000000000000000000000000000000000",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "0000000000000000000000000000000000000000000000000000000000000000",
            "0000000000000000000000000000000000000000000000000000000000000080",
            "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
            "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        ] {
            let bytes: Vec<u8> = (0..32)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
                .collect();
            let line = format!("{PUBLIC_TAG} {}", BASE64.encode(bytes));
            assert_eq!(PublicKey::parse(&line), Err(KeyError::Weak), "{hex}");
        }
    }

    #[test]
    fn r86_a_second_encoding_of_a_point_is_refused() {
        for low in 0xed..=0xff_u8 {
            for high in [0x7f, 0xff] {
                let mut bytes = [0xff; 32];
                (bytes[0], bytes[31]) = (low, high);
                let line = format!("{PUBLIC_TAG} {}", BASE64.encode(bytes));
                assert_eq!(
                    PublicKey::parse(&line),
                    Err(KeyError::Weak),
                    "{low:#x} {high:#x}"
                );
            }
        }
    }

    #[test]
    fn r72_a_comment_keeps_no_control_character() {
        let line = PublicKey::of(&SigningKey::from_bytes(&[7; 32]), "").to_string();
        let key = PublicKey::parse(&format!("{line} a\u{1b}[2Jb")).unwrap();
        assert_eq!(key.comment(), "a[2Jb");
    }
}
