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
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_api::{NewVm, Vm, VmState};
use adit_channel::carrier::Carrier;
use adit_channel::hello;
use adit_channel::live::LiveFile;
use adit_client::ClientError;
use adit_client::blocking::Client;
use adit_names::VmId;
use adit_passed::Closer;
use anyhow::bail;
use nix::fcntl::Flock;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::de::IgnoredAny;

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
        // A port process says what it knows, and then its status, before anything else.
        let mut said = receive_passed(&socket, &closer);
        if let Ok(Some((Message::Features(_), _))) = said {
            said = receive_passed(&socket, &closer);
        }
        let Ok(Some((Message::Status(status), _))) = said else {
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
    /// aditd does not answer, or refuses: the entry stays.
    pub fn leave(&mut self) -> anyhow::Result<()> {
        let Some(registration) = self.0.take() else {
            return Ok(());
        };
        // With `force`, because the entry is `Held` by this process.
        let path = format!("/v1/vms/{}?force=true", registration.vm.name);
        match registration.aditd()?.delete(&path) {
            // Somebody else has removed it.
            Err(ClientError::Refused { status: 404, .. }) => Ok(()),
            removed => Ok(removed?),
        }
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
        let aditd = self.aditd()?;
        match aditd.post::<IgnoredAny>("/v1/vms", &self.vm) {
            Ok(_) => {}
            // aditd knows the VM from before a reboot, a kill or a restore: the entry and its tasks go on.
            Err(ClientError::Refused { status: 409, .. })
                if self.show(&aditd).is_some_and(|vm| vm.cid == self.vm.cid) => {}
            Err(ClientError::Refused { status, said }) => {
                bail!(
                    "aditd answers {status}: {}",
                    adit_names::escape(&said.message)
                )
            }
            Err(e) => return Err(e.into()),
        }
        // Wait until aditd has found this process: a guest that continues dials again at once, and would be refused.
        let begin = Instant::now();
        let is_down = || self.show(&aditd).is_none_or(|vm| vm.state == VmState::Down);
        while is_down() && begin.elapsed() < LINK_LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Registered(Some(self)))
    }

    fn aditd(&self) -> anyhow::Result<Client> {
        Ok(Client::new(&self.aditd, ANSWER_LIMIT)?)
    }

    /// aditd's view of the VM.
    fn show(&self, aditd: &Client) -> Option<Vm> {
        aditd.get(&format!("/v1/vms/{}", self.vm.name)).ok()
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
        let named = |name: &str| {
            let mut with = registration("/run/adit/aditd.sock".into());
            with.vm.name = name.into();
            with
        };
        let dir = named("web-1").dir().unwrap();
        assert_eq!(dir, Path::new("/run/adit/vm/web-1"));
        for name in ["..", ".", "../..", "/etc", "a/../../b", ""] {
            named(name).dir().unwrap_err();
        }
    }

    /// An aditd that gives these answers, one after the other. Returns its socket and the requests' first lines.
    fn aditd(
        dir: &Path,
        answers: &'static [(u16, &str)],
    ) -> (PathBuf, std::thread::JoinHandle<Vec<String>>) {
        use std::io::{BufRead, BufReader, Write};
        let socket = dir.join("aditd.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let answer = move |&(status, body): &(u16, &str)| {
            let (mut stream, _) = listener.accept().unwrap();
            let head = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = head
                .map(Result::unwrap)
                .take_while(|l| !l.is_empty())
                .collect();
            let len = body.len();
            write!(
                stream,
                "HTTP/1.1 {status} x\r\nContent-Length: {len}\r\n\r\n{body}"
            )
            .unwrap();
            head[0].clone()
        };
        let served = std::thread::spawn(move || answers.iter().map(answer).collect());
        (socket, served)
    }

    fn registration(aditd: PathBuf) -> Registration {
        let vm = NewVm {
            name: "web-1".into(),
            cid: 3,
            carrier: None,
            allow: vec![],
            allow_vsock: vec![],
            allow_services: vec![],
        };
        Registration { aditd, vm }
    }

    #[test]
    fn a_refused_registration_says_why_and_an_entry_that_is_gone_needs_no_removal() {
        let dir = tempfile::tempdir().unwrap();
        const TAKEN: &str = r#"{"code": "taken", "message": "the CID is\ntaken", "help": ""}"#;
        const UNKNOWN: &str = r#"{"code": "unknown-vm", "message": "gone", "help": ""}"#;
        let (socket, served) = aditd(
            dir.path(),
            &[(409, TAKEN), (404, UNKNOWN), (404, UNKNOWN), (500, UNKNOWN)],
        );
        // The name is known, and not with this CID.
        let refused = registration(socket.clone()).register().map(drop);
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("409") && !said.contains('\n'), "{said}");
        Registered(Some(registration(socket.clone())))
            .leave()
            .unwrap();
        Registered(Some(registration(socket))).leave().unwrap_err();
        let requests = served.join().unwrap();
        let remove = "DELETE /v1/vms/web-1?force=true HTTP/1.1";
        let show = "GET /v1/vms/web-1 HTTP/1.1";
        assert_eq!(requests, ["POST /v1/vms HTTP/1.1", show, remove, remove]);
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
