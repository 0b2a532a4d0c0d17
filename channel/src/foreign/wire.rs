//! What a stream's bytes look like in its socket: themselves, or [chunks](crate::chunk) behind the hello.
//!
//! ```text
//! Plain ◄── the answer has no CHUNKS, or is none ── Hello ── accept with CHUNKS ──► Chunks
//! ```
//! The guest's answer to the hello decides, and it is read here too, because what comes right behind it is chunks already. The host
//! sends nothing between its hello and the answer, so its own chunks begin where the answer was read.

use crate::chunk::{Apart, ChunkError, Reader, Stop, Writer};
use crate::hello::{CHUNKS, Hello, PREFIX_LEN, Prefix, TAIL_MAX};

/// The bytes of both directions.
#[derive(Debug)]
pub(super) enum Wire {
    Plain,
    /// The first bytes of the guest, which may be the answer to a hello.
    Hello(Vec<u8>),
    Chunks(Box<(Writer, Reader)>),
}

impl Wire {
    /// Those of a stream that begins with a hello of the host, which offers chunks.
    pub(super) fn offering() -> Self {
        Self::Hello(Vec::new())
    }

    pub(super) fn writer(&mut self) -> Option<&mut Writer> {
        match self {
            Self::Chunks(both) => Some(&mut both.0),
            Self::Plain | Self::Hello(_) => None,
        }
    }

    pub(super) fn reader(&mut self) -> Option<&mut Reader> {
        match self {
            Self::Chunks(both) => Some(&mut both.1),
            Self::Plain | Self::Hello(_) => None,
        }
    }

    /// A head, or a part of one, was not sent yet.
    pub(super) fn owes_head(&self) -> bool {
        match self {
            Self::Chunks(both) => both.0.owes_head(),
            Self::Plain | Self::Hello(_) => false,
        }
    }

    /// How the guest's direction has stopped.
    pub(super) fn stopped(&self) -> Option<Stop> {
        match self {
            Self::Chunks(both) => both.1.stopped(),
            Self::Plain | Self::Hello(_) => None,
        }
    }

    /// As [`received`](Self::received), of bytes that were read with a head apart.
    pub(super) fn received_apart(
        &mut self,
        apart: &Apart,
        bytes: &mut [u8],
    ) -> (usize, Result<(), ChunkError>) {
        match self {
            Self::Chunks(both) => both.1.unwrap_apart(apart, bytes),
            // They are read as they come.
            Self::Plain | Self::Hello(_) => (0, Ok(())),
        }
    }

    /// Takes bytes of the guest, and leaves the payload of the stream at their beginning. Returns its length.
    pub(super) fn received(&mut self, bytes: &mut [u8]) -> (usize, Result<(), ChunkError>) {
        let of_hello = match self {
            Self::Plain => return (bytes.len(), Ok(())),
            Self::Chunks(both) => return both.1.unwrap(bytes),
            Self::Hello(answer) => match of_answer(answer, bytes) {
                Some(n) => n,
                None => return (bytes.len(), Ok(())),
            },
        };
        let Self::Hello(answer) = self else {
            return (bytes.len(), Ok(()));
        };
        let chunks = has_chunks(answer);
        *self = match chunks {
            true => Self::Chunks(Box::default()),
            false => Self::Plain,
        };
        let (n, outcome) = self.received(&mut bytes[of_hello..]);
        (of_hello + n, outcome)
    }
}

/// Collects the answer. Returns how many of the bytes belong to it once it is whole, or is known to be none.
fn of_answer(answer: &mut Vec<u8>, bytes: &[u8]) -> Option<usize> {
    let mut taken = 0;
    loop {
        let want = match answer.first_chunk::<PREFIX_LEN>() {
            None => PREFIX_LEN,
            Some(prefix) => match Prefix::parse(prefix) {
                Ok(prefix) => PREFIX_LEN + prefix.tail_len().min(TAIL_MAX),
                Err(_) => return Some(taken),
            },
        };
        let rest = &bytes[taken..];
        if answer.len() == want {
            return Some(taken);
        }
        if rest.is_empty() {
            return None;
        }
        let n = rest.len().min(want - answer.len());
        answer.extend(&rest[..n]);
        taken += n;
    }
}

fn has_chunks(answer: &[u8]) -> bool {
    let Some((prefix, tail)) = answer.split_first_chunk::<PREFIX_LEN>() else {
        return false;
    };
    match Prefix::parse(prefix).and_then(|prefix| prefix.finish(tail)) {
        Ok(Hello::Accept(accept)) => accept.common.features & CHUNKS != 0,
        Ok(Hello::Open(_) | Hello::Refuse(_)) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::{Accept, Common, Open, Refuse};
    use crate::refusal::{Code, Refusal};

    fn common(features: u64) -> Common {
        Common {
            features,
            ..Common::default()
        }
    }

    fn accept(features: u64) -> Vec<u8> {
        let common = common(features);
        Hello::Accept(Accept { common, version: 1 }).encode()
    }

    fn received(bytes: &[u8], piece: usize) -> (Vec<u8>, Wire) {
        let (mut wire, mut payload) = (Wire::offering(), Vec::new());
        for piece in bytes.chunks(piece) {
            let mut piece = piece.to_vec();
            let (n, outcome) = wire.received(&mut piece);
            assert_eq!(outcome, Ok(()));
            payload.extend(&piece[..n]);
        }
        (payload, wire)
    }

    #[test]
    fn only_an_accept_with_the_bit_begins_chunks_and_right_behind_itself() {
        let chunks = [1, 2, 0, 0, b'h', b'i', 2, 0, 0, 0];
        for features in [CHUNKS, CHUNKS | 2] {
            let bytes = [accept(features), chunks.to_vec()].concat();
            for piece in 1..=bytes.len() {
                let (payload, wire) = received(&bytes, piece);
                assert_eq!(payload, [accept(features), b"hi".to_vec()].concat());
                assert_eq!(wire.stopped(), Some(Stop::End));
            }
        }
        let refusal = Refusal::new(Code::Denied, "no");
        let refuse = Hello::Refuse(Refuse {
            common: common(CHUNKS),
            refusal,
        });
        let open = Hello::Open(Open::new("ping".parse().unwrap(), common(CHUNKS)));
        for answer in [
            accept(0),
            accept(2),
            refuse.encode(),
            open.encode(),
            b"SSH-2.0-x\r\n".to_vec(),
            [accept(CHUNKS)[..63].to_vec(), vec![0xff; 70]].concat(),
        ] {
            let bytes = [answer, chunks.to_vec()].concat();
            for piece in [1, 7, 64, 65, bytes.len()] {
                let (payload, wire) = received(&bytes, piece);
                assert_eq!(payload, bytes);
                assert!(!matches!(wire, Wire::Chunks(_)));
            }
        }
    }
}
