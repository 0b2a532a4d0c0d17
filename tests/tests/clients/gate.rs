//! `adit proxy` on a client's machine, which knows a host by its management listener, and its clients: those that people use, and
//! some that are slow, many, or speak something else.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{ChildStderr, Command, ExitStatus, Stdio};

use adit_tests::agent;
use adit_tests::connect::{connect, pattern};
use adit_tests::host::Host;
use adit_tests::process::{Reaped, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::keys::{Keys, Pair};
use super::servers::Servers;
use super::{LIMIT, beside, bins, json, shown};

/// Connections that `adit proxy` has at most.
const CONNECTIONS_MAX: usize = 256;

/// A host with the VM `web-1`, and `adit proxy` with a certificate that it knows.
struct Setup {
    host: Host,
    servers: Servers,
    gate: Reaped,
    at: String,
    said: BufReader<ChildStderr>,
    _keys: Keys,
}

fn config(of: &Pair, ca: &str, at: [&str; 2], servers: &Servers) -> String {
    let files = format!(
        "cert = \"{}\"\nkey = \"{}\"\nclient_ca = \"{ca}\"\n",
        of.cert, of.key
    );
    format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\n[names]\nhost = \"alpha\"\n\
         [[listen]]\naddress = \"{}\"\nrole = \"management\"\n{files}\
         [[listen]]\naddress = \"{}\"\n{files}\
         [[grant]]\nto = [\"cert:me.example\", \"user:root\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n\
         [[vm]]\nname = \"web-1\"\ncid = 3\nallow = {:?}\n",
        at[0],
        at[1],
        servers.ports()
    )
}

impl Setup {
    fn new() -> Option<Self> {
        let bins = bins()?;
        let (servers, keys) = (Servers::start(), Keys::new());
        let (of, me) = (
            keys.signs(&["127.0.0.1", "alpha"]),
            keys.signs(&["me.example"]),
        );
        let any = "127.0.0.1:0";
        let host =
            Host::start_configured(&bins, &config(&of, &keys.ca(), [any, any], &servers)).unwrap();
        // Where it listens now, it listens after a restart.
        let at = host.listeners().unwrap();
        let path = host.dir().join("aditd.toml");
        let mut text = fs::read_to_string(&path).unwrap();
        let (before, after) = text.split_once("[[listen]]").unwrap();
        let after = after.replacen(any, &at[0], 1).replacen(any, &at[1], 1);
        text = format!("{before}[[listen]]{after}");
        fs::write(&path, text).unwrap();
        agent::start(&host.vm_dir("web-1"), &servers.ports()).unwrap();
        let mut gate = Command::new(bins.join("adit"));
        gate.args(["--server", &format!("https://{}", at[0])])
            .args(["--ca", &keys.ca(), "--cert", &me.cert, "--key", &me.key])
            .args(["proxy", "--listen", any])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut gate = Reaped(gate.spawn().unwrap());
        let mut said = BufReader::new(gate.0.stderr.take().unwrap());
        let mut line = String::new();
        BufReader::new(gate.0.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let at = line.strip_prefix("listening on ");
        let at = at.and_then(|at| at.split_once(' '));
        let Some((at, _)) = at else {
            said.read_to_string(&mut line).unwrap();
            panic!("{line}");
        };
        let setup = Self {
            at: at.to_owned(),
            host,
            servers,
            gate,
            said,
            _keys: keys,
        };
        wait_for("the VM", LIMIT, || {
            let (code, _) = setup.get("hello");
            Ok((code == 200).then_some(()))
        })
        .unwrap_or_else(|e| panic!("{e:#}: {:?}", setup.get("hello")));
        Some(setup)
    }

    /// A file of the VM, by curl: status, and all that was said.
    fn get(&self, file: &str) -> (u16, String) {
        self.get_of("web-1", file)
    }

    fn get_of(&self, vm: &str, file: &str) -> (u16, String) {
        let url = format!("http://{vm}:{}/files/{file}", self.servers.page);
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-i", "--max-time", "60", "-w", "\n%{http_code}"])
            .args(["-x", &format!("http://{}", self.at), &url]);
        let out = curl.output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let code = text.lines().last().and_then(|code| code.parse().ok());
        (code.unwrap_or(0), shown(&out))
    }

    fn client(&self) -> TcpStream {
        let client = TcpStream::connect(&self.at).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client
    }

    /// The next line on standard error that has these words.
    fn said(&mut self, words: &str) -> String {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert_ne!(self.said.read_line(&mut line).unwrap(), 0, "{words}");
        }
        line
    }

    fn ends(&mut self) -> ExitStatus {
        kill(
            Pid::from_raw(self.gate.pid().cast_signed()),
            Signal::SIGTERM,
        )
        .unwrap();
        self.gate.0.wait().unwrap()
    }
}

fn head(client: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap().to_lowercase()
}

fn all(mut client: TcpStream) -> String {
    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    said
}

