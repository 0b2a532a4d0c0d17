//! How a VM's port gets a ring: somebody offers memory and doorbells, and the loop docks the carrier made of them.
//!
//! ```text
//! ring.sock      a VMM that speaks adit's attach protocol ──┐
//! ivshmem.sock   a stock QEMU, `-device ivshmem-doorbell` ──┼─► RingSender ── RingNews ──► the loop's Dock
//! a VMM that has the port in its own process ───────────────┘
//! ```
//! One thread serves both sockets, so a slow or hostile VMM delays only this VM's rings. The newest ring is the VM's. When an
//! older one ends, the newer one stays.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_channel::ring::{self, RingBells, RingCarrier, RingError};
use adit_names::VmId;
use adit_passed::Passed;
use adit_print::with_causes;
use adit_ringbuf::region::RegionError;
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::attach::{self, Bells, Code, Socket};
use adit_ringbuf_io::doorbell::{Doorbell, Waiter, from_passed};
use adit_ringbuf_io::ivshmem::{self, Alive, Given};
use adit_ringbuf_io::passed;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::control::RING_FDS;

/// How long a VMM may take for each of its messages.
const SAY_LIMIT: Duration = Duration::from_secs(2);

/// A ring's properties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingInfo {
    /// How it arrived, for people: `attach socket`, `ivshmem`, `PCI function`.
    pub path: &'static str,
    /// The kind of its memory, for people: `memfd`, `VMM's own`.
    pub memory: &'static str,
    /// Bytes of the region.
    pub bytes: u64,
    /// Time to read one cache line of it, ns.
    pub line_ns: u32,
}

/// News of a ring.
#[derive(Debug)]
pub enum RingNews {
    /// It was added.
    Came {
        /// Its number.
        id: u64,
        /// The host's end of it.
        carrier: Box<RingCarrier>,
        /// Its properties.
        info: RingInfo,
        /// What a successor of this process needs to continue with it: [`RING_FDS`] descriptors, or none if the VMM
        /// connects again by itself.
        kept: Vec<OwnedFd>,
    },
    /// It was removed.
    Went {
        /// Its number.
        id: u64,
        /// Why, for people.
        why: String,
    },
}

/// Where rings are offered.
#[derive(Clone, Debug)]
pub struct RingSender {
    news: Sender<RingNews>,
    bell: Arc<EventFd>,
    next: Arc<AtomicU64>,
    guest: GuestBell,
}

/// Where the loop receives them.
#[derive(Debug)]
pub struct RingInbox {
    news: Receiver<RingNews>,
    bell: Arc<EventFd>,
    guest: GuestBell,
}

/// The guest's doorbell: the one that its VMM gave, or a byte on a stream if the guest has no interrupt.
#[derive(Clone, Debug, Default)]
pub struct GuestBell(Arc<Mutex<Option<UnixStream>>>);

impl GuestBell {
    /// Uses bytes on this nonblocking stream from now on. `None`: uses the VMM's doorbell again.
    pub fn set(&self, stream: Option<UnixStream>) {
        *self.lock() = stream;
    }

    fn lock(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wraps a doorbell: uses it while there is no stream.
    fn before(&self, event: ring::BoxedDoorbell) -> ring::BoxedDoorbell {
        let bell = self.clone();
        Box::new(Either { event, bell })
    }
}

struct Either {
    event: ring::BoxedDoorbell,
    bell: GuestBell,
}

impl Doorbell for Either {
    fn ring(&self) -> io::Result<()> {
        match &*self.bell.lock() {
            None => self.event.ring(),
            Some(stream) => {
                // Full: a wake-up is pending. Closed: whoever reads from the stream finds out.
                let _ = { stream }.write(&[1]);
                Ok(())
            }
        }
    }
}

/// Makes both ends of a queue for rings.
///
/// # Errors
/// No descriptor is left.
pub fn channel() -> io::Result<(RingSender, RingInbox)> {
    let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    let bell = Arc::new(bell);
    let (tell, news) = mpsc::channel();
    let guest = GuestBell::default();
    let sender = RingSender {
        news: tell,
        bell: bell.clone(),
        next: Arc::default(),
        guest: guest.clone(),
    };
    Ok((sender, RingInbox { news, bell, guest }))
}

impl RingSender {
    /// Makes this memory a region and offers it to the guest, which has the memory too. Returns the ring's number, for
    /// [`detach`](Self::detach), and the region's epoch.
    ///
    /// # Errors
    /// The memory is too small, or there are no descriptors left.
    pub fn attach(
        &self,
        memory: Mapped,
        bells: Bells,
        path: &'static str,
        kind: &'static str,
    ) -> Result<(u64, u64), RingError> {
        self.attach_kept(memory, RingBells::of_host(bells), path, kind, Vec::new())
    }

