//! The ring as this guest finds it: a PCI function whose shared BAR begins with a region.
//!
//! | access | memory | from the host | to the host | needs |
//! |---|---|---|---|---|
//! | vfio | region 2 | MSI-X, as an eventfd | a store to BAR0 | an IOMMU and vfio-pci |
//! | uio | `resource2` | its pin, as a file that counts | a store to BAR0 | an interrupt pin, uio_pci_generic, no lockdown |
//! | sysfs | `resource2` | a byte over vsock, or we poll | a store to BAR0 | no lockdown |
//!
//! The first that works is used. A function that has another driver, or whose memory begins with something else, is left as
//! it was. `/dev/mem` and `resource2_wc` are never used.

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
    /// It has message-signalled interrupts only.
    #[error("it has no interrupt pin")]
    NoPin,
    /// The kernel does not let user space map a device's memory.
    #[error(
        "the kernel is locked down ({level}): device memory cannot be mapped through sysfs; give the VM an IOMMU, or stay on vsock"
    )]
    Lockdown {
        /// The level of the lockdown.
        level: String,
    },
    /// The kernel refused something.
    #[error("the kernel refused")]
    Io(#[from] io::Error),
    /// vfio refused something.
    #[error("vfio")]
    Vfio(#[source] Box<VfioError>),
    /// Its memory belongs to another program, or has a version that this agent does not know.
    #[error("its memory has no region that this agent knows")]
    Region(#[from] RegionError),
}

/// How the agent uses the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Through vfio, with interrupts.
    Msix,
    /// Through uio, with its pin's.
    Uio,
    /// Through sysfs, without interrupts.
    Sysfs,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Msix => "vfio, MSI-X",
            Self::Uio => "uio, INTx",
            Self::Sysfs => "sysfs",
        })
    }
}

/// How the host's doorbell arrives.
#[derive(Debug)]
pub enum Interrupt {
    /// As an eventfd.
    Event(EventFd),
    /// As an interrupt of the function's pin.
    Line(Line),
    /// As a byte on a stream that is nonblocking. Its end is sent to the channel.
    Stream(Arc<Conn>, SyncSender<()>),
    /// Not at all: its owner polls.
    Polled,
}

impl Waiter for Interrupt {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Event(event) => event.fd(),
            Self::Line(line) => line.fd(),
            Self::Stream(conn, _) => Some(conn.as_fd()),
            Self::Polled => None,
        }
    }

    fn clear(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        match self {
            Self::Event(event) => event.clear(),
            Self::Line(line) => line.clear(),
            Self::Polled => Ok(()),
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
                // Full: the end was sent already.
                let _ = ended.try_send(());
                Err(error)
            }
        }
    }
}

/// A function with a region, in use.
pub struct Device {
    /// Its address.
    pub function: String,
    /// Its memory.
    pub memory: Mapped,
    /// The host's doorbell: there is data.
    pub data: Register,
    /// The host's doorbell: there is space.
    pub space: Register,
    /// From the host: there is data.
    pub data_interrupt: Interrupt,
    /// From the host: there is space.
    pub space_interrupt: Interrupt,
    /// How it is used.
    pub access: Access,
    /// Why not by better means; empty: there are none.
    pub why: String,
    vfio: Option<Arc<VfioDevice>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({} by {})", self.function, self.access)
    }
}

impl Device {
    /// Uses a stream whose bytes are the host's doorbells, in place of interrupts. The returned channel gets a message when the
    /// stream ends: no doorbell arrives from then on.
    ///
    /// # Errors
    /// The stream cannot be made nonblocking.
    pub fn use_stream(&mut self, conn: Conn) -> io::Result<Receiver<()>> {
        conn.set_nonblocking()?;
        let (ended, end) = sync_channel(1);
        self.data_interrupt = Interrupt::Stream(Arc::new(conn), ended);
        // One stream is for both.
        self.space_interrupt = Interrupt::Polled;
        Ok(end)
    }

    /// How the host's doorbells arrive.
    pub fn hears(&self) -> Hears {
        match self.data_interrupt {
            Interrupt::Event(_) | Interrupt::Line(_) => Hears::Interrupts,
            Interrupt::Stream(..) => Hears::Stream,
            Interrupt::Polled => Hears::Nothing,
        }
    }

    /// What a carrier needs of it.
    pub fn split(self) -> (Mapped, RingBells, DeviceGuard) {
        let bells = RingBells {
            data: Box::new(self.data),
            space: Box::new(self.space),
            data_heard: Box::new(self.data_interrupt),
            space_heard: Box::new(self.space_interrupt),
        };
        (self.memory, bells, DeviceGuard(self.vfio))
    }
}

/// Must live as long as a device's memory is used: its interrupts end with it.
pub struct DeviceGuard(#[allow(dead_code)] Option<Arc<VfioDevice>>);

/// The values that ring the host's doorbells: data, space.
fn doorbell_values() -> [u32; 2] {
    [VECTOR_DATA, VECTOR_SPACE].map(|vector| u32::from(HOST_PEER) << 16 | u32::from(vector))
}

/// Whether there is a function that may have a region.
pub fn present() -> bool {
    !pci::candidates(Path::new(pci::DEVICES)).is_empty()
}

/// Looks for a function with a region, and uses it. `None`: there is none that can be used; the log has the reason, unless it is
/// `said` already.
pub fn find(said: &mut String) -> Option<Device> {
    let candidates = pci::candidates(Path::new(pci::DEVICES));
    let mut reasons = String::new();
    let found = candidates.iter().find_map(|function| match open(function) {
        Ok(device) => Some(device),
        Err(e) => {
            reasons += &format!("{}: {}; ", function.address, log::chain(&e));
            None
        }
    });
    if let Some(device) = &found {
        let bytes = adit_ringbuf::RingMem::len(&device.memory);
        let fields: [(&str, &dyn fmt::Display); 4] = [
            ("function", &device.function),
            ("by", &device.access),
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
        // An earlier agent left it so.
        Some(driver) if driver == vfio::DRIVER => return vfio::open(function, DOORBELL),
        Some(driver) if driver == uio::DRIVER => return uio::open(function, DOORBELL),
        Some(driver) => {
            let why = format!("it is bound to driver {driver}");
            return Err(OpenError::Io(io::Error::other(why)));
        }
        None => {}
    }
    // Its memory is read before it is bound to another driver: it may be another program's.
    let plain = sysfs::open(function, DOORBELL);
    if matches!(plain, Err(OpenError::Region(_))) {
        return plain;
    }
    let mut why = "it is behind no IOMMU".to_owned();
    if function.has_iommu() {
        match vfio::open(function, DOORBELL) {
            Ok(device) => return Ok(device),
            Err(e) => why = log::chain(&e),
        }
    }
    // The other means map the same memory.
    drop(plain?);
    match uio::open(function, DOORBELL) {
        Ok(device) => Ok(because(device, why)),
        Err(e) => {
            let why = format!("{why}; {}", log::chain(&e));
            sysfs::open(function, DOORBELL).map(|device| because(device, why))
        }
    }
}

fn because(device: Device, why: String) -> Device {
    Device { why, ..device }
}
