//! What a tunnel leads to: a VM, and a port of it.

use std::fmt;

use adit_names::{ServiceName, VmId};

use super::uri;
use crate::error::Failure;

/// What a VM's name may end with, for tools that want a dot in a host name, as ssh's `Host *.adit`.
const SUFFIX: &str = ".adit";
/// Begins the name of a VM whose port is one of AF_VSOCK: `vsock-5000.web-1`.
const VSOCK: &str = "vsock-";
/// Ends the name of a service that the guest has a name for.
const SVC: &str = ".svc";
/// Most labels of a name, with those of a suffix.
const LABELS_MAX: usize = 16;

/// A VM and what of it, as a CONNECT names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    host: String,
    /// None: the name says what it is.
    port: Option<u16>,
}

impl Destination {
    /// Checks a name, `web-1`, `web-1.HOST`, `SERVICE.web-1.svc`, each with `vsock-PORT.` before it or a suffix behind it, or a URI
    /// ([`super::uri`]). Which suffix there is, aditd knows; the one that there usually is stays here. A name that has its own port needs no
    /// other, and none changes it.
    pub fn new(name: &str, port: Option<u16>) -> Result<Self, Failure> {
        let uri = uri::name(name).map_err(|why| {
            let message = format!("`{name}` is no adit://HOST/VM/SERVICE: {why}");
            Failure::new("usage", message)
                .help("such as adit:///web-1/80, or adit://alpha/web-1/docker of the host `alpha`")
        })?;
        let (name, port) = match uri {
            Some((name, of_uri)) => match (port, of_uri) {
                (Some(_), _) => return Err(twice(name.as_str())),
                (None, port) => (name, port),
            },
            None => (name.to_owned(), port),
        };
        let plain = name.strip_suffix(SUFFIX).unwrap_or(&name);
        let mut has_own = plain.ends_with(SVC);
        if let Some((number, _)) = plain.strip_prefix(VSOCK).and_then(|n| n.split_once('.')) {
            if !is_vsock_port(number) {
                let message = format!("`{number}` is no port of AF_VSOCK: digits only");
                return Err(Failure::new("usage", message));
            }
            has_own = true;
        }
        let labels = plain.split('.').take(LABELS_MAX + 1);
        let wrong = labels.clone().find_map(|label| label.parse::<VmId>().err());
        let why = match wrong {
            Some(e) => e.to_string(),
            None if labels.count() > LABELS_MAX => format!("it has more than {LABELS_MAX} labels"),
            None if port.is_none() && !has_own => {
                let message = format!("which port of `{plain}`?");
                return Err(Failure::new("usage", message)
                    .help("write it behind the name, or name a service: SERVICE.VM.svc, adit://HOST/VM/SERVICE"));
            }
            None => {
                return Ok(Self {
                    host: plain.to_owned(),
                    port,
                });
            }
        };
        let failure = Failure::new("unknown-vm", format!("`{name}` names no VM: {why}"));
        Err(failure.help("`adit vm ls` lists the names"))
    }

    /// As a CONNECT has it.
    pub fn authority(&self) -> String {
        // One that needs none takes any.
        format!("{}:{}", self.host, self.port.unwrap_or(1))
    }
}

fn twice(name: &str) -> Failure {
    let message =
        format!("the URI of `{name}` says what is meant, and another port is written behind it");
    Failure::new("usage", message)
}

/// `web-1:22`, or `docker.web-1.svc`.
impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.host),
            None => f.pad(&self.host),
        }
    }
}

/// A port in its one spelling: 1 to 65535, no sign, no leading zero.
pub fn port(text: &str) -> Result<u16, String> {
    let service = format!("tcp:{text}").parse::<ServiceName>();
    service
        .ok()
        .and_then(|service| service.tcp_port())
        .ok_or_else(|| format!("`{text}` is no port: 1 to 65535, digits only"))
}

fn is_vsock_port(text: &str) -> bool {
    let number = text.parse::<u32>();
    number.is_ok_and(|n| n != 0 && n.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_may_have_the_suffix_and_is_asked_for_without_it() {
        for (name, asked) in [
            ("web-1", "web-1:22"),
            ("web-1.adit", "web-1:22"),
            ("vsock-5000.web-1", "vsock-5000.web-1:22"),
            ("vsock-5000.web-1.adit", "vsock-5000.web-1:22"),
            ("web-1.alpha.adit", "web-1.alpha:22"),
            ("docker.web-1.svc", "docker.web-1.svc:22"),
            ("web-1.vm.example", "web-1.vm.example:22"),
            // A VM may have such a name.
            ("vsock-5000", "vsock-5000:22"),
        ] {
            assert_eq!(Destination::new(name, Some(22)).unwrap().to_string(), asked);
        }
    }

    #[test]
    fn a_uri_or_the_name_of_a_service_needs_no_port_and_a_uri_takes_none() {
        for (name, shown, asked) in [
            ("docker.web-1.svc", "docker.web-1.svc", "docker.web-1.svc:1"),
            (
                "docker.web-1.alpha.svc.adit",
                "docker.web-1.alpha.svc",
                "docker.web-1.alpha.svc:1",
            ),
            ("vsock-5000.web-1", "vsock-5000.web-1", "vsock-5000.web-1:1"),
            (
                "adit://alpha/web-1/docker",
                "docker.web-1.alpha.svc",
                "docker.web-1.alpha.svc:1",
            ),
            ("adit:///web-1/22", "web-1:22", "web-1:22"),
        ] {
            let to = Destination::new(name, None).unwrap();
            assert_eq!(
                (to.to_string().as_str(), to.authority().as_str()),
                (shown, asked)
            );
        }
        for name in ["web-1", "web-1.adit", "svc", "vsock-5000"] {
            let failure = Destination::new(name, None).unwrap_err();
            assert_eq!(failure.code, "usage", "{name}");
        }
        assert!(Destination::new("adit:///web-1/22", Some(22)).is_err());
    }

    #[test]
    fn r62_what_is_no_name_is_never_sent() {
        let long = "x".repeat(1 << 20);
        for name in [
            "",
            ".adit",
            "Web-1",
            "web-1.",
            "web-1..adit",
            "a..b",
            "a b",
            "a\r\nX: y",
            "web-1:80",
            "-a",
            "root@web-1",
            "[::1]",
            "vsock-0.web-1",
            "vsock-x.web-1",
            "vsock-5000.",
            &long,
        ] {
            assert!(Destination::new(name, Some(22)).is_err(), "{name:.40}");
        }
    }

    #[test]
    fn r64_a_port_has_one_spelling() {
        assert_eq!(port("22"), Ok(22));
        for bad in ["", "0", "65536", "+22", "022", " 22", "22 ", "ssh", "-1"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }
}