    /// The same, if the guest has another doorbell than an eventfd.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_with(
        &self,
        memory: Mapped,
        bells: RingBells,
        path: &'static str,
        kind: &'static str,
    ) -> Result<(u64, u64), RingError> {
        self.attach_kept(memory, bells, path, kind, Vec::new())
    }

    fn attach_kept(
        &self,
        memory: Mapped,
        bells: RingBells,
        path: &'static str,
        kind: &'static str,
        kept: Vec<OwnedFd>,
    ) -> Result<(u64, u64), RingError> {
        let bytes = memory.len();
        let spec = ring::spec(bytes).ok_or(RegionError::Field {
            what: "bytes of the memory",
            value: bytes as u64,
            limit: ring::BYTES_MIN as u64,
        })?;
        // Higher than every epoch that any memory of this host has had.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let epoch = u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX);
        let info = RingInfo {
            path,
            memory: kind,
            bytes: bytes as u64,
            line_ns: ring::line_ns(&memory),
        };
        let bells = RingBells {
            data: self.guest.before(bells.data),
            space: self.guest.before(bells.space),
            ..bells
        };
        let carrier = RingCarrier::host(memory, spec, epoch, bells)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let carrier = Box::new(carrier);
        self.tell(RingNews::Came {
            id,
            carrier,
            info,
            kept,
        });
        Ok((id, epoch))
    }

    /// Removes the ring with this number.
    pub fn detach(&self, id: u64, why: &str) {
        let why = why.to_owned();
        self.tell(RingNews::Went { id, why });
    }

    fn tell(&self, news: RingNews) {
        // An error means that the loop has ended, and so does this process.
        let _ = self.news.send(news);
        let _ = self.bell.write(1);
    }
}

impl RingInbox {
    /// Readable when there is news.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The guest's doorbell, shared by all rings of this inbox.
    pub fn guest_bell(&self) -> GuestBell {
        self.guest.clone()
    }

    /// Returns the news since the last call.
    pub fn take(&self) -> Vec<RingNews> {
        let _ = self.bell.read();
        self.news.try_iter().collect()
    }
}

/// The two sockets of a VM's directory.
#[derive(Debug)]
pub struct RingSockets {
    vm: VmId,
    attach: attach::Listener,
    ivshmem: ivshmem::Server,
    ivshmem_bytes: usize,
    out: RingSender,
    /// The VMM on the attach socket, and its ring's number.
    attached: Option<(Socket, u64)>,
    /// The number of the ring of the ivshmem socket's client.
    given: Option<u64>,
}

impl RingSockets {
    /// Takes bound sockets.
    ///
    /// # Errors
    /// One of them cannot be made nonblocking.
    pub fn new(
        vm: VmId,
        attach: attach::Listener,
        ivshmem: UnixListener,
        ivshmem_bytes: usize,
        out: RingSender,
    ) -> io::Result<Self> {
        let ivshmem = ivshmem::Server::new(ivshmem, ivshmem_bytes).map_err(io::Error::other)?;
        Ok(Self {
            vm,
            attach,
            ivshmem,
            ivshmem_bytes,
            out,
            attached: None,
            given: None,
        })
    }

    /// Continues with the QEMU of a process that was killed. `left` is what that process kept of its ring, or empty. If it is
    /// unusable, other VMMs are still served.
    pub fn resume(&mut self, left: Vec<Passed>) {
        if left.is_empty() {
            return;
        }
        if let Err(e) = self.take_up(left) {
            tracing::error!(error = %with_causes(&*e), "the predecessor's ring cannot be used");
        }
    }

    fn take_up(
        &mut self,
        left: Vec<Passed>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let left: Result<[Passed; RING_FDS], _> = left.try_into();
        let [
            vmm,
            memory_fd,
            guest_data,
            guest_space,
            host_data,
            host_space,
        ] = left.map_err(|_| "it has the wrong number of descriptors")?;
        let memory_fd = memory_fd.memory()?;
        let memory = Mapped::from_memfd(memory_fd.try_clone()?, self.ivshmem_bytes)?;
        let bells = Bells {
            guest_data: from_passed(guest_data)?,
            guest_space: from_passed(guest_space)?,
            host_data: from_passed(host_data)?,
            host_space: from_passed(host_space)?,
        };
        self.ivshmem.resume(vmm.unix_stream()?);
        self.give(Given {
            memory,
            memory_fd,
            bells,
        })
    }

