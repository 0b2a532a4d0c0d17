//! Tokens that callers show: what they are is in [`adit_api::token`].

use adit_api::token::sha256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::config::TokenConfig;

/// Longest text that is looked at.
const TEXT_MAX: usize = 1024;

/// Those of a host.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Vec<Token>);

#[derive(Clone, Debug)]
struct Token {
    name: String,
    sha256: [u8; 32],
    until_ms: Option<i64>,
}

impl Tokens {
    /// Those of a configuration. They have been checked.
    pub fn new(tokens: &[TokenConfig]) -> Self {
        let token = |token: &TokenConfig| {
            Some(Token {
                name: token.name.clone(),
                sha256: adit_tasks::unhex(&token.sha256)?,
                until_ms: token.until.map(jiff::Timestamp::as_millisecond),
            })
        };
        Self(tokens.iter().filter_map(token).collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is one of that name, and its time is not over.
    pub fn has(&self, name: &str, now_ms: i64) -> bool {
        let is = |token: &&Token| token.name == name;
        let token = self.0.iter().find(is);
        token.is_some_and(|token| token.until_ms.is_none_or(|until| now_ms < until))
    }

    /// When they end.
    pub fn ends(&self) -> impl Iterator<Item = i64> {
        self.0.iter().filter_map(|token| token.until_ms)
    }

    /// Name of a token; none: it is none, or its time is over. Takes as long for every text of a length.
    pub fn name(&self, secret: &[u8], now_ms: i64) -> Option<&str> {
        let digest = sha256(secret);
        let mut found = u32::MAX;
        for (nth, token) in (0_u32..).zip(&self.0) {
            let is = token.sha256.ct_eq(&digest);
            found.conditional_assign(&nth, is);
        }
        let token = self.0.get(usize::try_from(found).ok()?)?;
        let is_over = token.until_ms.is_some_and(|until| now_ms >= until);
        (!is_over).then_some(&token.name)
    }
}

/// The token in a `Proxy-Authorization` field: `Bearer TOKEN`, or `Basic` with the token as the password.
pub fn shown(field: &[u8]) -> Option<Vec<u8>> {
    if field.len() > TEXT_MAX {
        return None;
    }
    let field = field.trim_ascii();
    let space = field.iter().position(|b| *b == b' ')?;
    let (scheme, rest) = (&field[..space], field[space..].trim_ascii());
    if scheme.eq_ignore_ascii_case(b"bearer") {
        return Some(rest.to_vec());
    }
    if !scheme.eq_ignore_ascii_case(b"basic") {
        return None;
    }
    let pair = STANDARD.decode(rest).ok()?;
    let colon = pair.iter().position(|b| *b == b':')?;
    Some(pair[colon + 1..].to_vec())
}

#[cfg(test)]
mod tests {
    use adit_api::token::{PREFIX, new};

    use super::*;

    fn config(name: &str, sha256: &str, until: Option<&str>) -> TokenConfig {
        TokenConfig {
            name: name.into(),
            sha256: sha256.into(),
            until: until.map(|until| until.parse().unwrap()),
        }
    }

    #[test]
    fn r69_only_the_token_itself_in_its_time_has_its_name() {
        let (one, two) = (new().unwrap(), new().unwrap());
        let until = "2027-01-01T00:00:00Z";
        let tokens = Tokens::new(&[
            config("one", &one.1, None),
            config("two", &two.1, Some(until)),
        ]);
        let end = until.parse::<jiff::Timestamp>().unwrap().as_millisecond();
        let name = |secret: &str, now| tokens.name(secret.as_bytes(), now);
        assert_eq!(name(&one.0, end), Some("one"));
        assert_eq!(name(&two.0, end - 1), Some("two"));
        assert_eq!(name(&two.0, end), None);
        let (short, long) = (&one.0[..one.0.len() - 1], format!("{}x", one.0));
        for wrong in ["", "adit_", short, &long, &one.1, "one"] {
            assert_eq!(name(wrong, 0), None, "{wrong}");
        }
        assert_eq!(Tokens::default().name(b"", 0), None);
        assert!(one.0.starts_with(PREFIX) && one.0 != two.0 && one.1.len() == 64);
    }

    #[test]
    fn a_token_is_shown_as_bearer_or_as_the_password_of_anybody() {
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
        for (field, token) in [
            ("Bearer abc".to_owned(), Some("abc")),
            ("bearer   abc ".to_owned(), Some("abc")),
            (basic("x:abc"), Some("abc")),
            (basic(":abc"), Some("abc")),
            (basic("x:a:b"), Some("a:b")),
            (basic("abc"), None),
            ("Basic !".to_owned(), None),
            ("Digest abc".to_owned(), None),
            ("Bearer".to_owned(), None),
            (String::new(), None),
            (format!("Bearer {}", "x".repeat(TEXT_MAX)), None),
        ] {
            let found = shown(field.as_bytes());
            assert_eq!(found.as_deref(), token.map(str::as_bytes), "{field}");
        }
    }
}
