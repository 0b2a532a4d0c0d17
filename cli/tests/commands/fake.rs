//! An aditd that says what a test tells it to say.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub body: String,
}

/// What comes back.
pub enum Say {
    /// An answer in JSON.
    Json(Value),
    /// An error.
    Error(u16, &'static str),
    /// A header field and bytes.
    With(&'static str, String, Vec<u8>),
    /// A refusal that is none of the API's, with a header field.
    Refused(u16, &'static str, String, Vec<u8>),
    /// A stream of lines that ends.
    Lines(Vec<Value>),
    /// A stream of lines that is cut off.
    Cut(Vec<Value>),
    /// Nothing: the connection ends.
    HangUp,
}

pub struct Fake {
    dir: tempfile::TempDir,
    asked: Receiver<Asked>,
}

impl Fake {
    /// Makes the directory; nobody listens yet.
    pub fn absent() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    /// Listens, and answers each request by this.
    pub fn start(say: impl FnMut(&Asked) -> Say + Send + 'static) -> Self {
        Self::in_dir(Self::absent(), say)
    }

    pub fn in_dir(
        dir: tempfile::TempDir,
        mut say: impl FnMut(&Asked) -> Say + Send + 'static,
    ) -> Self {
        let listener = UnixListener::bind(dir.path().join("aditd.sock")).unwrap();
        let (note, asked) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that has gone is no matter of this test.
                let _ = serve(stream.unwrap(), &mut say, &note);
            }
        });
        Self { dir, asked }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("aditd.sock")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        command(self.dir.path(), args)
    }

    pub fn adit(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// All requests until now.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.try_iter().collect()
    }
}

/// The command, with the socket that a fake in this directory has.
pub fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
    command.args(args).current_dir(dir);
    command.env("ADIT_SOCKET", dir.join("aditd.sock"));
    command.env_remove("ADIT_COMPLETE");
    command
}

fn serve(
    mut stream: UnixStream,
    say: &mut impl FnMut(&Asked) -> Say,
    note: &Sender<Asked>,
) -> std::io::Result<()> {
    let mut noted = |request: &Asked| {
        let answer = say(request);
        let _ = note.send(request.clone());
        answer
    };
    serve_with(&mut stream, &mut noted, &mut |_| {})
}

/// Answers one request, and tells its head, in lower case.
pub fn serve_with(
    stream: &mut (impl Read + Write),
    say: &mut impl FnMut(&Asked) -> Say,
    heard: &mut impl FnMut(String),
) -> std::io::Result<()> {
    let mut reader = BufReader::new(&mut *stream);
    let mut head = String::new();
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        let line = line.to_ascii_lowercase();
        head.push_str(&line);
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body = String::from_utf8(body).unwrap();
    let asked = Asked { method, path, body };
    heard(head);
    let answer = say(&asked);
    write(stream, answer)
}

fn write(out: &mut impl Write, answer: Say) -> std::io::Result<()> {
    let whole = |status: u16, head: &str, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status} x\r\nconnection: close\r\n{head}content-length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), body].concat()
    };
    let bytes = match answer {
        Say::HangUp => return Ok(()),
        Say::Json(value) => whole(200, "", value.to_string().as_bytes()),
        Say::Error(status, code) => {
            let body = json!({"code": code, "message": "it says no", "help": ""});
            whole(status, "", body.to_string().as_bytes())
        }
        Say::With(field, value, body) => whole(200, &format!("{field}: {value}\r\n"), &body),
        Say::Refused(status, field, value, body) => {
            whole(status, &format!("{field}: {value}\r\n"), &body)
        }
        Say::Lines(lines) => [chunks(&lines), b"0\r\n\r\n".into()].concat(),
        Say::Cut(lines) => chunks(&lines),
    };
    out.write_all(&bytes)
}

fn chunks(lines: &[Value]) -> Vec<u8> {
    let mut text = String::from("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
    for line in lines {
        let line = format!("{line}\n");
        text.push_str(&format!("{:x}\r\n{line}\r\n", line.len()));
    }
    text.into_bytes()
}

pub const GOAL: &str = "01937b5e-0000-7000-8000-0000deadbeef";

/// A task of [`GOAL`] on VM `web-1`; its id begins with eight times this digit.
pub fn task(digit: char, step: &str, attempt: u32, state: &str) -> Value {
    json!({
        "task_id": digit.to_string().repeat(32), "goal_id": GOAL, "vm": "web-1", "step": step, "attempt": attempt,
        "state": state, "exit": null, "reason": "", "queued_at": "2026-11-20T22:00:00Z", "started_at": null,
        "ended_at": null, "output_bytes": [0, 0], "output_preview": "",
    })
}

/// A line of the events' stream.
pub fn event(task: Value) -> Value {
    json!({"seq": 1, "task": task})
}

/// A goal with these tasks.
pub fn goal(tasks: &[Value]) -> Value {
    json!({"goal_id": GOAL, "digest": "00", "accepted_at": "2026-11-20T22:00:00Z", "tasks": tasks})
}

/// A VM.
pub fn vm(name: &str) -> Value {
    json!({
        "name": name, "cid": 3, "state": "ready", "agent": "1", "kernel": "6", "enrolled_as": null, "last_seen_ms": 0,
        "epoch": 1, "streams": 0, "queued": 0, "allow": [80], "allow_vsock": [], "port_pid": 7, "vhost_socket": "",
        "fault": null,
    })
}
