//! Who gets in where, and what they may do there.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use adit_api::token;
use adit_host_proxy::access::tag::Tag;
use adit_host_proxy::access::{Caller, Verb};
use adit_port::control::{Target, Tunnels};
use adit_port::control_io::Message;
use serde_json::Value;

use crate::host::{Answer, Control, HANG, Host, NO_GRANTS, Port};

/// No user of the host has it.
pub const UID: u32 = 54_321;

/// A host with the VMs `a` and `b`, and these sections.
fn started(more: &str) -> (Host, Vec<Port>) {
    Host::serving(&[("a", 3), ("b", 4)], more)
}

pub fn grant(to: &str, vms: &str, may: &str) -> String {
    format!("[[grant]]\nto = [{to}]\nvms = [{vms}]\nmay = [{may}]\n")
}

/// Sections that have another listener in the run directory, or on loopback.
pub fn listen(address: &str, speak: &str, more: &str) -> String {
    format!("[[listen]]\naddress = \"{address}\"\nspeak = \"{speak}\"\n{more}\n")
}

/// Address of the other listener.
pub fn other(host: &Host) -> String {
    let addresses =
        fs::read_to_string(host.state_dir().with_file_name("run").join("listen.addr")).unwrap();
    addresses.trim().to_owned()
}

/// The guest of a VM: answers every request with `ok`.
pub fn serve(control: &Control) -> std::thread::JoinHandle<Vec<u8>> {
    let control = control.try_clone().unwrap();
    std::thread::spawn(move || {
        let (mut guest, mut said) = control.tunnel();
        while !said.windows(4).any(|end| end == b"\r\n\r\n") {
            let mut piece = [0; 4096];
            let n = guest.read(&mut piece).unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&said));
            said.extend_from_slice(&piece[..n]);
        }
        guest
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            .unwrap();
        // What a client ends, ends here.
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = guest.read_to_end(&mut Vec::new());
        said
    })
}

/// curl as this user. None: there is no curl.
pub fn curl(uid: u32, args: &[&str]) -> Option<(u16, String)> {
    let mut command = Command::new("curl");
    command
        .args([
            "-sS",
            "--max-time",
            "30",
            "-w",
            "\n%{http_code} %{http_connect}",
        ])
        .args(args);
    command
        .uid(uid)
        .stdin(Stdio::null())
        .env_clear()
        .env("PATH", "/usr/bin:/bin");
    match command.output() {
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let (body, codes) = text.rsplit_once('\n').unwrap();
            let codes: Vec<u16> = codes.split(' ').map(|code| code.parse().unwrap()).collect();
            let code = if codes[0] == 0 { codes[1] } else { codes[0] };
            let said = body.to_owned() + &String::from_utf8_lossy(&out.stderr);
            Some((code, said))
        }
        Err(e) => {
            eprintln!("skipped: no curl ({e})");
            None
        }
    }
}

fn proxy(host: &Host) -> String {
    host.proxy().peer_addr().unwrap().to_string()
}

/// The lines of the audit, once there are so many.
pub fn audit(host: &Host, lines: usize) -> Vec<Value> {
    let path = host.state_dir().join("aditd.audit");
    host.until("the audit is written", |_| {
        let text = fs::read_to_string(&path).unwrap_or_default();
        (text.lines().count() >= lines).then(|| {
            text.lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect()
        })
    })
}

/// Asks over the proxy's listener, and hears the whole answer.
pub fn asked(mut client: impl Read + Write, request: &str) -> Answer {
    client.write_all(request.as_bytes()).unwrap();
    let mut said = Vec::new();
    let read = client.read_to_end(&mut said);
    assert!(read.is_ok(), "{request:?}: {read:?}");
    Answer::parse(&said).unwrap()
}

