//! The token that the proxy, or a management listener, may want. It is read from a file, or is in the environment: a command line is seen by every user.

use std::fmt;
use std::io::Read;
use std::path::Path;

use zeroize::Zeroizing;

use crate::error::Failure;

/// The environment's word for it.
const VARIABLE: &str = "ADIT_TOKEN";
/// Longest token.
const TOKEN_MAX: usize = 512;

/// A token. It is never shown.
#[derive(Clone)]
pub struct Token(Zeroizing<String>);

impl Token {
    /// Of a file, else of the environment; none: neither has one.
    pub fn find(file: Option<&Path>) -> Result<Option<Self>, Failure> {
        if let Some(path) = file {
            let mut text = Zeroizing::new(String::new());
            let read = std::fs::File::open(path).and_then(|file| {
                // And what an editor leaves behind it.
                file.take(TOKEN_MAX as u64 + 2).read_to_string(&mut text)
            });
            read.map_err(|e| {
                Failure::io(&format!("cannot read the token in {}", path.display()), &e)
            })?;
            let bad = || {
                Failure::new(
                    "usage",
                    format!(
                        "{} has no token: `adit access token` makes one",
                        path.display()
                    ),
                )
            };
            return Self::parse(text.trim_end()).ok_or_else(bad).map(Some);
        }
        match std::env::var(VARIABLE) {
            Ok(text) if !text.is_empty() => {
                let text = Zeroizing::new(text);
                let bad = || Failure::new("usage", format!("{VARIABLE} is no token"));
                Self::parse(&text).ok_or_else(bad).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        // What is a token of RFC 6750 fits into a header field.
        let is = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b);
        let is_one = (1..=TOKEN_MAX).contains(&text.len()) && text.bytes().all(is);
        is_one.then(|| Self(Zeroizing::new(text.to_owned())))
    }

    /// The token itself.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// The field that shows it to a proxy.
    pub fn field(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("Proxy-Authorization: Bearer {}\r\n", *self.0))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_word_and_is_not_shown() {
        let token = Token::parse("adit_a-B_9").unwrap();
        assert_eq!(*token.field(), "Proxy-Authorization: Bearer adit_a-B_9\r\n");
        assert_eq!(format!("{token:?}"), "Token");
        for bad in ["", "a b", "a\r\nX: y", "é", &"x".repeat(TOKEN_MAX + 1)] {
            assert!(Token::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_file_has_a_token_and_a_new_line_at_most() {
        let dir = std::env::temp_dir().join(format!("adit-token-{}", std::process::id()));
        for (text, is_one) in [
            ("abc\n", true),
            ("abc", true),
            ("", false),
            ("a\nb\n", false),
        ] {
            std::fs::write(&dir, text).unwrap();
            let found = Token::find(Some(&dir));
            assert_eq!(found.is_ok_and(|token| token.is_some()), is_one, "{text:?}");
        }
        std::fs::remove_file(&dir).unwrap();
        assert!(Token::find(Some(&dir)).is_err());
    }
}
