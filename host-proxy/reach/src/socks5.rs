//! SOCKS5 (RFC 1928), with the VM's name as the domain: `curl --socks5-hostname`, `socks5h://`.
//!
//! ```text
//!  client: 5, n, methods                        server: 5, method
//!  [2: 1, len, user, len, password              1, status]          RFC 1929; the password is a token
//!  client: 5, command, 0, 3, len, name, port    server: 5, reply, 0, 1, 0.0.0.0:0
//! ```
//! Only CONNECT, and only names: an address names no VM. A password that is empty is none, for curl answers so where it was given
//! none. What follows the request is the tunnel's.

use std::str;

use adit_channel::refusal::Code;

/// Most bytes of a client before its tunnel.
pub const BYTES_MAX: usize = 2 + 255 + 3 + 2 * 255 + 7 + 255;

/// No method that both know.
const NO_METHOD: u8 = 0xff;
const METHOD_NONE: u8 = 0;
const METHOD_PASSWORD: u8 = 2;
const CONNECT: u8 = 1;
const DOMAIN: u8 = 3;

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed.
    More,
    /// These bytes go to the client, and then on.
    Say(Vec<u8>),
    /// It shows a token: [`Socks5::logged_in`] says what comes of it.
    Token(Vec<u8>),
    /// It wants a tunnel to this name and port. The first so many bytes were the protocol's.
    Connect {
        /// The name, as it was sent.
        name: String,
        /// The port.
        port: u16,
        /// Bytes of the protocol.
        len: usize,
    },
    /// It is refused with these bytes, and why.
    Refuse(Vec<u8>, Why),
}

/// Why a client is refused before anybody knows which VM it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// It does not speak as it should.
    #[error("{0}")]
    Malformed(&'static str),
    /// It has shown what is no token.
    #[error("the token is none")]
    NoToken,
}

/// A client that has no tunnel yet. Pure: bytes in, steps out.
#[derive(Debug, Default)]
pub struct Socks5 {
    at: At,
    /// Bytes that were understood.
    taken: usize,
}

#[derive(Debug, Default)]
enum At {
    #[default]
    Methods,
    Password,
    LoggingIn,
    Request,
    Over,
}

impl Socks5 {
    /// Goes on with all bytes that the client has sent since the beginning.
    pub fn step(&mut self, bytes: &[u8]) -> Step {
        let Some(rest) = bytes.get(self.taken..) else {
            return Step::More;
        };
        match self.at {
            At::Methods => self.methods(rest),
            At::Password => self.password(rest),
            At::LoggingIn | At::Over => Step::More,
            At::Request => self.request(rest),
        }
    }

    /// The token was one, or not.
    pub fn logged_in(&mut self, is_one: bool) -> Step {
        if is_one {
            self.at = At::Request;
            Step::Say(vec![1, 0])
        } else {
            self.at = At::Over;
            Step::Refuse(vec![1, 1], Why::NoToken)
        }
    }

    fn methods(&mut self, bytes: &[u8]) -> Step {
        let (version, count) = match bytes {
            [] => return Step::More,
            [version] => (*version, None),
            [version, count, ..] => (*version, Some(usize::from(*count))),
        };
        if version != 5 {
            self.at = At::Over;
            return Step::Refuse(vec![], Why::Malformed("it does not speak SOCKS5"));
        }
        let Some(methods) = count.and_then(|count| bytes.get(2..2 + count)) else {
            return Step::More;
        };
        self.taken += 2 + methods.len();
        // A client that can show a token is asked for one.
        let method = [METHOD_PASSWORD, METHOD_NONE]
            .into_iter()
            .find(|m| methods.contains(m));
        self.at = match method {
            Some(METHOD_PASSWORD) => At::Password,
            Some(_) => At::Request,
            None => {
                self.at = At::Over;
                return Step::Refuse(
                    vec![5, NO_METHOD],
                    Why::Malformed("it wants another way to log in"),
                );
            }
        };
        Step::Say(vec![5, method.unwrap_or(NO_METHOD)])
    }

    fn password(&mut self, bytes: &[u8]) -> Step {
        if bytes.first().is_some_and(|version| *version != 1) {
            self.at = At::Over;
            return Step::Refuse(vec![1, 1], Why::Malformed("its log-in is none of RFC 1929"));
        }
        let field = |from: usize| {
            let len = usize::from(*bytes.get(from)?);
            bytes.get(from + 1..from + 1 + len)
        };
        let (Some(user), Some(password)) =
            (field(1), field(1).and_then(|user| field(2 + user.len())))
        else {
            return Step::More;
        };
        self.taken += 3 + user.len() + password.len();
        if password.is_empty() {
            return self.logged_in(true);
        }
        self.at = At::LoggingIn;
        Step::Token(password.to_vec())
    }

