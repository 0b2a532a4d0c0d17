//! Service names: what a stream on the well-known port is for.

use std::fmt;
use std::str::FromStr;

use crate::name::{NameError, check};
use crate::vm_id::VmId;

/// Begins services that a guest has a name for.
const NAMED: &str = "svc:";

/// The name of a service on the well-known port: `tcp:80`, `tasks`, … The one spelling is `[a-z0-9:._-]`, 1 to 64
/// bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(String);

impl ServiceName {
    /// Maximum length of a name in bytes.
    pub const MAX: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The service name for a TCP port on the guest's loopback.
    pub fn tcp(port: u16) -> Self {
        Self(format!("tcp:{port}"))
    }

    /// The service that a guest has a name for: `svc:NAME`. None: it is no such name (one label, as a VM's name).
    pub fn named(name: &str) -> Option<Self> {
        name.parse::<VmId>().ok()?;
        format!("{NAMED}{name}").parse().ok()
    }

    /// The name that a guest has for it; none: it is no such service.
    pub fn name(&self) -> Option<&str> {
        self.0.strip_prefix(NAMED)
    }

    /// The TCP port of a `tcp:PORT` service, in its one spelling (no sign, no leading zero, not 0).
    pub fn tcp_port(&self) -> Option<u16> {
        let digits = self.0.strip_prefix("tcp:")?;
        let port: u16 = digits.parse().ok()?;
        (port != 0 && port.to_string() == digits).then_some(port)
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let allowed =
            |_, byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b':' | b'.' | b'_' | b'-');
        check(text, Self::MAX, "a-z 0-9 : . _ -", allowed)?;
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

crate::serde_by_text!(ServiceName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_with_a_name_is_one_label() {
        let docker = ServiceName::named("docker").unwrap();
        assert_eq!(
            (docker.as_str(), docker.name()),
            ("svc:docker", Some("docker"))
        );
        assert_eq!(ServiceName::tcp(80).name(), None);
        let long = "x".repeat(61);
        for bad in ["", "Docker", "a.b", "tcp:80", "-a", &long] {
            assert_eq!(ServiceName::named(bad), None, "{bad}");
        }
        assert!(ServiceName::named(&long[1..]).is_some());
    }

    #[test]
    fn tcp_service_has_one_spelling() {
        assert_eq!(ServiceName::tcp(80).tcp_port(), Some(80));
        for bad in [
            "tcp:080",
            "tcp:+80",
            "tcp:0",
            "tcp:65536",
            "tcp:",
            "tcp:80 ",
            "udp:80",
            "tcp:-1",
        ] {
            assert_eq!(
                bad.parse::<ServiceName>().ok().and_then(|s| s.tcp_port()),
                None,
                "{bad}"
            );
        }
    }
}
