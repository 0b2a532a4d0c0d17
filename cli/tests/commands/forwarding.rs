//! `adit forward`: what it listens on, what goes through, and how it ends.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::channel;

use rustix::process::{Pid, Signal, kill_process};

use crate::proxy::{HANG, OK, Proxy, end, reset};
use crate::text;

/// A command that runs in the foreground.
struct Forward {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: BufReader<ChildStderr>,
}

impl Forward {
    fn start(dir: &Path, proxy: &str, args: &[&str]) -> Self {
        let child = command(dir, proxy, args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self::of(child)
    }

    fn of(mut child: Child) -> Self {
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self {
            child,
            stdout,
            stderr,
        }
    }

    /// Where the next forward listens.
    fn listens(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        let at = line
            .strip_prefix("listening on ")
            .and_then(|l| l.split_once(" for "));
        at.unwrap_or_else(|| panic!("{line}")).0.to_owned()
    }

    fn says(&mut self) -> String {
        let mut line = String::new();
        self.stderr.read_line(&mut line).unwrap();
        line
    }

    fn end(mut self, signal: Signal) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(dir: &Path, proxy: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
    command
        .args(["forward", "web-1"])
        .args(args)
        .args(["--proxy", proxy])
        .current_dir(dir);
    command
}

fn client(at: &str) -> TcpStream {
    let client = TcpStream::connect(at).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    client
}

#[test]
fn connections_to_each_forward_reach_its_port_and_both_signals_end_it() {
    for signal in [Signal::INT, Signal::TERM] {
        let proxy = Proxy::echoing();
        let dir = tempfile::tempdir().unwrap();
        let mut forward = Forward::start(dir.path(), &proxy.url, &["0:80", "unix:web.sock:81"]);
        let tcp = forward.listens();
        assert!(tcp.starts_with("127.0.0.1:"), "{tcp}");
        assert_eq!(forward.listens(), "unix:web.sock");
        let path = dir.path().join("web.sock");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let big = vec![b'x'; 1 << 20];
        let mut client = client(&tcp);
        client.write_all(&big).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(end(&mut client), (big.clone(), None));
        assert!(proxy.asked().starts_with("CONNECT web-1:80 "));

        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(&big).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(end(&mut client), (big, None));
        assert!(proxy.asked().starts_with("CONNECT web-1:81 "));

        // A connection that is open then is broken off, and the file goes.
        let mut client = TcpStream::connect(&tcp).unwrap();
        proxy.asked();
        assert_eq!(forward.end(signal), Some(0));
        assert_eq!(end(&mut client).1, Some(ErrorKind::ConnectionReset));
        assert!(!path.exists());
    }
}

#[test]
fn a_service_is_forwarded_by_its_name_without_a_port() {
    let proxy = Proxy::echoing();
    let dir = tempfile::tempdir().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_adit"))
        .args([
            "forward",
            "adit://alpha/web-1/docker",
            "unix:d.sock",
            "--proxy",
            &proxy.url,
        ])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut forward = Forward::of(child);
    assert_eq!(forward.listens(), "unix:d.sock");
    let mut client = UnixStream::connect(dir.path().join("d.sock")).unwrap();
    client.write_all(b"there").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(end(&mut client), (b"there".to_vec(), None));
    assert!(
        proxy
            .asked()
            .starts_with("CONNECT docker.web-1.alpha.svc:1 ")
    );
}

#[test]
fn json_is_a_line_for_each() {
    let proxy = Proxy::saying("HTTP/1.1 403 x\r\n\r\nno\n");
    let dir = tempfile::tempdir().unwrap();
    let mut forward = Forward::start(dir.path(), &proxy.url, &["0:80", "-o", "json"]);
    let mut line = String::new();
    forward.stdout.read_line(&mut line).unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["to"], "web-1:80");
    let at = line["listen"].as_str().unwrap();
    end(&mut client(at));
    let said: serde_json::Value = serde_json::from_str(&forward.says()).unwrap();
    assert_eq!(
        (&said["listen"], &said["error"]["code"]),
        (&line["listen"], &"not-allowed".into())
    );
}

#[test]
fn a_tunnel_that_is_refused_costs_its_client_only() {
    let proxy = Proxy::start(|mut client, number| match number {
        0 => client
            .write_all(b"HTTP/1.1 503 x\r\n\r\nthe agent is \x1b away\n")
            .unwrap(),
        // It hangs up.
        1 => {}
        _ => client.write_all(&[OK, b"served"].concat()).unwrap(),
    });
    let dir = tempfile::tempdir().unwrap();
    let mut forward = Forward::start(dir.path(), &proxy.url, &["0:80"]);
    let at = forward.listens();
    for why in ["the agent is \\u{1b} away", "hung up"] {
        assert_eq!(end(&mut client(&at)).1, Some(ErrorKind::ConnectionReset));
        let said = forward.says();
        assert!(said.contains(&at) && said.contains(why), "{said}");
    }
    assert_eq!(end(&mut client(&at)).0, b"served");
}

#[test]
fn r117_what_is_broken_off_on_one_side_is_reset_on_the_other() {
    let (note, ends) = channel();
    let note = Mutex::new(note);
    let proxy = Proxy::start(move |mut client, number| {
        client.write_all(&[OK, b"x"].concat()).unwrap();
        match number {
            0 => {
                // Once the client has all that was sent.
                client.read_exact(&mut [0]).unwrap();
                reset(client);
            }
            _ => note.lock().unwrap().send(end(&mut client)).unwrap(),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let mut forward = Forward::start(dir.path(), &proxy.url, &["0:80", "unix:web.sock:80"]);
    let at = forward.listens();
    let mut by_guest = client(&at);
    by_guest.read_exact(&mut [0]).unwrap();
    by_guest.write_all(b"x").unwrap();
    assert_eq!(
        end(&mut by_guest),
        (vec![], Some(ErrorKind::ConnectionReset))
    );

    let mut by_client = client(&at);
    by_client.read_exact(&mut [0]).unwrap();
    reset(by_client);
    assert_eq!(
        ends.recv().unwrap(),
        (vec![], Some(ErrorKind::ConnectionReset))
    );
    // A client of a Unix socket that goes with bytes unread has broken off; one that has read all has ended.
    let by_client = UnixStream::connect(dir.path().join("web.sock")).unwrap();
    rustix::net::recv(&by_client, &mut [0], rustix::net::RecvFlags::PEEK).unwrap();
    drop(by_client);
    assert_eq!(ends.recv().unwrap().1, Some(ErrorKind::ConnectionReset));
    let mut by_client = UnixStream::connect(dir.path().join("web.sock")).unwrap();
    by_client.read_exact(&mut [0]).unwrap();
    by_client.write_all(b"last").unwrap();
    drop(by_client);
    assert_eq!(ends.recv().unwrap(), (b"last".to_vec(), None));
}

#[test]
fn all_forwards_listen_or_none() {
    let proxy = Proxy::echoing();
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let args = ["unix:web.sock:80", &format!("{port}:80")];
    let out = command(dir.path(), &proxy.url, &args).output().unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&port.to_string()) && said.contains("help:"),
        "{said}"
    );
    assert!(out.stdout.is_empty() && !dir.path().join("web.sock").exists());
    for (vm, forward, exit) in [
        ("Web-1", "0:80", 4),
        ("web-1", "80", 2),
        ("web-1", "0:0", 2),
        ("web-1", "*:0:80", 2),
    ] {
        let out = crate::adit(dir.path(), &["forward", vm, forward]);
        assert_eq!(
            out.status.code(),
            Some(exit),
            "{vm} {forward}: {}",
            text(&out.stderr)
        );
    }
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_nothing_else() {
    let proxy = Proxy::echoing();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.sock");
    let fails = || {
        let out = command(dir.path(), &proxy.url, &["unix:web.sock:80"])
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    };
    let live = UnixListener::bind(&path).unwrap();
    fails();
    UnixStream::connect(&path).unwrap();
    drop(live);
    let mut forward = Forward::start(dir.path(), &proxy.url, &["unix:web.sock:80"]);
    forward.listens();
    UnixStream::connect(&path).unwrap();
    // Somebody else's is not removed.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "mine").unwrap();
    assert_eq!(forward.end(Signal::TERM), Some(0));
    fails();
    assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn connections_past_the_limit_wait_until_one_has_ended() {
    const MAX: usize = 256;
    let proxy = Proxy::start(|mut client, _| {
        client.write_all(&[OK, b"x"].concat()).unwrap();
        end(&mut client);
    });
    let dir = tempfile::tempdir().unwrap();
    let mut forward = Forward::start(dir.path(), &proxy.url, &["0:80"]);
    let at = forward.listens();
    let mut open: Vec<_> = (0..MAX).map(|_| client(&at)).collect();
    for client in &mut open {
        client.read_exact(&mut [0]).unwrap();
        proxy.asked();
    }
    let mut next = client(&at);
    assert!(forward.says().contains("256"));
    assert!(!proxy.was_asked());
    open.pop();
    next.read_exact(&mut [0]).unwrap();
    proxy.asked();
}
