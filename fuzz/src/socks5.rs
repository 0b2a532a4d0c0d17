//! Target `socks5`: a client's bytes. In whatever pieces they come, they mean the same; what is taken of them is bounded, and the
//! name and port that come out are those that a second reader finds.
//!
//! Input: the length of the pieces; the client's bytes.

use adit_host_proxy::front::socks5::{BYTES_MAX, Socks5, Step};

/// What was said to the client, and what becomes of it. `abc` is a token.
fn run_in(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<Step>) {
    let (mut socks, mut said, mut len) = (Socks5::default(), Vec::new(), 0);
    loop {
        let mut step = socks.step(&bytes[..len]);
        loop {
            step = match step {
                Step::Say(words) => {
                    said.extend(words);
                    socks.step(&bytes[..len])
                }
                Step::Token(token) => socks.logged_in(token == b"abc"),
                Step::More => break,
                end => return (said, Some(end)),
            };
        }
        if len == bytes.len() {
            return (said, None);
        }
        len = (len + piece).min(bytes.len());
    }
}

pub fn run(data: &[u8]) {
    let Some((piece, bytes)) = data.split_first() else {
        return;
    };
    let piece = usize::from(*piece).max(1);
    let whole = run_in(bytes, bytes.len().max(1));
    assert_eq!(whole, run_in(bytes, piece));
    let (said, end) = whole;
    assert!(end.is_some() || bytes.len() < BYTES_MAX);
    if let Some(Step::Connect { name, port, len }) = end {
        assert!(len <= BYTES_MAX && name.len() <= 255);
        let before = &bytes[..len];
        let [high, low] = port.to_be_bytes();
        let request = [&[5, 1][..], &[before[len - name.len() - 5]], &[3]].concat();
        let request = [
            &request,
            &[name.len() as u8][..],
            name.as_bytes(),
            &[high, low],
        ]
        .concat();
        assert!(before.ends_with(&request));
        // Nobody gets through who showed a token that is none.
        assert!(matches!(said[..], [5, 0] | [5, 2, 1, 0]));
    }
}
