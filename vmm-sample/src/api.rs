//! The operator's API: HTTP/1.1 on a Unix socket, one request a connection, answered on the main thread.
//!
//! | request | does | answers |
//! |---|---|---|
//! | `GET /vm` | | 200 `{"state":"running"}`: or `paused` |
//! | `PUT /pause`, `PUT /resume` | holds the VM, lets it go on | 204, also when it was so already |
//! | `PUT /snapshot` `{"dir":"PATH"}` | writes the held VM to a new directory | 204; 409 while it runs |
//! | `PUT /stop` | ends the VM, as pulling its plug would | 204 |
//!
//! Errors: status and `{"error":"..."}`. Who can open the socket owns the VM: it is made 0600.

use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::Deserialize;

use crate::bus::lock;
use crate::events::watch;
use crate::exit::Reason;
use crate::machine::Machine;

/// A request's bytes at most, and how long it may take to come: the main thread waits for it.
const REQUEST_MAX: usize = 8192;
const PATIENCE: Duration = Duration::from_secs(1);

/// The listening socket; its file goes with it.
pub struct Api {
    listener: UnixListener,
    path: PathBuf,
    machine: Arc<Mutex<Machine>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    dir: PathBuf,
}

/// Status and JSON, or nothing.
type Answer = (u16, Option<String>);

impl Api {
    /// # Errors
    /// The socket cannot be made.
    pub fn open(path: &Path, machine: Arc<Mutex<Machine>>) -> anyhow::Result<Self> {
        let listener = adit_channel::socket_path::listen(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            machine,
        })
    }

    fn serve(&self, mut client: UnixStream) -> anyhow::Result<()> {
        client.set_nonblocking(false)?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.set_write_timeout(Some(PATIENCE))?;
        let (status, body) = match request(&mut client) {
            Ok((method, path, body)) => self.answer(&method, &path, &body),
            Err(e) => failed(400, &e),
        };
        let body = body.unwrap_or_default();
        let head = format!("HTTP/1.1 {status} \r\nConnection: close\r\n");
        let length = match status {
            204 => String::new(),
            _ => format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            ),
        };
        Ok(write!(client, "{head}{length}\r\n{body}")?)
    }

    fn answer(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let mut machine = lock(&self.machine);
        let done = match (method, path) {
            ("GET", "/vm") => {
                let state = ["running", "paused"][usize::from(machine.is_paused())];
                return (200, Some(format!("{{\"state\":\"{state}\"}}\n")));
            }
            ("PUT", "/pause") => machine.pause(),
            ("PUT", "/resume") => machine.resume(),
            ("PUT", "/snapshot") => {
                let snapshot: Snapshot = match serde_json::from_slice(body) {
                    Ok(snapshot) => snapshot,
                    Err(e) => return failed(400, &e.into()),
                };
                if !machine.is_paused() {
                    return failed(409, &anyhow::anyhow!("the VM runs: PUT /pause first"));
                }
                machine.snapshot(&snapshot.dir)
            }
            ("PUT", "/stop") => {
                machine.exit.end(Reason::Stopped);
                Ok(())
            }
            _ => return failed(404, &anyhow::anyhow!("no {method} {path} here")),
        };
        match done {
            Ok(()) => (204, None),
            Err(e) => failed(500, &e),
        }
    }
}

fn failed(status: u16, why: &anyhow::Error) -> Answer {
    let body = serde_json::json!({ "error": format!("{why:#}") });
    (status, Some(format!("{body}\n")))
}

/// Reads one request: method, path and body.
fn request(client: &mut UnixStream) -> anyhow::Result<(String, String, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut request = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(head) = request.parse(&bytes)? {
            let mut headers = request.headers.iter();
            let length = headers.find(|h| h.name.eq_ignore_ascii_case("content-length"));
            let length = match length {
                // Digits only, as HTTP has it: `parse` takes a sign too.
                Some(h) => match std::str::from_utf8(h.value)?.trim() {
                    text if text.bytes().all(|b| b.is_ascii_digit()) => text.parse::<usize>()?,
                    text => anyhow::bail!("content-length `{}` is no number", text.escape_debug()),
                },
                None => 0,
            };
            anyhow::ensure!(length <= REQUEST_MAX, "the body is too long");
            if bytes.len() >= head + length {
                let word = |w: Option<&str>| w.unwrap_or_default().to_owned();
                let (method, path) = (word(request.method), word(request.path));
                return Ok((method, path, bytes[head..head + length].to_vec()));
            }
        }
        anyhow::ensure!(bytes.len() < 2 * REQUEST_MAX, "the request is too long");
        let mut some = [0; 1024];
        let n = client.read(&mut some).context("the request did not come")?;
        anyhow::ensure!(n > 0, "the request is cut");
        bytes.extend_from_slice(&some[..n]);
    }
}

impl MutEventSubscriber for Api {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.listener.as_raw_fd());
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        match self.listener.accept() {
            // A client that went away needs no answer.
            Ok((client, _)) => drop(self.serve(client)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => {
                eprintln!("adit-vmm: API: {e}");
                std::thread::sleep(PATIENCE / 10); // the client stays in the backlog: this would spin
            }
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // Gone already is fine, and what is no socket is not ours.
        let _ = adit_channel::socket_path::remove(&self.path);
    }
}
