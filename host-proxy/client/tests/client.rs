//! What the client makes of answers that are no answers. The aditd here is a socket that says what the test wants.
#![allow(missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use adit_client::{ClientError, Method, blocking};

/// Longer than anything here takes.
const HANG: Duration = Duration::from_secs(30);

/// A client, and a socket that answers its only request with these bytes; `stays`: and keeps the connection open.
fn answered(with: &'static [u8], stays: bool, limit: Duration) -> (blocking::Client, Server) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("aditd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            reader.read_line(&mut line).unwrap();
        }
        stream.write_all(with).unwrap();
        if stays {
            // Until the client has gone.
            let _ = reader.read_line(&mut line);
        }
    });
    let client = blocking::Client::new(&socket, limit).unwrap();
    let server = Server {
        thread: Some(thread),
        _dir: dir,
    };
    (client, server)
}

struct Server {
    thread: Option<std::thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

fn get(with: &'static [u8]) -> Result<Vec<u32>, ClientError> {
    let (client, _server) = answered(with, false, HANG);
    client.get("/v1/x")
}

#[test]
fn an_answer_is_its_json() {
    let answer = get(b"HTTP/1.1 200 x\r\ncontent-length: 5\r\n\r\n[1,2]");
    assert_eq!(answer.unwrap(), [1, 2]);
    let chunks = get(
        b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n3\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n",
    );
    assert_eq!(chunks.unwrap(), [1, 2]);
}

#[test]
fn a_refusal_has_its_status_and_aditds_words() {
    let said = b"HTTP/1.1 409 x\r\ncontent-length: 54\r\n\r\n{\"code\": \"taken\", \"message\": \"is there\", \"help\": \"go\"}";
    let Err(ClientError::Refused { status, said }) = get(said) else {
        panic!()
    };
    assert_eq!(
        (status, &*said.code, &*said.message),
        (409, "taken", "is there")
    );
    let mute = get(b"HTTP/1.1 502 x\r\ncontent-length: 2\r\n\r\nno");
    assert!(matches!(mute, Err(ClientError::Status(502))));
}

#[test]
fn what_is_no_whole_answer_is_an_error_of_its_kind() {
    let cut = get(b"HTTP/1.1 200 x\r\ncontent-length: 50\r\n\r\n[1,2]");
    assert!(matches!(cut, Err(ClientError::CutOff(_))), "{cut:?}");
    let chunks = get(b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n[1,2]\r\n");
    assert!(matches!(chunks, Err(ClientError::CutOff(_))), "{chunks:?}");
    for no_answer in [&b""[..], b"SSH-2.0-x\r\n", b"HTTP/1.1 2"] {
        let answer = get(no_answer);
        assert!(
            matches!(answer, Err(ClientError::NoAnswer(_))),
            "{answer:?}"
        );
    }
    let other = get(b"HTTP/1.1 200 x\r\ncontent-length: 3\r\n\r\n\"a\"");
    assert!(matches!(other, Err(ClientError::Answer(_))), "{other:?}");
}

#[test]
fn an_aditd_that_is_not_there_or_does_not_answer_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let client = blocking::Client::new(&dir.path().join("none"), HANG).unwrap();
    let gone = client.delete("/v1/x");
    assert!(matches!(gone, Err(ClientError::Unreachable { .. })));
    let (client, server) = answered(b"", true, Duration::from_millis(20));
    let late = client.request(Method::GET, "/v1/x", None);
    assert!(matches!(late, Err(ClientError::Late { .. })), "{late:?}");
    // Its connection ends with the client.
    drop(client);
    drop(server);
}
