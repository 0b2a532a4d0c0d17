//! userfaultfd(2): pages that are missing in a range of this process's memory, and threads that wait for them.
//!
//! The crate of that name generates its bindings with libclang; four calls do not need that.
#![allow(unsafe_code)] // ioctls with pointers to structures of the kernel's, and a descriptor from a system call

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Bytes of a page.
pub const PAGE: usize = 4096;

const API: u64 = 0xaa;
const MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, UffdioApi);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, UffdioRegister);
nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, UffdioCopy);

/// A range in which a touch of a page that is not there waits.
pub struct Missing(OwnedFd);

impl Missing {
    /// Registers `len` bytes at `start`, both of whole pages, of a shared mapping.
    ///
    /// # Errors
    /// `PermissionDenied`: the process is neither root's nor allowed by `vm.unprivileged_userfaultfd`.
    pub fn register(start: u64, len: u64) -> io::Result<Self> {
        // SAFETY: takes flags and returns a descriptor. Faults inside of system calls are to wait, too, so it is not
        // restricted to those of user mode.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0);
        let fd = fd.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just installed it for this call.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = UffdioApi {
            api: API,
            features: MISSING_SHMEM,
            ioctls: 0,
        };
        // SAFETY: `api` is a `struct uffdio_api` that outlives the call.
        unsafe { uffdio_api(fd.as_raw_fd(), &mut api) }?;
        let mut register = UffdioRegister {
            start,
            len,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: `register` is a `struct uffdio_register` that outlives the call. A range that is none is refused.
        unsafe { uffdio_register(fd.as_raw_fd(), &mut register) }?;
        Ok(Self(fd))
    }

    /// Returns the page for which a thread waits, in at most this time.
    pub fn wait(&self, limit: PollTimeout) -> Option<u64> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, limit).expect("a descriptor");
        let mut message = [0; 32];
        let mut file = std::fs::File::from(self.0.try_clone().expect("a descriptor"));
        match file.read(&mut message) {
            Ok(32) if message[0] == EVENT_PAGEFAULT => {
                let address = message[16..24].try_into().expect("8 bytes");
                Some(u64::from_ne_bytes(address) & !(PAGE as u64 - 1))
            }
            Ok(n) => panic!("{n} bytes: {message:x?}"),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// Puts a page there; who waits for it goes on.
    pub fn fill(&self, at: u64, page: &[u8; PAGE]) {
        let mut copy = UffdioCopy {
            dst: at,
            src: page.as_ptr() as u64,
            len: PAGE as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: `copy` is a `struct uffdio_copy` that outlives the call, and `page` is as long as it says. The kernel
        // writes only where a registered page is missing: to memory that is shared with a guest and no Rust reference
        // points to.
        match unsafe { uffdio_copy(self.0.as_raw_fd(), &mut copy) } {
            // It is there: somebody else's touch brought it.
            Ok(_) | Err(nix::errno::Errno::EEXIST) => {}
            Err(e) => panic!("{e}"),
        }
    }
}
