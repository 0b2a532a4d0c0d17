//! Moves payload between guest memory and a descriptor with one copy, which the kernel makes.
//!
//! This file contains most of the device's `unsafe`: `sendmsg`, `recvmsg`, `writev` and `readv` take raw pointers.
//! Guest memory must never be a Rust slice, because the guest writes to it at any time, so `IoSlice` would be
//! undefined behaviour.
//!
//! Sockets are used with MSG_DONTWAIT and MSG_NOSIGNAL. So they need not be nonblocking (all duplicates of the socket
//! share that flag), and a closed peer is `BrokenPipe`, not SIGPIPE. Other descriptors (pipes) use `writev` and
//! `readv`. The caller must make them nonblocking, and the process must ignore SIGPIPE, as Rust's runtime does.
#![allow(unsafe_code)] // raw iovecs into guest memory; every block has a SAFETY comment

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::volatile_memory::{PtrGuard, PtrGuardMut};
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::chain::{Cursor, Seg};

/// Maximum number of pieces in one system call. A longer chain takes several calls.
const IOVECS_MAX: usize = 64;

const EMPTY: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Writes at most `max` bytes of the chain at `cursor` to `fd`, until `fd` accepts no more.
pub(crate) fn write_to<M: GuestMemory>(
    mem: &M,
    segs: &[Seg],
    cursor: &mut Cursor,
    fd: BorrowedFd<'_>,
    max: usize,
) -> io::Result<usize> {
    transfer(max, |left| {
        let mut guards: [Option<PtrGuard>; IOVECS_MAX] = [const { None }; IOVECS_MAX];
        let mut iov = [EMPTY; IOVECS_MAX];
        let mut used = 0;
        let wanted = gather(mem, segs, *cursor, left, Permissions::Read, &mut |slice| {
            let guard = slice.ptr_guard();
            iov[used] = libc::iovec {
                iov_base: guard.as_ptr().cast_mut().cast(),
                iov_len: slice.len(),
            };
            guards[used] = Some(guard);
            used += 1;
            used < IOVECS_MAX
        })?;
        // SAFETY: every iovec describes a slice of the snapshot `mem`. `mem` is borrowed, so it stays mapped for the
        // whole call, and `guards` keeps temporary mappings alive. The kernel only reads, and bytes that change
        // meanwhile do no harm.
        let n = unsafe { send(fd, &iov[..used]) }?;
        cursor.advance(segs, n);
        Ok((n, wanted))
    })
}

/// Reads at most `max` bytes from `fd` into the chain at `cursor`, until `fd` has no more. 0 means end of file.
pub(crate) fn read_from<M: GuestMemory>(
    mem: &M,
    segs: &[Seg],
    cursor: &mut Cursor,
    fd: BorrowedFd<'_>,
    max: usize,
) -> io::Result<usize> {
    transfer(max, |left| {
        let mut guards: [Option<PtrGuardMut>; IOVECS_MAX] = [const { None }; IOVECS_MAX];
        let mut iov = [EMPTY; IOVECS_MAX];
        let mut used = 0;
        let wanted = gather(mem, segs, *cursor, left, Permissions::Write, &mut |slice| {
            let guard = slice.ptr_guard_mut();
            iov[used] = libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: slice.len(),
            };
            guards[used] = Some(guard);
            used += 1;
            used < IOVECS_MAX
        })?;
        // SAFETY: as in `write_to`. The kernel writes at most `iov_len` bytes to each piece. All of them are guest
        // memory, to which no Rust reference points.
        let n = unsafe { receive(fd, &iov[..used]) }?;
        // The kernel's stores bypass vm-memory, so mark the changed bytes in the bitmap here.
        gather(mem, segs, *cursor, n, Permissions::Write, &mut |slice| {
            slice.bitmap().mark_dirty(0, slice.len());
            true
        })?;
        cursor.advance(segs, n);
        Ok((n, wanted))
    })
}

