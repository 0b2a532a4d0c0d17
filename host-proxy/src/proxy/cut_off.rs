//! Ends a client's connection at once, whoever has a duplicate of its socket.
#![allow(unsafe_code)] // libraries pass the address of no family in a buffer that has room for a host's

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Bytes of an address that is no more than a family. The worker's sandbox lets no longer one through, and the shortest of a host
/// has 16: a socket that was cut off is never connected again, also where the kernel's landlock knows no TCP (before 6.7).
pub const ADDRESS_LEN: u32 = size_of::<libc::sa_family_t>() as u32;

/// Resets a TCP connection. Fails while somebody sleeps in a call on the socket.
///
/// # Errors
/// As the system says.
pub fn cut_off(socket: impl AsFd) -> io::Result<()> {
    let family = libc::AF_UNSPEC as libc::sa_family_t;
    let address = (&raw const family).cast();
    // SAFETY: the kernel reads `ADDRESS_LEN` bytes of `address`, which are those of `family`, and keeps nothing of them.
    let done = unsafe { libc::connect(socket.as_fd().as_raw_fd(), address, ADDRESS_LEN) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_client_sees_a_reset_while_somebody_has_a_duplicate() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(at) else {
                println!("skipped: no {at}");
                continue;
            };
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (socket, _) = listener.accept().unwrap();
            let _duplicate = socket.try_clone().unwrap();
            cut_off(&socket).unwrap();
            let seen = client.read(&mut [0]).unwrap_err();
            assert_eq!(seen.kind(), ErrorKind::ConnectionReset);
        }
    }
}
