//! The ring as this guest finds it: a PCI function whose shared BAR begins with a region.
//!
//! | way | memory | the host rings us | we ring the host | needs |
//! |---|---|---|---|---|
//! | vfio | region 2 | MSI-X, as an eventfd | a store to BAR0 | an IOMMU and vfio-pci |
//! | uio | `resource2` | its pin, as a file that counts | a store to BAR0 | an interrupt pin, uio_pci_generic, no lockdown |
//! | sysfs | `resource2` | a byte over vsock, or we poll | a store to BAR0 | no lockdown |
//!
//! The first that works is taken. A function that somebody else has, or whose memory begins with something else, is left as
//! it was. There is no fourth way: `/dev/mem` and `resource2_wc` would be.

mod link;
mod map;
mod pci;
mod sysfs;
mod uio;
mod vfio;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use adit_channel::ring::RingBells;
use adit_channel::ring::bell::Hears;
use adit_ringbuf::Mapped;
use adit_ringbuf::region::RegionError;
use adit_ringbuf_io::doorbell::Waiter;
use adit_ringbuf_io::ivshmem::{HOST_PEER, VECTOR_DATA, VECTOR_SPACE};
use nix::sys::socket::{MsgFlags, recv};
use vfio_ioctls::{VfioDevice, VfioError};
use vmm_sys_util::eventfd::EventFd;

use crate::conn::Conn;
use crate::log;
use pci::Function;

pub use link::{Carriers, Link};
pub use map::{Register, Registers};
pub use uio::Line;

/// BARs of ivshmem.
const REGISTERS_BAR: usize = 0;
const SHARED_BAR: usize = 2;
/// Its doorbell register.
const DOORBELL: usize = 12;

/// Why a function is not used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It has no such BAR.
    #[error("BAR {bar} is not memory")]
    NoBar {
        /// Which.
        bar: usize,
    },
    /// It raises no interrupt without a message.
    #[error("it has no interrupt pin")]
    NoPin,
    /// The kernel gives no device's memory to user space.
    #[error(
        "the kernel is locked down ({level}): sysfs gives no device's memory out; give the VM an IOMMU, or stay on vsock"
    )]
    Lockdown {
        /// How far.
        level: String,
    },
    /// The kernel refuses something.
    #[error("the kernel refuses")]
    Io(#[from] io::Error),
    /// vfio does.
    #[error("vfio")]
    Vfio(#[source] Box<VfioError>),
    /// It is somebody else's, or of a version that this agent does not know.
    #[error("no region of ours")]
    Region(#[from] RegionError),
}

/// How the function is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Through vfio, with interrupts.
    Msix,
    /// Through uio, with its pin's.
    Uio,
    /// Through sysfs, without.
    Sysfs,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Msix => "vfio, MSI-X",
            Self::Uio => "uio, INTx",
            Self::Sysfs => "sysfs",
        })
    }
}

/// What hears the host.
#[derive(Debug)]
pub enum Ear {
    /// An interrupt.
    Event(EventFd),
    /// The function's pin.
    Line(Line),
    /// A byte on a stream that is nonblocking. At its end the other one, too, is told.
    Stream(Arc<Conn>, SyncSender<()>),
    /// Nothing: its owner polls.
    Deaf,
}

impl Waiter for Ear {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Event(event) => event.fd(),
            Self::Line(line) => line.fd(),
            Self::Stream(conn, _) => Some(conn.as_fd()),
            Self::Deaf => None,
        }
    }

    fn clear(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        match self {
            Self::Event(event) => event.clear(),
            Self::Line(line) => line.clear(),
            Self::Deaf => Ok(()),
            Self::Stream(conn, ended) => {
                let mut bytes = [0; 64];
                let fd = conn.as_fd().as_raw_fd();
                let error = match recv(fd, &mut bytes, MsgFlags::MSG_DONTWAIT) {
                    Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                    Ok(_) | Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                        return Ok(());
                    }
                    Err(e) => e.into(),
                };
                // Full: it was told.
                let _ = ended.try_send(());
                Err(error)
            }
        }
    }
}

/// A function with a region, taken.
pub struct Device {
    /// Its address.
    pub function: String,
    /// Its memory.
    pub memory: Mapped,
    /// Rings the host: there is data.
    pub data: Register,
    /// Rings the host: there is space.
    pub space: Register,
    /// Hears: there is data.
    pub data_ear: Ear,
    /// Hears: there is space.
    pub space_ear: Ear,
    /// How it is had.
    pub how: How,
    /// Why not in a better way; empty: there is none.
    pub why: String,
    vfio: Option<Arc<VfioDevice>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({} by {})", self.function, self.how)
    }
}

