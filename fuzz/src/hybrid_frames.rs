//! Target `hybrid_frames`: chunks of a stream whose carrier does not keep half-closes. In whatever pieces they come, they mean the
//! same, and a second reader finds the same payload and the same end. What a writer makes of any payload is read as that.
//!
//! Input: the length of the pieces; the peer's bytes.

use adit_channel::chunk::{CHUNK_MAX, HEAD_LEN, Reader, Stop, Writer};

/// The payload, how it has stopped, and whether all of it is of this protocol.
type Read = (Vec<u8>, Option<Stop>, bool);

fn read_in(bytes: &[u8], piece: usize) -> (Read, bool) {
    let (mut reader, mut payload) = (Reader::default(), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        let mut piece = piece.to_vec();
        let (n, outcome) = reader.unwrap(&mut piece);
        payload.extend(&piece[..n]);
        if outcome.is_err() {
            return ((payload, reader.stopped(), false), false);
        }
    }
    let has_ended = reader.end().is_ok();
    ((payload, reader.stopped(), true), has_ended)
}

/// The second reader, which has all bytes at once.
fn read_again(mut bytes: &[u8]) -> Read {
    let (mut payload, mut stopped) = (Vec::new(), None);
    while let Some((head, rest)) = bytes.split_first_chunk::<HEAD_LEN>() {
        let [kind, a, b, c] = head.map(usize::from);
        let len = a | b << 8 | c << 16;
        let is_allowed = match (kind, stopped) {
            (1, None) => (1..=CHUNK_MAX).contains(&len),
            (2, None) | (3, None | Some(Stop::End)) => len == 0,
            _ => false,
        };
        if !is_allowed {
            return (payload, stopped, false);
        }
        stopped = match kind {
            2 => Some(Stop::End),
            3 => Some(Stop::Abort),
            _ => None,
        };
        let (of_chunk, behind) = rest.split_at(len.min(rest.len()));
        payload.extend(of_chunk);
        bytes = behind;
    }
    (payload, stopped, true)
}

fn written(payload: &[u8], piece: usize) -> Vec<u8> {
    let (mut writer, mut out, mut rest) = (Writer::default(), Vec::new(), payload);
    while !rest.is_empty() || !writer.is_between() {
        let (head, n) = writer.next(rest.len().min(piece.max(1)));
        let mut bytes = [head, &rest[..n]].concat();
        bytes.truncate(piece.max(1));
        out.extend(&bytes);
        rest = &rest[writer.sent(bytes.len())..];
    }
    assert!(writer.stop(Stop::End));
    while writer.owes_head() {
        let head = writer.next(0).0[..1].to_vec();
        out.extend(&head);
        assert_eq!(writer.sent(1), 0);
    }
    out
}

pub fn run(data: &[u8]) {
    let Some((piece, bytes)) = data.split_first() else {
        return;
    };
    let piece = usize::from(*piece);
    let (whole, has_ended) = read_in(bytes, bytes.len());
    assert_eq!((whole.clone(), has_ended), read_in(bytes, piece));
    assert_eq!(whole, read_again(bytes));
    assert!(!has_ended || whole.1 == Some(Stop::End));
    let (back, has_ended) = read_in(&written(bytes, piece), piece + 1);
    assert_eq!(back, (bytes.to_vec(), Some(Stop::End), true));
    assert!(has_ended);
}