#[test]
fn r125_without_a_grant_nobody_reaches_anything_and_the_owner_is_told_why() {
    let (host, ports) = started(NO_GRANTS);
    let _control = ports[0].connected();
    let forbidden = asked(host.proxy(), "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
    let unknown = asked(host.proxy(), "GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n");
    let without = |answer: &Answer, name: &str| {
        let head = answer
            .head
            .lines()
            .filter(|line| !line.starts_with("date: "));
        let head: String = head.map(|line| line.replace(name, "VM") + "\n").collect();
        (answer.status, head, answer.body.replace(name, "VM"))
    };
    assert_eq!(without(&forbidden, "`a`"), without(&unknown, "`x`"));
    assert_eq!(forbidden.status, 404);
    let lines = audit(&host, 2);
    assert_eq!(
        (lines[0]["reason"].as_str(), lines[1]["reason"].as_str()),
        (Some("not-granted"), Some("unknown-vm"))
    );
    assert_eq!(
        (lines[0]["vm"].as_str(), lines[0]["target"].as_str()),
        (Some("a"), Some("tcp:80"))
    );
    let check = host.get("/v1/access?as=user:root&verb=reach&vm=a&target=tcp:80");
    assert_eq!(
        (check["allowed"].as_bool(), check["hidden"].as_bool()),
        (Some(false), Some(true))
    );
    let owner = host.get("/v1/access?as=owner&verb=reach&vm=a&target=tcp:80");
    assert_eq!(owner["allowed"], true);
    assert_eq!(host.get("/v1/grants"), Value::Array(vec![]));
}

#[test]
fn a_check_reads_a_destination_and_a_user_as_the_proxy_does() {
    let grant = grant("\"user:root\"", "\"a\"", "\"reach:80,svc:docker\"");
    let (host, _ports) = Host::serving(&[("a", 3)], &grant);
    let check = |caller: &str, vm: &str| {
        let path = format!("/v1/access?as={caller}&verb=reach&vm={vm}");
        let answer = host.api("GET", &path, "");
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        (answer.status, body)
    };
    for vm in ["a:80", "A.adit:80", "a.ADIT.:80"] {
        for caller in ["user:root", "user:0", "owner"] {
            let (status, said) = check(caller, vm);
            assert_eq!(
                (status, said["allowed"].as_bool()),
                (200, Some(true)),
                "{said}"
            );
        }
    }
    // The VM's own lists count, and what cannot be is a mistake of whoever asks.
    for (vm, reason) in [
        ("vsock-5000.a", "not-granted"),
        ("b:80", "unknown-vm"),
        ("a.other:80", "unknown-vm"),
    ] {
        let (status, said) = check("user:root", vm);
        assert_eq!((status, said["reason"].as_str()), (200, Some(reason)));
    }
    for vm in ["a", "a:99999", "a:docker", "a.adit.adit:80", "x@a:80"] {
        assert_eq!(check("user:root", vm).0, 400, "{vm}");
    }
}

#[test]
fn r125_the_user_behind_a_loopback_connection_has_its_own_grants_and_no_other() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can be somebody else");
        return;
    }
    let more = grant(&format!("\"user:{UID}\""), "\"a\"", "\"reach:80\", \"see\"")
        + &grant("\"user:root\"", "\"b\"", "\"reach\"");
    let (host, ports) = started(&more);
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let proxy = proxy(&host);
    let as_user = |uid, url: &str| curl(uid, &["-x", &proxy, url]);
    let Some(_) = as_user(UID, "http://nobody/") else {
        return;
    };
    let served = serve(&a);
    assert_eq!(as_user(UID, "http://a/").unwrap(), (200, "ok".into()));
    served.join().unwrap();
    // It may see `a`, and so hears which list has not the port; `b` is not there for it.
    assert_eq!(as_user(UID, "http://a:81/").unwrap().0, 403);
    assert_eq!(as_user(UID, "http://b/").unwrap().0, 404);
    assert_eq!(as_user(0, "http://a/").unwrap().0, 404);
    assert_eq!(as_user(UID + 1, "http://a/").unwrap().0, 404);
    let served = serve(&b);
    assert_eq!(as_user(0, "http://b/").unwrap(), (200, "ok".into()));
    served.join().unwrap();
    let root = host.get("/v1/access?as=user:root&verb=reach&vm=b&target=tcp:80");
    assert_eq!(root["allowed"], true);
    assert!(
        root["caller"]
            .as_array()
            .unwrap()
            .contains(&"group:root".into()),
        "{root}"
    );
    let denied = audit(&host, 4);
    assert!(
        denied
            .iter()
            .any(|line| line["caller"] == format!("user:{}", UID + 1)),
        "{denied:?}"
    );
}

