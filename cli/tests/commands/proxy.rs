//! A proxy that does what a test tells it to do, and the programs that use it.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Longer than anything in these tests takes.
pub const HANG: Duration = Duration::from_secs(60);

/// The answer that opens a tunnel.
pub const OK: &[u8] = b"HTTP/1.1 200 OK\r\nDate: x\r\n\r\n";

/// A proxy on a free port. Every client has a thread.
pub struct Proxy {
    pub url: String,
    asked: Receiver<String>,
}

impl Proxy {
    /// `serve` gets each client whose request has been read, and its number.
    pub fn start(serve: impl Fn(TcpStream, usize) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (note, asked) = channel();
        let serve = std::sync::Arc::new(serve);
        std::thread::spawn(move || {
            for (number, client) in listener.incoming().enumerate() {
                let mut client = client.unwrap();
                let (note, serve) = (note.clone(), serve.clone());
                std::thread::spawn(move || {
                    client.set_read_timeout(Some(HANG)).unwrap();
                    client.set_nodelay(true).unwrap();
                    // The test may have ended.
                    let _ = note.send(request(&mut client));
                    serve(client, number);
                });
            }
        });
        Self { url, asked }
    }

    /// One that says the same to everybody.
    pub fn saying(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |mut client, _| {
            let _ = client.write_all(&answer);
        })
    }

    /// One whose VMs send back what they get, once they have got all of it.
    pub fn echoing() -> Self {
        Self::start(|mut client, _| {
            client.write_all(OK).unwrap();
            let mut got = Vec::new();
            if client.read_to_end(&mut got).is_ok() {
                // A client may have gone.
                let _ = client.write_all(&got);
            }
        })
    }

    /// The next request.
    pub fn asked(&self) -> String {
        self.asked.recv_timeout(HANG).unwrap()
    }

    /// Whether there was another one.
    pub fn was_asked(&self) -> bool {
        self.asked.try_recv().is_ok()
    }

    /// `adit connect VM PORT` through it.
    pub fn connect(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
        command
            .arg("connect")
            .args(args)
            .args(["--proxy", &self.url]);
        command.stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.connect(args).output().unwrap()
    }
}

/// A request's head.
pub fn request(client: &mut impl Read) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match client.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => break,
        }
    }
    String::from_utf8(head).unwrap()
}

/// Makes a close a reset.
pub fn reset(client: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
}

/// Reads to the end, and says how that came.
pub fn end(client: &mut impl Read) -> (Vec<u8>, Option<ErrorKind>) {
    let mut got = Vec::new();
    let end = client.read_to_end(&mut got);
    (got, end.err().map(|e| e.kind()))
}
