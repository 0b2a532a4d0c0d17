//! Golden bytes, every split and every cut, and what is refused.

use super::*;

/// What goes out for these pieces of payload and a stop, if at most `most` bytes are accepted at a time.
fn written(pieces: &[&[u8]], stop: Option<Stop>, most: usize) -> Vec<u8> {
    let (mut writer, mut out) = (Writer::default(), Vec::new());
    let mut push = |writer: &mut Writer, mut payload: &[u8]| {
        loop {
            let (head, n) = writer.next(payload.len());
            let mut bytes = [head, &payload[..n]].concat();
            bytes.truncate(most);
            out.extend(&bytes);
            payload = &payload[writer.sent(bytes.len())..];
            if payload.is_empty() && writer.is_between() {
                return;
            }
        }
    };
    for piece in pieces {
        push(&mut writer, piece);
    }
    if let Some(stop) = stop {
        assert!(writer.stop(stop));
        push(&mut writer, &[]);
    }
    out
}

/// Reads in pieces of this length, whichever way. Returns the payload, and what became of it.
fn read(bytes: &[u8], piece: usize) -> (Vec<u8>, Reader, Result<(), ChunkError>) {
    let (payload, reader, outcome) = read_as_they_come(bytes, piece);
    for only_head in [true, false] {
        for room in [piece, 3, 1000] {
            let (same, of_it, became) = read_apart(bytes, piece, room, only_head);
            assert_eq!((&same, became), (&payload, outcome), "{only_head} {room}");
            assert_eq!(of_it.stopped(), reader.stopped());
            if outcome.is_ok() {
                assert_eq!(of_it.end(), reader.end());
            }
        }
    }
    (payload, reader, outcome)
}

/// With the heads apart, at most so many bytes at a time, into a buffer of `room` bytes.
fn read_apart(
    mut bytes: &[u8],
    piece: usize,
    room: usize,
    only_head: bool,
) -> (Vec<u8>, Reader, Result<(), ChunkError>) {
    let (mut reader, mut payload) = (Reader::default(), Vec::new());
    let mut body = vec![0; room.max(1)];
    while !bytes.is_empty() {
        let (mut apart, mut came) = (Apart::default(), 0);
        for part in apart.parts(&reader, &mut body, only_head) {
            let n = part.len().min(bytes.len()).min(piece.max(1) - came);
            part[..n].copy_from_slice(&bytes[..n]);
            (bytes, came) = (&bytes[n..], came + n);
        }
        apart.came(came);
        assert!(came > 0 && apart.is_any());
        let (n, outcome) = reader.unwrap_apart(&apart, &mut body);
        payload.extend(&body[..n]);
        if let Err(e) = outcome {
            return (payload, reader, Err(e));
        }
    }
    (payload, reader, Ok(()))
}

fn read_as_they_come(bytes: &[u8], piece: usize) -> (Vec<u8>, Reader, Result<(), ChunkError>) {
    let (mut reader, mut payload) = (Reader::default(), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        let mut piece = piece.to_vec();
        let (n, outcome) = reader.unwrap(&mut piece);
        payload.extend(&piece[..n]);
        if let Err(e) = outcome {
            return (payload, reader, Err(e));
        }
    }
    (payload, reader, Ok(()))
}

#[test]
fn chunks_have_golden_bytes() {
    assert_eq!(
        written(&[b"abc", b"d"], Some(Stop::End), usize::MAX),
        [1, 3, 0, 0, b'a', b'b', b'c', 1, 1, 0, 0, b'd', 2, 0, 0, 0]
    );
    assert_eq!(written(&[], Some(Stop::Abort), usize::MAX), [3, 0, 0, 0]);
    let largest = vec![7; CHUNK_MAX + 1];
    let bytes = written(&[&largest], None, usize::MAX);
    assert_eq!(bytes[..5], [1, 0, 0, 1, 7]);
    assert_eq!(bytes[HEAD_LEN + CHUNK_MAX..], [1, 1, 0, 0, 7]);
    // The bit is in hellos, so it never changes.
    assert_eq!(crate::hello::CHUNKS, 1);
}