impl Device {
    /// Has a stream whose bytes are the host's doorbells, in place of interrupts that it lacks. Returns what is told when
    /// the stream ends: nobody hears the host from then on.
    ///
    /// # Errors
    /// The stream cannot be made nonblocking.
    pub fn hear(&mut self, conn: Conn) -> io::Result<Receiver<()>> {
        conn.set_nonblocking()?;
        let (ended, end) = sync_channel(1);
        self.data_ear = Ear::Stream(Arc::new(conn), ended);
        // One stream rings for both.
        self.space_ear = Ear::Deaf;
        Ok(end)
    }

    /// How it hears the host.
    pub fn hears(&self) -> Hears {
        match self.data_ear {
            Ear::Event(_) | Ear::Line(_) => Hears::Interrupts,
            Ear::Stream(..) => Hears::Stream,
            Ear::Deaf => Hears::Nothing,
        }
    }

    /// What a carrier needs of it.
    pub fn split(self) -> (Mapped, RingBells, Kept) {
        let bells = RingBells {
            data: Box::new(self.data),
            space: Box::new(self.space),
            data_heard: Box::new(self.data_ear),
            space_heard: Box::new(self.space_ear),
        };
        (self.memory, bells, Kept(self.vfio))
    }
}

/// What must live as long as a device's memory is used: its interrupts end with it.
pub struct Kept(#[allow(dead_code)] Option<Arc<VfioDevice>>);

/// What is stored to ring the host's doorbells: data, space.
fn doorbell_values() -> [u32; 2] {
    [VECTOR_DATA, VECTOR_SPACE].map(|vector| u32::from(HOST_PEER) << 16 | u32::from(vector))
}

/// Whether there is a function that may have a region.
pub fn present() -> bool {
    !pci::candidates(Path::new(pci::DEVICES)).is_empty()
}

/// Looks for a function with a region, and takes it. `None`: there is none that can be had; why is in the log, unless it
/// was `said` before.
pub fn find(said: &mut String) -> Option<Device> {
    let candidates = pci::candidates(Path::new(pci::DEVICES));
    let mut reasons = String::new();
    let found = candidates.iter().find_map(|function| match open(function) {
        Ok(device) => Some(device),
        Err(e) => {
            reasons += &format!("{}: {}; ", function.address, chain(&e));
            None
        }
    });
    if let Some(device) = &found {
        let bytes = adit_ringbuf::RingMem::len(&device.memory);
        let fields: [(&str, &dyn fmt::Display); 4] = [
            ("function", &device.function),
            ("by", &device.how),
            ("bytes", &bytes),
            ("why", &device.why),
        ];
        log::event("ring-found", &fields);
    } else if *said != reasons {
        let why = reasons.trim_end_matches("; ");
        log::event("ring-not-used", &[("why", &why)]);
        *said = reasons;
    }
    found
}

fn open(function: &Function) -> Result<Device, OpenError> {
    match function.driver() {
        // As the agent before this one left it.
        Some(driver) if driver == vfio::DRIVER => return vfio::open(function, DOORBELL),
        Some(driver) if driver == uio::DRIVER => return uio::open(function, DOORBELL),
        Some(driver) => {
            let why = format!("driver {driver} has it");
            return Err(OpenError::Io(io::Error::other(why)));
        }
        None => {}
    }
    // Looked at before it is given to another driver: it may be another program's.
    let plain = sysfs::open(function, DOORBELL);
    if matches!(plain, Err(OpenError::Region(_))) {
        return plain;
    }
    let mut why = "no IOMMU stands before it".to_owned();
    if function.has_iommu() {
        match vfio::open(function, DOORBELL) {
            Ok(device) => return Ok(device),
            Err(e) => why = chain(&e),
        }
    }
    // The other ways have its memory as this one has.
    drop(plain?);
    match uio::open(function, DOORBELL) {
        Ok(device) => Ok(because(device, why)),
        Err(e) => {
            let why = format!("{why}; {}", chain(&e));
            sysfs::open(function, DOORBELL).map(|device| because(device, why))
        }
    }
}

fn because(device: Device, why: String) -> Device {
    Device { why, ..device }
}

/// An error and its causes in one line.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(e) = source {
        text += &format!(": {e}");
        source = e.source();
    }
    text
}
