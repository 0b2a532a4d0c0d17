//! A CONNECT client. Its streams to a VM's port keep half-close.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest silence before a test fails.
const SILENCE: Duration = Duration::from_secs(30);

/// Opens a tunnel. If the status is not 200, the error contains the header.
///
/// # Errors
/// The proxy cannot be reached, or refuses.
pub fn connect(proxy: SocketAddr, to: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(proxy)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes())?;
    let mut head = Vec::new();
    // Byte by byte: what follows the header belongs to the tunnel.
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 || head.len() > 8192 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if head.starts_with("HTTP/1.1 200") {
        Ok(stream)
    } else {
        Err(io::Error::other(head))
    }
}

/// The byte of the test pattern at an offset. The pattern does not repeat, so a wrong offset shows.
pub fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}
