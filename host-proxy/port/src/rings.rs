//! How a ring comes to a VM's port: somebody hands memory and doorbells over, and the loop docks what was made of them.
//!
//! ```text
//! ring.sock      a VMM that speaks adit's attach protocol ──┐
//! ivshmem.sock   a stock QEMU, `-device ivshmem-doorbell` ──┼─► RingSender ── RingNews ──► the loop's Dock
//! a VMM that has the port in its own process ───────────────┘
//! ```
//! Both sockets are served by a thread of their own, so that a VMM that is slow, or hostile, keeps nobody but itself
//! waiting. The last ring that came is the VM's; one that goes takes only itself away.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_channel::ring::{self, RingBells, RingCarrier, RingError};
use adit_passed::Passed;
use adit_ringbuf::region::RegionError;
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::attach::{self, Bells, Code, Socket};
use adit_ringbuf_io::doorbell::{Doorbell, Waiter, from_passed};
use adit_ringbuf_io::ivshmem::{self, Alive, Given};
use adit_ringbuf_io::passed;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::chain;
use crate::control::RING_FDS;

/// How long a VMM may take for each thing that it has to say.
const SAY_LIMIT: Duration = Duration::from_secs(2);

/// What is known of a ring besides what it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingInfo {
    /// The way that it came, for people: `attach socket`, `ivshmem`, `PCI function`.
    pub path: &'static str,
    /// What its memory is, for people: `memfd`, `VMM's own`.
    pub memory: &'static str,
    /// Bytes of the region.
    pub bytes: u64,
    /// What a read of a line of it takes, ns.
    pub line_ns: u32,
}

/// What came of a ring.
#[derive(Debug)]
pub enum RingNews {
    /// It is there.
    Came {
        /// Which.
        id: u64,
        /// The host's end of it.
        carrier: Box<RingCarrier>,
        /// What it is.
        info: RingInfo,
        /// What a successor of this process needs to go on with it: [`RING_FDS`] descriptors, or none where the VMM
        /// comes again by itself.
        kept: Vec<OwnedFd>,
    },
    /// It is not any more.
    Went {
        /// Which.
        id: u64,
        /// Why, for people.
        why: String,
    },
}

/// Where rings are handed in.
#[derive(Clone, Debug)]
pub struct RingSender {
    news: Sender<RingNews>,
    bell: Arc<EventFd>,
    next: Arc<AtomicU64>,
    guest: GuestBell,
}

/// Where they come out.
#[derive(Debug)]
pub struct RingInbox {
    news: Receiver<RingNews>,
    bell: Arc<EventFd>,
    guest: GuestBell,
}

/// Rings the guest: by what its VMM gave, or by a byte on a stream where the guest has no interrupt.
#[derive(Clone, Debug, Default)]
pub struct GuestBell(Arc<Mutex<Option<UnixStream>>>);

impl GuestBell {
    /// From now on by bytes on this stream, which is nonblocking; or no longer.
    pub fn set(&self, stream: Option<UnixStream>) {
        *self.lock() = stream;
    }

    fn lock(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts itself before a doorbell.
    fn before(&self, event: ring::Ring) -> ring::Ring {
        let bell = self.clone();
        Box::new(Either { event, bell })
    }
}

struct Either {
    event: ring::Ring,
    bell: GuestBell,
}

impl Doorbell for Either {
    fn ring(&self) -> io::Result<()> {
        match &*self.bell.lock() {
            None => self.event.ring(),
            Some(stream) => {
                // Full: it has rung. At its end: its reader tells.
                let _ = { stream }.write(&[1]);
                Ok(())
            }
        }
    }
}

/// Both ends of the way.
///
/// # Errors
/// There is no descriptor to be had.
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
    /// Makes memory a region of this VM and offers it to the guest that has it. Returns the ring's number, for
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

    /// The same where the guest is rung by more than an eventfd.
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
        // Above every epoch that any memory of this host has had.
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

    /// The ring's memory is nobody's any more.
    pub fn detach(&self, id: u64, why: &str) {
        let why = why.to_owned();
        self.tell(RingNews::Went { id, why });
    }

    fn tell(&self, news: RingNews) {
        // The loop is gone: so is this process.
        let _ = self.news.send(news);
        let _ = self.bell.write(1);
    }
}