/// Repeats `step`, which returns (bytes moved, bytes tried), until `max` bytes are moved or a call moved less than it
/// tried.
fn transfer(
    max: usize,
    mut step: impl FnMut(usize) -> io::Result<(usize, usize)>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < max {
        match step(max - done) {
            Ok((0, 0)) => break, // the chain ends here
            Ok((n, wanted)) => {
                done += n;
                if n < wanted {
                    break;
                }
            }
            // Report the bytes that were moved. The error will occur again in the next call.
            Err(_) if done > 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

type VisitSlice<'v, 'm, M> =
    &'v mut dyn FnMut(VolatileSlice<'m, BS<'m, <M as GuestMemory>::Bitmap>>) -> bool;

/// Visits the host slices of the next `max` bytes until `visit` returns false. Returns the number of visited bytes.
fn gather<'m, M: GuestMemory>(
    mem: &'m M,
    segs: &[Seg],
    mut cursor: Cursor,
    max: usize,
    access: Permissions,
    visit: VisitSlice<'_, 'm, M>,
) -> io::Result<usize> {
    let mut total = 0;
    while total < max {
        let Some((addr, len)) = cursor.piece(segs, max - total) else {
            break;
        };
        let mut left = len;
        for slice in mem
            .get_slices(addr, len, access)
            .map_err(io::Error::other)?
        {
            let slice = slice.map_err(io::Error::other)?;
            // If a slice is missing, the bytes after it would take its place.
            left = left.checked_sub(slice.len()).ok_or_else(uneven)?;
            total += slice.len();
            if !visit(slice) {
                return Ok(total);
            }
        }
        if left > 0 {
            return Err(uneven());
        }
        cursor.advance(segs, len);
    }
    Ok(total)
}

/// The memory returned more or fewer bytes than requested, which breaks the contract of its trait.
fn uneven() -> io::Error {
    io::Error::other("guest memory returned a different length than requested")
}

/// # Safety
/// Every element of `iov` describes memory that may be read during the call.
unsafe fn send(fd: BorrowedFd<'_>, iov: &[libc::iovec]) -> io::Result<usize> {
    let msg = message(iov);
    let fd = fd.as_raw_fd();
    retry(
        // SAFETY: `fd` is open (it is borrowed). `msg` points only to `iov`, whose validity the caller guarantees.
        || unsafe { libc::sendmsg(fd, &msg, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) },
        // SAFETY: as above; the length is at most IOVECS_MAX.
        || unsafe { libc::writev(fd, iov.as_ptr(), iov.len() as libc::c_int) },
    )
}

/// # Safety
/// Every element of `iov` describes memory that may be written during the call.
unsafe fn receive(fd: BorrowedFd<'_>, iov: &[libc::iovec]) -> io::Result<usize> {
    let mut msg = message(iov);
    let fd = fd.as_raw_fd();
    retry(
        // SAFETY: `fd` is open (it is borrowed). `msg` points only to `iov`, whose validity the caller guarantees. It
        // has no control buffer, so no descriptor can be received.
        || unsafe { libc::recvmsg(fd, &mut msg, libc::MSG_DONTWAIT) },
        // SAFETY: as above; the length is at most IOVECS_MAX.
        || unsafe { libc::readv(fd, iov.as_ptr(), iov.len() as libc::c_int) },
    )
}

fn message(iov: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which all zeroes (no name, no control) is a valid value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_ptr().cast_mut();
    // musl declares this field as an int. The list has at most IOVECS_MAX entries.
    msg.msg_iovlen = iov.len() as _;
    msg
}

/// Calls `socket`, or `other` if the descriptor is not a socket. Repeats the call after EINTR.
fn retry(mut socket: impl FnMut() -> isize, mut other: impl FnMut() -> isize) -> io::Result<usize> {
    let mut is_socket = true;
    loop {
        let n = if is_socket { socket() } else { other() };
        if let Ok(n) = usize::try_from(n) {
            return Ok(n);
        }
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ENOTSOCK) if is_socket => is_socket = false,
            _ => return Err(e),
        }
    }
}