#[test]
fn a_websocket_a_client_of_http_2_slow_ones_and_many_are_each_served_or_told() {
    let Some(mut setup) = Setup::new() else {
        return;
    };
    let (host, port) = setup.at.split_once(':').unwrap();
    let url = format!("ws://web-1:{}/socket", setup.servers.page);
    let mut python = Command::new("/usr/bin/python3");
    python
        .env_clear()
        .arg(beside("ws.py"))
        .args([host, port, &url]);
    let said = json(&mut python);
    let pong = "ping came back";
    assert_eq!(
        (&said["tunnelled"], &said["absolute"]),
        (&pong.into(), &pong.into()),
        "{said}"
    );

    // As Firefox says that it wants one; a CONNECT without `Host`, and with that of the proxy, as programs have it; SOCKS5 in one piece.
    let mut client = setup.client();
    write!(
        client,
        "GET http://web-1:{0}/socket HTTP/1.1\r\nHost: web-1:{0}\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        setup.servers.page
    )
    .unwrap();
    let said = head(&mut client);
    assert!(said.starts_with("http/1.1 101 "), "{said}");
    assert!(said.contains("upgrade: websocket"), "{said}");
    let echo = format!("web-1:{}", setup.servers.echo);
    for host in ["", "Host: 127.0.0.1:7080\r\n"] {
        let mut client = setup.client();
        write!(client, "CONNECT {echo} HTTP/1.1\r\n{host}\r\nahead").unwrap();
        let said = head(&mut client);
        assert!(said.starts_with("http/1.1 200 "), "{said}");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(all(client), "ahead");
    }
    let mut client = setup.client();
    let [high, low] = setup.servers.echo.to_be_bytes();
    let asks = [
        &[5, 1, 0, 5, 1, 0, 3, 5][..],
        b"web-1",
        &[high, low],
        b"ahead",
    ]
    .concat();
    client.write_all(&asks).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    assert!(
        said.starts_with(&[5, 0, 5, 0]) && said.ends_with(b"ahead"),
        "{said:?}"
    );

    // HTTP/2 without TLS, in one piece and in many, with what such a client says besides.
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    for piece in [preface.len(), 1] {
        let mut client = setup.client();
        for piece in preface.chunks(piece) {
            // Where it was refused already, that is to be read.
            let _ = client.write_all(piece);
        }
        let _ = client.shutdown(Shutdown::Write);
        let said = all(client);
        assert!(said.starts_with("HTTP/1.1 505 "), "{said}");
        assert!(said.contains("turn HTTP/2 off"), "{said}");
    }

    // A head that comes byte by byte, of a method that begins as HTTP/2 does; and of a program from the time before `Host`.
    let page = setup.servers.page;
    for head in [
        format!(
            "POST http://web-1:{page}/count HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
        ),
        format!("GET http://web-1:{page}/files/hello HTTP/1.0\r\n\r\n"),
    ] {
        let mut client = setup.client();
        client.set_nodelay(true).unwrap();
        for byte in head.as_bytes() {
            client.write_all(&[*byte]).unwrap();
        }
        let said = all(client);
        assert!(said.contains(" 200 OK"), "{said}");
        assert!(
            said.ends_with('3') || said.ends_with("this is web-1\n"),
            "{said}"
        );
    }

    // One that does not read has others served, and then gets all of it.
    let mut slow = connect(setup.at.parse().unwrap(), &echo).unwrap();
    let mut writer = slow.try_clone().unwrap();
    let sent: Vec<u8> = (0..8 << 20).map(pattern).collect();
    let all_of_it = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&all_of_it).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    for _ in 0..3 {
        assert_eq!(setup.get("hello").0, 200);
    }
    let mut back = Vec::new();
    slow.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == sent, "{} bytes came back", back.len());
    drop(slow);

    // More than there is room for: the next one waits until one of them leaves.
    let mut many: Vec<TcpStream> = (0..CONNECTIONS_MAX).map(|_| setup.client()).collect();
    for client in &mut many {
        client.write_all(b"GET http://").unwrap();
    }
    setup.said("the next ones wait");
    let mut next = setup.client();
    write!(next, "GET http://web-1:{page}/files/hello HTTP/1.0\r\n\r\n").unwrap();
    // Some of the last ones may wait too: a WebSocket is still there.
    many.drain(..8);
    assert!(all(next).contains("this is web-1"));
    drop(many);
    assert_eq!(setup.get("hello").0, 200);
}

#[test]
fn a_server_that_goes_away_and_comes_back_and_the_end_of_the_proxy_are_told_to_clients() {
    let Some(mut setup) = Setup::new() else {
        return;
    };
    let echo = format!("web-1:{}", setup.servers.echo);
    setup.host.kill();
    for vm in ["web-1", "nobody"] {
        let (code, said) = setup.get_of(vm, "hello");
        assert!(matches!(code, 502 | 504), "{said}");
        assert!(
            said.to_lowercase()
                .contains("proxy-status: adit-proxy; error="),
            "{said}"
        );
    }
    setup.host.launch().unwrap();
    wait_for("the VM", LIMIT, || {
        Ok((setup.get("hello").0 == 200).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}", setup.get("hello")));
    let (code, said) = setup.get_of("nobody", "hello");
    assert_eq!(code, 404, "{said}");

    // It ends at once, with its tunnels.
    let mut tunnel = connect(setup.at.parse().unwrap(), &echo).unwrap();
    tunnel.write_all(b"ping").unwrap();
    let mut back = [0; 4];
    tunnel.read_exact(&mut back).unwrap();
    assert!(setup.ends().success());
    let end = tunnel.read(&mut back).map_err(|e| e.kind());
    assert!(
        matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)),
        "{end:?}"
    );
    assert!(TcpStream::connect(&setup.at).is_err());
}
