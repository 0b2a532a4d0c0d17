//! What an authority names: `VM[:PORT]`, `VM.adit[:PORT]`, or `vsock-PORT.VM[.adit]` for a plain AF_VSOCK listener.
//!
//! A host name is the same in every case, and with a dot at its end (RFC 9110 §4.2.3, RFC 1034 §3.1), as clients and DNS have
//! it; the VM's own name is in lower case. Apart from that there is one spelling: no sign, no leading zero, no space, no user.
//! No name is ever resolved, so there is no address to be tricked into (R62, R63, R64).

use adit_names::ServiceName;
use adit_names::VmId;
use adit_port::control::Target;

/// Name suffix that may be there, for tools that want a dot in a host name.
const SUFFIX: &str = ".adit";
/// Label prefix of plain AF_VSOCK ports.
const VSOCK: &str = "vsock-";

/// A destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The VM.
    pub vm: VmId,
    /// Where in it.
    pub target: Target,
    /// Port number for the allow-lists.
    pub port: u32,
}

/// Why an authority names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// No port where one is needed.
    #[error("`{0}` has no port: write VM:PORT")]
    NoPort(String),
    /// Not a port in its one spelling.
    #[error("`{0}` is no port: 1 to 65535, digits only")]
    BadPort(String),
    /// A user before `@`.
    #[error("user names in an authority mean nothing here")]
    User,
    /// Not the name of any VM.
    #[error("`{name}` can name no VM: {why}")]
    BadName {
        /// As given.
        name: String,
        /// Why not.
        why: String,
    },
}

/// Parses an authority; without a port the default is taken, if there is one.
///
/// # Errors
/// It names nothing that there could be.
pub fn parse(authority: &str, default_port: Option<u16>) -> Result<Destination, AuthorityError> {
    if authority.contains('@') {
        return Err(AuthorityError::User);
    }
    let shown = |text: &str| adit_names::escape(text).at_most(80).to_string();
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    };
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    let host = host.strip_suffix(SUFFIX).unwrap_or(host);
    let bad_name = |name: &str, why: String| AuthorityError::BadName {
        name: shown(name),
        why,
    };
    let vm = |name: &str| {
        name.parse::<VmId>()
            .map_err(|e| bad_name(name, e.to_string()))
    };
    if let Some((number, name)) = host
        .strip_prefix(VSOCK)
        .and_then(|rest| rest.split_once('.'))
    {
        // Clients write a port behind any host; it chooses nothing here, and is still a port or refused.
        if let Some(text) = port.filter(|text| canonical::<u16>(text).is_none()) {
            return Err(AuthorityError::BadPort(shown(text)));
        }
        let port =
            canonical::<u32>(number).ok_or_else(|| AuthorityError::BadPort(shown(number)))?;
        return Ok(Destination {
            vm: vm(name)?,
            target: Target::VsockPort(port),
            port,
        });
    }
    let port = match (port, default_port) {
        (Some(text), _) => {
            canonical::<u16>(text).ok_or_else(|| AuthorityError::BadPort(shown(text)))?
        }
        (None, Some(port)) => port,
        (None, None) => return Err(AuthorityError::NoPort(shown(authority))),
    };
    Ok(Destination {
        vm: vm(host)?,
        target: Target::Service(ServiceName::tcp(port)),
        port: port.into(),
    })
}

/// A number in its one spelling, not 0.
fn canonical<T: std::str::FromStr + ToString + Default + PartialEq>(text: &str) -> Option<T> {
    let n: T = text.parse().ok()?;
    (n != T::default() && n.to_string() == text).then_some(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_every_case_and_a_port_one_spelling() {
        let tcp = |s: &str, d| parse(s, d).map(|d| (d.vm.to_string(), d.port));
        assert_eq!(tcp("web-1:80", None), Ok(("web-1".into(), 80)));
        assert_eq!(tcp("web-1.adit", Some(80)), Ok(("web-1".into(), 80)));
        for name in ["WEB-1", "Web-1.Adit", "web-1.", "web-1.adit."] {
            assert_eq!(tcp(name, Some(80)), Ok(("web-1".into(), 80)), "{name}");
            assert_eq!(tcp(&format!("{name}:22"), None), Ok(("web-1".into(), 22)));
        }
        for name in [
            "vsock-5000.web-1",
            "VSOCK-5000.Web-1.ADIT",
            "vsock-5000.web-1.",
        ] {
            let vsock = parse(name, Some(80)).unwrap();
            assert_eq!(
                (vsock.target, vsock.vm.as_str()),
                (Target::VsockPort(5000), "web-1")
            );
        }
    }

    #[test]
    fn r64_every_other_port_is_refused() {
        for port in [
            "0", "65536", "+443", " 443", "443 ", "", "080", "-1", "0x50", "8０",
        ] {
            let e = parse(&format!("web-1:{port}"), Some(80));
            assert!(
                matches!(e, Err(AuthorityError::BadPort(_))),
                "{port}: {e:?}"
            );
        }
        assert!(matches!(
            parse("web-1", None),
            Err(AuthorityError::NoPort(_))
        ));
    }

    #[test]
    fn r62_every_other_name_is_refused() {
        let long = "x".repeat(1 << 20);
        for name in [
            "wéb",
            // The Kelvin sign, which is `k` in lower case.
            "web-\u{212a}",
            "web-1..",
            ".web-1",
            "..",
            ".",
            ".adit",
            "a/b",
            "web\0",
            "[::1]",
            "127.0.0.1",
            "",
            "web_1",
            "%77eb-1",
            &long,
        ] {
            let e = parse(&format!("{name}:80"), None);
            assert!(
                matches!(e, Err(AuthorityError::BadName { .. })),
                "{name:.20}: {e:?}"
            );
        }
        assert_eq!(parse("root@web-1:80", None), Err(AuthorityError::User));
    }
}
