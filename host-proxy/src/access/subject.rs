//! Names of who may ask, as grants have them.
//!
//! | text | who |
//! |---|---|
//! | `user:deploy`, `user:1000` | a user of this host, by name or number: behind a Unix socket or a loopback connection |
//! | `group:ops` | every member of a group of this host |
//! | `token:prometheus` | who shows the token of that name |
//! | `cert:ci.example`, `cert:spiffe://x/y` | who has the key of a certificate that a listener's `client_ca` vouches for, with this DNS name or URI |
//! | `cert:sha256/…` | who has the key of this digest, in a certificate of anybody |
//! | `network:lab` | who asks a listener for DNS that has this name as its `network` |
//! | `anyone` | everybody who reaches a listener, also without a name |

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Longest name.
pub const NAME_MAX: usize = 64;
/// Longest name of a certificate.
pub const CERT_MAX: usize = 255;
/// What the digest of a key begins with.
pub const PIN: &str = "sha256/";

/// One of them. Equal texts are the same one; upper and lower case differ, as they do in the host's user database.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// A token's name.
    Token(String),
    /// A name in a certificate, or the digest of its key.
    Cert(String),
    /// A user of this host: its name, or its number.
    User(String),
    /// A group of this host.
    Group(String),
    /// Whoever reaches a listener for DNS of that network.
    Network(String),
    /// Everybody.
    Anyone,
}

/// Why a text names nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubjectError {
    /// Another kind, or none.
    #[error(
        "it takes `user:NAME`, `group:NAME`, `token:NAME`, `cert:NAME`, `network:NAME` or `anyone`"
    )]
    Kind,
    /// Not a name of a certificate.
    #[error(
        "after `cert:` it takes a DNS name in lower case, a URI of at most {CERT_MAX} printable characters, or `sha256/` with the \
         base64 of a key's SHA-256"
    )]
    Cert,
    /// Not a name.
    #[error("a name has 1 to {NAME_MAX} printable characters, no space, quote, comma or colon")]
    Name,
}

/// Whether a text can be the name of a user, a group, a token or a network.
pub fn is_name(text: &str) -> bool {
    let is = |b: u8| b.is_ascii_graphic() && !b"\"',:`".contains(&b);
    (1..=NAME_MAX).contains(&text.len()) && text.bytes().all(is)
}

/// Whether a text is a DNS name as a subject has it: in lower case, without a wildcard and without a dot at the end.
pub fn is_host(text: &str) -> bool {
    let is = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b);
    let mut labels = text.split('.');
    text.len() <= CERT_MAX && labels.all(|label| !label.is_empty() && label.bytes().all(is))
}

/// Whether a text is a URI as a subject has it. What has no scheme may read as a DNS name or a digest, and is none.
pub fn is_uri(text: &str) -> bool {
    let is = |b: u8| b.is_ascii_graphic() && !b"\"',`".contains(&b);
    let of_scheme = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    let Some((scheme, rest)) = text.split_once(':') else {
        return false;
    };
    let begins = scheme.starts_with(|c: char| c.is_ascii_lowercase());
    begins
        && scheme.bytes().all(of_scheme)
        && !rest.is_empty()
        && text.len() <= CERT_MAX
        && text.bytes().all(is)
}

/// Whether a text is the digest of a key. One digest has one spelling.
fn is_pin(text: &str) -> bool {
    let digest = text.strip_prefix(PIN).map(|text| STANDARD.decode(text));
    matches!(digest, Some(Ok(digest)) if digest.len() == 32)
}

impl FromStr for Subject {
    type Err = SubjectError;

    fn from_str(text: &str) -> Result<Self, SubjectError> {
        if text == "anyone" {
            return Ok(Self::Anyone);
        }
        let (kind, name) = text.split_once(':').ok_or(SubjectError::Kind)?;
        if kind == "cert" {
            let is = is_host(name) || is_uri(name) || is_pin(name);
            return match is {
                true => Ok(Self::Cert(name.to_owned())),
                false => Err(SubjectError::Cert),
            };
        }
        let made = match kind {
            "user" => Self::User,
            "group" => Self::Group,
            "token" => Self::Token,
            "network" => Self::Network,
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
            Self::Cert(name) => write!(f, "cert:{name}"),
            Self::User(name) => write!(f, "user:{name}"),
            Self::Group(name) => write!(f, "group:{name}"),
            Self::Network(name) => write!(f, "network:{name}"),
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
            "network:lab",
            "cert:ci.example",
            "cert:spiffe://adit.example/ns/ci?a=b",
            "cert:urn:uuid:0",
            "cert:sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
            "anyone",
        ] {
            assert_eq!(text.parse::<Subject>().unwrap().to_string(), text);
        }
        for kind in ["", "deploy", "User:a", "owner", "Cert:x", "anyone:", ":a"] {
            assert_eq!(kind.parse::<Subject>(), Err(SubjectError::Kind), "{kind}");
        }
        let uri = format!("cert:urn:{}", "x".repeat(CERT_MAX));
        for cert in [
            "cert:",
            "cert:CI.example",
            "cert:*.example",
            "cert:ci.example.",
            "cert:.",
            "cert:a b",
            "cert:Spiffe://x",
            "cert:spiffe:",
            "cert:://x",
            "cert:urn:a,b",
            "cert:urn:é",
            "cert:sha256/",
            "cert:sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
            "cert:sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFV=",
            "cert:sha256/47DEQpj8HBSa",
            &uri,
        ] {
            assert_eq!(cert.parse::<Subject>(), Err(SubjectError::Cert), "{cert}");
        }
        let long = format!("user:{}", "x".repeat(NAME_MAX + 1));
        for name in [
            "user:",
            "user:a b",
            "group:a,b",
            "token:a:b",
            "network:",
            "network:a b",
            "user:é",
            &long,
        ] {
            assert_eq!(name.parse::<Subject>(), Err(SubjectError::Name), "{name}");
        }
    }
}
