//! A service that the guest has a name for, as its owner's `adit-guest.toml` maps it to a Unix socket: by every client that knows no
//! more than the name.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use adit_tests::agent;
use adit_tests::host::Host;
use adit_tests::process::{Reaped, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{LIMIT, bins, shown};

/// A name that the host allows and the guest has none for, and one behind which nobody listens.
const ALLOWED: &str = r#"["docker", "gone", "unnamed"]"#;

/// What a Docker daemon does for its clients: pages over HTTP, and streams of which it gives the connection away (`docker exec`).
fn daemon(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || serve(client));
        }
    });
}

/// One client, until it is gone.
fn serve(client: UnixStream) -> std::io::Result<()> {
    let (mut reader, mut writer) = (BufReader::new(client.try_clone()?), &client);
    loop {
        let (mut head, mut line) = (String::new(), String::new());
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            head += &line;
        }
        let len = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; len.map_or(0, |len| len.parse().unwrap())];
        reader.read_exact(&mut body)?;
        let path = head.split(' ').nth(1).unwrap_or_default();
        if path == "/attach" {
            writer.write_all(
                b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\noutput ",
            )?;
            writer.write_all(&body)?;
            std::io::copy(&mut reader, &mut writer)?;
            return client.shutdown(Shutdown::Write);
        }
        let text = format!("the daemon's {path}\n");
        let len = text.len();
        write!(
            writer,
            "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n{text}"
        )?;
    }
}

/// What a client of the daemon asks for: with a body, as `docker exec` has one.
const BODY: &str = "{\"Tty\":false}";

/// Has the connection given away, types something, ends its half, and reads what comes back until the end. `docker exec` without `-i`
/// types nothing, and ends its half at once.
fn attached(mut client: impl Read + Write, url: &str, typed: &str, end: impl FnOnce()) -> String {
    let len = BODY.len();
    let head = format!(
        "POST {url} HTTP/1.1\r\nHost: docker\r\nContent-Length: {len}\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n{BODY}"
    );
    client.write_all(head.as_bytes()).unwrap();
    let mut end = Some(end);
    if typed.is_empty() {
        end.take().unwrap()();
    }
    let mut said = Vec::new();
    while !said.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    assert!(
        said.starts_with(b"HTTP/1.1 101 "),
        "{:?}",
        String::from_utf8_lossy(&said)
    );
    if let Some(end) = end {
        client.write_all(typed.as_bytes()).unwrap();
        end();
    }
    let mut back = String::new();
    client.read_to_string(&mut back).unwrap();
    back
}

/// smolvm#238's kind: whoever has started a VM wants to know when what is in it listens, without asking again and again.
#[test]
fn a_port_and_a_service_are_waited_for_until_somebody_listens() {
    let Some(bins) = bins() else { return };
    // One that is free now.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let config = format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\n\
         [[vm]]\nname = \"web-1\"\ncid = 3\nallow = [{port}, 9]\nallow_services = [\"docker\"]\n"
    );
    let host = Host::start_configured(&bins, &config).unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let docker = sockets.path().join("docker.sock");
    let services = format!(
        "[[service]]\nname = \"docker\"\nto = \"unix:{}\"\n",
        docker.display()
    );
    agent::start_with(&host.vm_dir("web-1"), &[port], &services).unwrap();
    let wait = |what: &str, timeout: &str| {
        host.adit(&["wait", "web-1", "--for", what, "--timeout", timeout])
            .unwrap()
    };
    let to_port = format!("port:{port}");
    for what in [to_port.as_str(), "service:docker"] {
        let out = wait(what, "700ms");
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(124), "{what}: {said}");
        assert!(said.contains(what), "{said}");
    }
    std::thread::scope(|scope| {
        let waits = [to_port.as_str(), "service:docker"].map(|what| {
            let wait = &wait;
            scope.spawn(move || wait(what, "60s"))
        });
        std::thread::sleep(Duration::from_millis(300));
        let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        daemon(&docker);
        for wait in waits {
            let out = wait.join().unwrap();
            assert!(out.status.success(), "{out:?}");
        }
        // Somebody was there, said nothing, and has gone.
        let (mut client, _) = listener.accept().unwrap();
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
    });
    // Waiting changes nothing where the host or the guest forbids it.
    for (what, says) in [("port:10", "`allow`"), ("port:9", "allow_ports")] {
        let out = wait(what, "60s");
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains(says), "{said}");
    }
    assert_eq!(wait("port:http", "1s").status.code(), Some(2));
}

