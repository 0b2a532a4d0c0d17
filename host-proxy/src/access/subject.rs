//! Names of who may ask, as grants have them.
//!
//! | text | who |
//! |---|---|
//! | `user:deploy`, `user:1000` | a user of this host, by name or number: behind a Unix socket or a loopback connection |
//! | `group:ops` | every member of a group of this host |
//! | `token:prometheus` | who shows the token of that name |
//! | `anyone` | everybody who reaches a listener, also without a name |

use std::fmt;
use std::str::FromStr;

/// Longest name.
pub const NAME_MAX: usize = 64;

/// One of them. Equal texts are the same one; upper and lower case differ, as they do in the host's user database.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// A token's name.
    Token(String),
    /// A user of this host: its name, or its number.
    User(String),
    /// A group of this host.
    Group(String),
    /// Everybody.
    Anyone,
}

/// Why a text names nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubjectError {
    /// Another kind, or none.
    #[error("it takes `user:NAME`, `group:NAME`, `token:NAME` or `anyone`")]
    Kind,
    /// Not a name.
    #[error("a name has 1 to {NAME_MAX} printable characters, no space, quote, comma or colon")]
    Name,
}

/// Whether a text can be the name of a user, a group or a token.
pub fn is_name(text: &str) -> bool {
    let is = |b: u8| b.is_ascii_graphic() && !b"\"',:`".contains(&b);
    (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(is)
}

impl FromStr for Subject {
    type Err = SubjectError;

    fn from_str(text: &str) -> Result<Self, SubjectError> {
        if text == "anyone" {
            return Ok(Self::Anyone);
        }
        let (kind, name) = text.split_once(':').ok_or(SubjectError::Kind)?;
        let made = match kind {
            "user" => Self::User,
            "group" => Self::Group,
            "token" => Self::Token,
            _ => return Err(SubjectError::Kind),
        };
        if !is_name(name) {
            return Err(SubjectError::Name);
        }
        Ok(made(name.to_owned()))
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(name) => write!(f, "token:{name}"),
            Self::User(name) => write!(f, "user:{name}"),
            Self::Group(name) => write!(f, "group:{name}"),
            Self::Anyone => f.pad("anyone"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_has_one_spelling() {
        for text in [
            "user:deploy",
            "user:1000",
            "group:ops",
            "token:ci",
            "anyone",
        ] {
            assert_eq!(text.parse::<Subject>().unwrap().to_string(), text);
        }
        for kind in ["", "deploy", "User:a", "owner", "cert:x", "anyone:", ":a"] {
            assert_eq!(kind.parse::<Subject>(), Err(SubjectError::Kind), "{kind}");
        }
        let long = format!("user:{}", "x".repeat(NAME_MAX + 1));
        for name in [
            "user:",
            "user:a b",
            "group:a,b",
            "token:a:b",
            "user:é",
            &long,
        ] {
            assert_eq!(name.parse::<Subject>(), Err(SubjectError::Name), "{name}");
        }
    }
}