    fn request(&mut self, bytes: &[u8]) -> Step {
        let mut refuse = |reply: u8, why| {
            self.at = At::Over;
            Step::Refuse(answer(reply), Why::Malformed(why))
        };
        match bytes {
            [version, ..] if *version != 5 => return refuse(1, "its request is none of SOCKS5"),
            [_, command, ..] if *command != CONNECT => {
                return refuse(7, "it asks for something else than CONNECT");
            }
            [_, _, _, kind, ..] if *kind != DOMAIN => {
                return refuse(
                    8,
                    "it has an address where a VM's name belongs: use socks5h",
                );
            }
            _ => {}
        }
        let Some(len) = bytes.get(4).map(|len| usize::from(*len)) else {
            return Step::More;
        };
        let (Some(name), Some(&[high, low])) = (bytes.get(5..5 + len), bytes.get(5 + len..7 + len))
        else {
            return Step::More;
        };
        let Ok(name) = str::from_utf8(name) else {
            return refuse(4, "its name is no text");
        };
        self.at = At::Over;
        Step::Connect {
            name: name.to_owned(),
            port: u16::from_be_bytes([high, low]),
            len: self.taken + 7 + len,
        }
    }
}

/// A reply to a request. The address in it means nothing.
pub fn answer(reply: u8) -> Vec<u8> {
    vec![5, reply, 0, 1, 0, 0, 0, 0, 0, 0]
}

/// The reply that says what a refusal is.
pub fn reply(code: Code) -> u8 {
    match code {
        Code::NotAllowed | Code::TooOften | Code::Denied | Code::UnknownService => 2,
        Code::UnknownVm
        | Code::Ambiguous
        | Code::Locked
        | Code::NoPortProcess
        | Code::NoSession
        | Code::NoAgent => 4,
        Code::NoListener => 5,
        Code::NoAnswer | Code::DialTimedOut => 6,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All that is said to a client that sends these bytes, in pieces, and what becomes of it.
    fn run(bytes: &[u8], piece: usize, token: &[u8]) -> (Vec<u8>, Option<Step>) {
        let (mut socks, mut said, mut len) = (Socks5::default(), Vec::new(), 0);
        loop {
            let mut step = socks.step(&bytes[..len]);
            loop {
                match step {
                    Step::Say(words) => {
                        said.extend(words);
                        step = socks.step(&bytes[..len]);
                    }
                    Step::Token(shown) => step = socks.logged_in(shown == token),
                    Step::More => break,
                    end => return (said, Some(end)),
                }
            }
            if len == bytes.len() {
                return (said, None);
            }
            len = (len + piece).min(bytes.len());
        }
    }

    const REQUEST: &[u8] = b"\x05\x01\x00\x03\x05web-1\x00\x50";

    #[test]
    fn a_name_is_reached_without_and_with_a_token_in_every_piece() {
        let plain = [b"\x05\x01\x00", REQUEST, b"GET /"].concat();
        let token = [b"\x05\x02\x00\x02\x01\x01x\x03abc", REQUEST].concat();
        let empty = [b"\x05\x01\x02\x01\x00\x00", REQUEST].concat();
        for (bytes, says, len) in [
            (&plain, &b"\x05\x00"[..], 3 + REQUEST.len()),
            (&token, b"\x05\x02\x01\x00", token.len()),
            (&empty, b"\x05\x02\x01\x00", empty.len()),
        ] {
            for piece in 1..=bytes.len() {
                let (said, end) = run(bytes, piece, b"abc");
                assert_eq!(said, says);
                let (name, port) = ("web-1".to_owned(), 80);
                assert_eq!(end, Some(Step::Connect { name, port, len }), "{piece}");
            }
        }
    }

    #[test]
    fn what_is_not_for_a_vm_is_refused_with_the_reply_that_says_so() {
        let hello = b"\x05\x01\x00";
        for (rest, reply) in [
            (&b"\x05\x02\x00\x03\x01a\x00\x50"[..], 7),
            (b"\x05\x03\x00\x03\x01a\x00\x50", 7),
            (b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", 8),
            (b"\x05\x01\x00\x04", 8),
            (b"\x05\x01\x00\x03\x01\xff\x00\x50", 4),
            (b"\x04\x01\x00\x50", 1),
        ] {
            match run(&[&hello[..], rest].concat(), 1, b"").1 {
                Some(Step::Refuse(said, _)) => assert_eq!(said[1], reply, "{rest:?}"),
                other => panic!("{other:?}"),
            }
        }
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
            b"\x16\x03\x01",
        ] {
            assert!(matches!(run(bytes, 1, b"").1, Some(Step::Refuse(said, _)) if said.is_empty()));
        }
        let gssapi = run(b"\x05\x01\x01", 3, b"").1;
        assert!(matches!(gssapi, Some(Step::Refuse(said, _)) if said == [5, NO_METHOD]));
        let wrong = run(b"\x05\x01\x02\x01\x00\x01x", 1, b"abc").1;
        assert!(matches!(wrong, Some(Step::Refuse(said, _)) if said == [1, 1]));
    }

    proptest! {
        #[test]
        fn any_bytes_mean_the_same_in_every_piece_and_are_bounded(
            bytes in proptest::collection::vec(any::<u8>(), 0..BYTES_MAX + 8),
            begin in 0..3_usize,
            piece in 1..64_usize,
        ) {
            let begin = [&b""[..], b"\x05\x01\x00", b"\x05\x02\x00\x02"][begin];
            let bytes = [begin, &bytes].concat();
            let whole = run(&bytes, bytes.len().max(1), b"x");
            prop_assert_eq!(&whole, &run(&bytes, piece, b"x"));
            if bytes.len() >= BYTES_MAX {
                prop_assert!(whole.1.is_some());
            }
        }
    }
}
