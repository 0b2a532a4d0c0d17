//! What is to be forwarded, as it is typed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use crate::proxy::port;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// `[BIND:]LOCALPORT:PORT`, or `unix:PATH:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    pub listen: Listen,
    /// Of the VM.
    pub port: u16,
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (listen, to) = text.rsplit_once(':').ok_or_else(|| {
            format!("`{text}` names no port of the VM: write LOCALPORT:PORT, ADDRESS:LOCALPORT:PORT or unix:PATH:PORT")
        })?;
        if listen == "unix" {
            return Err(format!(
                "`{text}` names no port of the VM: write unix:PATH:PORT"
            ));
        }
        let to = port(to)?;
        let listen = self::listen(listen)?;
        Ok(Self { listen, port: to })
    }
}

/// `[BIND:]LOCALPORT`, or `unix:PATH`.
pub fn listen(text: &str) -> Result<Listen, String> {
    Ok(match text.strip_prefix("unix:") {
        Some("") => return Err("`unix:` has no path".into()),
        Some(path) => Listen::Unix(path.into()),
        None => Listen::Tcp(address(text)?),
    })
}

/// `[BIND:]LOCALPORT`. Loopback, where nothing else is said.
fn address(text: &str) -> Result<SocketAddr, String> {
    let (bind, local) = match text.rsplit_once(':') {
        Some((bind, local)) => (Some(bind), local),
        None => (None, text),
    };
    let local = match local {
        "0" => 0,
        other => port(other)
            .map_err(|why| format!("{why}; write PORT on 127.0.0.1, ADDRESS:PORT, or unix:PATH"))?,
    };
    let bind = match bind {
        None | Some("localhost") => IpAddr::from(Ipv4Addr::LOCALHOST),
        Some(bind) => ip(bind).ok_or_else(|| {
            format!("`{bind}` is no address to listen on: write an IP address, IPv6 in brackets")
        })?,
    };
    Ok((bind, local).into())
}

fn ip(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']')?.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forwarded_is_loopback_unless_an_address_is_written() {
        for (text, listen, port) in [
            ("8443:443", "127.0.0.1:8443", 443),
            ("0:80", "127.0.0.1:0", 80),
            ("localhost:1:2", "127.0.0.1:1", 2),
            ("0.0.0.0:8080:80", "0.0.0.0:8080", 80),
            ("[::1]:8080:80", "[::1]:8080", 80),
        ] {
            let listen = Listen::Tcp(listen.parse().unwrap());
            assert_eq!(text.parse(), Ok(Spec { listen, port }), "{text}");
        }
        for (text, path) in [
            ("unix:/run/a.sock:80", "/run/a.sock"),
            ("unix:a:b:80", "a:b"),
        ] {
            let listen = Listen::Unix(path.into());
            assert_eq!(text.parse(), Ok(Spec { listen, port: 80 }), "{text}");
        }
    }

    #[test]
    fn every_other_text_is_refused() {
        for bad in [
            "",
            "80",
            ":80",
            "80:",
            "80:0",
            "080:80",
            "80:080",
            "65536:80",
            "80:65536",
            "::1:80:80",
            "[::1:80:80",
            "host:80:80",
            "*:80:80",
            "unix:80",
            "unix::80",
            "unix:/a",
            "unix:/a:",
            "-1:80",
            "[127.0.0.1]:80:80",
        ] {
            assert!(bad.parse::<Spec>().is_err(), "{bad}");
        }
    }
}
