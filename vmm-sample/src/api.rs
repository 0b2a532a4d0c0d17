//! The operator's API: HTTP/1.1 on a Unix socket, one request a connection. The main thread answers.
//!
//! | request | does | answers |
//! |---|---|---|
//! | `GET /vm` | | 200 `{"state":"running"}`, or `paused` |
//! | `PUT /pause`, `PUT /resume` | pauses the VM, lets it continue | 204, also if it was in that state before |
//! | `PUT /snapshot` `{"dir":"PATH"}` | writes the paused VM to a new directory | 204; 409 while the VM runs |
//! | `PUT /stop` | ends the VM, like pulling its plug | 204 |
//!
//! Errors: status and `{"error":"..."}`. Whoever can open the socket controls the VM, so the socket has mode 0600. A client
//! that sends nothing holds up nobody. A client that has begun has one second, because the main thread waits for it.

use std::collections::VecDeque;
use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::Deserialize;
use vmm_sys_util::epoll::EventSet;

use crate::bus::lock;
use crate::events::watch;
use crate::exit::Reason;
use crate::machine::Machine;

/// Longest request, bytes.
const REQUEST_MAX: usize = 8192;
/// Longest time of one request: the main thread waits for it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Clients that may be connected without having sent anything. One more closes the oldest.
const SILENT_MAX: usize = 16;

/// The listening socket. Drop removes its file.
pub struct Api {
    listener: UnixListener,
    path: PathBuf,
    machine: Arc<Mutex<Machine>>,
    silent: Silent,
}

/// Clients that have sent nothing yet, the oldest first.
#[derive(Default)]
struct Silent(VecDeque<UnixStream>);

impl Silent {
    /// Adds a client. Returns the oldest one if there are now too many.
    fn add(&mut self, client: UnixStream) -> Option<UnixStream> {
        self.0.push_back(client);
        (self.0.len() > SILENT_MAX).then(|| self.0.pop_front())?
    }

    /// Removes the client with this descriptor.
    fn take(&mut self, fd: RawFd) -> Option<UnixStream> {
        let at = self.0.iter().position(|client| client.as_raw_fd() == fd)?;
        self.0.remove(at)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    dir: PathBuf,
}

/// Status, and a JSON body if there is one.
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
            silent: Silent::default(),
        })
    }

    fn serve(&self, mut client: UnixStream) -> anyhow::Result<()> {
        client.set_nonblocking(false)?;
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
    let due = Instant::now() + PATIENCE;
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut request = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(head) = request.parse(&bytes)? {
            let mut headers = request.headers.iter();
            let length = headers.find(|h| h.name.eq_ignore_ascii_case("content-length"));
            let length = match length {
                // HTTP allows digits only; `parse` alone would accept a sign.
                Some(h) => match std::str::from_utf8(h.value)?.trim() {
                    text if text.bytes().all(|b| b.is_ascii_digit()) => text.parse::<usize>()?,
                    text => {
                        anyhow::bail!(
                            "content-length `{}` is not a number",
                            adit_names::escape(text)
                        )
                    }
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
        // The time is for the whole request: a client that sends a byte now and then must not extend it.
        let left = due.saturating_duration_since(Instant::now());
        anyhow::ensure!(
            !left.is_zero(),
            "the request did not come within {PATIENCE:?}"
        );
        client.set_read_timeout(Some(left))?;
        let n = client.read(&mut some).context("the request did not come")?;
        anyhow::ensure!(n > 0, "the request is cut off");
        bytes.extend_from_slice(&some[..n]);
    }
}

impl MutEventSubscriber for Api {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.listener.as_raw_fd());
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd != self.listener.as_raw_fd() {
            if let Some(client) = self.silent.take(fd) {
                unwatch(ops, &client);
                // An error here means that the client is gone; it needs no answer.
                drop(self.serve(client));
            }
            return;
        }
        match self.listener.accept() {
            Ok((client, _)) => {
                watch(ops, client.as_raw_fd());
                if let Some(oldest) = self.silent.add(client) {
                    unwatch(ops, &oldest);
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => {
                adit_print::note!("adit-vmm: API: {e}");
                std::thread::sleep(PATIENCE / 10); // the client stays in the backlog, so without a pause this would spin
            }
        }
    }
}

/// Stops watching a client. Without this the event manager would keep the number of a closed descriptor, and the next client may
/// get that number.
fn unwatch(ops: &mut EventOps<'_>, client: &UnixStream) {
    if let Err(e) = ops.remove(Events::new(client, EventSet::IN)) {
        adit_print::note!("adit-vmm: API: {e:?}");
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // An error means that the file is gone, or that a file of somebody else is there now.
        let _ = adit_channel::socket_path::remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r108_a_request_that_comes_byte_by_byte_is_refused() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let drip = std::thread::spawn(move || {
            let head = b"GET /vm HTTP/1.1\r\nx: "
                .iter()
                .chain(std::iter::repeat(&b'a'));
            for byte in head {
                if theirs.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(PATIENCE / 50);
            }
        });
        assert!(request(&mut ours).is_err());
        drop(ours);
        drip.join().unwrap();
    }

    #[test]
    fn r108_the_oldest_silent_client_makes_room() {
        let mut silent = Silent::default();
        let mut theirs = Vec::new();
        for _ in 0..140 {
            let (ours, client) = UnixStream::pair().unwrap();
            drop(silent.add(ours));
            theirs.push(client);
        }
        assert_eq!(silent.0.len(), SILENT_MAX);
        let newest = silent.0.back().unwrap().as_raw_fd();
        assert!(silent.take(newest).is_some() && silent.take(newest).is_none());
        let open = theirs.iter_mut().filter_map(|client| {
            client.set_nonblocking(true).unwrap();
            client.read(&mut [0]).err()
        });
        assert_eq!(open.count(), SILENT_MAX - 1);
    }
}
