//! Target `dns_query`: a DNS client's bytes. Nothing is said to what is no question, an answer is hardly longer than its question, and
//! a second reader finds the header, the question and the counts of the answer.
//!
//! Input: a byte that says how it comes and what is there; the client's bytes.

use std::net::IpAddr;

use adit_host_proxy::front::dns::zone::{Found, HEADER, MESSAGE_MAX, MORE_MAX, Over, Read, Zone};
use adit_host_proxy::reach::Suffix;

/// Bytes of a name from `at` on, without pointers; none: it has one, or is cut.
fn name_len(bytes: &[u8], at: usize) -> Option<usize> {
    let mut len = 0;
    loop {
        match *bytes.get(at + len)? {
            0 => return Some(len + 1),
            label @ 1..=63 => len += 1 + usize::from(label),
            _ => return None,
        }
    }
}

fn check(question: &[u8], answer: &[u8]) {
    let [a, b] = [question, answer].map(|bytes| &bytes[..HEADER]);
    assert_eq!(a[..2], b[..2], "another number");
    assert_eq!(a[2] & 0x80, 0, "an answer was answered");
    assert_eq!(
        b[2] & 0xf9,
        a[2] & 0x79 | 0x80,
        "opcode and RD are the question's"
    );
    assert_eq!(b[3] & 0xf0, 0, "nothing is recursive, signed or reserved");
    assert!(answer.len() <= MESSAGE_MAX);
    if answer.len() == HEADER {
        assert_eq!(b[4..], [0; 8]);
        return;
    }
    assert_eq!(b[4..6], [0, 1]);
    // A name that is written with a pointer is longer without.
    if let Some(len) = name_len(question, HEADER) {
        let end = HEADER + len + 4;
        assert_eq!(
            question[HEADER..end],
            answer[HEADER..end],
            "another question"
        );
        assert!(answer.len() <= question.len() + MORE_MAX);
    } else {
        assert!(answer.len() <= question.len() + MORE_MAX + HEADER);
    }
}

pub fn run(data: &[u8]) {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let over = match how & 1 {
        0 => Over::Udp,
        _ => Over::Tcp,
    };
    let suffix = match how & 2 {
        0 => Suffix::default(),
        _ => ".vm.example".parse().unwrap_or_default(),
    };
    let own: [IpAddr; 2] = [
        [192, 0, 2, 1].into(),
        [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into(),
    ];
    let found = match how >> 2 & 3 {
        0 => Found::At(own.to_vec()),
        1 => Found::Empty,
        2 => Found::Nowhere,
        _ => Found::Unknown,
    };
    match Zone::new(&suffix, own.to_vec()).read(bytes, over) {
        Read::Silence => assert!(bytes.len() < HEADER || bytes[2] & 0x80 != 0),
        Read::Reply(reply) => check(bytes, &reply.bytes),
        Read::Question(question) => {
            check(bytes, &question.answer(&found).bytes);
            let truncated = question.truncated().bytes;
            check(bytes, &truncated);
            assert_ne!(truncated[2] & 2, 0);
        }
    }
}