#[test]
fn a_grant_that_is_taken_away_or_given_counts_at_once_after_a_reload_and_a_broken_file_changes_nothing()
 {
    let to_all = grant("\"anyone\"", "\"a\"", "\"reach\", \"see\"");
    let (host, ports) = started(&to_all);
    let control = ports[0].connected();
    let served = serve(&control);
    let get = || {
        asked(
            host.proxy(),
            "GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        )
        .status
    };
    assert_eq!(get(), 200);
    served.join().unwrap();
    let broken = host.reload(|text| text.replace("\"reach\", \"see\"", "\"fly\""));
    assert!(
        broken["error"].as_str().unwrap().contains("`may`"),
        "{broken}"
    );
    let served = serve(&control);
    assert_eq!(get(), 200);
    served.join().unwrap();
    host.reload(|text| text.replace("\"fly\"", "\"see\""));
    assert_eq!(get(), 403);
    let until = host.reload(|text| {
        text.replace(
            "may = [\"see\"]",
            "may = [\"reach\"]\nuntil = \"2001-01-01T00:00:00Z\"",
        )
    });
    assert_eq!(until["error"], Value::Null);
    assert_eq!(get(), 404);
    assert_eq!(host.get("/v1/grants?vm=a")[0]["expired"], true);
    // A file of its own may give it again.
    let parts = host.config_file().with_file_name("conf.d");
    fs::create_dir(&parts).unwrap();
    fs::write(
        parts.join("ops.toml"),
        grant("\"anyone\"", "\"*\"", "\"reach\""),
    )
    .unwrap();
    host.reload(|text| text);
    let served = serve(&control);
    assert_eq!(get(), 200);
    served.join().unwrap();
    let place = host.get("/v1/access?as=anyone&verb=reach&vm=a&target=tcp:80")["by"].clone();
    assert!(
        place.as_str().unwrap().ends_with("conf.d/ops.toml:1"),
        "{place}"
    );
}

#[test]
fn r69_a_token_is_shown_as_clients_show_it_and_never_reaches_the_guest() {
    let ((secret, sha256), (other, _)) = (token::new().unwrap(), token::new().unwrap());
    let section = format!("[[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n");
    let more = section + &grant("\"token:ci\"", "\"a\"", "\"reach\"");
    let (host, ports) = started(&more);
    let control = ports[0].connected();
    let proxy = proxy(&host);
    for args in [
        &["--proxy-user", &format!("x:{secret}")][..],
        &[
            "--proxy-header",
            &format!("Proxy-Authorization: Bearer {secret}"),
        ],
    ] {
        for url in ["http://a/", "http://a:80/"] {
            let tunnel = if url.ends_with(":80/") { "-p" } else { "-s" };
            let args = [args, &["-x", &proxy, tunnel, url]].concat();
            let served = serve(&control);
            let Some(said) = curl(UID, &args) else { return };
            assert_eq!(said, (200, "ok".into()), "{args:?}");
            let heard = String::from_utf8(served.join().unwrap()).unwrap();
            assert!(
                !heard.to_lowercase().contains("authorization") && !heard.contains(&secret),
                "{heard}"
            );
        }
    }
    // Whoever shows none is asked for one; a wrong one is nobody's, also where anybody might.
    let (code, said) = curl(UID, &["-x", &proxy, "-v", "http://a/"]).unwrap();
    assert_eq!(code, 404, "a known user is not asked: {said}");
    let wrong = format!("x:{other}");
    let (code, said) = curl(
        UID,
        &["-x", &proxy, "-v", "--proxy-user", &wrong, "http://a/"],
    )
    .unwrap();
    assert_eq!(code, 407, "{said}");
    assert!(
        said.contains("Proxy-Authenticate: Basic realm=\"adit\""),
        "{said}"
    );
    assert_eq!(
        curl(
            UID,
            &["-x", &proxy, "-p", "--proxy-user", &wrong, "http://a/"]
        )
        .unwrap()
        .0,
        407
    );
    let field = |token: &str| format!("Proxy-Authorization: Bearer {token}\r\n");
    let two = format!(
        "GET http://a/ HTTP/1.1\r\nHost: a\r\n{}{}\r\n",
        field(&secret),
        field(&other)
    );
    assert_eq!(asked(host.proxy(), &two).status, 407, "which one is meant?");
    let lines = audit(&host, 3);
    assert!(
        lines.iter().any(|line| line["reason"] == "bad-token"),
        "{lines:?}"
    );
    // Revoked.
    host.reload(|text| text.replace("name = \"ci\"", "name = \"ci2\""));
    let mine = format!("x:{secret}");
    assert_eq!(
        curl(UID, &["-x", &proxy, "--proxy-user", &mine, "http://a/"])
            .unwrap()
            .0,
        404
    );
}

#[test]
fn a_unix_socket_is_a_proxy_for_whoever_the_kernel_says_is_there() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let path = dir.path().join("proxy.sock");
    let path = path.to_str().unwrap();
    let more = listen(&format!("unix:{path}"), "http", "")
        + &grant(
            &format!("\"user:{UID}\", \"user:root\""),
            "\"a\"",
            "\"reach\"",
        );
    let (host, ports) = started(&more);
    assert_eq!(other(&host), format!("unix:{path}"));
    let control = ports[0].connected();
    for url in ["http://a/", "http://A.adit./x"] {
        // The VM's name in Host: the socket is taken for the VM itself.
        let served = serve(&control);
        let Some(said) = curl(UID, &["--unix-socket", path, url]) else {
            return;
        };
        assert_eq!(said, (200, "ok".into()));
        let heard = String::from_utf8(served.join().unwrap()).unwrap();
        assert!(heard.to_lowercase().contains("\r\nhost: a"), "{heard}");
    }
    assert_eq!(
        curl(UID + 1, &["--unix-socket", path, "http://a/"])
            .unwrap()
            .0,
        404
    );
    // As a forward proxy, in both forms.
    let served = serve(&control);
    let mut client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    let answer = asked(
        &client,
        "GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    );
    assert_eq!((answer.status, &*answer.body), (200, "ok"));
    served.join().unwrap();
    client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\nahead")
        .unwrap();
    let (mut guest, prefix) = control.tunnel();
    assert_eq!(prefix, b"ahead");
    let mut head = [0; 17];
    client.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 200 OK\r\n");
    client.write_all(b"more").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    guest.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"more");
    guest.write_all(b"back").unwrap();
    guest.shutdown(std::net::Shutdown::Write).unwrap();
    drop(guest);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest.ends_with(b"\r\n\r\nback"), "{rest:?}");
}

