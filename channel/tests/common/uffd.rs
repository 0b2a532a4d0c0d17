//! userfaultfd(2): pages that are missing in a range of this process's memory, and threads that block on them.
//!
//! The crate `userfaultfd` generates its bindings with libclang, which the four calls here do not need.
#![allow(unsafe_code)] // ioctls with pointers to kernel structures, and a descriptor from a raw system call

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Page size in bytes.
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

/// A range in which a thread blocks when it accesses a missing page.
pub struct Missing(OwnedFd);

impl Missing {
    /// Registers the `len` bytes at `start` of a shared mapping. Both must be multiples of the page size.
    ///
    /// # Errors
    /// `PermissionDenied`: the process is not root, and `vm.unprivileged_userfaultfd` does not allow it.
    pub fn register(start: u64, len: u64) -> io::Result<Self> {
        // SAFETY: the call takes flags and returns a descriptor. Without UFFD_USER_MODE_ONLY, page faults inside
        // system calls block too, which the test needs.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0);
        let fd = fd.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just created the descriptor for this call.
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
        // SAFETY: `register` is a `struct uffdio_register` that outlives the call. The kernel refuses an invalid
        // range.
        unsafe { uffdio_register(fd.as_raw_fd(), &mut register) }?;
        Ok(Self(fd))
    }

    /// Waits for at most `limit` until a thread blocks on a missing page, and returns the page.
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

    /// Fills in a page, so that threads blocked on it continue.
    pub fn fill(&self, at: u64, page: &[u8; PAGE]) {
        let mut copy = UffdioCopy {
            dst: at,
            src: page.as_ptr() as u64,
            len: PAGE as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: `copy` is a `struct uffdio_copy` that outlives the call, and `page` has the length in it. The kernel
        // only writes to a registered page that is missing. That is memory shared with a guest, to which no Rust
        // reference points.
        match unsafe { uffdio_copy(self.0.as_raw_fd(), &mut copy) } {
            // The page is there already, because of another thread's access.
            Ok(_) | Err(nix::errno::Errno::EEXIST) => {}
            Err(e) => panic!("{e}"),
        }
    }
}