#[test]
fn in_whatever_pieces_they_are_written_and_read_the_bytes_are_the_same() {
    let pieces: [&[u8]; 3] = [b"request", b"x", b"more of it"];
    let whole = written(&pieces, Some(Stop::End), usize::MAX);
    for most in 1..=whole.len() {
        assert_eq!(written(&pieces, Some(Stop::End), most), whole);
        let (payload, reader, outcome) = read(&whole, most);
        assert_eq!((payload, outcome), (pieces.concat(), Ok(())));
        assert_eq!((reader.stopped(), reader.end()), (Some(Stop::End), Ok(())));
    }
}

#[test]
fn r117_cut_at_any_byte_it_is_no_end() {
    let whole = written(&[b"request", b"x"], Some(Stop::End), usize::MAX);
    for cut in 0..whole.len() {
        let (payload, reader, outcome) = read(&whole[..cut], 5);
        assert!(b"requestx".starts_with(&payload[..]) && outcome == Ok(()));
        assert_eq!(reader.end(), Err(ChunkError::Cut), "{cut}");
    }
    // An abort is none either, whether there was an end before or not.
    for before in [None, Some(Stop::End)] {
        let mut bytes = written(&[b"x"], before, usize::MAX);
        bytes.extend(written(&[], Some(Stop::Abort), usize::MAX));
        let (_, reader, outcome) = read(&bytes, 3);
        assert_eq!((reader.stopped(), outcome), (Some(Stop::Abort), Ok(())));
        assert_eq!(reader.end(), Err(ChunkError::Cut));
    }
    // Nor is one behind which something has begun.
    let (_, reader, _) = read(&[2, 0, 0, 0, 3], 9);
    assert_eq!(reader.end(), Err(ChunkError::Cut));
}

#[test]
fn what_is_none_of_it_is_refused_behind_the_bytes_before() {
    let behind = |kind| ChunkError::Behind { kind };
    let length = |kind, len| ChunkError::Length { kind, len };
    for (bytes, error) in [
        (&[0, 0, 0, 0][..], ChunkError::Kind { kind: 0 }),
        (&[4, 0, 0, 0], ChunkError::Kind { kind: 4 }),
        (b"SSH-", ChunkError::Kind { kind: b'S' }),
        (&[1, 0, 0, 0], length(1, 0)),
        (&[1, 1, 0, 1], length(1, CHUNK_MAX as u32 + 1)),
        (&[1, 255, 255, 255], length(1, 0xff_ffff)),
        (&[2, 1, 0, 0], length(2, 1)),
        (&[3, 0, 0, 1], length(3, 1 << 16)),
        (&[2, 0, 0, 0, 1, 1, 0, 0, 9], behind(1)),
        (&[2, 0, 0, 0, 2, 0, 0, 0], behind(2)),
        (&[3, 0, 0, 0, 3, 0, 0, 0], behind(3)),
        (&[3, 0, 0, 0, 2, 0, 0, 0], behind(2)),
    ] {
        let bytes = [&[1, 2, 0, 0, b'o', b'k'], bytes].concat();
        for piece in 1..=bytes.len() {
            let (payload, _, outcome) = read(&bytes, piece);
            assert_eq!((&payload[..], outcome), (&b"ok"[..], Err(error)));
        }
    }
}

#[test]
fn a_stop_waits_for_the_chunk_before_it() {
    let mut writer = Writer::default();
    let (head, n) = writer.next(3);
    assert_eq!((head.len(), n), (HEAD_LEN, 3));
    assert_eq!(writer.sent(HEAD_LEN + 1), 1);
    assert!(!writer.stop(Stop::End));
    // More payload came meanwhile: it belongs to the next chunk.
    let (head, n) = writer.next(10);
    assert_eq!((head.len(), n), (0, 2));
    assert_eq!(writer.sent(2), 2);
    assert!(writer.stop(Stop::End) && !writer.is_between());
    let (head, n) = writer.next(0);
    assert_eq!((head, n), (&[2, 0, 0, 0][..], 0));
    assert_eq!(writer.sent(HEAD_LEN), 0);
    assert!(writer.is_between());
}