#[test]
fn socks5_reaches_a_vm_by_its_name_and_says_why_not() {
    let (secret, sha256) = token::new().unwrap();
    let section = format!("[[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n");
    let more = listen("127.0.0.1:0", "socks5", "")
        + &section
        + &grant(&format!("\"user:{UID}\""), "\"a\"", "\"reach\", \"see\"")
        + &grant("\"token:ci\"", "\"b\"", "\"reach\"");
    let (host, ports) = started(&more);
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let socks = other(&host);
    let served = serve(&a);
    let Some(said) = curl(UID, &["--socks5-hostname", &socks, "http://a/"]) else {
        return;
    };
    assert_eq!(said, (200, "ok".into()));
    served.join().unwrap();
    let with_token = format!("x:{secret}@{socks}");
    let served = serve(&b);
    assert_eq!(
        curl(UID + 1, &["--socks5-hostname", &with_token, "http://b/"])
            .unwrap()
            .0,
        200
    );
    served.join().unwrap();
    for (proxy, url, says) in [
        (&*socks, "http://a:81/", "(2)"),
        (&socks, "http://b/", "(4)"),
        (&socks, "http://nobody/", "(4)"),
        (&format!("x:wrong@{socks}"), "http://a/", "rejected"),
    ] {
        let (_, said) = curl(UID, &["--socks5-hostname", proxy, url]).unwrap();
        assert!(said.contains(says), "{url}: {said}");
    }
    // Names only: an address could be anybody's.
    let (_, said) = curl(UID, &["--socks5", &socks, "http://127.0.0.1/"]).unwrap();
    assert!(said.contains("(8)"), "{said}");
}

