//! A stream of the host whose bytes and ends are chunks, because its carrier does not keep half-closes
//! ([`adit_channel::chunk`]).
//!
//! Dropped without [`end_sending`](HostStream::end_sending), it has broken off.

use std::cell::RefCell;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use adit_channel::chunk::{ChunkError, HEAD_LEN, Piece, Reader, Stop, Writer};

use super::{HostStream, ReadWrite};
use crate::conn::Conn;
use crate::relay;

/// The stream.
pub(super) struct Chunked {
    conn: Conn,
    halves: RefCell<(Reader, Writer)>,
}

impl Chunked {
    /// The hello is done.
    pub(super) fn new(conn: Conn) -> Self {
        Self {
            conn,
            halves: RefCell::default(),
        }
    }
}

impl HostStream for Chunked {
    fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.conn.set_timeout(limit)
    }

    fn io(&self) -> Box<dyn ReadWrite + '_> {
        Box::new(self)
    }

    fn end_sending(&self) -> io::Result<()> {
        let (_, writer) = &mut *self.halves.borrow_mut();
        if !writer.stop(Stop::End) {
            return Err(io::Error::other("a chunk was not sent to its end"));
        }
        while writer.owes_head() {
            let n = (&self.conn).write(writer.next(0).0)?;
            writer.sent(n);
        }
        Ok(())
    }

    fn into_socket(self: Box<Self>) -> Result<OwnedFd, Box<dyn HostStream>> {
        Err(self)
    }

    fn relay_to(self: Box<Self>, local: Conn) -> io::Result<()> {
        let (reader, writer) = self.halves.into_inner();
        relay::relay_chunks(&self.conn, &local, reader, writer).map(drop)
    }
}

fn invalid(e: ChunkError) -> io::Error {
    match e {
        ChunkError::Cut => io::Error::new(ErrorKind::UnexpectedEof, e),
        e => io::Error::new(ErrorKind::InvalidData, e),
    }
}

impl Read for &Chunked {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let (reader, _) = &mut *self.halves.borrow_mut();
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            match reader.stopped() {
                None => {}
                Some(Stop::End) => return Ok(0),
                Some(Stop::Abort) => return Err(ErrorKind::ConnectionReset.into()),
            }
            let mut head = [0; HEAD_LEN];
            let into = match reader.left() {
                0 => &mut head[..reader.head_left()],
                left => {
                    let n = left.min(buf.len());
                    &mut buf[..n]
                }
            };
            let n = (&self.conn).read(into)?;
            if n == 0 {
                reader.end().map_err(invalid)?;
            }
            if let (n, Piece::Payload) = reader.take(&into[..n]).map_err(invalid)? {
                return Ok(n);
            }
        }
    }
}

impl Write for &Chunked {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let (_, writer) = &mut *self.halves.borrow_mut();
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let (head, n) = writer.next(buf.len());
            let n = (&self.conn).write_vectored(&[IoSlice::new(head), IoSlice::new(&buf[..n])])?;
            let payload = writer.sent(n);
            if payload > 0 {
                return Ok(payload);
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Chunked, UnixStream) {
        let (ours, host) = UnixStream::pair().unwrap();
        (Chunked::new(OwnedFd::from(ours).into()), host)
    }

    #[test]
    fn a_service_reads_payload_until_the_end_and_writes_chunks() {
        let (stream, mut host) = pair();
        host.write_all(&[1, 3, 0, 0, b'a', b'b', b'c', 1, 1, 0, 0, b'd', 2, 0, 0, 0])
            .unwrap();
        let mut got = String::new();
        stream.io().read_to_string(&mut got).unwrap();
        assert_eq!(got, "abcd");
        stream.io().write_all(b"hi").unwrap();
        stream.end_sending().unwrap();
        drop(stream);
        let mut sent = Vec::new();
        host.read_to_end(&mut sent).unwrap();
        assert_eq!(sent, [1, 2, 0, 0, b'h', b'i', 2, 0, 0, 0]);
    }

    #[test]
    fn r117_what_stops_without_an_end_is_an_error_of_its_reader() {
        for (bytes, error) in [
            (&[1, 2, 0, 0, b'h'][..], ErrorKind::UnexpectedEof),
            (&[1, 1, 0, 0, b'h', 2], ErrorKind::UnexpectedEof),
            (&[1, 1, 0, 0, b'h'], ErrorKind::UnexpectedEof),
            (&[1, 1, 0, 0, b'h', 3, 0, 0, 0], ErrorKind::ConnectionReset),
            (&[1, 1, 0, 0, b'h', 9, 0, 0, 0], ErrorKind::InvalidData),
        ] {
            let (stream, mut host) = pair();
            host.write_all(bytes).unwrap();
            drop(host);
            let mut got = Vec::new();
            let e = stream.io().read_to_end(&mut got).unwrap_err();
            assert_eq!((e.kind(), &got[..]), (error, &b"h"[..]));
        }
    }
}
