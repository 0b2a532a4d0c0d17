//! What needs root, one VM at a time: a user, a cgroup and a directory of its own, its port process, its place in the descriptor
//! store.
//!
//! Whoever asks is not trusted (`server`), or is the same process (run without root). So a path is made of the run
//! directory and a name, a user is one of the range, and only a process that aditd started for that VM is ended.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use adit_names::VmId;
use adit_passed::{Apart, Closer, Passed};
use adit_port::control::{CONTROL_SOCKET, Quit};
use adit_port::control_io::{self, send};
use tokio::time::Instant;

use super::discover::Discover;
use super::outward::Outward;
use super::port_log;
use super::room;
use super::store::{Pair, Store};
use super::wire::{LastWords, NotReached, Start, StartHybrid};
use crate::arguments;
use crate::cgroup::Cgroups;
use crate::config::{CarrierConfig, Config, Hybrid, VMS_MAX, VmConfig, vm_dir};
use crate::guests::{self, NoListener};
use crate::spawn::{self, Spawner};
use crate::uids::Uids;
use crate::vm_dir::{self, LeftError};
use crate::whose::PortProcess;

/// Names that are known at the same time: those of all VMs, and of as many that were removed and whose directories stay.
pub const NAMES_MAX: usize = 2 * VMS_MAX;
/// How long a new port process may take until it answers, and one that does not serve until it has ended.
const START_LIMIT: Duration = Duration::from_secs(10);
/// A port process is looked for so often while it starts.
const START_LOOK: Duration = Duration::from_millis(10);
/// Descriptors of one VM that may wait to be closed.
const CLOSING_MAX: usize = 8;

