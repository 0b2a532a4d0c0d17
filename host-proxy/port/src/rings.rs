//! How a ring comes to a VM's port: somebody hands memory and doorbells over, and the loop docks what was made of them.
//!
//! ```text
//! ring.sock      a VMM that speaks adit's attach protocol ──┐
//! ivshmem.sock   a stock QEMU, `-device ivshmem-doorbell` ──┼─► RingSender ── RingNews ──► the loop's Dock
//! a VMM that has the port in its own process ───────────────┘
//! ```
//! Both sockets are served by a thread of their own, so that a VMM that is slow, or hostile, keeps nobody but itself
//! waiting. The last ring that came is the VM's; one that goes takes only itself away.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use adit_channel::ring::{self, RingBells, RingCarrier, RingError};
use adit_ringbuf::region::RegionError;
use adit_ringbuf::{Mapped, RingMem};
use adit_ringbuf_io::attach::{self, Bells, Code, Socket};
use adit_ringbuf_io::ivshmem::{self, Alive};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::chain;

/// Bytes of the region that a stock QEMU is given: PCI wants a power of two.
pub const IVSHMEM_BYTES: usize = 4 << 20;
/// How long a VMM may take for each thing that it has to say.
const SAY_LIMIT: Duration = Duration::from_secs(2);

/// What is known of a ring besides what it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingInfo {
    /// The way that it came, for people: `attach socket`, `ivshmem`.
    pub path: &'static str,
    /// What its memory is, for people: `memfd`.
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
}

/// Where they come out.
#[derive(Debug)]
pub struct RingInbox {
    news: Receiver<RingNews>,
    bell: Arc<EventFd>,
}

/// Both ends of the way.
///
/// # Errors
/// There is no descriptor to be had.
pub fn channel() -> io::Result<(RingSender, RingInbox)> {
    let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    let bell = Arc::new(bell);
    let (tell, news) = mpsc::channel();
    let sender = RingSender {
        news: tell,
        bell: bell.clone(),
        next: Arc::default(),
    };
    Ok((sender, RingInbox { news, bell }))
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
        let carrier = RingCarrier::host(memory, spec, epoch, RingBells::of_host(bells))?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let carrier = Box::new(carrier);
        self.tell(RingNews::Came { id, carrier, info });
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
        out: RingSender,
    ) -> io::Result<Self> {
        let ivshmem = ivshmem::Server::new(ivshmem, IVSHMEM_BYTES).map_err(io::Error::other)?;
        Ok(Self {
            vm,
            attach,
            ivshmem,
            out,
            attached: None,
            given: None,
        })
    }

    /// Serves them on a thread, until the process ends.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn spawn(mut self) -> io::Result<()> {
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
                    let made = self
                        .out
                        .attach(given.memory, given.bells, "ivshmem", "memfd");
                    match made {
                        Ok((id, _)) => self.given = Some(id),
                        Err(e) => tracing::warn!(error = %chain(&e), "ring not made"),
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
