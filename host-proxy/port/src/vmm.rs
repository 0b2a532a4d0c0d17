//! For a VMM with the device in its own process: hands the host's side over to aditd.
//!
//! ```text
//! the VMM ─── locks RUN/vm/NAME and listens on ctl.sock, as a port process of aditd's would
//!    │        POST /v1/vms ──► aditd: the VM is known, and its supervisor finds ctl.sock answering
//!    │        ◄── Dial, Attach (with a client's socket) ── the same frames as for any port process
//!    └─ at the end: DELETE /v1/vms/NAME; not when the guest only asked for a reset
//! ```
//! Until then this process owns the entry (`Held`): aditd lets nobody else remove it, except with `force`.
//!
//! So this process *is* the VM's port process. The VM needs no `adit-port`, and aditd no second protocol. aditd may end and
//! start again, as with any port process. If this process ends, the VM ends too, so nothing is kept for a successor.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_api::{ErrorBody, NewVm, Vm, VmState};
use adit_channel::carrier::Carrier;
use adit_channel::hello;
use adit_channel::live::LiveFile;
use adit_names::VmId;
use adit_passed::Closer;
use anyhow::{Context, bail};
use nix::fcntl::Flock;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::control::{IVSHMEM_SOCKET, Quit, RING_SOCKET, VHOST_SOCKET};
use crate::control_io::{Message, receive_passed, send_all};
use crate::keep::{Keeping, Note};
use crate::place::{Place, PlaceError, connect_control};
use crate::process::{Options, Process};
use crate::rings::RingInbox;

/// How long aditd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long an idle port process may take to make room.
const TAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long aditd may take to find this process.
const LINK_LIMIT: Duration = Duration::from_secs(3);
/// Longest answer, bytes.
const ANSWER_MAX: u64 = 1 << 20;

/// How aditd will know the VM.
#[derive(Clone, Debug)]
pub struct Registration {
    /// aditd's API socket.
    pub aditd: PathBuf,
    /// The VM's entry.
    pub vm: NewVm,
}

/// The loop that serves the device of a VM that aditd knows. It runs on a thread of its own.
pub struct Handed<C: Carrier> {
    process: Process<C>,
    /// Keeps the directory locked while the thread runs.
    _lock: Flock<fs::File>,
}

impl<C: Carrier> Handed<C> {
    /// Takes the place of the VM's port process. The VM's ring arrives in `rings`, if it can have one
    /// ([`rings::channel`](crate::rings::channel)).
    ///
    /// # Errors
    /// The VM's name is invalid, another process serves the VM, or a socket cannot be made.
    pub fn new(carrier: C, with: &Registration, rings: Option<RingInbox>) -> anyhow::Result<Self> {
        // Must be first: the VM's threads give up the right to create threads.
        Closer::shared().prepare();
        let name: VmId = with.vm.name.parse()?;
        let dir = with.dir()?;
        let place = take(&dir, &name, TAKE_LIMIT)?;
        // Only this VMM uses the device, so no other one may connect.
        drop(place.vhost);
        drop((place.ring, place.ivshmem));
        for socket in [VHOST_SOCKET, RING_SOCKET, IVSHMEM_SOCKET] {
            fs::remove_file(dir.join(socket))?;
        }
        let mut random = [0; 24];
        fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let (boot_nonce, seed) = random.split_at(16);
        let options = Options {
            vm: name,
            cid: with.vm.cid,
            serve_ports: vec![hello::PORT],
            busy_poll: Duration::ZERO,
            seed: u64::from_le_bytes(seed.try_into()?),
            boot_nonce: boot_nonce.try_into()?,
            vmm: true,
        };
        let live = Arc::new(LiveFile::create()?);
        let mut note = Note::open(&dir)?;
        note.clear();
        let (keeping, _) = Keeping::new(live.clone(), note, None)?;
        // Signals are handled on the main thread.
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let stop = OwnedFd::from(stop);
        let mut process = Process::new(options, carrier, live, keeping, place.control, stop)?;
        if let Some(rings) = rings {
            process = process.with_rings(rings)?;
        }
        Ok(Self {
            process,
            _lock: place.lock,
        })
    }

    /// Serves until aditd removes the VM, or the process ends. After that the VM runs on without a channel.
    ///
    /// # Errors
    /// Waiting fails, or aditd breaks the protocol.
    pub fn run(mut self) -> anyhow::Result<()> {
        Ok(self.process.run()?)
    }
}

