//! What an authority names: `HOST[:PORT]`, with the host's names as [`destination`](super::destination) has them.
//!
//! A port has one spelling: no sign, no leading zero, no space. There is no user.

use super::destination::{Destination, DestinationError, Suffix, canonical, shown};

/// Parses an authority; without a port the default is taken, if there is one.
///
/// # Errors
/// It names nothing that there could be.
pub fn parse(
    suffix: &Suffix,
    authority: &str,
    default_port: Option<u16>,
) -> Result<Destination, DestinationError> {
    if authority.contains('@') {
        return Err(DestinationError::User);
    }
    // An address of IPv6 has its colons within brackets, and is no name, whatever follows.
    let address = authority.starts_with('[').then(|| authority.rfind(']'));
    let within = address.flatten().map_or(0, |end| end + 1);
    let port_at = authority[within..].rfind(':').map(|at| at + within);
    let Some((host, port)) = port_at.map(|at| (&authority[..at], &authority[at + 1..])) else {
        return Destination::named(suffix, authority, default_port);
    };
    // Clients write a port behind any host. Where it chooses nothing it is still a port, or refused.
    let bad = || DestinationError::BadPort(shown(port));
    let port = canonical(port).ok_or_else(bad)?;
    Destination::named(suffix, host, Some(port))
}

#[cfg(test)]
mod tests {
    use adit_port::control::Target;

    use super::*;

    fn parse(text: &str, port: Option<u16>) -> Result<Destination, DestinationError> {
        super::parse(&Suffix::default(), text, port)
    }

    #[test]
    fn r62_a_vm_a_host_and_a_service_have_one_canonical_form_with_every_suffix() {
        let long: Suffix = ".vm.example.org".parse().unwrap();
        for (name, canonical) in [
            ("web-1", "web-1:80"),
            ("WEB-1.Alpha", "web-1.alpha:80"),
            ("vsock-7.web-1.alpha", "vsock-7.web-1.alpha:1"),
            ("Docker.web-1.svc", "docker.web-1.svc:1"),
            ("docker.web-1.alpha.SVC", "docker.web-1.alpha.svc:1"),
            // Of the VM of that name.
            ("svc.alpha", "svc.alpha:80"),
            ("a.svc.svc", "a.svc.svc:1"),
        ] {
            for (suffix, end) in [
                (&Suffix::default(), ""),
                (&Suffix::default(), ".adit"),
                (&Suffix::default(), ".ADIT."),
                (&long, ".vm.Example.org"),
                (&long, "."),
            ] {
                let name = format!("{name}{end}");
                let to = super::parse(suffix, &name, Some(80)).unwrap();
                assert_eq!(to.authority(), canonical, "{name}");
                let again = super::parse(suffix, &to.authority(), Some(1)).unwrap();
                assert_eq!(again, to, "{name}");
            }
        }
        // Another suffix is a name like any other.
        let other = super::parse(&long, "web-1.adit", Some(80)).unwrap();
        assert_eq!(other.host.unwrap().as_str(), "adit");
        for bad in [".", "adit", ".Adit", "..", ".a.", ".a b", "", ".-a"] {
            assert!(bad.parse::<Suffix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_has_every_case_and_a_port_one_spelling() {
        let port = |target| match target {
            Target::Service(service) => service.tcp_port(),
            Target::VsockPort(_) => None,
        };
        let tcp = |s: &str, d| parse(s, d).map(|d| (d.vm.to_string(), port(d.target)));
        assert_eq!(tcp("web-1:80", None), Ok(("web-1".into(), Some(80))));
        assert_eq!(tcp("web-1.adit", Some(80)), Ok(("web-1".into(), Some(80))));
        for name in ["WEB-1", "Web-1.Adit", "web-1.", "web-1.adit."] {
            assert_eq!(
                tcp(name, Some(80)),
                Ok(("web-1".into(), Some(80))),
                "{name}"
            );
            assert_eq!(
                tcp(&format!("{name}:22"), None),
                Ok(("web-1".into(), Some(22)))
            );
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
    fn r62_an_address_names_nothing_and_its_colons_are_no_ports() {
        for (address, named) in [
            ("[::1]", "[::1]"),
            ("[::1]:80", "[::1]"),
            ("[fe80::1]:22", "[fe80::1]"),
            ("127.0.0.1:80", "127.0.0.1"),
        ] {
            match parse(address, Some(80)) {
                Err(e @ DestinationError::BadName { .. }) => {
                    assert!(e.to_string().contains(&format!("`{named}`")), "{e}");
                }
                other => panic!("{address}: {other:?}"),
            }
        }
        assert!(matches!(
            parse("[::1]:x", None),
            Err(DestinationError::BadPort(_))
        ));
    }

    #[test]
    fn r64_every_other_port_is_refused() {
        for port in [
            "0", "65536", "+443", " 443", "443 ", "", "080", "-1", "0x50", "8０",
        ] {
            let e = parse(&format!("web-1:{port}"), Some(80));
            assert!(
                matches!(e, Err(DestinationError::BadPort(_))),
                "{port}: {e:?}"
            );
        }
        assert!(matches!(
            parse("web-1", None),
            Err(DestinationError::NoPort(_))
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
            "web-1.alpha.beta",
            "web-1..adit",
            "web-1.adit.adit",
            "web-1.adit.adit.adit",
            // Without the suffix it would be `web-1`, of whichever host, to whoever reads it next.
            "vsock-5000.web-1.adit.adit",
            "vsock-5.a.b.c",
            "a.b.c.d.svc",
            "a_b.web-1.svc",
            ".web-1.svc",
            "%77eb-1",
            &long,
        ] {
            let e = parse(&format!("{name}:80"), None);
            assert!(
                matches!(e, Err(DestinationError::BadName { .. })),
                "{name:.20}: {e:?}"
            );
        }
        assert_eq!(parse("root@web-1:80", None), Err(DestinationError::User));
    }
}