impl RingInbox {
    /// Readable when something came.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// What rings the guest of every ring that comes out of here.
    pub fn guest_bell(&self) -> GuestBell {
        self.guest.clone()
    }

    /// What came since the last time.
    pub fn take(&self) -> Vec<RingNews> {
        let _ = self.bell.read();
        self.news.try_iter().collect()
    }
}

/// The two sockets of a VM's directory.
#[derive(Debug)]
pub struct RingSockets {
    vm: String,
    attach: attach::Listener,
    ivshmem: ivshmem::Server,
    ivshmem_bytes: usize,
    out: RingSender,
    /// The VMM on the attach socket, and its ring.
    attached: Option<(Socket, u64)>,
    /// The ring of the client of the ivshmem socket.
    given: Option<u64>,
}

impl RingSockets {
    /// Takes bound sockets.
    ///
    /// # Errors
    /// One of them cannot be made nonblocking.
    pub fn new(
        vm: String,
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

    /// Goes on with the QEMU of a process that was killed: `left` is what that one kept of its ring, or nothing. What is of
    /// no use keeps nobody else out.
    pub fn resume(&mut self, left: Vec<Passed>) {
        if left.is_empty() {
            return;
        }
        if let Err(e) = self.take_up(left) {
            tracing::error!(error = %chain(&*e), "the ring that was left is of no use");
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
        ] = left.map_err(|_| "another number of descriptors")?;
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

    /// Makes a ring of what the client of the ivshmem socket has.
    fn give(&mut self, given: Given) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let vmm = self.ivshmem.client().ok_or("it has gone")?;
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

    /// Serves them on a thread, until the process ends.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn spawn(mut self) -> io::Result<()> {
        // This process may be about to give up making threads.
        passed::prepare();
        let run = move || {
            while let Err(e) = self.turn() {
                // Whatever is short may come back; asking again at once would spin.
                tracing::warn!(error = %e, "sockets of the ring");
                std::thread::sleep(SAY_LIMIT);
            }
        };
        std::thread::Builder::new()
            .name("rings".into())
            .spawn(run)?;
        Ok(())
    }

    /// Serves for ever.
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
            Err(e) => tracing::warn!(error = %chain(&*e), "ring refused"),
        }
        Ok(())
    }

    fn converse(
        &self,
        socket: Socket,
    ) -> Result<(Socket, u64), Box<dyn std::error::Error + Send + Sync>> {
        let offered = socket.offered()?;
        if offered.offer.vm != self.vm {
            let said = format!("this is the socket of `{}`", self.vm);
            let other = offered.offer.vm.clone();
            offered.refuse(Code::UnknownVm, &said)?;
            return Err(format!("it was meant for `{}`", other.escape_debug()).into());
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
                offered.refuse(Code::Memory, &chain(&e))?;
                return Err(e.into());
            }
        };
        match offered.accept(epoch) {
            Ok((socket, _, _)) => Ok((socket, id)),
            Err(e) => {
                self.out.detach(id, "its VMM went before it was told");
                Err(e.into())
            }
        }
    }

    fn attached_speaks(&mut self) {
        if let Some((socket, id)) = self.attached.take() {
            self.out.detach(id, &chain(&socket.wait()));
        }
    }

    // ---- the ivshmem socket

    fn client_knocks(&mut self) -> io::Result<()> {
        loop {
            match self.ivshmem.accept() {
                Ok(None) => return Ok(()),
                Ok(Some(given)) => {
                    self.client_gone("another VMM took its place");
                    if let Err(e) = self.give(given) {
                        tracing::warn!(error = %chain(&*e), "ring not made");
                    }
                }
                Err(ivshmem::IvshmemError::Io(e)) => return Err(e),
                Err(e) => tracing::warn!(error = %chain(&e), "ivshmem client turned away"),
            }
        }
    }

    fn client_stirs(&mut self) {
        match self.ivshmem.look() {
            Ok(Alive::Yes) => {}
            Ok(Alive::No) => self.client_gone("its VMM is gone"),
            Err(e) => self.client_gone(&chain(&e)),
        }
    }

    fn client_gone(&mut self, why: &str) {
        if let Some(id) = self.given.take() {
            self.out.detach(id, why);
        }
    }
}