/// Locks the VM's directory. A port process that serves no VMM must make room: aditd starts one if it finds none, for example
/// after this VMM was killed, or while it was away for a reboot. One that does not answer is given up after `limit`.
fn take(dir: &Path, name: &VmId, limit: Duration) -> anyhow::Result<Place> {
    let (begin, closer) = (Instant::now(), Closer::shared());
    loop {
        match Place::take(dir) {
            Err(PlaceError::AlreadyRunning(_)) if begin.elapsed() < limit => {}
            taken => return Ok(taken?),
        }
        // It does not listen yet, or it is ending: try again.
        let Ok(socket) = connect_control(dir) else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        // The kernel says which process it is.
        let pid = getsockopt(&socket, PeerCredentials)?.pid();
        // For the time limits of a UnixStream.
        let socket = UnixStream::from(socket);
        socket.set_read_timeout(Some(limit))?;
        // A port process sends its status first.
        let Ok(Some((Message::Status(status), _))) = receive_passed(&socket, &closer) else {
            continue;
        };
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let serves = status.session || Note::open(dir)?.orphan().is_some();
        if comm.trim_end() != "adit-port" || serves {
            bail!(
                "`{name}` runs: process {pid} serves it, with a VMM connected; end that VM first"
            );
        }
        // It serves only the newest connection, and that may be one of aditd's by now: then try again.
        if send_all(&socket, &Message::Quit(Quit {}), &[]).is_ok() {
            // Wait until it has ended.
            while let Ok(Some(_)) = receive_passed(&socket, &closer) {}
        }
    }
}

/// The VM's entry in aditd. Drop removes it.
pub struct Registered(Option<Registration>);

impl Registered {
    /// Removes the entry.
    ///
    /// # Errors
    /// aditd does not answer: the entry stays.
    pub fn leave(&mut self) -> anyhow::Result<()> {
        let Some(registration) = self.0.take() else {
            return Ok(());
        };
        // With `force`, because the entry is `Held` by this process.
        let path = format!("/v1/vms/{}?force=true", registration.vm.name);
        registration.ask("DELETE", &path, b"").map(drop)
    }

    /// Keeps the entry: the VM is away only for a short time.
    pub fn keep(&mut self) {
        self.0 = None;
    }
}

impl Registration {
    /// The directory of the VM's port process. It is always below aditd's own, whatever the VM's name is.
    fn dir(&self) -> anyhow::Result<PathBuf> {
        let name: VmId = self.vm.name.parse()?;
        let run = self.aditd.parent().unwrap_or(Path::new("."));
        Ok(run.join("vm").join(name.as_str()))
    }

    /// Tells aditd about the VM. The VM's [`Handed`] must be answering already.
    ///
    /// # Errors
    /// aditd does not run, or refuses the VM.
    pub fn register(self) -> anyhow::Result<Registered> {
        let body = serde_json::to_vec(&self.vm)?;
        let (status, said) = self.ask("POST", "/v1/vms", &body)?;
        // aditd knows the VM from before a reboot, a kill or a restore: the entry and its tasks go on.
        let known = status == 409 && self.show().is_some_and(|vm| vm.cid == self.vm.cid);
        if status / 100 != 2 && !known {
            let why = serde_json::from_str::<ErrorBody>(&said).map_or(said, |e| e.message);
            bail!("aditd answers {status}: {}", why.escape_debug());
        }
        // Wait until aditd has found this process: a guest that continues dials again at once, and would be refused.
        let begin = Instant::now();
        while self.show().is_none_or(|vm| vm.state == VmState::Down) && begin.elapsed() < LINK_LIMIT
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Registered(Some(self)))
    }

    /// aditd's view of the VM.
    fn show(&self) -> Option<Vm> {
        let (_, said) = self
            .ask("GET", &format!("/v1/vms/{}", self.vm.name), b"")
            .ok()?;
        serde_json::from_str(&said).ok()
    }

    /// Sends a request. Returns status and body.
    fn ask(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<(u16, String)> {
        let no_aditd = || format!("no aditd at {}", self.aditd.display());
        let mut socket = UnixStream::connect(&self.aditd).with_context(no_aditd)?;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        write!(
            socket,
            "{method} {path} HTTP/1.1\r\nHost: aditd\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        socket.write_all(body)?;
        let mut answer = Vec::new();
        socket
            .take(ANSWER_MAX)
            .read_to_end(&mut answer)
            .with_context(no_aditd)?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status
            .with_context(|| format!("{} is not the socket of an aditd", self.aditd.display()))?;
        Ok((status, body.to_owned()))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Err(e) = self.leave() {
            tracing::warn!(error = %format!("{e:#}"), "the VM's entry in aditd was not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r116_a_name_that_is_a_path_leads_nowhere() {
        let named = |name: &str| Registration {
            aditd: "/run/adit/aditd.sock".into(),
            vm: NewVm {
                name: name.into(),
                cid: 3,
                allow: vec![],
                allow_vsock: vec![],
            },
        };
        let dir = named("web-1").dir().unwrap();
        assert_eq!(dir, Path::new("/run/adit/vm/web-1"));
        for name in ["..", ".", "../..", "/etc", "a/../../b", ""] {
            named(name).dir().unwrap_err();
        }
    }

    #[test]
    fn a_port_process_that_is_stopped_is_not_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("web-1");
        // It accepts no connection, and sends nothing on the one that the kernel accepted for it.
        let _mute = Place::take(&at).unwrap();
        let name = "web-1".parse().unwrap();
        let refused = || take(&at, &name, Duration::from_millis(20)).map(drop);
        let said = refused().unwrap_err().to_string();
        assert!(said.contains("already running"), "{said}");
        // The same when its backlog is full.
        let mut waiting = Vec::new();
        while let Ok(socket) = connect_control(&at) {
            waiting.push(socket);
        }
        let said = refused().unwrap_err().to_string();
        assert!(said.contains("already running"), "{said}");
    }
}