    /// Makes a ring from what the ivshmem socket's client has.
    fn give(&mut self, given: Given) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let vmm = self.ivshmem.client().ok_or("its VMM is gone")?;
        let mut kept = vec![vmm.try_clone_to_owned()?, given.memory_fd];
        let bells = &given.bells;
        for bell in [
            &bells.guest_data,
            &bells.guest_space,
            &bells.host_data,
            &bells.host_space,
        ] {
            let fd = bell.fd().ok_or("a doorbell without a descriptor")?;
            kept.push(fd.try_clone_to_owned()?);
        }
        let (memory, bells) = (given.memory, RingBells::of_host(given.bells));
        let made = self
            .out
            .attach_kept(memory, bells, "ivshmem", "memfd", kept)?;
        self.given = Some(made.0);
        Ok(())
    }

    /// Serves both sockets on a thread until the process ends.
    ///
    /// # Errors
    /// No thread can be created.
    pub fn spawn(mut self) -> io::Result<()> {
        // Must be first: this process may give up the right to create threads.
        passed::prepare();
        let run = move || {
            while let Err(e) = self.turn() {
                // A shortage may pass. Trying again at once would spin.
                tracing::warn!(error = %e, "the ring's sockets cannot be served; trying again");
                std::thread::sleep(SAY_LIMIT);
            }
        };
        std::thread::Builder::new()
            .name("rings".into())
            .spawn(run)?;
        Ok(())
    }

    /// Serves both sockets. Returns only on an error.
    fn turn(&mut self) -> io::Result<()> {
        loop {
            let attached = self.attached.as_ref().map(|(socket, _)| socket.as_fd());
            let waited = [
                Some(self.attach.as_fd()),
                Some(self.ivshmem.listener()),
                attached,
                self.ivshmem.client(),
            ];
            let fds = waited.into_iter().flatten();
            let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(true));
            let mut next = |there: bool| there && ready.next().unwrap_or(false);
            let [knocks, looks_in] = [next(true), next(true)];
            let speaks = next(attached.is_some());
            let stirs = next(self.ivshmem.client().is_some());
            drop(fds);
            if speaks {
                self.attached_speaks();
            }
            if stirs {
                self.client_stirs();
            }
            if knocks {
                self.knocked()?;
            }
            if looks_in {
                self.client_knocks()?;
            }
        }
    }

    // ---- the attach socket

    fn knocked(&mut self) -> io::Result<()> {
        let socket = self.attach.accept()?;
        socket.answer_within(SAY_LIMIT)?;
        match self.converse(socket) {
            Ok(attached) => self.attached = Some(attached),
            Err(e) => tracing::warn!(error = %with_causes(&*e), "ring refused"),
        }
        Ok(())
    }

    fn converse(
        &self,
        socket: Socket,
    ) -> Result<(Socket, u64), Box<dyn std::error::Error + Send + Sync>> {
        let offered = socket.offered()?;
        if offered.offer.vm != self.vm.as_str() {
            let said = format!("this is the socket of `{}`", self.vm);
            let other = offered.offer.vm.clone();
            offered.refuse(Code::UnknownVm, &said)?;
            return Err(format!("it was meant for `{}`", adit_names::escape(&other)).into());
        }
        if self.attached.is_some() {
            offered.refuse(Code::Busy, "the VM has a ring already")?;
            return Err("a second VMM came with one".into());
        }
        let bells = offered.bells.try_clone()?;
        let made = self
            .out
            .attach(offered.memory.clone(), bells, "attach socket", "memfd");
        let (id, epoch) = match made {
            Ok(made) => made,
            Err(e) => {
                offered.refuse(Code::Memory, &with_causes(&e))?;
                return Err(e.into());
            }
        };
        match offered.accept(epoch) {
            Ok((socket, _, _)) => Ok((socket, id)),
            Err(e) => {
                self.out.detach(
                    id,
                    "its VMM closed the connection before the ring was accepted",
                );
                Err(e.into())
            }
        }
    }

    fn attached_speaks(&mut self) {
        if let Some((socket, id)) = self.attached.take() {
            self.out.detach(id, &with_causes(&socket.wait()));
        }
    }

    // ---- the ivshmem socket

    fn client_knocks(&mut self) -> io::Result<()> {
        loop {
            match self.ivshmem.accept() {
                Ok(None) => return Ok(()),
                Ok(Some(given)) => {
                    self.client_gone("another VMM connected");
                    if let Err(e) = self.give(given) {
                        tracing::warn!(error = %with_causes(&*e), "cannot make a ring for the ivshmem client");
                    }
                }
                Err(ivshmem::IvshmemError::Io(e)) => return Err(e),
                Err(e) => tracing::warn!(error = %with_causes(&e), "ivshmem client refused"),
            }
        }
    }

    fn client_stirs(&mut self) {
        match self.ivshmem.look() {
            Ok(Alive::Yes) => {}
            Ok(Alive::No) => self.client_gone("its VMM is gone"),
            Err(e) => self.client_gone(&with_causes(&e)),
        }
    }

    fn client_gone(&mut self, why: &str) {
        if let Some(id) = self.given.take() {
            self.out.detach(id, why);
        }
    }
}
