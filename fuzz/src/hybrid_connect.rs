//! Target `hybrid_connect`: what a VMM answers to `CONNECT`, and what a client sends to our own sockets of that kind. In whatever
//! pieces it comes, it means the same; no byte behind it is taken, and a second reader finds the same.
//!
//! Input: the length of the pieces; the VMM's bytes, or the client's.

use adit_channel::foreign::connect::{Answer, ConnectError, LINE_MAX, Step};
use adit_channel::hybrid::{self, Asked};

/// What a client asks for, read by somebody else.
fn asked(bytes: &[u8]) -> Asked {
    let line = &bytes[..bytes.len().min(hybrid::LINE_MAX)];
    let Some(end) = line.iter().position(|b| *b == b'\n') else {
        return match line.len() == hybrid::LINE_MAX {
            true => Asked::Invalid,
            false => Asked::Nothing,
        };
    };
    let mut words = std::str::from_utf8(&line[..end])
        .unwrap_or_default()
        .split_whitespace();
    let is_connect = words.next().is_some_and(|w| w.to_lowercase() == "connect");
    let port = words.next().and_then(|word| word.parse().ok());
    match (is_connect, port) {
        (true, Some(port)) => Asked::Port {
            port,
            taken: end + 1,
        },
        _ => Asked::Invalid,
    }
}

fn client(bytes: &[u8], piece: usize) {
    let expected = asked(bytes);
    assert_eq!(hybrid::asked(bytes, bytes.len().max(1)), expected);
    assert_eq!(hybrid::asked(bytes, piece), expected);
}

/// What the bytes mean, and how many of them are the answer.
fn run_in(bytes: &[u8], piece: usize) -> Result<Option<usize>, ConnectError> {
    let mut answer = Answer::default();
    for (n, now) in bytes.chunks(piece).enumerate() {
        match answer.push(now)? {
            Step::More => {}
            Step::Open { taken } => return Ok(Some(n * piece + taken)),
        }
    }
    Ok(None)
}

pub fn run(data: &[u8]) {
    let Some((piece, bytes)) = data.split_first() else {
        return;
    };
    client(bytes, usize::from(*piece).max(1));
    let whole = run_in(bytes, bytes.len().max(1));
    assert_eq!(whole, run_in(bytes, usize::from(*piece).max(1)));
    let line = bytes.split_inclusive(|b| *b == b'\n').next();
    let text = line.and_then(|l| std::str::from_utf8(l).ok());
    let number = text.and_then(|t| t.strip_prefix("OK ")?.strip_suffix('\n'));
    let is_number = |n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
    let is_answer = number.is_some_and(is_number) && line.is_some_and(|l| l.len() <= LINE_MAX);
    match whole {
        Ok(Some(len)) => assert!(is_answer && line.map(<[u8]>::len) == Some(len)),
        Ok(None) => assert!(bytes.len() < LINE_MAX && !bytes.contains(&b'\n')),
        Err(_) => assert!(!is_answer),
    }
}
