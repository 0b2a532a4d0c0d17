//! What a client names is a VM, and never an address or a host of the network that aditd is in (R63): nothing is looked up and
//! nothing is dialled but VMs. And of a name nothing but a name reaches any handler (R73).

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::access::{asked, listen};
use crate::host::{Answer, Control, HANG, Host};
use crate::proxy::head;

/// Everything by which somebody has reached what is behind a proxy, as a client of HTTP writes it.
const HOSTS: &[&str] = &[
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "0.0.0.0",
    "00",
    "0177.0.0.1",
    "017700000001",
    "0x7f.0.0.1",
    "0x7f000001",
    "127.0.0.1.nip.io",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[fe80::1%25lo]",
    "[fd00:ec2::254]",
    "169.254.169.254",
    "metadata.google.internal",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "ip6-localhost",
    "rebind.example",
    "a.rebind.example",
    "rebind.adit",
    "a@127.0.0.1",
    "127.0.0.1@a",
    "127.0.0.1%00.a",
    "127.0.0.1%2f.a",
    "127.0.0.1#a",
    "a.127.0.0.1",
    "\u{ff11}27.0.0.1",
    "127\u{3002}0.0.1",
];

/// Whoever is behind an address: notes each that comes.
fn canary(at: &str) -> Option<TcpListener> {
    let listener = TcpListener::bind(at).ok()?;
    listener.set_nonblocking(true).unwrap();
    Some(listener)
}

/// A guest that answers, and is the first that its port process hears of.
fn served(control: &Control, host: &Host) {
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    let _guest = control.tunnel();
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
}