#[test]
fn every_client_reaches_what_the_guest_has_a_name_for_and_hears_what_is_missing() {
    let Some(bins) = bins() else { return };
    let config = format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\n[names]\nhost = \"alpha\"\n\
         [[grant]]\nto = [\"user:root\"]\nvms = [\"web-1\"]\nmay = [\"reach\", \"see\"]\n\
         [[vm]]\nname = \"web-1\"\ncid = 3\nallow_services = {ALLOWED}\n"
    );
    let host = Host::start_configured(&bins, &config).unwrap();
    let sockets = tempfile::tempdir().unwrap();
    let docker = sockets.path().join("docker.sock");
    daemon(&docker);
    let services = format!(
        "[[service]]\nname = \"docker\"\nto = \"unix:{}\"\n[[service]]\nname = \"gone\"\nto = \"unix:/nowhere/gone.sock\"\n",
        docker.display()
    );
    agent::start_with(&host.vm_dir("web-1"), &[], &services).unwrap();
    let page = "the daemon's /version\n";
    wait_for("the VM", LIMIT, || {
        let out = host.curl(&["-f", "http://docker.web-1.svc/version"])?;
        Ok(out.status.success().then_some(()))
    })
    .unwrap();
    // curl, in absolute form and by CONNECT, several requests on a connection.
    for name in [
        "docker.web-1.svc",
        "Docker.WEB-1.svc.adit",
        "docker.web-1.alpha.svc",
        "docker.web-1.svc:2375",
    ] {
        let url = format!("http://{name}/version");
        for args in [vec![&*url], vec![&*url, &*url], vec!["-p", &*url, &*url]] {
            let times = args.iter().filter(|arg| **arg == url).count();
            let said = shown(&host.curl(&args).unwrap());
            assert_eq!(said.matches(page).count(), times, "{args:?}: {said}");
        }
    }
    // The connection is given away: through the proxy, and through a socket like the daemon's own.
    for typed in ["typed", ""] {
        let client = std::net::TcpStream::connect(host.proxy()).unwrap();
        let other = client.try_clone().unwrap();
        let end = || other.shutdown(Shutdown::Write).unwrap();
        let url = "http://docker.web-1.svc/attach";
        let back = attached(client, url, typed, end);
        assert_eq!(back, format!("output {BODY}{typed}"));
    }
    let proxy = format!("http://{}", host.proxy());
    let adit = |args: &[&str]| {
        let mut adit = Command::new(bins.join("adit"));
        adit.args(args)
            .env("ADIT_PROXY", &proxy)
            .current_dir(host.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        adit
    };
    let way = "unix:docker.sock";
    let forward = adit(&["forward", "docker.web-1.svc", way]).spawn().unwrap();
    let mut forward = Reaped(forward);
    let mut line = String::new();
    BufReader::new(forward.0.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.starts_with("listening on "), "{line}");
    let near = host.dir().join("docker.sock");
    for typed in ["typed", ""] {
        let client = UnixStream::connect(&near).unwrap();
        let other = client.try_clone().unwrap();
        let end = || other.shutdown(Shutdown::Write).unwrap();
        let back = attached(client, "/attach", typed, end);
        assert_eq!(back, format!("output {BODY}{typed}"));
    }
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--max-time", "60", "--unix-socket"])
        .arg(&near)
        .args(["http://docker/version", "http://docker/version"]);
    assert_eq!(shown(&curl.output().unwrap()).matches(page).count(), 2);
    let pid = Pid::from_raw(forward.pid().cast_signed());
    kill(pid, Signal::SIGTERM).unwrap();
    assert!(forward.0.wait().unwrap().success());
    assert!(!near.exists());
    // Typed at.
    let typed = |args: &[&str]| {
        let mut child = adit(args).spawn().unwrap();
        // One that is refused reads nothing.
        let _ = child
            .stdin
            .take()
            .unwrap()
            .write_all(b"GET /version HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n");
        let out = child.wait_with_output().unwrap();
        (out.status.code().unwrap(), shown(&out))
    };
    for name in [
        "docker.web-1.svc",
        "adit:///web-1/docker",
        "adit://alpha/web-1/docker",
    ] {
        let (code, said) = typed(&["connect", name]);
        assert!(code == 0 && said.contains(page), "{name}: {said}");
    }
    // What is missing is said, and by whom.
    for (service, status, why) in [
        (
            "unnamed",
            403,
            "no [[service]] of the guest is named `unnamed`",
        ),
        ("gone", 502, "/nowhere/gone.sock"),
        ("other", 403, "`allow_services`"),
    ] {
        let name = format!("{service}.web-1.svc");
        let url = format!("http://{name}/");
        for args in [&[&*url][..], &["-p", &*url]] {
            let said = shown(&host.curl(args).unwrap());
            assert!(said.contains(&format!("HTTP/1.1 {status} ")), "{said}");
        }
        let (code, said) = typed(&["connect", &name]);
        assert!(code == 1 && said.contains(why), "{name}: {said}");
    }
    let (code, said) = typed(&["connect", "docker.nobody.svc"]);
    assert_eq!(code, 4, "{said}");
    // The guest's server goes away and comes back under its name. In absolute form aditd may have a connection to it still.
    std::fs::remove_file(&docker).unwrap();
    let url = "http://docker.web-1.svc/version";
    let said = shown(&host.curl(&["-p", url]).unwrap());
    assert!(said.contains("HTTP/1.1 502 "), "{said}");
    daemon(&docker);
    for args in [&[url][..], &["-p", url]] {
        let said = shown(&host.curl(args).unwrap());
        assert!(said.contains(page), "{said}");
    }
}
