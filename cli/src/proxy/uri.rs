//! `adit://HOST/VM/SERVICE`: what of which VM on which host, in one text.
//!
//! | part | is |
//! |---|---|
//! | `HOST` | the host that has the VM; empty: whichever has it |
//! | `VM` | its name |
//! | `SERVICE` | a TCP port, `80` or `tcp:80`; `vsock:5000`; or what the guest has a name for, `docker` |
//!
//! It has one spelling, and is turned into the host name that means the same: `docker.web-1.alpha.svc`. Pure.

use adit_names::{ServiceName, VmId};

const SCHEME: &str = "adit://";

/// The host name that a URI means, and the port, where that is no part of the name. None: the text is no such URI.
///
/// # Errors
/// It begins as one, and is none.
pub fn name(text: &str) -> Result<Option<(String, Option<u16>)>, String> {
    let Some(rest) = text.strip_prefix(SCHEME) else {
        return Ok(None);
    };
    let mut parts = rest.split('/');
    let (Some(host), Some(vm), Some(service), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("it has three parts, of which only HOST may be empty".into());
    };
    let label = |what: &str, text: &str| {
        let parsed = text.parse::<VmId>();
        parsed.map_err(|e| format!("`{text}` is no name of a {what}: {e}"))
    };
    let vm = label("VM", vm)?.to_string();
    let vm = match host {
        "" => vm,
        host => format!("{vm}.{}", label("host", host)?),
    };
    if service.is_empty() {
        return Err(
            "it ends without a service: write a port, vsock:PORT, or what the guest has a name for"
                .into(),
        );
    }
    let digits = service.strip_prefix("tcp:").unwrap_or(service);
    if digits.bytes().all(|b| b.is_ascii_digit()) {
        let port = super::port(digits)?;
        return Ok(Some((vm, Some(port))));
    }
    if let Some(number) = service.strip_prefix("vsock:") {
        return Ok(Some((format!("vsock-{number}.{vm}"), None)));
    }
    match ServiceName::named(service) {
        Some(_) => Ok(Some((format!("{service}.{vm}.svc"), None))),
        None => Err(format!(
            "`{service}` is no service: write a port, vsock:PORT, or a name of a-z, 0-9 and inner `-`"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_means_what_a_host_name_means() {
        for (text, means, port) in [
            ("adit://alpha/web-1/80", "web-1.alpha", Some(80)),
            ("adit://alpha/web-1/tcp:80", "web-1.alpha", Some(80)),
            ("adit:///web-1/80", "web-1", Some(80)),
            (
                "adit://alpha/web-1/vsock:5000",
                "vsock-5000.web-1.alpha",
                None,
            ),
            ("adit://alpha/web-1/docker", "docker.web-1.alpha.svc", None),
            ("adit:///web-1/docker", "docker.web-1.svc", None),
        ] {
            assert_eq!(name(text), Ok(Some((means.to_owned(), port))), "{text}");
        }
        assert_eq!(name("web-1"), Ok(None));
    }

    #[test]
    fn r62_a_uri_has_one_spelling() {
        for bad in [
            "adit://",
            "adit://web-1",
            "adit://alpha/web-1",
            "adit://alpha/web-1/",
            "adit://alpha/web-1/80/",
            "adit://alpha//80",
            "adit://Alpha/web-1/80",
            "adit://alpha/web-1.beta/80",
            "adit://alpha:1/web-1/80",
            "adit://u@alpha/web-1/80",
            "adit://alpha/web-1/080",
            "adit://alpha/web-1/0",
            "adit://alpha/web-1/65536",
            "adit://alpha/web-1/tcp:docker",
            "adit://alpha/web-1/a.b",
            "adit://alpha/web-1/80?x",
            "adit://alpha/web%2d1/80",
        ] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }
}