#[test]
fn r63_nothing_but_a_vm_is_dialled_or_looked_up_whatever_a_client_names() {
    let sections = listen("127.0.0.1:0", "socks5", "");
    // Names of VMs that other programs take for addresses.
    let vms = [("a", 3), ("2130706433", 4), ("0", 5), ("127-0-0-1", 6)];
    let (mut host, ports) = Host::new(&vms, &sections);
    let resolv = host.state_dir().with_file_name("resolv.conf");
    fs::write(&resolv, "nameserver 127.77.0.53\n").unwrap();
    let resolver = UdpSocket::bind("127.77.0.53:53").ok();
    let prepare = format!("mount --bind {} /etc/resolv.conf", resolv.display());
    let may_mount = Command::new("unshare")
        .args(["--mount", "sh", "-c", &prepare])
        .stderr(Stdio::null())
        .status();
    match &resolver {
        Some(resolver) if may_mount.is_ok_and(|status| status.success()) => {
            resolver.set_nonblocking(true).unwrap();
            host.start_within(&["unshare", "--mount", "sh", "-c"], &prepare);
        }
        _ => {
            println!(
                "that no name is looked up is not seen: a resolver of the test's own needs root"
            );
            host.start();
        }
    }
    let controls: Vec<_> = ports.iter().map(|port| port.connected()).collect();
    let four = canary("127.0.0.1:0").unwrap();
    let port = four.local_addr().unwrap().port();
    let canaries: Vec<_> = [Some(four), canary(&format!("[::1]:{port}"))]
        .into_iter()
        .flatten()
        .collect();
    let refused = |answer: &Answer, what: &str| {
        assert!(
            matches!(answer.status, 400 | 403 | 404),
            "{what}: {} {}",
            answer.status,
            answer.body
        );
        answer.assert_cause_and_remedy();
    };
    for name in HOSTS {
        for port in [port, 80] {
            for request in [
                format!("CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\n\r\n"),
                format!("CONNECT {name}:{port} HTTP/1.1\r\nHost: a\r\n\r\n"),
                format!(
                    "GET http://{name}:{port}/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                ),
                format!("GET / HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"),
            ] {
                refused(&asked(host.proxy(), &request), &request);
            }
        }
        let path: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let resolved = host.api("GET", &format!("/v1/resolve/{path}"), "");
        assert_eq!(resolved.status, 404, "{name}: {}", resolved.body);
    }
    // SOCKS5 has addresses of its own kinds.
    let socks = |destination: &[u8]| {
        let at = crate::access::other(&host);
        let mut client = TcpStream::connect(at).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        client.write_all(&[5, 1, 0]).unwrap();
        client
            .write_all(&[&[5, 1, 0], destination, &port.to_be_bytes()].concat())
            .unwrap();
        let mut said = Vec::new();
        let _ = client.read_to_end(&mut said);
        assert!(said.len() >= 4 && said[3] != 0, "{destination:?}: {said:?}");
    };
    for four in [[127, 0, 0, 1], [0, 0, 0, 0], [169, 254, 169, 254]] {
        socks(&[&[1][..], &four].concat());
    }
    for six in ["::1", "::", "::ffff:127.0.0.1", "fd00:ec2::254"] {
        let six: std::net::Ipv6Addr = six.parse().unwrap();
        socks(&[&[4][..], &six.octets()].concat());
    }
    for name in HOSTS {
        socks(&[&[3, name.len() as u8], name.as_bytes()].concat());
    }
    // A VM may be called what others take for an address: it is that VM, and no address.
    for (nth, (name, _)) in vms.iter().enumerate() {
        let mut client = host.proxy();
        let request = format!("CONNECT {name}:80 HTTP/1.1\r\nHost: {name}\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        let _guest = controls[nth].tunnel();
        assert!(head(&mut client).starts_with("HTTP/1.1 200 "), "{name}");
    }
    // Nobody was there, and nobody was asked where that is.
    for canary in &canaries {
        let came = canary.accept().map(|(_, from)| from);
        assert!(came.is_err(), "{came:?} came to {canary:?}");
    }
    if let Some(resolver) = resolver {
        let mut question = [0; 512];
        let asked = resolver.recv_from(&mut question);
        assert!(asked.is_err(), "{:?}", String::from_utf8_lossy(&question));
    }
    served(&controls[0], &host);
}

/// What a shell, `printf`, a path or a command line would act on.
const EXPANDED: &[&str] = &[
    "$(touch canary)",
    "`touch canary`",
    "a;touch canary",
    "a&touch canary",
    "a|touch canary",
    "a\ntouch canary",
    "${IFS}",
    "$HOME",
    "%n",
    "%s%s",
    "a%0atouch",
    "../a",
    "a/../b",
    "..",
    ".",
    "-a",
    "--help",
    "a-",
    "~root",
    "*",
    "a?",
    "[a]",
    "{a,b}",
    "a>canary",
    "a<b",
    "a b",
    "a\tb",
    "'a'",
    "\"a\"",
    "a\\b",
    "a!b",
    "a#b",
    "a=b",
    "A_",
    "\u{e4}",
    "a\0b",
    "",
];

#[test]
fn r73_of_a_name_only_what_a_name_may_have_reaches_a_handler() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    // Whatever is started as a VM's port process notes how.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (program, started) = (dir.path().join("port"), dir.path().join("started"));
    fs::write(&started, "").unwrap();
    fs::set_permissions(&started, fs::Permissions::from_mode(0o666)).unwrap();
    let script = format!("#!/bin/sh\necho \"$@\" >>{}\n", started.display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    host.port_bin = program;
    host.start();
    let control = ports[0].connected();
    let vms = host.state_dir().with_file_name("run").join("vm");
    let there = || {
        let names = fs::read_dir(&vms).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = there();
    for name in EXPANDED {
        let added = host.api(
            "POST",
            "/v1/vms",
            &json!({"name": name, "cid": 9}).to_string(),
        );
        assert_eq!(added.status, 422, "{name:?}: {}", added.body);
        // In a path, as a client must write it.
        let path: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let of = |method: &str, end: &str, body: &str| {
            let path = format!("/v1/vms/{path}{end}");
            let answer = host.api(method, &path, body);
            assert!(
                matches!(answer.status, 400 | 404 | 405 | 422),
                "{method} {path}: {} {}",
                answer.status,
                answer.body
            );
        };
        if !name.is_empty() {
            of("GET", "", "");
            of("PATCH", "", "{\"allow\": [22]}");
            of("DELETE", "", "");
            of("POST", "/reload", "");
            of("POST", "/lock", "{}");
            of("POST", "/freeze", "{\"lease_ms\": 1000}");
            of("DELETE", "/freeze", "");
            of(
                "POST",
                "/agent",
                &json!({"sha256": "0".repeat(64)}).to_string(),
            );
        }
        // As part of an authority: of a VM, of a host, of a service, of a user.
        for authority in [
            format!("{name}:80"),
            format!("{name}.adit:80"),
            format!("a.{name}:80"),
            format!("{name}.a.svc:80"),
            format!("{name}@a:80"),
        ] {
            let request = format!("CONNECT {authority} HTTP/1.1\r\nHost: a\r\n\r\n");
            // Without a name it is the VM that is meant, by its absolute name.
            if authority == "a.:80" {
                continue;
            }
            let answer = asked(host.proxy(), &request);
            let is = matches!(answer.status, 400 | 403 | 404);
            assert!(is, "{authority:?}: {} {}", answer.status, answer.body);
        }
    }
    assert_eq!(there(), before);
    assert_eq!(fs::read_to_string(&started).unwrap(), "");
    for place in [dir.path(), &vms, "/".as_ref(), ".".as_ref()] {
        assert!(!place.join("canary").exists(), "{place:?}");
    }
    // The port process has heard of none of them.
    served(&control, &host);
    // And a name that is one is passed on as it is, in an argument of its own.
    let added = host.api("POST", "/v1/vms", "{\"name\": \"web-1\", \"cid\": 9}");
    assert!(matches!(added.status, 200 | 500..=599), "{}", added.body);
    host.until("its port process is started", |_| {
        let text = fs::read_to_string(&started).unwrap();
        text.lines()
            .any(|line| line.starts_with("web-1 ") || line.contains(" web-1 "))
            .then_some(())
    });
}