/// Why something that was asked for is not done.
#[derive(Debug, thiserror::Error)]
pub enum NotDone {
    /// [`NAMES_MAX`].
    #[error(
        "there are {NAMES_MAX} VMs and directories of removed VMs already: remove some of the directories"
    )]
    TooMany,
    /// A setting has a value that no configuration may have.
    #[error("`{key}`: {why}")]
    Setting {
        /// Which.
        key: &'static str,
        /// Why not.
        why: String,
    },
    /// The system refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The directory stays.
    #[error(transparent)]
    Left(#[from] LeftError),
    /// Guests cannot reach this host through its kernel.
    #[error(transparent)]
    Guests(#[from] NoListener),
}

/// A connection to a port process.
#[derive(Debug)]
pub struct Connected {
    /// The control socket. Whatever waits in it comes from a guest's port process.
    pub socket: Passed,
    /// Its process id.
    pub pid: u32,
    /// Whether aditd started it.
    pub ours: bool,
    /// Its command line, if it was there already.
    pub found: Option<Vec<u8>>,
}

/// Does what needs root.
#[derive(Debug)]
pub struct Privileged {
    /// Starts port processes.
    spawner: Arc<Spawner>,
    /// The users that port processes run as; none: aditd's own.
    uids: Option<Uids>,
    /// Where their cgroups are; none: they stay in aditd's.
    cgroups: Option<Cgroups>,
    run_dir: PathBuf,
    store: Store,
    /// Every VM has a pair, also where no systemd holds it.
    keeps_pairs: bool,
    vms: Mutex<HashMap<VmId, Arc<Entry>>>,
    /// Other hosts.
    pub outward: Outward,
    /// Directories with VMMs' sockets.
    pub discover: Discover,
    /// The listener that guests reach through the host's kernel: that of an earlier aditd, or one of its own once a worker has asked for it.
    /// Whoever dials while there is no worker, or no monitor under systemd, waits in it.
    guests: Mutex<Option<OwnedFd>>,
}

/// One VM.
#[derive(Debug)]
struct Entry {
    closer: Closer,
    pair: Mutex<Option<Pair>>,
    /// This worker has asked for it.
    asked: AtomicBool,
    /// It was removed: a start that is under way is given up.
    left: AtomicBool,
    /// Held while its port process is looked for or started, and while its directory goes.
    busy: tokio::sync::Mutex<()>,
    process: Mutex<Option<Arc<PortProcess>>>,
    started: Mutex<Option<Started>>,
}

/// The port process that was started last.
#[derive(Clone, Debug)]
struct Started {
    ended: tokio::sync::watch::Receiver<Option<ExitStatus>>,
    /// Where what it says begins in the log.
    from: u64,
}

impl Privileged {
    /// Puts the parts together. `keeps_pairs`: there is a worker that may die before this process.
    pub fn new(
        run_dir: PathBuf,
        spawner: Arc<Spawner>,
        uids: Option<Uids>,
        cgroups: Option<Cgroups>,
        store: Store,
        keeps_pairs: bool,
    ) -> Arc<Self> {
        let guests = store.guests();
        Arc::new(Self {
            spawner,
            uids,
            cgroups,
            run_dir,
            keeps_pairs,
            store,
            vms: Mutex::default(),
            outward: Outward::default(),
            discover: Discover::default(),
            guests: Mutex::new(guests),
        })
    }

    /// Knows the other hosts and the directories of this configuration from now on.
    pub fn set(&self, config: &Config) {
        self.outward.set(config);
        self.discover.set(config);
    }

    /// Returns both ends of a VM's pair; `None`: there is no store.
    ///
    /// # Errors
    /// No pair can be made.
    pub fn slot(&self, vm: &VmId) -> Result<Option<[OwnedFd; 2]>, NotDone> {
        let entry = self.entry(vm)?;
        entry.asked.store(true, Ordering::Relaxed);
        if !self.keeps_pairs && !self.store.is_on() {
            return Ok(None);
        }
        let mut pair = lock(&entry.pair);
        if pair.is_none() {
            self.has_room()?;
            *pair = Some(self.store.pair(vm.as_str(), &entry.closer)?);
        }
        let Some(pair) = &*pair else { return Ok(None) };
        let [send, receive] = pair.ends();
        let ends = [send.try_clone_to_owned()?, receive.try_clone_to_owned()?];
        Ok(Some(ends))
    }

    /// Returns the listener that guests reach through the host's kernel.
    ///
    /// # Errors
    /// It cannot be made, and what to do.
    pub fn guests(&self) -> Result<OwnedFd, NotDone> {
        let mut guests = lock(&self.guests);
        let listener = match guests.take() {
            Some(listener) => listener,
            None => {
                let made = guests::listen()?;
                if let Err(error) = self.store.keep_guests(made.as_fd()) {
                    tracing::warn!(%error, "the listener for guests is not kept over the end of this aditd");
                }
                made
            }
        };
        Ok(guests.insert(listener).try_clone()?)
    }

    /// Keeps a pair that a worker has which this monitor did not start.
    ///
    /// # Errors
    /// It is no pair of sockets, or there are too many VMs.
    pub fn keep(&self, vm: &VmId, ends: Vec<Passed>) -> Result<(), NotDone> {
        let entry = self.entry(vm)?;
        entry.asked.store(true, Ordering::Relaxed);
        let mut sockets = Vec::new();
        for end in ends {
            sockets.push(Passed::new(
                end.unix_packets()?.into_inner()?,
                &entry.closer,
            ));
        }
        let two = <[Passed; 2]>::try_from(sockets);
        let two = two.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut pair = lock(&entry.pair);
        if pair.is_none() {
            self.has_room()?;
            // Those that systemd holds are the same sockets.
            let left = self.store.has_left(vm.as_str());
            *pair = Some(match left {
                true => self.store.pair(vm.as_str(), &entry.closer)?,
                false => self.store.keep(vm.as_str(), two)?,
            });
        }
        Ok(())
    }

    /// A new worker begins: it has asked for nothing yet.
    pub fn begin(&self) {
        for entry in self.vms().values() {
            entry.asked.store(false, Ordering::Relaxed);
        }
    }

    /// Forgets what is kept for VMs that were not asked for since [`begin`](Self::begin).
    pub fn forget_others(&self) {
        self.vms().retain(|vm, entry| {
            let asked = entry.asked.load(Ordering::Relaxed);
            if !asked && let Some(pair) = lock(&entry.pair).take() {
                tracing::info!(%vm, "closed what was kept for a VM that no longer exists");
                pair.remove();
            }
            asked || entry.left.load(Ordering::Relaxed)
        });
        self.store.forget_others();
    }

    /// Connects to the port process that is there, or to a new one, whose standard input is `left`.
    ///
    /// # Errors
    /// There is none, and why.
    pub async fn reach(
        self: Arc<Self>,
        vm: VmId,
        start: Start,
        left: Option<Apart<OwnedFd>>,
    ) -> Result<Connected, NotReached> {
        let failed = |e: NotDone| NotReached {
            text: e.to_string(),
            ended: None,
        };
        let entry = self.entry(&vm).map_err(failed)?;
        start.check(&vm).map_err(failed)?;
        let _busy = entry.busy.lock().await;
        entry.asked.store(true, Ordering::Relaxed);
        entry.left.store(false, Ordering::Relaxed);
        match self.find(&vm, &entry) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(e) => return Err(failed(e.into())),
        }
        self.start(&vm, &entry, &start, left).await
    }

    fn find(&self, vm: &VmId, entry: &Entry) -> io::Result<Option<Connected>> {
        let (own, dir) = (self.own(vm)?, vm_dir(&self.run_dir, vm));
        let Ok(socket) = connect(&dir, &entry.closer) else {
            return Ok(None);
        };
        let Some(process) = PortProcess::behind(socket.as_fd(), &dir, own, None)? else {
            return Ok(None);
        };
        tracing::info!(%vm, pid = process.pid(), "port process found");
        let found = Some(arguments::line_of(process.pid()));
        let (pid, ours) = (process.pid(), process.is_ours());
        *lock(&entry.process) = Some(Arc::new(process));
        *lock(&entry.started) = None;
        Ok(Some(Connected {
            socket,
            pid,
            ours,
            found,
        }))
    }

    async fn start(
        &self,
        vm: &VmId,
        entry: &Entry,
        start: &Start,
        left: Option<Apart<OwnedFd>>,
    ) -> Result<Connected, NotReached> {
        let failed = |e: io::Error| NotReached {
            text: e.to_string(),
            ended: None,
        };
        let (started, own) = self.spawn(vm, entry, start, left).await.map_err(failed)?;
        let dir = vm_dir(&self.run_dir, vm);
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match connect(&dir, &entry.closer) {
                Ok(socket) => {
                    let behind = PortProcess::behind(socket.as_fd(), &dir, own, Some(&started));
                    if let Some(process) = behind.map_err(failed)? {
                        let (pid, ours, found) = (process.pid(), process.is_ours(), None);
                        *lock(&entry.process) = Some(Arc::new(process));
                        return Ok(Connected {
                            socket,
                            pid,
                            ours,
                            found,
                        });
                    }
                }
                Err(e) if Instant::now() >= deadline => return Err(failed(e)),
                Err(_) => {}
            }
            if Instant::now() >= deadline {
                let at = dir.join(CONTROL_SOCKET);
                let at = at.display();
                let text = format!("who listens at {at} is not the port process that was started");
                return Err(failed(io::Error::new(io::ErrorKind::TimedOut, text)));
            }
            if entry.left.load(Ordering::Relaxed) {
                // It may be hanging, and nobody would ever know it again.
                started.end_within(Duration::ZERO).await;
                return Err(failed(io::Error::other("the VM was removed")));
            }
            if let Some(words) = self.words(vm, entry) {
                let (text, ended) = (String::new(), Some(words));
                return Err(NotReached { text, ended });
            }
            tokio::time::sleep(START_LOOK).await;
        }
    }

    async fn spawn(
        &self,
        vm: &VmId,
        entry: &Entry,
        start: &Start,
        left: Option<Apart<OwnedFd>>,
    ) -> io::Result<(PortProcess, Option<u32>)> {
        self.has_room()?;
        let (own, dir) = (self.own(vm)?, vm_dir(&self.run_dir, vm));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)?;
        let stderr = port_log::file(&dir)?;
        let from = stderr.metadata()?.len();
        let mut command = self.spawner.command();
        command
            .args(left.as_ref().map(|_| "--resume"))
            .arg("--name")
            .arg(vm.as_str())
            .arg("--cid")
            .arg(start.cid.to_string())
            .arg("--dir")
            .arg(&dir)
            .arg("--busy-poll-us")
            .arg(start.busy_poll_us.to_string())
            .arg("--ivshmem-mib")
            .arg(start.ivshmem_mib.to_string())
            .args(start.allow_any_memory.then_some("--allow-any-memory"))
            .args(start.hybrid.iter().flat_map(|h| {
                let half_closes = h.half_closes.then_some(OsStr::new("--half-closes"));
                [OsStr::new("--hybrid"), h.path.as_os_str()]
                    .into_iter()
                    .chain(half_closes)
            }))
            .args(start.kernel.then_some("--vsock"))
            .args(start.auto.then_some("--auto"))
            .args(own.map(|own| format!("--uid={own}")))
            // Nothing of what aditd was told, by systemd or by a person, is its business.
            .env_clear()
            // Not the terminal's group: Ctrl-C ends aditd, and not the VMs' channels.
            .process_group(0);
        // Its log is a file: a pipe that nobody reads any more would stop it.
        let stdin = left.as_ref().map(|left| left.try_clone()).transpose()?;
        let child = self.spawner.spawn(command, stdin, stderr.into()).await;
        // Closed by its closer, and after every copy: what waits in it may be any descriptor.
        drop(left);
        let mut child = child.map_err(|e| {
            let binary = self.spawner.binary().display();
            io::Error::new(e.kind(), format!("cannot start {binary}: {e}"))
        })?;
        // Its number is its own until it is waited for.
        if let Some(cgroups) = &self.cgroups
            && let Err(e) = cgroups.enter(vm.as_str(), child.id())
        {
            tracing::warn!(%vm, error = %e, "the port process stays in aditd's cgroup");
        }
        let (started, pidfd) = match PortProcess::started(child.id()) {
            Ok(started) => started,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e);
            }
        };
        let (tell, ended) = tokio::sync::watch::channel(None);
        // Reaped when it ends, should this process still be there.
        tokio::spawn(async move {
            match spawn::reap(child, pidfd).await {
                Ok(status) => drop(tell.send_replace(Some(status))),
                Err(e) => tracing::warn!(error = %e, "cannot wait for a port process"),
            }
        });
        *lock(&entry.started) = Some(Started { ended, from });
        Ok((started, own))
    }

    /// How the port process that was started last has ended; none: it has not.
    fn words(&self, vm: &VmId, entry: &Entry) -> Option<LastWords> {
        let started = lock(&entry.started).clone()?;
        let status = (*started.ended.borrow())?.into_raw();
        let dir = vm_dir(&self.run_dir, vm);
        Some(LastWords {
            status,
            log: port_log::tail(&dir, started.from).unwrap_or_default(),
            disk_full: crate::disk::is_full(&dir),
        })
    }

    /// How the port process that was started last has ended; waits for it a while. None: it has not, or there was none.
    ///
    /// # Errors
    /// There are too many VMs.
    pub async fn ended(&self, vm: &VmId) -> Result<Option<LastWords>, NotDone> {
        let entry = self.entry(vm)?;
        let started = lock(&entry.started).clone();
        let Some(mut started) = started else {
            return Ok(None);
        };
        let ended = started.ended.wait_for(Option::is_some);
        let _ = tokio::time::timeout(START_LIMIT, ended).await;
        Ok(self.words(vm, &entry))
    }

    /// Sees to it that a VM's port process ends, if it is this one and aditd's own.
    ///
    /// # Errors
    /// There are too many VMs, or the system refuses.
    pub async fn end(&self, vm: &VmId, pid: u32, within: Duration) -> Result<(), NotDone> {
        let entry = self.entry(vm)?;
        let known = lock(&entry.process).clone();
        let process = match known {
            Some(process) => Some(process),
            // It was found by an earlier monitor.
            None => {
                let own = self.own(vm)?;
                let noted = own.map(|own| PortProcess::noted(&vm_dir(&self.run_dir, vm), own));
                noted.transpose()?.flatten().map(Arc::new)
            }
        };
        if let Some(process) = process.filter(|process| process.pid() == pid) {
            process.end_within(within).await;
        }
        Ok(())
    }

    /// Cuts the log of a VM's port process if it is too long.
    ///
    /// # Errors
    /// As the file system says.
    pub fn shorten(&self, vm: &VmId) -> Result<(), NotDone> {
        Ok(port_log::shorten(&vm_dir(&self.run_dir, vm))?)
    }

    /// The VM's port process has gone.
    pub fn gone(&self, vm: &VmId) {
        if let Some(cgroups) = &self.cgroups {
            cgroups.leave(vm.as_str());
        }
    }

    /// The VM was removed: ends whoever still listens in its directory, and keeps nothing for it.
    ///
    /// # Errors
    /// There are too many VMs.
    pub async fn leave(&self, vm: &VmId) -> Result<(), NotDone> {
        let entry = self.entry(vm)?;
        entry.left.store(true, Ordering::Relaxed);
        let _busy = entry.busy.lock().await;
        // One that nobody was connected to, or that was not taken for this VM's, holds its directory.
        if let Ok(socket) = connect(&vm_dir(&self.run_dir, vm), &entry.closer) {
            // It ends by itself, whatever else it is saying.
            let _ = send(&socket, &control_io::Message::Quit(Quit {}), None);
        }
        if let Some(pair) = lock(&entry.pair).take() {
            pair.remove();
        }
        (*lock(&entry.process), *lock(&entry.started)) = (None, None);
        if let Some(uids) = &self.uids {
            uids.leave(vm.as_str());
        }
        Ok(())
    }

    /// Removes the directory of a VM that has [left](Self::leave).
    ///
    /// # Errors
    /// It stays, or some of it.
    pub async fn remove_dir(&self, vm: &VmId) -> Result<(), NotDone> {
        let entry = self.entry(vm)?;
        let _busy = entry.busy.lock().await;
        vm_dir::remove(&self.run_dir, vm).await?;
        if entry.left.load(Ordering::Relaxed) {
            self.vms().remove(vm);
        }
        Ok(())
    }

    /// The next worker can be started, whatever this one asked for.
    fn has_room(&self) -> io::Result<()> {
        match self.keeps_pairs {
            true => room::for_a_vm(),
            // Who serves clients leaves room for VMs.
            false => Ok(()),
        }
    }

    /// The VM's own user, and its directory.
    fn own(&self, vm: &VmId) -> io::Result<Option<u32>> {
        let own = self.uids.as_ref().map(|uids| uids.of(vm.as_str()));
        own.transpose()
    }

    fn entry(&self, vm: &VmId) -> Result<Arc<Entry>, NotDone> {
        let mut vms = self.vms();
        if let Some(entry) = vms.get(vm) {
            return Ok(entry.clone());
        }
        if vms.len() >= NAMES_MAX {
            return Err(NotDone::TooMany);
        }
        let entry = Arc::new(Entry {
            closer: Closer::new(CLOSING_MAX),
            pair: Mutex::default(),
            asked: AtomicBool::new(true),
            left: AtomicBool::new(false),
            busy: tokio::sync::Mutex::default(),
            process: Mutex::default(),
            started: Mutex::default(),
        });
        vms.insert(vm.clone(), entry.clone());
        Ok(entry)
    }

    fn vms(&self) -> MutexGuard<'_, HashMap<VmId, Arc<Entry>>> {
        lock(&self.vms)
    }
}

impl Start {
    /// Whether a configuration may have these values.
    fn check(&self, vm: &VmId) -> Result<(), NotDone> {
        let mut config = VmConfig::new(vm.clone(), self.cid);
        config.busy_poll_us = self.busy_poll_us;
        config.ivshmem_mib = self.ivshmem_mib;
        if let Some(StartHybrid { path, half_closes }) = self.hybrid.clone() {
            let hybrid = path;
            config.carrier = CarrierConfig::Hybrid(Hybrid {
                hybrid,
                half_closes,
            });
        }
        if self.kernel && !self.auto {
            // One that is too high is found below.
            let cid = u32::try_from(self.cid).unwrap_or(u32::MAX);
            config.carrier = CarrierConfig::of_kernel(cid);
        }
        let checked = config.check();
        checked.map_err(|(key, why)| NotDone::Setting { key, why })
    }
}

/// Connects to whoever serves a VM. What it passes is closed by the closer, also with the socket.
fn connect(dir: &Path, closer: &Closer) -> io::Result<Passed> {
    let socket = control_io::connect(&dir.join(CONTROL_SOCKET))?;
    Ok(Passed::new(socket, closer))
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