#[test]
fn r69_wrong_tokens_over_socks5_make_their_client_wait_and_the_proxy_waits_with_it() {
    let (secret, sha256) = token::new().unwrap();
    let section = format!("[[token]]\nname = \"ci\"\nsha256 = \"{sha256}\"\n");
    let grant = grant("\"token:ci\"", "\"b\"", "\"reach\"");
    let (host, ports) = started(&(listen("127.0.0.1:0", "socks5", "") + &section + &grant));
    let b = ports[1].connected();
    // What a client with this token hears to its log-in.
    let log_in = |token: &str| {
        let mut client = TcpStream::connect(other(&host)).unwrap();
        client.set_read_timeout(Some(HANG)).unwrap();
        let len = u8::try_from(token.len()).unwrap();
        let said = [b"\x05\x01\x02\x01\x01x", &[len][..], token.as_bytes()].concat();
        client.write_all(&said).unwrap();
        let mut heard = [0; 4];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(heard[..3], [5, 2, 1]);
        (heard[3] == 0, client)
    };
    assert!(log_in(&secret).0);
    for _ in 0..8 {
        assert!(!log_in("wrong").0);
    }
    // Not the right one either, and not by another way in. The first wait is a second, which may be over by now; the next is
    // longer.
    let shown = format!("Proxy-Authorization: Bearer {secret}\r\n");
    let request = format!("GET http://x/ HTTP/1.1\r\nHost: x\r\n{shown}Connection: close\r\n\r\n");
    host.until("nothing is looked at", |host| {
        assert!(!log_in("wrong").0);
        let is_one = log_in(&secret).0;
        let answer = (!is_one).then(|| asked(host.proxy(), &request))?;
        let waits = answer.status == 429 && answer.head.contains("retry-after: ");
        waits.then_some(())
    });
    let lines = audit(&host, 10);
    let of = |reason: &str| lines.iter().filter(|line| line["reason"] == reason).count();
    assert!(
        of("bad-token") >= 9 && of("too-many-tokens") >= 1,
        "{lines:?}"
    );
    // It is over after a while.
    let mut client = host.until("its time is over", |_| {
        let (is_one, client) = log_in(&secret);
        is_one.then_some(client)
    });
    client.write_all(b"\x05\x01\x00\x03\x01b\x00\x50").unwrap();
    let _tunnel = b.tunnel();
    let mut heard = [0; 10];
    client.read_exact(&mut heard).unwrap();
    assert_eq!(heard[1], 0);
}

#[test]
fn a_listener_for_one_place_and_one_for_tls_pass_every_byte_on() {
    let more = listen("127.0.0.1:0", "any", "to = \"a:80\"")
        + &grant("\"anyone\"", "\"a\"", "\"forward\"");
    let (host, ports) = started(&more);
    let control = ports[0].connected();
    // Who is granted no more than that chooses no place.
    let mut proxied = host.proxy();
    proxied
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
        .unwrap();
    let mut said = [0; 12];
    proxied.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"HTTP/1.1 404");
    let mut client = TcpStream::connect(other(&host)).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    let (mut guest, prefix) = control.tunnel();
    assert!(prefix.is_empty());
    guest.write_all(b"SSH-2.0-x\r\n").unwrap();
    let mut hello = [0; 11];
    client.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"SSH-2.0-x\r\n");
    client.write_all(b"SSH-2.0-y\r\n").unwrap();
    guest.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"SSH-2.0-y\r\n");
}

#[test]
fn tls_goes_to_the_vm_of_its_server_name_as_it_is() {
    let more =
        listen("127.0.0.1:0", "tls", "port = 80") + &grant("\"anyone\"", "\"a\"", "\"reach\"");
    let (host, ports) = started(&more);
    let control = ports[0].connected();
    let at = other(&host);
    let at = format!("a:{}:{at}", 443);
    // curl speaks to the guest, which is no TLS server: what it hears is what curl said.
    let curl = Command::new("curl")
        .args(["-sS", "--max-time", "30", "--connect-to", &at, "https://a/"])
        .stderr(Stdio::piped())
        .spawn();
    let Ok(curl) = curl else {
        eprintln!("skipped: no curl");
        return;
    };
    let (guest, prefix) = control.tunnel();
    assert_eq!((prefix[0], prefix[5]), (22, 1), "a ClientHello");
    drop(guest);
    curl.wait_with_output().unwrap();
    for name in ["b", "nobody"] {
        let to = at.replacen('a', name, 1);
        let out = Command::new("curl")
            .args([
                "-sS",
                "--max-time",
                "30",
                "--connect-to",
                &to,
                &format!("https://{name}/"),
            ])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains("unrecognized name"), "{said}");
    }
}

