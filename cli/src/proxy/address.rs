//! Where the proxy is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::Failure;

/// Where aditd's proxy listens if nobody says otherwise.
const DEFAULT: &str = "127.0.0.1:7080";
/// The environment's word for it.
const VARIABLE: &str = "ADIT_PROXY";

/// `http://HOST:PORT`, also without `http://` as curl's `-x` takes it, or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT`, with a port for certain.
    Tcp(String),
    /// The path of a socket.
    Unix(PathBuf),
}

impl Address {
    /// What the environment says, or the default.
    pub fn by_environment() -> Result<Self, Failure> {
        let given = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        let Some(given) = given else {
            return Ok(Self::Tcp(DEFAULT.into()));
        };
        let parsed = match given.to_str() {
            Some(text) => text.parse(),
            None => Err("it is not UTF-8".into()),
        };
        parsed.map_err(|e: String| Failure::new("usage", format!("{VARIABLE} names no proxy: {e}")))
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("`unix:` has no path: write unix:/run/adit/proxy.sock".into()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let rest = match text.split_once("://") {
            Some(("http", rest)) => rest,
            Some((scheme, _)) => {
                return Err(format!(
                    "`{scheme}://` is no way to this proxy: write http://HOST:PORT or unix:PATH"
                ));
            }
            None => text,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let bad = || format!("`{text}` is no proxy: write http://HOST:PORT or unix:PATH");
        // Not shown: what is before the `@` may be a password.
        if rest.contains('@') {
            return Err("a token is not part of the address, which every user sees: use --token-file or ADIT_TOKEN".into());
        }
        let (host, port) = rest.rsplit_once(':').ok_or_else(bad)?;
        let host_is_one = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains([':', '/', '[', ']']),
        };
        if !host_is_one || super::port(port).is_err() {
            return Err(bad());
        }
        Ok(Self::Tcp(rest.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_written_as_a_url_as_curl_has_it_or_as_a_path() {
        let tcp = |text: &str| match text.parse() {
            Ok(Address::Tcp(address)) => Some(address),
            _ => None,
        };
        for text in [
            "http://127.0.0.1:7080",
            "http://127.0.0.1:7080/",
            "127.0.0.1:7080",
        ] {
            assert_eq!(tcp(text).as_deref(), Some("127.0.0.1:7080"), "{text}");
        }
        assert_eq!(tcp("http://[::1]:80").as_deref(), Some("[::1]:80"));
        assert_eq!(
            tcp("http://proxy.example:80").as_deref(),
            Some("proxy.example:80")
        );
        assert_eq!("unix:/run/p".parse(), Ok(Address::Unix("/run/p".into())));
        assert_eq!("unix:p".parse(), Ok(Address::Unix("p".into())));
    }

    #[test]
    fn what_else_is_given_is_refused_and_a_password_is_not_repeated() {
        for bad in [
            "",
            "http://",
            "http://h",
            "http://h:",
            "http://h:0",
            "http://h:080",
            "http://:80",
            "https://h:80",
            "socks5://h:80",
            "http://::1:80",
            "http://[h]:80",
            "http://h:80/x",
            "h:80:80",
            "unix:",
            "/run/p",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        let said = "http://me:secret@h:80".parse::<Address>().unwrap_err();
        assert!(!said.contains("secret"), "{said}");
    }
}