#[test]
fn r65_a_request_for_a_path_goes_to_the_vm_of_its_one_host() {
    let (host, ports) = started("");
    let control = ports[0].connected();
    let served = serve(&control);
    let answer = asked(
        host.proxy(),
        "GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    );
    assert_eq!(answer.status, 200);
    let heard = String::from_utf8(served.join().unwrap()).unwrap();
    assert!(heard.starts_with("GET /x HTTP/1.1\r\n"), "{heard}");
    for (head, status) in [
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: \r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1:7080\r\n\r\n", 404),
        ("GET / HTTP/1.1\r\nHost: x@a\r\n\r\n", 400),
        ("GET /http://b/ HTTP/1.1\r\nHost: nobody\r\n\r\n", 404),
    ] {
        assert_eq!(asked(host.proxy(), head).status, status, "{head}");
    }
}

#[test]
fn a_reload_over_the_api_is_done_when_it_is_answered_and_says_what_became_of_it() {
    let (host, _ports) = started("");
    let path = host.config_file();
    let text = fs::read_to_string(&path).unwrap();
    let reload = |text: &str| {
        fs::write(&path, text).unwrap();
        let answer = host.api("POST", "/v1/reload", "null");
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_str::<Value>(&answer.body).unwrap()
    };
    let more = text.clone() + "[[vm]]\nname = \"c\"\ncid = 9\n";
    assert_eq!(reload(&more)["error"], Value::Null);
    assert_eq!(host.get("/v1/vms/c")["cid"], 9);
    let refused = reload(&(text.clone() + "alow = 1\n"));
    assert!(
        refused["error"].as_str().unwrap().contains("alow"),
        "{refused}"
    );
    assert_eq!(reload(&text)["error"], Value::Null);
    assert_eq!(host.api("GET", "/v1/vms/c", "").status, 404);
}

/// The next frame, which asks for tunnels.
fn asked_for_tunnels(control: &Control) -> u64 {
    match control.hear().unwrap().0 {
        Message::ListTunnels(ask) => ask.after,
        other => panic!("{other:?}"),
    }
}

#[test]
fn r125_tunnels_are_judged_again_after_a_change_that_comes_while_they_are_judged() {
    let (host, ports) = started(NO_GRANTS);
    let control = ports[0].connected_and_lists();
    let tunnels = |after, tunnels, last| {
        let page = Tunnels {
            after,
            tunnels,
            last,
        };
        control.say(&Message::Tunnels(page), None);
    };
    // When it was found: grants may have changed while there was no aditd.
    assert_eq!(asked_for_tunnels(&control), 0);
    // Two changes before it answers are judged once, after that.
    for _ in 0..2 {
        assert_eq!(host.api("POST", "/v1/reload", "null").status, 200);
    }
    tunnels(0, vec![], true);
    assert_eq!(asked_for_tunnels(&control), 0);
    let caller = Caller::anonymous("x").with_token("gone");
    let target = Target::Service(adit_names::ServiceName::tcp(80));
    let tag = Tag::of(&caller, Verb::Reach(&target)).unwrap();
    tunnels(0, vec![(3, tag.clone()), (5, vec![0])], false);
    let ended = |numbers: &[u64]| match control.hear().unwrap().0 {
        Message::EndTunnels(end) => assert_eq!(end.numbers, numbers),
        other => panic!("{other:?}"),
    };
    ended(&[3]);
    // Page by page, from the last number on.
    assert_eq!(asked_for_tunnels(&control), 5);
    tunnels(5, vec![(9, tag)], true);
    ended(&[9]);
}
